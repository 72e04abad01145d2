"""A recipe: every stage's settings, gathered from, in this order,

    the defaults in the stages' classes, the base recipe, the recipe, the environment, the command line

A recipe is a TOML file: `base` (a recipe's name, or a file beside it), `note`, and per stage a table of what differs.
Only the composition is here: a setting's meaning, its type, its default and the challenge's environment
names for it stand where the stage uses it.
"""

import dataclasses
import difflib
import math
import os
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.evaluate import EvalConfig
from pgolf_fast.evaluation.phased_lora import PhasedLoraConfig
from pgolf_fast.evaluation.score_first_sgd import TttConfig
from pgolf_fast.evaluation.self_distillation import SelfDistillationConfig
from pgolf_fast.model import ModelConfig
from pgolf_fast.optim import OptimConfig
from pgolf_fast.quantize import QuantizeConfig
from pgolf_fast.schedule import ScheduleConfig
from pgolf_fast.train import TrainConfig

FOLDER = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One class of settings per stage."""

    train: TrainConfig = TrainConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    model: ModelConfig = ModelConfig()
    optim: OptimConfig = OptimConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    sdttt: SelfDistillationConfig = SelfDistillationConfig()
    eval: EvalConfig = EvalConfig()
    ttt: TttConfig = TttConfig()
    lora: PhasedLoraConfig = PhasedLoraConfig()


class Setting(typing.NamedTuple):
    kind: object  # its type
    default: object
    meaning: str
    env: dict[str, dict | None]


def _all_settings() -> dict[str, Setting]:
    found = {}
    for stage in dataclasses.fields(Recipe):
        kinds = typing.get_type_hints(stage.type)
        for field in dataclasses.fields(stage.type):
            found[f"{stage.name}.{field.name}"] = Setting(kinds[field.name], field.default, **field.metadata)
    return found


SETTINGS = _all_settings()
ENVIRONMENT = {name: key for key, setting in SETTINGS.items() for name in setting.env}

# Names of the challenge's scripts for what is not a choice here, and the one value that they may have.
FIXED_ENVIRONMENT = {
    "TIE_EMBEDDINGS": "1",
    "PARALLEL_FINAL_LANE": "mean",
    "SPARSE_ATTN_GATE_INIT_STD": "0",
    "MTP_NUM_HEADS": "0",
    "DTG_ENABLED": "0",
    "EODIFF_LAST_N": "0",
    "TTT_BETA1": "0",
    "TTT_GRAD_STEPS": "1",
    "TTT_WARM_START_A": "1",
    "GLOBAL_TTT_EPOCHS": "1",
    "GLOBAL_TTT_WARMUP_CHUNKS": "0",
    "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": "1",
}
# Names of theirs that may have any value: they change nothing in these configurations, or only which kernel runs.
IDLE_ENVIRONMENT = {"EMBED_LR", "HEAD_LR", "MUON_BETA2", "GPTQ_CALIB_SEQS", "MTP_LOSS_WEIGHT", "FUSED_CE_ENABLED", "MATRIX_CLIP_SIGMAS"}


@dataclass(frozen=True)
class Resolved:
    name: str
    note: str
    recipe: Recipe
    sources: dict[str, str]  # "stage.setting" to where its value comes from

    def values(self) -> dict[str, object]:
        return values(self.recipe)

    def record(self) -> dict:
        """For a file beside a run: every value with where it comes from."""
        settings = {
            key: {"value": value, "source": self.sources[key], "meaning": SETTINGS[key].meaning} for key, value in self.values().items()
        }
        return {"name": self.name, "note": self.note, "settings": settings}


def values(recipe: Recipe) -> dict[str, object]:
    """Every setting's value, by "stage.setting"."""
    stages = {key: getattr(recipe, key.split(".")[0]) for key in SETTINGS}
    return {key: getattr(stage, key.split(".")[1]) for key, stage in stages.items()}


def from_values(values: Mapping[str, object], source: str) -> Recipe:
    """The recipe of values that `values` gave, perhaps through JSON; a setting that `source` does not hold has its default."""
    for key in values:
        _require_known(key, source)
    return _build({key: _value(key, value, source, is_text=False) for key, value in values.items()})


def _build(values: Mapping[str, object]) -> Recipe:
    stages = {stage.name: {} for stage in dataclasses.fields(Recipe)}
    for key, value in values.items():
        stage, field = key.split(".")
        stages[stage][field] = value
    return Recipe(**{stage.name: stage.type(**stages[stage.name]) for stage in dataclasses.fields(Recipe)})


def recorded(record: dict, source: str, overrides: Iterable[str] = ()) -> Resolved:
    """What `Resolved.record` was made of, with `setting=value` overrides. `source` names the record in messages."""
    rows, overrides = record["settings"], tuple(overrides)
    began = from_values({key: row["value"] for key, row in rows.items()}, source)
    sources = dict.fromkeys(SETTINGS, "default") | {key: row["source"] for key, row in rows.items()}
    for layer_source, layer in _override_layers(overrides):
        sources |= dict.fromkeys(layer, layer_source)
    return Resolved(record["name"], record.get("note", ""), overridden(began, overrides), sources)


