"""A corpus in the order in which it is tokenised: each piece with its split, in batches that a thread encodes at a time.

A reader hands out the pieces, and knows the place behind the last one: what it takes to go on from there in another
process, as plain values.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any, NamedTuple, Protocol

from tinygpt.config import DataConfig, UserError
from tinygpt.corpus import Corpus
from tinygpt.streams import Stream

SPLITS = ("train", "val", "test")
LONGEST_CARRY = 2**22
"""Characters without a safe place to cut after which a text is cut anyway."""

BATCH_CHARACTERS = 2**19

Place = dict[str, Any]


class Piece(NamedTuple):
    """Text of one split, which has the tokens that it would have inside the whole."""

    split: str
    text: str
    bytes: int
    start: int  # characters of the corpus before it


class Batch(NamedTuple):
    """Pieces to encode together, and the place behind the last."""

    pieces: list[Piece]
    place: Place


class Reader(Protocol):
    """The pieces of a corpus, from a place on."""

    documents: bool  # whether each piece is a document

    def __iter__(self) -> Iterator[Piece]: ...

    def place(self) -> Place:
        """Behind the piece that came last: `pieces`, `characters`, `bytes` and `sha256` of all before it."""


def batches(reader: Reader) -> Iterator[Batch]:
    pieces: list[Piece] = []
    characters = 0
    for piece in reader:
        pieces.append(piece)
        characters += len(piece.text)
        if characters >= BATCH_CHARACTERS:
            yield Batch(pieces, reader.place())
            pieces, characters = [], 0
    if pieces:
        yield Batch(pieces, reader.place())


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Each batch while the next one is being read: what is done with it may wait for a disk."""
    batch = next(batches, None)  # before it comes all that an earlier process has done: Ctrl-C is not to wait for that
    with ThreadPoolExecutor(1) as pool:
        while batch:
            coming = pool.submit(next, batches, None)
            yield batch
            batch = coming.result()


@dataclass
class Survey:
    """What reading a whole text tells; `read` it to the end first."""

    corpus: Corpus
    units: int = 0  # what a split is counted in: documents, or where the text is one, characters
    characters: int = 0

    def read(self) -> Iterator[str]:
        """The text, which is surveyed on the way. Raises UserError if there is none."""
        for chunk in self.corpus.chunks():
            self.units += 1 if self.corpus.documents else len(chunk)
            self.characters += len(chunk)
            yield chunk
        if not self.units:
            raise UserError(f"the corpus {self.corpus.name} is empty", "a text is needed to train on or to evaluate")


def first_part(units: int, *left_out: float) -> int:
    """How many of so many characters or documents come before these fractions: exact, where int(10 * (1 - 0.9)) is 0."""
    return int(units * (1 - sum(Fraction(str(fraction)) for fraction in left_out)))


def sizes(units: int, config: DataConfig) -> dict[str, int]:
    """How many of the units each split has: they come one after the other."""
    train = first_part(units, config.val_fraction, config.test_fraction)
    val = first_part(units, config.test_fraction)
    return {"train": train, "val": val - train, "test": units - val}


class TextReader:
    """A text of known length, from its beginning, its splits one after the other.

    What is before `place` is read, to be sure that it is the same, and not handed out.
    """

    def __init__(self, corpus: Corpus, lengths: dict[str, int], place: Place | None) -> None:
        self.documents = corpus.documents
        self._corpus, self._lengths, self._start = corpus, lengths, place
        self._digest, self._count, self._characters, self._bytes = hashlib.sha256(), 0, 0, 0

    def __iter__(self) -> Iterator[Piece]:
        done = self._start["pieces"] if self._start else 0
        for split, text in self._texts():
            data = text.encode()
            piece = Piece(split, text, len(data), self._characters)
            self._digest.update(data)
            self._count, self._characters, self._bytes = (
                self._count + 1,
                self._characters + len(text),
                self._bytes + len(data),
            )
            if self._count > done:
                yield piece
            elif self._count == done and self.place() != self._start:
                raise changed(self._corpus)

    def _texts(self) -> Iterator[tuple[str, str]]:
        chunks = _Chunks(self._corpus.chunks())
        for split, length in self._lengths.items():
            texts = islice(chunks, length) if self.documents else recut(chunks.characters(length))
            yield from ((split, text) for text in texts)

    def place(self) -> Place:
        count = {"pieces": self._count, "characters": self._characters, "bytes": self._bytes}
        return {**count, "sha256": self._digest.hexdigest()}


