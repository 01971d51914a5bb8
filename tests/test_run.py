"""Whole runs: resumed exactly, refused by name, stopped early, averaged, and what they leave behind."""

import errno
import logging
import re
import shutil
import signal
from pathlib import Path
from unittest import mock

import pytest
import scripts
import torch
from tiny import CALLBACKS, EMA, LAST_EVERY_3, column, corpus, rows, run, settings, summary, text

from tinygpt import batches
from tinygpt import checkpoint as ckpt
from tinygpt.batches import BatchOrder
from tinygpt.callbacks import GracefulStop, LastCheckpoint
from tinygpt.config import TokenizerConfig, UserError
from tinygpt.lit import LitGPT
from tinygpt.loggers import COLUMNS, CSVLogger
from tinygpt.loss import fusible_chunk_loss
from tinygpt.model import GPT
from tinygpt.run import train

EXACT = COLUMNS[:-3]  # without the timing
EARLY = {
    "early_stopping": {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": "val/loss",
        "patience": 2,
    }
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def opened(run_dir, name="last"):
    return ckpt.open_checkpoint(run_dir / "checkpoints" / f"{name}.ckpt")


def same(a, b) -> bool:
    """Equal, bit for bit, through dictionaries and lists of tensors."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(one, two):
    for name in ("last", "best"):
        a, b = opened(one, name), opened(two, name)
        for part in a.keys() - {"loops", "epoch", "tinygpt"}:
            assert same(a[part], b[part]), (name, part)
    assert [[row[c] for c in EXACT] for row in rows(one)] == [[row[c] for c in EXACT] for row in rows(two)]
    assert (one / "samples.md").read_text() == (two / "samples.md").read_text()
    a, b = summary(one), summary(two)
    for name in ("status", "steps", "tokens", "val_loss", "best_val_loss", "best_step", "val_accuracy", "corpus"):
        assert a[name] == b[name], name


HARD = {
    "steps": 20,
    "every": 8,
    "model": {"dropout": 0.2},
    "data": {"micro_batch_size": 4},
    "callbacks": {**LAST_EVERY_3, **EMA},
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """20 steps in one go."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(folder, **HARD)


@pytest.fixture(scope="module")
def validated_in_parts(tmp_path_factory):
    """The same, where a validation is five batches."""
    folder = tmp_path_factory.mktemp("parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(batches, "VALIDATION_TOKENS", 64)
        return run(folder, **HARD)


@pytest.fixture
def whole_slowly(validated_in_parts, monkeypatch):
    """That run, for a test whose validations are as it."""
    monkeypatch.setattr(batches, "VALIDATION_TOKENS", 64)
    return validated_in_parts


def stopped_by_signal(monkeypatch, step):
    monkeypatch.setattr(GracefulStop, "agree", lambda self, trainer: 15 * (trainer.global_step == step))


def killed(monkeypatch, step):
    real = LitGPT.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            raise RuntimeError("the power is out")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "training_step", training_step)


@pytest.mark.parametrize("step", [1, 11, 16, 17])
def test_a_run_stopped_by_a_signal_ends_as_if_it_had_not_been(tmp_path, monkeypatch, whole, step):
    with monkeypatch.context() as patch:
        stopped_by_signal(patch, step)
        with pytest.raises(SystemExit) as left:
            run(tmp_path, **HARD)
    assert left.value.code == 128 + 15
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert summary(tmp_path / "run")["steps"] == opened(tmp_path / "run")["global_step"] == step
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def test_what_a_killed_process_left_of_a_checkpoint_is_removed(tmp_path):
    left = tmp_path / "run" / "checkpoints" / "last.ckpt.tmp-17"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half of it")
    run(tmp_path)
    assert not left.exists()


def test_a_folder_in_the_place_of_the_link_costs_the_link_alone(tmp_path, caplog):
    (tmp_path / "outputs" / "latest").mkdir(parents=True)
    assert summary(run(tmp_path))["status"] == "done"
    assert "cannot name this run" in caplog.text
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["latest"]


@pytest.mark.parametrize("step", [0, 8, 14, 19])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path, monkeypatch, whole, step):
    with monkeypatch.context() as patch:
        killed(patch, step)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path, **HARD)
    assert summary(tmp_path / "run")["status"] == "failed"
    assert opened(tmp_path / "run")["global_step"] == {0: 0, 8: 8, 14: 12, 19: 18}[step]
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def killed_and_resumed(tmp_path, monkeypatch, step, **settings):
    with monkeypatch.context() as patch:
        killed(patch, step)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path, **settings)
    return run(tmp_path, resume="auto", **settings)


