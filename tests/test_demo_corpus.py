import pytest

from pgolf_fast import demo_corpus
from pgolf_fast.data import load_validation
from pgolf_fast.data_verify import VerifyConfig, verify


def test_documents_are_many_different_and_always_the_same():
    documents = demo_corpus.documents()
    assert documents == demo_corpus.documents()
    names, texts = zip(*documents)
    assert len(set(names)) == len(names) > 300
    assert 3e6 < sum(map(len, texts)) < 3e7 and "def " in "".join(texts)


@pytest.mark.parametrize(("vocab_size", "is_caseops"), [(1024, False), (2048, True)])
def test_a_set_is_made_and_verifies(tmp_path, vocab_size, is_caseops):
    record = demo_corpus.make(tmp_path, vocab_size, is_caseops)
    assert record.splits["train"].tokens > 1_000_000 and record.splits["val"].documents >= 20
    report = verify(tmp_path, VerifyConfig(processes=1))
    assert report.is_ok, report.findings
    assert load_validation(tmp_path, row=2048).has_sidecar == is_caseops
    assert demo_corpus.make(tmp_path, vocab_size, is_caseops) == record  # kept, not made again
