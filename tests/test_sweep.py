"""Sweeps as their users meet them: killed, interrupted, changed, with jobs that fail or take several processes; searches."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import scripts
from scripts import SMALL, files, run, run_inside
from tiny import corpus, quickly, rows, summary
from together import together, wait_until

from tinygpt import launch, sweep
from tinygpt.lit import LitGPT
from tinygpt.sweep import assign

pytestmark = pytest.mark.usefixtures("quick")

QUICK = (*SMALL, "callbacks.samples=null", "callbacks.last.every_n_steps=10", "trainer.val_check_interval=20")
QUICK += ("trainer.log_every_n_steps=1", "data.global_batch_size=4", "optimizer.warmup_steps=2", "cache_dir=../cache")

SEARCHED = os.pathsep.join(filter(None, (str(scripts.ROOT), os.environ.get("PYTHONPATH"))))


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


def at_step(job, number, act):
    """For a process of its own: what happens when a job begins a step."""
    step = LitGPT.training_step

    def acting(self, batch, batch_idx):
        if self.global_step == number and Path(self.trainer.default_root_dir).name == job:
            act()
        return step(self, batch, batch_idx)

    LitGPT.training_step = acting


def struck(number, home, job, step, *more):
    """What a sweep says that gets a signal as a job begins a step; None where that kills it. Forked from this process, so
    that nothing is imported again."""

    def work(rank):
        at_step(job, step, lambda: signal.raise_signal(number))
        return run_inside("train", *arguments(*more), cwd=home)

    return together(work, [{}])[0]


def ranking(home):
    with (home / "sweep" / "ranking.csv").open() as file:
        return {row["job"]: row for row in csv.DictReader(file)}


def statuses(home):
    return {job: row["status"] for job, row in ranking(home).items()}


# A sweep that is stopped


def test_a_sweep_that_was_interrupted_and_killed_ends_as_if_it_had_not_been(home):
    steps = "trainer.max_steps=3,-1,40,4"
    done = struck(signal.SIGINT, home, "2", 20, steps)
    assert done.code == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "resume=auto" in done.stderr
    assert statuses(home) == {"0": "done", "1": "failed", "2": "interrupted", "3": "waiting"}
    assert "waiting" in done.stdout
    reached = summary(home / "sweep/2")["steps"]
    assert 0 < reached < 40

    assert struck(signal.SIGKILL, home, "2", 35, steps) is None
    assert not (home / "sweep/2/summary.json").exists()
    first = (home / "sweep/0/summary.json").stat().st_mtime

    done = run_inside("train", *arguments(steps), cwd=home)
    assert done.code == 2  # job 1
    assert statuses(home) == {"0": "done", "1": "failed", "2": "done", "3": "done"}
    assert [int(row["step"]) for row in rows(home / "sweep/2")] == list(range(41))
    assert (home / "sweep/0/summary.json").stat().st_mtime == first  # not trained again
    said = [line.split()[1] for line in done.stderr.splitlines() if line.startswith("step ")]
    assert said[:2] == ["0/4", "4/4"]  # what was killed comes last
    assert int(said[2].removesuffix("/40")) > reached  # and goes on
    assert "job 1 has failed: trainer.max_steps=-1 is out of range" in done.stderr
    assert (home / "sweep/ranking.png").read_bytes().startswith(b"\x89PNG")


def test_a_changed_sweep_in_the_same_folder_leaves_every_run_as_it_was(home):
    one, other = ("trainer.max_steps=3", "optimizer.lr=1e-2,1e-3"), ("trainer.max_steps=3", "optimizer.lr=1e-3,1e-4")
    assert run_inside("train", *arguments(*one), cwd=home).code == 0
    before = {job: summary(home / "sweep" / job) for job in "01"}
    done = run_inside("train", *arguments(*other), cwd=home)
    assert done.code == 0
    assert {job: row["overrides"] for job, row in ranking(home).items()} == {
        "0": "optimizer.lr=0.01",
        "1": "optimizer.lr=0.001",
        "2": "optimizer.lr=0.0001",
    }
    assert {job: summary(home / "sweep" / job) for job in "01"} == before
    assert done.stdout.count("best val loss  ") == 1  # one panel: the other job was done

    anew = [item for item in arguments(*one) if item != "resume=auto"]
    refused = run_inside("train", *anew, cwd=home)
    assert refused.code == 2
    assert refused.stderr.splitlines()[0] == "error: sweep holds the jobs of a sweep"
    assert {job: summary(home / "sweep" / job) for job in "01"} == before

    longer = run_inside("train", *arguments("trainer.max_steps=5", *other[1:]), cwd=home)
    assert longer.code == 0
    assert {job: row["steps"] for job, row in ranking(home).items()} == {"0": "3", "1": "5", "2": "5"}  # these went on


def test_which_folder_is_whose(tmp_path):
    def begun(number, *overrides):
        (tmp_path / str(number) / ".hydra").mkdir(parents=True)
        (tmp_path / str(number) / ".hydra/overrides.yaml").write_text(json.dumps(overrides))

    def numbers(*jobs):
        return [job.folder.name for job in assign(tmp_path, jobs)]

    long = f"data.path='{'a b, ' * 40}'"
    begun(0, long, "optimizer.lr=0.1", "trainer.max_steps=5", "resume=auto")
    begun(2, long, "optimizer.lr=0.2", "trainer.max_steps=5")
    (tmp_path / "3/.hydra").mkdir(parents=True)  # killed before it had a name
    assert numbers([long, "optimizer.lr=0.2"], [long, "optimizer.lr=0.1"]) == ["2", "0"]
    assert numbers([long, "optimizer.lr=0.3"], ["optimizer.lr=0.1"]) == ["1", "4"]
    assert numbers([long, "optimizer.lr=0.1", "trainer.max_steps=7"]) == ["0"]  # a larger budget
    swept = [[long, "optimizer.lr=0.1", f"trainer.max_steps={steps}"] for steps in (7, 5, 7)]
    assert numbers(*swept) == ["1", "0"]  # of two budgets each is a job of its own


def test_two_processes_do_not_run_one_sweep(home):
    from tinygpt import lock

    (home / "sweep").mkdir()
    hold = "with lock.held(Path('sweep')): print(flush=True); time.sleep(60)"
    code = f"import time; from pathlib import Path; from tinygpt import lock\n{hold}"
    environment = {**os.environ, "PYTHONPATH": SEARCHED}
    with subprocess.Popen([sys.executable, "-c", code], cwd=home, stdout=subprocess.PIPE, env=environment) as other:
        other.stdout.readline()
        refused = run_inside("train", *arguments("seed=1,2"), cwd=home)
        other.kill()
    assert refused.code == 2
    assert refused.stderr.startswith(f"error: sweep is in use by process {other.pid}")
    assert "hydra.sweep.dir" in refused.stderr
    assert files(home) == {"sweep", f"sweep/{lock.NAME}"}


def test_a_job_that_crashes_does_not_stop_the_others(home, monkeypatch):
    step = LitGPT.training_step

    def crash(self, *batch):
        if self.global_step == 1 and self.card["config"]["seed"] == 1:
            raise ZeroDivisionError("by chance")
        return step(self, *batch)

    monkeypatch.setattr(LitGPT, "training_step", crash)
    done = run_inside("train", *arguments("seed=1,2", "trainer.max_steps=3"), cwd=home)
    assert done.code == 1
    assert "ZeroDivisionError: by chance" in (home / "sweep/0/train.log").read_text()
    assert statuses(home) == {"0": "failed", "1": "done"}
    assert ranking(home)["0"]["error"] == "by chance"
    monkeypatch.setattr(LitGPT, "training_step", step)
    assert run_inside("train", *arguments("seed=1,2", "trainer.max_steps=3"), cwd=home).code == 0
    assert statuses(home) == {"0": "done", "1": "done"}
    assert "error" not in summary(home / "sweep/0")


def test_a_dry_run_of_a_sweep_leaves_nothing(home):
    done = run_inside("train", *arguments("seed=1,2", "dry_run=true"), cwd=home)
    assert done.code == 0
    assert done.stdout.count("FLOPs per token") == 2
    assert files(home) == set()


REFUSED = [
    (("sweep=optuna",), "sweep=optuna", "-m"),
    (("sweep.trials=3",), "sweep.trials=3", "-m"),
    (("-m", "optimizer.lr=interval(1e-4,1e-2)"), "optimizer.lr", "sweep=optuna"),
    (("-m", "sweep=optuna"), "something to search", "interval"),
    (("-m", "sweep=optuna", "optimizer.lr=tag(log,interval(0,1))"), "optimizer.lr", "interval"),
    (("-m", "sweep=optuna", "sweep.trials=0", "seed=1,2"), "sweep.trials=0", "at least 1"),
    (("-m", "sweep.trails=2", "seed=1,2"), "sweep.trails", "sweep.trials"),
    (("-m", "hydra/sweeper=optuna", "seed=1,2"), "hydra/sweeper=optuna", "sweep=optuna"),
    (("-m", "hydra/launcher=joblip", "seed=1,2"), "hydra/launcher=joblip", "joblib"),
    (("-m", "hydra.sweep.subdir=x", "seed=1,2"), "hydra.sweep.subdir=x", "numbered"),
    (("-m", "hydra.sweep.dir=/dev/null/x", "seed=1,2"), "/dev/null/x", "hydra.sweep.dir"),
    (("-m", "resume=auto", "seed=1,2"), "resume=auto", "hydra.sweep.dir"),
    (("-m", "resume=auto", "seed=1,2", "hydra.run.dir=x"), "resume=auto", "hydra.sweep.dir"),
    (("resume=auto", "hydra.sweep.dir=x"), "resume=auto", "hydra.run.dir"),
    (("-m", "resume=latest", "seed=1,2"), "resume=latest", "resume=auto"),
    (("-m", "init_from=latest", "seed=1,2"), "init_from=latest", "its folder"),
    (("-m", "init_from=outputs/latest/checkpoints/best.ckpt", "seed=1,2"), "outputs/latest", "its folder"),
    (("-m", "init_from=./outputs/latest", "seed=1,2"), "outputs/latest", "its folder"),
    (("-m", "-p", "x", "seed=1,2"), "-p", "--cfg"),
    (("-p", "x"), "-p", "--cfg"),
    (("-m", "verify_resume=true", "seed=1,2"), "verify_resume", "leave out -m"),
    (("-m", "optimizer=1e-3,3e-3"), "optimizer=0.001", "--help"),
    (("-m", "model=3", "seed=1,2"), "model=3", "--help"),
    (("-m", "model=glob(lama*)"), "model=glob(lama*)", "no choice"),
    (("-m", "seed=range(5,5)"), "seed=range(5,5)", "empty"),
    (("-m", "sweep=optuna", "seed=range(5,5)"), "seed=range(5,5)", "empty"),
]


@pytest.mark.parametrize(("given", "error", "hint"), REFUSED, ids=lambda value: str(value)[:50])
def test_a_sweep_that_cannot_be_is_refused(given, error, hint, home):
    done = run_inside("train", *given, cwd=home)
    assert done.code == 2
    lines = done.stderr.splitlines()
    assert [line.split(":")[0] for line in lines] == ["error", "hint"], done.stderr
    assert error in lines[0]
    assert hint in lines[0] + lines[1]
    assert files(home) == set()


# Several processes


AGENT = """
import os, signal, sys, time
from pathlib import Path
def leave(number, frame):
    Path(f"left{os.environ['RANK']}").write_text(f"{number} {os.environ['TINYGPT_SWEEP_JOB']}")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, leave)
