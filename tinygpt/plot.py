"""Curves as pictures: curves.png, which every run leaves, and `python -m tinygpt.plot`, which lays runs over each other.

    python -m tinygpt.plot outputs/a outputs/b                                  loss against steps, tokens and seconds
    python -m tinygpt.plot outputs/a outputs/b metric=loss,val/accuracy x=tokens out=a_and_b.png

Each argument is a run directory (or a metrics.csv). Keys: metric, one or more of loss (training and validation), accuracy,
perplexity and the columns of metrics.csv, a row of panels each; x, one or more of step, tokens and seconds, a column each;
out, the picture (png, pdf or svg).
"""

import csv
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import UserError, nearest
from tinygpt.summary import read_metrics, read_summary
from tinygpt.sweep import PASSING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

AXES = ("step", "tokens", "seconds")
SHORT = {"loss": ("train/loss", "val/loss"), "accuracy": ("val/accuracy",), "perplexity": ("val/perplexity",)}
LABELS = {
    "loss": "loss (nats per token)",
    "accuracy": "validation accuracy",
    "perplexity": "validation perplexity",
    "step": "optimizer steps",
    "seconds": "seconds, validation included",
}
TRAIN, VALIDATION = "#8fb0d6", "#c8501e"
# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
UNTOLD = ("hydra.", *(f"{key}=" for key in PASSING))  # what a command says that makes no other run
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.5)))  # when the colours are used up


def draw_curves(metrics: Path, target: Path, title: str) -> None:
    """Draw `metrics` (a metrics.csv) to `target` (a PNG): loss with its best point, validation accuracy, perplexity."""
    curves(read_metrics(metrics), title).savefig(target)


def curves(rows: Sequence[dict[str, str]], title: str) -> "Figure":
    figure = blank(10, 4.8)
    panels: dict[str, Axes] = figure.subplot_mosaic([["loss", "accuracy"], ["loss", "perplexity"]], width_ratios=[1.7, 1])
    loss = panels["loss"]
    if train := points(rows, "tokens", "train/loss"):
        loss.plot(*zip(*train, strict=True), color=TRAIN, linewidth=1, label="training, one batch")
    for name, axes in panels.items():
        if val := points(rows, "tokens", f"val/{name}"):
            axes.plot(*zip(*val, strict=True), color=VALIDATION, linewidth=1.8, **markers(val), label="validation")
        dress(axes, "tokens", name)
    if val := points(rows, "tokens", "val/loss"):
        best = min(val, key=lambda point: point[1])
        label = f"best {best[1]:.4f}"
        loss.plot(*best, color=VALIDATION, marker="*", markersize=14, linestyle="none", label=label)
    if train or val:
        loss.legend(frameon=False)
    panels["accuracy"].set_xlabel("")
    figure.suptitle(title.replace("$", r"\$"), fontsize=12)
    return figure


@dataclass(frozen=True)
class Run:
    """A run to be drawn: what it is called beside the others, and the lines of its metrics.csv."""

    label: str
    rows: list[dict[str, str]]


