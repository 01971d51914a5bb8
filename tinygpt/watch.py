"""Several processes, one run: where one is lost all end, and one of them says why.

A process whose partner has gone would wait for it: gloo notices as the connection breaks, a GPU never does. So every
process looks after the others of its machine, and what ends one is told to the first, which speaks for all.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed
from lightning.pytorch.strategies.launchers import subprocess_script
from torch._C._distributed_c10d import PrefixStore, TCPStore

from tinygpt.config import UserError
from tinygpt.ranks import has_lost_contact, launched
from tinygpt.summary import way_on

PARENT = "TINYGPT_PARENT"  # the pid of the process that started this one for the same run
INTERVAL = 0.5  # seconds from one look to the next
GRACE = 8.0  # seconds in which a process may leave by itself
KEY = "tinygpt/failed"
KILLED = "has gone (killed, or out of memory)"


class Lost(UserError):
    """Another process of the run has ended, so this one cannot go on."""

    code = 1


class Watch(L.Callback):
    """Ends this process when another one of the run is lost. Comes last; use as `with watch.over(trainer):`."""

    def __init__(self, run_dir: Path, again: bool) -> None:
        """again: whether the same command goes on with the run (resume=auto)."""
        self.run_dir, self.again = str(run_dir), again
        self.host, self.launcher = socket.gethostname(), os.getppid() if launched() else None
        self.members: list[dict[str, Any]] = []  # host, pid and run_dir of every rank
        self.leaving = threading.Event()

    @contextlib.contextmanager
    def over(self, trainer: L.Trainer) -> Iterator[None]:
        """Inside, other processes are looked after; exceptions leave as what this process is to say, or in silence."""
        self.trainer = trainer
        if trainer.world_size == 1:
            yield
            return
        # Lightning's own observer kills the first process too, without a word.
        subprocess_script._launch_process_observer = lambda _: None  # type: ignore[attr-defined, assignment]
        if self.launcher is None and trainer.local_rank == 0:
            os.environ[PARENT] = str(os.getpid())
        threading.Thread(target=self.look_after, daemon=True).start()
        try:
            join_again(trainer)
            yield
        except Exception as error:
            what = self.account_for(error)
            if what is error:
                raise
            raise what from error
        finally:
            self.leaving.set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.world_size > 1:
            members: list[dict[str, Any]] = [{}] * trainer.world_size
            me = {"host": self.host, "pid": os.getpid(), "run_dir": self.run_dir}
            torch.distributed.all_gather_object(members, me)
            self.members = members

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.strategy.barrier()  # whoever ends from here on is not missed
        self.leaving.set()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.leaving.set()
        if trainer.world_size > 1 and has_lost_contact(exception) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes before we have said what happened

    # Who is there

    @property
    def children(self) -> list[Any]:
        """The processes that this one has started for the run."""
        return getattr(self.trainer.strategy.launcher, "procs", [])

    def gone(self) -> dict[int, str]:
        """What is known of the end of those on this machine that have ended, by rank."""
        first, found = self.trainer.global_rank - self.trainer.local_rank, dict[int, str]()
        for rank, child in enumerate(self.children, first + 1):
            if child.poll() is not None:
                found[rank] = in_words(child.returncode)
        if self.launcher is None and is_gone(int(os.environ[PARENT])):
            found[first] = KILLED
        for rank, member in enumerate(self.members):
            if rank not in found and member["host"] == self.host and is_gone(member["pid"]):
                found[rank] = KILLED
        return found

    def orphaned(self) -> bool:
        """Whether what has started this process has ended (torchrun, srun)."""
        return self.launcher is not None and os.getppid() != self.launcher

    def speaks(self, gone: dict[int, str]) -> bool:
        """Whether it is for this process to say that others have gone: the first one that is left on its machine."""
        here = [rank for rank, member in enumerate(self.members) if member["host"] == self.host]
        first = self.trainer.global_rank - self.trainer.local_rank
        here = here or list(range(first, first + self.trainer.num_devices))
        left = here if self.orphaned() else [rank for rank in here if rank not in gone]
        return min(left) == self.trainer.global_rank

    def look_after(self) -> None:
        """What the thread does: for a process that waits for another one in vain, and can do nothing else."""
        while not self.leaving.wait(INTERVAL):
            if self.orphaned() or (self.gone() and not self.leaving.wait(GRACE)):
                gone = self.gone()
                if self.speaks(gone):
                    error = self.describe(gone, self.heard(gone))
                    print(f"error: {error}\nhint: {error.hint}", file=sys.stderr, flush=True)
                self.end_children()
                os._exit(1)

    def end_children(self) -> None:
        for child in self.children:
            child.kill()

    # What is said

    def account_for(self, error: Exception) -> BaseException:
        """What this process leaves with: its own error, that of another one, or an exit code alone."""
        if has_lost_contact(error):
            return self.account_for_others(error)
        self.end_children()
        if self.trainer.is_global_zero:
            self.tell({})
            return error
        code = getattr(error, "code", 1)
        report = {"rank": self.trainer.global_rank, "error": one_line(error), "hint": getattr(error, "hint", "")}
        report["traceback"] = "" if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        return SystemExit(code) if self.tell(report) else error

    def account_for_others(self, error: Exception) -> BaseException:
        leave_within(GRACE)
        end = time.monotonic() + 2
        while (heard := self.heard(gone := self.gone())) is None and not gone and time.monotonic() < end:
            time.sleep(0.1)
        self.end_children()
        if not self.speaks(gone) or heard == {}:
            return SystemExit(1)
        if heard and heard["traceback"]:
            print(heard["traceback"], end="", file=sys.stderr)
        return self.describe(gone, heard, one_line(error))

    def describe(self, gone: dict[int, str], heard: dict[str, Any] | None, otherwise: str = "") -> Lost:
        world, step = self.trainer.world_size, self.trainer.global_step
        if self.orphaned():
            message = f"the launcher has ended, at step {step}, and its processes with it"
        elif heard:
            message = f"process {heard['rank']} of {world} failed at step {step}: {heard['error']}"
        elif gone:
            rank, end = min(gone.items())
            message = f"process {rank} of {world} {end}, at step {step}"
        else:
            message = f"process {self.trainer.global_rank} of {world} has lost the others at step {step}: {otherwise}"
        run_dir = self.members[0]["run_dir"] if self.members else self.run_dir
        return Lost(message, (heard or {}).get("hint") or way_on(Path(run_dir), self.again))

    def tell(self, report: dict[str, Any]) -> bool:
        """Leave word for those who will miss this process; whether there was where to."""
        try:
            store().set(KEY, json.dumps(report))
        except (RuntimeError, ValueError):
            return False
        return True

    def heard(self, gone: dict[int, str]) -> dict[str, Any] | None:
        """Word that was left: {} where its process has said it already."""
        if self.orphaned() or (0 in gone and not torchrun_keeps_the_store()):
            return None
        try:
            return json.loads(store().get(KEY)) if store().check([KEY]) else None
        except (RuntimeError, ValueError):
            return None


def join_again(trainer: L.Trainer) -> None:
    """Join the processes that torchrun has started again, under a name of this life: its store still has the addresses of
    those before them, on which gloo and NCCL would wait. Lightning takes the group as it is."""
    life = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not life or not torchrun_keeps_the_store():
        return
    device, world = trainer.strategy.root_device, trainer.world_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = TCPStore(address, port, world, is_master=False, wait_for_workers=False)
    backend = torch.distributed.Backend.default_device_backend_map[device.type]
    own = PrefixStore(f"life-{life}", kept)
    torch.distributed.init_process_group(backend, store=own, rank=trainer.global_rank, world_size=world)


def torchrun_keeps_the_store() -> bool:
    """Else the first process does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def leave_within(seconds: float) -> None:
    """What there is left to do may wait for the others as well: closing the connection to them, on a GPU."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()


def store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def is_gone(pid: int) -> bool:
    """Whether a process has ended, be it that its parent has not yet asked how."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    with contextlib.suppress(OSError):  # not Linux
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] in "ZX"
    return False


def in_words(returncode: int) -> str:
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:500]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
