"""Steps whose loss or gradient is not finite: refused or skipped before the optimizer takes them, never saved."""

import logging
import math

import torch
from torch import Tensor, nn

from tinygpt.config import UserError

log = logging.getLogger("tinygpt")

NOT_FINITE = "its loss or its gradient is not finite"


class FiniteSteps:
    """Judges every step of a run by its loss and the norm of its gradient.

    Asking costs nothing on a CPU. A faster device would have to be waited for at each step, so that there it is asked
    only where steps may be skipped; else the first bad step is noted on the device and `look` reads it, which whoever
    reads the loss or saves a checkpoint does first.
    """

    def __init__(self, allowed: int) -> None:
        self.allowed, self.skipped = allowed, 0
        self.noted: Tensor | None = None  # the first bad step, on the device; -1: none

    def refuses(self, step: int, value: Tensor) -> bool:
        """Whether step `step` (from 0) must not be taken, by a value that is finite where its loss and gradient are.

        Raises NotFinite where the step may not be skipped either.
        """
        if value.device.type != "cpu" and not self.allowed:
            self.note(step, value)
            return False
        if math.isfinite(float(value)):
            return False
        if self.skipped >= self.allowed:
            raise NotFinite(step)
        self.skipped += 1
        log.warning("step %d is skipped, %d of %d that may be: %s", step + 1, self.skipped, self.allowed, NOT_FINITE)
        return True

    def note(self, step: int, value: Tensor) -> None:
        if self.noted is None:
            self.noted = torch.full((), -1, device=value.device)
        first = ~value.isfinite() & (self.noted < 0)
        self.noted = torch.where(first, step, self.noted)

    def look(self) -> None:
        """Raises NotFinite where a step that was noted is bad."""
        if self.noted is not None and (step := int(self.noted)) >= 0:
            raise NotFinite(step)


class NotFinite(UserError):
    """A step, counted from 0, that cannot be taken."""

    def __init__(self, step: int) -> None:
        super().__init__(f"step {step + 1} cannot be taken: {NOT_FINITE}")
        self.step = step


def finite(model: nn.Module) -> bool:
    """Whether every weight is, or every part of one that this process has."""
    here = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]
    return bool(torch.stack([p.isfinite().all() for p in here]).all())
