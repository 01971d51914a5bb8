"""What a run leaves as numbers: summary.json and metrics.csv. Standard library only: sweeps read many."""

import csv
import json
import math
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
