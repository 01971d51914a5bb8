"""Encodes the pieces of a corpus, on every core, and appends their ids to the shards of a folder.

After each PART_BYTES of text all that was written is made to last, and journal.json says how far it goes. Whoever comes
after a process that was killed cuts the files back to what the journal says, and goes on from there.
"""

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tinygpt.pieces import SPLITS, Batch, Place
from tinygpt.tokenizer import Ids, State, Tokenizer, UnknownCharacter, token_dtype

SHARD_TOKENS = 2**27
PART_BYTES = 2**25
JOURNAL = "journal.json"

Manifest = dict[str, Any]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encoder(tokenizer: Tokenizer, streamed: bool) -> Callable[[Batch], list[Ids]]:
    """What turns a batch into the ids of each piece, in any thread: each has a tokenizer of its own."""
    unused, mine = [tokenizer], threading.local()

    def own() -> Tokenizer:
        if not hasattr(mine, "tokenizer"):
            try:
                mine.tokenizer = unused.pop()
            except IndexError:
                mine.tokenizer = tokenizer.twin()
        found: Tokenizer = mine.tokenizer
        return found

    def encode(batch: Batch) -> list[Ids]:
        if streamed:
            return own().encode_documents([piece.text for piece in batch.pieces])
        return [own().encode_array(piece.text) for piece in batch.pieces]

    def located(batch: Batch) -> list[Ids]:
        try:
            return encode(batch)
        except UnknownCharacter as error:  # it counted from the start of a piece
            piece = next(piece for piece in batch.pieces if error.character in piece.text)
            raise UnknownCharacter(error.character, piece.start + piece.text.index(error.character), error.others) from None

    return located


def encoded(batches: Iterable[Batch], encode: Callable[[Batch], list[Ids]]) -> Iterator[tuple[Batch, list[Ids]]]:
    """Each batch with its ids, in order, while the next ones are encoded: threads do, where the GIL is let go."""
    threads = cores()
    waiting: deque[tuple[Batch, Future[list[Ids]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(encode, batch)))
                if len(waiting) > 2 * threads:
                    first, ids = waiting.popleft()
                    yield first, ids.result()
            while waiting:
                first, ids = waiting.popleft()
                yield first, ids.result()
        finally:
            pool.shutdown(cancel_futures=True)


class Writer:
    """The files of all splits in a folder, each appended to."""

    def __init__(self, folder: Path, vocab_size: int, documents: bool, journal: Manifest) -> None:
        """`journal` is written again, with how far it goes, after each part; `splits` in it are there already."""
        self.dtype = token_dtype(vocab_size)
        self._folder, self._journal, self._unsaved = folder, journal, 0
        done = journal.get("splits", {})
        self._splits = {name: _Split(folder, name, self.dtype, documents, done.get(name)) for name in SPLITS}

    def write(self, batch: Batch, ids: list[Ids]) -> None:
        for piece, tokens in zip(batch.pieces, ids, strict=True):
            self._splits[piece.split].write(len(piece.text), piece.bytes, tokens.astype(self.dtype, copy=False))
            self._unsaved += piece.bytes
        if self._unsaved >= PART_BYTES:
            self._commit(batch.place)

    def _commit(self, place: Place) -> None:
        """Make what was written last, and say so in the journal."""
        self._unsaved = 0
        counts = {name: split.counts for name, split in self._splits.items()}
        for split in self._splits.values():
            split.flush()
        sync(self._folder)
        write_json(self._folder / JOURNAL, {**self._journal, "place": place, "splits": counts})

    def close(self) -> Manifest:
        """The entries of the splits in a manifest, once all is on disk."""
        return {name: split.close() for name, split in self._splits.items()}


class _Split:
    """The ids of one split, in shards of SHARD_TOKENS, and where its documents end."""

    def __init__(
        self,
        folder: Path,
        name: str,
        dtype: np.dtype[np.unsignedinteger[Any]],
        documents: bool,
        counts: dict[str, int] | None,
    ) -> None:
        self.counts = dict(counts or dict.fromkeys(("characters", "bytes", "tokens", "documents"), 0))
        self._folder, self._name, self._width = folder, name, dtype.itemsize
        self._open: dict[Path, BinaryIO] = {}
        self._ends = folder / documents_file(name) if documents else None
        if self._ends and not counts:
            self._append(self._ends, 0, np.zeros(1, "<i8").tobytes())

    def write(self, characters: int, size: int, ids: Ids) -> None:
        for unit, amount in (("characters", characters), ("bytes", size), ("documents", 1)):
            self.counts[unit] += amount
        while len(ids):
            shard, filled = divmod(self.counts["tokens"], SHARD_TOKENS)
            part = ids[: SHARD_TOKENS - filled]
            self._append(self._folder / self._shard(shard), filled * self._width, part.tobytes())
            self.counts["tokens"] += len(part)
            ids = ids[len(part) :]
        if self._ends:
            self._append(self._ends, 8 * self.counts["documents"], np.int64(self.counts["tokens"]).astype("<i8").tobytes())

    def _shard(self, number: int) -> str:
        return f"{self._name}-{number:05d}.bin"

    def _append(self, path: Path, size: int, content: bytes) -> None:
        """Write behind the first `size` bytes of a file; what a killed process left beyond them goes."""
        if path not in self._open:
            file = path.open("r+b" if size else "wb")
            file.truncate(size)
            file.seek(size)
            self._open[path] = file
        self._open[path].write(content)

    def flush(self) -> None:
        for path, file in list(self._open.items()):
            flush(file)
            if path != self._ends and path.stat().st_size == SHARD_TOKENS * self._width:
                self._open.pop(path).close()

    def close(self) -> Manifest:
        self.flush()
        for file in self._open.values():
            file.close()
        whole, rest = divmod(self.counts["tokens"], SHARD_TOKENS)
        tokens = [SHARD_TOKENS] * whole + ([rest] if rest else [])
        shards = [{"file": self._shard(number), "tokens": count} for number, count in enumerate(tokens)]
        return {**self.counts, "documents": self.counts["documents"] if self._ends else None, "shards": shards}


def documents_file(split: str) -> str:
    return f"{split}-documents.bin"


def write_json(path: Path, value: Manifest | State) -> None:
    """Replace a file, all or nothing."""
    new = path.with_name(f".{path.name}")
    with new.open("wb") as file:
        file.write(json.dumps(value, indent=1).encode())
        flush(file)
    new.replace(path)
    sync(path.parent)


def flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(folder: Path) -> None:
    """Make the names in a folder last; other systems than POSIX have no way to ask for it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
