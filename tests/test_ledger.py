"""The ledger of bytes and the forecast of the packed size."""

import functools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.states import synthetic_state
from pgolf_fast.artifact import pack
from pgolf_fast.errors import UserError
from pgolf_fast.ledger import CAP_BYTES, CodeBytes, code_files, count_code, forecast_bytes, ledger, own_sources, without_comments, wrap
from pgolf_fast.quantize import PUBLISHED, Gptq, quantize
from pgolf_fast.shards import shard_name, write_shard
from tests import corpus
from tests.fuzz_artifact import example


def test_cap_is_decimal():
    assert CAP_BYTES == 16_000_000


def test_totals_are_the_file_and_the_code():
    data = pack(example())
    found = ledger(data, CodeBytes(literal=10, wrapped=200, strict=3000))
    assert [found.total(c) - len(data) for c in ("literal", "wrapped", "strict")] == [10, 200, 3000]
    assert found.headroom("strict") == 16_000_000 - len(data) - 3000 and found.metadata > 0


@pytest.fixture
def submission(tmp_path):
    files = {
        "train_gpt.py": "import sys\nfrom pkg.more import text\nprint(text, sys.argv[1:])\n",
        "pkg/more.py": "text = 'naïve'\n",
        "csrc/k.cu": "// k\n",
    }
    other = {"README.md": "# read\n", "submission.json": "{}", "train_seed42.log": "x", ".hidden.py": "1", "__pycache__/a.py": "1"}
    for name, text in (files | other).items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path, files


def test_code_is_counted_three_ways(submission):
    folder, files = submission
    assert code_files(folder) == files and list(code_files(folder)) == sorted(files)  # on every file system
    code = count_code(code_files(folder))
    sizes = {name: (folder / name).stat().st_size for name in files}
    assert code.literal == sizes["train_gpt.py"] and code.strict == sum(sizes.values())
    assert sizes["pkg/more.py"] == len("text = 'naïve'\n") + 1  # bytes, not characters
    assert code.wrapped == len(wrap(files, "train_gpt.py"))
    alone = count_code(code_files(folder / "train_gpt.py"))
    assert alone.literal == alone.strict == sizes["train_gpt.py"]
    assert count_code({}) == CodeBytes(0, 0, 0)
    with pytest.raises(UserError, match="code: nothing at"):
        code_files(folder / "nowhere")
    (folder / "latin.py").write_bytes("'naïve'".encode("latin-1"))
    with pytest.raises(UserError, match="latin.py: not UTF-8 at byte 3"):
        code_files(folder)


def test_the_wrapped_script_runs(submission, tmp_path_factory):
    _, files = submission
    script = tmp_path_factory.mktemp("elsewhere") / "train_gpt.py"
    script.write_bytes(wrap(files, "train_gpt.py"))
    done = subprocess.run([sys.executable, script, "--seed", "1"], capture_output=True, text=True, env={"PYTHONIOENCODING": "utf-8"})
    assert done.stdout == "naïve ['--seed', '1']\n", done.stderr


@pytest.mark.parametrize(
    "name, text, left",
    [
        (
            "a.py",
            '"""What."""\nx = 1  # one\nclass A:\n    """A."""\n\n    y: int = 2\n    """Why."""\n',
            "x = 1\n\nclass A:\n    y: int = 2",
        ),
        ("a.py", 'def f():\n    """F."""\n', "def f():\n    pass"),
        ("a.py", "print 'of another Python'  # as it is\n", "print 'of another Python'  # as it is\n"),
        ("a.cu", '  f("//", "\\"/*");  // "g"\n\n/* h\n */ int/**/i;\n', 'f("//", "\\"/*");\nint i;'),
        ("a.toml", "x = 1  # one\n", "x = 1  # one\n"),
    ],
)
def test_comments_and_nothing_else_are_left_out(name, text, left):
    assert without_comments(name, text) == left


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler to judge by")
def test_native_sources_without_comments_are_what_the_compiler_sees():
    for name, text in own_sources().items():
        if name.startswith("csrc/"):
            seen = [
                subprocess.run(
                    ["g++", "-fpreprocessed", "-dD", "-E", "-P", "-x", "c++", "-"], input=t, capture_output=True, text=True, check=True
                )
                for t in (text, without_comments(name, text))
            ]
            assert seen[0].stdout.strip() and seen[0].stdout.split() == seen[1].stdout.split(), name


def test_own_sources_are_all_that_a_submission_runs(tmp_path):
    """Wrapped, with nothing else at hand: from training to a score. Data tools, audits and reports are not among them."""
    sources = own_sources()
    assert {"csrc/kernels/softcap_ce.cu", "pgolf_fast/recipes/base.toml", "setup.py", "pgolf_fast/ops/__init__.py"} < sources.keys()
    assert not [name for name in sources if any(part in name for part in ("audit", "report", "data_build", "bench", "tests"))]
    script = tmp_path / "train_gpt.py"
    script.write_bytes(wrap(sources, next(iter(sources))))
    assert script.stat().st_size == count_code(sources).wrapped
    tokenizer = corpus.tokenizer(False)
    tokenizer.save(tmp_path / "tokenizer.model")
    for split in ("train", "val"):
        ids = [np.array([1, *tokenizer.encode(text)], np.uint16) for text in corpus.texts()]
        write_shard(tmp_path / shard_name(split, 0), np.concatenate(ids)[:2049])
    small = [
        "model_dim=32",
        "num_heads=2",
        "num_kv_heads=1",
        "num_layers=2",
        "rope_dims=8",
        "ve_layers=1",
        f"vocab_size={corpus.VOCAB_SIZE}",
    ]
    short = ["seq_len=64", "batch_tokens=256", "micro_batches=1", "data=.", "run_id=run"]
    settings = ["schedule.iterations=1", *(f"model.{value}" for value in small), *(f"train.{value}" for value in short)]
    for verb in (
        ["train", "--recipe", "base", "--runs", ".", *settings],
        ["quantize", "run"],
        ["pack", "run"],
        ["eval", "run", "--data", "."],
    ):
        done = subprocess.run([sys.executable, "-I", script, *verb], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "table,family", [("legal-ttt-691", "sp1024-s"), ("gptq-lite-379", "sp1024-s"), ("gepa-598", "sp1024-g"), ("caseops-1934", "caseops")]
)
def test_forecast_is_within_a_percent(table, family):
    """Also for GPTQ under strongly correlated inputs, which the forecast does not see."""
    state, config = synthetic_state(family, layers=2), PUBLISHED[table]
    matrices = {name: w for name, w in state.items() if isinstance(config.rule_of(name, w).scheme, Gptq)}
    hessians = {name: correlated_hessian(w.shape[1]) for name, w in matrices.items()}
    tensors, _ = quantize(state, config, hessians)
    assert forecast_bytes(state, config) == pytest.approx(len(pack(tensors)), rel=0.01)


@functools.cache
def correlated_hessian(columns):
    """Second moments of inputs that share a few strong directions, with a spread of scales."""
    g = torch.Generator().manual_seed(columns)
    x = torch.randn(2 * columns, columns, generator=g) + torch.randn(2 * columns, 8, generator=g) @ torch.randn(8, columns, generator=g)
    x *= torch.exp(0.5 * torch.randn(columns, generator=g))
    return x.T @ x / len(x)