def changed(corpus: Corpus) -> UserError:
    return UserError(f"the corpus {corpus.name} changed while it was being read", "start again when it is complete")


def training_texts(corpus: Corpus, config: DataConfig, units: int) -> Iterator[str]:
    """The training split in pieces that cut no word, for what is learned from it."""
    if corpus.stream:
        yield from (f"\n{text}" for text in corpus.stream.read() if split_of(text.encode(), config) == "train")
        return
    chunks, length = _Chunks(corpus.chunks()), sizes(units, config)["train"]
    yield from islice(chunks, length) if corpus.documents else recut(chunks.characters(length))


class StreamReader:
    """Documents that come from afar, and are read once. Each goes to the split that its own text decides.

    The sha256 is that of a chain: of the one before it, then the document.
    """

    documents = True

    def __init__(self, stream: Stream, config: DataConfig, place: Place | None) -> None:
        self._config, self._place = config, place or {"pieces": 0, "characters": 0, "bytes": 0, "sha256": ""}
        self._documents = stream.open(self._place.get("source"), self._place["pieces"])

    def __iter__(self) -> Iterator[Piece]:
        for text in self._documents:
            data, before = text.encode(), self._place
            chained = hashlib.sha256(bytes.fromhex(before["sha256"]) + data).hexdigest()
            self._place = {
                "pieces": before["pieces"] + 1,
                "characters": before["characters"] + len(text),
                "bytes": before["bytes"] + len(data),
                "sha256": chained,
            }
            yield Piece(split_of(data, self._config), text, len(data), before["characters"])

    def place(self) -> Place:
        return {**self._place, "source": self._documents.state()}


def split_of(document: bytes, config: DataConfig) -> str:
    """The split of a document: where its hash falls between 0 and 1. The same text is always on the same side."""
    point = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big") / 2**64
    if point < config.val_fraction:
        return "val"
    return "test" if point < config.val_fraction + config.test_fraction else "train"


class _Chunks:
    """Chunks of text that are taken one by one, or by so many characters."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._rest = chunks, ""

    def __iter__(self) -> Iterator[str]:
        return self._chunks

    def characters(self, count: int) -> Iterator[str]:
        while count:
            chunk = self._rest or next(self._chunks, "")
            if not chunk:
                return
            part, self._rest = chunk[:count], chunk[count:]
            count -= len(part)
            yield part


def recut(chunks: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that end before a space or newline that follows a non-space.

    No tokenizer here has a token (a word, or what BPE merges within) that reaches over such a place, so the
    pieces have the tokens of the whole. LONGEST_CARRY characters without one are cut all the same, to bound
    the memory.
    """
    carry = ""
    for chunk in chunks:
        carry += chunk
        cut = _last_safe_cut(carry) or (len(carry) if len(carry) >= LONGEST_CARRY else 0)
        if cut:
            yield carry[:cut]
            carry = carry[cut:]
    if carry:
        yield carry


def _last_safe_cut(text: str) -> int:
    """Where the last run of spaces begins that follows a non-space; 0 if nowhere."""
    end = len(text)
    while (end := max(text.rfind(" ", 0, end), text.rfind("\n", 0, end))) > 0:
        before = len(text[:end].rstrip())
        if before == end:
            return end
        # The run begins earlier, maybe with a character that only Python calls a space: look at it again.
        end = before + 1
    return 0
