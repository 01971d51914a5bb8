"""How good a model is on a text: loss, perplexity, accuracy and bits per byte, each over every token once.

Bits per byte compare models whatever their tokenizers: the same text has the same bytes.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric

from tinygpt.batches import IGNORED, TokenSource, validation_batch, validation_windows
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
        exact = torch.float32 if torch.backends.mps.is_available() else torch.float64  # MPS has no float64
        self.add_state("nll", torch.zeros((), dtype=exact), dist_reduce_fx="sum")
        for name in ("correct", "tokens", "bytes"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add logits (B, T, V) and their targets (B, T); targets equal to IGNORED count for nothing."""
        logits, targets = logits.flatten(0, 1).float(), targets.flatten()
        self.nll += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
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
) -> dict[str, float | int | None]:
    """The metrics of `model`, on its device, over a split (or its first `limit` tokens), in windows of block_size."""
    block_size, device, training = model.config.block_size, next(model.parameters()).device, model.training
    metrics = TextMetrics(byte_lengths).to(device)
    model.eval()
    n = validation_windows(tokens, block_size, limit)
    for first in range(0, n, batch_size):
        batch = validation_batch(tokens, block_size, first, min(n, first + batch_size), limit)
        idx, targets = split_batch(torch.from_numpy(batch).to(device))
        metrics.update(model(idx), targets)
    model.train(training)
    return metrics.compute()


def split_batch(batch: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T + 1) tokens to what the model reads and what it should say, (B, T) each. Padding is read as token 0."""
    return batch[:, :-1].clamp_min(0), batch[:, 1:]