def overridden(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A recipe, with `setting=value` overrides of the command line."""
    changed = values(recipe)
    for _, layer in _override_layers(overrides):
        changed |= layer
    return from_values(changed, "command line")


# --- values ----------------------------------------------------------------------------------------------------------


def _describe(kind) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"a list of {typing.get_args(kind)[0].__name__}"
    if isinstance(kind, types.UnionType):
        return " or ".join("none" if k is type(None) else k.__name__ for k in typing.get_args(kind))
    return {bool: "true or false", int: "a whole number from 0", float: "a finite number from 0", str: "text"}[kind]


def _fits(kind, value):
    """`value` in the type `kind`; ValueError if it is not of it."""
    if typing.get_origin(kind) is typing.Literal:
        if value in typing.get_args(kind):
            return value
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(_fits(typing.get_args(kind)[0], item) for item in value)
    elif isinstance(kind, types.UnionType):
        return None if value is None else _fits(typing.get_args(kind)[0], value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
    elif type(value) is kind and (kind is not int or value >= 0):  # no stage has a setting below 0
        return value
    raise ValueError


def _from_text(kind, text):
    """What `text`, from the environment or the command line, says in the type `kind`."""
    if typing.get_origin(kind) is typing.Literal or kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        return [_from_text(typing.get_args(kind)[0], item.strip()) for item in text.split(",") if item.strip()]
    if isinstance(kind, types.UnionType):
        return None if text.lower() == "none" else _from_text(typing.get_args(kind)[0], text)
    if kind is bool:
        return {"1": True, "true": True, "0": False, "false": False}[text.lower()]
    return kind(text)


def _value(key, value, source, is_text):
    kind = SETTINGS[key].kind
    try:
        return _fits(kind, _from_text(kind, value) if is_text else value)
    except (ValueError, KeyError):
        raise UserError(f"{source}: {key}: expected {_describe(kind)}, got {value!r}") from None


def _nearest(name, known) -> str:
    """The known names most like `name`, also by their last part alone."""

    def likeness(candidate):
        ends = (candidate, candidate.rpartition(".")[2])
        return max(difflib.SequenceMatcher(None, name, end).ratio() for end in ends)

    return ", ".join(sorted(known, key=likeness, reverse=True)[:3])


def _edits(a, b) -> int:
    """Characters to insert, delete or replace between two texts."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


def _require_known(key, source):
    if key in ENVIRONMENT:
        raise UserError(f"{source}: {key} is the environment's name of {ENVIRONMENT[key]}; write {ENVIRONMENT[key]}=...")
    if key not in SETTINGS:
        raise UserError(f"{source}: there is no setting {key!r}; the nearest are {_nearest(key, SETTINGS)}")


# --- sources, one layer each: (source, {setting: value}) ---------------------------------------------------------------


def _read(path: Path) -> dict:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def _path(name: str, beside: Path) -> Path:
    if name.endswith(".toml"):
        return beside / name
    if name not in names():
        raise UserError(f"there is no recipe {name!r}; there are {', '.join(names())}, or give the path of a .toml file")
    return FOLDER / f"{name}.toml"


def _file_layers(name, beside=Path(), above=()):
    """The bases' layers, oldest first, then the file's own; and its note."""
    path = _path(name, beside)
    if path in above:
        raise UserError(f"{path}: is its own base")
    content = _read(path)
    base, note = content.pop("base", None), content.pop("note", "")
    for key, value in (("base", base or ""), ("note", note)):
        if not isinstance(value, str):
            raise UserError(f"{path}: {key}: expected text, got {value!r}")
    layers = _file_layers(base, path.parent, (*above, path))[0] if base else []
    own = {}
    for stage, table in content.items():
        if not isinstance(table, dict):
            _require_known(stage, path.name)
        for field, value in table.items():
            key = f"{stage}.{field}"
            _require_known(key, path.name)
            own[key] = _value(key, value, path.name, is_text=False)
    return [*layers, (path.stem, own)], note


def _environment_layers(environ):
    for name, text in environ.items():
        if name in ENVIRONMENT:
            key = ENVIRONMENT[name]
            translation = SETTINGS[key].env[name]
            if translation is None:
                yield f"environment {name}", {key: _value(key, text, name, is_text=True)}
            elif text in translation:
                yield f"environment {name}", {key: translation[text]}
            else:
                raise UserError(f"{name}: expected one of {', '.join(translation)}, got {text!r}")
        elif name in FIXED_ENVIRONMENT:
            if text != FIXED_ENVIRONMENT[name]:
                raise UserError(f"{name}: only {FIXED_ENVIRONMENT[name]} is supported, got {text!r}; unset it")
        elif name.isupper() and name not in IDLE_ENVIRONMENT:
            if near := [known for known in ENVIRONMENT if _is_slip(name, text, known)]:
                raise UserError(f"environment: {name} looks like a mistyped {' or '.join(near)}; correct or unset it")


def _is_slip(name, text, known) -> bool:
    """Whether `name` was meant to be `known`: spelt nearly so, with a value that it may have (MODEL_DIR=/opt is not MODEL_DIM)."""
    slips = 1 if len(name) < 8 else 2
    if abs(len(known) - len(name)) > slips or _edits(name, known) > slips:
        return False
    try:
        _value(ENVIRONMENT[known], text, name, is_text=True)
    except UserError:
        return False
    return True


def _override_layers(overrides):
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"expected setting=value, got {override!r}")
        _require_known(key, "command line")
        yield "command line", {key: _value(key, text, "command line", is_text=True)}


def resolve(name: str, overrides: Iterable[str] = (), environ: Mapping[str, str] | None = None) -> Resolved:
    """The recipe of a name or of a TOML file, with the environment and `setting=value` overrides applied."""
    layers, note = _file_layers(name)
    layers += [*_environment_layers(os.environ if environ is None else environ), *_override_layers(overrides)]
    values, sources = {}, dict.fromkeys(SETTINGS, "default")
    for source, layer in layers:
        values |= layer
        sources |= dict.fromkeys(layer, source)
    return Resolved(Path(name).stem, note, _build(values), sources)
