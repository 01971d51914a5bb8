"""What must not depend on how many processes a run has, or on whether its weights are divided over them."""

import pytest
import torch
from scripts import run_inside
from test_ddp import TWO, command
from tiny import column
from together import train_together

from tinygpt.checkpoint import open_checkpoint

ONE = ("trainer=cpu",)
SHARDED = ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")
NUMBERS = ("train/loss", "val/loss", "grad_norm", "lr")


def train(folder, trainer, *overrides):
    """A run by as many processes as `trainer` says."""
    arguments = command(folder, *trainer, "trainer.val_check_interval=3", *overrides)[2:]
    if trainer == ONE:
        done = [run_inside("train", *arguments, cwd=folder)]
    else:
        done = train_together(*arguments, cwd=folder)
    assert {one and one.code for one in done} == {0}, done
    return done


def weights(folder, name):
    return open_checkpoint(folder / name / "checkpoints" / "last.ckpt")["state_dict"]


def assert_alike(folder, one, two, atol):
    torch.testing.assert_close(weights(folder, two), weights(folder, one), rtol=0, atol=atol)
    for name in NUMBERS:
        assert dict(column(folder / two, name)) == pytest.approx(dict(column(folder / one, name)), abs=atol), name


def test_muon_in_two_processes_comes_to_the_weights_of_one(tmp_path):
    muon = ("optimizer=muon", "trainer.max_steps=6")
    train(tmp_path, ONE, *muon, "hydra.run.dir=one")
    train(tmp_path, TWO, *muon, "hydra.run.dir=two")
    assert_alike(tmp_path, "one", "two", atol=1e-5)


@pytest.mark.parametrize(("first", "then"), [(TWO, ONE), (ONE, TWO)], ids=["2 to 1", "1 to 2"])
def test_a_run_goes_on_with_another_number_of_processes(first, then, tmp_path):
    train(tmp_path, ONE, "trainer.max_steps=8", "optimizer.schedule=constant", "hydra.run.dir=whole")
    train(tmp_path, first, "trainer.max_steps=5", "optimizer.schedule=constant", "hydra.run.dir=run")
    resumed = ("trainer.max_steps=8", "optimizer.schedule=constant", "resume=auto", "hydra.run.dir=run")
    train(tmp_path, then, *resumed)
    own = {row: value for row, value in column(tmp_path / "run", "train/loss") if row > 5}
    assert own.keys() == {6, 7, 8}
    assert own == pytest.approx({k: v for k, v in column(tmp_path / "whole", "train/loss") if k > 5}, abs=1e-6)
    torch.testing.assert_close(weights(tmp_path, "run"), weights(tmp_path, "whole"), rtol=0, atol=1e-5)


def test_resume_latest_means_the_same_run_in_every_process(tmp_path):
    train(tmp_path, TWO, "trainer.max_steps=3", "hydra.run.dir=outputs/first")
    train(tmp_path, TWO, "resume=latest", "trainer.max_steps=5", "hydra.run.dir=outputs/second")
    assert [step for step, _ in column(tmp_path / "outputs/second", "train/loss")] == [4, 5]


@pytest.mark.parametrize("shape", [(), ("model=llama_nano", "model.n_kv_head=1")], ids=["gpt2", "llama"])
def test_a_sharded_model_trains_like_a_whole_one(shape, tmp_path):
    """Losses, and the norm that gradients are clipped by; then its checkpoint is that of any other run."""
    steps = ("trainer.max_steps=6", "optimizer.grad_clip=0.5", *shape)
    train(tmp_path, ONE, *steps, "hydra.run.dir=whole")
    done = train(tmp_path, SHARDED, *steps, "hydra.run.dir=sharded")
    assert_alike(tmp_path, "whole", "sharded", atol=1e-5)
    assert max(norm for _, norm in column(tmp_path / "whole", "grad_norm")) > 0.5  # so they were clipped
    assert done[1].stdout == done[1].stderr == ""
    path = tmp_path / "sharded/checkpoints/last.ckpt"
    assert path.stat().st_size == pytest.approx((tmp_path / "whole/checkpoints/last.ckpt").stat().st_size, rel=0.05)
    sampled = [
        run_inside("sample", f"ckpt={run}", "max_new_tokens=20", "seed=1", cwd=tmp_path) for run in ("whole", "sharded")
    ]
    assert sampled[0] == sampled[1]
    assert sampled[1].code == 0


def test_a_run_goes_on_sharded_and_whole_again(tmp_path):
    constant = ("optimizer.schedule=constant", "resume=auto", "hydra.run.dir=run")
    train(tmp_path, ONE, "trainer.max_steps=9", "optimizer.schedule=constant", "hydra.run.dir=whole")
    for trainer, steps in ((ONE, 3), (SHARDED, 5), (SHARDED, 7), (ONE, 9)):
        train(tmp_path, trainer, f"trainer.max_steps={steps}", *constant)
    assert_alike(tmp_path, "whole", "run", atol=1e-5)
    a, b = (open_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")["optimizer_states"] for name in ("whole", "run"))
    torch.testing.assert_close(b, a, rtol=0, atol=1e-5)


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
def test_what_a_sharded_model_cannot_have_is_refused(override, error, hint, tmp_path):
    arguments = command(tmp_path, *SHARDED, "trainer.max_steps=3", "hydra.run.dir=run", override)[2:]
    done = run_inside("train", *arguments, cwd=tmp_path)
    assert done.code == 2
    (first, second) = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert hint in second
    assert not (tmp_path / "run").exists()
