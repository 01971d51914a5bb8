"""Text to token shards on disk, once: in bounded memory, all or nothing, for all who ask for the same tokens.

A prepared corpus is a folder below the cache: `train-00000.bin`, `val-00000.bin` and so on (little-endian
ids, nothing else), `train-documents.bin` where the corpus is made of documents, `tokenizer.json`, and a
`manifest.json` that says what they are. It is built under a temporary name and renamed, so that a folder
with the final name is whole, whoever was killed on the way; the next one goes on where that one stopped.
"""

import errno
import hashlib
import json
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tinygpt.config import DataConfig, TokenizerConfig, UserError
from tinygpt.corpus import Corpus, gpt2_merges, open_corpus
from tinygpt.meter import progress
from tinygpt.pieces import SPLITS, Reader, StreamReader, Survey, TextReader, ahead, batches, changed, sizes, training_texts
from tinygpt.tokenizer import Texts, Tokenizer, build, from_state, token_dtype
from tinygpt.tokens import Tokens
from tinygpt.workspace import private, workspace
from tinygpt.writer import JOURNAL, Manifest, Writer, documents_file, encoded, encoder, sync, write_json

log = logging.getLogger(__name__)

FORMAT, READABLE = 3, (2, 3)  # in 2, ids of at most 256 kinds took two bytes

_PROBE, _PROBES = 2**10, 16  # tokens that are looked at at once when a prepared corpus is opened, and how often
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LEARNED_WITH = {"word": ("min_frequency", "specials"), "bpe": ("vocab_size",)}


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
    """The corpus as tokens: from the cache, or built now, which goes on where an interrupted process stopped.

    With a `tokenizer` the text is encoded by it, whatever the config says of tokenizers. Raises UserError
    where the text cannot be had, read or encoded, or the cache not be written.
    """
    corpus = open_corpus(config, data_dir)
    wanted = {"format": FORMAT, "source": corpus.fingerprint}
    wanted |= {"val_fraction": config.val_fraction, "test_fraction": config.test_fraction}
    wanted |= {"fingerprint": tokenizer.fingerprint()} if tokenizer else {"settings": _settings(config.tokenizer)}
    family = f"{corpus.name}-{tokenizer.kind if tokenizer else config.tokenizer.kind}"
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    target = cache_dir / f"{family}-{key}"
    if found := _find(target, family, wanted):
        return found
    with _writing(cache_dir), workspace(target) as folder:
        found = _find(target, family, wanted)  # another process may have been first
        if not found:
            if not (folder / "manifest.json").exists():  # else it was killed when only the name was left to give
                _fill(folder, wanted, config, corpus, data_dir, tokenizer)
            found = _publish(folder, target)
        return found


def _settings(config: TokenizerConfig) -> dict[str, Any]:
    """What of the config decides how a tokenizer is learned."""
    return {name: getattr(config, name) for name in ("kind", *_LEARNED_WITH.get(config.kind, ()))}


