"""What a run leaves: its numbers, summary.json and metrics.csv, and how to go on with it. Standard library only: sweeps read
many."""

import csv
import json
import math
import shlex
from pathlib import Path
from typing import Any


def store_summary(run_dir: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, whole or not at all."""
    path = run_dir / "summary.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(finite(summary), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json, or nothing where there is none that can be read."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The lines of a metrics.csv, as text; a last line that a kill cut short is left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if row.get("step") and None not in row.values()]


def way_on(run_dir: Path, again: bool) -> str:
    """How to go on with a run that has ended before its time; `again`: by its own command, which said resume=auto."""
    last = run_dir / "checkpoints" / "last.ckpt"
    if not last.exists():
        return "there is no checkpoint yet: start it again"
    if again:
        return f"the same command goes on from {from_here(last)}"
    return f"to go on: python train.py resume={shlex.quote(from_here(last))}"


def from_here(path: Path) -> str:
    """A path as one would type it: relative where it lies below the current folder."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
