"""A process of a run is killed, or fails alone: all of them end soon, one says why, and torchrun brings the run back."""

import os
import signal
import sys
import time

import pytest
import torch
from scripts import run_inside
from test_ddp import TWO, command
from tiny import column, rows, summary
from together import free_port, places, ranks_below, started, together, train_together, wait_until

from tinygpt import ranks
from tinygpt.checkpoint import open_checkpoint
from tinygpt.lit import LitGPT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")

ENDLESS = ("trainer.max_steps=1000000", "trainer.val_check_interval=20")
SOON = 30  # seconds in which all must have ended


def saved_step(run_dir):
    path = run_dir / "checkpoints" / "last.ckpt"
    return open_checkpoint(path)["global_step"] if path.exists() else 0


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_without_one_process_the_other_ends_and_says_so(victim, tmp_path):
    with started(tmp_path, *command(tmp_path, *TWO, *ENDLESS, "hydra.run.dir=run")) as process:
        wait_until(lambda: saved_step(tmp_path / "run") >= 20, process)
        pids = {0: process.pid, **ranks_below(process.pid)}
        os.kill(pids[victim], signal.SIGKILL)
        _, stderr = process.communicate(timeout=SOON)  # until all that write there have ended
    (error,) = errors(stderr)
    assert error.startswith(f"error: process {victim} of 2 "), stderr
    assert "hint: to go on: python train.py resume=run/checkpoints/last.ckpt" in stderr
    assert "Traceback" not in stderr
    assert process.returncode == (1 if victim == 1 else -signal.SIGKILL)
    if victim == 1:
        assert "was ended by SIGKILL, at step" in error
        assert summary(tmp_path / "run")["status"] == "failed"


OFTEN = ("trainer.val_check_interval=40", "callbacks.last.every_n_steps=3", "model.dropout=0.1", "resume=auto")


@pytest.mark.slow
def test_torchrun_brings_a_killed_run_back_exactly(tmp_path):
    """Rank 1 is killed, then, in the second life, rank 0; the third ends where an undisturbed run ends."""
    steps = ("trainer.max_steps=120", *OFTEN)
    python, *rest = command(tmp_path, *TWO, *steps, "hydra.run.dir=killed")
    launcher = [python, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=3"]
    with started(tmp_path, *launcher, "--master-addr=127.0.0.1", f"--master-port={free_port()}", *rest) as process:
        for victim, step in ((1, 12), (0, 60)):
            wait_until(lambda step=step: saved_step(tmp_path / "killed") >= step, process)
            os.kill(ranks_below(process.pid)[victim], signal.SIGKILL)
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    assert [error.split(" of 2 ")[0] for error in errors(stderr)] == ["error: process 1", "error: process 0"]
    assert stderr.count("hint: the same command goes on from killed/checkpoints/last.ckpt") == 2

    whole = train_together(*command(tmp_path, *TWO, *steps, "hydra.run.dir=whole")[2:], cwd=tmp_path)
    assert [done.code for done in whole] == [0, 0], whole
    assert_same_runs(tmp_path / "killed", tmp_path / "whole")


def untimed(run_dir):
    return [{k: v for k, v in row.items() if k not in ("tokens_per_second", "mfu", "seconds")} for row in rows(run_dir)]


def assert_same_runs(one, two):
    assert untimed(one) == untimed(two)
    for name in ("last", "best"):
        a, b = (open_checkpoint(run / "checkpoints" / f"{name}.ckpt") for run in (one, two))
        for part in ("global_step", "state_dict", "optimizer_states"):
            torch.testing.assert_close(a[part], b[part], rtol=0, atol=0)


def at_step(number, victim, act):
    """For train_together: process `victim` does that at the beginning of a step."""

    def before(rank):
        step = LitGPT.training_step

        def acting(self, batch, batch_idx):
            if rank == victim and self.global_step == number:
                act()
            return step(self, batch, batch_idx)

        LitGPT.training_step = acting

    return before


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise RuntimeError("out of luck")


def test_a_killed_run_goes_on_exactly(tmp_path, quick):
    """As above, but for torchrun, of which only the store is real: rank 1 is killed at step 5, then rank 0 at step 3."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def train(name, life=0, before=lambda rank: None):
        arguments = command(tmp_path, *TWO, "trainer.max_steps=10", *OFTEN, f"hydra.run.dir={name}")[2:]
        environments = places(store=store, life=life) if name == "killed" else None
        return train_together(*arguments, cwd=tmp_path, before=before, environments=environments)

    for life, (victim, step) in enumerate(((1, 5), (0, 3))):  # the second in the first step of its life
        done = train("killed", life, at_step(step, victim, die))
        assert done[victim] is None
        (error,) = errors(done[1 - victim].stderr)
        assert error == f"error: process {victim} of 2 has gone (killed, or out of memory), at step {step}"
        assert "hint: the same command goes on from killed/checkpoints/last.ckpt" in done[1 - victim].stderr
        assert done[1 - victim].code == 1
    assert [one.code for one in train("killed", 2) + train("whole")] == [0, 0, 0, 0]
    assert_same_runs(tmp_path / "killed", tmp_path / "whole")


def test_what_fails_one_process_is_said_by_the_first(tmp_path, quick):
    arguments = command(tmp_path, *TWO, *ENDLESS, "hydra.run.dir=run")[2:]
    first, second = train_together(*arguments, cwd=tmp_path, before=at_step(3, 1, fail))
    assert errors(first.stderr) == ["error: process 1 of 2 failed at step 3: RuntimeError: out of luck"], first.stderr
    assert "hint: to go on: python train.py resume=run/checkpoints/last.ckpt" in first.stderr
    assert first.stderr.count("Traceback") == 1  # that of the process that failed
    assert (first.code, second.code) == (1, 1)
    assert (second.stdout, second.stderr) == ("", "")
    assert summary(tmp_path / "run")["status"] == "failed"
    assert dict(column(tmp_path / "run", "train/loss")).keys() == {1, 2, 3}


def test_an_error_of_all_is_said_by_the_first_before_the_others(tmp_path, monkeypatch):
    """Which torchrun ends meanwhile; there is none here."""
    monkeypatch.setattr(ranks, "PATIENCE", 0.5)
    arguments = command(tmp_path, *TWO, *ENDLESS, "hydra.run.dir=run", "data.global_batch_size=5")[2:]
    (first, one), (second, two) = together(lambda rank: (run_inside("train", *arguments, cwd=tmp_path), time.monotonic()))
    assert errors(first.stderr) == ["error: data.global_batch_size=5 does not divide by 2 devices"]
    assert (first.code, second.code) == (2, 2)
    assert errors(second.stderr) == errors(first.stderr)
    assert two - one > ranks.PATIENCE  # rank 1 waits twice as long; the clock is the machine's
