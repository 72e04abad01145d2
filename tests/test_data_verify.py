"""Each planted fault must be caught by name; a sound set, and one without any record, must pass."""

import dataclasses
import shutil

import numpy as np
import pytest

from pgolf_fast import dataset, shards
from pgolf_fast.data_build import BuildConfig, build
from pgolf_fast.data_verify import PUBLIC_SETS, PublicSet, VerifyConfig, verify
from pgolf_fast.errors import UserError
from pgolf_fast.shards import split_documents
from tests import corpus

NUM_VAL = 20
CONFIG = VerifyConfig(processes=1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """One sound set of each kind, built once."""
    folder = tmp_path_factory.mktemp("sets")
    documents = corpus.write_jsonl(folder / "documents.jsonl", corpus.texts())
    for name, is_caseops in (("plain", False), ("caseops", True)):
        corpus.tokenizer(is_caseops).save(folder / f"{name}.model")
        build(BuildConfig((documents,), folder / f"{name}.model", val_documents=NUM_VAL, shard_tokens=4000, processes=1), folder / name)
    return folder


@pytest.fixture(params=["recorded", "published"])
def folder(request, sets, tmp_path):
    """A copy to damage: as our build leaves it, and as the challenge publishes (shards only, the tokenizer beside them)."""
    shutil.copytree(sets / "caseops", tmp_path / "set")
    if request.param == "published":
        (tmp_path / "set" / dataset.RECORD_NAME).unlink()
    return tmp_path / "set"


def check(folder, **fields):
    return verify(folder, dataclasses.replace(CONFIG, **{"val_documents": NUM_VAL, **fields}))


def assert_found(report, check_name, where, *words):
    """One finding of this check names the file and says all the words; every finding has a remedy."""
    assert not report.is_ok and all(finding.remedy for finding in report.findings)
    texts = [str(finding) for finding in report.findings if finding.check == check_name]
    assert any(where in text and all(word in text for word in words) for text in texts), texts


@pytest.mark.parametrize("name", ["plain", "caseops"])
def test_a_sound_set_passes_and_is_certified(sets, name):
    report = verify(sets / name, dataclasses.replace(CONFIG, documents=(sets / "documents.jsonl",)))
    assert report.is_ok, report.findings
    tokens, certificate = shards.read_split(shards.find_shards(sets / name, "val")), report.certificate
    scored = (len(tokens) - 1) // 2048 * 2048
    assert certificate["result"] == "every check passed"
    assert certificate["validation documents"] == NUM_VAL and certificate["validation tokens"] == len(tokens)
    assert certificate["scored tokens (rows of 2048)"] == scored
    assert certificate["training documents"] == len(corpus.texts()) - NUM_VAL
    if name == "caseops":
        counts = shards.read_split(shards.find_shards(sets / name, "val_bytes"))
        assert certificate["scored bytes"] == counts[1 : scored + 1].sum(dtype=np.int64)


def test_a_set_without_a_record_passes(folder):
    assert check(folder).is_ok


def test_planted_zero_byte_shard(folder):
    (folder / "fineweb_train_000001.bin").write_bytes(b"")
    assert_found(check(folder), "headers", "fineweb_train_000001.bin", "zero bytes")


def test_planted_wrong_magic(folder):
    path = folder / "fineweb_train_000000.bin"
    path.write_bytes(np.int32(20240801).tobytes() + path.read_bytes()[4:])
    assert_found(check(folder), "headers", "fineweb_train_000000.bin", "byte 0: magic 20240801")


def test_planted_short_file(folder):
    path = folder / "fineweb_val_000000.bin"
    path.write_bytes(path.read_bytes()[:-10])
    assert_found(check(folder), "headers", "fineweb_val_000000.bin", "truncated")


def test_planted_validation_set_of_fewer_documents(sets, tmp_path):
    # The trap of the published preparation script, to scale: built with fewer validation documents than were said.
    config = BuildConfig((sets / "documents.jsonl",), sets / "caseops.model", val_documents=NUM_VAL // 5, processes=1)
    build(config, tmp_path / "set")
    report = verify(tmp_path / "set", dataclasses.replace(CONFIG, val_documents=NUM_VAL))
    assert_found(report, "documents", "fineweb_val_000000.bin", "4 validation documents where 20 were said", "--val-documents 20")


def test_planted_10_000_documents_where_the_challenge_has_50_000(tmp_path):
    shards.write_shard(tmp_path / "fineweb_val_000000.bin", np.tile([1, 300], 10_000))
    shards.write_shard(tmp_path / "fineweb_train_000000.bin", np.tile([1, 301], 10))
    report = verify(tmp_path, CONFIG)  # nothing said: the challenge's own number holds
    assert_found(report, "documents", "fineweb_val_000000.bin", "10,000 validation documents where 50,000 were said", "40,000")


def test_planted_overlapping_document(folder):
    document = list(split_documents(shards.read_split(shards.find_shards(folder, "val"))))[7]
    path = shards.find_shards(folder, "train")[-1]
    shards.write_shard(path, np.concatenate([shards.open_shard(path), document]))
    number = len(corpus.texts()) - NUM_VAL
    assert_found(check(folder), "overlap", str(folder), "1 training documents are validation documents", f"training document {number}")


def test_an_overlap_across_two_shards_is_found_too(folder):
    document = list(split_documents(shards.read_split(shards.find_shards(folder, "val"))))[7]
    last = shards.find_shards(folder, "train")[-1]
    shards.write_shard(last, np.concatenate([shards.open_shard(last), document[:5]]))
    number = int(last.name[-10:-4]) + 1
    shards.write_shard(folder / shards.shard_name("train", number), document[5:6])
    shards.write_shard(folder / shards.shard_name("train", number + 1), document[6:])
    assert_found(check(folder), "overlap", str(folder), "1 training documents")


def test_planted_sidecar_among_the_validation_shards(folder):
    number = len(shards.find_shards(folder, "val"))
    shutil.copy(folder / "fineweb_val_bytes_000000.bin", folder / shards.shard_name("val", number))
    assert_found(check(folder), "vocabulary", shards.shard_name("val", number), "looks like a byte sidecar", "rename or remove")


def test_a_sidecar_that_does_not_line_up(folder):
    path = folder / "fineweb_val_bytes_000000.bin"
    counts = shards.open_shard(path).copy()
    shards.write_shard(path, np.roll(counts, 1))
    assert_found(check(folder), "sidecar", "fineweb_val_bytes_000000.bin", "is BOS but counts")


def test_spaces_counted_twice(folder):
    tokenizer = corpus.tokenizer(True)
    for tokens_path, path in zip(shards.find_shards(folder, "val"), shards.find_shards(folder, "val_bytes")):
        has_space = tokenizer.piece_bytes.has_space.numpy()[shards.open_shard(tokens_path)]
        shards.write_shard(path, shards.open_shard(path) + has_space)
    assert_found(check(folder), "sidecar", "fineweb_val_bytes_000000.bin", "of the tokens cover just their piece's own bytes")


def test_missing_sidecar_missing_shard_and_strange_names(folder):
    (folder / "fineweb_val_bytes_000000.bin").unlink()
    assert_found(check(folder), "files", "fineweb_val_bytes_000000.bin", "missing between the others")
    for path in shards.find_shards(folder, "val_bytes"):
        path.unlink()
    assert_found(check(folder), "sidecar", "fineweb_val_bytes_000000.bin", "missing; CaseOps scores count original bytes")
    (folder / "fineweb_val_1.bin").touch()
    assert_found(check(folder), "files", "fineweb_val_1.bin", "not the name of a shard")


def test_another_tokenizer_is_noticed(folder, sets):
    # The same vocabulary size, other pieces: the byte rule still counts, so only the sidecar can tell.
    report = check(folder, tokenizer=sets / "plain.model")
    assert not report.is_ok


def test_a_token_outside_the_vocabulary(folder):
    path = folder / "fineweb_train_000000.bin"
    tokens = shards.open_shard(path).copy()
    tokens[100] = corpus.VOCAB_SIZE
    shards.write_shard(path, tokens)
    assert_found(check(folder), "vocabulary", "fineweb_train_000000.bin", f"byte 1224: token {corpus.VOCAB_SIZE} is outside")


def test_one_changed_token_shows_in_the_hashes_and_against_the_source(sets, tmp_path):
    shutil.copytree(sets / "caseops", tmp_path / "set")
    path = tmp_path / "set/fineweb_train_000001.bin"
    tokens = shards.open_shard(path).copy()
    tokens[np.flatnonzero(tokens > 300)[0]] -= 1
    shards.write_shard(path, tokens)
    report = verify(tmp_path / "set", dataclasses.replace(CONFIG, documents=(sets / "documents.jsonl",)))
    assert_found(report, "hashes", "fineweb_train_000001.bin", "is not the file that the build wrote")
    assert_found(report, "source", "fineweb_train_000000.bin", "is not the source's")


def test_an_unfinished_build_is_noticed(sets, tmp_path):
    shutil.copytree(sets / "caseops", tmp_path / "set")
    record = dataset.load_record(tmp_path / "set")
    record.is_complete = False
    record.save(tmp_path / "set")
    assert_found(check(tmp_path / "set"), "files", dataset.RECORD_NAME, "did not finish", "same `pgolf data build` again")


def test_the_source_may_stand_in_two_places(sets, tmp_path):
    val = corpus.write_jsonl(tmp_path / "val.jsonl", corpus.texts()[:5])
    train = corpus.write_jsonl(tmp_path / "train.jsonl", corpus.texts()[3:30])  # two of them are validation's, and left out
    build(BuildConfig((train,), sets / "caseops.model", val=(val,), processes=1, max_train_tokens=5000), tmp_path / "set")
    report = verify(tmp_path / "set", dataclasses.replace(CONFIG, documents=(train,), val=(val,)))
    assert report.is_ok, report.findings
    report = verify(tmp_path / "set", dataclasses.replace(CONFIG, documents=(val,), val=(train,)))
    assert_found(report, "source", "fineweb_val_000000.bin")


def test_the_source_is_compared_to_its_last_byte(sets, tmp_path):
    documents = corpus.write_jsonl(tmp_path / "d.jsonl", ["One.", "Two, with a space at its end. ", "Three is for training.", " Four."])
    build(BuildConfig((documents,), sets / "caseops.model", val_documents=2, processes=1), tmp_path / "set")
    report = verify(tmp_path / "set", dataclasses.replace(CONFIG, documents=(documents,)))
    assert report.is_ok, report.findings
    seen = "4 documents, 62 bytes of text; tokens count 60 (2 documents lost white space at their ends)"
    assert report.checks["source"] == seen


def test_public_sets_are_recognised_by_tokens_and_bytes(sets, monkeypatch):
    own = verify(sets / "caseops", CONFIG).certificate
    known = PublicSet("mine", corpus.VOCAB_SIZE, True, own["scored tokens (rows of 2048)"], own["scored bytes"] + 2, bytes_tolerance=2)
    monkeypatch.setattr("pgolf_fast.data_verify.PUBLIC_SETS", (known,))
    assert verify(sets / "caseops", CONFIG).certificate["validation set"] == "the public mine set"
    monkeypatch.setattr("pgolf_fast.data_verify.PUBLIC_SETS", (dataclasses.replace(known, bytes_tolerance=1),))
    assert "scored bytes instead of" in verify(sets / "caseops", CONFIG).certificate["validation set"]


# (vocabulary, CaseOps) to scored tokens, bytes, and how exactly these are known: golden constants of the two specifications and the logs.
LOGGED_SETS = {
    (1024, False): (62_021_632, 151_080_363, 0),
    (4096, False): (45_508_608, None, 0),
    (8192, False): (40_540_160, None, 0),
    (8192, True): (47_851_520, 151_074_499, 2),
}


def test_the_public_sets_are_those_of_the_logs():
    known = {(s.vocab_size, s.is_caseops): (s.scored_tokens, s.scored_bytes, s.bytes_tolerance) for s in PUBLIC_SETS}
    assert known == LOGGED_SETS


def test_without_a_tokenizer_the_rest_is_still_checked(folder):
    (folder / dataset.TOKENIZER_NAME).unlink()
    report = check(folder)
    assert report.is_ok and "no tokenizer here; give --tokenizer" in report.checks["bytes"]
    with pytest.raises(UserError, match="needs the tokenizer"):
        check(folder, documents=(folder,))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        verify(tmp_path / "nothing", CONFIG)


def test_several_processes_see_the_same(sets, monkeypatch):
    monkeypatch.setattr("pgolf_fast.data_verify.Verification.is_large", lambda self: True)
    assert verify(sets / "caseops", VerifyConfig(processes=2)) == verify(sets / "caseops", CONFIG)
