"""`pgolf eval`: an artifact's score, by the file that ships."""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from pgolf_fast import dist, export, recipe, runlog
from pgolf_fast.clock import process_age_s
from pgolf_fast.commands.devices import choose_device, under_torchrun
from pgolf_fast.commands.pack import artifact_of
from pgolf_fast.commands.progress import shown
from pgolf_fast.commands.quantize import QUANTIZED
from pgolf_fast.data import Validation, load_validation
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.evaluate import Progress, SavedState, evaluate, make_evaluator
from pgolf_fast.evaluation.referee import Referee
from pgolf_fast.evaluation.self_distillation import self_distill
from pgolf_fast.files import write_json
from pgolf_fast.interrupts import asked_to_stop

EVALUATORS = recipe.SETTINGS["eval.evaluator"].kind.__args__
STAGES = ("eval.", "ttt.", "lora.", "sdttt.")  # of a recipe, that an evaluation reads
NOT_LEGAL = "after SDTTT, not legal"


@dataclasses.dataclass(frozen=True)
class Eval:
    """Score an artifact. Interrupted, the same command goes on where it stopped; a result file is written once, at the end."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARTIFACT|RUN")]
    """What `pgolf pack` wrote, or a run's folder with such a file in it."""
    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SETTING=VALUE ...]")] = ()
    """eval.stride=..., ttt.epochs=..., over the recipe's settings in the artifact."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Validation shards, with tokenizer and, where the recipe counts original bytes, the sidecar; a run's own if left out."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Model that made the shards; the folder's own if left out."""
    evaluator: Literal[("recipe", "all", *EVALUATORS)] = "recipe"
    """The recipe's own, another, or all up to the recipe's own: of a run also the weights before quantization."""
    recipe: str = ""
    """Refuse an artifact whose model is another recipe's than this one."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Results and the state of unfinished evaluations; beside the artifact if left out."""
    fresh: bool = False
    """Begin again where an unfinished evaluation is."""
    gpus: int = 0
    """Run on this many GPUs of this machine; 0: as launched."""
    device: str = "auto"
    """cpu, cuda, or auto: GPUs if there are any."""
    json: bool = False
    """Print the results as JSON."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    weights: str  # "artifact", or "before quantization"; with NOT_LEGAL where they saw the text before it was scored
    evaluator: str
    nats_per_token: float
    bits_per_byte: float
    published_bits_per_byte: float | None  # with the end of the stream counted as the published evaluators do
    tokens: int
    bytes: int
    strict_s: float  # from the process's start, shared set-up included
    practice_s: float  # from after loading and warm-up to the reduced result; as scoring_s, of all sittings
    scoring_s: float  # in the evaluator alone
    weight_versions: int
    ledger: str  # digest


def run(config: Eval, console: Console) -> tuple[dict, int]:
    under_torchrun(config.gpus)
    artifact = artifact_of(config.source)
    config = _with_data(config)
    quantized = config.source / QUANTIZED
    if quantized.is_file() and quantized.stat().st_mtime > artifact.stat().st_mtime and int(os.environ.get("RANK", 0)) == 0:
        console.print(f"[yellow]! {quantized} is newer than {artifact}, which is what is scored; `pgolf pack {config.source}` packs it")
    device = dist.start(choose_device(config.device).type)
    found = _run(config, console, artifact, device)
    dist.stop()
    return found


def _with_data(config: Eval) -> Eval:
    """Where no data are named, those that the run was trained with."""
    if config.data is not None:
        return config
    if not config.source.is_dir():
        raise UserError("data: give the folder of the validation shards, --data FOLDER")
    own = recipe.recorded(runlog.read_recipe(config.source), str(config.source / "recipe.json")).recipe.train
    tokenizer = config.tokenizer or (Path(own.tokenizer) if own.tokenizer else None)
    return dataclasses.replace(config, data=Path(own.data), tokenizer=tokenizer)


def _run(config, console, artifact: Path, device):
    for override in config.overrides:
        if not override.startswith(STAGES):
            raise UserError(f"{override}: an evaluation takes {', '.join(f'{stage}*' for stage in STAGES)}; the rest is the artifact's")
    expect = recipe.resolve(config.recipe).recipe if config.recipe else None
    settings = recipe.overridden(export.load_model(artifact, "cpu", expect)[0], config.overrides)
    validation = load_validation(config.data, settings.eval.seq_len, config.tokenizer, settings.model.vocab_size)
    out = config.out or artifact.with_suffix(".eval")
    own = settings.eval.evaluator if config.evaluator in ("recipe", "all") else config.evaluator
    wanted = [("artifact", own)]
    if config.evaluator == "all":
        wanted = [("artifact", name) for name in dict.fromkeys(("plain", "sliding", own))]
        if config.source.is_dir():
            wanted.insert(0, ("before quantization", "plain"))
    shared_s = process_age_s()
    rows = []
    for weights, name in wanted:
        row = _score(config, console, artifact, weights, name, settings, validation, device, out, shared_s)
        if row is None:
            if dist.rank() == 0:
                console.print(f"stopped; the same command goes on from here (its state is in {out})")
            return {"rows": [dataclasses.asdict(r) for r in rows], "is_complete": False}, 130
        rows.append(row)
    if dist.rank() == 0:
        console.print(score_table(rows))
        console.print(f"written: {out}")
    return {"rows": [dataclasses.asdict(r) for r in rows], "is_complete": True}, 0


def _score(config, console, artifact, weights, name, settings, validation: Validation, device, out: Path, shared_s) -> Row | None:
    begin = time.perf_counter()
    if weights == "artifact":
        scored, model = artifact, export.load_model(artifact, device)[1]
    else:
        scored, model = config.source / "model.safetensors", export.model_of(settings, device)
        model.load_published(export.read_run(config.source).state)
    if settings.sdttt.enabled:
        self_distill(model, validation, settings.eval.seq_len, settings.sdttt)
        weights = f"{weights} {NOT_LEGAL}"
    stem = f"{weights} {name}".replace(",", "").replace(" ", "-")
    identity = {
        "artifact": hashlib.sha256(scored.read_bytes()).hexdigest(),
        "validation": hashlib.sha256(validation.tokens.tobytes() + validation.target_bytes.tobytes()).hexdigest(),
        "settings": {key: value for key, value in recipe.values(settings).items() if key.startswith(STAGES)},
    }
    identity = json.loads(json.dumps(identity))
    saved = SavedState(out / f"{stem}.unfinished", identity, settings.eval.save_seconds)
    # Closed after an error too: a rank that cannot exit keeps the others waiting.
    with contextlib.closing(make_evaluator(name, model, settings)) as evaluator:
        if device.type == "cuda":
            evaluator.warm_up(len(validation.document_starts))
        referee = Referee(evaluator.model, validation, device, allow_published_tail=settings.eval.published_tail)
        if config.fresh:
            saved.remove()
        with asked_to_stop() as must_stop, shown(console) as show:

            def progress(p: Progress):
                show(f"{weights}, {name}", p.share, 1.0, f"{p.score.bits_per_byte:.4f} bpb so far")

            set_up_s = shared_s + time.perf_counter() - begin
            outcome = evaluate(evaluator, referee, saved, progress, must_stop)
    if outcome is None:
        return None
    found, score = outcome.result, outcome.result.score
    published = found.published.bits_per_byte if settings.eval.published_tail and found.again.tokens else None
    row = Row(
        weights, name, score.nats_per_token, score.bits_per_byte, published, score.tokens, score.bytes,
        set_up_s + outcome.practice_s, outcome.practice_s, outcome.scoring_s, found.versions, found.digest,
    )  # fmt: skip
    if dist.rank() == 0:
        write_json(out / f"{stem}.json", dataclasses.asdict(row) | {"of": identity, "ranks": dist.world_size(), "device": str(device)})
    saved.remove()
    return row


def score_table(rows: list[Row]) -> Table:
    table = Table(title="scores", title_justify="left", box=box.SIMPLE)
    for heading in ("weights", "evaluator"):
        table.add_column(heading, no_wrap=True)
    has_published = any(row.published_bits_per_byte is not None for row in rows)
    extra = ["published count"] if has_published else []
    for heading in ("nats/token", "bits/byte", *extra, "tokens", "strict s", "practice s", "scoring s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for r in rows:
        published = [f"{r.published_bits_per_byte:.6f}" if r.published_bits_per_byte is not None else "-"] if has_published else []
        seconds = (f"{s:.1f}" for s in (r.strict_s, r.practice_s, r.scoring_s))
        table.add_row(r.weights, r.evaluator, f"{r.nats_per_token:.6f}", f"{r.bits_per_byte:.6f}", *published, f"{r.tokens:,}", *seconds)
    return table
