"""Parts of the model in another form, for speed on a CPU. What they compute is what torch's own would."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FEW = range(4, 33)  # rows for which a weight that lies by rows is quicker times columns


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., in) through a linear layer of float32, for few rows by the product that MKL is quickest at.

    A weight (out, in) that lies by rows, as torch makes it, is multiplied by the columns of x: up to a third quicker.
    """
    rows = x.numel() // x.shape[-1]
    if rows not in FEW or not weight.is_contiguous():
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    y = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return y.t().view(*x.shape[:-1], -1)


def in_rows(x: Tensor) -> Tensor:
    """x with each row in one piece, as torch's fused attention wants it: `linear` may leave columns."""
    return x if x.stride(-1) == 1 else x.contiguous()


def products_are_faster(q: Tensor) -> bool:
    """Whether causal attention over q (B, H, T, D) is faster as two batched matrix products.

    torch's fused attention for CPUs multiplies in small tiles, which bfloat16 products (matmul_precision=medium) make
    several times slower; in long blocks the (T, T) scores cost more than that.
    """
    return q.device.type == "cpu" and q.shape[2] <= 256 and torch.get_float32_matmul_precision() == "medium"


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over q, k and v, each (B, H, T, D), with the scores (B * H, T, T) in memory."""
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    later = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(later, q, k.mT, alpha=1 / math.sqrt(D))
    return (scores.softmax(-1) @ v).view(B, H, T, D)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2 with its gradient in two passes over memory, where autograd takes five: what it costs on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return torch.mul(gradient, positive).mul_(2)