def killed_inside(monkeypatch, method, call):
    """At the call-th time that LitGPT's method is called."""
    real, calls = getattr(LitGPT, method), []

    def dying(self, *arguments):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("the power is out")
        return real(self, *arguments)

    monkeypatch.setattr(LitGPT, method, dying)


@pytest.mark.parametrize(
    ("method", "call", "left"),
    [
        ("backward_part", 26, 12),  # the second micro-batch of step 13
        ("validation_step", 2, None),  # in the first validation: no checkpoint yet
        ("validation_step", 7, 6),  # in the second, after step 8
    ],
)
def test_a_run_killed_in_the_middle_of_something_ends_as_if_it_had_not_been(
    tmp_path, monkeypatch, whole_slowly, method, call, left
):
    with monkeypatch.context() as patch:
        killed_inside(patch, method, call)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path, **HARD)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert (opened(tmp_path / "run")["global_step"] if last.exists() else None) == left
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole_slowly)


@pytest.mark.parametrize("call", [1, 4])
def test_a_run_killed_between_a_line_and_its_checkpoint_writes_the_line_once(tmp_path, monkeypatch, whole, call):
    """After the validations of step 0, from which nothing goes on, and of step 8."""
    real, calls = LastCheckpoint.save, []

    def save(self, trainer):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("the power is out")
        real(self, trainer)

    with monkeypatch.context() as patch:
        patch.setattr(LastCheckpoint, "save", save)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path, **HARD)
    assert rows(tmp_path / "run")[-1]["step"] == {1: "0", 4: "8"}[call]
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def test_loader_workers_change_nothing(tmp_path, monkeypatch, whole):
    hard = {**HARD, "data": {**HARD["data"], "num_workers": 2}}
    assert_same_run(killed_and_resumed(tmp_path, monkeypatch, 14, **hard), whole)


def test_a_folder_that_goes_away_takes_nothing_with_it_that_can_be_kept(tmp_path, monkeypatch, caplog):
    real = LitGPT.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            (tmp_path / "run").rename(tmp_path / "moved")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "training_step", training_step)
    run_dir = run(tmp_path)
    assert summary(run_dir)["status"] == "done"
    assert opened(run_dir)["global_step"] == 6
    assert [row["step"] for row in rows(run_dir)] == ["5", "6"]
    assert opened(tmp_path / "moved")["global_step"] == 3
    assert "has gone" in caplog.text


def test_lines_that_the_disk_refuses_for_a_while_are_written_later(tmp_path, monkeypatch, caplog):
    real, refused = CSVLogger.write, []

    def write(self):
        if len(refused) < 2:
            refused.append(1)
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self)

    monkeypatch.setattr(CSVLogger, "write", write)
    assert [row["step"] for row in rows(run(tmp_path))] == [str(step) for step in range(7)]
    assert caplog.text.count("its lines wait") == 1


def test_muon_and_adamw_resume_as_one(tmp_path, monkeypatch):
    hard = {**HARD, "optimizer": {"name": "muon"}}
    whole = run(tmp_path, "whole", **hard)
    assert_same_run(killed_and_resumed(tmp_path, monkeypatch, 14, **hard), whole)


def test_ctrl_c_during_the_first_validation_saves_too(tmp_path, monkeypatch, whole):
    real = LitGPT.validation_step

    def validation_step(self, batch, batch_idx):
        if batch_idx == 0:
            signal.raise_signal(signal.SIGINT)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(LitGPT, "validation_step", validation_step)
        with pytest.raises(SystemExit) as left:
            run(tmp_path, **HARD)
    assert left.value.code == 130
    assert summary(tmp_path / "run")["status"] == "interrupted"
    assert opened(tmp_path / "run")["global_step"] == 0
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def signal_in_validation(monkeypatch, number):
    """SIGTERM in the second batch of a validation, counted from 0; the batches that are read."""
    real, seen = LitGPT.validation_step, []

    def validation_step(self, batch, batch_idx):
        seen.append(batch_idx)
        if seen.count(1) == number + 1 and batch_idx == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "validation_step", validation_step)
    return seen