def overlay(runs: Sequence[Run], metrics: Sequence[str], xs: Sequence[str]) -> "Figure":
    """Runs over each other: a row of panels for each metric, a column for each x. UserError for a metric without a value."""
    from matplotlib.lines import Line2D

    names = [run.label for run in runs] + (["validation", "training, one batch"] if "loss" in metrics else [])
    width = 4.6 * len(xs) + 0.8
    beside = max(1, int(11 * width / (max(map(len, names)) + 7)))  # about eleven letters to the inch
    figure = blank(width, 3.4 * len(metrics) + 0.4 + 0.22 * -(-len(names) // beside))
    grid = figure.subplots(len(metrics), len(xs), squeeze=False, sharex="col", sharey="row")
    for metric, row in zip(metrics, grid, strict=True):
        for x, axes in zip(xs, row, strict=True):
            draw_metric(axes, runs, x, metric)
            dress(axes, x, metric)
            axes.label_outer()
    handles = [Line2D([], [], **style, linewidth=1.8) for _, style in zip(runs, styles(), strict=False)]
    handles += [Line2D([], [], color="gray", linewidth=1.8), Line2D([], [], color="gray", linewidth=1, alpha=0.4)]
    texts = [name.replace("$", r"\$") for name in names]
    figure.legend(handles[: len(names)], texts, loc="outside upper left", frameon=False, ncols=beside)
    return figure


def draw_metric(axes: "Axes", runs: Sequence[Run], x: str, metric: str) -> None:
    for run, style in zip(runs, styles(), strict=False):
        for column in SHORT.get(metric, (metric,)):
            draw_line(axes, points(run.rows, x, column), style, faint=metric == "loss" and column == "train/loss")
    if not axes.has_data():
        raise UserError(f"no run has {metric} over {x}", "see the columns of its metrics.csv")


def save(figure: "Figure", target: Path) -> None:
    try:
        figure.savefig(target)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{target} cannot be written: {reason}", "name another file, a .png for example: out=runs.png"
        ) from error


def draw_line(axes: "Axes", line: list[Point], style: dict[str, Any], faint: bool) -> None:
    if line and faint:
        axes.plot(*zip(*line, strict=True), **style, linewidth=1, alpha=0.4)
    elif line:
        axes.plot(*zip(*line, strict=True), **style, linewidth=1.8, **markers(line))


def styles() -> Iterator[dict[str, Any]]:
    """A line's colour and dashes, one run after another."""
    while True:
        for dashes in DASHES:
            yield from ({"color": colour, "linestyle": dashes} for colour in COLOURS)


def markers(line: Sequence[Point]) -> dict[str, Any]:
    """Points are marked where they are few enough to be seen."""
    return {"marker": "o", "markersize": 3} if len(line) <= 40 else {}


def blank(width: float, height: float) -> "Figure":
    """A figure without pyplot, which would look for a screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def dress(axes: "Axes", x: str, metric: str) -> None:
    """Labels, grid, and a scale that fits the metric."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    axes.set(xlabel=LABELS.get(x, x), ylabel=LABELS.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=x != "seconds"))
    if x != "seconds":
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if "accuracy" in metric or metric == "mfu":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    elif "perplexity" in metric and axes.has_data():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def points(rows: Sequence[dict[str, str]], x: str, y: str) -> list[Point]:
    """The (x, y) that are there; NaN and infinity, which nothing can draw, are left out."""
    found = [(float(row[x]), float(row[y])) for row in rows if row.get(x) and row.get(y)]
    return [point for point in found if all(map(math.isfinite, point))]


# The command


def main(arguments: Sequence[str]) -> int:
    """`python -m tinygpt.plot`: the exit code."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print((__doc__ or "").strip())
        return 0 if arguments else 2
    try:
        paths, settings = read_arguments(arguments)
        target = Path(settings.get("out", "runs.png"))
        runs = read_runs(paths)
        metrics = choices(settings, "metric", "loss", [*SHORT, *columns(runs)])
        save(overlay(runs, metrics, choices(settings, "x", ",".join(AXES), AXES)), target)
    except UserError as error:
        print(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""), file=sys.stderr)
        return 2
    print(target)
    return 0


def read_arguments(arguments: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Run directories, and key=value settings. A directory may have = in its name, as those of sweeps do."""
    paths, settings = [], {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in ("metric", "x", "out"):
            settings[key] = value
        elif equals and key.isidentifier() and not Path(argument).exists():
            raise UserError(f"there is no key {key}", nearest(key, ["metric", "x", "out"]))
        else:
            paths.append(Path(argument))
    if not paths:
        raise UserError("there is no run to draw", "name run directories: python -m tinygpt.plot outputs/a outputs/b")
    return paths, settings


def choices(settings: dict[str, str], key: str, default: str, known: Sequence[str]) -> list[str]:
    chosen = [name.strip() for name in settings.get(key, default).split(",")]
    for name in chosen:
        if name not in known:
            raise UserError(f"there is no {key} {name or repr(name)}", nearest(name, list(known)))
    return chosen


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs at `paths`, each once, with labels that tell them apart."""
    folders = list(
        {folder.resolve(): folder for folder in (path.parent if path.is_file() else path for path in paths)}.values()
    )
    rows = [read_run(folder / "metrics.csv") for folder in folders]
    overrides = [list(map(str, read_summary(folder).get("overrides") or [])) for folder in folders]
    return [Run(*run) for run in zip(labels(folders, overrides), rows, strict=True)]


def read_run(path: Path) -> list[dict[str, str]]:
    try:
        rows = read_metrics(path)
        _ = [float(value) for row in rows for value in row.values() if value]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "name a directory that train.py has left") from error
    except (csv.Error, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a metrics.csv: {error}", "name a directory that train.py has left") from error
    if not rows:
        raise UserError(f"{path} holds no line", "the run ended before its first validation, or it is no run's")
    return rows


def columns(runs: Sequence[Run]) -> list[str]:
    """What the runs have measured, in the order of their files."""
    return [name for name in dict.fromkeys(name for run in runs for name in run.rows[0]) if name not in AXES]


def labels(folders: Sequence[Path], overrides: Sequence[Sequence[str]]) -> list[str]:
    """Of each path the part in which it differs from the others, and of its command what not every run was given."""
    if len(folders) == 1:
        return [folders[0].resolve().name]
    parts = [folder.absolute().parts for folder in folders]
    before, after = shared(parts), shared([part[::-1] for part in parts])
    names = ["/".join(part[before : len(part) - after]) or part[-1] for part in parts]
    common = set.intersection(*map(set, overrides))
    own = [[word for word in words if word not in common and not word.startswith(UNTOLD)] for words in overrides]
    return [f"{name}: {' '.join(words)}" if words else name for name, words in zip(names, own, strict=True)]


def shared(parts: Sequence[Sequence[str]]) -> int:
    """How many parts all paths begin with."""
    return next((n for n, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), min(map(len, parts)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
