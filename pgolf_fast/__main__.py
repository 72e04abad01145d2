"""The `pgolf` command. A verb is a dataclass of its arguments and a `run(config, console)` that
returns (result, exit code); it lives in pgolf_fast/commands/ and is listed in VERBS.

Exit codes: 0 done and fine, 1 the thing checked is wrong, 2 wrong usage or input.
"""

import errno
import importlib
import json
import os
import re
import sys

import tyro
from rich.console import Console

from pgolf_fast import __version__
from pgolf_fast.errors import UserError

# verb -> (module in pgolf_fast.commands, class of its arguments, what it does); a module is imported when its verb is used
VERBS = {
    "audit": ("audit", "Audit", "run the challenge's rules against an evaluator or an artifact"),
    "bench": ("bench", "Bench", "benchmark ops against their peers, in one process, after their tests"),
    "compare": ("compare", "Compare", "test whether one set of seeds scores better than another"),
    "data": ("data", "Data", "make, fetch and check data sets: build, get, verify, demo, train-tokenizer"),
    "demo": ("demo", "Demo", "the main job on an embedded default: doctor, ops, corpus, training, packing, scores, figures"),
    "doctor": ("doctor", "Doctor", "check this machine: versions, devices, the path each op takes"),
    "eval": ("eval", "Eval", "score an artifact on a validation split: plain, sliding window, score-first test-time training"),
    "pack": ("pack", "Pack", "compress quantized tensors into one file, with the ledger of bytes against the cap"),
    "quantize": ("quantize", "Quantize", "quantize a checkpoint, with the error of each tensor and a forecast of the size"),
    "recipes": ("recipes", "Recipes", "list the recipes, or every value of one and where it comes from"),
    "report": ("report", "Report", "draw the curves, step times and sizes of runs, in one page"),
    "train": ("train", "Train", "train a recipe, on the CPU, one GPU or several"),
}

# What a disk or a path can be in the way of, wherever a verb writes.
OUTSIDE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, (_, _, summary) in VERBS.items()]
    return "\n".join(["usage: pgolf VERB [arguments]   (pgolf VERB --help)", "", *lines])


def _print_json(result) -> None:
    if int(os.environ.get("RANK", 0)):  # of several processes the first speaks
        return
    try:
        print(json.dumps(result), flush=True)
    except BrokenPipeError:
        _stop_printing()


def _stop_printing() -> None:
    """The reader has seen enough, as in `| head`."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own flush at exit


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """What was begun is done to its end, unseen: a training run is worth more than the pipe it talks into."""
        self.quiet = True
        _stop_printing()


def _settings_last(arguments: list[str]) -> list[str]:
    """stage.setting=value may stand anywhere; the parser takes positional arguments in one run only."""
    is_setting = [re.match(r"[a-z_]+\.[a-z0-9_]+=", argument) is not None for argument in arguments]
    return [a for a, last in zip(arguments, is_setting) if not last] + [a for a, last in zip(arguments, is_setting) if last]


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"pgolf_fast {__version__}")
        raise SystemExit(0)
    verb = arguments[0]
    if verb not in VERBS:
        print(f"pgolf: no verb named {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        raise SystemExit(2)
    try:
        name, arguments_class, _ = VERBS[verb]
        module = importlib.import_module(f"pgolf_fast.commands.{name}")
        # Parsers of arguments swallow the "--" that stands between the two sides of a comparison.
        words = [module.BETWEEN if verb == "compare" and word == "--" else word for word in _settings_last(arguments[1:])]
        config = tyro.cli(getattr(module, arguments_class), prog=f"pgolf {verb}", args=words, config=(tyro.conf.FlagCreatePairsOff,))
        # With --json, standard output holds the JSON and nothing else. Off a terminal, tables get room.
        console = _Console(stderr=config.json, width=None if sys.stdout.isatty() else 140)
        result, code = module.run(config, console)
    except UserError as error:
        print(f"pgolf {verb}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except BrokenPipeError:
        _stop_printing()
        raise SystemExit(0) from None
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        print(f"pgolf {verb}: {error.filename or 'a file'}: {error.strerror}; free space or choose another place", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"pgolf {verb}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    if config.json:
        _print_json(result)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
