"""-m: the jobs of a sweep through Hydra's launchers, in folders that a second attempt finds again.

Hydra's own multirun numbers the jobs anew each time and forgets what they have come to. Here the command's overrides are
read with Hydra's parser; which of the jobs are run, and where, `sweep` and `search` say.
"""

import contextlib
import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tinygpt import lock
from tinygpt.config import SweepConfig, UserError
from tinygpt.ranking import rank
from tinygpt.ranks import launched
from tinygpt.search import EXAMPLE, STUDY, Search, Space
from tinygpt.sweep import Job, assign, exit_code, folders, left_to_do, refuse_another, remove_empty_above
from tinygpt.targets import refuse_calls

BARE = {"multirun.yaml", STUDY, ".submitit"}  # what a sweep leaves that has run nothing

Launch = Callable[[Sequence[Job]], None]


def run(task: TaskFunction, conf: Path, overrides: list[str]) -> int:
    """Run the sweep that the overrides ask for and print its ranking; gives the exit code.

    `task` is called with each job's config. Raises UserError where the sweep as a whole cannot be run.
    """
    refuse_elsewhere(overrides)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions reach the caller as they are
    with hydra.initialize_config_dir(config_dir=str(conf.resolve()), job_name="train", version_base="1.3"):
        master, launch = prepare(task, conf, overrides)
        parsed, settings = swept(master), SweepConfig(**plain(master.sweep))
        sweep_dir = Path(master.hydra.sweep.dir)
        with in_words(sweep_dir), folder(sweep_dir, master), saying_how_to_go_on(sweep_dir):
            if settings.method == "optuna":
                return run_search(Search(sweep_dir, settings, *space(parsed)), launch)
            return run_grid(assign(sweep_dir, combinations(parsed)), launch)


def run_grid(jobs: Sequence[Job], launch: Launch) -> int:
    try:
        launch(left_to_do(jobs))
    finally:
        rank(jobs[0].folder.parent, jobs)
    return exit_code(jobs)


def run_search(search: Search, launch: Launch) -> int:
    jobs = list[Job]()
    try:
        for batch in search.batches():
            jobs += batch
            launch(batch)
    finally:
        rank(search.sweep_dir)
    return exit_code(jobs)


def refuse_elsewhere(overrides: Sequence[str]) -> None:
    if launched():
        raise UserError("a sweep starts the processes of its jobs itself", "run it as one process: python train.py -m ...")
    for override in overrides:
        refuse_moving(*override.split("=", 1))
        if override.startswith("hydra.sweep.subdir="):
            raise UserError(f"{override} is not used here", "jobs are numbered, and found again by their overrides")
        if override.startswith("hydra/sweeper="):
            raise UserError(f"{override} is not used here", f"sweep=grid or sweep=optuna, for example: {EXAMPLE}")


def refuse_moving(key: str, value: str = "") -> None:
    """UserError for what would be another thing to each job."""
    key, value = key.lstrip("+"), value.strip("'")
    moves = value == "latest" or Path(value).absolute().is_relative_to(Path("outputs/latest").absolute())
    if key == "init_from" and moves:
        raise UserError(f"init_from={value} would be the job before, for each job", "name its folder: init_from=outputs/...")
    if key == "resume" and value not in ("auto", "null"):
        raise UserError(f"resume={value} is of one run", "resume=auto goes on with a sweep; init_from=RUN starts from a run")
    if key == "verify_resume" and value.lower() in ("true", "1", "yes", "on"):
        raise UserError("verify_resume is for one run, not for a sweep", "leave out -m, and give each key one value")


