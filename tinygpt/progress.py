"""What one sees while a run trains: how fast it is, the numbers that go to the loggers, and the progress bar."""

import logging
import sys
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tinygpt.callbacks import owes_validation, validation_due
from tinygpt.lit import LitGPT
from tinygpt.loggers import CSVLogger

log = logging.getLogger(__name__)

REFRESH_SECONDS = 0.2  # reading a loss waits for the device, so not at every step


class Throughput(L.Callback):
    """Seconds spent on training steps alone, validation and sampling left out. Comes after every other callback."""

    def __init__(self) -> None:
        self.before, self.first_step = 0.0, 0
        self.since: float | None = None  # when the clock was started; None while it stands

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.since, self.before, self.first_step = time.perf_counter(), 0.0, trainer.global_step

    def on_validation_start(self, *_: Any) -> None:
        if self.since is not None:
            self.before, self.since = self.seconds(), None

    def on_validation_end(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def seconds(self) -> float:
        return self.before + (time.perf_counter() - self.since if self.since is not None else 0.0)


class MetricsWriter(L.Callback):
    """One line for the loggers every `trainer.log_every_n_steps` steps and at each validation. Before the checkpoints."""

    def __init__(self, throughput: Throughput, tokens_per_step: int, flops_per_token: int, peak_flops: float) -> None:
        self.throughput, self.tokens_per_step = throughput, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.logged_step, self.logged_seconds, self.start = 0, 0.0, time.perf_counter()

    def on_fit_start(self, *_: Any) -> None:
        self.start = time.perf_counter()

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged_step = trainer.global_step
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.cut_back(trainer.global_step - owes_validation(trainer))
                self.start -= logger.seconds  # the clock of a resumed run goes on from the line that it goes on from

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and not validation_due(trainer):
            self.write(trainer, pl_module, validated=False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.write(trainer, pl_module, validated=True)

    def on_save_checkpoint(self, trainer: L.Trainer, *_: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.sync()

    def write(self, trainer: L.Trainer, pl_module: L.LightningModule, validated: bool) -> None:
        assert isinstance(pl_module, LitGPT)
        step = trainer.global_step
        row: dict[str, Any] = {"tokens": step * self.tokens_per_step}
        if pl_module.last_step:
            row |= {
                "train/loss": pl_module.step_loss(),
                "grad_norm": float(pl_module.last_step["grad_norm"]),
                "lr": pl_module.last_lr,
            }
        if validated:
            row |= {f"val/{name}": value for name, value in pl_module.val_metrics.items() if name != "tokens"}
        row |= self.speed(step)
        if validated:
            losses = {"train": row.get("train/loss"), "validation": row["val/loss"]}
            log.info("step %d: %s", step, ", ".join(f"{k} loss {v:.4f}" for k, v in losses.items() if v is not None))
        known = {name: value for name, value in row.items() if value is not None}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=step)

    def speed(self, step: int) -> dict[str, float | None]:
        """Since the line before."""
        seconds = self.throughput.seconds()
        steps, spent = step - self.logged_step, seconds - self.logged_seconds
        self.logged_step, self.logged_seconds = step, seconds
        rate = steps * self.tokens_per_step / spent if steps and spent > 0 else None
        return {
            "tokens_per_second": rate and round(rate, 1),
            "mfu": rate and round(rate * self.flops_per_token / self.peak_flops, 4),
            "seconds": round(time.perf_counter() - self.start, 3),
        }


class ProgressBar(L.Callback):
    """Step, loss, validation loss, tokens/s and time left: a live bar in a terminal, else a line at each validation."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step, self.shown = tokens_per_step, 0.0
        self.console, self.live = Console(stderr=True), sys.stderr.isatty()  # FORCE_COLOR makes no terminal of a log
        self.bar: Progress | None = None
        self.last: tuple[float, int] | None = None
        self.rate = ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = (time.perf_counter(), trainer.global_step)
        if not trainer.is_global_zero or not self.live:
            return
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=24),
            TextColumn("loss {task.fields[loss]}  val {task.fields[val]}  {task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = Progress(*columns, console=self.console, transient=False)
        fields: dict[str, Any] = {"loss": "-", "val": self.val(pl_module), "rate": ""}
        self.task = self.bar.add_task("", total=trainer.max_steps, completed=trainer.global_step, **fields)
        self.bar.start()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        now = time.perf_counter()
        if self.bar is None or now - self.shown < REFRESH_SECONDS:
            return
        assert isinstance(pl_module, LitGPT)
        self.shown = now
        loss = f"{float(pl_module.last_step['train/loss']):.3f}"
        self.bar.update(self.task, completed=trainer.global_step, loss=loss, rate=self.speed(trainer, now))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step:
            self.rate = self.speed(trainer, time.perf_counter())

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = (time.perf_counter(), trainer.global_step)
        if not trainer.is_global_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, completed=trainer.global_step, val=self.val(pl_module))
        elif not self.live:
            assert isinstance(pl_module, LitGPT)
            train = f"loss {float(pl_module.last_step['train/loss']):.4f}  " if pl_module.last_step else ""
            line = f"step {trainer.global_step}/{trainer.max_steps}  {train}val {self.val(pl_module)}  {self.rate}"
            print(line.rstrip(), file=sys.stderr, flush=True)

    def speed(self, trainer: L.Trainer, now: float) -> str:
        """Tokens per second since the last validation."""
        assert self.last is not None
        then, step = self.last
        if trainer.global_step == step:
            return self.rate
        return f"{(trainer.global_step - step) * self.tokens_per_step / (now - then):,.0f} tokens/s"

    def val(self, pl_module: L.LightningModule) -> str:
        assert isinstance(pl_module, LitGPT)
        loss = pl_module.val_metrics.get("loss")
        return "-" if loss is None else f"{loss:.4f}"

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()
