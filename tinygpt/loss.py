"""The training loss: from the last hidden states to a number, without the logits of a large vocabulary in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.batches import IGNORED
from tinygpt.model import GPT

LARGE = 4096  # vocabularies from here on: below, the plain loss is as fast and its logits are small
CHUNK_LOGITS = 2**25  # logits held at once: 128 MiB in float32
CHUNK_LOGITS_CUDA = 2**26  # each chunk there adds to the weight's gradient in memory, and small ones are mostly waiting
ALIGNED = 64  # on CUDA a product's width is padded to a multiple of this: tensor cores take whole tiles


ChunkLoss = Callable[[Tensor, int, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
    """Over the tokens of targets (B, T) that are not IGNORED; logits (B, T, V)."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction)


def chunk_loss(product: Tensor, V: int, targets: Tensor, share: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The loss of the logits product[:, :V], summed by share (N,), and the gradient of product (N, V or more) in its type.

    Each step in the memory of the one before, where it can.
    """
    dtype, padding = product.dtype, product.shape[1] - V
    logits, slope = product[:, :V].float(), None
    del product  # a copy of it is in memory now
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        slope = 1 - logits.square()
        logits = logits * softcap
    share, at = share[:, None], targets.clamp_min(0)[:, None]
    norm = logits.logsumexp(dim=1, keepdim=True)
    loss = ((norm - logits.gather(1, at)) * share).sum()
    gradient = logits.sub_(norm).exp_()
    gradient.scatter_add_(1, at, torch.full_like(norm, -1.0)).mul_(share)
    if slope is not None:
        gradient.mul_(slope)
    return loss, (F.pad(gradient, (0, padding)) if padding else gradient).to(dtype)  # F.pad copies even for nothing


def fusible_chunk_loss(
    product: Tensor, V: int, targets: Tensor, share: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """chunk_loss for torch.compile, which makes two loops of it that hold nothing in float32."""
    logits, slope = product.float(), None
    if softcap is not None:
        logits = torch.tanh(logits / softcap)
        slope = 1 - logits.square()
        logits = logits * softcap
    columns = torch.arange(product.shape[1], device=product.device)
    logits = logits.masked_fill(columns >= V, -torch.inf)
    share, at = share[:, None], targets.clamp_min(0)[:, None]
    norm = logits.logsumexp(dim=1, keepdim=True)
    loss = ((norm - logits.gather(1, at)) * share).sum()
    gradient = ((logits - norm).exp() - (columns == at).float()) * share
    return loss, (gradient if slope is None else gradient * slope).to(product.dtype)


def next_token_loss(
    model: GPT, x: Tensor, targets: Tensor, reduction: str, factor: float = 1.0, rule: ChunkLoss = chunk_loss
) -> Tensor:
    """factor times cross-entropy, in nats, of targets (B, T) under the logits that the model's head makes of x (B, T, C).

    reduction: mean or sum over the targets that are not IGNORED. For a large vocabulary the logits, a chunk of them at a
    time, and their gradient are computed in one go, by `rule`, and not kept (as in Hsu et al. 2024, arXiv:2410.10989).
    """
    weight, cap = model.lm_head.weight, model.config.logit_softcap
    if model.vocab_size < LARGE:
        return cross_entropy(model.head(x), targets, reduction) * factor
    x, targets = x.flatten(0, 1), targets.flatten()
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if x.dtype == torch.float16:  # whose gradients are too small to be made before the scaler has scaled the loss
        return F.cross_entropy(model.head(x).float(), targets, ignore_index=IGNORED, reduction=reduction) * factor
    kept = (targets != IGNORED).float()
    share = factor * (kept / kept.sum() if reduction == "mean" else kept)  # of each row's loss in the result
    loss: Tensor = ChunkedCrossEntropy.apply(x, weight, targets, share, cap, rule)  # type: ignore[no-untyped-call]
    return loss


class ChunkedCrossEntropy(torch.autograd.Function):
    """The sum over rows of share * -log softmax(x weight^T)[target]; x (N, C), weight (V, C), targets and share (N,).

    The gradients are made with the loss, so the backward pass only scales them. Products are in x's type, all else and the
    gradient of the weight in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, share: Tensor, softcap: float | None, rule: ChunkLoss
    ) -> Tensor:
        V, device = len(weight), x.device
        with torch.autocast(device.type, enabled=False):
            w, padding = weight.to(x.dtype), -V % ALIGNED if device.type == "cuda" else 0
            if padding:  # F.pad copies also where there is nothing to add
                w = F.pad(w, (0, 0, 0, padding))
            chunks = max(1, -(-len(x) * len(w) // (CHUNK_LOGITS_CUDA if device.type == "cuda" else CHUNK_LOGITS)))
            rows = max(1, -(-len(x) // chunks))
            total = torch.zeros((), device=device, dtype=torch.float32)
            grads_x, grad_w = list[Tensor](), torch.empty(0, device=device)
            for part, target, weighs in zip(x.split(rows), targets.split(rows), share.split(rows), strict=True):
                loss, gradient = rule(part @ w.T, V, target, weighs, softcap)
                total += loss
                grads_x.append(gradient @ w)
                product = gradient.T @ part
                grad_w = grad_w.add_(product) if grad_w.numel() else product.float()
        ctx.save_for_backward(torch.cat(grads_x), grad_w[:V] if padding else grad_w)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        if gradient.device.type == "cpu" and gradient == 1:  # nobody scaled the loss; elsewhere to ask is to wait
            return grad_x, grad_w, None, None, None, None
        return grad_x * gradient.to(grad_x.dtype), grad_w * gradient, None, None, None, None
