"""The search for the least loss under a number of bytes, on a small model."""

import json

import pytest
import torch

from pgolf_fast import export
from pgolf_fast.artifact import pack, same, unpack
from pgolf_fast.calibrate import Windows
from pgolf_fast.errors import UserError
from pgolf_fast.fit import NUM_ROWS, Choice, _front, fit, mean_loss
from pgolf_fast.quantize import dequantize, quantize
from pgolf_fast.shards import shard_name
from tests.finished_run import write_run
from tests.test_pack_command import pgolf  # noqa: F401  (a fixture)


@pytest.fixture(scope="module", params=["gepa-598", "caseops-1934"])
def folder(request, tmp_path_factory):
    """A run whose validation shard is gone: the search must do without."""
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, request.param)
    (folder / shard_name("val", 0)).unlink()
    return folder


once = pytest.mark.parametrize("folder", ["caseops-1934"], indirect=True)  # what takes its time and is the same for both


@pytest.fixture(scope="module")
def run(folder):
    return export.read_run(folder)


@pytest.fixture(scope="module")
def published_bytes(run):
    return len(pack(export.quantize_run(run, "cpu").tensors, metadata=export.metadata(run.name, run.recipe)))


@pytest.fixture(scope="module")
def tight(run, published_bytes):
    return fit(run, "cpu", published_bytes - 2000)


def test_least_measured_loss_of_what_fits(run, published_bytes, tight):
    room, found = published_bytes - 2000, tight
    assert len(pack(found.tensors, metadata=export.metadata(run.name, run.recipe))) <= room
    assert found.measured[0].schemes == tuple(rule.scheme for rule in found.searched) and found.measured[0].bytes > room
    assert found.chosen.loss == min(c.loss for c in found.measured if c.bytes <= room)
    # what was chosen is what is given, and its loss is the model's
    model = export.build_model(run.recipe, found.tensors)
    windows = Windows(run.recipe.train.data, run.recipe.train.seq_len)
    needs_hessians = export.needs_hessians(run, found.rules)
    if needs_hessians:
        windows.take(run.recipe.quantize.calibration_batches * run.recipe.quantize.calibration_rows)
    rows = windows.take(NUM_ROWS)
    assert mean_loss(model, rows) == pytest.approx(found.chosen.loss, rel=1e-6)
    with torch.no_grad():
        plain = model(rows[:, :-1], rows[:, 1:], reduction="none").double().mean().item()
    assert plain == pytest.approx(found.chosen.loss, rel=1e-5)
    assert dict(zip(found.searched, found.chosen.schemes)).keys() <= set(run.recipe.quantize.rules().rules)
    if not needs_hessians:
        assert same(quantize(run.state, found.rules)[0], found.tensors)


@once
def test_more_room_is_a_smaller_error(run, published_bytes, tight):
    """A quarter more bytes: the weights come nearer, and the loss stays within noise of the unquantized one."""
    wide = fit(run, "cpu", published_bytes * 5 // 4)

    def error(found):
        values = dequantize(found.tensors)
        return sum(torch.linalg.vector_norm(values[name] - t).item() ** 2 for name, t in run.state.items())

    assert error(wide) < error(tight)
    assert abs(wide.chosen.loss - wide.unquantized_loss) < abs(tight.measured[0].loss - tight.unquantized_loss) + 1e-3


@once
def test_the_same_choice_again(run, published_bytes, tight):
    again = fit(run, "cpu", published_bytes - 2000)
    assert again.chosen == tight.chosen and again.frontier == tight.frontier and same(again.tensors, tight.tensors)


def test_predicted_bytes_are_near_the_measured_ones(tight):
    predicted = {c.schemes: c.bytes for c in tight.frontier}
    for choice in tight.measured[1:]:
        assert predicted[choice.schemes] == pytest.approx(choice.bytes, rel=0.05)


@once
def test_too_little_room_is_told(run):
    with pytest.raises(UserError, match="fit: nothing found under 3,000 bytes beside the code; the smallest choice is forecast at"):
        fit(run, "cpu", 3000)


def test_front():
    """Bytes rise, losses fall; against the definition: nothing kept is beaten, everything dropped is."""
    rng = torch.Generator().manual_seed(0)
    pairs = torch.randint(0, 12, (40, 2), generator=rng).tolist()
    kept = [(c.bytes, c.loss) for c in _front([Choice((), b, loss) for b, loss in pairs])]
    undominated = {(b, x) for b, x in pairs if not any(c <= b and y <= x and (c, y) != (b, x) for c, y in pairs)}
    assert kept == sorted(undominated)


def test_command(pgolf, folder):  # noqa: F811
    done = pgolf("quantize", folder, "--device", "cpu", "--fit", "400000", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["fit"]
    assert found["chosen"] in found["measured"] and found["chosen"]["bytes"] + found["code_bytes"] <= 400_000
    assert "chosen" in done.stderr and "wrapped code" in done.stderr
    assert report["seconds"]["calibrate"] > 0  # the search reads training text
    assert unpack((folder / "quantized.pglf").read_bytes()).metadata.keys() == {"recipe", "settings"}
    done = pgolf("pack", folder, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["totals"]["wrapped"] <= 400_000
