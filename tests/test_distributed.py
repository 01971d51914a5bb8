"""What must not depend on how many processes a run has, or on whether its weights are divided over them."""

import pytest
import tiny
import torch
from lightning import Trainer
from scripts import run_inside
from test_ddp import command
from tiny import column
from together import places, together, train_together, wait_until

from tinygpt.checkpoint import open_checkpoint

pytestmark = pytest.mark.usefixtures("quick")

TWO = {"strategy": "ddp"}
SHARDED = {"strategy": {"_target_": "tinygpt.sharding.FSDP2"}}
CONSTANT = {"lr": 1e-2, "warmup_steps": 2, "schedule": "constant"}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 1, "n_layer": 2, "tie_embeddings": False}


def train(folder, name, trainer=None, before=lambda rank: None, count=2, **changes):
    """A run by one process, or by `count` where there is a `trainer`; before(rank) comes first in each."""

    def work(rank):
        before(rank)
        return str(tiny.run(folder, name, trainer=trainer, **changes))

    assert (together(work, places(count=count)) if trainer else [work(0)])[0] == str(folder / name)


def last(folder, name):
    return open_checkpoint(folder / name / "checkpoints" / "last.ckpt")


def numbers(folder, name, steps=None):
    """{(metric, step): value} of what a run has logged at every step, or of what one has at these."""
    found = {(metric, step): v for metric in ("train/loss", "grad_norm", "lr") for step, v in column(folder / name, metric)}
    return {key: value for key, value in found.items() if steps is None or key[1] in steps}


def assert_alike(folder, one, two):
    for part in ("state_dict", "optimizer_states"):
        torch.testing.assert_close(last(folder, two)[part], last(folder, one)[part], rtol=0, atol=1e-5)
    assert numbers(folder, two) == pytest.approx(numbers(folder, one), abs=1e-5)
    common = dict(column(folder / one, "val/loss"))
    assert {k: v for k, v in column(folder / two, "val/loss") if k in common} == pytest.approx(common, abs=1e-6)


def test_muon_in_two_processes_comes_to_the_weights_of_one(tmp_path):
    for name, trainer in (("one", None), ("two", TWO)):
        train(tmp_path, name, trainer, optimizer={"name": "muon"})
    assert_alike(tmp_path, "one", "two")


def test_a_run_goes_on_with_another_number_of_processes_whole_or_divided(tmp_path):
    """One, two, one, then divided over two, and one again."""
    run = {"every": 9, "model": LLAMA, "optimizer": CONSTANT}
    train(tmp_path, "whole", steps=9, **run)
    for trainer, steps in ((None, 2), (TWO, 4), (None, 5), (SHARDED, 6), (SHARDED, 8), (None, 9)):
        train(tmp_path, "run", trainer, steps=steps, resume="auto", **run)
    assert {step for _, step in numbers(tmp_path, "run")} == set(range(1, 10))
    assert_alike(tmp_path, "whole", "run")


def test_a_run_of_two_processes_goes_on_with_four(tmp_path):
    run = {"every": 9, "optimizer": CONSTANT, "data": {"global_batch_size": 12}}
    train(tmp_path, "whole", steps=6, **run)
    for count, steps in ((2, 3), (4, 6)):
        train(tmp_path, "run", TWO, count=count, steps=steps, resume="auto", **run)
    assert {step for _, step in numbers(tmp_path, "run")} == set(range(1, 7))
    assert_alike(tmp_path, "whole", "run")


def test_resume_latest_means_the_same_run_in_every_process(tmp_path, monkeypatch):
    """Also in one that looks for it when the first has begun, as those that it starts do."""
    fit, begun = Trainer.fit, tmp_path / "begun"

    def before(rank):
        if rank == 1:
            wait_until(begun.exists)
        else:
            Trainer.fit = lambda *args, **options: (begun.touch(), fit(*args, **options))

    monkeypatch.chdir(tmp_path)
    train(tmp_path, "first", steps=2)
    train(tmp_path, "second", TWO, before, steps=4, resume="latest", overrides=("trainer.max_steps=4",))
    assert [step for step, _ in column(tmp_path / "second", "train/loss")] == [3, 4]


def test_a_divided_model_trains_like_a_whole_one(tmp_path):
    """Losses, and the norm that gradients are clipped by: that of the whole."""
    clipped = {"lr": 1e-2, "warmup_steps": 2, "grad_clip": 0.3}
    for name, trainer in (("whole", None), ("divided", SHARDED)):
        train(tmp_path, name, trainer, model={"bias": True}, optimizer=clipped, data={"micro_batch_size": 2})
    assert_alike(tmp_path, "whole", "divided")
    assert min(norm for _, norm in column(tmp_path / "whole", "grad_norm")) > 0.3  # so all were clipped
    sizes = [(tmp_path / name / "checkpoints" / "best.ckpt").stat().st_size for name in ("whole", "divided")]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.05)  # a tied weight is stored once


def test_trainer_fsdp_makes_a_run_like_any_other(tmp_path):
    sharded = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.max_steps=3", "hydra.run.dir=run")
    first, second = train_together(*command(tmp_path, *sharded)[2:], cwd=tmp_path)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert "Warning" not in first.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {".hydra", "checkpoints", "metrics.csv", "summary.json", "train.log"}
    sampled = run_inside("sample", "ckpt=run", "max_new_tokens=20", cwd=tmp_path)
    assert sampled.code == 0, sampled.stderr
    assert sampled.stdout.strip()


@pytest.mark.parametrize(
    ("override", "error", "hint"),
    [
        ("optimizer=muon", "optimizer=muon cannot train a sharded model", "trainer=ddp"),
        ("compile=true", "compile=true is not known to work", "compile=false"),
        ("callbacks=[default,ema]", "callbacks=ema cannot average", "trainer=ddp"),
        ("trainer.precision=16-mixed", "16-mixed", "bf16-mixed"),
        ("trainer.strategy=fsdp", "an older FSDP", "trainer=fsdp"),
    ],
)
def test_what_a_divided_model_cannot_have_is_refused(override, error, hint, tmp_path):
    sharded = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=3")
    done = run_inside("train", *command(tmp_path, *sharded, "hydra.run.dir=run", override)[2:], cwd=tmp_path)
    assert done.code == 2
    (first, second) = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert hint in second
    assert not (tmp_path / "run").exists()