@pytest.mark.parametrize(("number", "step"), [(1, 8), (2, 16)])
def test_a_signal_in_the_middle_of_a_validation_is_not_made_to_wait(tmp_path, monkeypatch, whole_slowly, number, step):
    """The resumed run begins with that validation."""
    with monkeypatch.context() as patch:
        seen = signal_in_validation(patch, number)
        with pytest.raises(SystemExit) as left:
            run(tmp_path, **HARD)
    assert left.value.code == 143
    assert seen[-1] == 1
    assert opened(tmp_path / "run")["global_step"] == step
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole_slowly)


def test_a_signal_in_the_last_validation_lets_the_run_end(tmp_path, monkeypatch, whole_slowly):
    signal_in_validation(monkeypatch, 3)
    assert_same_run(run(tmp_path, **HARD), whole_slowly)


def test_a_warning_that_sigterm_follows_is_still_one(monkeypatch):
    stop = GracefulStop()
    stop.on_signal(signal.SIGUSR1, None)
    stop.on_signal(signal.SIGTERM, None)
    assert stop.signal == signal.SIGUSR1


@pytest.mark.parametrize(("job", "said"), [({}, "17"), ({"ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}, "12_3")])
def test_slurms_warning_queues_the_job_again(tmp_path, monkeypatch, whole, job, said):
    tool = tmp_path / "scontrol"
    tool.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, value in {"JOB_ID": "17", **job}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "agree", lambda self, trainer: signal.SIGUSR1 * (trainer.global_step == 5))
        with pytest.raises(SystemExit) as left:
            run(tmp_path, **HARD)
    assert left.value.code == 143
    assert (tmp_path / "asked").read_text() == f"requeue {said}\n"
    monkeypatch.delenv("SLURM_JOB_ID")
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def test_keep_last_keeps_the_newest_states_and_the_best(tmp_path, monkeypatch):
    several = {**CALLBACKS, "last": {**CALLBACKS["last"], "every_n_steps": 2, "keep_last": 3}}
    with monkeypatch.context() as patch:
        stopped_by_signal(patch, 7)
        with pytest.raises(SystemExit):
            run(tmp_path, steps=12, every=100, callbacks=several)
    folder = tmp_path / "run" / "checkpoints"
    assert opened(tmp_path / "run")["global_step"] == 7
    run(tmp_path, steps=12, every=100, callbacks=several, resume="auto")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("best.ckpt", "last.ckpt", "step-10.ckpt", "step-12.ckpt", "step-8.ckpt")
    ]
    assert [opened(tmp_path / "run", f"step-{step}")["global_step"] for step in (8, 10, 12)] == [8, 10, 12]
    assert folder.joinpath("last.ckpt").samefile(folder / "step-12.ckpt")
    again = run(tmp_path, "again", ["resume=x"], resume=str(folder / "step-8.ckpt"), steps=12, every=100, callbacks=several)
    assert same(opened(again)["state_dict"], opened(tmp_path / "run")["state_dict"])


def test_the_clock_of_a_resumed_run_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed(patch, 14)
        with pytest.raises(RuntimeError, match="power"):
            run(tmp_path, **HARD)
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(re.sub(r"[\d.]+$", "1000", path.read_text(), flags=re.MULTILINE))  # every line as if it had taken long
    seconds = [float(row["seconds"]) for row in rows(run(tmp_path, resume="auto", **HARD))]
    assert seconds == sorted(seconds)
    assert seconds[0] == 1000 < seconds[-1] < 2000


def test_a_run_may_be_interrupted_again_and_again(tmp_path, monkeypatch, whole):
    for step in (5, 6, 13):
        with monkeypatch.context() as patch:
            stopped_by_signal(patch, step)
            with pytest.raises(SystemExit):
                run(tmp_path, resume="auto", **HARD)
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def test_a_run_killed_after_its_last_checkpoint_writes_what_was_missing(tmp_path, whole):
    run_dir = run(tmp_path, **HARD)
    (run_dir / "summary.json").unlink()
    assert_same_run(run(tmp_path, resume="auto", **HARD), whole)


def test_a_run_that_is_done_is_left_alone_and_says_so(tmp_path, capsys):
    run_dir = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    capsys.readouterr()
    best = train(settings(tmp_path, resume="auto"), run_dir)
    assert best == summary(run_dir)["best_val_loss"]
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")} == before
    assert "is done: 6 steps, best validation loss" in capsys.readouterr().out


def test_a_run_that_is_done_goes_on_when_its_budget_grows(tmp_path):
    flat = {"optimizer": {"schedule": "constant"}}  # else the schedule follows the budget
    wanted = run(tmp_path, "straight", steps=9, **flat)
    run(tmp_path, steps=6, **flat)
    assert_same_run(run(tmp_path, steps=9, resume="auto", **flat), wanted)


def test_a_resumed_run_in_a_new_directory_takes_the_stored_config_and_the_overrides(tmp_path):
    first = run(tmp_path, "first", optimizer={"lr": 3e-3, "schedule": "constant"})
    old = (first / "metrics.csv").read_text()
    said = {"lr": 0.5, "weight_decay": 0.25, "betas": [0.5, 0.6]}
    second = run(
        tmp_path,
        "second",
        ["resume=first", "trainer.max_steps=9", *(f"optimizer.{name}={value}" for name, value in said.items())],
        steps=9,
        optimizer=said,
        resume="first",
    )
    assert (first / "metrics.csv").read_text() == old
    assert [int(row["step"]) for row in rows(second)] == [7, 8, 9]
    card = opened(second)["tinygpt"]["config"]
    assert card["optimizer"]["lr"] == 0.5  # said
    assert card["optimizer"]["schedule"] == "constant"  # stored
    assert card["trainer"]["max_steps"] == 9
    assert column(second, "lr")[-1] == (9, 0.5)
    decayed, rest = opened(second)["optimizer_states"][0]["param_groups"]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.25, 0.0)
    assert [tuple(group["betas"]) for group in (decayed, rest)] == [(0.5, 0.6)] * 2
    assert summary(second)["steps"] == 9


def test_a_resumed_run_needs_steps_to_take(tmp_path):
    run(tmp_path, "first")
    with pytest.raises(UserError, match="has taken 6 steps, and the budget is 6"):
        run(tmp_path, "second", ["resume=first"], resume="first")
    with pytest.raises(UserError, match="has taken 6 steps, and the budget is 4"):
        run(tmp_path, "first", resume="auto", steps=4)
    assert opened(tmp_path / "first")["global_step"] == 6


CHANGES = {
    "model": ({"model": {"n_embd": 32}}, ["model.n_embd=32"]),
    "seed": ({"seed": 1}, ["seed=1"]),
    "data.global_batch_size": ({"data": {"global_batch_size": 4}}, ["data.global_batch_size=4"]),
    "data.tokenizer": ({"data": {"tokenizer": TokenizerConfig("byte")}}, ["data/tokenizer=byte"]),
    "the corpus": ({"data": {"val_fraction": 0.2}}, ["data.val_fraction=0.2"]),
    "callbacks": ({"callbacks": CALLBACKS}, ["callbacks=[default]"]),
}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run(folder, callbacks={**CALLBACKS, **EMA})


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("auto", [False, True])
def test_a_resumed_run_refuses_changes_by_name(averaged, what, auto):
    changes, overrides = CHANGES[what]
    folder = averaged.parent
    changes = {"steps": 9, "callbacks": {**CALLBACKS, **EMA}, **changes}
    name, resume = ("run", "auto") if auto else ("new", str(averaged))
    overrides = ["trainer.max_steps=9", *overrides]
    with pytest.raises(UserError, match=f"cannot change {re.escape(what)}"):
        run(folder, name, overrides, resume=resume, **changes)


def test_a_resumed_run_refuses_another_text(tmp_path):
    run(tmp_path)
    Path(corpus(tmp_path)).write_text(text(seed=1))
    with pytest.raises(UserError, match="cannot change the corpus"):
        run(tmp_path, resume="auto", steps=9)


def test_resume_and_init_from_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match="exclude each other"):
        run(tmp_path, resume="x", init_from="x")


