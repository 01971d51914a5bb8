"""verify_resume=true: the proof, on the user's own config, that a run which is killed ends as one that is not.

The run is trained twice, in processes of their own; the second is killed with SIGKILL at a step by chance and resumed. Then
everything that they leave is compared, bit for bit.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tinygpt.checkpoint import LATEST, open_checkpoint
from tinygpt.config import UserError
from tinygpt.summary import read_metrics, read_summary

TIMING = ("tokens_per_second", "mfu", "seconds")
LOOPS = ("loops", "epoch")  # Lightning's own counters, of which a resumed run has others
OWN = ("verify_resume=", "hydra.run.dir=", "resume=", "logger", "trainer.log_every_n_steps=")  # what the runs have otherwise
LOGGED = ("logger=csv", "trainer.log_every_n_steps=1")  # so that each step is seen as it is taken, and here alone


@dataclass
class Verdict:
    """What two runs have in common."""

    tensors: int
    lines: int
    difference: str | None
    """The first one, in words."""


def verify(run_dir: Path, seed: int) -> None:
    """Train twice below run_dir, kill once, compare, and say so; leaves the runs only where they differ.

    Raises UserError where a run ends with an error of its own, SystemExit(1) where they differ.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError("verify_resume starts processes of its own", "use plain python, with trainer=ddp_cpu for several")
    folder = run_dir / "verify"
    shutil.rmtree(folder, ignore_errors=True)
    latest = LATEST.readlink() if LATEST.is_symlink() else None
    try:
        verdict = compare_runs(folder, random.Random(seed))
    finally:
        if latest:  # the two runs are no one's newest
            LATEST.unlink(missing_ok=True)
            LATEST.symlink_to(latest)
    if verdict.difference:
        print(f"error: the resumed run is another one: {verdict.difference}", file=sys.stderr)
        print(f"hint: both are in {folder}; on a GPU the order of sums may change from run to run", file=sys.stderr)
        raise SystemExit(1)
    print(
        f"identical: {verdict.tensors} tensors of last.ckpt and best.ckpt, {verdict.lines} lines of metrics.csv, samples.md"
    )
    shutil.rmtree(folder)
    if LATEST.is_symlink() and not LATEST.exists():
        LATEST.unlink()


def compare_runs(folder: Path, draw: random.Random) -> Verdict:
    whole, resumed = folder / "whole", folder / "resumed"
    say("1 of 3: the run in one go")
    finish(whole)
    steps = int(read_summary(whole)["steps"])
    if steps < 2:
        raise UserError("a run of one step leaves no moment to kill it at", "give it a budget of some more steps")
    step = draw.randrange(1, steps)
    say(f"2 of 3: the same, killed after step {step} of {steps}")
    kill_at(resumed, step)
    say("3 of 3: resumed")
    finish(resumed)
    return compare(whole, resumed)


def say(text: str) -> None:
    print(f"verify_resume {text}", file=sys.stderr, flush=True)


def command(run_dir: Path) -> list[str]:
    """This process's own command, for a run in `run_dir`."""
    script, *arguments = sys.argv
    kept = [argument for argument in arguments if not argument.startswith(OWN)]
    return [sys.executable, script, *kept, *LOGGED, "resume=auto", f"hydra.run.dir='{run_dir}'"]


def finish(run_dir: Path) -> None:
    done = subprocess.run(command(run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        first = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise UserError(f"the run failed: {first.removeprefix('error: ')}", f"what it left is in {run_dir}")


def kill_at(run_dir: Path, step: int) -> None:
    """Start the run and kill it, and the processes that it has started, when metrics.csv shows the step."""
    process = subprocess.Popen(
        command(run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while process.poll() is None and logged(run_dir) < step:
            time.sleep(0.005)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def logged(run_dir: Path) -> int:
    path = run_dir / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    return int(rows[-1]["step"]) if rows else -1


def compare(one: Path, two: Path) -> Verdict:
    """Checkpoints, metrics.csv but for its timing, samples.md."""
    differences: list[str] = []
    tensors = 0
    for name in ("last.ckpt", "best.ckpt"):
        paths = [folder / "checkpoints" / name for folder in (one, two)]
        present = [path.exists() for path in paths]
        if not all(present):  # none with callbacks=none
            differences += [f"{name} is in one only"] if any(present) else []
            continue
        a, b = (comparable(path) for path in paths)
        tensors += sum(isinstance(value, torch.Tensor) for _, value in leaves(a))
        differences += [f"{name}: {text}" for text in different(a, b)]
    a_rows, b_rows = (lines_of(folder) for folder in (one, two))
    differences += [f"metrics.csv: {text}" for text in different(a_rows, b_rows)]
    texts = [path.read_text(encoding="utf-8") if (path := folder / "samples.md").exists() else "" for folder in (one, two)]
    differences += ["samples.md"] if texts[0] != texts[1] else []
    return Verdict(tensors, len(a_rows), next(iter(differences), None))


def comparable(path: Path) -> dict[str, Any]:
    checkpoint = {name: value for name, value in open_checkpoint(path).items() if name not in LOOPS}
    checkpoint["tinygpt"] = {name: value for name, value in checkpoint["tinygpt"].items() if name != "logger_ids"}
    return checkpoint


def lines_of(run_dir: Path) -> dict[str, dict[str, str]]:
    path = run_dir / "metrics.csv"
    rows = read_metrics(path) if path.exists() else []
    return {f"line {n}": {name: value for name, value in row.items() if name not in TIMING} for n, row in enumerate(rows, 2)}


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """What is no dictionary and no list, with its place."""
    if isinstance(value, dict | list | tuple):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def different(one: Any, two: Any) -> Iterator[str]:
    """Where the two differ, and how."""
    a, b = dict(leaves(one)), dict(leaves(two))
    yield from (f"{name} is in one only" for name in sorted(a.keys() ^ b.keys()))
    for name in [name for name in a if name in b]:
        if isinstance(a[name], torch.Tensor):
            if (text := how_far(a[name], b[name])) is not None:
                yield f"{name}: {text}"
        elif a[name] != b[name] and not (a[name] != a[name] and b[name] != b[name]):  # NaN is itself here
            yield f"{name}: {a[name]} and {b[name]}"


def how_far(a: torch.Tensor, b: torch.Tensor) -> str | None:
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
    if torch.equal(a, b):
        return None
    apart = (a.double() - b.double()).abs()
    return f"{int((apart > 0).sum())} of {a.numel()} numbers differ, by up to {float(apart.max()):.3g}"
