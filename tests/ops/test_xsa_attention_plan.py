"""What the attention's kernels know of packed documents: of any list, every block once and every token's place."""

import pytest
import torch

from pgolf_fast.ops.xsa_attention import KEYS_PER_BLOCK, _composite, _fwd_cuda, _plan_space, documents_of, xsa_attention
from tests.ops.test_xsa_attention import AWKWARD, DEVICES, inputs, outcome

FAR = 2**31 - 1
# Lists that are none, and what each counts as, of 200 tokens.
LISTS = {
    "past the tokens": ([0, 70, 500, FAR], [0, 70, 200, 200]),
    "descending": ([0, 130, 65, 10, 180], [0, 130, 130, 130, 180]),
    "from within": ([90, 120, 150], [0, 120, 150]),
    "before the first": ([-5, -FAR, 66, -1, 80], [0, 0, 66, 66, 80]),
    "one far entry": ([FAR], [0]),
    "more documents than threads, up and down": ([*range(0, 3000, 2), *range(3000, 0, -1)], [*range(0, 200, 2), *[200] * 4400]),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_is_none_counts_as_an_ascending_one(name, heads, device):
    q, k, v, gate, _, grad = inputs([200], heads, gate=torch.float32, device=device)
    gate[:, ::9] = 0
    found, expected = (
        outcome(xsa_attention, q, k, v, gate, torch.tensor(entries, dtype=torch.int32, device=device), grad) for entries in LISTS[name]
    )
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key
    ascending = torch.tensor(LISTS[name][0], dtype=torch.int32)
    composite = _composite(*(x.cpu().float() for x in (q, k, v)), True, gate.cpu(), 0.125, ascending, 200)
    torch.testing.assert_close(composite.bfloat16(), found["out"].cpu(), rtol=0.03, atol=0.03)


@pytest.mark.cuda
@pytest.mark.parametrize("heads", [(8, 4), (3, 3)], ids=lambda h: f"{h[0]}to{h[1]}")
@pytest.mark.parametrize("lengths", [[0] * 3, AWKWARD, [1] * 1500 + [70], [3, 0, 5000]], ids=["none", "awkward", "ones", "long"])
def test_the_plan_holds_every_block_once(lengths, heads):
    """Every document's blocks together, in order, longer documents first; and every token's place, behind those before it."""
    tokens, group = sum(lengths) + 100, heads[0] // heads[1]
    cu_seqlens = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    queries, keys, places = (t.tolist() for t in documents_of(cu_seqlens, tokens, group))
    starts = cu_seqlens.tolist()
    for (header, *entries), per_block, last_first in ((queries, 128 if group % 2 else 64, True), (keys, KEYS_PER_BLOCK, False)):
        found = entries[: header[0]]
        assert header[1] == sum(lengths) and [-(-entry[1] // per_block) for entry in found] == sorted(
            (-(-n // per_block) for n in lengths for _ in range(-(-n // per_block))), reverse=True
        )
        expected = {
            d: [[starts[d], n, b, d] for b in range(-(-n // per_block))][:: -1 if last_first else 1] for d, n in enumerate(lengths) if n
        }
        while found:
            blocks = expected.pop(found[0][3])
            assert found[: len(blocks)] == blocks
            found = found[len(blocks) :]
        assert not expected
    owner = [d for d, n in enumerate(lengths) for _ in range(n)]
    assert [start for start, _ in places] == [starts[d] for d in owner] + [-1] * 100
    stats = [place for _, place in places[: len(owner)]]
    assert all(stats[starts[d]] % 4 == 0 for d in owner) and all(b - a >= 1 for a, b in zip(stats, stats[1:]))
    assert all(place - stats[starts[d]] == t - starts[d] for t, (d, place) in enumerate(zip(owner, stats)))
    assert not stats or stats[-1] < -(-tokens // 4) * 4 + 4 * len(keys)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    cu_seqlens = torch.tensor([0, 20, 20, 70], dtype=torch.int32, device=device)
    torch.library.opcheck(torch.ops.pgolf_fast.xsa_attention_plan, (cu_seqlens, 70, 2))


def test_documents_of_more_tokens_are_refused():
    """Before a kernel is asked for, which would write beyond the tokens."""
    documents, _ = _plan_space(torch.tensor([0, 100], dtype=torch.int32), 100, 2)
    q, k, v = (torch.zeros(1, 80, heads, 64, dtype=torch.bfloat16) for heads in (2, 1, 1))
    with pytest.raises(ValueError, match="^documents: made for 100 tokens, not 80"):
        _fwd_cuda(q, k, v, None, documents, True, 0.125)