def test_with_resume_auto_init_from_is_where_the_first_start_begins(tmp_path):
    run(tmp_path, "first", model={"n_embd": 32})
    started = {"resume": "auto", "init_from": "first", "steps": 6, "every": 3}
    once = run(tmp_path, "once", **started)
    run(tmp_path, "twice", **{**started, "steps": 3})
    twice = run(tmp_path, "twice", **started)
    assert summary(twice)["steps"] == 6
    assert ckpt.load(twice)[0].config.n_embd == 32
    assert column(twice, "train/loss")[-1] != column(tmp_path / "first", "train/loss")[-1]
    assert len(column(once, "val/loss")) == 3


def test_init_from_takes_weights_and_tokenizer(tmp_path):
    first = run(tmp_path, "first", steps=9)
    Path(corpus(tmp_path)).write_text(text(seed=1).replace("h", "t"))  # the same letters, one missing
    nearly_still = {"optimizer": {"lr": 1e-12}, "steps": 2, "every": 2}
    second = run(tmp_path, "second", init_from="first", model={"n_embd": 32}, **nearly_still)
    model, tokenizer = ckpt.load(second)
    start, same_tokenizer = ckpt.load(first)
    assert tokenizer.state() == same_tokenizer.state()
    assert "h" in tokenizer.state()["characters"]
    for name, p in start.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=0, atol=1e-9)
    assert summary(second)["steps"] == 2
    assert rows(second)[0]["step"] == "0"


