"""Text to token shards on disk, once: in bounded memory, all or nothing, for all who ask for the same tokens.

A prepared corpus is a folder below the cache: `train-00000.bin`, `val-00000.bin` and so on (little-endian
ids, nothing else), `train-documents.bin` where the corpus is made of documents, `tokenizer.json`, and a
`manifest.json` that says what they are. It is built under a temporary name and renamed, so that a folder
with the final name is whole, whoever was killed on the way.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Self
from uuid import uuid4

import numpy as np

from tinygpt.config import DataConfig, TokenizerConfig, UserError
from tinygpt.corpus import Corpus, gpt2_merges, open_corpus
from tinygpt.tokenizer import Ids, State, Tokenizer, UnknownCharacter, build, from_state, token_dtype
from tinygpt.tokens import Tokens

log = logging.getLogger(__name__)

FORMAT = 2
SHARD_TOKENS = 2**27
LONGEST_CARRY = 2**22
"""Characters without a safe place to cut after which a text is cut anyway."""

SPLITS = ("train", "val", "test")

_PROGRESS_BYTES = 50_000_000
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEARNED_WITH = {"word": ("min_frequency", "specials"), "bpe": ("vocab_size",)}

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A corpus as tokens. `sha256` is that of the whole text in UTF-8, `folder` where the shards are."""

    tokenizer: Tokenizer
    corpus: str
    sha256: str
    train: Tokens
    val: Tokens
    test: Tokens
    folder: Path

    def tokens(self, split: str) -> Tokens:
        """The split `train`, `val` or `test`, or `all`: one after the other."""
        splits = {"train": self.train, "val": self.val, "test": self.test}
        return splits[split] if split != "all" else self.train + self.val + self.test


