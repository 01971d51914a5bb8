"""One training run, in acts: where it starts from, what it trains on, what it will cost, the training, what it leaves.

`train` is the whole of it; each act below is a function with the values that it needs.
"""

import contextlib
import copy
import errno
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from tinygpt import checkpoint as ckpt
from tinygpt import lock
from tinygpt.batches import validation_windows
from tinygpt.callbacks import EMA, GracefulStop, Samples, StopAtLoss, ValidateAtEnds
from tinygpt.config import ModelConfig, TrainConfig, UserError
from tinygpt.corpus import cache_dir, data_dir
from tinygpt.data import TextData, make_order
from tinygpt.forecast import Forecast, make_forecast
from tinygpt.generate import opening
from tinygpt.lit import LitGPT
from tinygpt.loggers import finish
from tinygpt.memory import keep_memory, set_matmul_precision
from tinygpt.model import GPT
from tinygpt.plot import draw_curves
from tinygpt.preflight import preflight
from tinygpt.progress import MetricsWriter, ProgressBar, Throughput
from tinygpt.pruning import Pruning
from tinygpt.ranks import is_first
from tinygpt.report import Outcome, print_result, say_forecast, write_summary
from tinygpt.resume import refuse_misfit, restoring
from tinygpt.sharding import is_sharded
from tinygpt.shards import Prepared, prepare
from tinygpt.start import (
    STORED,
    already_done,
    continued,
    had_stopped,
    refuse_budget,
    refuse_changes,
    starting_checkpoint,
    starting_weights,
)
from tinygpt.targets import build
from tinygpt.trainer import make_trainer, precision, total_steps, world_size
from tinygpt.watch import Watch

log = logging.getLogger("tinygpt")

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def train(config: TrainConfig, run_dir: Path, overrides: Sequence[str] = ()) -> float | None:
    """Train as `config` says, into `run_dir`; returns the best validation loss (None for a dry run).

    Raises UserError for what the user can put right, SystemExit(128 + signal) where a signal ended the run.
    """
    if not is_first():
        logging.disable()
        warnings.simplefilter("ignore")
    try:
        with lock.held(run_dir) if is_first() and not config.dry_run else contextlib.nullcontext():
            return run(config, run_dir, overrides)
    except OSError as error:
        if str(run_dir) not in str(error.filename) and error.errno not in NO_ROOM:
            raise
        raise UserError(
            f"{error.filename or run_dir} cannot be written: {error.strerror}",
            "make room or choose another hydra.run.dir; the checkpoints that are there are whole",
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the GPU has too little memory for this run",
            "choose a smaller data.micro_batch_size, model.block_size or model, or trainer=fsdp on several GPUs",
        ) from error


def run(config: TrainConfig, run_dir: Path, overrides: Sequence[str]) -> float | None:
    """`train`, in a run directory that is nobody else's."""
    if not config.dry_run:
        remove_unfinished(run_dir)
    started = starting_checkpoint(config, run_dir)
    if started is not None:
        config = continued(config, overrides, started["tinygpt"])
        if config.resume == "auto" and (loss := already_done(config, run_dir, started)) is not None:
            return loss
    device = preflight(config)
    keep_memory()
    set_matmul_precision(config.matmul_precision, device)
    init = starting_weights(config, overrides) if config.init_from and started is None else None
    prepared = prepare_data(config, started, init)
    if started is not None:
        refuse_changes(config, prepared, started)
    plan = make_plan(config, prepared, model_shape(config, init), device)
    if started is not None:
        refuse_budget(config, plan.steps, started["global_step"])
        plan.forecast.seconds *= 1 - started["global_step"] / plan.steps  # what is left to do
    if is_first():
        say_forecast(plan.forecast, plan.epochs, config, prepared, file=sys.stdout if config.dry_run else sys.stderr)
    if config.dry_run:
        return None
    model = make_model(config, prepared, init)
    return fit(config, run_dir, list(overrides), prepared, model, plan, started, device)


def remove_unfinished(run_dir: Path) -> None:
    """What a process that was killed has left of a checkpoint."""
    if is_first():
        for path in (run_dir / "checkpoints").glob("*.ckpt.tmp-*"):
            path.unlink(missing_ok=True)


# What it trains on


def prepare_data(config: TrainConfig, started: dict[str, Any] | None, init: dict[str, Any] | None) -> Prepared:
    """The corpus as tokens; a checkpoint that the run starts from brings its tokenizer, if it has one."""
    source = started or init
    tokenizer = ckpt.stored_tokenizer(source) if source else None
    if started and asdict(config.data.tokenizer) != started["tinygpt"]["config"]["data"]["tokenizer"]:
        tokenizer = None  # refuse_changes names it
    prepared = prepare(config.data, data_dir(config.data_dir), cache_dir(config.cache_dir), tokenizer)
    if init:
        ckpt.check_vocabulary(init, prepared.tokenizer)
    return prepared


