import dataclasses
import filecmp
import gzip
import json

import numpy as np
import pytest
import zstandard

from pgolf_fast import caseops, dataset, shards
from pgolf_fast.data_build import BuildConfig, build
from pgolf_fast.documents import find_files
from pgolf_fast.errors import UserError
from pgolf_fast.shards import split_documents
from tests import corpus

NUM_VAL = 20
SHARD_TOKENS = 3000


@pytest.fixture
def config(tmp_path):
    model = tmp_path / "t.model"
    corpus.tokenizer(True).save(model)
    documents = corpus.write_jsonl(tmp_path / "documents.jsonl", corpus.texts())
    return BuildConfig((documents,), model, val_documents=NUM_VAL, shard_tokens=SHARD_TOKENS, processes=1)


def tokens_of(folder, split="train"):
    return shards.read_split(shards.find_shards(folder, split))


def assert_same_files(one, other):
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    different = [name for name in names if not filecmp.cmp(one / name, other / name, shallow=False)]
    assert not different


@pytest.mark.parametrize("chunk_bytes", [2 << 20, 5000], ids=["one chunk", "many chunks"])
def test_the_shards_are_the_documents_one_after_the_other(config, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr("pgolf_fast.documents.CHUNK_BYTES", chunk_bytes)
    record = build(config, tmp_path / "set")
    processor = corpus.tokenizer(True).processor
    expected = [[1, *processor.encode(caseops.encode_ref(text))] for text in corpus.texts()]
    val, train = expected[:NUM_VAL], expected[NUM_VAL:]
    assert tokens_of(tmp_path / "set", "val").tolist() == sum(val, [])
    assert tokens_of(tmp_path / "set", "train").tolist() == sum(train, [])
    assert all(shards.count_tokens(path) == SHARD_TOKENS for path in shards.find_shards(tmp_path / "set", "train")[:-1])
    counts = tokens_of(tmp_path / "set", "val_bytes")
    texts = corpus.texts()[:NUM_VAL]
    stripped = sum(len(text.encode()) for text in texts) - int(counts.sum(dtype=np.int64))
    assert 0 < stripped < 40  # the odd documents have white space at their ends
    assert record.is_complete and record.splits["val"].counted_bytes == counts.sum(dtype=np.int64)
    assert record.splits["train"].documents == len(train) and record.splits["train"].text_bytes == sum(
        len(text.encode()) for text in corpus.texts()[NUM_VAL:]
    )
    assert dataset.load_record(tmp_path / "set") == record
    assert (tmp_path / "set/tokenizer.model").read_bytes() == config.tokenizer.read_bytes()


def test_the_number_of_processes_does_not_show(config, tmp_path, monkeypatch):
    monkeypatch.setattr("pgolf_fast.documents.CHUNK_BYTES", 5000)
    build(config, tmp_path / "one")
    with monkeypatch.context() as here:
        here.setattr("pgolf_fast.documents.tokenize_chunk", None)  # the other processes have their own
        build(dataclasses.replace(config, processes=2), tmp_path / "two")
    assert_same_files(tmp_path / "one", tmp_path / "two")


class Interrupted(Exception):
    pass


def test_an_interrupted_build_goes_on_where_it_stopped(config, tmp_path, monkeypatch):
    monkeypatch.setattr("pgolf_fast.documents.CHUNK_BYTES", 5000)
    # A duplicate in the training split, so that a left-out document stands before some of the cuts.
    corpus.write_jsonl(config.documents[0], [*corpus.texts()[:40], corpus.texts()[0], *corpus.texts()[40:]])
    build(config, tmp_path / "straight")
    num_chunks = []
    build(config, tmp_path / "counted", lambda done, total: num_chunks.append(done))
    assert num_chunks == sorted(num_chunks) and len(num_chunks) > 10
    for stop_after in range(0, len(num_chunks), 3):
        seen = []

        def progress(done, total, stop_after=stop_after, seen=seen):
            seen.append(done)
            if len(seen) > stop_after:
                raise Interrupted

        folder = tmp_path / f"stopped{stop_after}"
        with pytest.raises(Interrupted):
            build(config, folder, progress)
        assert not dataset.load_record(folder).is_complete and not list(folder.glob("*.partial"))
        build(config, folder)
        assert_same_files(tmp_path / "straight", folder)


def test_a_finished_build_is_left_alone(config, tmp_path):
    first = build(config, tmp_path / "set")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}
    assert build(config, tmp_path / "set") == first
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "set").iterdir()}


