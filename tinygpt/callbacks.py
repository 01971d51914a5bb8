"""What happens around the training steps, one duty each: when to validate, what to keep, when to stop, what to show.

Order matters where two act at the same moment; `run.py` puts them in the order that their docstrings ask for.
"""

import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from tinygpt.checkpoint import durable_save, sync_folder
from tinygpt.config import UserError
from tinygpt.generate import generate, opening
from tinygpt.lit import LitGPT, stopping
from tinygpt.ranks import requeue
from tinygpt.tokenizer import Tokenizer

log = logging.getLogger("tinygpt")


class DurableIO(TorchCheckpointIO):
    """Lightning's checkpoints through `durable_save`: its own way loses the old file when the disk is full."""

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> dict[str, Any]:
        """Whatever Lightning and the environment say, no code is run."""
        return super().load_checkpoint(path, map_location=map_location, weights_only=True)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if not (run_dir := Path(path).parents[1]).is_dir():
            log.warning("%s has gone; it is made again, without what it held", run_dir)
        try:
            durable_save(checkpoint, Path(path))
        except OSError as error:
            raise UserError(
                f"the checkpoint {path} cannot be written: {error.strerror or error}",
                "make room or choose another hydra.run.dir; the previous checkpoint is as it was",
            ) from error


def validation_due(trainer: L.Trainer) -> bool:
    """Whether a validation follows the step that has just been taken."""
    every, step = trainer.val_check_batch, trainer.global_step
    return step == trainer.max_steps or stopping(trainer) or (every is not None and step % every == 0)


def ending(trainer: L.Trainer) -> bool:
    """Whether no step is to follow."""
    return stopping(trainer) or trainer.global_step >= trainer.max_steps


