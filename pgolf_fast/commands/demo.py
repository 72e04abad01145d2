"""`pgolf demo`: the main job on an embedded default, on whatever device there is."""

import dataclasses
import tempfile
from pathlib import Path

from rich.console import Console

from pgolf_fast.commands import bench, data, doctor


@dataclasses.dataclass(frozen=True)
class Demo:
    """Run the main job on an embedded default: doctor, the embedded corpus, then a small benchmark of each op."""

    json: bool = False
    """Print the result as JSON."""


def run(config: Demo, console: Console) -> tuple[dict, int]:
    console.rule("doctor")
    health, verdict = doctor.run(doctor.Doctor(), console)
    if verdict == doctor.BROKEN:
        return {"doctor": health}, verdict
    with tempfile.TemporaryDirectory(prefix="pgolf-demo-") as temporary:
        folder = Path(temporary) / "dataset"
        console.rule("the embedded corpus: documents, tokenizer, shards")
        corpus, _ = data.run(data.Data(data.Demo(folder)), console)
        certificate, code = data.run(data.Data(data.Verify(folder)), console)
        if code != 0:
            return {"doctor": health, "corpus": corpus, "verify": certificate}, code
    console.rule("a small benchmark of each op")
    figures, code = bench.run(bench.Bench(budget_s=0.1, skip_tests=True), console)
    return {"doctor": health, "corpus": corpus, "verify": certificate, "bench": figures}, code
