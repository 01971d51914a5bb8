"""The tokens of one split of a prepared corpus, as they lie on disk."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tinygpt.tokenizer import Ids


class Tokens:
    """The ids of one split, read-only, memory-mapped. Cheap to pickle: a worker maps the files anew."""

    def __init__(
        self, files: Sequence[Path], counts: Sequence[int], dtype: str, documents: Sequence[tuple[Path, int]] = ()
    ) -> None:
        """documents: files of int64, each with the token at which the split's documents begin and the last one ends,
        counted from the token that stands beside it; none where the text is one."""
        self._files, self._counts, self._dtype = tuple(files), tuple(counts), dtype
        self._ends, self._documents = list(accumulate(self._counts)), tuple(documents)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __add__(self, other: "Tokens") -> "Tokens":
        """These tokens, then the other's."""
        assert self._dtype == other._dtype
        moved = tuple((file, start + len(self)) for file, start in other._documents)
        return Tokens(self._files + other._files, self._counts + other._counts, self._dtype, self._documents + moved)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_shards", "documents")}

    @cached_property
    def _shards(self) -> list[Ids]:
        # Plain arrays over the maps: slicing a np.memmap costs several times as much.
        return [np.asarray(np.memmap(file, dtype=self._dtype, mode="r")) for file in self._files]

    @cached_property
    def documents(self) -> npt.NDArray[np.int64] | None:
        """Where each document begins and, at the end, where the last one ends; None where the text is one."""
        if not self._documents:
            return None
        parts = [np.fromfile(file, dtype="<i8") + start for file, start in self._documents]
        return np.concatenate([parts[0][:1], *(part[1:] for part in parts)])

    def windows(self, starts: npt.NDArray[np.integer[Any]], length: int) -> npt.NDArray[np.int64]:
        """The (len(starts), length) ids of the windows that begin at `starts`.

        Raises IndexError beyond the split.
        """
        if len(starts) and (starts.min() < 0 or starts.max() + length > len(self)):
            raise IndexError(f"windows of {length} from {starts.min()} to {starts.max()} in {len(self)} tokens")
        windows = np.empty((len(starts), length), dtype=np.int64)
        for start, row in zip(starts.tolist(), windows, strict=True):
            self._copy(start, row)
        return windows

    def _copy(self, start: int, row: npt.NDArray[np.int64]) -> None:
        """Fill `row` with the ids from `start` on, over as many shards as it takes."""
        shard, filled = bisect_right(self._ends, start), 0
        while filled < len(row):
            offset = start + filled - (self._ends[shard] - self._counts[shard])
            part = self._shards[shard][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