@pytest.mark.parametrize(("every", "validated"), [(3, [0, 3, 6, 7]), (7, [0, 7]), (100, [0, 7]), (None, [0, 7])])
def test_a_run_begins_and_ends_with_a_validation(tmp_path, every, validated):
    run_dir = run(tmp_path, steps=7, every=every)
    assert [step for step, _ in column(run_dir, "val/loss")] == validated
    assert [int(row["step"]) for row in rows(run_dir)] == list(range(8))
    assert re.findall(r"^## step (\d+)", (run_dir / "samples.md").read_text(), re.MULTILINE) == [str(s) for s in validated]
    best = min(column(run_dir, "val/loss"), key=lambda point: point[1])
    assert (summary(run_dir)["best_step"], summary(run_dir)["best_val_loss"]) == best
    assert opened(run_dir, "best")["global_step"] == best[0]


def test_a_single_step_is_a_run(tmp_path):
    run_dir = run(tmp_path, steps=1, quick=False)
    assert [step for step, _ in column(run_dir, "val/loss")] == [0, 1]
    assert (run_dir / "curves.png").stat().st_size > 1000


def test_the_budget_in_tokens_and_epochs_is_exact(tmp_path):
    tokens = run(tmp_path, "tokens", every=100, trainer={"max_tokens": 6 * 16 * 5})
    more = run(tmp_path, "more", every=100, trainer={"max_tokens": 6 * 16 * 5 + 1})
    epochs = run(tmp_path, "epochs", every=100, trainer={"max_epochs": 1})
    assert (summary(tokens)["steps"], summary(tokens)["tokens"]) == (5, 480)
    assert summary(more)["steps"] == 6
    windows = BatchOrder(2700, 16, 6, 1337).rows_per_epoch
    assert summary(epochs)["steps"] == -(-windows // 6)
    assert column(epochs, "lr")[-1][1] < 0.2 * 1e-2  # the schedule followed the budget


def test_stop_at_loss_in_validation(tmp_path):
    run_dir = run(tmp_path, steps=200, every=4, stop_at_loss=2.7)
    losses = column(run_dir, "val/loss")
    assert losses[-1][1] <= 2.7 < losses[-2][1]
    assert summary(run_dir)["status"] == "done"
    assert summary(run_dir)["steps"] == losses[-1][0] < 200


def test_stop_at_loss_in_training(tmp_path):
    run_dir = run(tmp_path, steps=200, every=150, stop_at_loss=2.6)
    steps = summary(run_dir)["steps"]
    train_loss = dict(column(run_dir, "train/loss"))
    assert steps < 150
    assert train_loss[steps] <= 2.6
    assert column(run_dir, "val/loss")[-1][0] == steps  # it ends with a validation
    assert opened(run_dir)["global_step"] == steps


def test_a_run_ended_by_its_loss_is_done(tmp_path, capsys):
    changes = {"steps": 200, "every": 4, "stop_at_loss": 2.7}
    run_dir = run(tmp_path, **changes)
    before = summary(run_dir)
    run(tmp_path, resume="auto", **changes)
    assert summary(run_dir) == before
    (run_dir / "summary.json").unlink()  # killed before it could say so
    run(tmp_path, resume="auto", **changes)
    assert (summary(run_dir)["status"], summary(run_dir)["steps"]) == ("done", before["steps"])
    run(tmp_path, resume="auto", **{**changes, "stop_at_loss": 2.6})
    assert summary(run_dir)["steps"] > before["steps"]


def test_a_least_number_of_steps_is_all_that_it_is(tmp_path):
    run_dir = run(tmp_path, steps=200, every=4, stop_at_loss=2.7, trainer={"min_steps": 30})
    straight = run(tmp_path, "straight", steps=200, every=4, stop_at_loss=2.7)
    assert 30 <= summary(run_dir)["steps"] <= max(32, summary(straight)["steps"])
    steps = [int(row["step"]) for row in rows(run_dir)]
    assert steps == list(range(summary(run_dir)["steps"] + 1))


def test_a_stop_that_has_to_wait_is_kept(tmp_path, monkeypatch):
    late = {"steps": 200, "every": 20, "stop_at_loss": 2.9, "trainer": {"min_steps": 30}}
    whole = run(tmp_path, "whole", **late)
    assert summary(whole)["steps"] == 30
    assert_same_run(killed_and_resumed(tmp_path, monkeypatch, 25, **late), whole)


def test_a_run_without_validations_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"limit_val_batches=0"):
        run(tmp_path, trainer={"limit_val_batches": 0})


