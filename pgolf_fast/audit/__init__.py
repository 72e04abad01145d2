"""The audit: does an evaluator keep the rules of the challenge, and does an artifact hold what it says?

    stream.py      a short text with documents, repetitions and multi-byte characters, of which every byte is known
    watch.py       what the evaluator does to the model while it runs: forwards, weight changes, network
    subjects.py    evaluators of any make, behind one interface
    invariants.py  the rules that can be run, each with its evidence
    contents.py    the rules about an artifact
    fixtures.py    evaluators that cheat; `pgolf audit --self-test` must catch each

Nothing here trusts what an evaluator says about itself: it is run many times on streams that differ where they must not matter.
"""
