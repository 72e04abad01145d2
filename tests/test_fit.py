"""The search for the least loss under a number of bytes, on a small model."""

import copy
import dataclasses
import itertools
import json
import re

import pytest
import torch

from pgolf_fast import export
from pgolf_fast.artifact import pack, same, unpack
from pgolf_fast.calibrate import Windows
from pgolf_fast.errors import UserError
from pgolf_fast.fit import NUM_MEASURED, NUM_ROWS, Choice, Search, cheapest_first, hull, rise_of_loss, token_losses
from pgolf_fast.quantize import QuantTable, Rule, dequantize, quantize
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
def search(run):
    return Search(run, "cpu")


@pytest.fixture(scope="module")
def tight(search, published_bytes):
    return search.fit(published_bytes - 2000)


def test_least_measured_loss_of_what_fits(run, published_bytes, search, tight):
    room, chosen = published_bytes - 2000, tight.chosen
    assert len(tight.artifact) <= room and same(unpack(tight.artifact).tensors, chosen.tensors)
    rules = run.recipe.quantize.rules()
    published = [rules.rule_of(name, run.state[name]).scheme for name in search.searched]
    assert list(tight.tried[0].schemes) == published and tight.tried[0].bytes > room and len(tight.tried) == 1 + NUM_MEASURED
    assert chosen.choice.loss == min(c.loss for c in tight.tried if c.bytes <= room)
    # what was chosen is what is given, and its loss is the model's
    model = export.build_model(run.recipe, chosen.tensors)
    windows = Windows(run.recipe.train.data, run.recipe.train.seq_len)
    needs_hessians = export.needs_hessians(run, rules)
    if needs_hessians:
        windows.take(run.recipe.quantize.calibration_batches * run.recipe.quantize.calibration_rows)
    rows = windows.take(NUM_ROWS)
    with torch.no_grad():
        plain = model(rows[:, :-1], rows[:, 1:], reduction="none").double().mean().item()
    assert plain == pytest.approx(chosen.choice.loss, rel=1e-6)
    assert token_losses(model, rows).shape == (rows[:, 1:].numel(),)
    if not needs_hessians:
        table = QuantTable(tuple(Rule((name,), scheme) for name, scheme in zip(search.searched, chosen.choice.schemes)) + rules.rules)
        assert same(quantize(run.state, table)[0], chosen.tensors)