def prepare(config: DataConfig, data_dir: Path, cache_dir: Path, tokenizer: Tokenizer | None = None) -> Prepared:
    """The corpus as tokens: from the cache, or built now.

    With a `tokenizer` the text is encoded by it, whatever the config says of tokenizers. Raises UserError
    where the text cannot be had, read or encoded, or the cache not be written.
    """
    corpus = open_corpus(config, data_dir)
    wanted = {"format": FORMAT, "source": corpus.fingerprint}
    wanted |= {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    wanted |= {"fingerprint": tokenizer.fingerprint()} if tokenizer else {"settings": _settings(config.tokenizer)}
    family = f"{corpus.name}-{tokenizer.kind if tokenizer else config.tokenizer.kind}"
    found = _find(cache_dir, family, wanted)
    if found:
        return found
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    target = cache_dir / f"{family}-{key}"
    with _writing(cache_dir), _workspace(target) as folder:
        _fill(folder, wanted, config, corpus, data_dir, tokenizer)
        return _publish(folder, target)


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    """What of the config decides how a tokenizer is learned."""
    return {name: getattr(config, name) for name in ("kind", *_LEARNED_WITH.get(config.kind, ()))}


def _find(cache_dir: Path, family: str, wanted: Manifest) -> Prepared | None:
    """A whole folder that holds what is wanted, perhaps named for the settings that gave this tokenizer."""
    for path in sorted(cache_dir.glob(f"{family}-*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            same = all(manifest.get(name) == value for name, value in wanted.items())
        except (OSError, ValueError, AttributeError):
            continue  # what is damaged is replaced when the new one takes its name
        if same and (found := _load(path.parent)):
            return found
    return None


def _load(folder: Path) -> Prepared | None:
    """The prepared corpus in `folder`; None, with a warning, if it is damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        state = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        tokenizer = from_state(state)
        if tokenizer.fingerprint() != manifest["fingerprint"]:
            raise ValueError("tokenizer.json is not the tokenizer of the manifest")
        splits = {split: _tokens(folder, manifest, split) for split in SPLITS}
        return Prepared(tokenizer, manifest["corpus"], manifest["sha256"], folder=folder, **splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the tokens in %s are damaged (%s): they are prepared again", folder, error)
        return None


def _tokens(folder: Path, manifest: Manifest, split: str) -> Tokens:
    dtype, entry = np.dtype(manifest["dtype"]), manifest["splits"][split]
    sizes = {shard["file"]: shard["tokens"] * dtype.itemsize for shard in entry["shards"]}
    documents = {_documents_file(split): 8 * (entry["documents"] + 1)} if entry["documents"] is not None else {}
    for file, expected in (sizes | documents).items():
        size = (folder / file).stat().st_size
        if size != expected:
            raise ValueError(f"{file} has {size} bytes instead of {expected}")
    counts = [shard["tokens"] for shard in entry["shards"]]
    return Tokens([folder / file for file in sizes], counts, dtype.str, [(folder / file, 0) for file in documents])


def _documents_file(split: str) -> str:
    return f"{split}-documents.bin"


@contextmanager
def _writing(cache_dir: Path) -> Iterator[None]:
    """Turn what may go wrong on the disk into a UserError; what goes wrong with the corpus is one already."""
    elsewhere = "name a folder on another disk with cache_dir= or $TINYGPT_CACHE_DIR"
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            message = f"no room left for tokens in {cache_dir.absolute()}"
            raise UserError(message, f"make room, or {elsewhere}") from error
        message = f"cannot write to the cache folder {cache_dir.absolute()}: {error.strerror or error}"
        raise UserError(message, elsewhere) from error


@contextmanager
def _workspace(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, hidden, removed in the end if it still has its name."""
    folder = target.with_name(f".{target.name}.{uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> Prepared:
    """Give the folder its final name, unless another process was first: then its tokens are as good."""
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        winner = _load(target)
        if winner:
            return winner
        _replace(folder, target)
    _sync(target.parent)
    prepared = _load(target)
    assert prepared
    return prepared


def _replace(folder: Path, target: Path) -> None:
    """Put `folder` where something damaged is."""
    with _workspace(target) as rubbish:
        target.rename(rubbish / target.name)
        folder.rename(target)


@dataclass(frozen=True)
class _Survey:
    units: int  # what a split is counted in: documents, or where the text is one, characters
    bytes: int
    sha256: str


def _survey(corpus: Corpus) -> _Survey:
    """Read the whole text once, to know where it splits. Raises UserError if there is none."""
    units, size, digest = 0, 0, hashlib.sha256()
    for chunk in corpus.chunks():
        data = chunk.encode()
        digest.update(data)
        units, size = units + (1 if corpus.documents else len(chunk)), size + len(data)
    if not units:
        raise UserError(f"the corpus {corpus.name} is empty", "a text is needed to train on or to evaluate")
    return _Survey(units, size, digest.hexdigest())


def first_part(units: int, *left_out: float) -> int:
    """How many of so many characters or documents come before these fractions: exact, where int(10 * (1 - 0.9)) is 0."""
    return int(units * (1 - sum(Fraction(str(fraction)) for fraction in left_out)))


def _fill(
    folder: Path,
    wanted: Manifest,
    config: DataConfig,
    corpus: Corpus,
    data_dir: Path,
    tokenizer: Tokenizer | None,
) -> None:
    """Write the shards, the tokenizer and the manifest of the corpus into an empty folder."""
    survey = _survey(corpus)
    train = first_part(survey.units, config.val_fraction, config.test_fraction)
    val = first_part(survey.units, config.test_fraction)
    spans = {"train": (0, train), "val": (train, val), "test": (val, survey.units)}
    tokenizer = tokenizer or build(
        config.tokenizer,
        corpus.chunks,
        lambda: _pieces(corpus, *spans["train"]),
        lambda: gpt2_merges(data_dir),
    )
    writer = _Writer(folder, tokenizer, corpus.documents)
    with _progress(survey) as advance:
        splits = {name: writer.split(name, _pieces(corpus, *span), advance) for name, span in spans.items()}
    if writer.sha256() != survey.sha256:
        raise UserError(f"the corpus {corpus.name} changed while it was being read", "start again when it is complete")
    _write_json(folder / "tokenizer.json", tokenizer.state())
    manifest = {"corpus": corpus.name, "sha256": survey.sha256, "fingerprint": tokenizer.fingerprint()}
    _write_json(folder / "manifest.json", wanted | manifest | {"dtype": writer.dtype.str, "splits": splits})
    _sync(folder)


def _pieces(corpus: Corpus, start: int, stop: int) -> Iterator[str]:
    """The documents from `start` to `stop`; or the characters, cut where it makes no difference to tokens."""
    return islice(corpus.chunks(), start, stop) if corpus.documents else recut(_span(corpus.chunks(), start, stop))


def _span(chunks: Iterable[str], start: int, stop: int) -> Iterator[str]:
    position = 0
    for chunk in chunks:
        if position >= stop:
            return
        part = chunk[max(start - position, 0) : stop - position]
        if part:
            yield part
        position += len(chunk)


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


class _Writer:
    """Encodes the splits of a corpus into shards of SHARD_TOKENS tokens, and hashes the text on the way."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, documents: bool) -> None:
        self.dtype = token_dtype(tokenizer.vocab_size)
        self._folder, self._tokenizer, self._documents = folder, tokenizer, documents
        self._digest, self._position = hashlib.sha256(), 0

    def sha256(self) -> str:
        """That of all text so far."""
        return self._digest.hexdigest()

    def split(self, name: str, pieces: Iterable[str], advance: Callable[[int], None]) -> Manifest:
        """Write the next split; its entry in the manifest."""
        counts, ends = {"characters": 0, "bytes": 0, "tokens": 0}, array("q", [0])
        with _Shards(self._folder, name) as shards:
            for piece in pieces:
                ids = self._encode(piece)
                shards.write(ids.astype(self.dtype, copy=False))
                data = piece.encode()
                self._digest.update(data)
                for unit, amount in zip(counts, (len(piece), len(data), len(ids)), strict=True):
                    counts[unit] += amount
                self._position += len(piece)
                ends.append(counts["tokens"])
                advance(len(data))
        if self._documents:
            _write(self._folder / _documents_file(name), np.array(ends, dtype="<i8").tobytes())
        return {**counts, "documents": len(ends) - 1 if self._documents else None, "shards": shards.entries}

    def _encode(self, piece: str) -> Ids:
        try:
            return self._tokenizer.encode_array(piece)
        except UnknownCharacter as error:  # it counted from the start of the piece
            raise UnknownCharacter(error.character, self._position + error.position) from None


class _Shards:
    """The files of one split, each begun when the one before is full."""

    def __init__(self, folder: Path, split: str) -> None:
        self.entries: list[dict[str, Any]] = []
        self._folder, self._split = folder, split
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._file:
            with self._file as file:
                _flush(file)

    def write(self, ids: Ids) -> None:
        while len(ids):
            if self._file is None or self.entries[-1]["tokens"] == SHARD_TOKENS:
                self._file = self._next()
            part = ids[: SHARD_TOKENS - self.entries[-1]["tokens"]]
            self._file.write(part.tobytes())
            self.entries[-1]["tokens"] += len(part)
            ids = ids[len(part) :]

    def _next(self) -> BinaryIO:
        self._close()
        name = f"{self._split}-{len(self.entries):05d}.bin"
        self.entries.append({"file": name, "tokens": 0})
        return (self._folder / name).open("wb")


def _write_json(path: Path, value: Manifest | State) -> None:
    _write(path, json.dumps(value, indent=1).encode())


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        _flush(file)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make the names in a folder last; other systems than POSIX have no way to ask for it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _progress(survey: _Survey) -> Iterator[Callable[[int], None]]:
    """What to call as bytes are done: a bar on stderr for a big corpus, nothing for a small one."""
    if survey.bytes < _PROGRESS_BYTES:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokenising", total=survey.bytes)
        yield lambda done: progress.advance(task, done)
