"""Where text comes from: the reference inside CPython, known files with a checksum, or the user's own files.

A corpus is read in chunks, as often as is needed, in bounded memory. Text is UTF-8 and arrives as it is
written: line ends are not translated (CRLF stays CRLF), and only a byte order mark at the start of a file is
dropped.
"""

import codecs
import glob
import gzip
import hashlib
import json
import logging
import lzma
import os
import platform
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple
from uuid import uuid4

from tinygpt.config import DataConfig, UserError

if TYPE_CHECKING:
    from requests import Response, Session

CHUNK_SIZE = 2**20
"""Bytes of a file (characters of a text in memory) that are read at a time."""

_TIMEOUT = (10, 60)  # seconds to connect, and between two packets
_BINARY_PROBE = 2**13


def data_dir(value: str | None) -> Path:
    """Where corpora live: `value`, else $TINYGPT_DATA_DIR, else data/."""
    return Path(value or os.environ.get("TINYGPT_DATA_DIR") or "data").expanduser()


def cache_dir(value: str | None) -> Path:
    """Where tokens are kept: `value`, else $TINYGPT_CACHE_DIR, else data/cache."""
    return Path(value or os.environ.get("TINYGPT_CACHE_DIR") or "data/cache").expanduser()


@dataclass(frozen=True)
class Corpus:
    """A text with a name.

    `fingerprint` changes when the text does, and is cheap: it does not read the user's files.
    """

    name: str
    fingerprint: str
    read: Callable[[], Iterator[str]]

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


class Download(NamedTuple):
    """A public file: where it is, the sha256 of its content, and its path below its folder."""

    url: str
    sha256: str
    path: str


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


def gpt2_merges(data_dir: Path) -> Path:
    """OpenAI's `vocab.bpe`, from $TIKTOKEN_CACHE_DIR or data_dir/tiktoken_cache; downloaded if in neither."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR")
    folders = [Path(named)] if named else []
    folders.append(data_dir / "tiktoken_cache")
    present = [folder for folder in folders if (folder / GPT2_MERGES.path).exists()]
    return obtain(GPT2_MERGES, (present or folders)[0])


def obtain(download: Download, folder: Path) -> Path:
    """The file below `folder`, downloaded if it is not there.

    Raises UserError if it is not what it should be.
    """
    path = folder / download.path
    with _reading(path):
        found = _sha256(path) if path.exists() else None
    if found is None:
        fetch(download.url, download.sha256, path)
    elif found != download.sha256:
        raise UserError(
            f"{path} is not the file it should be: its sha256 is {found}, expected {download.sha256}",
            f"delete it to have it downloaded again, or put {download.url} there",
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, sha256: str, target: Path) -> None:
    """Download `url` to `target`, which appears only when it is whole and its sha256 is right.

    Raises UserError.
    """
    import requests

    advice = f"put the file {url} (sha256 {sha256}) in the folder {target.parent.absolute()} as {target.name}"
    part = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        found = _download(url, part)
        if found != sha256:
            raise UserError(f"{url} has changed: its sha256 is {found}, expected {sha256}", advice)
        part.replace(target)
    except requests.RequestException as error:
        raise UserError(f"cannot download {url} ({_reason(error)})", advice) from error
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}"
        raise UserError(message, f"{advice}; or name another folder with data_dir= or $TINYGPT_DATA_DIR") from error
    finally:
        _remove(part)


def _reason(error: Exception) -> str:
    """The innermost cause in words: the outer ones repeat the address and object names."""
    inner: BaseException = error
    while (below := getattr(inner, "reason", None) or inner.__context__) and isinstance(below, BaseException):
        inner = below
    return getattr(inner, "strerror", None) or str(inner)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # its folder never was, or may not be written: an error about that is on its way


def _download(url: str, target: Path) -> str:
    """Write the body of `url` to `target`; its sha256."""
    from rich.console import Console
    from rich.progress import Progress

    digest = hashlib.sha256()
    with _session() as session, session.get(url, stream=True, timeout=_TIMEOUT) as response:
        response.raise_for_status()
        with target.open("wb") as file, Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(f"downloading {url.rsplit('/', 1)[-1]}", total=_size(response))
            for block in response.iter_content(2**16):
                file.write(block)
                digest.update(block)
                progress.advance(task, len(block))
    return digest.hexdigest()


def _session() -> "Session":
    from requests import Session
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns at each retry; the error says it all
    session = Session()
    adapter = HTTPAdapter(max_retries=Retry(3, backoff_factor=0.2, status_forcelist=(429, 500, 502, 503, 504)))
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _size(response: "Response") -> int | None:
    size = response.headers.get("Content-Length", "")
    return int(size) if size.isdecimal() else None


def _text(config: DataConfig, data_dir: Path) -> Corpus:  # noqa: ARG001 (the path is the user's)
    assert config.path
    with _reading(Path(config.path)):
        paths = find_files(config.path)
        seen = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    if not any(size for _, size, _ in seen):
        raise UserError(f"data.path={config.path} is empty", "a text is needed to train on or to evaluate")
    fingerprint = hashlib.sha256(json.dumps(seen).encode()).hexdigest()
    return Corpus("text", fingerprint, lambda: _read_files(paths))


_CORPORA: dict[str, Callable[[DataConfig, Path], Corpus]] = {
    "pydocs": _pydocs,
    "shakespeare": _shakespeare,
    "text": _text,
}


def find_files(path: str) -> list[Path]:
    """The regular files that `path` names: a file, a folder (all below it but hidden ones) or a glob; sorted.

    Raises UserError where there are none.
    """
    place = Path(path).expanduser()
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
    with _reading(path), _open(path) as file:
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


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)  # type: ignore[return-value]  # it is one in all but name
    return lzma.LZMAFile(path) if path.suffix == ".xz" else path.open("rb")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn what may go wrong with a file into a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}", "it cannot be unpacked: get it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "check that it is there and readable") from error


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
