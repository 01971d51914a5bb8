"""The model: a decoder-only transformer, from GPT-2 to Llama by options. Read it from top to bottom.

Words and shapes: B sequences, T tokens in each, C = n_embd channels, H query heads and K key/value heads of width D.
`forward` gives logits and nothing else; the loss, the optimizer and the sampling live in other files.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tinygpt.config import ModelConfig
from tinygpt.kernels import SquaredReLU, attend_by_products, in_rows, products_are_faster

Rope = tuple[Tensor, Tensor]


class Cache(Protocol):
    """Keys and values of the tokens already read; `cache.KVCache` is one."""

    length: int

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v, each (B, K, T, D), to a layer's and return all of them: (B, K, length + T, D)."""


def make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (block_size, D / 2), of position x frequency (Su et al. 2021, arXiv:2104.09864)."""
    # Always real, also where the weights are not: no checkpoint holds these tables.
    real = torch.device("cpu") if torch.get_default_device().type == "meta" else None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=real) / config.head_dim
    positions = torch.arange(config.block_size, dtype=torch.float32, device=real)
    angles = torch.outer(positions, config.rope_theta**-exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by tables that broadcast to (B, H, T, D / 2): channel i pairs with i + D / 2, as in Llama."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def continuation_mask(new: int, total: int, device: torch.device) -> Tensor:
    """(new, total): query i sits at position total - new + i and sees the keys up to its own."""
    return torch.ones(new, total, dtype=torch.bool, device=device).tril(total - new)


class Attention(nn.Module):
    """Causal self-attention; with n_kv_head < n_head, groups of query heads share a key/value head (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_dim, self.qk_norm, self.dropout = config.head_dim, config.qk_norm, config.dropout
        width = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        self.c_attn = nn.Linear(config.n_embd, width, bias=config.bias)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache | None, mask: Tensor | None) -> Tensor:
        B, T, C = x.shape
        heads = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H + 2K, T, D)
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=1)  # one operation for queries and keys
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,))
        if rope is not None:
            qk = rotate(qk, *rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=1)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)), self.dropout, self.training)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        new, total = q.shape[2], k.shape[2]
        causal = mask is None and new == total and new > 1
        if causal and self.training and self.dropout == 0 and self.n_head == self.n_kv_head and products_are_faster(q):
            return attend_by_products(q, k, v)
        # is_causal aligns to the top left, which is right only where queries and keys are the same tokens.
        if mask is None and 1 < new < total:
            mask = continuation_mask(new, total, q.device)
        return F.scaled_dot_product_attention(
            in_rows(q),
            in_rows(k),
            in_rows(v),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
            enable_gqa=self.n_head != self.n_kv_head,
        )


def inner_width(config: ModelConfig) -> int:
    """Width inside the MLP: for swiglu, 8/3 C keeps the parameter count of a 4 C MLP with two matrices."""
    if config.n_inner:
        return config.n_inner
    return math.ceil(config.n_embd * 8 / 3 / 32) * 32 if config.mlp == "swiglu" else 4 * config.n_embd


def activate(x: Tensor, kind: str) -> Tensor:
    if kind == "swiglu":  # Shazeer 2020, arXiv:2002.05202
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "relu2":  # So et al. 2021, arXiv:2109.08668
        squared: Tensor = SquaredReLU.apply(x)  # type: ignore[no-untyped-call]
        return squared
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


class MLP(nn.Module):
    """Two linear layers around an activation, at each position apart; swiglu's gate is the first half of c_fc."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        inner = inner_width(config)
        self.c_fc = nn.Linear(config.n_embd, 2 * inner if config.mlp == "swiglu" else inner, bias=config.bias)
        self.c_proj = nn.Linear(inner, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.c_proj(activate(self.c_fc(x), self.kind)), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy of the residual stream and added back to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = make_norm(config), Attention(config, layer)
        self.ln_2, self.mlp = make_norm(config), MLP(config)

    def forward(self, x: Tensor, rope: Rope | None, cache: Cache | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), rope, cache, mask)
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """Token ids (B, T) to logits (B, T, vocab_size). `gpt2_*` presets are OpenAI's GPT-2, `llama_*` are Llama."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config, self.vocab_size = config, vocab_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        else:
            for name, table in zip(("cos", "sin"), rope_tables(config), strict=True):
                self.register_buffer(name, table, persistent=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        initialise(self)

    def forward(
        self, idx: Tensor, cache: Cache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Logits (B, T, vocab_size) of the token after each of idx (B, T), which follow the tokens in `cache`.

        positions, (T,) or (B, T), are where the tokens stand in their texts; None: one after the other, after the cached
        ones. mask, bool and broadcastable to (B, H, T, S), says which of the S cached and new tokens each token attends
        to; None: those up to itself. Raises ValueError where the tokens do not fit into block_size.
        """
        return self.head(self.features(idx, cache, positions, mask))

    def features(
        self, idx: Tensor, cache: Cache | None = None, positions: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The last hidden states (B, T, C): what `head` turns into logits, for callers who need only some of them."""
        start = cache.length if cache is not None and positions is None else 0
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into block_size={self.config.block_size}")
        at = slice(start, end) if positions is None else positions
        x, rope = self.wte(idx), None  # (B, T, C)
        if self.config.position == "learned":
            x = x + self.wpe.weight[at]
        else:
            rope = self.rotations(at, x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.h:
            x = block(x, rope, cache, mask)
        normed: Tensor = self.ln_f(x)
        return normed

    def rotations(self, at: slice | Tensor, dtype: torch.dtype) -> Rope:
        """The tables of rope at these positions, shaped for (B, H, T, D / 2)."""
        cos, sin = self.cos[at].to(dtype), self.sin[at].to(dtype)
        return cos.unsqueeze(-3), sin.unsqueeze(-3)

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (..., C) to logits (..., vocab_size)."""
        logits: Tensor = self.lm_head(x)
        if self.config.logit_softcap is not None:  # Gemma 2, arXiv:2408.00118
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def num_parameters(self) -> int:
        """Parameters, a shared one counted once."""
        return sum(p.numel() for p in self.parameters())


@torch.no_grad()
def initialise(model: GPT) -> None:
    """Every initial value of the model, in one place.

    | init      | embeddings  | matrices             | residual projections (c_proj)    |
    |-----------|-------------|----------------------|----------------------------------|
    | gpt2      | normal 0.02 | normal 0.02          | normal 0.02 / sqrt(2 n_layer)    |
    | normal    | normal 0.02 | normal 0.02          | normal 0.02                      |
    | zero_proj | normal 0.02 | normal 1/sqrt(fan-in)| zero: every block starts as x+0  |

    Biases are zero and norms one, as torch makes them (norms) or as set here (biases). The output head is an embedding.
    """
    init, scale = model.config.init, 1 / math.sqrt(2 * model.config.n_layer)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) or name == "lm_head":
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            std = 1 / math.sqrt(module.in_features) if init == "zero_proj" else 0.02
            if name.endswith("c_proj"):
                std *= {"gpt2": scale, "normal": 1.0, "zero_proj": 0.0}[init]
            nn.init.normal_(module.weight, std=std)


def outline(config: ModelConfig, vocab_size: int) -> GPT:
    """The model on the meta device: its shapes, without memory."""
    with torch.device("meta"), Undrawn():
        return GPT(config, vocab_size)


class Undrawn(TorchFunctionMode):
    """Normal values are not drawn. On the meta device there are none, and to draw them torch imports its compiler, which
    takes as long as torch itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return kwargs["tensor"] if func is nn.init.normal_ else func(*args, **kwargs)
