"""The LightningDataModule: one item of its training loader is one optimizer step, this rank's share of it."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from tinygpt.batches import IGNORED, Batch, BatchOrder, Order, TokenSource, validation_rows, validation_windows
from tinygpt.config import UserError
from tinygpt.documents import PackedOrder, PaddedOrder
from tinygpt.evaluate import window_batch


class TrainingSteps(Dataset[Batch]):
    """Item s: this rank's share of optimizer step s."""

    def __init__(self, tokens: TokenSource, order: Order, rank: int, world_size: int) -> None:
        share = order.batch_size // world_size
        self.tokens, self.order, self.mine = tokens, order, slice(rank * share, (rank + 1) * share)

    def __getitem__(self, step: int) -> Batch:
        return self.order.read(self.tokens, step, self.mine)


class ValidationBatches(Dataset[Batch]):
    """Item i: a batch of windows; those of the split are dealt to the ranks in turn of whole batches.

    Every rank has as many batches, none of them empty: one that had nothing to do would leave the others waiting.
    """

    def __init__(
        self,
        tokens: TokenSource,
        block_size: int,
        limit: int | None,
        size: int,
        rank: int,
        world: int,
        layout: str = "stream",
    ) -> None:
        self.tokens, self.block_size, self.limit, self.layout = tokens, block_size, limit, layout
        n = validation_windows(tokens, block_size, limit)
        size = min(size, -(-n // world))
        firsts = range(rank * size, rank * size + n, world * size)
        self.batches = [(min(n, first), min(n, first + size)) for first in firsts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Batch:
        first, last = self.batches[index]
        if first == last:
            return Batch(torch.full((1, self.block_size + 1), IGNORED))
        return window_batch(self.tokens, self.block_size, first, last, self.limit, self.layout)


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
        layout: str = "stream",
        val_tokens: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train, self.val, self.val_tokens, self.layout = train, val, val_tokens, layout
        self.order = make_order(train, val, block_size, batch_size, seed, layout)
        self.block_size, self.vocab_size = block_size, vocab_size
        self.total_steps, self.num_workers = total_steps, num_workers
        self.start = 0

    def state_dict(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {"step": self.trainer.global_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start = state_dict["step"]

    def train_dataloader(self) -> DataLoader[Batch]:
        rank, world_size = self._place()
        if self.order.batch_size % world_size:
            raise UserError(
                f"data.global_batch_size={self.order.batch_size} does not divide by {world_size} devices",
                "every device takes the same share: choose a multiple",
            )
        steps = TrainingSteps(self.train, self.order, rank, world_size)
        return self._loader(steps, StepSampler(self.start, self.total_steps))

    def val_dataloader(self) -> DataLoader[Batch]:
        place = *self._place(), self.layout
        device = self.trainer.strategy.root_device.type if self.trainer else "cpu"
        rows = validation_rows(self.block_size, self.vocab_size, device)
        batches = ValidationBatches(self.val, self.block_size, self.val_tokens, rows, *place)
        return self._loader(batches, None, num_workers=0)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, items: Dataset[Batch], sampler: Sampler[int] | None, **options: Any) -> DataLoader[Batch]:
        own = torch.Generator().manual_seed(0)  # else every iter() draws from the global generator
        options = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), **options}
        return DataLoader(items, batch_size=None, sampler=sampler, generator=own, **options)


def make_order(
    train: TokenSource, val: TokenSource, block_size: int, batch_size: int, seed: int, layout: str = "stream"
) -> Order:
    """The order of a training split, or the UserError of a text that is too short for block_size."""
    if len(train) < block_size + 1 or len(val) < 2:
        raise UserError(
            f"the text is too short: {len(train)} training and {len(val)} validation tokens, and "
            f"model.block_size={block_size} needs at least {block_size + 1} and 2",
            "use a longer text or a smaller model.block_size",
        )
    if layout == "padded":
        return PaddedOrder(train, block_size, batch_size, seed)
    return {"stream": BatchOrder, "packed": PackedOrder}[layout](len(train), block_size, batch_size, seed)
