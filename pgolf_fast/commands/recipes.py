"""`pgolf recipes`: which recipes there are, and what one of them says with the environment and overrides applied."""

import dataclasses
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pgolf_fast import recipe


@dataclasses.dataclass(frozen=True)
class Recipes:
    """List the recipes, or show every value of one and where it comes from."""

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RECIPE]")] = ""
    """A recipe's name or a TOML file; without one, the recipes are listed."""
    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[SETTING=VALUE ...]")] = ()
    """As for training."""
    json: bool = False
    """Print as JSON."""


def run(config: Recipes, console: Console) -> tuple[dict, int]:
    return (_show(config, console) if config.name else _list(console)), 0


def _list(console):
    notes = {name: recipe.resolve(name, environ={}).note for name in recipe.names()}
    table = Table(show_header=False, box=None, padding=(0, 2))
    for name, note in notes.items():
        table.add_row(name, escape(note))
    console.print(table)
    return notes


def _show(config, console):
    record = recipe.resolve(config.name, config.overrides).record()
    console.print(escape(record["note"]))
    table = Table("setting", "value", "source", "meaning", box=None, padding=(0, 2, 0, 0))
    for key, row in record["settings"].items():
        style = "dim" if row["source"] == "default" else None
        table.add_row(key, *map(escape, (_text(row["value"]), row["source"], row["meaning"])), style=style)
    console.print(table)
    return record


def _text(value):
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