def test_every_format_gives_the_same_shards(config, tmp_path):
    lines = config.documents[0].read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.zst").write_bytes(zstandard.compress(lines[:1000]) + zstandard.compress(lines[1000:]))  # two frames
    (tmp_path / "blank.jsonl").write_bytes(lines.replace(b"\n", b"\n \n"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(corpus.texts()):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8", newline="")
    build(config, tmp_path / "set")
    for source in ("a.jsonl.zst", "a.jsonl.gz", "a.zst", "blank.jsonl", "texts"):
        seen = []
        build(dataclasses.replace(config, documents=(tmp_path / source,)), tmp_path / f"set {source}", lambda *done: seen.append(done))
        size = sum(path.stat().st_size for path in find_files([tmp_path / source]))
        assert seen == sorted(seen) and seen[-1] == (size, size), "progress ends with the last byte of all files"
        for split in shards.SPLITS:
            assert np.array_equal(tokens_of(tmp_path / "set", split), tokens_of(tmp_path / f"set {source}", split))


def test_parquet(config, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the [data] extra is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": list(range(len(corpus.texts()))), "body": corpus.texts()}), path, row_group_size=7)
    build(config, tmp_path / "set")
    build(dataclasses.replace(config, documents=(path,), text_field="body"), tmp_path / "parquet")
    assert np.array_equal(tokens_of(tmp_path / "set"), tokens_of(tmp_path / "parquet"))
    (tmp_path / "cut.parquet").write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="cut.parquet: not a whole Parquet file"):
        build(dataclasses.replace(config, documents=(tmp_path / "cut.parquet",)), tmp_path / "cut")
    with pytest.raises(UserError, match="no column 'text', only id, body; name it with --text-field"):
        build(dataclasses.replace(config, documents=(path,)), tmp_path / "wrong")


def test_separate_validation_files(config, tmp_path):
    val = corpus.write_jsonl(tmp_path / "val.jsonl", ["A validation document.", "Another one."])
    record = build(dataclasses.replace(config, val=(val,)), tmp_path / "set")
    assert record.splits["val"].documents == 2 and record.splits["train"].documents == len(corpus.texts())


def test_validation_documents_never_get_into_training(config, tmp_path):
    texts = corpus.texts()
    again = texts[0].replace(" ", "  ")  # other bytes, the same tokens
    corpus.write_jsonl(config.documents[0], [*texts, again, "Fresh.", texts[3]])
    record = build(config, tmp_path / "set")
    assert record.splits["train"].dropped_documents == 2
    val = {document.tobytes() for document in split_documents(tokens_of(tmp_path / "set", "val"))}
    train = [document.tobytes() for document in split_documents(tokens_of(tmp_path / "set"))]
    assert len(train) == len(texts) - NUM_VAL + 1 and not val & set(train)


@pytest.mark.parametrize("limit", [1, 2999, 3000, 3001, 9000, 10**9])
def test_the_token_limit_ends_after_the_document_that_reaches_it(config, tmp_path, limit):
    build(config, tmp_path / "all")
    build(dataclasses.replace(config, max_train_tokens=limit), tmp_path / "some")
    documents, expected = list(split_documents(tokens_of(tmp_path / "all"))), []
    for document in documents:
        if len(expected) < limit:
            expected += document.tolist()
    assert tokens_of(tmp_path / "some").tolist() == expected


FAULTY_LINES = {
    "{": r"faulty.jsonl:2: not a line of JSON",
    "[]": r"faulty.jsonl:2: no text under 'text', a list",
    '{"body": "x", "id": 1}': r"faulty.jsonl:2: no text under 'text', only 'body', 'id'; name the field with --text-field",
    '{"text": null}': r"faulty.jsonl:2: no text under 'text'",
    '{"text": "a\\ud800"}': r"faulty.jsonl:2: a lone surrogate at index 1",
}


@pytest.mark.parametrize(("line", "processes"), [*((line, 1) for line in FAULTY_LINES), ("{", 2)])
def test_a_faulty_line_is_named(config, tmp_path, line, processes):
    path = tmp_path / "faulty.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=FAULTY_LINES[line]):
        build(dataclasses.replace(config, documents=(path,), val_documents=1, processes=processes), tmp_path / "set")


def test_broken_files_and_wrong_arguments_are_named(config, tmp_path):
    def refused(message, **fields):
        with pytest.raises(UserError, match=message):
            build(dataclasses.replace(config, **fields), tmp_path / "set")

    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.compress(config.documents[0].read_bytes())[:-100])
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(config.documents[0].read_bytes())[:-100])
    (tmp_path / "no.jsonl.gz").write_bytes(b"no gzip at all")
    damaged = bytearray(gzip.compress(config.documents[0].read_bytes()))
    damaged[2000:2020] = b"\xff" * 20
    (tmp_path / "damaged.jsonl.gz").write_bytes(damaged)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "what.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    refused(r"cut.jsonl.gz: broken after", documents=(tmp_path / "cut.jsonl.gz",))
    refused(r"damaged.jsonl.gz: broken after", documents=(tmp_path / "damaged.jsonl.gz",))
    refused(r"max_train_tokens: 0 is not at least 1", max_train_tokens=0)
    refused(r"no.jsonl.gz: broken after 0", documents=(tmp_path / "no.jsonl.gz",))
    refused(r"cut.jsonl.zst: broken after \d+ documents \(the file is cut off\)", documents=(tmp_path / "cut.jsonl.zst",))
    refused(r"latin.txt:1: not UTF-8 at byte 0", documents=(tmp_path / "latin.txt",), val_documents=1)
    refused(r"what.csv: cannot tell", documents=(tmp_path / "what.csv",))
    refused(r"nothing: no such file", documents=(tmp_path / "nothing",))
    refused(r"empty: no documents in this folder", documents=(tmp_path / "empty",))
    refused(r"documents: none given", documents=())
    refused(r"val_documents: 0", val_documents=0)
    refused(r"60 documents in all, but the first 50,000 are for validation", val_documents=50_000)
    refused(r"all 60 documents went to validation", val_documents=60)


