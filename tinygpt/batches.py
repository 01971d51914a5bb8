"""Which tokens make a batch. The sequences of optimizer step s are a pure function of (seed, s): not of workers,
devices, micro-batches or restarts. Validation reads every token of a split once.

An epoch cuts the text into windows of block_size at an offset of its own and visits each once, in an order of its own.
The order is a keyed permutation that is computed for just the windows asked for, so it costs no memory and any step can
be the first.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORED = -1  # a target that no token fills: padding
VALIDATION_LOGITS = 2**24  # logits per validation batch: 64 MiB in float32
VALIDATION_TOKENS = 2**11  # on a CPU: tokens per validation batch; of more, what a layer makes leaves its cache

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]


class TokenSource(Protocol):
    """A split's tokens; `tokens.Tokens` is one."""

    @property
    def documents(self) -> Integers | None:
        """Where each document begins and, at the end, where the last one ends; None where the text is one."""

    def __len__(self) -> int: ...

    def windows(self, starts: Integers, length: int) -> Integers:
        """(len(starts), length) tokens, one row from each start."""


class Batch(NamedTuple):
    """Sequences to train on or to be judged by, as tensors."""

    tokens: Tensor
    """(B, T + 1): what is read and, one place on, what should be said; IGNORED where a row is padded."""
    positions: Tensor | None = None
    """(B, T): how far each token read is from the first of its document that can be seen; None: each row is one text."""
    targets: int | None = None
    """How many targets the optimizer step has, over all devices; None: one for every token read."""

    def split(self, size: int) -> "list[Batch]":
        """Parts of at most `size` sequences."""
        positions = [None] * len(self.tokens) if self.positions is None else self.positions.split(size)
        return [Batch(*parts, self.targets) for parts in zip(self.tokens.split(size), positions, strict=False)]

    def on(self, device: torch.device) -> "Batch":
        """The same, there."""
        return Batch(self.tokens.to(device), None if self.positions is None else self.positions.to(device), self.targets)


class Order(Protocol):
    """Which sequences each optimizer step holds."""

    batch_size: int
    rows_per_epoch: int

    @property
    def tokens_per_row(self) -> float:
        """Targets of a sequence, on average."""

    def read(self, tokens: TokenSource, step: int, share: slice) -> Batch:
        """The sequences of step `step`, of all devices, that `share` picks."""

    def name(self, step: int) -> str:
        """Which sequences those are, for someone who wants to look at them."""


def mix(x: Words) -> Words:
    """A hash of 64 bits to 64 bits (SplitMix64: Steele et al. 2014, doi:10.1145/2660193.2660195)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: Words, n: int, key: Words) -> Words:
    """Where each index in [0, n) goes under the permutation that its key names.

    A four-round Feistel network on the smallest even number of bits that holds n (Luby & Rackoff 1988), applied until
    the result falls below n (cycle walking), which keeps it a permutation of [0, n).
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    x, todo = index.copy(), np.ones(len(index), dtype=bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & low
        for turn in range(4):
            left, right = right, left ^ (mix(right ^ mix(key[todo] + np.uint64(turn))) & low)
        x[todo] = (left << half) | right
        todo = x >= np.uint64(n)
    return x


class BatchOrder:
    """The start of every sequence of every optimizer step."""

    def __init__(self, n_tokens: int, block_size: int, batch_size: int, seed: int) -> None:
        """Raises ValueError where the text holds no window of block_size tokens and the one that follows."""
        if n_tokens < block_size + 1:
            raise ValueError(f"{n_tokens} tokens hold no window of {block_size} and a target")
        self.block_size, self.batch_size = block_size, batch_size
        self.rows_per_epoch = max(1, (n_tokens - block_size) // block_size)
        spare = n_tokens - 1 - self.rows_per_epoch * block_size
        self.offsets = np.uint64(min(block_size, spare + 1))
        self.key = mix(np.array([seed], dtype=np.uint64))

    def starts(self, step: int) -> Integers:
        """First token of each of the batch_size windows of step `step`; a window is followed by its last target."""
        drawn = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.uint64)
        epoch, index = np.divmod(drawn, np.uint64(self.rows_per_epoch))
        key = mix(self.key ^ mix(epoch))
        window = permute(index, self.rows_per_epoch, key)
        return (key % self.offsets + window * np.uint64(self.block_size)).astype(np.int64)

    @property
    def tokens_per_row(self) -> float:
        return self.block_size

    def read(self, tokens: TokenSource, step: int, share: slice) -> Batch:
        """The windows of step `step` that `share` picks."""
        return Batch(torch.from_numpy(tokens.windows(self.starts(step)[share], self.block_size + 1)))

    def name(self, step: int) -> str:
        return f"the windows that begin at the tokens {listed(self.starts(step))}"


def listed(numbers: Integers) -> str:
    """The first dozen."""
    return ", ".join(map(str, numbers[:12].tolist())) + (", ..." if len(numbers) > 12 else "")


def validation_rows(block_size: int, vocab_size: int, device: str) -> int:
    """Windows in a validation batch on such a device (cpu, cuda, mps)."""
    rows = min(64, VALIDATION_LOGITS // (block_size * vocab_size))
    return max(1, min(rows, VALIDATION_TOKENS // block_size) if device == "cpu" else rows)


def validation_windows(tokens: TokenSource, block_size: int, limit: int | None = None) -> int:
    """How many windows cover the split (or its first `limit` tokens): each token but the first is a target once."""
    return -(-(validation_length(tokens, limit) - 1) // block_size)


def validation_length(tokens: TokenSource, limit: int | None) -> int:
    return min(len(tokens), limit or len(tokens))


def validation_batch(tokens: TokenSource, block_size: int, first: int, last: int, limit: int | None = None) -> Integers:
    """(last - first, block_size + 1): the windows [first, last) with their targets; what is past the end is IGNORED."""
    n = validation_length(tokens, limit)
    batch = np.full((last - first, block_size + 1), IGNORED, dtype=np.int64)
    for row, window in enumerate(range(first, last)):
        start = window * block_size
        length = min(block_size + 1, n - start)
        batch[row, :length] = tokens.windows(np.array([start]), length)[0]
    return batch
