"""Number formats of the weights for writing text: a token costs the reading of every weight once, so smaller is faster.

    fp32   as trained; `lay_out` arranges them for a CPU
    bf16   half the bytes; on a CPU with bfloat16 products they are laid out once for oneDNN (`PackedLinear`)
    int8   weights of the matrices as integers with one scale per output (`Int8Linear`), everything else bfloat16

What they cost in perplexity is measured by evaluate.py dtype=... and, beside their speed, by benchmarks/generation.py.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt import kernels
from tinygpt.config import DTYPES, UserError
from tinygpt.hub import assemble
from tinygpt.model import GPT

FEW_ROWS = 16  # up to so many, the product that reads integers is faster than one that unpacks them first


def convert(model: GPT, dtype: str) -> GPT:
    """The model for inference, in eval mode, with its weights as `dtype`: fp32, bf16 or int8. The one given stays as it is.

    fp32 shares its weights where they are that already. Raises UserError for another dtype, or a model that is converted.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is not known", f"choose one of: {', '.join(DTYPES)}")
    if any(isinstance(layer, Int8Linear | PackedLinear) for layer in model.modules()):
        raise UserError("the model's weights are converted already", "leave dtype out")
    number = torch.float32 if dtype == "fp32" else torch.bfloat16
    weights = {name: tensor.detach().to(number) for name, tensor in model.state_dict().items()}
    new = assemble(model.config, model.vocab_size, weights).to(model.wte.weight.device).eval().requires_grad_(False)
    if dtype == "int8":
        replace_linears(new, Int8Linear, model.state_dict())
    elif dtype == "bf16" and packs(new.wte.weight.device):
        replace_linears(new, PackedLinear, weights)
    return new


def lay_out(model: GPT) -> None:
    """Arrange the float32 weights of a model on a CPU for writing text; elsewhere nothing is done.

    The head lies by columns then, quicker to read for a token (a tied embedding reads its rows across them), and
    every linear layer is a `FewRowsLinear`. The model computes what it did, and is not to be trained any more.
    """
    weight = model.wte.weight
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkl.is_available():
        return
    turned = nn.Parameter(model.lm_head.weight.detach().t().contiguous().t(), requires_grad=False)
    if model.config.tie_embeddings:
        model.wte.weight = turned
    model.lm_head.weight = turned
    replace_linears(model, FewRowsLinear, dict(model.named_parameters(remove_duplicate=False)))


def replace_linears(model: GPT, kind: Callable[[Tensor, Tensor | None], nn.Module], weights: Mapping[str, Tensor]) -> None:
    """Put kind(weight, bias) in the place of every linear layer of the model."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, kind(weights[f"{name}.weight"], layer.bias))


def packs(device: torch.device) -> bool:
    """Whether this machine multiplies bfloat16 by oneDNN."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # as torch.compile asks
    )


class FewRowsLinear(nn.Module):
    """A linear layer that multiplies a few rows by the quickest product."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class PackedLinear(nn.Module):
    """A linear layer whose weight has the layout of oneDNN's own: for few rows twice as fast as one that is rearranged."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return y


class Int8Linear(nn.Module):
    """A linear layer with a weight of 8-bit integers, each output's with its own scale: the largest becomes 127."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.bias = bias
        weight = weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp_min(1e-12).bfloat16()
        self.register_buffer("scale", scale)
        whole = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.register_buffer("weight", whole.contiguous())  # the kernel refuses GPT-2's own, which lie by columns

    def forward(self, x: Tensor) -> Tensor:
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        # The kernel wants a multiple of 16 and does not check it.
        if rows <= FEW_ROWS and x.device.type == "cpu" and width % 16 == 0:
            y = torch._weight_int8pack_mm(x.reshape(rows, width), self.weight, self.scale).view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias
