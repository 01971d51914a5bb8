"""Two processes on one CPU: one run, the same numbers as one process, one voice, one clean end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import run_inside
from tiny import column, corpus, summary
from together import environment, free_port, places, started, tasks, train_together, wait_until

from tinygpt.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[1]
TWO = ("trainer=ddp_cpu", "trainer.devices=2")


def command(folder, *overrides):
    shape = ("n_layer=1", "n_head=2", "n_embd=16", "block_size=16")
    return [
        *(sys.executable, str(ROOT / "train.py"), "data=text", f"data.path={corpus(folder)}", "cache_dir=cache"),
        *(f"model.{option}" for option in shape),
        *("data.global_batch_size=6", "data.micro_batch_size=2", "trainer.log_every_n_steps=1"),
        *("callbacks.samples.max_new_tokens=10", "optimizer.warmup_steps=2", *overrides),
    ]


def train(folder, *overrides):
    run = command(folder, *overrides)
    return subprocess.run(run, cwd=folder, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what two processes said) after the same run by one process and by two."""
    folder, steps = tmp_path_factory.mktemp("ddp"), ("trainer.max_steps=5", "trainer.val_check_interval=3")
    alone = run_inside("train", *command(folder, "trainer=cpu", *steps, "hydra.run.dir=one")[2:], cwd=folder)
    assert alone.code == 0, alone.stderr
    done = train(folder, *TWO, *steps, "hydra.run.dir=two")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_two_processes_make_one_run(runs):
    folder, _ = runs
    assert sorted(path.name for path in folder.iterdir()) == ["cache", "one", "outputs", "text.txt", "two"]
    one, two = ({str(path.relative_to(folder / name)) for path in (folder / name).rglob("*")} for name in ("one", "two"))
    assert one == two
    assert (folder / "two" / "train.log").read_text().count("done after 5 steps") == 1
    assert summary(folder / "two")["status"] == "done"
    assert summary(folder / "two")["tokens"] == summary(folder / "one")["tokens"] == 5 * 6 * 16


def test_two_processes_come_to_the_numbers_of_one(runs):
    folder, _ = runs
    for name in ("val/loss", "val/bits_per_byte", "val/accuracy", "train/loss", "grad_norm", "lr"):
        one, two = (dict(column(folder / run, name)) for run in ("one", "two"))
        assert two == pytest.approx(one, abs=1e-6), name
    one, two = (open_checkpoint(folder / run / "checkpoints" / "last.ckpt")["state_dict"] for run in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5)


def test_the_second_process_is_silent(runs):
    _, done = runs
    assert done.stderr.count("parameters") == 1
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("step ")] == ["0/5", "3/5", "5/5"]
    assert done.stdout.count("best val loss") == 1
    assert done.stdout.count("more: python sample.py") == 1
    assert "Warning" not in done.stderr


def test_an_interrupt_ends_both_and_saves(tmp_path):
    # As a terminal does: Ctrl-C goes to every process of the group.
    run = command(tmp_path, *TWO, "trainer.max_steps=1000000", "trainer.val_check_interval=100000", "hydra.run.dir=run")
    metrics = tmp_path / "run" / "metrics.csv"
    with started(tmp_path, *run) as process:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 3, process)
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=90)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    saved = open_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == summary(tmp_path / "run")["steps"] > 0
    assert summary(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.slow  # test_sweep.py has a trial that torchrun starts
def test_torchrun_makes_one_run_too(runs, tmp_path):
    python, *rest = command(tmp_path, *TWO, "trainer.max_steps=5", "trainer.val_check_interval=3")
    launcher = [python, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *rest]
    done = subprocess.run(launcher, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_one_run(tmp_path, runs[0])


def assert_one_run(folder, runs):
    """One run directory, one log, and the losses of a single process."""
    (made,) = (path.parent for path in (folder / "outputs").glob("*/*/summary.json"))
    assert len(list((folder / "outputs").rglob("train.log"))) == 1
    assert not (folder / "train.log").exists()
    assert dict(column(made, "val/loss")) == pytest.approx(dict(column(runs / "one", "val/loss")), abs=1e-6)


MACHINES = ("trainer=ddp_cpu", "trainer.max_steps=5", "trainer.val_check_interval=3")


@pytest.mark.parametrize("launcher", ["torchrun", "two torchruns", "srun"])
def test_whatever_starts_two_processes_they_make_one_run(launcher, runs, tmp_path, monkeypatch, quick):
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # srun's would be a function of the job's number
    environments = {"torchrun": places(), "two torchruns": places(machines=2), "srun": tasks()}[launcher]
    first, second = train_together(*command(tmp_path, *MACHINES)[2:], cwd=tmp_path, environments=environments)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert_one_run(tmp_path, runs[0])


@pytest.mark.slow
def test_two_torchruns_make_one_run_too(runs, tmp_path):
    """Of one process each, as on two machines."""
    python, *rest = command(tmp_path, *MACHINES)
    together = [python, "-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=2", "--master-addr=127.0.0.1"]
    together.append(f"--master-port={free_port()}")
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [
        subprocess.Popen([*together, f"--node-rank={rank}", *rest], cwd=tmp_path, env=environment(), **streams)
        for rank in (1, 0)
    ]
    said = [machine.communicate(timeout=120) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert said[0] == ("", "")
    assert said[1][0].count("best val loss") == 1
    assert_one_run(tmp_path, runs[0])
