"""Sweeps as their users meet them: killed, interrupted, changed, with jobs that fail, of several processes, and as a search."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import scripts
from scripts import SMALL, files, run, run_inside
from tiny import column, corpus, rows, summary

from tinygpt import launch, sweep
from tinygpt.sweep import Job, assign

QUICK = (*SMALL, "callbacks.samples=null", "callbacks.last.every_n_steps=5", "trainer.val_check_interval=20")
QUICK += ("trainer.log_every_n_steps=1", "data.global_batch_size=4", "optimizer.warmup_steps=2", "cache_dir=../cache")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps")
    corpus(folder)
    return folder


@pytest.fixture
def home(base):
    """A folder to run in. The text and its tokens, beside it, are shared."""
    folder = base / f"home{len(list(base.iterdir()))}"
    folder.mkdir()
    return folder


def arguments(*more, sweep_dir="sweep"):
    kept = [item for item in QUICK if item.split("=")[0] not in {argument.split("=")[0] for argument in more}]
    return ("-m", *kept, "data=text", "data.path=../text.txt", "resume=auto", f"hydra.sweep.dir={sweep_dir}", *more)


def start(home, *more):
    return subprocess.Popen(
        scripts.command("train", *arguments(*more)), cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_lines(path, process, lines):
    """Until a metrics.csv has so many."""
    end = time.monotonic() + 90
    while not path.exists() or path.read_text().count("\n") < lines:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def ranking(home):
    with (home / "sweep" / "ranking.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def statuses(home):
    return {job: row["status"] for job, row in ranking(home).items()}


# A sweep that is stopped


def test_a_sweep_that_was_interrupted_and_killed_ends_as_if_it_had_not_been(home):
    steps = "trainer.max_steps=3,-1,400,4"
    process = start(home, steps)
    try:
        wait_for_lines(home / "sweep/2/metrics.csv", process, 20)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "resume=auto" in stderr
    assert statuses(home) == {"0": "done", "1": "failed", "2": "interrupted", "3": "waiting"}
    assert "waiting" in stdout
    reached = summary(home / "sweep/2")["steps"]
    assert 0 < reached < 400

    process = start(home, steps)
    try:
        wait_for_lines(home / "sweep/2/metrics.csv", process, reached + 20)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (home / "sweep/2/summary.json").exists()
    first = (home / "sweep/0/summary.json").stat().st_mtime

    done = run("train", *arguments(steps), cwd=home)
    assert done.code == 2  # job 1
    assert statuses(home) == {"0": "done", "1": "failed", "2": "done", "3": "done"}
    assert [int(row["step"]) for row in rows(home / "sweep/2")] == list(range(401))
    assert (home / "sweep/0/summary.json").stat().st_mtime == first  # not trained again
    said = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("step ")]
    assert said[:2] == ["0/4", "4/4"]  # what was killed comes last
    assert int(said[2].removesuffix("/400")) > reached  # and goes on
    assert "job 1 has failed: trainer.max_steps=-1 is out of range" in done.stderr
    assert (home / "sweep/ranking.png").read_bytes().startswith(b"\x89PNG")
