"""A text by chance whose entropy is known: the loss that no model can beat, and that a sound training loop gets close to.

A Markov chain: each letter is drawn with probabilities that depend on the few before it. What a letter says on average is
the entropy rate, sum over the contexts c of pi(c) H(P(. | c)), pi: the stationary distribution (Shannon 1948, section 7).
"""

from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tinygpt.batches import mix
from tinygpt.config import DataConfig

LETTERS = "\nabcdefghijklmnopqrstuvwxyz"
CHUNK = 2**16

Numbers = NDArray[np.float64]


class Source:
    """The chain of `symbols` letters and `order` letters of context that `seed` decides."""

    def __init__(self, symbols: int, order: int, seed: int) -> None:
        self.symbols, self.order, self.key = symbols, order, mix(np.array([seed], dtype=np.uint64))
        weights = np.log(self.uniform(0, symbols ** (order + 1))) ** 2  # some likely, many rare
        table = weights.reshape(-1, symbols)
        self.table: Numbers = table / table.sum(axis=1, keepdims=True)

    @classmethod
    def of(cls, config: DataConfig) -> "Source":
        return cls(config.synthetic_symbols, config.synthetic_order, config.synthetic_seed)

    def uniform(self, first: int, count: int) -> Numbers:
        """Numbers in (0, 1), of which number i is a function of (seed, i) alone, whatever the version of NumPy."""
        index = np.arange(first, first + count, dtype=np.uint64)
        return (mix(self.key ^ mix(index)) >> np.uint64(11)).astype(np.float64) * 2**-53 + 2**-54

    @cached_property
    def stationary(self) -> Numbers:
        """(symbols ** order,): how often each context comes, in the long run."""
        n = self.symbols
        pi = np.full(len(self.table), 1 / len(self.table))
        for _ in range(10_000):
            following = (pi[:, None] * self.table).reshape(n, -1).sum(axis=0)  # the oldest letter is forgotten
            if np.abs(following - pi).max() < 1e-16:
                break
            pi = following
        return pi

    @property
    def entropy(self) -> float:
        """Nats a letter."""
        return float(-(self.stationary * (self.table * np.log(self.table)).sum(axis=1)).sum())

    def text(self, length: int) -> Iterator[str]:
        """`length` letters, in chunks."""
        rows = [row[:-1] for row in np.cumsum(self.table, axis=1).tolist()]
        context, draws = 0, self.symbols ** (self.order + 1)  # the numbers after those that made the table
        for start in range(0, length, CHUNK):
            letters = []
            for number in self.uniform(draws + start, min(CHUNK, length - start)).tolist():
                letter = bisect_right(rows[context], number)
                letters.append(LETTERS[letter])
                context = (context * self.symbols + letter) % len(rows)
            yield "".join(letters)
