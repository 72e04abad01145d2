"""Run folder -> artifact -> model: which recipe the weights in an artifact belong to.

    metadata(name, recipe)      goes into the artifact beside the tensors
    load_model(path, device)    (recipe, model) of an artifact file; refuses one of another recipe
"""

import dataclasses
import math
from pathlib import Path

import torch

from pgolf_fast import artifact, recipe
from pgolf_fast.errors import UserError
from pgolf_fast.model import GPT, parameter_table
from pgolf_fast.quantize import Codes, QuantizedTensors, dequantize

MAX_VISITS = 1024  # of blocks, in a model that a file declares
PLACES = ("train.data", "train.tokenizer", "train.run_id")  # of the machine that trained, not of the model


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
    device = torch.device(device)
    model = GPT(settings.model, device=device, stream_dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    model.load_published(dequantize(tensors))
    return model


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
            raise UserError(f"{path}: an artifact of recipe {name}, whose model.{field.name} is {found}, not {wanted}; give the recipe it is of")
