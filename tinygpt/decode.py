"""One token after the other: the model's forward pass where each text of a batch gives one new token.

At T = 1 a forward pass is the reading of every weight once, and whatever stands between two matrix products is time lost.
`Decoder` computes what `GPT.features` and `GPT.head` compute, with as few operations as that takes; on CUDA its operations
have fixed shapes and addresses and are replayed as one graph. It continues a cache that the model has filled.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tinygpt import kernels
from tinygpt.cache import KVCache
from tinygpt.model import GPT, Attention, Block, Rope, activate, rotate

Product = Callable[[Tensor], Tensor]
STRIDE = 256  # the static path attends to a multiple of so many columns of the cache


class Place(NamedTuple):
    """Where a new token goes: column `at` of the cache; it attends to the first `total` columns, less what `mask` hides."""

    at: int | Tensor
    total: int
    mask: Tensor | None = None

    def put(self, buffer: Tensor, kv: Tensor) -> None:
        """Write keys and values kv (2, B, K, D) into a layer's buffer (2, B, K, capacity, D)."""
        if isinstance(self.at, Tensor):
            buffer.index_copy_(3, self.at, kv.unsqueeze(3))
        else:
            buffer.select(3, self.at).copy_(kv)


class Decoder:
    """Logits (B, V) of the token after `token` (B,), which follows the tokens in `cache` and is added to them.

    static: operations of fixed shape, on columns that a mask tells apart, as a graph needs them; captured as graphs where
    the model is on CUDA. None: static on CUDA only. The next call may overwrite the logits.
    """

    def __init__(self, model: GPT, cache: KVCache, static: bool | None = None) -> None:
        self.model, self.cache = model, cache
        rows, self.device = cache.buffers[0].shape[1], model.wte.weight.device
        self.static = self.device.type == "cuda" if static is None else static
        self.layers = [Layer(cast(Block, block), buffer) for block, buffer in zip(model.h, cache.buffers, strict=True)]
        if self.static:
            self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
            self._token = torch.zeros(rows, dtype=torch.long, device=self.device)
            self._at = torch.zeros(1, dtype=torch.long, device=self.device)
            self._columns = torch.arange(cache.capacity, device=self.device)
            for buffer in cache.buffers:
                buffer[:, :, :, cache.length :] = 0  # what is masked counts 0 times its value, which must be a number

    def __call__(self, token: Tensor) -> Tensor:
        """Raises ValueError where the cache is full."""
        at = self.cache.length
        if at >= self.cache.capacity:
            raise ValueError(f"{at + 1} tokens do not fit into a cache of {self.cache.capacity}")
        self.cache.length = at + 1
        if not self.static:
            return self._step(token, Place(at, at + 1))
        self._token.copy_(token)
        self._at.fill_(at)
        total = min(self.cache.capacity, math.ceil((at + 1) / STRIDE) * STRIDE)
        if self.device.type != "cuda":
            return self._static_step(total)
        if total not in self._graphs:
            self._graphs[total] = capture(lambda: self._static_step(total))
        graph, logits = self._graphs[total]
        graph.replay()
        return logits

    def _static_step(self, total: int) -> Tensor:
        return self._step(self._token, Place(self._at, total, self._columns[None, :total] <= self._at))

    def _step(self, token: Tensor, place: Place) -> Tensor:
        model, rope = self.model, None
        x = model.wte.weight[token]  # (B, C)
        if model.config.position == "learned":
            x = x + model.wpe.weight[place.at]
        else:
            rope = model.cos[place.at].to(x.dtype), model.sin[place.at].to(x.dtype)
        for layer in self.layers:
            x = layer(x, rope, place)
        logits: Tensor = model.head(model.ln_f(x))
        return logits


class Layer:
    """A block of the model, with its part of the cache, at T = 1."""

    def __init__(self, block: Block, buffer: Tensor) -> None:
        self.block, self.attn, self.buffer = block, block.attn, buffer
        self.c_attn, self.attn_proj = product(block.attn.c_attn), product(block.attn.c_proj)
        self.c_fc, self.mlp_proj = product(block.mlp.c_fc), product(block.mlp.c_proj)

    def __call__(self, x: Tensor, rope: Rope | None, place: Place) -> Tensor:
        block, attn = self.block, self.attn
        q, kv = heads(attn, self.c_attn(block.ln_1(x)), rope)
        place.put(self.buffer, kv)
        keys, values = self.buffer.narrow(3, 0, place.total)
        y = F.scaled_dot_product_attention(q, keys, values, place.mask, enable_gqa=attn.n_head != attn.n_kv_head)
        x = x + self.attn_proj(y.reshape(x.shape))
        return x + self.mlp_proj(activate(self.c_fc(block.ln_2(x)), block.mlp.kind))


def heads(attn: Attention, qkv: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
    """The queries (B, H, 1, D), and keys and values together (2, B, K, D), from the product (B, (H + 2K) D)."""
    qkv = qkv.reshape(len(qkv), -1, attn.head_dim)
    if attn.qk_norm or rope is not None:
        qk, v = qkv[:, : -attn.n_kv_head], qkv[:, -attn.n_kv_head :]
        if attn.qk_norm:
            qk = F.rms_norm(qk, (attn.head_dim,))
        if rope is not None:
            qk = rotate(qk, *rope)
        qkv = torch.cat((qk, v), dim=1)
    q, kv = qkv[:, : attn.n_head], qkv[:, attn.n_head :]
    return kernels.in_rows(q).unsqueeze(2), kv.reshape(len(kv), 2, attn.n_kv_head, attn.head_dim).transpose(0, 1)


def product(layer: nn.Module) -> Product:
    """x (B, in) to (B, out) through a linear layer, by the call that is quickest for so few rows."""
    if type(layer) is not nn.Linear:
        return layer
    weight, bias, turned = layer.weight, layer.bias, layer.weight.t()
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return lambda x: kernels.linear(x, weight, bias)
    if bias is None:
        return lambda x: torch.mm(x, turned)
    return lambda x: torch.addmm(bias, x, turned)


def capture(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of `step`, and the tensor that each replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set themselves up in the first calls, which no graph may hold
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return graph, logits
