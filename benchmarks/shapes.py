"""Named shapes of the two model families at one GPU's share of a step, and awkward ones."""

import torch

TOKENS = 98_304  # one GPU's share of a 786,432-token step: 48 rows of 2048
SEQUENCE = 2048
WIDTH = 512
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
LAYERS = 11
VOCABULARIES = {"sp1024": 1024, "caseops8192": 8192}
MLP_HIDDEN = {"sp1024": 1536, "caseops8192": 2048}

# Same benchmark on a machine without a GPU: seconds instead of minutes.
CPU_TOKENS = 2048


def tokens(device: torch.device) -> int:
    return TOKENS if device.type == "cuda" else CPU_TOKENS


def layer_matrices(family: str) -> list[tuple[int, int]]:
    """(rows, columns) of the six matrices of one layer: q, k, v, o, up, down."""
    hidden = MLP_HIDDEN[family]
    kv = KV_HEADS * HEAD_DIM
    return [(WIDTH, WIDTH), (kv, WIDTH), (kv, WIDTH), (WIDTH, WIDTH), (hidden, WIDTH), (WIDTH, hidden)]


def model_matrices(family: str) -> list[tuple[int, int]]:
    """The 66 matrices that Muon updates and int6 stores."""
    return LAYERS * layer_matrices(family)


def rank_share_matrices(family: str) -> list[tuple[int, int]]:
    """One rank's share of eight, after padding each bank to a multiple of eight: 3 qo, 3 kv, 2 up, 2 down."""
    q, k, _, _, up, down = layer_matrices(family)
    return 3 * [q] + 3 * [k] + 2 * [up] + 2 * [down]


def document_lengths(total: int, seed: int = 0, median: float = 600.0, sigma: float = 1.0, longest: int = SEQUENCE) -> list[int]:
    """Log-normal documents cut at `longest`, filling exactly `total` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    left = total
    while left > 0:
        document = max(1, int(torch.empty(()).log_normal_(torch.log(torch.tensor(median)).item(), sigma, generator=generator)))
        document = min(document, left)
        left -= document
        lengths += [longest] * (document // longest) + ([document % longest] if document % longest else [])
    return lengths


def target_document_lengths() -> list[int]:
    """The mix that the packed attention targets were set on, or nearly: 128 segments like theirs, mean causal context 578 (theirs 572)."""
    return document_lengths(TOKENS, seed=42, sigma=0.85)


def cu_seqlens(lengths: list[int], device, pad_to: int | None = None) -> torch.Tensor:
    """Cumulative starts, int32; padded with the total to a fixed count."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    if pad_to is not None:
        ends = torch.cat([ends, ends[-1:].expand(pad_to - len(ends))])
    return ends.to(device=device, dtype=torch.int32)