def test_another_build_in_the_folder_is_not_overwritten(config, tmp_path):
    build(config, tmp_path / "set")
    with pytest.raises(UserError, match=r"other settings \(val_documents\); choose another folder"):
        build(dataclasses.replace(config, val_documents=5), tmp_path / "set")
    (tmp_path / "set/dataset.json").unlink()
    with pytest.raises(UserError, match="already holds fineweb_"):
        build(config, tmp_path / "set")
    (tmp_path / "set/dataset.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(UserError, match="not a record"):
        build(config, tmp_path / "set")


def test_a_failed_start_leaves_nothing_behind(config, tmp_path):
    with pytest.raises(UserError):
        build(dataclasses.replace(config, val_documents=50_000), tmp_path / "set")
    assert len(shards.find_shards(tmp_path / "set", "val")) > 10  # more than the right validation split has
    build(config, tmp_path / "set")
    build(config, tmp_path / "fresh")
    assert_same_files(tmp_path / "set", tmp_path / "fresh")


def test_a_token_of_more_bytes_than_a_count_holds_is_refused(config, tmp_path):
    corpus.write_jsonl(config.documents[0], ["a" + " " * 70_000 + "b", "c"])
    with pytest.raises(UserError, match=r"documents.jsonl:1: one token covers 70,001 bytes"):
        build(dataclasses.replace(config, val_documents=1), tmp_path / "set")
