"""`pgolf demo`: the main job on an embedded default, on whatever device there is."""

import dataclasses
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console

from pgolf_fast import runlog
from pgolf_fast.commands import bench, data, doctor, pack, quantize, report, train
from pgolf_fast.commands import eval as evaluate
from pgolf_fast.errors import UserError

MARK = "made-by-pgolf-demo"  # a file in the folder: without it, nothing there is removed
PARTS = ("data", "runs/tiny", "report")
QUICK_OPS = ("softcap_ce", "mix_norm", "int6_pack")  # seconds on a processor, where all are plain torch anyway
BARS = "▁▂▃▄▅▆▇█"


@dataclasses.dataclass(frozen=True)
class Demo:
    """The main job on an embedded default: doctor, a small benchmark of each op, a corpus, `tiny` trained, packed, scored and drawn."""

    folder: Annotated[Path, tyro.conf.arg(metavar="DIR")] = Path("build/demo")
    """Where corpus and run go; those of an earlier demo there are replaced."""
    json: bool = False
    """Print the result as JSON."""


def curve(losses: list[float], width: int = 60) -> str:
    """Losses as a row of bars, the mean of equal spans, high is bad."""
    span = max(1, -(-len(losses) // width))
    means = [sum(part) / len(part) for part in (losses[i : i + span] for i in range(0, len(losses), span))]
    low, high = min(means), max(means)
    return "".join(BARS[round((m - low) / (high - low or 1) * (len(BARS) - 1))] for m in means)


def make_room(folder: Path) -> None:
    """What an earlier demo made goes; a folder that holds anything else is refused."""
    if folder.exists() and not (folder / MARK).exists() and any(folder.iterdir()):
        raise UserError(f"folder: {folder} holds something else than an earlier demo; choose another")
    for part in PARTS:
        shutil.rmtree(folder / part, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def run(config: Demo, console: Console) -> tuple[dict, int]:
    begin = time.perf_counter()
    make_room(config.folder)
    console.rule("this machine")
    health, verdict = doctor.run(doctor.Doctor(), console)
    if verdict == doctor.BROKEN:
        return {"doctor": health}, verdict
    console.rule("each op beside plain torch")
    ops = () if torch.cuda.is_available() else QUICK_OPS
    try:
        figures, code = bench.run(bench.Bench(ops, budget_s=0.05, skip_tests=True, without=("torch.compile",)), console)
    except UserError as error:
        figures, code = None, 0
        console.print(f"left out: {error}")
    console.rule("a corpus from the Python standard library")
    corpus, _ = data.run(data.Data(data.Demo(config.folder / "data")), console)
    certificate, wrong = data.run(data.Data(data.Verify(config.folder / "data")), console)
    if wrong:
        return {"doctor": health, "bench": figures, "data": corpus, "verify": certificate}, wrong
    console.rule("training of the recipe tiny")
    overrides = (f"train.data={config.folder / 'data'}", "train.run_id=tiny")
    trained, _ = train.run(train.Train(overrides, recipe="tiny", runs=config.folder / "runs"), console)

    losses = [event["train_loss"] for event in runlog.events(Path(trained["folder"])) if event["event"] == "step"]
    console.print(f"\ntraining loss, nats per token: {losses[0]:.2f} {curve(losses)} {losses[-1]:.2f}")
    console.print(f"validation of the averaged weights: {trained['val_bpb']:.4f} bits per byte")

    made = Path(trained["folder"])
    console.rule("quantized and packed")
    quantized, _ = quantize.run(quantize.Quantize(made), console)
    packed, over = pack.run(pack.Pack(made), console)
    console.rule("scores, each of a model that has not seen the text")
    scored, _ = evaluate.run(evaluate.Eval(made, data=config.folder / "data", evaluator="all"), console)
    console.rule("the run in pictures")
    drawn = None
    if importlib.util.find_spec("matplotlib"):
        drawn, _ = report.run(report.Report((made,), config.folder / "report"), console)
    else:
        console.print("left out: needs matplotlib, pip install 'pgolf-fast[report]'")
    console.print(f"the run is in {made}; everything took {time.perf_counter() - begin:.0f} s")
    stages = {"doctor": health, "bench": figures, "data": corpus, "verify": certificate, "train": trained}
    return stages | {"quantize": quantized, "pack": packed, "eval": scored, "report": drawn}, code or over
