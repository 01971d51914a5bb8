"""How good a model is on a text: loss, perplexity, accuracy and bits per byte, each over every token once.

Bits per byte compare models whatever their tokenizers: the same text has the same bytes.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from tinygpt.batches import IGNORED, Batch, Integers, TokenSource, validation_batch, validation_length, validation_windows
from tinygpt.documents import boundaries, opening_lengths, openings, positions_within
from tinygpt.model import GPT


class TextMetrics(Metric):
    """Sums over tokens, reduced over processes; `compute` gives the metrics as floats (bits per byte may be None)."""

    full_state_update = False
    nll: Tensor
    correct: Tensor
    tokens: Tensor
    bytes: Tensor
    byte_lengths: Tensor

    def __init__(self, byte_lengths: np.ndarray[Any, Any] | None) -> None:
        """byte_lengths: the UTF-8 bytes that each token id stands for; None where the tokenizer loses text."""
        super().__init__()
        self.lossless = byte_lengths is not None
        lengths = torch.as_tensor(byte_lengths if byte_lengths is not None else [0], dtype=torch.int64)
        self.register_buffer("byte_lengths", lengths, persistent=False)
        self.exact = torch.float32 if torch.backends.mps.is_available() else torch.float64  # MPS has no float64
        self.add_state("nll", torch.zeros((), dtype=self.exact), dist_reduce_fx="sum")
        for name in ("correct", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, T, V) and their targets (B, T); targets equal to IGNORED count for nothing."""
        logits, targets = logits.flatten(0, 1).float(), targets.flatten()
        # trainer.precision=bf16-true converts this sum too, while it is still zero.
        self.nll = self.nll.to(self.exact) + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        kept = targets != IGNORED
        self.correct += ((logits.argmax(dim=-1) == targets) & kept).sum()
        self.tokens += kept.sum()
        if self.lossless:
            self.bytes += self.byte_lengths[targets[kept]].sum()

    def compute(self) -> dict[str, float | int | None]:
        nll, tokens, n_bytes = float(self.nll), int(self.tokens), int(self.bytes)
        loss = nll / tokens if tokens else math.nan
        return {
            "loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": nll / math.log(2) / n_bytes if self.lossless and n_bytes else None,
            "accuracy": int(self.correct) / tokens if tokens else math.nan,
            "tokens": tokens,
        }


@torch.inference_mode()
def evaluate(
    model: GPT,
    tokens: TokenSource,
    byte_lengths: np.ndarray[Any, Any] | None,
    *,
    batch_size: int = 32,
    limit: int | None = None,
    layout: str = "stream",
    rows: str = "windows",
) -> dict[str, float | int | None]:
    """The metrics of `model`, on its device, over a split (or its first `limit` tokens).

    rows: windows, each token but the first once; or openings, the first block_size tokens of each document. layout: the
    run's data.layout, which says what a token in a window may attend to. Raises ValueError for what needs documents
    where the text is one.
    """
    device, training = next(model.parameters()).device, model.training
    metrics = TextMetrics(byte_lengths).to(device)
    model.eval()
    for batch in read_rows(tokens, model.config.block_size, batch_size, limit, layout, rows):
        metrics.update(*predict(model, batch.on(device)))
    model.train(training)
    return metrics.compute()


def read_rows(tokens: TokenSource, block_size: int, size: int, limit: int | None, layout: str, rows: str) -> Iterator[Batch]:
    """A split in batches of `size` sequences."""
    if rows == "windows":
        n = validation_windows(tokens, block_size, limit)
        for first in range(0, n, size):
            yield window_batch(tokens, block_size, first, min(n, first + size), limit, layout)
        return
    n = int(np.searchsorted(boundaries(tokens)[:-1], validation_length(tokens, limit)))
    lengths = opening_lengths(tokens, block_size)
    by_length: Integers = np.argsort(lengths[:n], kind="stable")  # so that little is padding
    for first in range(0, n, size):
        yield Batch(torch.from_numpy(openings(tokens, lengths, by_length[first : first + size])))


def window_batch(tokens: TokenSource, block_size: int, first: int, last: int, limit: int | None, layout: str) -> Batch:
    """The validation windows [first, last), as runs of this layout read windows."""
    batch = torch.from_numpy(validation_batch(tokens, block_size, first, last, limit))
    if layout != "packed":
        return Batch(batch)
    return Batch(batch, torch.from_numpy(positions_within(tokens, np.arange(first, last) * block_size, block_size)))


def predict(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's logits (B, T, V), and what it should say (B, T)."""
    x, targets = hidden_states(model, batch)
    return model.head(x), targets


def hidden_states(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's last hidden states (B, T, C), and what it should say (B, T). Padding is read as token 0."""
    idx, targets = batch.tokens[:, :-1].clamp_min(0), batch.tokens[:, 1:]
    if batch.positions is None:
        return model.features(idx), targets
    return model.features(idx, positions=batch.positions, mask=document_mask(batch.positions)), targets


def document_mask(positions: Tensor) -> Tensor:
    """(B, 1, T, T): each token sees those from the first of its document, `positions` (B, T) before it, to itself."""
    at = torch.arange(positions.shape[1], device=positions.device)
    mask: Tensor = (at <= at[:, None]) & (at >= (at - positions)[..., None])
    return mask.unsqueeze(1)
