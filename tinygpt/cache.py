"""What a model remembers of the tokens that it has read: keys and values, for one batch or for many texts at once."""

import torch
from torch import Tensor

from tinygpt.model import GPT

SMALLEST = 64  # a ragged cache grows from so many tokens by doubling


class KVCache:
    """Keys and values of the tokens already read, for one batch; `length` tokens are held, `capacity` fit.

    The buffers, (2, B, K, capacity, D) per layer, keys before values, are made when the first tokens come, and then only
    written to.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.n_layer, self.capacity, self.length = n_layer, capacity, 0
        self.buffers: list[Tensor] = []

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v, each (B, K, T, D), to a layer's and return all of them: (B, K, length + T, D).

        Layers come in order, and the last one moves `length` on, so that all see the same length in one
        forward pass.
        """
        if layer == len(self.buffers):
            self.buffers.append(k.new_empty(2, *k.shape[:2], self.capacity, k.shape[3]))
        start, end = self.length, self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit into a cache of {self.capacity}")
        keys, values = self.buffers[layer]
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        if layer == self.n_layer - 1:
            self.length = end
        return keys[:, :, :end], values[:, :, :end]

    def clear(self) -> None:
        """Forget the tokens, keep the buffers."""
        self.length = 0


class RaggedCache:
    """Keys and values of texts of different lengths, a row each: the `Cache` of one forward pass at a time.

    The buffers, (rows, K, columns + 1, D) per layer, grow by doubling. What fills a batch up to its longest row goes to
    the last column, which no token attends to.
    """

    length = 0  # the model is told positions instead

    def __init__(self, model: GPT) -> None:
        self.config, self.like = model.config, model.wte.weight
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.rows = self.columns = 0

    def aim(self, rows: slice | Tensor, at: Tensor, total: int) -> None:
        """The next pass reads the first `total` columns of `rows` and writes to the columns `at` (n, T) of them."""
        self._rows, self._total = rows, total
        self._at = at.clamp(max=self.columns)
        where = torch.arange(rows.stop, device=at.device) if isinstance(rows, slice) else rows
        self._where = where[:, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        keys[self._where, :, self._at] = k.transpose(1, 2)
        values[self._where, :, self._at] = v.transpose(1, 2)
        return keys[self._rows, :, : self._total], values[self._rows, :, : self._total]

    def reserve(self, rows: int, columns: int) -> None:
        """Have room for so many, keeping what is held."""
        if rows <= self.rows and columns <= self.columns:
            return
        rows = max(self.rows, _doubled(rows, 1))
        columns = max(self.columns, min(_doubled(columns, SMALLEST), self.config.block_size))
        heads = self.config.n_kv_head or self.config.n_head
        shape = (rows, heads, columns + 1, self.config.head_dim)
        for buffers in (self.keys, self.values):
            for layer in range(self.config.n_layer):
                new = self.like.new_zeros(shape)  # a masked key counts 0 times its value: it must be a number
                if self.rows:
                    old = buffers[layer]
                    new[: self.rows, :, : self.columns] = old[:, :, : self.columns]
                    buffers[layer] = new
                else:
                    buffers.append(new)
        self.rows, self.columns = rows, columns

    def move(self, source: int, target: int, length: int) -> None:
        """The row `source`, of so many tokens, takes the place of `target`."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def erase(self, row: int) -> None:
        """Forget what is no number: it would spoil the next text in this row, masked or not."""
        for buffer in (*self.keys, *self.values):
            buffer[row] = 0

    def drop(self) -> None:
        """Give the memory back."""
        self.keys, self.values, self.rows, self.columns = [], [], 0, 0


def _doubled(needed: int, start: int) -> int:
    return max(start, 1 << (needed - 1).bit_length())
