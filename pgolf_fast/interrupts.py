"""Signals that ask a long command to end, so that it leaves what it has done."""

import contextlib
import signal


@contextlib.contextmanager
def asked_to_stop():
    """A function that says whether SIGINT or SIGTERM came; a second one of its kind ends the process as usual."""
    asked = []

    def ask(number, frame):
        asked.append(number)
        signal.signal(number, before[number])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