@once
def test_more_room_is_a_smaller_error(run, published_bytes, search, tight):
    """A quarter more bytes: the weights come nearer, and the loss stays within noise of the unquantized one."""
    wide = search.fit(published_bytes * 5 // 4)

    def error(found):
        values = dequantize(found.chosen.tensors)
        return sum(torch.linalg.vector_norm(values[name] - t).item() ** 2 for name, t in run.state.items())

    assert error(wide) < error(tight)
    assert abs(wide.chosen.choice.loss - search.unquantized_loss) < abs(tight.tried[0].loss - search.unquantized_loss) + 1e-3


@once
def test_the_same_choice_again(run, published_bytes, search, tight):
    again = Search(run, "cpu")
    assert again.frontier == search.frontier and again.fit(published_bytes - 2000).artifact == tight.artifact


def test_predicted_bytes_are_near_the_measured_ones(search, tight):
    predicted = {c.schemes: c.bytes for c in search.frontier}
    for choice in tight.tried[1:]:
        assert predicted[choice.schemes] == pytest.approx(choice.bytes, rel=0.05)


def test_each_measurement_corrects_the_forecast_of_the_next(published_bytes, search, tight):
    """What is measured next is the largest choice left that fits, if all forecasts are off by as much as the last."""
    predicted = {c.schemes: c.bytes for c in search.frontier}
    for i in range(2, len(tight.tried)):
        last, chosen = tight.tried[i - 1], tight.tried[i]
        room = (published_bytes - 2000) * predicted[last.schemes] / last.bytes
        assert predicted[chosen.schemes] <= room
        known = [c.schemes for c in tight.tried[: i + 1]]
        assert not [c for c in search.frontier if predicted[chosen.schemes] < c.bytes <= room and c.schemes not in known]


@once
def test_predicted_losses_are_in_units_of_the_measured_one(search):
    """Twice the rise measured, twice the rise of every prediction; where quantization happened to help, they are rises all the same."""
    few = copy.copy(search)
    few.searched = search.searched[:2]

    def predicted(rise):
        choice = dataclasses.replace(search.published.choice, loss=search.unquantized_loss + rise)
        few.published = dataclasses.replace(search.published, choice=choice)
        return torch.tensor([c.loss - search.unquantized_loss for c in few._frontier()], dtype=torch.float64)

    torch.testing.assert_close(predicted(2.0), 2 * predicted(1.0))
    assert predicted(-1.0).min() > 0


@once
def test_too_little_room_is_told(search):
    with pytest.raises(UserError, match="fit: nothing found under 3,000 bytes beside the code; the smallest choice is forecast at"):
        search.fit(3000)


def test_rise_of_loss():
    """For tokens drawn from the model it is the divergence of two distributions; and ten times as steady as the mean of the changes."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(400_000, 8, generator=rng, dtype=torch.float64)
    moved = logits + 0.1 * torch.randn(logits.shape, generator=rng, dtype=torch.float64)
    before, after = logits.log_softmax(1), moved.log_softmax(1)
    drawn = torch.multinomial(before.exp(), 1, generator=rng)
    divergence = (before.exp() * (before - after)).sum(1).mean().item()
    changes = -after.gather(1, drawn) + before.gather(1, drawn)
    assert rise_of_loss(changes) == pytest.approx(divergence, rel=0.02)
    parts = changes.view(100, -1)
    steady, mean = torch.tensor([rise_of_loss(part) for part in parts]), parts.mean(1)
    assert mean.mean().item() == pytest.approx(divergence, rel=0.1) and steady.std() < mean.std() / 10


def test_cheapest_first():
    """Against every combination: nothing is smaller and better than a point of the frontier, and steps buy less and less."""
    rng = torch.Generator().manual_seed(0)
    options = [[Choice((f"{i}{j}",), *torch.rand(2, generator=rng).tolist()) for j in range(7)] for i in range(4)]
    frontier = cheapest_first([hull(of_matrix) for of_matrix in options], 10.0, 5.0)
    every = [(10 + sum(c.bytes for c in picked), 5 + sum(c.loss for c in picked)) for picked in itertools.product(*options)]
    own = {c.schemes[0]: c for of_matrix in options for c in of_matrix}
    for point in frontier:
        size, loss = (sum(getattr(own[s], field) for s in point.schemes) for field in ("bytes", "loss"))
        assert (point.bytes, point.loss) == pytest.approx((10 + size, 5 + loss))
        assert not [e for e in every if e[0] < point.bytes - 1e-9 and e[1] < point.loss - 1e-9]
    gains = [(a.loss - b.loss) / (b.bytes - a.bytes) for a, b in itertools.pairwise(frontier)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert (frontier[0].bytes, frontier[-1].loss) == pytest.approx((min(b for b, _ in every), min(loss for _, loss in every)))


def test_command(pgolf, folder):
    done = pgolf("quantize", folder, "--device", "cpu", "--fit", "400000", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    found = report["fit"]
    assert found["chosen"] in found["measured"] and found["chosen"]["bytes"] + found["code_bytes"] <= 400_000
    assert all(word in done.stderr for word in ("predicted", "measured", "chosen"))
    assert report["seconds"]["calibrate"] > 0  # the search reads training text
    assert unpack((folder / "quantized.pglf").read_bytes()).metadata.keys() == {"recipe", "settings"}
    strict = pgolf("quantize", folder, "--device", "cpu", "--fit", "400000", "--strict")
    assert strict.returncode == 2 and re.search(r"fit: the code alone takes \d{3},\d{3} bytes of 400,000", strict.stderr)
    nothing = pgolf("quantize", folder, "--device", "cpu", "--fit", "0")
    assert nothing.returncode == 2 and "bytes of 0;" in nothing.stderr
    done = pgolf("pack", folder, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["totals"]["wrapped"] <= 400_000
