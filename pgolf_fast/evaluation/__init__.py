"""Evaluation: an artifact and the validation split in, bits per byte out.

    windows.py       which tokens the model reads and which positions it is scored on
    score_ledger.py  every loss, once, in the order in which it was given
    referee.py       alone holds the tokens; scores, reveals what is scored, and lets weights change after that

An evaluator is a strategy over these: it names windows and learns from what has been scored. See `Evaluator` in referee.py.
"""