signal.signal(signal.SIGINT, leave)
code = sys.argv[1]
if code != "wait":
    sys.exit(int(code) if os.environ["RANK"] == "1" else 0)
Path(f"ready{os.environ['RANK']}").touch()
time.sleep(60)
"""
PARENT = """
import sys
from pathlib import Path
from tinygpt import launch
sys.exit(launch.torchrun("agent.py", sys.argv[1:], Path("sweep/7"), 2))
"""


@pytest.fixture
def torchrun(home):
    """Starts a script as a sweep starts a job of two processes."""
    (home / "agent.py").write_text(AGENT)
    environment = {**os.environ, "PYTHONPATH": SEARCHED}

    def begin(argument):
        return subprocess.Popen(
            [sys.executable, "-c", PARENT, argument], cwd=home, env=environment, stderr=subprocess.PIPE, text=True
        )

    return begin


def test_the_exit_code_is_that_of_the_process_that_failed(torchrun):
    process = torchrun("2")
    _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (2, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=str)
def test_a_signal_reaches_every_process_of_a_job(torchrun, home, number):
    process = torchrun("wait")
    wait_until(lambda: (home / "ready0").exists() and (home / "ready1").exists(), process)
    process.send_signal(number)
    process.wait(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL and sys.platform != "linux":
        return
    passed_on = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    wait_until(lambda: [left.read_text() for left in home.glob("left*")] == [f"{int(passed_on)} 7"] * 2)


def test_a_warning_of_slurm_s_is_passed_on_as_one_that_torchrun_knows(tmp_path, monkeypatch):
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    def warned():
        with subprocess.Popen(["sleep", "60"]) as process, launch.passing_on(process):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert process.wait() == -signal.SIGTERM

    with pytest.raises(SystemExit) as leaving:
        warned()
    assert leaving.value.code == 128 + signal.SIGTERM  # as where a job is one process
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


@pytest.mark.parametrize(
    ("trainer", "count"),
    [
        ({}, 1),
        ({"devices": 3}, 3),
        ({"devices": "2"}, 2),
        ({"devices": [0, 1]}, 2),
        ({"devices": "0,1"}, 2),
        ({"accelerator": "cpu", "devices": "auto"}, 1),
    ],
)
def test_how_many_processes_a_job_takes(trainer, count):
    assert launch.processes(trainer) == count


def test_a_trial_of_two_processes_trains_with_the_values_of_one(home, capfd):
    pytest.importorskip("optuna")
    given = ("sweep=optuna", "sweep.trials=1", "optimizer.lr=interval(1e-3,1e-2)", "trainer.max_steps=4")
    done = run_inside("train", *arguments(*given, "trainer=ddp_cpu", "trainer.devices=2"), cwd=home)
    said = capfd.readouterr()  # of the trial's own processes
    assert done.code == 0, done.stderr + said.err
    assert said.out.count("best val loss  ") == 1  # one voice
    assert {path.name for path in (home / "sweep").iterdir() if path.is_dir()} == {"0"}
    assert run_inside("train", *arguments(*given, sweep_dir="alone"), cwd=home).code == 0
    two, one = summary(home / "sweep/0"), summary(home / "alone/0")
    assert two["best_val_loss"] == pytest.approx(one["best_val_loss"], abs=1e-6)
    assert set(two["overrides"]) > set(one["overrides"])


# W&B


def test_the_wandb_runs_of_a_sweep_stay_apart(home, monkeypatch):
    import wandb

    begin, runs = wandb.init, []
    monkeypatch.setattr(wandb, "init", lambda **options: runs.append(begin(**options)) or runs[-1])
    for name, seeds in (("one", "1,2"), ("two", "1")):
        given = arguments(f"seed={seeds}", "trainer.max_steps=2", "logger=wandb", sweep_dir=name)
        assert run_inside("train", *given, cwd=home, env={"WANDB_MODE": "offline"}).code == 0
    assert [run.group for run in runs] == ["one", "one", "two"]
    assert [run.name for run in runs] == ["one/0", "one/1", "two/0"]
    assert len({run.id for run in runs}) == 3
    folders = {path.name for path in home.rglob("offline-run-*")}
    assert {folder.rsplit("-", 1)[1] for folder in folders} == {run.id for run in runs}


# Launchers


@pytest.mark.parametrize("launcher", [pytest.param("joblib", marks=pytest.mark.slow), "submitit_local"])
def test_a_launcher_with_processes_of_its_own(launcher, home):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    given = (f"hydra/launcher={launcher}", "model.n_head=2,3", "trainer.max_steps=2")
    done = run("train", *arguments(*given), cwd=home, env={"PYTHONPATH": SEARCHED})
    assert done.code == 2, done.stderr
    assert statuses(home) == {"0": "done", "1": "failed"}
    assert "job 1 has failed: model.n_embd=16 does not divide by model.n_head=3" in done.stderr
    assert "Traceback" not in done.stderr
    assert files(home / "sweep/0") >= {"summary.json", "train.log", "checkpoints/last.ckpt"}


def test_slurm_s_settings_compose(home):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    given = ("hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=8")
    done = run_inside("train", *given, "--cfg", "hydra", "-p", "hydra.launcher", cwd=home)
    assert done.code == 0
    assert "partition: gpu" in done.stdout


# A search


SEARCH = (
    "sweep=optuna",
    "sweep.trials=4",
    "sweep.startup_trials=2",
    "trainer.max_steps=40",
    "optimizer.lr=tag(log,interval(1e-5,1e-1))",
)
SEARCH += ("optimizer.warmup_steps=int(interval(1,4))", "model.n_layer=1,2", "optimizer.min_lr_ratio=range(0.1,0.6,0.2)")


@pytest.fixture(scope="module")
def found(base):
    """A search that nothing has disturbed."""
    pytest.importorskip("optuna")
    folder = base / "search"
    folder.mkdir()
    with quickly():
        done = run_inside("train", *arguments(*SEARCH), cwd=folder)
    assert done.code == 0, done.stderr
    return folder, done


def test_a_search_tries_what_it_was_given_and_ends_what_is_hopeless(found):
    folder, done = found
    tried = [dict(item.split("=") for item in ranking(folder)[str(k)]["overrides"].split()) for k in range(4)]
    for values in tried:
        assert set(values) == {"optimizer.lr", "optimizer.warmup_steps", "model.n_layer", "optimizer.min_lr_ratio"}
        assert 1e-5 <= float(values["optimizer.lr"]) <= 1e-1
        assert values["optimizer.warmup_steps"] in tuple("1234")
        assert values["model.n_layer"] in tuple("12")
        assert values["optimizer.min_lr_ratio"] in ("0.1", "0.30000000000000004", "0.5")
    pruned = [job for job, status in statuses(folder).items() if status == "pruned"]
    assert set(statuses(folder).values()) == {"done", "pruned"}
    for job in pruned:
        assert summary(folder / "sweep" / job)["status"] == "pruned"
        assert summary(folder / "sweep" / job)["steps"] < 40
    assert done.stderr.count("no hope") == len(pruned)
    assert "Warning" not in done.stderr


def test_a_search_that_was_killed_ends_as_if_it_had_not_been(found, home):
    assert struck(signal.SIGKILL, home, "2", 15, *SEARCH) is None
    assert rows(home / "sweep/2")[-1]["step"] == "15"
    done = run_inside("train", *arguments(*SEARCH), cwd=home)
    assert done.code == 0, done.stderr
    timing = ("seconds", "rank")
    one, two = (
        {job: {k: v for k, v in row.items() if k not in timing} for job, row in ranking(f).items()} for f in (found[0], home)
    )
    assert one == two
    again = run_inside("train", *arguments(*SEARCH), cwd=home)
    assert again.code == 0
    assert "FLOPs" not in again.stderr  # nothing is left to do
    more = [item.replace("trials=4", "trials=5") for item in SEARCH]
    assert run_inside("train", *arguments(*more), cwd=home).code == 0
    assert len(ranking(home)) == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sweep.seed=3", "another sweep.seed"),
        ("optimizer.lr=tag(log,interval(1e-5,1))", "another space of values"),
        ("optimizer.weight_decay=0.2", "another setting"),
        ("trainer.max_steps=50", "another setting"),
    ],
)
def test_another_search_in_the_same_folder_is_refused(found, change, words):
    folder, _ = found
    before = (folder / "sweep/study.journal").read_text()
    kept = [item for item in SEARCH if item.split("=")[0] != change.split("=")[0]]
    done = run_inside("train", *arguments(*kept, change), cwd=folder)
    assert done.code == 2
    assert words in done.stderr.splitlines()[0]
    assert (folder / "sweep/study.journal").read_text() == before


def test_a_study_that_a_full_disk_has_cut_short_is_read(tmp_path):
    pytest.importorskip("optuna")
    from tinygpt.config import SweepConfig
    from tinygpt.search import STUDY, Search

    space = {"seed": {"choices": ["1", "2"]}}
    first = Search(tmp_path, SweepConfig(method="optuna"), space, [])
    job = next(first.batches())[0]
    with (tmp_path / STUDY).open("a") as file:
        file.write('{"op_code":7,"trial_i{"op_code":6}\n{"op')
    again = Search(tmp_path, SweepConfig(method="optuna"), space, [])
    assert next(again.batches()) == [job]  # begun, and not over


def test_failed_trials(tmp_path):
    pytest.importorskip("optuna")
    from tinygpt.config import SweepConfig
    from tinygpt.search import ATTEMPTS, Search

    def search():
        return Search(tmp_path, SweepConfig(method="optuna", trials=2), {"seed": {"low": 0, "high": 99, "log": False}}, [])

    def jobs(*codes):
        """Folders of the jobs of one attempt, each of which ends with its code."""
        names, codes = [], iter(codes)
        for batch in search().batches():
            for job in batch:
                names.append(job.folder.name)
                if (code := next(codes, None)) is None:
                    return names
                job.folder.mkdir(exist_ok=True)
                sweep.fail(job.folder, job.overrides, "failed", code)
        return names

    assert jobs(2, 1) == ["0", "1"]
    for _ in range(ATTEMPTS):
        assert jobs() == ["2"]  # the first cannot be helped, the second is tried again with new values
    assert jobs(2) == ["3"]  # that one kills its process
    assert jobs() == []


def test_a_disk_that_is_full_costs_no_trial_of_a_search(tmp_path):
    pytest.importorskip("optuna")
    from tinygpt.config import SweepConfig
    from tinygpt.search import Search

    def search():
        return Search(tmp_path, SweepConfig(method="optuna", trials=1), {"seed": {"low": 0, "high": 99, "log": False}}, [])

    (job,) = next(batches := search().batches())
    job.folder.mkdir()
    sweep.fail(job.folder, job.overrides, "no room", 2, again=True)
    assert list(batches) == []
    assert [job.folder.name for job in next(search().batches())] == ["1"]  # there is room again


def test_a_trial_may_be_interrupted_as_often_as_one_likes(tmp_path):
    pytest.importorskip("optuna")
    from tinygpt.config import SweepConfig
    from tinygpt.search import ATTEMPTS, Search
    from tinygpt.summary import store_summary

    for _ in range(ATTEMPTS + 2):
        search = Search(tmp_path, SweepConfig(method="optuna", trials=1), {"seed": {"low": 0, "high": 9, "log": False}}, [])
        (job,) = next(search.batches())
        assert job.folder.name == "0"
        job.folder.mkdir(exist_ok=True)
        store_summary(job.folder, {"status": "interrupted"})


def test_a_folder_is_of_a_grid_or_of_a_search(found, home):
    folder, _ = found
    grid = run_inside("train", *arguments("seed=1,2"), cwd=folder)
    assert grid.code == 2
    assert grid.stderr.startswith("error: sweep holds a search")
    (home / "sweep/0/.hydra").mkdir(parents=True)
    search = run_inside("train", *arguments(*SEARCH), cwd=home)
    assert search.code == 2
    assert search.stderr.startswith("error: sweep holds a grid")
    dry = run_inside("train", *arguments(*SEARCH, "dry_run=true"), cwd=folder)
    assert dry.code == 2
    assert "dry_run" in dry.stderr
