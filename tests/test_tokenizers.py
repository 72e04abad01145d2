import io

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf_fast import bpb, caseops, denominator, tokenizers
from pgolf_fast.documents import find_files, parse_chunk, read_chunks
from pgolf_fast.errors import UserError
from pgolf_fast.shards import BOS
from pgolf_fast.tokenizers import Tokenizer
from tests import corpus

BOTH = pytest.mark.parametrize("is_caseops", [False, True], ids=["plain", "caseops"])
# Any character, the troublesome ones often (st.text would draw from one merged alphabet, where they are as rare as any).
any_character = st.one_of(st.sampled_from("aAbB  \n\t\ue001\ue004▁\u200b\ufeffﬁé𝄞\x00"), st.characters(exclude_categories=["Cs"]))
any_text = st.lists(any_character).map("".join)


@BOTH
def test_training_keeps_the_contract_and_repeats(is_caseops):
    tokenizer = corpus.tokenizer(is_caseops)
    assert tokenizer.is_caseops == is_caseops and tokenizer.vocab_size == corpus.VOCAB_SIZE
    assert tokenizer.pieces[4:8] == (list(caseops.OPERATORS) if is_caseops else ["<0x00>", "<0x01>", "<0x02>", "<0x03>"])
    assert tokenizers.train(corpus.texts(), corpus.VOCAB_SIZE, is_caseops).sha256 == tokenizer.sha256


@BOTH
def test_save_and_load(is_caseops, tmp_path):
    corpus.tokenizer(is_caseops).save(tmp_path / "t.model")
    assert Tokenizer(tmp_path / "t.model").sha256 == corpus.tokenizer(is_caseops).sha256
    lines = (tmp_path / "t.vocab").read_text(encoding="utf-8").split("\n")
    assert lines[1].startswith("<s>\t") and len(lines) == corpus.VOCAB_SIZE + 1


@BOTH
@settings(max_examples=300, deadline=None)
@given(any_text)
def test_the_counts_sum_to_the_bytes_of_the_original_text(is_caseops, text):
    tokenizer = corpus.tokenizer(is_caseops)
    text = f"x{text}X"  # at the very ends white space belongs to no token; see the next test
    tokens, counts = tokenizer.encode_counted(text)
    assert counts.sum() == len(text.encode()) and counts[0] == 0
    assert np.array_equal(tokens, tokenizer.encode(text)) and tokens[0] == BOS


@BOTH
def test_white_space_at_the_ends_is_not_counted(is_caseops):
    counts = corpus.tokenizer(is_caseops).encode_counted(" \n ab \t\n")[1]
    assert counts.sum() == 2
    for text in ("", "  \n"):
        tokens, counts = corpus.tokenizer(is_caseops).encode_counted(text)
        assert tokens.tolist() == [BOS] and counts.tolist() == [0]


@BOTH
def test_each_token_gets_the_bytes_it_covers(is_caseops):
    tokenizer = corpus.tokenizer(is_caseops)

    def counted(text):
        tokens, counts = tokenizer.encode_counted(text)
        return [tokenizer.pieces[token] for token in tokens[1:]], counts[1:].tolist()

    assert counted("a  b\n\nc") == (["a", "▁b", "▁c"], [1, 3, 3])
    pieces, counts = counted("z𝄞")
    assert pieces[1:] == ["<0xF0>", "<0x9D>", "<0x84>", "<0x9E>"] and counts == [1, 0, 0, 0, 4]
    pieces, counts = counted("xY\ue001z")
    if is_caseops:
        assert pieces == ["x", caseops.CAPNEXT, "y", caseops.ESCAPE, caseops.TITLE, "z"] and counts == [1, 0, 1, 0, 3, 1]


@BOTH
@settings(max_examples=300, deadline=None)
@given(any_text)
def test_the_byte_rule_counts_the_decoded_text(is_caseops, text):
    tokenizer = corpus.tokenizer(is_caseops)
    tokens = tokenizer.encode(f"x{text}X")
    decoded = tokenizer.decode(tokens)
    if is_caseops:  # the rule counts operators as nothing, also the escaped ones; the sidecar tells them apart
        decoded = "".join(c for c in decoded if c not in caseops.OPERATORS)
    assert denominator.rule_bytes(tokenizer, tokens).sum() == len(decoded.encode())
    count = denominator.check_byte_rule(tokenizer, np.concatenate([tokens, tokens, tokens]), max_documents=2)
    assert count == denominator.ByteCount(2, 2 * len(tokens), 2 * len(decoded.encode()))


