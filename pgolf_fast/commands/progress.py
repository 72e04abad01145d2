"""How far a verb has come: bars on a terminal, a line now and then elsewhere."""

import contextlib
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0  # between two lines where there is no terminal


@contextlib.contextmanager
def shown(console: Console):
    """A function progress(task, done, total, text="") that shows it."""
    if not console.is_terminal:
        yield _lines(console)
        return
    text = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[text]}")
    with Progress(*text, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
        tasks = {}

        def progress(task, done, total, text=""):
            if task not in tasks:
                tasks[task] = bar.add_task(task, text="")
            bar.update(tasks[task], completed=done, total=total, text=text)

        yield progress


def _lines(console):
    begun, last = {}, time.perf_counter()  # of each task: when it was first heard of, and how much was done then

    def progress(task, done, total, text=""):
        nonlocal last
        now = time.perf_counter()
        since, done_then = begun.setdefault(task, (now, done))
        if now - last > LINE_EVERY_S and done > done_then:
            last = now
            left_s = (total - done) * (now - since) / (done - done_then)
            console.print(f"{task}: {done / total:.0%}, {left_s:.0f} s left" + (f", {text}" if text else ""))

    return progress
