"""sweep=optuna: which values are tried next, and which trials are without hope.

The study is a journal in the sweep's folder, and trial k is the job in folder k. What is drawn for trial k follows from
the seed, k and the trials before it, so a search that was killed goes on as if it had not been.

TPE: Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011. The median rule: Golovin et al.,
"Google Vizier: A Service for Black-Box Optimization", KDD 2017.
"""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt.config import SweepConfig, UserError
from tinygpt.summary import read_summary, store_summary
from tinygpt.sweep import Job, identity

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

STUDY, NAME = "study.journal", "tinygpt"  # the file, and what it is called inside
ATTEMPTS = 3  # at a trial whose process dies each time

Space = dict[str, dict[str, Any]]  # by key: choices=[...], or low=, high=, and step= or log=


class Search:
    """The jobs of a search, one batch after another. Raises UserError where sweep_dir holds another search."""

    def __init__(self, sweep_dir: Path, settings: SweepConfig, space: Space, fixed: Sequence[str]) -> None:
        """fixed: the overrides that all jobs share."""
        if not space:
            raise UserError("a search needs something to search", f"for example {EXAMPLE}")
        self.sweep_dir, self.settings, self.fixed = sweep_dir, settings, list(fixed)
        quieten()
        self.distributions = {key: distribution(key, options) for key, options in space.items()}
        mend(sweep_dir / STUDY)
        self.study = open_study(sweep_dir, settings)
        self.refuse_another({"seed": settings.seed, "space": space, "fixed": sorted(identity(fixed))})

    def refuse_another(self, asked: dict[str, Any]) -> None:
        asked = json.loads(json.dumps(asked))  # as it will be read again
        was = self.study.user_attrs.get("asked")
        if was is None:
            self.study.set_user_attr("asked", asked)
            return
        changed = [name for name in asked if asked[name] != was[name]]
        if changed:
            raise UserError(
                f"{self.sweep_dir} holds a search with another {' and '.join(map(WORDS.get, changed))}",  # type: ignore[arg-type]
                "repeat its command to go on with it, or name another hydra.sweep.dir",
            )

    def batches(self) -> Iterator[list[Job]]:
        """What is left to be trained, `settings.parallel` jobs at a time; trained, before the next are asked for."""
        begun = [trial for trial in self.study.get_trials(states=[state("RUNNING")]) if not self.over(trial)]
        left = self.settings.trials - sum(counts(trial) for trial in self.study.trials)
        while left > 0:
            size = min(left, self.settings.parallel)
            batch = [self.job(begun.pop(0) if begun else None) for _ in range(size)]
            left -= size
            yield batch
            for job in batch:
                self.tell(int(job.folder.name))

    def over(self, trial: "optuna.trial.FrozenTrial") -> bool:
        """Whether a trial that was not told how it ended is not to be gone on with."""
        if trial.user_attrs.get("pruned"):
            self.tell(trial.number)
        elif self.attempts(trial) >= ATTEMPTS:
            self.study.tell(trial.number, state=state("FAIL"))
        else:
            return False
        return True

    def attempts(self, trial: "optuna.trial.FrozenTrial | optuna.trial.Trial") -> int:
        """How often it has been begun since it last left word."""
        interrupted = read_summary(self.sweep_dir / str(trial.number)).get("status") == "interrupted"
        return 0 if interrupted else int(trial.user_attrs.get("attempts", 0))

    def job(self, begun: "optuna.trial.FrozenTrial | None") -> Job:
        """A trial as a job: one that was begun, or a new one."""
        number = len(self.study.trials) if begun is None else begun.number
        self.study.sampler = sampler(self.settings, number)
        trial = self.study.ask() if begun is None else trial_of(self.study, number)
        drawn = [f"{key}={value}" for key, value in draw(trial, self.distributions).items()]
        trial.set_user_attr("attempts", self.attempts(trial) + 1)
        return Job(self.sweep_dir / str(number), [*self.fixed, *drawn])

    def tell(self, number: int) -> None:
        """What has become of a trial, from what its job has left. One that was interrupted stays begun."""
        trial, folder = self.study.trials[number], self.sweep_dir / str(number)
        summary = read_summary(folder)
        loss = summary.get("best_val_loss")
        if trial.user_attrs.get("pruned"):
            store_summary(folder, {**summary, "status": "pruned"})
            self.study.tell(number, state=state("PRUNED"))
        elif summary.get("status") == "done" and loss is not None and math.isfinite(loss):
            self.study.tell(number, loss)
        elif summary.get("status") in ("done", "failed"):
            code = 1 if summary.get("again") else summary.get("exit_code", 1)
            trial_of(self.study, number).set_user_attr("exit_code", code)
            self.study.tell(number, state=state("FAIL"))


