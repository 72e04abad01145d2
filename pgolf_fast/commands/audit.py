"""`pgolf audit`: does an evaluator or an artifact keep the rules?"""

import dataclasses
import time
import typing
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pgolf_fast import recipe, runlog
from pgolf_fast.audit import contents, fixtures, subjects
from pgolf_fast.audit.invariants import DECLARED, FAIL, PASS, UNTESTED, Finding, audit
from pgolf_fast.commands.pack import artifact_of
from pgolf_fast.errors import UserError
from pgolf_fast.evaluation.evaluate import EvalConfig
from pgolf_fast.files import write_json

EVALUATORS = typing.get_args(typing.get_type_hints(EvalConfig)["evaluator"])
COLOURS = {PASS: "green", FAIL: "red", UNTESTED: "yellow", DECLARED: "yellow"}


@dataclasses.dataclass(frozen=True)
class Audit:
    """Run the rules that can be run against an evaluator or an artifact, on a short text, on the CPU; exit code 1 if one is broken."""

    subject: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SUBJECT")] = ""
    """A packed artifact or a run's folder with one, a recipe's name or TOML file, one of our evaluators, or anybody's:
    FILE.py:FUNCTION or MODULE:FUNCTION."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder of validation shards, whose text must not be in the artifact."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("audit.json")
    """Where the findings are written."""
    self_test: bool = False
    """Audit evaluators that are known to cheat, and an honest one: is each caught by the rule that it breaks?"""
    json: bool = False
    """Print the findings as JSON."""


def _resolve(config: Audit) -> tuple[subjects.Subject | None, list[Finding]]:
    """The evaluator to run, and what was found in the artifact that names it."""
    name = config.subject
    if not name:
        raise UserError(
            f"subject: give a packed artifact, a recipe, FILE.py:FUNCTION, or one of {', '.join(EVALUATORS)}; or say --self-test"
        )
    if ":" in name and not Path(name).exists():
        return subjects.load_function(name), []
    if Path(name).exists() and not name.endswith(".toml"):
        described, found = contents.audit_contents(artifact_of(Path(name)), config.data)
        return subjects.of_recipe(*described) if described else None, found
    if name in EVALUATORS:
        return subjects.of_recipe("the default model", recipe.overridden(subjects.default_settings(), (f"eval.evaluator={name}",))), []
    if not name.endswith(".toml") and name not in recipe.names():
        known = ", ".join([*recipe.names(), *EVALUATORS])
        raise UserError(f"subject: no file, recipe or evaluator {name!r} is here; known by name are {known}")
    return subjects.of_recipe(name, recipe.resolve(name, environ={}).recipe), []


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading in ("invariant", "source", "verdict", "evidence"):
        table.add_column(heading, no_wrap=heading == "invariant")
    return table


def _row(finding: Finding) -> tuple[str, ...]:
    colour = COLOURS[finding.verdict]
    return finding.invariant, finding.source, f"[{colour}]{finding.verdict}", escape(finding.evidence)


def _self_test(console: Console) -> tuple[dict, bool]:
    table = Table(title="evaluators that are known", title_justify="left", box=box.SIMPLE)
    for heading in ("evaluator", "must be caught by", "caught by"):
        table.add_column(heading)
    rows, right = {}, True
    for fixture in fixtures.FIXTURES:
        name = fixture.evaluate.__name__
        with console.status(name):
            caught = [f.invariant for f in audit(subjects.of_function(name, fixture.evaluate)) if f.verdict == FAIL]
        as_known = set(caught) <= {fixture.caught_by, *fixture.also_by} and (fixture.caught_by in caught or not fixture.caught_by)
        right &= as_known
        table.add_row(name, fixture.caught_by or "nothing", f"[{'green' if as_known else 'red'}]{', '.join(caught) or 'nothing'}")
        rows[name] = {"must_be_caught_by": fixture.caught_by, "caught_by": caught, "as_known": as_known}
    console.print(table)
    return rows, right


def _audit(config: Audit, console: Console) -> tuple[list[Finding], str]:
    subject, found = _resolve(config)
    evaluator = subject.name if subject else "no evaluator: the artifact names none"
    with console.status(f"auditing {evaluator}") as status:
        for finding in audit(subject) if subject else ():
            found.append(finding)
            status.update(f"auditing {evaluator}: {finding.invariant} done")
    table = _table(f"audit of {config.subject} ({evaluator})")
    for finding in found:
        table.add_row(*_row(finding))
    console.print(table)
    return found, evaluator


def _summary(found: list[Finding]) -> str:
    broken, open_ = ([f.invariant for f in found if f.verdict == verdict] for verdict in (FAIL, UNTESTED))
    if broken:
        return f"broken: {', '.join(broken)}"
    return "no rule that was tried is broken" + (f"; not tested: {', '.join(open_)}" if open_ else "")


def run(config: Audit, console: Console) -> tuple[dict, int]:
    begin, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: several threads would only wait for each other
    try:
        if config.self_test:
            rows, fine = _self_test(console)
            result = {"self_test": rows}
            said = "every cheat is caught, the honest one passes" if fine else "the audit does not tell cheats from the honest one"
        else:
            found, evaluator = _audit(config, console)
            result = {"subject": config.subject, "evaluator": evaluator, "findings": [dataclasses.asdict(f) for f in found]}
            fine, said = all(f.verdict != FAIL for f in found), _summary(found)
    finally:
        torch.set_num_threads(threads)
    result |= {"passed": fine, "commit": runlog.commit(), "seconds": round(time.perf_counter() - begin, 1)}
    write_json(config.out, result)
    console.print(f"[{'green' if fine else 'red'}]{said}[/]   ({result['seconds']} s; {config.out})")
    return result, 0 if fine else 1
