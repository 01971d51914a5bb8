"""Where text comes from: the reference inside CPython, known files with a checksum, the user's own files, or the hub.

A corpus is read in chunks, as often as is needed, in bounded memory. Text is UTF-8 and arrives as it is
written: line ends are not translated (CRLF stays CRLF), and only a byte order mark at the start of a file is
dropped.
"""

import codecs
import glob
import hashlib
import json
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from tinygpt import imdb
from tinygpt.config import DataConfig, UserError
from tinygpt.files import Download, expanded, obtain, open_packed, reading
from tinygpt.streams import Stream
from tinygpt.synthetic import Source

CHUNK_SIZE = 2**20
"""Bytes of a file (characters of a text in memory) that are read at a time."""

_BINARY_PROBE = 2**13


def data_dir(value: str | None) -> Path:
    """Where corpora live: `value`, else $TINYGPT_DATA_DIR, else data/."""
    return expanded(value or os.environ.get("TINYGPT_DATA_DIR") or "data")


def cache_dir(value: str | None) -> Path:
    """Where tokens are kept: `value`, else $TINYGPT_CACHE_DIR, else data/cache."""
    return expanded(value or os.environ.get("TINYGPT_CACHE_DIR") or "data/cache")


@dataclass(frozen=True)
class Corpus:
    """A text with a name.

    `fingerprint` changes when the text does, and is cheap: it does not read the user's files. Where the corpus is made of
    `documents`, each chunk is one of them, and each begins with a newline.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]
    documents: bool = False
    stream: Stream | None = None  # where the documents are read from once, and gone on with

    def chunks(self) -> Iterator[str]:
        """The text from its start, about CHUNK_SIZE at a time.

        Raises UserError where a file cannot be read as text.
        """
        return self.read()


def open_corpus(config: DataConfig, data_dir: Path) -> Corpus:
    """The corpus that the config names; downloads it if `data_dir` has no copy.

    Raises UserError if there is none.
    """
    return _CORPORA[config.corpus](config, data_dir)


def _pydocs(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (it needs neither)
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError(
            "this Python has no language reference inside (pydoc_data.topics), which data=pydocs is made of",
            "install your system's full Python package, or use another corpus: data=text data.path=my.txt",
        ) from None
    text = "\n\n".join(topics[name] for name in sorted(topics))
    content = hashlib.sha256(text.encode()).hexdigest()
    return Corpus("pydocs", f"{platform.python_version()} {content}", lambda: _slices(text))


def _slices(text: str) -> Iterator[str]:
    return (text[start : start + CHUNK_SIZE] for start in range(0, len(text), CHUNK_SIZE))


SHAKESPEARE = Download(
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    "tinyshakespeare/input.txt",
)
# tiktoken keeps a file under the SHA-1 of its address: so we find its copy, and it finds ours.
GPT2_MERGES = Download(
    "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe",
    "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "6d1cbeee0f20b3d9449abfede4726ed8212e3aee",
)


def _shakespeare(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (nothing to configure)
    path = obtain(SHAKESPEARE, data_dir)
    return Corpus("shakespeare", SHAKESPEARE.sha256, lambda: _read_files([path]))


def _gutenberg(repository: str, commit: str, file: str, sha256: str) -> Download:
    return Download(f"https://raw.githubusercontent.com/GITenberg/{repository}/{commit}/{file}", sha256, f"books/{file}")


BOOKS = (
    _gutenberg(
        "Alice-s-Adventures-in-Wonderland_11",
        "7f18748e114b994d5d9454d5793581bc0b9cf9d7",
        "11-0.txt",
        "49a0b2726606e1290ac03a63978fa1dd1bd38a8d805704d98265f393533ea094",
    ),
    _gutenberg(
        "Pride-and-Prejudice_1342",
        "81db45c9c48c592f0b77f01fc59e677ad0a5634e",
        "1342-0.txt",
        "48e0522844402a86a3ea98f0947ba85ea54838db3c59022299298ed968a5a163",
    ),
    _gutenberg(
        "The-Adventures-of-Sherlock-Holmes_1661",
        "7e5dd2703fbf503c004063e96ab7c61262375e5f",
        "1661.txt",
        "2a0ce5568625a304f54fbb6bfdeeadf527a1437254b5f0e06b5a9e233d4784a2",
    ),
    _gutenberg(
        "War-and-Peace_2600",
        "fa22ab90f00f627e83d14acabe32d91602d2365d",
        "2600-0.txt",
        "6cbcc5ca5e590fb9ace161a5b93e4ecf280d7118104be0d63b686c004cfa70ae",
    ),
    _gutenberg(
        "Moby-Dick--Or-The-Whale_2701",
        "bdf1948e6cd00963730971e5624e764a35f238c3",
        "2701-0.txt",
        "baf9b04fcf6e0008f30eaaa6697277751448c1070b20175e0082f28cbb161fd3",
    ),
)
_BOOK = re.compile(r"^\*\*\* ?START OF [^\n]*\n(.*?)^\*\*\* ?END OF ", flags=re.DOTALL | re.MULTILINE)


def _books(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (nothing to configure)
    paths = [obtain(book, data_dir) for book in BOOKS]
    content = hashlib.sha256("".join(book.sha256 for book in BOOKS).encode()).hexdigest()
    return Corpus("books", content, lambda: _slices("\n\n".join(book_text("".join(_read_file(path))) for path in paths)))


def book_text(text: str) -> str:
    """A Project Gutenberg file without what comes before its START line and after its END line; lines end in a newline."""
    found = _BOOK.search(text.replace("\r\n", "\n"))
    assert found, "a file whose checksum is right has both lines"
    return found[1].strip("\n") + "\n"


def _imdb(config: DataConfig, data_dir: Path) -> Corpus:
    paths = imdb.find(data_dir)
    reviews = cache(lambda: imdb.read_reviews(paths, config.clean))  # the corpus is read several times, and is not large
    fingerprint = f"{imdb.ARCHIVE.sha256} seed={imdb.SEED} clean={config.clean}"
    return Corpus("imdb", fingerprint, lambda: (f"\n{review}" for review in reviews()), documents=True)


def gpt2_merges(data_dir: Path) -> Path:
    """OpenAI's `vocab.bpe`, from $TIKTOKEN_CACHE_DIR or data_dir/tiktoken_cache; downloaded if in neither."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR")
    folders = [Path(named)] if named else []
    folders.append(data_dir / "tiktoken_cache")
    present = [folder for folder in folders if (folder / GPT2_MERGES.path).exists()]
    return obtain(GPT2_MERGES, (present or folders)[0])


