"""The training loss: from the last hidden states to a number, without the logits of a large vocabulary in memory."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.batches import IGNORED
from tinygpt.model import GPT

LARGE = 4096  # vocabularies from here on: below, the plain loss is as fast and its logits are small
CHUNK_LOGITS = 2**25  # logits held at once: 128 MiB in float32
ALIGNED = 64  # on CUDA a product's width is padded to a multiple of this: tensor cores take whole tiles


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Over the tokens of targets (B, T) that are not IGNORED; logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def next_token_loss(model: GPT, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Cross-entropy, in nats, of the targets (B, T) under the logits that the model's head makes of x (B, T, C).

    reduction: mean or sum over the targets that are not IGNORED. For a large vocabulary the logits, a chunk of them at a
    time, and their gradient are computed in one go and not kept (as in Hsu et al. 2024, arXiv:2410.10989).
    """
    weight, cap = model.lm_head.weight, model.config.logit_softcap
    if model.vocab_size < LARGE:
        return cross_entropy(model.head(x), targets, reduction)
    x, targets = x.flatten(0, 1), targets.flatten()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype == torch.float16:  # whose gradients are too small to be made before the scaler has scaled the loss
        return F.cross_entropy(model.head(x).float(), targets, ignore_index=IGNORED, reduction=reduction)
    total: Tensor = ChunkedCrossEntropy.apply(x, weight, targets, cap)  # type: ignore[no-untyped-call]
    return total / (targets != IGNORED).sum() if reduction == "mean" else total


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over rows of -log softmax(x weight^T)[target]; x (N, C), weight (V, C), targets (N,).

    The gradients are made with the loss, so the backward pass only scales them. Products are in x's type, all else and the
    gradient of the weight in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        V = len(weight)
        with torch.autocast(x.device.type, enabled=False):
            w = weight.to(x.dtype)
            if x.device.type == "cuda":
                w = F.pad(w, (0, 0, 0, -V % ALIGNED))
            total = torch.zeros((), device=x.device, dtype=torch.float32)
            grad_x, grad_w = torch.empty_like(x), torch.zeros_like(w, dtype=torch.float32)
            rows = max(1, CHUNK_LOGITS // len(w))
            for part, out, target in zip(x.split(rows), grad_x.split(rows), targets.split(rows), strict=True):
                loss, gradient = loss_and_gradient((part @ w.T)[:, :V].float(), target, softcap)
                total += loss
                gradient = F.pad(gradient, (0, len(w) - V)).to(x.dtype)
                torch.mm(gradient, w, out=out)
                grad_w += gradient.T @ part
        ctx.save_for_backward(grad_x, grad_w[:V])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        return grad_x * gradient.to(grad_x.dtype), grad_w * gradient, None, None


def loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The summed loss of logits (N, V) and its gradient, which takes their place."""
    slope = None
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        slope = 1 - logits.square()
        logits = logits * softcap
    kept = (targets != IGNORED)[:, None]
    at = targets.clamp_min(0)[:, None]
    norm = logits.logsumexp(dim=1, keepdim=True)
    loss = ((norm - logits.gather(1, at)) * kept).sum()
    gradient = logits.sub_(norm).exp_()
    gradient.scatter_add_(1, at, torch.full_like(norm, -1.0)).mul_(kept)
    return loss, gradient if slope is None else gradient.mul_(slope)