def prepare(task: TaskFunction, conf: Path, overrides: Sequence[str]) -> tuple[DictConfig, Launch]:
    """The config that the jobs share, Hydra's own settings among it, and what runs jobs."""
    engine = GlobalHydra.instance().hydra
    assert engine is not None
    with composing(conf, overrides):
        master = engine.compose_config("train", [*overrides, "hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    refuse_calls(plain(master.hydra))
    context = HydraContext(config_loader=engine.config_loader, callbacks=Callbacks(master))
    launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=task, config=master)

    def launch(jobs: Sequence[Job]) -> None:
        batch = [[*job.overrides, f"hydra.sweep.subdir={job.folder.name}"] for job in jobs]
        for one in batch:
            with composing(conf, one):  # what does not compose is refused before any job begins
                config = engine.config_loader.load_sweep_config(master, one)
            refuse_calls(plain(config.hydra))  # a group that is swept is in no config before
            for key in ("init_from", "resume", "verify_resume"):
                if config[key] is not None:
                    refuse_moving(key, str(config[key]))
        for done in launcher.launch(batch, initial_job_idx=int(jobs[0].folder.name)) if batch else ():
            if done.status is JobStatus.FAILED:
                raise done._return_value

    return master, launch


@contextlib.contextmanager
def composing(conf: Path, overrides: Sequence[str]) -> Iterator[None]:
    """What Hydra has no exception of its own for, such as model=3, in words."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError) as error:
        odd = " ".join(said for said in overrides if (conf / said.partition("=")[0]).is_dir())
        raise UserError(f"{odd}: {' '.join(str(error).split())}", "see --help for the groups and their choices") from error


@contextlib.contextmanager
def folder(sweep_dir: Path, master: DictConfig) -> Iterator[None]:
    """The sweep's folder, which no other process runs meanwhile; it goes again where nothing has come of it."""
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the sweep's folder cannot be written: {error}", "choose another hydra.sweep.dir") from error
    try:
        with held(sweep_dir):
            refuse_another(sweep_dir, master.resume)
            refuse_other_kind(sweep_dir, master)
            OmegaConf.save(master, sweep_dir / "multirun.yaml")
            yield
    finally:
        if {path.name for path in sweep_dir.iterdir()} <= BARE and not Path.cwd().is_relative_to(sweep_dir.resolve()):
            shutil.rmtree(sweep_dir)
            remove_empty_above(sweep_dir)


@contextlib.contextmanager
def in_words(sweep_dir: Path) -> Iterator[None]:
    """No room in the folder, or a job's process that a launcher has lost."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise UserError(f"the sweep has ended: {said}", f"to go on: resume=auto hydra.sweep.dir={sweep_dir}") from error


def refuse_other_kind(sweep_dir: Path, master: DictConfig) -> None:
    """A search numbers its jobs as its trials, a grid by what is free: no folder can hold both."""
    held, search = (sweep_dir / STUDY).exists(), master.sweep.method == "optuna"
    if held != search and (held or folders(sweep_dir)):
        raise UserError(f"{sweep_dir} holds {'a search' if held else 'a grid'}", "name another hydra.sweep.dir")
    if held and master.dry_run:
        raise UserError("dry_run=true would draw the next trials of this search", "leave out hydra.sweep.dir")


@contextlib.contextmanager
def saying_how_to_go_on(sweep_dir: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        print(f"interrupted; to go on: the same command with resume=auto hydra.sweep.dir={sweep_dir}", file=sys.stderr)
        raise


@contextlib.contextmanager
def held(sweep_dir: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock.held(sweep_dir))
        except UserError as error:
            raise UserError(str(error), "wait until it ends, or name another hydra.sweep.dir") from error
        yield


# The overrides


def swept(master: DictConfig) -> list[Override]:
    """The command's overrides and, where it does not name them, those of hydra.sweeper.params."""
    params = [f"{key}={value}" for key, value in (plain(master.hydra.sweeper).get("params") or {}).items()]
    if trusting := next((item for item in params if item.startswith("allow_targets=")), None):
        raise UserError(f"{trusting} is in a file of the config", "it counts on the command line alone")
    arguments = [*params, *plain(master.hydra.overrides.task)]
    engine = GlobalHydra.instance().hydra
    assert engine is not None
    parsed = OverridesParser.create(engine.config_loader).parse_overrides(arguments)
    return list({override.get_key_element(): override for override in parsed}.values())


def plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False)


def combinations(overrides: Sequence[Override]) -> Iterator[tuple[str, ...]]:
    """The overrides of every job, each value with each."""
    values = [written(override) for override in overrides]
    return itertools.product(*values)


def written(override: Override) -> list[str]:
    """An override once for each of its values."""
    key = override.get_key_element()
    if isinstance(override.value(), IntervalSweep):
        raise UserError(f"{key}: an interval has no end of values", f"list some, or search it: {EXAMPLE}")
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    return [f"{key}={value}" for value in values_of(override)]


def values_of(override: Override) -> list[str]:
    if values := list(override.sweep_string_iterator()):
        return values
    raise UserError(f"{override.input_line}: there are no such values", "its range is empty, or no choice has such a name")


def space(overrides: Sequence[Override]) -> tuple[Space, list[str]]:
    """What a search draws from, by key, and the overrides that all its jobs share."""
    searched = [override for override in overrides if override.is_sweep_override()]
    fixed = [item for override in overrides if not override.is_sweep_override() for item in written(override)]
    return {override.get_key_element(): dimension(override) for override in searched}, fixed


def dimension(override: Override) -> dict[str, Any]:
    value = override.value()
    if isinstance(value, IntervalSweep):  # without an end of values
        return {"low": value.start, "high": value.end, "log": "log" in value.tags}
    choices = values_of(override)
    if override.is_range_sweep():
        numbers = list(override.sweep_iterator())
        step = {"step": value.step} if len(numbers) > 1 else {}  # type: ignore[union-attr]
        return {"low": numbers[0], "high": numbers[-1], **step}
    return {"choices": choices}