EXAMPLE = 'python train.py -m sweep=optuna "optimizer.lr=tag(log,interval(1e-4,1e-2))" model.n_layer=1,2,4'
WORDS = {"seed": "sweep.seed", "space": "space of values", "fixed": "setting"}


def counts(trial: "optuna.trial.FrozenTrial") -> bool:
    """Whether a trial is one of those that were asked for: what has failed and may succeed is tried again as a new one."""
    failed = trial.state == state("FAIL")
    return trial.state.is_finished() and (not failed or trial.user_attrs.get("exit_code") == 2)


def draw(trial: "optuna.trial.Trial", distributions: dict[str, "BaseDistribution"]) -> dict[str, Any]:
    """A value for each key; what the trial has drawn before stays."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    values: dict[str, Any] = {}
    for key, drawn in distributions.items():
        if isinstance(drawn, CategoricalDistribution):
            values[key] = trial.suggest_categorical(key, drawn.choices)
        elif isinstance(drawn, IntDistribution):
            values[key] = trial.suggest_int(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
        elif isinstance(drawn, FloatDistribution):
            values[key] = trial.suggest_float(key, drawn.low, drawn.high, step=drawn.step, log=drawn.log)
    return values


def distribution(key: str, options: dict[str, Any]) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    try:
        if "choices" in options:
            return CategoricalDistribution(options["choices"])
        kind = IntDistribution if all(isinstance(options[end], int) for end in ("low", "high")) else FloatDistribution
        return kind(**options)
    except ValueError as error:
        raise UserError(f"{key}: {error}", f"for example {EXAMPLE}") from error


def open_study(sweep_dir: Path, settings: SweepConfig) -> "optuna.Study":
    """The study of a sweep's folder, a new one where there is none."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = sweep_dir.resolve() / STUDY  # the lock is a link, which a relative path would lead astray
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(settings.startup_trials, settings.prune_after)
    given: dict[str, Any] = {"storage": storage, "study_name": NAME, "sampler": sampler(settings, 0), "pruner": pruner}
    try:
        return optuna.load_study(**given)
    except KeyError:
        return optuna.create_study(**given)


def quieten() -> None:
    """Optuna says at each trial what the table says at the end. UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError("sweep=optuna needs the optuna package", "pip install -c constraints.txt -e '.[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def mend(path: Path) -> None:
    """Drop the line that a full disk has cut short, and what was written on to it: Optuna would read no further."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if is_whole(line)]
    if whole != lines:
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(whole))
        temporary.replace(path)


def is_whole(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return line.endswith(b"\n")


def sampler(settings: SweepConfig, number: int) -> Any:
    """What draws trial `number`: a new one each time, or one that goes on would draw what the first has drawn."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=settings.startup_trials)


def state(name: str) -> Any:
    import optuna

    return optuna.trial.TrialState[name]


def trial_of(study: "optuna.Study", number: int) -> "optuna.trial.Trial":
    import optuna

    return optuna.trial.Trial(study, study.trials[number]._trial_id)


# In the job


class Hopes:
    """What the training of a trial asks after each validation, in whichever process it runs."""

    def __init__(self, run_dir: Path, settings: SweepConfig) -> None:
        quieten()
        self.settings, self.number = settings, int(run_dir.name)
        self.study = open_study(run_dir.parent, settings)

    def lost(self, step: int, loss: float, last: bool) -> bool:
        """Write down the validation loss after `step` steps, and say whether the trial is to be ended before its last."""
        trial = trial_of(self.study, self.number)
        if step not in self.study.trials[self.number].intermediate_values:  # as after a kill before the checkpoint
            trial.report(loss, step)
        lost = self.settings.prune and not last and trial.should_prune()
        if lost:
            trial.set_user_attr("pruned", True)
        return lost