def test_a_run_that_its_clock_ends_writes_each_step_once(tmp_path):
    run_dir = run(tmp_path, steps=10**6, every=10**6, trainer={"max_time": "00:00:00:02"})
    steps = [int(row["step"]) for row in rows(run_dir)]
    assert steps == list(range(len(steps)))
    assert rows(run_dir)[-1]["val/loss"]


def test_early_stopping(tmp_path):
    run_dir = run(tmp_path, steps=300, every=3, optimizer={"lr": 0.5}, callbacks={**CALLBACKS, **EARLY})
    losses = [loss for _, loss in column(run_dir, "val/loss")]
    assert summary(run_dir)["status"] == "done"
    assert len(losses) < 60
    assert min(losses) == losses[-3]  # and two without a better one
    assert summary(run_dir)["best_val_loss"] == min(losses)


def test_an_average_of_the_weights_is_what_is_kept(tmp_path):
    flat = {"optimizer": {"schedule": "constant", "warmup_steps": 0}}  # a shorter run is the beginning of a longer one
    plain = [opened(run(tmp_path, f"{steps}", steps=steps, every=100, **flat))["state_dict"] for steps in (1, 2, 3)]
    model, _ = ckpt.load(tmp_path / "3")
    torch.manual_seed(1337)
    average = GPT(model.config, model.vocab_size).state_dict()
    for weights in plain:
        average = {name: 0.9 * value + 0.1 * weights[f"model.{name}"] for name, value in average.items()}
    run_dir = run(tmp_path, steps=3, every=2, callbacks={**CALLBACKS, **EMA}, **flat)
    kept = opened(run_dir)
    for name, value in average.items():
        torch.testing.assert_close(kept["state_dict"][f"model.{name}"], value, rtol=0, atol=5e-7)
    for name, value in kept["training_weights"].items():
        assert torch.equal(value, plain[-1][name])  # the average does not touch the training
    assert column(run_dir, "train/loss") == column(tmp_path / "3", "train/loss")
    assert dict(column(run_dir, "val/loss"))[3] != dict(column(tmp_path / "3", "val/loss"))[3]


