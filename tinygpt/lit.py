"""The LightningModule: what one optimizer step does, and what one validation batch adds.

The optimizer is stepped by hand: a batch is one optimizer step, cut into micro-batches here, so nothing in a run counts
micro-batches. Nothing is logged from the training step, where Lightning's own logging costs more than a small model's
optimizer; the callbacks read `last_step`.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from tinygpt.batches import Batch
from tinygpt.compiling import explained
from tinygpt.config import OptimizerConfig, UserError
from tinygpt.evaluate import TextMetrics, hidden_states, predict
from tinygpt.finite import FiniteSteps, NotFinite, finite
from tinygpt.loss import chunk_loss, fusible_chunk_loss, next_token_loss
from tinygpt.model import GPT
from tinygpt.optim import learning_rate, make_optimizer
from tinygpt.sharding import shard


def stopping(trainer: L.Trainer) -> bool:
    """Whether the run ends before its budget; trainer.min_steps may not let it yet."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


class LitGPT(L.LightningModule):
    """Trains `model` with one optimizer for total_steps steps.

    `card` is the plain dictionary that makes a checkpoint complete (see tinygpt.checkpoint). After each step `last_step`
    holds its loss and gradient norm as tensors, so that reading them, not the step, waits for the device; after each
    validation `val_metrics` holds the metrics.
    """

    def __init__(
        self,
        model: GPT,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        micro_batch_size: int,
        seed: int,
        card: dict[str, Any],
        byte_lengths: np.ndarray[Any, Any] | None,
        compile: bool = False,
        skip_nonfinite: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.optimizer_config, self.card = model, optimizer, card
        self.total_steps, self.micro_batch_size, self.seed = total_steps, micro_batch_size, seed
        # Functions are compiled, not the model: a wrapper would rename its weights, and its other callers pass a cache.
        self.read = torch.compile(partial(hidden_states, model)) if compile else partial(hidden_states, model)
        self.loss = partial(next_token_loss, model, rule=torch.compile(fusible_chunk_loss) if compile else chunk_loss)
        self.metrics = TextMetrics(byte_lengths)
        self.finite_steps = FiniteSteps(skip_nonfinite)
        self.last_step: dict[str, Tensor] = {}
        self.last_lr, self.reduced = 0.0, False
        self.val_metrics: dict[str, float | int | None] = {}

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # of tinygpt.sharding's strategy
            shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return make_optimizer(self.model, self.optimizer_config)

    def on_train_start(self) -> None:
        """A resumed run trains by its own settings; those in the optimizer's state are of the run before."""
        fresh = make_optimizer(self.model, self.optimizer_config)
        for group, own in zip(self.trainer.optimizers[0].param_groups, fresh.param_groups, strict=True):
            group.update({name: value for name, value in own.items() if name not in ("params", "lr")})

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        self.reseed()
        self.last_lr = learning_rate(self.global_step, self.total_steps, self.optimizer_config)
        for group in optimizer.param_groups:
            group["lr"] = self.last_lr * group.get("lr_ratio", 1.0)
        with explained():
            loss = self.accumulate(batch)
        grad_norm = self.clip()
        if self.refuses(loss, grad_norm):
            optimizer.zero_grad()  # a step without gradients moves nothing, and counts
        optimizer.step()
        optimizer.zero_grad()
        self.last_step, self.reduced = {"train/loss": loss, "grad_norm": grad_norm}, False

    def step_loss(self) -> float:
        """The loss of the last step over its global batch, which `last_step` then holds. To be asked for on every rank."""
        self.look()
        if not self.reduced:
            reduced = self.trainer.strategy.reduce(self.last_step["train/loss"].clone(), reduce_op="mean")
            self.last_step["train/loss"], self.reduced = reduced, True
        return float(self.last_step["train/loss"])

    def refuses(self, loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the optimizer must not take this step; UserError where it can neither be taken nor skipped."""
        if getattr(self.trainer.precision_plugin, "scaler", None):  # 16-mixed: it skips such steps, and expects some
            return False
        value = grad_norm if self.trainer.world_size > 1 else grad_norm + loss  # the gradient is the same on every rank
        try:
            return self.finite_steps.refuses(self.global_step, value)
        except NotFinite as error:
            raise self.explained(error) from None

    def look(self) -> None:
        """Raises UserError where a step that has been taken was not finite."""
        try:
            self.finite_steps.look()
        except NotFinite as error:
            raise self.explained(error) from None

    def explained(self, error: NotFinite) -> UserError:
        """With what there is to look at, and to do."""
        last = Path(self.trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        batch = self.trainer.datamodule.order.name(error.step)  # type: ignore[attr-defined]
        return UserError(
            f"{error}; it held {batch}",
            f"a smaller optimizer.lr, or skip_nonfinite=10 to leave out so many such steps; "
            f"the last good checkpoint: {last if last.exists() else 'none yet'}",
        )

    def reseed(self) -> None:
        """Dropout depends on (seed, step, rank) alone, so no random state travels in a checkpoint."""
        seed = (self.seed * 1_000_003 + self.global_step) * 4096 + self.global_rank
        torch.default_generator.manual_seed(seed % 2**63)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed % 2**63)

    def accumulate(self, batch: Batch) -> Tensor:
        """Gradients of the mean loss over the targets of the step, micro-batch by micro-batch.

        Returns this device's part of that loss, detached: the mean over the devices is the step's.
        """
        *parts, last = batch.split(self.micro_batch_size)
        total = torch.zeros((), device=batch.tokens.device, dtype=torch.float32)  # bf16-true has another default
        for part in parts:
            with self.unsynchronised():
                total += self.backward_part(part, batch)
        return total + self.backward_part(last, batch)

    def unsynchronised(self) -> AbstractContextManager[Any]:
        """Gradients stay on this device: under DDP they are reduced once a step, with the last micro-batch."""
        return getattr(self.trainer.strategy, "block_backward_sync", nullcontext)()

    def backward_part(self, part: Batch, batch: Batch) -> Tensor:
        x, targets = self.read(part)
        if batch.targets is None:
            loss = self.loss(x, targets, "mean", len(part.tokens) / len(batch.tokens))
        else:  # gradients are averaged over the devices, of which each may have another number of targets
            loss = self.loss(x, targets, "sum", self.trainer.world_size / batch.targets)
        self.manual_backward(loss)
        return loss.detach()

    def clip(self) -> Tensor:
        """Bound the gradient norm by grad_clip (0: leave it) and return what it was."""
        if scaler := getattr(self.trainer.precision_plugin, "scaler", None):  # 16-mixed scales the gradients
            scaler.unscale_(self.trainer.optimizers[0])
        parameters = list(self.model.parameters())
        bound = self.optimizer_config.grad_clip
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound if bound > 0 else float("inf"))
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of the whole, where each device has a part

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.metrics.update(*predict(self.model, batch))

    def on_validation_epoch_end(self) -> None:
        self.val_metrics = self.metrics.compute()
        self.metrics.reset()
        known = {f"val/{name}": float(value) for name, value in self.val_metrics.items() if value is not None}
        self.log_dict(known, logger=False, sync_dist=False, rank_zero_only=False)  # for callbacks that monitor

    def on_validation_start(self) -> None:
        self.refuse_broken_weights()

    def refuse_broken_weights(self) -> None:
        """Raises UserError where the weights are not finite, before anyone judges, samples or saves them."""
        self.look()
        if not finite(self.model):
            raise self.explained(NotFinite(self.global_step - 1))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.refuse_broken_weights()
        checkpoint["tinygpt"], checkpoint["val_metrics"] = self.card, self.val_metrics
        checkpoint["skipped_steps"], checkpoint["stopped"] = self.finite_steps.skipped, bool(self.trainer.should_stop)
        if self.last_step:  # for the line in metrics.csv, where the run stops between a step and its validation
            step = {"train/loss": self.step_loss(), "grad_norm": float(self.last_step["grad_norm"])}
            checkpoint["last_step"] = {**step, "lr": self.last_lr}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.val_metrics = checkpoint["val_metrics"]
        self.finite_steps.skipped = checkpoint.get("skipped_steps", 0)
        if last := checkpoint.get("last_step"):
            self.last_lr, self.reduced = last["lr"], True
            self.last_step = {name: torch.tensor(last[name]) for name in ("train/loss", "grad_norm")}
