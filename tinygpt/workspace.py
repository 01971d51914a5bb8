"""The folder in which a corpus is tokenised: one process at a time, whose work the next one goes on with."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from tinygpt.config import UserError
from tinygpt.streams import Unreachable
from tinygpt.writer import JOURNAL

log = logging.getLogger(__name__)


@contextmanager
def workspace(target: Path) -> Iterator[Path]:
    """A hidden folder beside `target`, with what an interrupted process left there; whoever else wants it waits.

    Afterwards it is removed if it still has its name, unless it holds a finished part and what went wrong may pass.
    """
    folder = target.with_name(f".{target.name}.part")
    lock = _lock(folder)
    if lock is None:
        with private(target) as own:
            yield own
        return
    keep = False
    try:
        yield folder
    except BaseException as error:
        keep = (folder / JOURNAL).exists() and (isinstance(error, Unreachable) or not isinstance(error, UserError))
        raise
    finally:
        if not keep and _is_locked_folder(lock, folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@contextmanager
def private(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, hidden, removed in the end if it still has its name."""
    folder = target.with_name(f".{target.name}.{uuid4().hex}")
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """The descriptor of the folder, made if need be and locked; the system unlocks it when the process ends, however it
    does. None where there are no such locks."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # made by another process, and perhaps gone again
            folder.mkdir(exist_ok=True)
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # finished and renamed between the two lines
            continue
        try:
            _wait(fcntl.flock, descriptor, fcntl.LOCK_EX, fcntl.LOCK_NB)
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        if _is_locked_folder(descriptor, folder):
            return descriptor
        os.close(descriptor)


def _wait(flock: Callable[[int, int], None], descriptor: int, exclusive: int, at_once: int) -> None:
    try:
        flock(descriptor, exclusive | at_once)
    except BlockingIOError:
        log.warning("another process is preparing the same corpus: waiting for it")
        flock(descriptor, exclusive)


def _is_locked_folder(descriptor: int, folder: Path) -> bool:
    """Whether the name still stands for the folder of the descriptor: one that is finished has another name."""
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