def test_no_callbacks_and_no_loggers(tmp_path, capsys):
    run_dir = run(tmp_path, callbacks={}, logger={})
    assert sorted(path.name for path in run_dir.iterdir()) == ["summary.json"]
    found = summary(run_dir)
    assert found["checkpoint"] is None
    assert found["val_loss"] == found["best_val_loss"] > 0
    assert "best val loss" in capsys.readouterr().out


def test_a_stopped_run_without_callbacks_can_be_resumed(tmp_path, monkeypatch):
    for step in (3, 5):
        with monkeypatch.context() as patch:
            stopped_by_signal(patch, step)
            with pytest.raises(SystemExit):
                run(tmp_path, callbacks={}, resume="auto")
        assert opened(tmp_path / "run")["global_step"] == step


def disk_full(monkeypatch, after):
    """torch.save writes half a file and fails, from its `after`-th call on."""
    real, calls = torch.save, []

    def save(content, file, *rest, **options):
        calls.append(1)
        if len(calls) < after:
            return real(content, file, *rest, **options)
        file.write(b"half a checkpoint")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_ends_the_run_and_the_previous_checkpoint_is_whole(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        disk_full(patch, after=4)
        with pytest.raises(UserError, match="cannot be written: No space left") as error:
            run(tmp_path, steps=9, callbacks=LAST_EVERY_3)
    assert "make room" in error.value.hint
    run_dir = tmp_path / "run"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert opened(run_dir)["global_step"] == 0  # the fourth to be written was the last.ckpt of step 3
    assert summary(run_dir)["status"] == "failed"
    assert summary(run(tmp_path, steps=9, callbacks=LAST_EVERY_3, resume="auto"))["status"] == "done"


def test_a_folder_for_checkpoints_that_cannot_be_is_an_error_of_the_users(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match="cannot be written"):
        run(tmp_path)


def test_a_failure_is_not_hidden_by_a_summary_that_cannot_be_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    killed(monkeypatch, 2)
    monkeypatch.setattr("tinygpt.run.write_summary", full)
    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path)


def test_the_summary_has_every_field(tmp_path):
    run_dir = run(tmp_path, overrides=["trainer.max_steps=6"], quick=False)
    found = summary(run_dir)
    assert list(found) == [
        *("status", "steps", "tokens", "seconds", "tokens_per_second", "mfu", "parameters", "val_loss", "best_val_loss"),
        *("best_step", "val_bits_per_byte", "val_perplexity", "val_accuracy", "checkpoint", "seed", "corpus", "forecast"),
        *("peak_memory_bytes", "versions", "overrides"),
    ]
    assert all(found[name] is not None for name in found)
    assert (found["status"], found["seed"], found["overrides"]) == ("done", 1337, ["trainer.max_steps=6"])
    assert found["corpus"]["name"] == "text"
    assert len(found["corpus"]["sha256"]) == 64
    assert found["forecast"].keys() == {"seconds", "step_seconds", "memory_bytes"}
    assert all(value > 0 for value in found["forecast"].values() if value)
    assert Path(found["checkpoint"]).is_file()
    assert (tmp_path / "outputs" / "latest").resolve() == run_dir.resolve()


def test_a_dry_run_says_what_it_would_do_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert train(settings(tmp_path, dry_run=True), tmp_path / "run") is None
    out = capsys.readouterr().out
    assert "parameters" in out
    assert "6 (576 tokens" in out
    assert list((tmp_path / "run").iterdir()) == []
    assert not (tmp_path / "outputs").exists()


