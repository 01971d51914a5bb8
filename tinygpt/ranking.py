"""What the jobs of a sweep have come to, the best first: as a table, as ranking.csv and as ranking.png.

It is read from the jobs' folders alone, so it holds what earlier attempts and other processes have done.
"""

import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.plot import COLOURS, blank, dress, points
from tinygpt.summary import read_metrics, read_summary
from tinygpt.sweep import Job, folders, given, identity

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "rank",
    "job",
    "best_val_loss",
    "val_bits_per_byte",
    "parameters",
    "steps",
    "seconds",
    "status",
    "overrides",
    "error",
)
SHOWN = ("rank", "job", "best_val_loss", "val_bits_per_byte", "parameters", "steps", "seconds", "status", "overrides")
PANELS = 4  # of swept settings, in the picture
NAMED = 5  # of the best jobs, in the picture
DIGITS = 8  # a number with more is rounded in the table
TICKS = 6  # so many values of a setting are each written at the axis

Row = dict[str, Any]


def rank(sweep_dir: Path, planned: Sequence[Job] = ()) -> None:
    """Print the jobs of a sweep, those that are planned but have not begun among them, and write CSV and picture there."""
    begun = folders(sweep_dir)
    rows = [row_of(folder) for folder in begun]
    if not rows:
        return
    rows += [blank_row(job) for job in planned if job.folder not in begun]
    rows.sort(key=order)
    told_apart(rows)
    for place, row in enumerate(rows, 1):
        row["rank"] = place
    with (sweep_dir / "ranking.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**row, "overrides": " ".join(row["overrides"])} for row in rows)
    if any(row["best_val_loss"] is not None for row in rows):
        picture(rows, sweep_dir).savefig(sweep_dir / "ranking.png")
    show(rows, sweep_dir)


def row_of(folder: Path) -> Row:
    """A job's summary; where it was killed before it wrote one, what its metrics say."""
    summary = read_summary(folder)
    row = {name: summary.get(name) for name in COLUMNS}
    row |= {"job": folder.name, "status": row["status"] or "interrupted", "overrides": swept(given(folder))}
    if not summary and (losses := curve(folder, "step")):
        row |= {"best_val_loss": min(loss for _, loss in losses), "steps": int(losses[-1][0])}
    return row


def blank_row(job: Job) -> Row:
    return {**dict.fromkeys(COLUMNS), "job": job.folder.name, "status": "waiting", "overrides": swept(job.overrides)}


def swept(overrides: Sequence[str]) -> list[str]:
    kept = identity(overrides)
    return [item for item in overrides if item in kept and not item.endswith("=null")]


def told_apart(rows: Sequence[Row]) -> None:
    """Leave of the overrides what not all jobs share."""
    if len(rows) > 1:
        shared = set.intersection(*(set(row["overrides"]) for row in rows))
        for row in rows:
            row["overrides"] = [item for item in row["overrides"] if item not in shared]


def order(row: Row) -> tuple[float, int]:
    loss = row["best_val_loss"]
    return (math.inf if loss is None else float(loss), int(row["job"]))


def show(rows: Sequence[Row], sweep_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(sweep_dir))
    for name in SHOWN:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(shown(row[name], 1 if name == "seconds" else 4) for name in SHOWN))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)  # a file is as wide as it needs
    for row in rows:
        if row["error"]:  # said again: it may have scrolled by, or been said in another process
            print(f"job {row['job']} has failed: {row['error']}", file=sys.stderr)


def shown(value: Any, digits: int = 4) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(rounded(item) for item in value)
    return f"{value:.{digits}f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def rounded(override: str) -> str:
    """What a search has drawn has more digits than one reads."""
    key, equals, value = override.partition("=")
    drawn = number(value) if "." in value and len(value) > DIGITS else None
    return override if drawn is None else f"{key}{equals}{drawn:.4g}"


# The picture


def picture(rows: Sequence[Row], sweep_dir: Path) -> "Figure":
    """Every job's validation loss as it trained, and beside it the best of each against each setting that was swept."""
    settings = [dict(item.split("=", 1) for item in row["overrides"] if "=" in item) for row in rows]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))[:PANELS]
    figure = blank(11 if keys else 7, 4.8)
    halves = figure.subfigures(1, 2 if keys else 1, width_ratios=[1.2, 1] if keys else None, squeeze=False)[0]
    draw_jobs(halves[0].subplots(), rows, sweep_dir)
    if keys:
        high = min(2, len(keys))
        panels = halves[1].subplots(high, -(-len(keys) // high), squeeze=False, sharey=True)
        for panel, key in zip(panels.flat, keys, strict=False):
            draw_setting(panel, key, [setting.get(key) for setting in settings], rows)
        for panel in panels[:, 0]:
            panel.set_ylabel("best validation loss")
        for panel in panels.flat[len(keys) :]:
            panel.set_visible(False)
    figure.suptitle(sweep_dir.name.replace("$", r"\$"), fontsize=12)
    return figure


def draw_jobs(axes: "Axes", rows: Sequence[Row], sweep_dir: Path) -> None:
    """The curves of all jobs; those of the best have a colour and a name."""
    for row in reversed(rows):
        place = row["rank"] - 1
        colour, width = (COLOURS[place], 1.8) if place < NAMED else ("lightgray", 1.0)
        label = f"{row['job']}  {shorten(shown(row['overrides']))}" if place < NAMED else None
        if line := curve(sweep_dir / row["job"], "tokens"):
            axes.plot(*zip(*line, strict=True), color=colour, linewidth=width, marker="o", markersize=2, label=label)
    dress(axes, "tokens", "val/loss")
    axes.set_ylabel("validation loss")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], [label.replace("$", r"\$") for label in labels[::-1]], frameon=False, fontsize=8)


def draw_setting(axes: "Axes", key: str, values: Sequence[str | None], rows: Sequence[Row]) -> None:
    """Loss against one setting: a disc for a job that is done, a ring for one that was not trained to its end."""
    found = [(value, row) for value, row in zip(values, rows, strict=True) if value and row["best_val_loss"] is not None]
    numbers = [number(value) for value, _ in found]
    places: list[Any] = numbers if None not in numbers else [value for value, _ in found]
    for place, (_, row) in zip(places, found, strict=True):
        colour = COLOURS[row["rank"] - 1] if row["rank"] <= NAMED else "gray"
        filled = colour if row["status"] == "done" else "none"
        axes.plot([place], [row["best_val_loss"]], "o", markeredgecolor=colour, markerfacecolor=filled)
    real = [value for value in numbers if value is not None]
    if len(real) == len(found) and real and min(real) > 0 and max(real) >= 10 * min(real):
        axes.set_xscale("log")
    if len(real) == len(found) and len(set(real)) <= TICKS:
        axes.set_xticks(sorted(set(real)), [f"{value:g}" for value in sorted(set(real))])
        axes.set_xticks([], minor=True)
    axes.set_title(key, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def curve(folder: Path, x: str) -> list[tuple[float, float]]:
    """(x, validation loss) of a run that has got so far."""
    metrics = folder / "metrics.csv"
    return points(read_metrics(metrics), x, "val/loss") if metrics.exists() else []


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def shorten(text: str, length: int = 44) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
