"""The update rules and the learning rate: parameter groups, AdamW, Muon, and schedules as pure functions of the step.

A schedule that is a function, not an object with state, needs nothing in a checkpoint and cannot drift on resume.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tinygpt.config import OptimizerConfig
from tinygpt.model import GPT, MLP, Attention

ONE_CYCLE_START = 1 / 25  # of the peak, as in Smith & Topin 2017 (arXiv:1708.07120) and torch's OneCycleLR
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: steepest at zero, singular values end between 0.7 and 1.2


def param_groups(parameters: Iterable[Tensor], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and embeddings decay, vectors (biases, norms) do not; every trained parameter is in exactly one group."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: GPT, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101), or Muon for the matrices of the blocks and AdamW for the rest.

    AdamW is fused: one kernel for all tensors, three times faster here.
    """
    betas = (config.betas[0], config.betas[1])
    if config.name == "adamw":
        groups = param_groups(model.parameters(), config.weight_decay)
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    matrices = block_matrices(model)
    taken = {id(matrix) for matrix, _ in matrices}
    rest = param_groups((p for p in model.parameters() if id(p) not in taken), config.weight_decay)
    return Muon(
        matrices,
        rest,
        lr=config.lr,
        muon_lr=config.muon_lr,
        momentum=config.muon_momentum,
        muon_weight_decay=config.muon_weight_decay,
        betas=betas,
        eps=config.eps,
    )


def block_matrices(model: GPT) -> list[tuple[Tensor, list[int]]]:
    """The weight matrices of the blocks, each with the rows of the matrices that are joined in it: queries, keys and
    values, or swiglu's gate and its input. Muon treats each of those by itself."""
    matrices: list[tuple[Tensor, list[int]]] = []
    for module in model.modules():
        if isinstance(module, Attention):
            shared = module.n_kv_head * module.head_dim
            matrices.append((module.c_attn.weight, [module.n_head * module.head_dim, shared, shared]))
            matrices.append((module.c_proj.weight, [module.c_proj.out_features]))
        elif isinstance(module, MLP):
            joined = 2 if module.kind == "swiglu" else 1
            matrices.append((module.c_fc.weight, [module.c_fc.out_features // joined] * joined))
            matrices.append((module.c_proj.weight, [module.c_proj.out_features]))
    return [pair for pair in matrices if pair[0].requires_grad]


class Muon(torch.optim.Optimizer):
    """Muon for matrices and AdamW for the rest, in one optimizer (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    A matrix moves along its orthogonalised Nesterov momentum, so that all directions are learned at the same rate; the
    update of an (A, B) matrix is scaled by sqrt(max(1, A / B)), and is that of `torch.optim.Muon`. matrices: pairs of a
    parameter and the rows of the matrices joined in it. Each group has an `lr_ratio`: what multiplies the schedule's
    learning rate, which is `lr`'s, to give the group's own.
    """

    # As torch's fused optimizers: around a step torch's GradScaler sets by what the gradients are still to be divided, and
    # whether the step is to be left out. Without this Lightning unscales once more what was unscaled to be clipped.
    _step_supports_amp_scaling = True
    grad_scale: Tensor | None
    found_inf: Tensor | None

    def __init__(
        self,
        matrices: list[tuple[Tensor, list[int]]],
        rest: list[dict[str, Any]],
        *,
        lr: float = 1e-3,
        muon_lr: float = 0.02,
        momentum: float = 0.95,
        muon_weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
    ) -> None:
        muon = {
            "params": [matrix for matrix, _ in matrices],
            "rows": [rows for _, rows in matrices],
            "lr": muon_lr,
            "lr_ratio": muon_lr / lr,
            "momentum": momentum,
            "weight_decay": muon_weight_decay,
        }
        # fused: by it load_state_dict puts "step" on the weights' device, where the fused kernel reads it
        super().__init__([muon, *rest], {"lr": lr, "lr_ratio": 1.0, "betas": betas, "eps": eps, "fused": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if getattr(self, "found_inf", None):
            return loss
        if (scale := getattr(self, "grad_scale", None)) is not None:
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                p.grad.div_(scale)
        for group in self.param_groups:
            if "rows" in group:
                self.step_matrices(group)
            else:
                self.step_rest(group)
        return loss

    def step_matrices(self, group: dict[str, Any]) -> None:
        moving = [(p, rows) for p, rows in zip(group["params"], group["rows"], strict=True) if p.grad is not None]
        if not moving:
            return
        gradients = [p.grad for p, _ in moving]
        momenta = [self.momentum(p) for p, _ in moving]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
        parts = [part for update, (_, rows) in zip(nesterov, moving, strict=True) for part in update.split(rows)]
        targets = [part for p, rows in moving for part in p.split(rows)]
        if group["weight_decay"]:
            torch._foreach_mul_(targets, 1 - group["lr"] * group["weight_decay"])
        for target, update in zip(targets, orthogonalise_all(parts), strict=True):
            scale = math.sqrt(max(1.0, target.shape[0] / target.shape[1]))
            target.add_(update, alpha=-group["lr"] * scale)

    def momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def step_rest(self, group: dict[str, Any]) -> None:
        moving = [p for p in group["params"] if p.grad is not None]
        if not moving:
            return
        for p in moving:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        adamw(
            moving,
            [p.grad for p in moving],
            [self.state[p]["exp_avg"] for p in moving],
            [self.state[p]["exp_avg_sq"] for p in moving],
            [],
            [self.state[p]["step"] for p in moving],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalise_all(matrices: list[Tensor]) -> list[Tensor]:
    """`orthogonalise` of each: those of one shape, up to a transposition, together."""
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    shapes: dict[tuple[int, int], list[int]] = {}
    for i, matrix in enumerate(matrices):
        shapes.setdefault((min(matrix.shape), max(matrix.shape)), []).append(i)
    for together in shapes.values():
        wide = [matrices[i].T if matrices[i].shape[0] > matrices[i].shape[1] else matrices[i] for i in together]
        for i, result in zip(together, orthogonalise(torch.stack(wide)), strict=True):
            results[i] = result.T if matrices[i].shape[0] > matrices[i].shape[1] else result
    return results


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V^T for each U S V^T in x (N, A <= B), by Newton-Schulz iterations.

    In bfloat16 where that is fast: on CUDA, and on a CPU whose products are asked for in it (matmul_precision=medium).
    """
    a, b, c = NEWTON_SCHULZ
    dtype = x.dtype
    if x.device.type == "cuda" or torch.get_float32_matmul_precision() == "medium":
        x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # no singular value above one
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(dtype)


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
