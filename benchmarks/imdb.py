"""Does `experiment=imdb_small` beat the reference's recipe, which has no fewer parameters, in the same time?

Each is first run for a few steps, to know how many fill the time; then it trains for these, its schedule fitted to them,
with nothing but training counted as time. Both are then validated over all windows of the validation split and over the
first 64 tokens of each of its reviews.

    python benchmarks/imdb.py [--minutes 20] [--seed 1] [--val-tokens N] [--together] [--trial]

Needs the corpus in $TINYGPT_DATA_DIR or a network. Writes benchmarks/results/imdb.json, unless it is a trial.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from common import ROOT, machine, write_result

RECIPES = ("imdb_reference_small", "imdb_small")
PROBE = 0.05  # of the time: how long the speed is measured
lane: ContextVar[int | None] = ContextVar("lane", default=None)  # the core that a recipe has to itself


def script(verb: str, *overrides: str) -> str:
    command = [sys.executable, str(ROOT / f"{verb}.py"), *overrides]
    core = lane.get()  # a recipe that has a core to itself computes with one thread
    own = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "preexec_fn": lambda: os.sched_setaffinity(0, {core})}
    options = own if core is not None else {}
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True, **options).stdout


def train(name: str, steps: int, seed: int, run: Path, val_tokens: int = 20_000, validations: int = 5) -> dict[str, Any]:
    """The run's summary, with the seconds that its steps took."""
    few = (f"data.val_tokens={val_tokens}", f"trainer.val_check_interval={max(1, steps // validations)}")
    script("train", f"experiment={name}", f"trainer.max_steps={steps}", f"seed={seed}", f"hydra.run.dir={run}", *few)
    summary = json.loads((run / "summary.json").read_text())
    return {**summary, "training_seconds": summary["tokens"] / summary["tokens_per_second"]}


def steps_for(name: str, seconds: float, folder: Path) -> int:
    """How many steps fill the time; measured twice, the second time for as long as PROBE says."""
    steps = 3
    for turn in range(2):
        run = train(name, steps, 0, folder / f"{name}-probe-{turn}", val_tokens=1000, validations=1)
        per_step = run["training_seconds"] / run["steps"]
        steps = max(3, round(seconds * (PROBE if turn == 0 else 1) / per_step))
    return steps


def race(name: str, seconds: float, seed: int, limit: int | None, folder: Path, core: int | None) -> dict[str, Any]:
    lane.set(core)
    steps = steps_for(name, seconds, folder)
    run = train(name, steps, seed, folder / name)
    found = {key: run[key] for key in ("parameters", "steps", "tokens", "training_seconds", "tokens_per_second")}
    text = ("data=imdb", "data.clean=true", f"data.val_tokens={limit or 'null'}")
    for rows in ("windows", "openings"):
        found[rows] = json.loads(script("evaluate", f"ckpt={folder / name}/checkpoints/last.ckpt", f"rows={rows}", *text))
        for key in ("checkpoint", "rows"):
            del found[rows][key]
    print(f"{name}: {found}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--val-tokens", type=int, help="validate on the first so many tokens; all where it is not said")
    parser.add_argument("--together", action="store_true", help="both at once, each on a core of its own (Linux)")
    parser.add_argument("--trial", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, limit = arguments.minutes * 60, arguments.val_tokens
        cores = list(os.sched_getaffinity(0))[: len(RECIPES)] if arguments.together else [None] * len(RECIPES)
        with ThreadPoolExecutor(len(RECIPES) if arguments.together else 1) as lanes:
            races = [
                lanes.submit(race, name, seconds, arguments.seed, limit, Path(folder), core)
                for name, core in zip(RECIPES, cores, strict=True)
            ]
            results = {name: found.result() for name, found in zip(RECIPES, races, strict=True)}
    reference, ours = (results[name] for name in RECIPES)
    assert ours["parameters"] <= reference["parameters"]
    print(f"seconds, ours over the reference's: {ours['training_seconds'] / reference['training_seconds']:.3f}")
    for rows in ("windows", "openings"):
        print(f"{rows}: loss {reference[rows]['loss'] - ours[rows]['loss']:.3f} lower than the reference's")
    if not arguments.trial:
        write_result(
            "imdb",
            {
                "minutes": arguments.minutes,
                "seed": arguments.seed,
                "together": arguments.together,
                "runs": results,
                **machine(),
            },
        )


if __name__ == "__main__":
    main()
