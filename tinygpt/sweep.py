"""A sweep as a folder of jobs: which folder is whose, how an attempt begins, and how it fails.

A job is known by its overrides, not by its place in the command. One that is repeated finds its folder again, and one
that is new gets the next number: whatever changes in a sweep, no job goes on in another's run.
"""

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinygpt.config import BUDGETS, UserError
from tinygpt.summary import read_summary, store_summary

PASSING = ("resume", "debug", "dry_run")  # what may differ from one attempt at a job to the next
GROWING = ("stop_at_loss", *(f"trainer.{name}" for name in BUDGETS))  # and what may do so where all jobs share it


@dataclass(frozen=True)
class Job:
    """One run of a sweep. The overrides are in Hydra's grammar, as Hydra writes them down."""

    folder: Path
    overrides: list[str]

    def summary(self) -> dict[str, Any]:
        return read_summary(self.folder)

    def done(self) -> bool:
        """Whether it has ended as this command asks for: with a larger budget it goes on."""
        summary = self.summary()
        return summary.get("status") == "done" and identity(summary.get("overrides", ())) == identity(self.overrides)

    def killed(self) -> bool:
        """Whether it was begun and has left no word on how it ended."""
        return (self.folder / ".hydra").is_dir() and not self.summary()


def assign(sweep_dir: Path, jobs: Iterable[Sequence[str]]) -> list[Job]:
    """Every job with its folder: that of the same overrides, or a new one. A job that is named twice is one."""
    planned = [list(overrides) for overrides in jobs]
    values: dict[str, set[str]] = {key: set() for key in GROWING}
    for override in itertools.chain(*planned):
        if (key := key_of(override)) in values:
            values[key].add(override)
    shared = [key for key, found in values.items() if len(found) <= 1]
    known = {identity(given(folder), shared): folder for folder in reversed(folders(sweep_dir))}
    numbers = (sweep_dir / str(number) for number in itertools.count())
    free = (folder for folder in numbers if not folder.exists())
    assigned = {}
    for overrides in planned:
        name = identity(overrides, shared)
        if name not in assigned:
            assigned[name] = Job(known.get(name) or next(free), overrides)
    return list(assigned.values())


def left_to_do(jobs: Sequence[Job]) -> list[Job]:
    """Those that are not done. What was killed comes last: if it kills the sweep again, the others have had their turn."""
    return sorted((job for job in jobs if not job.done()), key=Job.killed)


def identity(overrides: Iterable[str], free: Sequence[str] = ()) -> frozenset[str]:
    """What makes a job another one."""
    return frozenset(
        item for item in overrides if key_of(item).split(".")[0] != "sweep" and key_of(item) not in (*PASSING, *free)
    )


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def folders(sweep_dir: Path) -> list[Path]:
    """Those of its jobs that have begun, by number."""
    found = sweep_dir.glob("*/.hydra") if sweep_dir.is_dir() else ()
    return sorted((path.parent for path in found if path.parent.name.isdigit()), key=lambda folder: int(folder.name))


def given(folder: Path) -> list[str]:
    """A job's overrides, from what Hydra has written; nothing where it was killed before."""
    import yaml

    path = folder / ".hydra" / "overrides.yaml"
    return list(yaml.safe_load(path.read_text(encoding="utf-8")) or []) if path.exists() else []


def sweep_of(run_dir: Path) -> Path | None:
    """The sweep's folder of one of its jobs; None for a run of its own."""
    return run_dir.resolve().parent if (run_dir / ".." / "multirun.yaml").exists() else None


def refuse_another(sweep_dir: Path, resume: str | None) -> None:
    """A folder that holds jobs is gone on with, or left alone."""
    if resume != "auto" and next(iter(folders(sweep_dir)), None):
        raise UserError(
            f"{sweep_dir} holds the jobs of a sweep", "resume=auto goes on with them; or name another hydra.sweep.dir"
        )


def remove_empty_above(folder: Path) -> None:
    """Remove what is empty of the folders that `folder` lay in, up to the current one."""
    with contextlib.suppress(OSError):  # not empty: other runs
        for parent in folder.resolve().parents:
            if not parent.is_relative_to(Path.cwd()) or parent == Path.cwd():
                break
            parent.rmdir()


# An attempt


def begin(folder: Path) -> None:
    """What an attempt before this one has left as its end no longer holds, unless it was done."""
    if read_summary(folder).get("status") != "done":
        (folder / "summary.json").unlink(missing_ok=True)


def fail(folder: Path, overrides: Sequence[str], error: str, exit_code: int, again: bool = False) -> None:
    """Write down why a job has failed; exit_code is 2 where its user can put it right, `again` without other settings."""
    said = {"status": "failed", "error": error, "exit_code": exit_code, "again": again, "overrides": list(overrides)}
    store_summary(folder, {**read_summary(folder), **said})


def exit_code(jobs: Iterable[Job]) -> int:
    """0 where no job has failed, 2 where all that have can be put right by their user, else 1."""
    codes = {job.summary().get("exit_code", 1) for job in jobs if job.summary().get("status") == "failed"}
    return 0 if not codes else 2 if codes == {2} else 1
