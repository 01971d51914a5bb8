"""The LightningDataModule: one item of its training loader is one optimizer step, this rank's share of it."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tinygpt.batches import IGNORED, VALIDATION_LOGITS, BatchOrder, TokenSource, validation_batch, validation_windows
from tinygpt.config import UserError


class TrainingSteps(Dataset[Tensor]):
    """Item s: this rank's (B, T + 1) tokens of optimizer step s."""

    def __init__(self, tokens: TokenSource, order: BatchOrder, rank: int, world_size: int) -> None:
        share = order.batch_size // world_size
        self.tokens, self.order, self.mine = tokens, order, slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Tensor:
        starts = self.order.starts(step)[self.mine]
        return torch.from_numpy(self.tokens.windows(starts, self.order.block_size + 1))


class ValidationBatches(Dataset[Tensor]):
    """Item i: (B, T + 1) tokens; the windows of the split are dealt to the ranks in turn of whole batches.

    Every rank has as many batches, none of them empty: one that had nothing to do would leave the others waiting.
    """

    def __init__(self, tokens: TokenSource, block_size: int, limit: int | None, size: int, rank: int, world: int) -> None:
        self.tokens, self.block_size, self.limit = tokens, block_size, limit
        n = validation_windows(tokens, block_size, limit)
        size = min(size, -(-n // world))
        firsts = range(rank * size, rank * size + n, world * size)
        self.batches = [(min(n, first), min(n, first + size)) for first in firsts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Tensor:
        first, last = self.batches[index]
        if first == last:
            return torch.full((1, self.block_size + 1), IGNORED)
        return torch.from_numpy(validation_batch(self.tokens, self.block_size, first, last, self.limit))


class StepSampler(Sampler[int]):
    """The steps start, start + 1, ...; its length is the whole run's, because Lightning counts from the run's beginning."""

    def __init__(self, start: int, total: int) -> None:
        self.start, self.total = start, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.total))


class TextData(L.LightningDataModule):
    """Batches of tokens for a run of total_steps optimizer steps. Its state is the step to go on from."""

    def __init__(
        self,
        train: TokenSource,
        val: TokenSource,
        *,
        block_size: int,
        vocab_size: int,
        batch_size: int,
        seed: int,
        total_steps: int,
        val_tokens: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_tokens = train, val, val_tokens
        self.order = make_order(len(train), len(val), block_size, batch_size, seed)
        self.block_size, self.total_steps, self.num_workers = block_size, total_steps, num_workers
        self.val_batch_size = max(1, min(64, VALIDATION_LOGITS // (block_size * vocab_size)))
        self.start = 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["step"]

    def train_dataloader(self) -> DataLoader[Tensor]:
        rank, world_size = self._place()
        if self.order.batch_size % world_size:
            raise UserError(
                f"data.global_batch_size={self.order.batch_size} does not divide by {world_size} devices",
                "every device takes the same share: choose a multiple",
            )
        steps = TrainingSteps(self.train, self.order, rank, world_size)
        return self._loader(steps, StepSampler(self.start, self.total_steps))

    def val_dataloader(self) -> DataLoader[Tensor]:
        batches = ValidationBatches(self.val, self.block_size, self.val_tokens, self.val_batch_size, *self._place())
        return self._loader(batches, None, num_workers=0)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, items: Dataset[Tensor], sampler: Sampler[int] | None, **options: Any) -> DataLoader[Tensor]:
        own = torch.Generator().manual_seed(0)  # else every iter() draws from the global generator
        options = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), **options}
        return DataLoader(items, batch_size=None, sampler=sampler, generator=own, **options)


def make_order(n_train: int, n_val: int, block_size: int, batch_size: int, seed: int) -> BatchOrder:
    """The order of a training split, or the UserError of a text that is too short for block_size."""
    if n_train < block_size + 1 or n_val < 2:
        raise UserError(
            f"the text is too short: {n_train} training and {n_val} validation tokens, and model.block_size={block_size} "
            f"needs at least {block_size + 1} and 2",
            "use a longer text or a smaller model.block_size",
        )
    return BatchOrder(n_train, block_size, batch_size, seed)
