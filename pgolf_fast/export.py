"""From a run's folder to an artifact, and back to a model:

    run = read_run(folder)               what training left: recipe, final weights, seconds
    quantize_run(run, device)            calibrates where the recipe's table needs it, and quantizes
    metadata(run.name, run.recipe)       goes into the artifact beside the tensors
    load_model(path, device)             recipe and model

An artifact of another recipe is refused.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from pgolf_fast import artifact, checkpoint, recipe, runlog
from pgolf_fast.calibrate import Windows, hessians
from pgolf_fast.errors import UserError
from pgolf_fast.model import GPT, parameter_table
from pgolf_fast.quantize import Codes, Gptq, QuantizedTensors, QuantTable, TensorError, dequantize, quantize

MAX_VISITS = 1024  # of blocks, in a model that a file declares
PLACES = ("train.data", "train.tokenizer", "train.run_id")  # of the machine that trained, not of the model


# --- from a run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    name: str  # of the recipe
    recipe: recipe.Recipe
    state: dict[str, torch.Tensor]  # the final weights, by published name
    weights: str  # which these are
    train_s: float


def read_run(folder: Path) -> Run:
    """What a finished run left in its folder."""
    if not (folder / "events.jsonl").is_file():
        raise UserError(f"run: {folder} is no run's folder: it has no events.jsonl; `pgolf train` makes one")
    record = runlog.read_recipe(folder)
    ends = [event for event in runlog.events(folder) if event.get("event") == "end"]
    if not ends:
        raise UserError(f"run: {folder} did not come to its end; go on with `pgolf train --resume`")
    resolved = recipe.recorded(record, str(folder / "recipe.json"))
    state, _ = checkpoint.load(folder / "model.safetensors")
    return Run(resolved.name, resolved.recipe, state, ends[-1]["weights"], ends[-1]["ledger_s"]["train"])


@dataclass(frozen=True)
class Quantized:
    tensors: QuantizedTensors
    errors: list[TensorError]
    calibrate_s: float  # counts as training time: training text is read
    quantize_s: float


def quantize_run(
    run: Run,
    device: torch.device | str,
    data: Path | None = None,
    plain_rounding: bool = False,
    progress: Callable[[str, int, int], None] = lambda task, done, total: None,
) -> Quantized:
    """Quantize a run's weights by its recipe's table, on `device`.

    data            folder of the shards to calibrate on; the run's own if left out
    plain_rounding  no calibration, and rounding to nearest in place of GPTQ
    progress        called with a task, how much of it is done, and of how much
    """
    device, rules = torch.device(device), run.recipe.quantize.rules()
    calibrates = not plain_rounding and needs_hessians(run, rules)
    begin = time.perf_counter()
    found = calibrate(run, device, data, progress)[0] if calibrates else None
    _wait_for(device)
    calibrated = time.perf_counter()
    state = {name: t.to(device) for name, t in run.state.items()}
    tensors, errors = quantize(state, rules, found, plain_rounding, functools.partial(progress, "quantizing"))
    _wait_for(device)
    return Quantized(tensors, errors, calibrated - begin if calibrates else 0.0, time.perf_counter() - calibrated)


def needs_hessians(run: Run, rules: QuantTable) -> bool:
    return any(isinstance(rules.rule_of(name, t).scheme, Gptq) for name, t in run.state.items())


def calibrate(
    run: Run, device, data: Path | None = None, progress=lambda task, done, total: None
) -> tuple[dict[str, torch.Tensor], Windows]:
    """Hessians of a run's weights on its training text, and the sampler, whose next rows they have not seen."""
    config, train = run.recipe.quantize, run.recipe.train
    windows = Windows(data or train.data, train.seq_len, run.recipe.model.vocab_size)
    model = model_of(run.recipe, device)
    model.load_published(run.state)

    def batches():
        for i in range(config.calibration_batches):
            yield windows.take(config.calibration_rows)[:, :-1]
            progress("calibrating", i + 1, config.calibration_batches)

    return hessians(model, batches()), windows


def _wait_for(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- to an artifact and back ------------------------------------------------------------------------------------------


def metadata(name: str, settings: recipe.Recipe) -> dict:
    """The recipe's name and every setting of every stage, without the paths of the machine that trained it."""
    values = {key: value for key, value in recipe.values(settings).items() if key not in PLACES}
    return {"recipe": name, "settings": values}


def load_model(path: Path | str, device: torch.device | str = "cpu", expect: recipe.Recipe | None = None) -> tuple[recipe.Recipe, GPT]:
    """The recipe that an artifact names, and its model on `device` with the artifact's weights.

    expect  refuse an artifact whose model has other settings than this recipe's
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"artifact: cannot read {path} ({error.strerror})") from None
    loaded = artifact.unpack(data)
    name, settings = recipe_of(loaded.metadata, str(path))
    if expect is not None:
        _refuse_another(path, name, settings, expect)
    return settings, build_model(settings, loaded.tensors, device)


def build_model(settings: recipe.Recipe, tensors: QuantizedTensors, device: torch.device | str = "cpu") -> GPT:
    """The recipe's model with these weights, in the dtypes that it trains in."""
    declared = sum(math.prod(shape) for shape, _ in parameter_table(settings.model).values())
    held = sum((t.codes if isinstance(t, Codes) else t).numel() for t in tensors.values())
    if declared != held:  # before anything is allocated
        raise UserError(f"artifact: holds {held:,} weights, a model of its recipe has {declared:,}")
    model = model_of(settings, device)
    model.load_published(dequantize(tensors))
    return model


def model_of(settings: recipe.Recipe, device: torch.device | str) -> GPT:
    """The recipe's model, its weights not yet set."""
    device = torch.device(device)
    return GPT(settings.model, device=device, stream_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)


def recipe_of(described: dict, source: str) -> tuple[str, recipe.Recipe]:
    """(name, recipe) from an artifact's metadata."""
    name, values = described.get("recipe"), described.get("settings")
    if not isinstance(name, str) or not isinstance(values, dict):
        raise UserError(f"{source}: does not say which recipe its weights are of; pack it from a run folder: pgolf quantize RUN")
    # NOTE: the configuration lists its visits when it is made, so a file may not ask for a billion.
    sizes = [values.get(f"model.{field}", 0) for field in ("num_layers", "num_loops")]
    if not all(isinstance(size, int) and size <= MAX_VISITS for size in sizes):
        raise UserError(f"{source}: declares a model of more than {MAX_VISITS} layers or loops")
    return name, recipe.from_values(values, source)


def _refuse_another(path, name, settings, expect):
    for field in dataclasses.fields(settings.model):
        found, wanted = getattr(settings.model, field.name), getattr(expect.model, field.name)
        if found != wanted:
            raise UserError(
                f"{path}: an artifact of recipe {name}, whose model.{field.name} is {found}, not {wanted}; give the recipe it is of"
            )
