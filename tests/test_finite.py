"""A loss or a gradient that is not finite: the run stops before it is lost, or leaves the step out."""

import re

import pytest
import torch
from tiny import LAST_EVERY_3, column, rows, run, summary

from tinygpt import checkpoint as ckpt
from tinygpt.config import UserError
from tinygpt.finite import FiniteSteps, NotFinite
from tinygpt.lit import LitGPT

NAN = float("nan")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spoil(monkeypatch, *steps, value=NAN):
    """The gradient of these steps (from 0) is not finite."""
    real = LitGPT.backward_part

    def backward_part(self, part, batch):
        loss = real(self, part, batch)
        if self.global_step in steps:
            next(self.model.parameters()).grad.view(-1)[0] = value
        return loss

    monkeypatch.setattr(LitGPT, "backward_part", backward_part)


def weights(run_dir, name="last"):
    return ckpt.open_checkpoint(run_dir / "checkpoints" / f"{name}.ckpt")["state_dict"]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_the_run_stops_with_step_batch_and_last_good_checkpoint(tmp_path, monkeypatch, value):
    spoil(monkeypatch, 7, value=value)
    with pytest.raises(UserError) as refused:
        run(tmp_path, steps=12, every=100, callbacks=LAST_EVERY_3)
    starts = re.search(
        r"step 8 cannot be taken: .* not finite; it held .* begin at the tokens ([\d, ]+)$", str(refused.value)
    )
    assert len(starts[1].split(", ")) == 6
    assert "checkpoints/last.ckpt" in refused.value.hint
    assert "skip_nonfinite=" in refused.value.hint
    assert ckpt.open_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert summary(tmp_path / "run")["status"] == "failed"
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_loss_that_is_not_finite_stops_the_run_too(tmp_path, monkeypatch):
    real = LitGPT.accumulate
    monkeypatch.setattr(LitGPT, "accumulate", lambda self, batch: real(self, batch) * (NAN if self.global_step == 2 else 1))
    with pytest.raises(UserError, match="step 3 cannot be taken"):
        run(tmp_path)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_skipped_step_moves_nothing_and_counts(tmp_path, monkeypatch, optimizer):
    for name, last in (("before", 3), ("run", 4)):
        with monkeypatch.context() as patch:
            spoil(patch, 3)
            arguments = {"optimizer": {"name": optimizer, "schedule": "constant"}, "skip_nonfinite": 1, "every": 100}
            run(tmp_path, name, steps=last, **arguments)
    one, two = weights(tmp_path / "before"), weights(tmp_path / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert summary(tmp_path / "run")["steps"] == 4
    assert [row["step"] for row in rows(tmp_path / "run")] == ["0", "1", "2", "3", "4"]
    assert column(tmp_path / "run", "grad_norm")[-1][1] != column(tmp_path / "run", "grad_norm")[-1][1]  # NaN


def test_no_more_steps_are_skipped_than_allowed_also_when_resumed(tmp_path, monkeypatch):
    spoil(monkeypatch, 2, 5, 7)
    with pytest.raises(UserError, match="step 8 cannot"):
        run(tmp_path, steps=12, every=100, skip_nonfinite=2, callbacks=LAST_EVERY_3)
    with pytest.raises(UserError, match="step 8 cannot"):  # from step 6, where two had been skipped
        run(tmp_path, steps=12, every=100, skip_nonfinite=2, callbacks=LAST_EVERY_3, resume="auto")
    assert (
        summary(run(tmp_path, steps=12, every=100, skip_nonfinite=3, callbacks=LAST_EVERY_3, resume="auto"))["steps"] == 12
    )


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch):
    """However they came to be so: here the optimizer itself does it."""
    real = torch.optim.AdamW.step

    def step(self, *arguments, **options):
        real(self, *arguments, **options)
        self.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(UserError, match="step 1 cannot"):
        run(tmp_path, steps=1)
    for name in ("last", "best"):
        opened = ckpt.open_checkpoint(tmp_path / "run" / "checkpoints" / f"{name}.ckpt")
        assert opened["global_step"] == 0
        assert all(tensor.isfinite().all() for tensor in opened["state_dict"].values())


def test_on_a_device_that_is_not_waited_for_the_first_bad_step_is_remembered():
    watch = FiniteSteps(allowed=0)
    for step, value in enumerate((1.0, NAN, 2.0, NAN)):
        watch.note(step, torch.tensor(value))
    with pytest.raises(NotFinite) as found:
        watch.look()
    assert found.value.step == 1
    fine = FiniteSteps(allowed=0)
    fine.note(0, torch.tensor(1.0))
    fine.look()
