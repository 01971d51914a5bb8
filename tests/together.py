"""Several processes of one run, as torchrun would start them, but forked from this one, so that nothing is imported again;
and where to find the processes of a run that was started for real."""

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import torch
from scripts import run_inside

LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "TINYGPT_PARENT")


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def places(machines=1, store=None, life=0, count=2):
    """What torchrun puts into the environment of each of `count` processes, on one machine or on two. `store`, a TCPStore,
    is what it keeps while it starts them again; life says how often it has."""
    shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count // machines, "GROUP_WORLD_SIZE": machines}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "TORCHELASTIC_RUN_ID": "test"}
    if store:
        shared |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": life}
    for rank in range(count):
        own = {"RANK": rank, "LOCAL_RANK": rank % (count // machines), "GROUP_RANK": rank * machines // count}
        yield {name: str(value) for name, value in {**shared, **own}.items()}


def tasks():
    """What srun puts into the environment of each of two tasks of a job."""
    shared = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NNODES": 1, "JOB_ID": 12, "JOB_NAME": "run", "NODELIST": "127.0.0.1"}
    for rank in (0, 1):
        own = {**shared, "PROCID": rank, "LOCALID": rank, "NODEID": 0}
        yield {f"SLURM_{name}": str(value) for name, value in own.items()}


def together(work, environments=None):
    """What work(rank) gives in each process of a run, of two unless told otherwise; None where one dies."""
    context, started = multiprocessing.get_context("fork"), []
    for rank, place in enumerate(environments or places()):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=alone, args=(sender, work, rank, place))
        process.start()
        sender.close()
        started.append((process, receiver))
    return [result(*one) for one in started]


def alone(sender, work, rank, place):
    os.environ.update(place)
    torch.set_num_threads(1)  # the threads of the process that this one was forked from are not here
    sender.send(work(rank))


def result(process, receiver, seconds=60):
    try:
        return receiver.recv() if receiver.poll(seconds) else None
    except EOFError:
        return None
    finally:
        process.join(10)
        process.kill()


def train_together(*arguments, cwd, before=lambda rank: None, environments=None):
    """What each of the two processes of `train.py arguments` said and returned. before(rank) comes first in each."""

    def work(rank):
        before(rank)
        return run_inside("train", *arguments, cwd=cwd)

    return together(work, environments)


@contextlib.contextmanager
def started(folder, *words):
    """A command and all that it starts, as a terminal's job, of which nothing is left at the end."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=folder, env=environment(), start_new_session=True, **streams)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        if not process.stdout.closed:
            process.communicate()


def environment():
    """That of a process that no launcher has started."""
    return {**{k: v for k, v in os.environ.items() if k not in LAUNCHER}, "OMP_NUM_THREADS": "1"}


def ranks_below(pid):
    """{rank: pid} of the processes below `pid` that were started as one of several."""
    found, parents = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid != child:
            place = dict(item.partition("=")[::2] for item in read_environment(child))
            if rank := place.get("RANK", place.get("LOCAL_RANK")):
                found[int(rank)] = child
    return found


def read_environment(pid):
    try:
        return Path(f"/proc/{pid}/environ").read_text().split("\0")
    except OSError:
        return []


def wait_until(holds, process=None, seconds=60):
    """The first true value of holds(), while `process` lives."""
    end = time.monotonic() + seconds
    while not (value := holds()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return value