def model_shape(config: TrainConfig, init: dict[str, Any] | None) -> ModelConfig:
    """The config's model, or that of the weights to start from."""
    return config.model if init is None else ModelConfig(**init["tinygpt"]["model"])


def make_model(config: TrainConfig, prepared: Prepared, init: dict[str, Any] | None) -> GPT:
    """A model with the initial weights that the seed decides, or a checkpoint's."""
    torch.manual_seed(config.seed)
    if init is None:
        return GPT(config.model, prepared.tokenizer.vocab_size)
    model = copy.deepcopy(ckpt.build_model(init))  # in memory of its own, aligned and laid out like any other
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    return model


# What it will cost


@dataclass
class Plan:
    """The run in numbers."""

    steps: int
    forecast: Forecast
    epochs: float


def make_plan(config: TrainConfig, prepared: Prepared, shape: ModelConfig, device: str) -> Plan:
    T, B = shape.block_size, config.data.global_batch_size
    order = make_order(prepared.train, prepared.val, T, B, config.seed, config.data.layout)
    steps = total_steps(config.trainer, B, order.tokens_per_row, order.rows_per_epoch)
    world = world_size(config.trainer, device)
    if B % world:
        raise UserError(
            f"data.global_batch_size={B} does not divide by {world} devices",
            "every device takes the same share: choose a multiple",
        )
    interval = config.trainer.get("val_check_interval") or steps
    forecast = make_forecast(
        shape,
        prepared.tokenizer.vocab_size,
        config.optimizer,
        share=B // world,
        world_size=world,
        micro_batch_size=config.data.micro_batch_size,
        steps=steps,
        validations=1 + -(-steps // interval),
        validation_windows=validation_windows(prepared.val, T, config.data.val_tokens),
        device=torch.device(device),
        precision=precision(config.trainer, device),
        shards=world if is_sharded(config.trainer) else 1,
    )
    forecast.tokens_per_step = round(B * order.tokens_per_row)
    return Plan(steps, forecast, steps * B / order.rows_per_epoch)


# The training


def fit(
    config: TrainConfig,
    run_dir: Path,
    overrides: list[str],
    prepared: Prepared,
    model: GPT,
    plan: Plan,
    started: dict[str, Any] | None,
    device: str,
) -> float:
    card = make_card(config, prepared, model, started)
    module = LitGPT(
        model,
        config.optimizer,
        total_steps=plan.steps,
        micro_batch_size=plan.forecast.micro_batch_size,
        seed=config.seed,
        card=card,
        byte_lengths=None if config.data.clean else prepared.tokenizer.byte_lengths(),
        compile=config.compile,
        skip_nonfinite=config.skip_nonfinite,
    )
    if started is not None:
        refuse_misfit(started, module)
    data = TextData(
        prepared.train,
        prepared.val,
        block_size=model.config.block_size,
        vocab_size=model.vocab_size,
        batch_size=config.data.global_batch_size,
        seed=config.seed,
        total_steps=plan.steps,
        layout=config.data.layout,
        val_tokens=config.data.val_tokens,
        num_workers=config.data.num_workers,
    )
    loggers = [
        build(node, f"logger.{name}", Logger, config.allow_targets, save_dir=run_dir, id=card["logger_ids"].get(name))
        for name, node in config.logger.items()
    ]
    remember_ids(card, dict(zip(config.logger, loggers, strict=True)))
    throughput = Throughput()
    watch = Watch(run_dir, again=config.resume == "auto")
    stopped = [StayStopped()] if started is not None and had_stopped(config, started) else []
    callbacks = [PointLatest(), *stopped, *make_callbacks(config, prepared, plan, throughput), watch]
    trainer = make_trainer(
        config.trainer,
        steps=plan.steps,
        device=device,
        run_dir=run_dir,
        callbacks=callbacks,
        loggers=loggers,
        allow=config.allow_targets,
    )
    outcome = Outcome(config, run_dir, overrides, prepared, plan.forecast, trainer, module, throughput)
    try:
        with watch.over(trainer), recording(outcome, loggers), restoring(started, module) as path:
            trainer.fit(module, datamodule=data, ckpt_path=path)
        if trainer.is_global_zero:
            print_result(outcome)
    finally:
        graceful_stop(trainer).restore()
    return outcome.best_loss()


def make_card(config: TrainConfig, prepared: Prepared, model: GPT, started: dict[str, Any] | None) -> dict[str, Any]:
    stored = {name: value for name, value in asdict(config).items() if name in STORED}
    stored["model"] = asdict(model.config)
    card = ckpt.make_card(model, prepared.tokenizer, stored, {"name": prepared.corpus, "sha256": prepared.sha256})
    card["logger_ids"] = dict(started["tinygpt"]["logger_ids"]) if started else {}
    return card


def remember_ids(card: dict[str, Any], loggers: dict[str, Any]) -> None:
    """A resumed run goes on in the same W&B run."""
    for name, logger in loggers.items():
        if type(logger).__name__ == "WandbLogger":
            card["logger_ids"][name] = str(logger.version)


def make_callbacks(config: TrainConfig, prepared: Prepared, plan: Plan, throughput: Throughput) -> list[L.Callback]:
    """In the order that they need: decide to stop, write metrics, then the user's, then save and clean up."""
    chosen: list[L.Callback] = [
        build(node, f"callbacks.{name}", L.Callback, config.allow_targets) for name, node in config.callbacks.items()
    ]
    if is_sharded(config.trainer):  # no process has the whole model to write with
        chosen = [callback for callback in chosen if not isinstance(callback, Samples)]
    for callback in chosen:
        if isinstance(callback, Samples):
            callback.tokenizer = prepared.tokenizer
            prepared.tokenizer.encode(opening(callback.prompt, prepared.tokenizer))  # refuses now what it cannot begin with
    chosen.sort(key=save_order)  # stable
    forecast = plan.forecast
    callbacks: list[L.Callback] = []
    if config.stop_at_loss is not None:
        callbacks.append(StopAtLoss(config.stop_at_loss))
    if config.sweep.method == "optuna":
        callbacks.append(Pruning(config.sweep))
    callbacks.append(MetricsWriter(throughput, forecast.tokens_per_step, forecast.flops_per_token, forecast.peak_flops))
    if config.trainer.get("enable_progress_bar") is not False:
        callbacks.append(ProgressBar(forecast.tokens_per_step))
    ema = [callback for callback in chosen if isinstance(callback, EMA)]
    others = [callback for callback in chosen if not isinstance(callback, EMA)]
    return [*callbacks, *others, GracefulStop(), *ema, throughput, ValidateAtEnds()]


def save_order(callback: L.Callback) -> int:
    """Checkpoints come after whatever else happens at a step, the last one after the best."""
    return {"BestCheckpoint": 1, "LastCheckpoint": 2}.get(type(callback).__name__, 0)


# What it leaves


@contextlib.contextmanager
def recording(outcome: Outcome, loggers: list[Any]) -> Iterator[None]:
    """Whatever happens, summary.json says how the run ended, and the curves are drawn."""
    status = "failed"
    try:
        yield
        status = "done"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    except SystemExit as leaving:
        status = "interrupted"
        if not outcome.trainer.is_global_zero:  # another code, and Lightning kills the process that still writes the summary
            raise SystemExit(0) from None
        if leaving.code == 1:  # how Lightning ends on a second Ctrl-C
            raise SystemExit(130) from None
        raise
    finally:
        finish(loggers, well=status == "done")
        if outcome.trainer.is_global_zero:
            leave(outcome, status)


def graceful_stop(trainer: L.Trainer) -> GracefulStop:
    return next(callback for callback in trainer.callbacks if isinstance(callback, GracefulStop))  # type: ignore[attr-defined]


def leave(outcome: Outcome, status: str) -> None:
    """summary.json and the curves. A disk that is full is reported unless something else has ended the run before."""
    metrics = outcome.run_dir / "metrics.csv"
    with contextlib.suppress(*(() if status == "done" else (OSError,))):
        write_summary(outcome, status)
        if metrics.exists():
            title = f"{outcome.prepared.corpus}, {outcome.forecast.parameters:,} parameters"
            draw_curves(metrics, outcome.run_dir / "curves.png", title)


class PointLatest(L.Callback):
    """Once every process has opened the checkpoint, which outputs/latest may name, that names the run that begins."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            try:
                point_latest(Path(trainer.default_root_dir))
            except OSError as error:  # a folder of that name, or a disk without links
                log.warning("%s cannot name this run: %s", ckpt.LATEST, error.strerror)


class StayStopped(L.Callback):
    """A run that had stopped by itself, and was killed before it said so, has no steps to take."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


def point_latest(run_dir: Path) -> None:
    """outputs/latest names the newest run."""
    ckpt.LATEST.parent.mkdir(exist_ok=True)
    temporary = ckpt.LATEST.with_name(f"latest.tmp-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(os.path.relpath(run_dir.resolve(), ckpt.LATEST.parent.resolve()), target_is_directory=True)
    try:
        temporary.replace(ckpt.LATEST)
    finally:
        temporary.unlink(missing_ok=True)
