"""`pgolf demo`: the main job on an embedded default, on whatever device there is."""

import dataclasses

from rich.console import Console

from pgolf_fast.commands import bench, doctor


@dataclasses.dataclass(frozen=True)
class Demo:
    """Run the main job on an embedded default: doctor, then a small benchmark of each op."""

    json: bool = False
    """Print the result as JSON."""


def run(config: Demo, console: Console) -> tuple[dict, int]:
    console.rule("doctor")
    health, verdict = doctor.run(doctor.Doctor(), console)
    if verdict == doctor.BROKEN:
        return {"doctor": health}, verdict
    console.rule("a small benchmark of each op")
    figures, code = bench.run(bench.Bench(budget_s=0.1, skip_tests=True), console)
    return {"doctor": health, "bench": figures}, code
