"""The figures of one or several runs, as SVG and PNG, and the page that shows them: one HTML file that needs nothing else."""

import html
import io
import logging
from pathlib import Path

from pgolf_fast.errors import UserError
from pgolf_fast.files import write_whole
from pgolf_fast.run_record import RunRecord

COLOURS = ("#1f4e79", "#b5532a", "#4a7c59", "#7a5195", "#c49a2c", "#5f6b73")
INK, RULE = "#262626", "#d9d9d9"
FONTS = ["Inter", "Helvetica Neue", "Arial", "DejaVu Sans"]  # the viewer's first of these; the last one comes with matplotlib
MAX_POINTS = 400  # of a curve: each is the mean of equally many steps
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": FONTS,
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: sharp, searchable, in the viewer's font
    "svg.hashsalt": "pgolf",  # the same runs give the same bytes
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8c8c8c",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#ebebeb",
    "grid.linewidth": 0.6,
    "xtick.color": "#595959",
    "ytick.color": "#595959",
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
}


def spans(count: int, points: int = MAX_POINTS) -> list[slice]:
    """At most `points` equal spans that cover `count` items."""
    size = max(1, -(-count // points))
    return [slice(begin, begin + size) for begin in range(0, count, size)]


def _mean(values) -> float:
    return sum(values) / len(values)


def running_mean(values: list[float], window: int) -> list[float]:
    """The mean of each value and the window - 1 before it; fewer at the beginning."""
    return [_mean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def ms_per_step(run: RunRecord) -> list[tuple[int, float]]:
    """(step, milliseconds per step up to it since the point before), from the training clock of the step events."""
    ends = [run.steps[span][-1] for span in spans(len(run.steps), MAX_POINTS // 2)]
    return [(b["step"], 1e3 * (b["train_s"] - a["train_s"]) / (b["step"] - a["step"])) for a, b in zip(ends, ends[1:])]


# --- figures ---------------------------------------------------------------------------------------------------------


def _matplotlib():
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib, which is not installed: pip install 'pgolf-fast[report]'") from None
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # fonts that are not here are the viewer's
    return matplotlib, Figure


def _axes(figure_class, x_label, y_label):
    figure = figure_class(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_title(y_label, loc="left", fontsize="medium")  # read without turning the head
    return figure, axes


def _loss(figure_class, runs, key, x_label):
    figure, axes = _axes(figure_class, x_label, "loss, nats per token")
    lows, highs = [], []
    for run, colour in zip(runs, COLOURS):
        points = [([e[key] for e in run.steps[s]], [e["train_loss"] for e in run.steps[s]]) for s in spans(len(run.steps))]
        x, y = [p[0][-1] for p in points], [_mean(p[1]) for p in points]
        axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(x, running_mean(y, max(1, len(y) // 20)), color=colour, label=run.name)
        held = [(v[key], v["val_loss"]) for v in run.validations if v["step"] > 0]
        axes.plot(*zip(*held), color=colour, marker="o", markersize=4, linestyle="none") if held else None
        lows.append(min([*y, *(v for _, v in held)]))
        highs.append(max(y[len(y) // 20 :]))  # the fall of the first steps would flatten all the rest
    room = 0.06 * (max(highs) - min(lows)) or 0.1
    axes.set_ylim(min(lows) - room, max(highs) + room)
    _legend(axes, runs)
    return figure


def _legend(axes, runs):
    if len(runs) > 1:
        axes.legend(loc="upper right")


def _step_time(figure_class, runs):
    figure, axes = _axes(figure_class, "step", "milliseconds per step")
    usual = []
    for run, colour in zip(runs, COLOURS):
        times = ms_per_step(run)
        axes.plot([step for step, _ in times], [ms for _, ms in times], color=colour, label=run.name)
        usual += sorted(ms for _, ms in times)[: max(1, len(times) * 19 // 20)]
    axes.set_ylim(0, 1.3 * max(usual, default=1.0))
    _legend(axes, runs)
    return figure


def _learning_rate(figure_class, runs):
    figure, axes = _axes(figure_class, "step", "learning rate, share of its peak")
    for run, colour in zip(runs, COLOURS):
        points = [run.steps[s][-1] for s in spans(len(run.steps))]
        axes.plot([e["step"] for e in points], [e["lr_factor"] for e in points], color=colour, label=run.name)
    axes.set_ylim(0, 1.05)
    _legend(axes, runs)
    return figure


def _sizes(figure_class, runs):
    packed = [run for run in runs if run.sizes]
    roles = sorted({role for run in packed for role in run.sizes}, key=lambda role: max(run.sizes.get(role, 0) for run in packed))
    figure, axes = _axes(figure_class, "bytes", "")
    figure.set_figheight(1.2 + 0.26 * len(roles) * max(1, len(packed) / 2))
    thickness = 0.76 / len(packed)
    for i, run in enumerate(packed):
        places = [row + (i - (len(packed) - 1) / 2) * -thickness for row in range(len(roles))]
        values = [run.sizes.get(role, 0) for role in roles]
        axes.barh(places, values, height=0.92 * thickness, color=COLOURS[runs.index(run)], label=run.name)
        for place, value in zip(places, values):
            axes.annotate(f"{value:,}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.set_yticks(range(len(roles)), [ROLE_NAMES.get(role, role) for role in roles])
    axes.margins(x=0.14)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", visible=False)
    if len(packed) > 1:
        axes.legend(loc="lower right")
    return figure


ROLE_NAMES = {"rest": "scales, unquantized", "all": "all tensors"}
CAPTIONS = {
    "loss-steps": "Training loss against steps, thin as logged and thick as a mean over a twentieth of the run; dots are validation. "
    "The first steps may lie above the frame.",
    "loss-clock": "The same against the training clock, which stands still during validation and checkpoints.",
    "step-time": "Time per step on that clock, between points and not from the start, so that a change in mid-run shows. "
    "The slowest twentieth may lie above the frame.",
    "learning-rate": "The factor on every group's learning rate.",
    "sizes": "Bytes against the cap: the packed weights by kind of tensor over all blocks, and the code.",
}


def draw(runs: list[RunRecord]) -> dict[str, tuple[str, bytes]]:
    """Figure name to (SVG text, PNG bytes), in the order of the page; sizes only where `pgolf pack` left its ledger in a run folder."""
    if len(runs) > len(COLOURS):
        raise UserError(f"runs: {len(runs)} in one figure cannot be told apart; give at most {len(COLOURS)}")
    matplotlib, figure_class = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figures = {
            "loss-steps": _loss(figure_class, runs, "step", "step"),
            "loss-clock": _loss(figure_class, runs, "train_s", "seconds of training"),
            "step-time": _step_time(figure_class, runs),
            "learning-rate": _learning_rate(figure_class, runs),
        }
        if any(run.sizes for run in runs):
            figures["sizes"] = _sizes(figure_class, runs)
        return {name: (_svg(figure), _png(figure)) for name, figure in figures.items()}


def _svg(figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def _png(figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=200, metadata={"Software": None})
    return data.getvalue()


# --- the page --------------------------------------------------------------------------------------------------------

CSS = """
:root { color-scheme: light }
body { margin: 3.5rem auto; max-width: 68rem; padding: 0 1.5rem; background: #fff; color: #262626;
       font: 17px/1.5 "Iowan Old Style", "Palatino Linotype", Palatino, "Book Antiqua", Georgia, serif }
h1 { font-size: 1.9rem; font-weight: 500; margin: 0 0 .3rem }
h2 { font-size: 1.15rem; font-weight: 500; margin: 3rem 0 .8rem; border-bottom: 1px solid #d9d9d9; padding-bottom: .3rem }
p.note { color: #595959; margin: 0 0 2rem; max-width: 46rem }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums lining-nums }
th { font-weight: 400; color: #595959; text-align: left; padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid #d9d9d9 }
td { padding: .25rem 1.4rem .25rem 0; vertical-align: top }
.number { text-align: right }
.scroll { overflow-x: auto }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 2.2rem 2.5rem }
figure { margin: 0 }
figure svg { width: 100%; height: auto; display: block }
figcaption { font-size: .84rem; color: #595959; margin-top: .4rem }
i.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em }
@media print { body { margin: 0; max-width: none } figure { break-inside: avoid } }
"""


def page(runs: list[RunRecord], figures: dict[str, tuple[str, bytes]]) -> str:
    title = ", ".join(dict.fromkeys(str(run.recipe["name"]) for run in runs))
    notes = dict.fromkeys(run.recipe.get("note", "") for run in runs)
    parts = [f"<h1>{html.escape(title)}</h1>"]
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in notes if note]
    headings = ["run", "seed", "steps", "training loss", "validation loss", "bits per byte", "training", "ms/step", "bytes"]
    parts.append(_table(headings, _summary(runs)))
    parts.append('<h2>Curves</h2><div class="figures">')
    for name, (svg, _) in figures.items():
        image = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)
        parts.append(f"<figure>{image}<figcaption>{CAPTIONS[name]}</figcaption></figure>")
    parts.append("</div>" + _scores(runs) + "<h2>Where the time went</h2>" + _time_ledger(runs))
    parts.append("<h2>What ran</h2>" + _table(["run", "device", "ranks", "torch", "commit", "command"], _machines(runs)))
    parts.append("<h2>Settings that a recipe, the environment or the command line changed</h2>" + _settings(runs))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{CSS}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _table(headings, rows) -> str:
    """Cells are text, or numbers already written; a cell that is a tuple is (html, text)."""

    def is_number(value):
        return isinstance(value, str) and (value[:1].isdigit() or value == "–")

    def cell(value):
        if isinstance(value, tuple):
            return f"<td>{value[0]}{html.escape(value[1])}</td>"
        return f'<td class="number">{html.escape(value)}</td>' if is_number(value) else f"<td>{html.escape(value)}</td>"

    rows = list(rows)
    numeric = [all(is_number(row[i]) for row in rows) for i in range(len(headings))]
    head = "".join(f'<th class="number">{h}</th>' if n else f"<th>{h}</th>" for h, n in zip(headings, numeric))
    body = "".join("<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _key(runs, run):
    return f'<i class="key" style="background:{COLOURS[runs.index(run)]}"></i>', run.name


def _summary(runs):
    for run in runs:
        last, scored = run.steps[-1], run.end or (run.validations[-1] if run.validations else None)
        score = [f"{scored['val_loss']:.4f}", f"{scored['val_bpb']:.4f}"] if scored else ["–", "–"]
        size = f"{sum(run.sizes.values()):,}" if run.sizes else "–"
        steps = f"{last['step']:,}" + ("" if run.end else ", unfinished")
        clock = [f"{last['train_s']:.1f} s", f"{1e3 * last['train_s'] / last['step']:.1f}"]
        yield [_key(runs, run), str(run.seed), steps, f"{last['train_loss']:.4f}", *score, *clock, size]


def _scores(runs) -> str:
    rows = [
        [
            _key(runs, run),
            row["weights"],
            row["evaluator"],
            *(f"{row[key]:.4f}" for key in ("nats_per_token", "bits_per_byte")),
            *(f"{row[key]:.1f} s" for key in ("strict_s", "practice_s", "scoring_s")),
        ]
        for run in runs
        for row in run.evaluations.values()
    ]
    headings = ["run", "weights", "evaluator", "nats per token", "bits per byte", "from process start", "without set-up", "scoring alone"]
    return "<h2>Scores</h2>" + _table(headings, rows) if rows else ""


def _time_ledger(runs) -> str:
    finished = [run for run in runs if run.end]
    if not finished:
        return '<p class="note">No run has finished yet.</p>'
    phases = list(dict.fromkeys(phase for run in finished for phase in run.end["ledger_s"]))
    rows = [[_key(runs, run), *(f"{run.end['ledger_s'].get(p, 0.0):.1f} s" for p in phases)] for run in finished]
    return _table(["run", *map(html.escape, phases)], rows)


def _machines(runs):
    for run in runs:
        m = run.machine
        command = " ".join(["pgolf", *m.get("command", [""])[1:]])
        yield [_key(runs, run), *(str(m.get(k, "–")) for k in ("device", "world_size", "torch")), ("", str(m.get("commit", "–"))), command]


def _settings(runs) -> str:
    def changed(key):
        rows = [run.recipe["settings"].get(key) for run in runs]
        return any(row and row["source"] not in ("default", "base") for row in rows)

    keys = [key for key in dict.fromkeys(k for run in runs for k in run.recipe["settings"]) if changed(key)]
    rows = [[("", key), *(("", _text(run.setting(key))) for run in runs)] for key in keys]
    return _table(["setting", *(html.escape(run.name) for run in runs)], rows)


def _text(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def write(runs: list[RunRecord], out: Path) -> list[Path]:
    """Writes report.html and each figure as SVG and PNG into `out`; returns the paths."""
    figures = draw(runs)
    files = {"report.html": page(runs, figures).encode()}
    for name, (svg, png) in figures.items():
        files |= {f"{name}.svg": svg.encode(), f"{name}.png": png}
    for name, data in files.items():
        write_whole(out / name, data)
    return [out / name for name in files]
