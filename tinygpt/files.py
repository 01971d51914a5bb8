"""Files: downloaded with a checksum, opened packed or plain, and what may go wrong with them in the user's words."""

import gzip
import hashlib
import logging
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO, NamedTuple
from uuid import uuid4

from tinygpt.config import UserError

if TYPE_CHECKING:
    from requests import Response, Session

_TIMEOUT = (10, 60)  # seconds to connect, and between two packets


class Download(NamedTuple):
    """A public file: where it is, the sha256 of its content, and its path below its folder."""

    url: str
    sha256: str
    path: str


def obtain(download: Download, folder: Path) -> Path:
    """The file below `folder`, downloaded if it is not there.

    Raises UserError if it is not what it should be.
    """
    path = folder / download.path
    with reading(path):
        present = path.exists()
    if present:
        verify(path, download.sha256, f"delete it to have it downloaded again, or put {download.url} there")
    else:
        fetch(download.url, download.sha256, path)
    return path


def verify(path: Path, sha256: str, hint: str) -> None:
    """Raise UserError, with this hint, where the content of a file is another one."""
    with reading(path), path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise UserError(f"{path} is not the file it should be: its sha256 is {found}, expected {sha256}", hint)


def fetch(url: str, sha256: str, target: Path) -> None:
    """Download `url` to `target`, which appears only when it is whole and its sha256 is right.

    What came before the connection broke or the process was killed is kept, and not asked for again. Raises UserError.
    """
    import requests

    advice = f"put the file {url} (sha256 {sha256}) in the folder {target.parent.absolute()} as {target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _part(target) as part:
            found = _download(url, part)
            if found != sha256 and part.resumed:  # the beginning may have been another file's
                part.file.truncate(0)
                found = _download(url, part)
            if found != sha256:
                part.file.truncate(0)
                raise UserError(f"{url} has changed: its sha256 is {found}, expected {sha256}", advice)
            part.path.replace(target)
    except requests.RequestException as error:
        raise UserError(f"cannot download {url} ({_reason(error)})", advice) from error
    except OSError as error:
        message = f"cannot write {target}: {error.strerror or error}"
        raise UserError(message, f"{advice}; or name another folder with data_dir= or $TINYGPT_DATA_DIR") from error


@dataclass
class _Part:
    """The beginning of a download."""

    path: Path
    file: BinaryIO
    resumed: bool = False


@contextmanager
def _part(target: Path) -> Iterator[_Part]:
    """The file beside `target` that an interrupted download left, or a new one; empty, it is removed again.

    Where another process is writing to it, it is a file of this process's own.
    """
    path = target.with_name(f".{target.name}.part")
    file = path.open("a+b")
    if not _locked(file, path):
        file.close()
        path = target.with_name(f".{target.name}.{uuid4().hex}.part")
        file = path.open("a+b")
    with file:
        try:
            yield _Part(path, file)
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _locked(file: BinaryIO, path: Path) -> bool:
    """Whether the file is this process's now, and still has its name: another may just have finished it."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (ImportError, OSError):  # no such locks here, or another process has it
        return False


def _reason(error: Exception) -> str:
    """The innermost cause in words: the outer ones repeat the address and object names."""
    inner: BaseException = error
    while (below := getattr(inner, "reason", None) or inner.__context__) and isinstance(below, BaseException):
        inner = below
    return getattr(inner, "strerror", None) or str(inner)


def _download(url: str, part: _Part) -> str:
    """Append to `part` what it has not yet of the body of `url`; the sha256 of the whole."""
    from rich.console import Console
    from rich.progress import Progress

    start = part.file.seek(0, os.SEEK_END)
    headers = {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {}
    with _session() as session, session.get(url, stream=True, timeout=_TIMEOUT, headers=headers) as response:
        part.resumed = response.status_code == HTTPStatus.PARTIAL_CONTENT
        if response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            response.raise_for_status()
            if not part.resumed:
                part.file.truncate(0)
            with Progress(console=Console(stderr=True), transient=True) as progress:
                done = start if part.resumed else 0
                total = _size(response)
                label = f"downloading {url.rsplit('/', 1)[-1]}"
                task = progress.add_task(label, total=total and total + done, completed=done)
                for block in response.iter_content(2**16):
                    part.file.write(block)
                    progress.advance(task, len(block))
        else:
            part.resumed = True  # it may be whole
    part.file.flush()
    with part.path.open("rb") as whole:
        return hashlib.file_digest(whole, "sha256").hexdigest()


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


def open_packed(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.GzipFile(path)  # type: ignore[return-value]  # it is one in all but name
    return lzma.LZMAFile(path) if path.suffix == ".xz" else path.open("rb")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what may go wrong with a file into a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged: {error}", "it cannot be unpacked: get it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}", "check that it is there and readable") from error


def expanded(path: str) -> Path:
    """With ~ and ~USER as their folders; a name that only begins so stays as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises where there is no such user)