def _text(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (the path is the user's)
    assert config.path
    with reading(Path(config.path)):
        paths = find_files(config.path)
        seen = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    if not any(size for _, size, _ in seen):
        raise UserError(f"data.path={config.path} is empty", "a text is needed to train on or to evaluate")
    fingerprint = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    return Corpus("text", fingerprint, lambda: _read_files(paths))


def _hf(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (it is read, not kept)
    stream = Stream.of(config)
    return Corpus(
        stream.name, stream.fingerprint(), lambda: (f"\n{text}" for text in stream.read()), documents=True, stream=stream
    )


def _synthetic(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (it is made here)
    source, length = Source.of(config), config.synthetic_length
    fingerprint = f"{source.symbols} {source.order} {config.synthetic_seed} {length}"
    return Corpus("synthetic", fingerprint, lambda: source.text(length))


_CORPORA: dict[str, Callable[[DataConfig, Path], Corpus]] = {
    "pydocs": _pydocs,
    "shakespeare": _shakespeare,
    "books": _books,
    "imdb": _imdb,
    "text": _text,
    "hf": _hf,
    "synthetic": _synthetic,
}


def find_files(path: str) -> list[Path]:
    """The regular files that `path` names: a file, a folder (all below it but hidden ones) or a glob; sorted.

    Raises UserError where there are none.
    """
    place = expanded(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        return _files_below(place)
    if not glob.has_magic(path):
        raise UserError(
            f"data.path={path} does not exist",
            f"give a file, a folder or a glob; a relative path starts at {Path.cwd()}",
        )
    # glob.glob, not Path.glob: it skips hidden files, and `**` reaches files in every version of Python.
    found = {Path(name) for name in glob.glob(str(place), recursive=True)}  # noqa: PTH207
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UserError(
            f"data.path={path} matches no file",
            f"`*` stays in one folder, `**/*.txt` goes below; a relative glob starts at {Path.cwd()}",
        )
    return files


def _files_below(folder: Path) -> list[Path]:
    files = []
    for place, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(place, name) for name in names if not name.startswith(".")]
    files = sorted(file for file in files if file.is_file())
    if not files:
        raise UserError(f"data.path={folder} holds no files", "hidden files are not counted")
    return files


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename}: {error.strerror}", "check its permissions") from error


def _read_files(paths: Iterable[Path]) -> Iterator[str]:
    """The texts of the files in turn; where one does not end in a newline, one comes before the next."""
    last = "\n"
    for path in paths:
        for number, chunk in enumerate(_read_file(path)):
            if number == 0 and last != "\n":
                yield "\n"
            yield chunk
            last = chunk[-1]


def _read_file(path: Path) -> Iterator[str]:
    """The text of one file. Raises UserError with the place of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with reading(path), open_packed(path) as file:
        _refuse_binary(path, file)
        while True:
            block = file.read(CHUNK_SIZE)
            read += len(block)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, read - len(error.object) + error.start) from None
            if text:
                yield text
            if not block:
                return


def _refuse_binary(path: Path, file: IO[bytes]) -> None:
    head = file.read(_BINARY_PROBE)
    file.seek(0)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path} is UTF-16, not UTF-8", _conversion("UTF-16", path))
    if b"\0" in head:
        raise UserError(
            f"{path} is a binary file: it has a zero byte at offset {head.index(0)}",
            "text is needed, plain or in .gz or .xz; a glob picks files: data.path='folder/**/*.txt'",
        )


def _not_utf8(path: Path, offset: int) -> UserError:
    return UserError(f"{path} is not UTF-8: bad byte at offset {offset}", _conversion("LATIN1", path))


def _conversion(encoding: str, path: Path) -> str:
    return f"convert it, for example: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > converted.txt"