class ValidateAtEnds(L.Callback):
    """Every run begins and ends with a validation, so that a best checkpoint always exists. Comes last: all others have
    then begun."""

    def __init__(self) -> None:
        self.validated_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.owes(trainer):
            self.validate(trainer)

    def owes(self, trainer: L.Trainer) -> bool:
        """Whether the training begins with a validation: the first, or one that a signal has interrupted."""
        return self.validated_at != trainer.global_step and (trainer.global_step == 0 or validation_due(trainer))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated_at = trainer.global_step  # before any checkpoint of this validation

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.validated_at != trainer.global_step:
            self.validate(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"validated_at": self.validated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_at = int(state_dict["validated_at"])

    @staticmethod
    def validate(trainer: L.Trainer) -> None:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True


def owes_validation(trainer: L.Trainer) -> bool:
    """Whether this step's line in metrics.csv, which an earlier process may have left, is still to be written."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, ValidateAtEnds) and callback.owes(trainer) for callback in callbacks)


class BestCheckpoint(L.Callback):
    """best.ckpt: the weights with the lowest validation loss so far."""

    def __init__(self) -> None:
        self.loss, self.step = float("inf"), 0
        self.metrics: dict[str, Any] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = val_loss(pl_module)
        if loss < self.loss or self.loss == float("inf"):
            assert isinstance(pl_module, LitGPT)
            self.loss, self.step, self.metrics = loss, trainer.global_step, dict(pl_module.val_metrics)
            trainer.save_checkpoint(checkpoint_path(trainer, "best"))

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "step": self.step, "metrics": self.metrics}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.loss, self.step = float(state_dict["loss"]), int(state_dict["step"])
        self.metrics = dict(state_dict["metrics"])


class LastCheckpoint(L.Callback):
    """last.ckpt: where a resumed run goes on from; after each validation and every `every_n_steps` steps. Comes last.

    Of keep_last > 1 states each has a file of its own too, step-N.ckpt, of which last.ckpt is the newest.
    """

    def __init__(self, every_n_steps: int | None = None, keep_last: int = 1) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep_last", keep_last)):
            if value is not None and value < 1:
                raise UserError(f"callbacks.last.{name}={value} is out of range", "it must be at least 1")
        self.every_n_steps, self.keep_last = every_n_steps, keep_last

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0 and not validation_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        if self.keep_last == 1:
            trainer.save_checkpoint(checkpoint_path(trainer, "last"))
            return
        numbered = Path(checkpoint_path(trainer, f"step-{trainer.global_step}"))
        trainer.save_checkpoint(numbered)
        if trainer.is_global_zero:
            keep_newest(numbered, self.keep_last)


class StopAtLoss(L.Callback):
    """Ends the run when the training or the validation loss reaches `loss`. Before the metrics are written."""

    def __init__(self, loss: float, every_n_steps: int = 10) -> None:
        """every_n_steps: how often the training loss is looked at, which waits for the device."""
        self.loss, self.every_n_steps = loss, every_n_steps

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, LitGPT)
        if trainer.global_step % self.every_n_steps == 0:
            trainer.should_stop = trainer.should_stop or pl_module.step_loss() <= self.loss

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or val_loss(pl_module) <= self.loss


class EMA(L.Callback):
    """Exponential moving average of the weights: validated, sampled and saved in their place. Comes after all others.

    While a validation lasts the model holds the average. A checkpoint's state_dict is the average, so that every script
    uses it; the weights that training goes on from lie beside it.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay={decay} is out of range", "it must be in [0, 1)")
        self.decay = decay
        self.other: dict[str, Tensor] = {}  # the average; while `swapped`, the weights of the training
        self.swapped, self.step = False, 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        start = {name: p.detach() for name, p in pl_module.named_parameters()}
        self.other = {name: self.other.get(name, p).to(p.device, copy=True) for name, p in start.items()}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.follow(trainer, pl_module)

    def follow(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the weights of this step into the average, once: a checkpoint may be saved before it is our turn."""
        if self.step != trainer.global_step:
            weights = [p.detach() for p in pl_module.parameters()]
            torch._foreach_lerp_(list(self.other.values()), weights, 1 - self.decay)
            self.step = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap(pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.swap(pl_module)

    @torch.no_grad()
    def swap(self, pl_module: L.LightningModule) -> None:
        for name, p in pl_module.named_parameters():
            kept = p.clone()
            p.copy_(self.other[name])
            self.other[name].copy_(kept)
        self.swapped = not self.swapped

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.follow(trainer, pl_module)
        now = {name: p.detach() for name, p in pl_module.named_parameters()}
        average, training = (now, self.other) if self.swapped else (self.other, now)
        checkpoint["training_weights"] = training
        shared = {**pl_module.state_dict(), **average}
        if "model.lm_head.weight" not in average:  # tied: one tensor under two names
            shared["model.lm_head.weight"] = average["model.wte.weight"]
        checkpoint["state_dict"] = shared

    @torch.no_grad()
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        average, training = checkpoint["state_dict"], checkpoint.get("training_weights")
        self.other = {name: average[name].clone() for name, _ in pl_module.named_parameters()}
        if training:
            for name, p in pl_module.named_parameters():
                p.copy_(training[name])


class Samples(L.Callback):
    """samples.md: text written by the model at each validation, from the same prompt and seed, so that one sees it learn."""

    def __init__(self, prompt: str = "\n", max_new_tokens: int = 200, temperature: float = 0.8, seed: int = 1) -> None:
        self.prompt, self.max_new_tokens, self.temperature, self.seed = prompt, max_new_tokens, temperature, seed
        self.tokenizer: Tokenizer | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero or self.tokenizer is None:
            return
        assert isinstance(pl_module, LitGPT)
        text = generate(
            pl_module.model,
            self.tokenizer,
            opening(self.prompt, self.tokenizer),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )
        head = f"## step {trainer.global_step}: validation loss {val_loss(pl_module):.4f}\n"
        path = Path(trainer.default_root_dir) / "samples.md"
        try:
            append_section(path, head, trainer.global_step, fenced(text))
        except OSError as error:
            log.warning("%s cannot be written: %s", path, error.strerror)


def fenced(text: str) -> str:
    """`text` as a Markdown block: indented, so that nothing in it can end the block."""
    return "".join(f"    {line}\n" for line in text.strip("\n").splitlines())


def append_section(path: Path, head: str, step: int, body: str) -> None:
    """Add a section, after dropping those of this step and later ones: a resumed run writes them again."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Samples\n\n"
    parts = old.split("\n## step ")
    kept = [parts[0], *(part for part in parts[1:] if int(part.split(":")[0]) < step)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n## step ".join(kept).rstrip("\n") + f"\n\n{head}\n{body}", encoding="utf-8")
    temporary.replace(path)


class GracefulStop(L.Callback):
    """SIGINT, SIGTERM and SIGUSR1 end the run between two steps or two batches of a validation: all processes agree, save
    last.ckpt, and leave with 128 + the signal. A second Ctrl-C ends it at once.

    SIGUSR1 is how SLURM warns of the end of a job's time (sbatch --signal=USR1@60): that job is queued again where it may
    be (--requeue), and the code is SIGTERM's.

    The handler only sets a flag. Lightning's own interrupts at any instruction, and its SIGTERM broadcast, one a step,
    hung two processes; it is switched off here.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signal = 0
        self.previous: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self.listen()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()  # early; Lightning may listen in between

    def listen(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                handler = signal.signal(number, self.on_signal)
                self.previous.setdefault(number, handler)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal != signal.SIGUSR1:  # SIGTERM follows that warning, whose job is still to be queued again
            self.signal = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not validation_due(trainer) and (number := self.agree(trainer)):
            self.leave(trainer, number)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """A validation may take longer than a cluster waits; the resumed run begins with it. The last one is finished."""
        if not ending(trainer) and (number := self.agree(trainer)):
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()  # else Lightning leaves out what has been read
            self.leave(trainer, number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not ending(trainer) and (number := self.agree(trainer)):
            self.leave(trainer, number)

    @staticmethod
    def leave(trainer: L.Trainer, number: int) -> None:
        trainer.save_checkpoint(checkpoint_path(trainer, "last"))
        if number == signal.SIGUSR1:
            if trainer.is_global_zero:
                requeue()
            number = signal.SIGTERM
        raise SystemExit(128 + number)

    def agree(self, trainer: L.Trainer) -> int:
        """The signal that any process has seen, or 0."""
        if trainer.world_size == 1:
            return self.signal
        seen = torch.tensor([self.signal], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(seen, op=torch.distributed.ReduceOp.MAX)
        return int(seen)

    def restore(self) -> None:
        """When the run has left what it leaves: until then a late signal must not cut that short."""
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def keep_newest(numbered: Path, keep: int) -> None:
    """Make last.ckpt the same file as `numbered`, and remove older ones of its kind but the `keep` newest."""
    last, temporary = numbered.with_name("last.ckpt"), numbered.with_name("last.ckpt.link")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(numbered)
    except OSError:  # a disk without links
        shutil.copyfile(numbered, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    temporary.replace(last)
    sync_folder(last.parent)
    steps = {int(path.stem[5:]): path for path in numbered.parent.glob("step-*.ckpt") if path.stem[5:].isdecimal()}
    for step in sorted(step for step in steps if step <= int(numbered.stem[5:]))[:-keep]:
        steps[step].unlink()


def checkpoint_path(trainer: L.Trainer, name: str) -> str:
    return str(Path(trainer.default_root_dir) / "checkpoints" / f"{name}.ckpt")


def val_loss(module: L.LightningModule) -> float:
    assert isinstance(module, LitGPT)
    loss = module.val_metrics["loss"]
    assert loss is not None
    return float(loss)