def _find(target: Path, family: str, wanted: Manifest) -> Prepared | None:
    """A whole folder that holds what is wanted: `target`, or one beside it, perhaps named for the settings that gave this
    tokenizer."""
    for path in sorted(target.parent.glob(f"{family}-*/manifest.json"), key=lambda path: (path.parent != target, path)):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            same = all(manifest.get(name) == value for name, value in wanted.items() if name != "format")
            same = same and manifest.get("format") in READABLE
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
        size = tokenizer.vocab_size
        if manifest["dtype"] not in (token_dtype(size).str, token_dtype(max(size, 257)).str):
            raise ValueError(f"tokens are {manifest['dtype']}")
        splits = {split: _tokens(folder, manifest, split) for split in SPLITS}
        for tokens in splits.values():
            _refuse_foreign(tokens, tokenizer.vocab_size)
        return Prepared(tokenizer, manifest["corpus"], manifest["sha256"], folder=folder, **splits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("the tokens in %s are damaged (%s): they are prepared again", folder, error)
        return None


def _tokens(folder: Path, manifest: Manifest, split: str) -> Tokens:
    dtype, entry = np.dtype(manifest["dtype"]), manifest["splits"][split]
    sizes = {shard["file"]: shard["tokens"] * dtype.itemsize for shard in entry["shards"]}
    documents = {documents_file(split): 8 * (entry["documents"] + 1)} if entry["documents"] is not None else {}
    for file, expected in (sizes | documents).items():
        size = (folder / file).stat().st_size
        if size != expected:
            raise ValueError(f"{file} has {size} bytes instead of {expected}")
    counts = [shard["tokens"] for shard in entry["shards"]]
    if sum(counts) != entry["tokens"]:
        raise ValueError(f"{split} has {sum(counts)} tokens instead of {entry['tokens']}")
    return Tokens([folder / file for file in sizes], counts, dtype.str, [(folder / file, 0) for file in documents])


def _refuse_foreign(tokens: Tokens, vocab_size: int) -> None:
    """ValueError where the files hold something else than tokens, such as those of a machine of another byte order.

    Of many tokens a part is looked at: damage to single ones is not found.
    """
    length = min(len(tokens), _PROBE)
    starts = np.linspace(0, len(tokens) - length, num=1 + (len(tokens) > length) * _PROBES, dtype=np.int64)
    if length and tokens.windows(starts, length).max() >= vocab_size:
        raise ValueError("there are tokens that the tokenizer does not have")
    ends = tokens.documents
    if ends is not None and (ends[0] != 0 or ends[-1] != len(tokens) or (np.diff(ends) < 0).any()):
        raise ValueError("its documents begin and end outside the tokens")


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


def _publish(folder: Path, target: Path) -> Prepared:
    """Give the folder its final name, unless another process was first: then its tokens are as good."""
    (folder / JOURNAL).unlink(missing_ok=True)
    sync(folder)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        winner = _load(target)
        if winner:
            return winner
        _replace(folder, target)
    sync(target.parent)
    prepared = _load(target)
    assert prepared
    return prepared


def _replace(folder: Path, target: Path) -> None:
    """Put `folder` where something damaged is."""
    with private(target) as rubbish:
        target.rename(rubbish / target.name)
        folder.rename(target)


def _fill(
    folder: Path,
    wanted: Manifest,
    config: DataConfig,
    corpus: Corpus,
    data_dir: Path,
    tokenizer: Tokenizer | None,
) -> None:
    """Write the shards, the tokenizer and the manifest of the corpus into the folder, or the rest of them."""
    journal = _journal(folder, wanted)
    if journal:
        tokenizer = from_state(_read_json(folder / "tokenizer.json"))
    else:
        journal, tokenizer = _begin(folder, wanted, config, corpus, data_dir, tokenizer)
    place, survey = journal.get("place"), journal["survey"]
    reader: Reader = (
        StreamReader(corpus.stream, config, place)
        if corpus.stream
        else TextReader(corpus, sizes(survey["units"], config), place)
    )
    writer = Writer(folder, tokenizer.vocab_size, reader.documents, journal)
    with progress(survey.get("characters"), config.max_documents, place) as show:
        coming = batches(reader) if corpus.stream else ahead(batches(reader))  # Ctrl-C is not to wait for a network
        for batch, ids in encoded(coming, encoder(tokenizer, corpus.stream is not None)):
            writer.write(batch, ids)
            show(batch.place)
    splits, end = writer.close(), reader.place()
    if corpus.stream:
        _refuse_empty(corpus, config, splits)
    elif end["characters"] != survey["characters"] or open_corpus(config, data_dir).fingerprint != corpus.fingerprint:
        raise changed(corpus)
    manifest = {"corpus": corpus.name, "sha256": end["sha256"], "fingerprint": tokenizer.fingerprint()}
    write_json(folder / "manifest.json", wanted | manifest | {"dtype": writer.dtype.str, "splits": splits})


def _journal(folder: Path, wanted: Manifest) -> Manifest | None:
    """How far an interrupted process came; None where it had not finished a part."""
    try:
        journal = _read_json(folder / JOURNAL)
    except (OSError, ValueError):
        return None
    return journal if journal.get("wanted") == wanted else None


def _begin(
    folder: Path, wanted: Manifest, config: DataConfig, corpus: Corpus, data_dir: Path, tokenizer: Tokenizer | None
) -> tuple[Manifest, Tokenizer]:
    """Read the text once, to know where it splits, and learn the tokenizer; a stream is read for what is learned alone."""
    for path in folder.iterdir():
        path.unlink()
    survey = Survey(corpus)
    if corpus.stream:
        texts: Texts = corpus.chunks
    elif tokenizer is None and config.tokenizer.kind == "char":
        texts = survey.read  # both at once
    else:
        texts = corpus.chunks
        deque(survey.read(), maxlen=0)
    tokenizer = tokenizer or build(
        config.tokenizer,
        texts,
        lambda: training_texts(corpus, config, survey.units),
        lambda: gpt2_merges(data_dir),
    )
    write_json(folder / "tokenizer.json", tokenizer.state())
    known = {} if corpus.stream else {"units": survey.units, "characters": survey.characters}
    journal = {"wanted": wanted, "survey": known}
    write_json(folder / JOURNAL, journal)
    return journal, tokenizer


def _refuse_empty(corpus: Corpus, config: DataConfig, splits: Manifest) -> None:
    """A split by chance may leave nothing to validate on."""
    documents = {name: entry["documents"] for name, entry in splits.items()}
    for name in ("train", "val"):
        if not documents[name]:
            raise UserError(
                f"of the {sum(documents.values())} documents of {corpus.name} none is in the {name} split",
                f"read more of them (data.max_documents), or change data.val_fraction={config.val_fraction}",
            )


def _read_json(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value
