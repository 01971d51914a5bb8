"""The ranking of a sweep: every job's best validation loss and what sets it apart, the best first, as a table and as CSV."""

import csv
import re
import sys
from pathlib import Path
from typing import Any

from tinygpt.summary import read_summary

COLUMNS = ("rank", "job", "best_val_loss", "val_bits_per_byte", "parameters", "seconds", "status", "overrides")


def rank(sweep_dir: Path) -> None:
    """Print the jobs below sweep_dir, best first, and write them to ranking.csv there."""
    jobs = [folder for folder in sweep_dir.iterdir() if (folder / ".hydra").is_dir()] if sweep_dir.is_dir() else []
    rows = sorted((row_of(folder) for folder in jobs), key=order)
    if not rows:
        return
    shared = set.intersection(*(set(row["overrides"]) for row in rows)) if len(rows) > 1 else set[str]()
    for place, row in enumerate(rows, 1):
        row["rank"] = place
        row["overrides"] = " ".join(item for item in row["overrides"] if item not in shared)
    path = sweep_dir / "ranking.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    show(rows, sweep_dir)


def row_of(folder: Path) -> dict[str, Any]:
    summary = read_summary(folder)
    row = {name: summary.get(name) for name in COLUMNS}
    return {**row, "job": folder.name, "status": row["status"] or "failed", "overrides": given(folder)}


def given(folder: Path) -> list[str]:
    """The job's overrides, from what Hydra wrote."""
    text = (folder / ".hydra" / "overrides.yaml").read_text(encoding="utf-8")
    found = re.findall(r"^- (.*)$", text, flags=re.MULTILINE)
    return [item for item in found if not item.endswith("=null")]


def order(row: dict[str, Any]) -> tuple[float, str]:
    loss = row["best_val_loss"]
    return (float("inf") if loss is None else float(loss), row["job"])


def show(rows: list[dict[str, Any]], sweep_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(sweep_dir))
    for name in COLUMNS:
        table.add_column(name.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*(shown(row[name]) for name in COLUMNS))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 200).print(table)  # a file is as wide as it needs


def shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
