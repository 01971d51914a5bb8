"""What a trial of sweep=optuna does beside training: it tells the search each validation loss, and may be ended by it."""

import sys
from pathlib import Path

import lightning as L

from tinygpt.callbacks import val_loss
from tinygpt.config import SweepConfig
from tinygpt.search import Hopes


class Pruning(L.Callback):
    """Ends a trial that the search has given up, at a validation."""

    def __init__(self, settings: SweepConfig) -> None:
        self.settings = settings
        self.hopes: Hopes | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.is_global_zero:
            self.hopes = Hopes(Path(trainer.default_root_dir), self.settings)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step = trainer.global_step
        if step == 0:  # every model begins at about the same loss
            return
        lost = self.hopes is not None and self.hopes.lost(step, val_loss(pl_module), last=step >= trainer.max_steps)
        if trainer.strategy.broadcast(lost):
            trainer.should_stop = True
        if lost:
            print(f"ended at step {step}: the search has no hope for this trial", file=sys.stderr)
