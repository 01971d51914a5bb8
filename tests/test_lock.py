"""A run directory is one process's: a second one is refused, and a dead one holds nothing."""

import os
import signal
import socket
import subprocess
import sys

import pytest
from scripts import SMALL, run_inside
from tiny import corpus

from tinygpt import lock
from tinygpt.config import UserError

HOLD = """import sys, time; from pathlib import Path; from tinygpt import lock
with lock.held(Path(sys.argv[1])): print(flush=True); {}"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format("time.sleep(60)"), tmp_path], stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_directory_in_use_is_refused_with_who_uses_it(tmp_path, holder):
    who = f"in use by process {holder.pid} on {socket.gethostname()}"
    for attempt in (lambda: lock.refuse_in_use(tmp_path), lambda: lock.held(tmp_path).__enter__()):
        with pytest.raises(UserError, match=who):
            attempt()


def test_a_process_that_was_killed_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / lock.NAME).exists()
    lock.refuse_in_use(tmp_path)
    with lock.held(tmp_path):
        assert (tmp_path / lock.NAME).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
    assert not (tmp_path / lock.NAME).exists()


def test_a_worker_that_outlives_the_run_holds_nothing(tmp_path):
    """Forked loader workers live on for a while when the run is killed."""
    fork = "pid = __import__('os').fork(); print(pid, flush=True) if pid else None; time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(fork), tmp_path], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    worker = int(process.stdout.readline())
    process.kill()
    process.wait()
    try:
        with lock.held(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        process.stdout.close()


def test_a_second_train_is_refused_and_changes_nothing(tmp_path, holder):
    arguments = ("data=text", f"data.path={corpus(tmp_path)}", *SMALL, "trainer=cpu", "trainer.max_steps=2")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*")}
    done = run_inside("train", *arguments, f"hydra.run.dir={tmp_path}", cwd=tmp_path)
    assert done.code == 2
    assert f"error: {tmp_path} is in use by process {holder.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*")} == before
