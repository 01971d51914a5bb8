"""What every benchmark needs: where the project is, what it runs on, the spread of a few numbers, where results go."""

import json
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ELSEWHERE = "TINYGPT_BENCHMARK_RESULTS"  # a folder that benchmarks/bench.py sets


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "mean": statistics.fmean(values), "median": statistics.median(values), "max": max(values)}


def machine() -> dict[str, Any]:
    """Processor, cores and versions: what a number depends on."""
    names = ("torch", "lightning", "hydra-core", "numpy")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.system()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def earlier_result(name: str) -> dict[str, Any]:
    """What `write_result` left last; nothing where it has not."""
    path = Path(os.environ.get(ELSEWHERE) or RESULTS) / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write_result(name: str, result: dict[str, Any], quick: bool = False) -> None:
    """Into benchmarks/results, or where $TINYGPT_BENCHMARK_RESULTS says. A quick run writes only there: the docs' numbers
    come from whole ones."""
    elsewhere = os.environ.get(ELSEWHERE)
    if quick and not elsewhere:
        return
    folder = Path(elsewhere) if elsewhere else RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
