"""A job of a sweep whose training takes several processes: a torchrun of its own.

Hydra's multirun would have every process that Lightning starts run the whole sweep again (and under a search train with
values of its own). Here each job is one command, with its overrides spelt out and a run directory that is fixed.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from tinygpt.config import UserError
from tinygpt.ranks import requeue

JOB = "TINYGPT_SWEEP_JOB"  # in the environment of a job's processes: their arguments are in Hydra's grammar already
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def processes(trainer: dict[str, Any]) -> int:
    """How many a run takes, by its trainer settings. UserError where they are of more than one machine."""
    nodes = trainer.get("num_nodes")
    if isinstance(nodes, int) and nodes > 1:
        raise UserError("a job of a sweep runs on one machine", "leave trainer.num_nodes out, or start the runs one by one")
    devices = trainer.get("devices", 1)
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len(devices.strip(",").split(","))
    if str(devices).isdigit():
        return int(devices)
    if devices not in ("auto", -1, "-1", None) or trainer.get("accelerator") in ("cpu", "mps"):
        return 1
    import torch

    return torch.cuda.device_count() or 1


def torchrun(script: str, overrides: Sequence[str], run_dir: Path, count: int) -> int:
    """Run the job in `count` processes and give the exit code of the first that failed.

    A signal is passed on to them; when they have saved and left it raises SystemExit(128 + signal).
    """
    launcher = [sys.executable, "-m", "tinygpt.launch", "--standalone", f"--nproc-per-node={count}"]
    quoted = str(run_dir).replace("\\", "\\\\").replace("'", "\\'")
    command = [*launcher, script, *overrides, f"hydra.run.dir='{quoted}'"]
    package = str(Path(__file__).parents[1])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    threads = os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))  # which the trainer divides; torchrun would say 1
    environment = {**os.environ, JOB: run_dir.name, "PYTHONPATH": search, "OMP_NUM_THREADS": threads}
    # A session of its own: Ctrl-C in the terminal reaches this process alone, which passes it on once.
    with subprocess.Popen(command, env=environment, start_new_session=True) as process, passing_on(process):
        return process.wait()


@contextlib.contextmanager
def passing_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Signals go to `process`. torchrun knows SIGINT and SIGTERM; SIGUSR1 would end it before its workers have saved."""
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if signal.SIGUSR1 in received:
        requeue()
        raise SystemExit(128 + signal.SIGTERM)
    if received:
        raise SystemExit(128 + received[0])


def main() -> None:
    """torchrun, but for its end: the exit code of the process that failed first, and no report after what that has said."""
    die_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # SLURM may tell all processes of a job: the workers answer
    os.environ.setdefault("LOGLEVEL", "CRITICAL")  # some of its loggers read this, when they are imported
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as run

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(sys.argv[1:])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)


def die_with_parent() -> None:
    """Where the sweep is killed, its job is told to save and leave (Linux)."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