@BOTH
def test_a_wrong_denominator_is_noticed(is_caseops):
    tokenizer = Tokenizer(corpus.tokenizer(is_caseops).model)
    tokens, counts = tokenizer.encode_counted(corpus.texts()[0])
    assert denominator.check_sidecar(tokenizer, tokens, counts) > 0.9
    with pytest.raises(UserError, match=f"sidecar: {len(tokens) - 1} counts for {len(tokens)} tokens"):
        denominator.check_sidecar(tokenizer, tokens, counts[:-1])
    with pytest.raises(UserError, match="sidecar: token 0 is BOS but counts 1 bytes"):
        denominator.check_sidecar(tokenizer, tokens, counts + (tokens == BOS))
    table = tokenizer.piece_bytes
    tokenizer.piece_bytes = bpb.PieceBytes(table.own + table.has_space, table.has_space, table.is_boundary)  # every space twice
    with pytest.raises(UserError, match="validation document 0: the byte rule counts"):
        denominator.check_byte_rule(tokenizer, tokens)
    with pytest.raises(UserError, match="cover just their piece's own bytes"):
        denominator.check_sidecar(tokenizer, tokens, counts)


@BOTH
def test_decoding_restores_case_and_what_normalisation_keeps(is_caseops):
    tokenizer = corpus.tokenizer(is_caseops)
    text = "NASA's iPhone OpenAI costs 2 Euros. Ünïcödé É"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([]) == ""


def broken_model(**settings) -> bytes:
    model = io.BytesIO()
    good = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3, "byte_fallback": True, "add_dummy_prefix": False}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus.texts()[:8]), model_writer=model, vocab_size=500, model_type="bpe", minloglevel=2,
        hard_vocab_limit=False, **good | settings)  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"add_dummy_prefix": True}, "puts a space before every text"),
        ({"byte_fallback": False}, "0 byte pieces"),
        ({"pad_id": -1, "bos_id": 1, "eos_id": 2, "unk_id": 0}, r"\[-1, 1, 2, 0\], expected \[0, 1, 2, 3\]"),
        ({"treat_whitespace_as_suffix": True}, "holds a space after its start"),
        ({"user_defined_symbols": ["q", *caseops.OPERATORS]}, "not ids 4 to 7"),
        ({"user_defined_symbols": list(caseops.OPERATORS)}, "holds a capital"),
    ],
)
def test_a_model_that_breaks_the_contract_is_refused(settings, message):
    assert Tokenizer(broken_model()).vocab_size == 500
    with pytest.raises(UserError, match=message):
        Tokenizer(broken_model(**settings))


def test_little_text_gives_fewer_pieces_than_asked_for():
    assert 4 + 256 < tokenizers.train(["some words, some more words"] * 3, 700, False).vocab_size < 700


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        Tokenizer(tmp_path / "t.model")
    with pytest.raises(UserError, match="training the tokenizer failed"):
        tokenizers.train([], 700, False)


# Token ids of the challenge's own CaseOps tokenizer, from the specification.
WORKED = {
    "The NASA Launch": [4, 320, 8133, 5, 5566, 8136, 8133, 4, 1632, 1709],
    "iPhone OpenAI": [8138, 6, 2087, 8133, 4, 3094, 6, 8136, 6, 8138],
    "AB": [5, 373],
    "ABc": [4, 8136, 6, 3608],
    "A": [4, 8136],
    "aB": [8136, 6, 8153],
    "don't DON'T Don't": [1670, 8165, 8135, 8133, 5, 1670, 8165, 4, 8135, 8133, 4, 1670, 8165, 8135],
    "McDonald's eBay": [4, 1798, 6, 5906, 8165, 8140, 312, 6, 3112],
    "HELLOworld": [4, 8142, 6, 8134, 6, 8143, 6, 8143, 6, 328, 274, 393],
    "WiFi2Go": [4, 5183, 6, 4756, 8162, 4, 1159],
    "x\ue001y": [8161, 7, 4, 8151],
    "CAFÉ": [5, 8145, 1461, 203, 145],
}


def test_worked_token_ids_and_bytes_of_the_challenges_tokenizer():
    tokenizer = Tokenizer(corpus.shared_data() / "tokenizers/caseops8192.model")
    for text, ids in WORKED.items():
        assert tokenizer.encode(text)[1:].tolist() == ids
    assert tokenizer.encode_counted("x\ue001y")[1].tolist() == [0, 1, 0, 3, 1]
    assert tokenizer.encode_counted("CAFÉ")[1].tolist() == [0, 0, 1, 2, 0, 2]


@pytest.mark.parametrize(("model", "num_tokens"), [("sp1024", 1_506_218), ("caseops8192", 1_162_280)])
def test_every_validation_document_of_the_shared_corpus(model, num_tokens):
    folder = corpus.shared_data()
    tokenizer = Tokenizer(folder / f"tokenizers/{model}.model")
    total = 0
    for chunk in read_chunks(find_files([folder / "corpus.val.zst"])):
        for text in parse_chunk(chunk):
            assert caseops.decode(caseops.encode(text)) == text
            tokens, counts = tokenizer.encode_counted(text)
            assert counts.sum() == len(text.encode())
            assert denominator.rule_bytes(tokenizer, tokens).sum() == len(tokenizer.decode(tokens).encode())
            total += len(tokens)
    assert total == num_tokens