def test_the_log_tells_the_story(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="tinygpt")
    run(tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert any(line.startswith("parameters:") for line in said)
    assert sum("validation loss" in line and line.startswith("step ") for line in said) == 3
    assert any(line.startswith("done after 6 steps") for line in said)


def test_a_text_of_one_line_can_be_trained_on(tmp_path, capsys):
    corpus(tmp_path, text().replace("\n", ""))
    run_dir = run(tmp_path)
    assert (run_dir / "samples.md").read_text().count("## step") == 3
    assert "more: python sample.py" in capsys.readouterr().out


def test_a_prompt_that_cannot_be_read_is_refused(tmp_path):
    callbacks = {**CALLBACKS, "samples": {**CALLBACKS["samples"], "prompt": "Ω"}}
    with pytest.raises(UserError, match=r"U\+03A9"):
        run(tmp_path, callbacks=callbacks)


def test_the_checkpoint_holds_no_folder_of_this_machine_and_no_logger(tmp_path):
    card = opened(run(tmp_path, data_dir=str(tmp_path / "somewhere")))["tinygpt"]
    assert "somewhere" not in repr(card)
    assert not {"data_dir", "cache_dir", "logger"} & card["config"].keys()


def test_two_runs_of_one_seed_are_one(tmp_path):
    assert_same_run(run(tmp_path, "one"), run(tmp_path, "two"))
    assert column(run(tmp_path, "three", seed=1), "train/loss") != column(tmp_path / "one", "train/loss")


def test_logging_less_often_changes_no_number(tmp_path):
    every, third = run(tmp_path, "every", steps=7), run(tmp_path, "third", steps=7, trainer={"log_every_n_steps": 2})
    assert [int(row["step"]) for row in rows(third)] == [0, 2, 3, 4, 6, 7]
    kept = {row["step"]: [row[c] for c in EXACT] for row in rows(every)}
    assert all([row[c] for c in EXACT] == kept[row["step"]] for row in rows(third))


def test_lines_past_the_checkpoint_are_cut_back(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        killed(patch, 8)
        with pytest.raises(RuntimeError):
            run(tmp_path, steps=12, every=6)
    assert rows(tmp_path / "run")[-1]["step"] == "8"
    run_dir = run(tmp_path, steps=12, every=6, resume="auto", trainer={"log_every_n_steps": 100})
    assert [int(row["step"]) for row in rows(run_dir)] == [*range(7), 12]


def test_a_trainer_argument_that_is_ours_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.default_root_dir is set by tinygpt"):
        run(tmp_path, trainer={"default_root_dir": "x"})


# A compiled step


COMPILED = {"steps": 4, "every": 2, "callbacks": {k: v for k, v in LAST_EVERY_3.items() if k != "samples"}}
LARGE = {"tokenizer": TokenizerConfig("gpt2")}  # for a loss in chunks


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_a_compiled_step_is_the_same_step_and_goes_on_where_it_stopped(tmp_path, monkeypatch, shared_data):
    monkeypatch.setenv("TINYGPT_DATA_DIR", str(shared_data))
    plain = run(tmp_path, "plain", data=LARGE, **COMPILED)
    with monkeypatch.context() as patch:
        killed(patch, 3)
        with pytest.raises(RuntimeError, match="the power is out"):
            run(tmp_path, "compiled", data=LARGE, compile=True, **COMPILED)
    handed = mock.Mock(wraps=torch.compile)
    monkeypatch.setattr(torch, "compile", handed)
    compiled = run(tmp_path, "compiled", data=LARGE, compile=True, resume="auto", **COMPILED)
    assert [call.args[0] for call in handed.call_args_list][1:] == [fusible_chunk_loss]  # the layers are the first
    for name in ("train/loss", "grad_norm", "val/loss"):
        ours, theirs = column(compiled, name), column(plain, name)
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert [value for _, value in ours] == pytest.approx([value for _, value in theirs], rel=1e-4), name
    assert opened(compiled)["state_dict"].keys() == opened(plain)["state_dict"].keys()


def test_compile_without_a_compiler_is_refused_in_a_line(tmp_path):
    without = {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled")}
    script = ("data=text", f"data.path={corpus(tmp_path)}", "compile=true", "hydra.run.dir=run")
    done = scripts.run("train", *scripts.SMALL, *script, cwd=tmp_path, env=without)
    assert done.code == 2
    error, hint = done.stderr.splitlines()[-2:]
    assert re.match(r"error: compile=true does not work here: .*C\+\+ compiler", error), done.stderr
    assert hint.startswith("hint: use compile=false")
    assert "Traceback" not in done.stderr
    assert summary(tmp_path / "run")["status"] == "failed"
