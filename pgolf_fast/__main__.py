"""The `pgolf` command. A verb is a dataclass of its arguments and a `run(config, console)` that
returns (result, exit code); it lives in pgolf_fast/commands/ and is listed in VERBS.

Exit codes: 0 done and fine, 1 the thing checked is wrong, 2 wrong usage or input.
"""

import importlib
import json
import sys

import tyro
from rich.console import Console

from pgolf_fast.errors import UserError

# verb -> (module in pgolf_fast.commands, class of its arguments); imported only when its help or itself is asked for
VERBS = {
    "bench": ("bench", "Bench"),
    "demo": ("demo", "Demo"),
    "doctor": ("doctor", "Doctor"),
}


def _module(verb):
    return importlib.import_module(f"pgolf_fast.commands.{VERBS[verb][0]}")


def _summary(verb) -> str:
    return getattr(_module(verb), VERBS[verb][1]).__doc__.splitlines()[0]


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {_summary(verb)}" for verb in VERBS]
    return "\n".join(["usage: pgolf VERB [arguments]   (pgolf VERB --help)", "", *lines])


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    verb = arguments[0]
    if verb not in VERBS:
        print(f"pgolf: no verb named {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(2)
    module = _module(verb)
    config = tyro.cli(getattr(module, VERBS[verb][1]), prog=f"pgolf {verb}", args=arguments[1:], config=(tyro.conf.FlagCreatePairsOff,))
    # With --json, standard output holds the JSON and nothing else. Off a terminal, tables get room.
    console = Console(stderr=config.json, width=None if sys.stdout.isatty() else 140)
    try:
        result, code = module.run(config, console)
    except UserError as error:
        print(f"pgolf {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"pgolf {verb}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if config.json:
        print(json.dumps(result))
    raise SystemExit(code)


if __name__ == "__main__":
    main()
