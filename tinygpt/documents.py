"""Batches of a text that is made of documents, each of which begins with a newline.

Packed: windows of the joined text, as ever, in which attention and positions stay inside a document. Padded: one document
a sequence, from its beginning, cut at block_size; documents of about the same length share a batch. Both are pure functions
of (seed, step), as `BatchOrder` is.
"""

from functools import cached_property

import numpy as np
import torch

from tinygpt.batches import IGNORED, Batch, BatchOrder, Integers, TokenSource, listed, mix, permute

POOL = 16  # batches among which documents are sorted by length


def boundaries(tokens: TokenSource) -> Integers:
    """Where the documents begin and the last one ends. Raises ValueError where the text is one."""
    if tokens.documents is None:
        raise ValueError("these tokens are one running text, not documents")
    return tokens.documents


def positions_within(tokens: TokenSource, starts: Integers, length: int) -> Integers:
    """(len(starts), length): how far each token of the windows from `starts` is from the beginning of its document, or of
    its window where the document begins before that."""
    documents, at = boundaries(tokens), starts[:, None] + np.arange(length)
    begun = documents[np.searchsorted(documents, at, side="right") - 1]
    return at - np.maximum(begun, starts[:, None])


class PackedOrder(BatchOrder):
    """Windows of the joined documents, with the positions that keep these apart."""

    def read(self, tokens: TokenSource, step: int, share: slice) -> Batch:
        positions = positions_within(tokens, self.starts(step)[share], self.block_size)
        return super().read(tokens, step, share)._replace(positions=torch.from_numpy(positions))


def opening_lengths(tokens: TokenSource, block_size: int) -> Integers:
    """How many targets each document gives as one sequence: those of its first block_size tokens. The last of them is the
    newline that begins the next document, where there is one."""
    documents = boundaries(tokens)
    return np.minimum(np.minimum(np.diff(documents), len(tokens) - 1 - documents[:-1]), block_size)


def openings(tokens: TokenSource, lengths: Integers, chosen: Integers) -> Integers:
    """(len(chosen), T + 1): the beginnings of these documents with their targets, T as long as the longest of them needs;
    what is past the end of one is IGNORED."""
    begin, length = boundaries(tokens)[chosen], lengths[chosen] + 1
    rows = np.full((len(chosen), max(2, length.max())), IGNORED, dtype=np.int64)
    for row, start, count in zip(rows, begin, length.tolist(), strict=True):
        row[:count] = tokens.windows(np.array([start]), count)[0]
    return rows


class PaddedOrder:
    """The documents of every optimizer step. An epoch visits each once.

    Within an epoch the documents of POOL batches at a time are sorted by length and dealt to these batches, which come in
    an order by chance. The batch that two epochs share is left as it is drawn.
    """

    def __init__(self, tokens: TokenSource, block_size: int, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = opening_lengths(tokens, block_size), batch_size
        self.rows_per_epoch = len(self.lengths)
        self.key = mix(np.array([seed], dtype=np.uint64))

    @cached_property
    def tokens_per_row(self) -> float:
        return float(self.lengths.mean())

    def read(self, tokens: TokenSource, step: int, share: slice) -> Batch:
        rows = self.rows(step)
        targets = max(1, int(self.lengths[rows].sum()))
        return Batch(torch.from_numpy(openings(tokens, self.lengths, rows[share])), targets=targets)

    def name(self, step: int) -> str:
        return f"the documents {listed(self.rows(step))}"

    def rows(self, step: int) -> Integers:
        """The documents of step `step`, the shortest first."""
        n, B = self.rows_per_epoch, self.batch_size
        epoch = step * B // n
        begin, end = -(-epoch * n // B), (epoch + 1) * n // B  # the steps that hold nothing but this epoch
        if not begin <= step < end:
            return self.drawn(step, step + 1)
        first = begin + (step - begin) // POOL * POOL
        last = min(first + POOL, end)
        pool = self.drawn(first, last)
        pool = pool[np.argsort(self.lengths[pool], kind="stable")]
        turn = permute(np.array([step - first], dtype=np.uint64), last - first, ~mix(self.key ^ np.uint64(first)))
        mine: Integers = pool.reshape(last - first, B)[int(turn[0])]
        return mine

    def drawn(self, first: int, last: int) -> Integers:
        """The documents of the steps [first, last) before they are sorted."""
        draws = np.arange(first * self.batch_size, last * self.batch_size, dtype=np.uint64)
        epoch, index = np.divmod(draws, np.uint64(self.rows_per_epoch))
        return permute(index, self.rows_per_epoch, mix(self.key ^ mix(epoch))).astype(np.int64)
