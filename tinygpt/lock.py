"""One process at a time in a run directory.

The lock is the system's own, on run.lock, and ends with the process, however that ends. What the file says is who holds it.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from tinygpt.config import UserError

NAME = "run.lock"


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Hold the run directory. Raises UserError where another process does, here or on a machine that shares the disk."""
    path = run_dir / NAME
    with acquire(path) as file:
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is ours: whoever opened it in between sees that it has no name


def refuse_in_use(run_dir: Path) -> None:
    """UserError where a process holds the run directory; nothing is left behind."""
    try:
        if (run_dir / NAME).exists():
            acquire(run_dir / NAME).close()
    except OSError as error:
        raise UserError(f"{run_dir} cannot be written: {error.strerror}", "choose another hydra.run.dir") from error


def acquire(path: Path) -> TextIO:
    """The file, locked and still of that name."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            lock(file)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            file.close()
            raise UserError(
                f"{path.parent} is in use by {holder}", "wait until it ends, or give this run another hydra.run.dir"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def lock(file: TextIO) -> None:
    """Raises BlockingIOError where another process has it; does nothing where the system or the disk has no locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        # A record lock, not flock: loader workers, forked, would inherit that and outlive a process that is killed.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno == errno.EACCES:  # how some systems say it
            raise BlockingIOError(*error.args) from error
