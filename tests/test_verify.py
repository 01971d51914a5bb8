"""verify_resume=true: says that a killed run is the same, finds it where it is not, and leaves nothing behind."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from scripts import SMALL, files, run_inside
from tiny import LAST_EVERY_3, corpus
from tiny import run as train
from together import together

from tinygpt import verify
from tinygpt.verify import compare, different


def forked(command, **_):
    """subprocess.run of a script, but in a process forked from this one: nothing is imported again."""

    def work(rank):
        GlobalHydra.instance().clear()  # this one is amid a job of its own
        return run_inside(Path(command[1]).stem, *command[2:], cwd=Path.cwd())

    (done,) = together(work, [{}])
    return subprocess.CompletedProcess(command, done.code, "", done.stderr)


def test_the_proof_on_a_users_own_config(tmp_path, monkeypatch):
    """The run that is killed is a process as a user's; the two others are forked."""
    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(**{**vars(subprocess), "run": forked}))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as the forked ones have: sums of one order
    hard = (
        *("model.dropout=0.2", "data.micro_batch_size=4", "callbacks=[default,ema]", "optimizer=muon"),
        *("callbacks.last.every_n_steps=3", "trainer.max_steps=12", "trainer.val_check_interval=5"),
    )
    text = corpus(tmp_path)
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    (tmp_path / "outputs" / "latest").symlink_to("a")
    settings = ("data=text", f"data.path={text}", "trainer=cpu", "logger=none", *SMALL, *hard)
    done = run_inside("train", *settings, "verify_resume=true", cwd=tmp_path)
    assert done.code == 0, done.stderr
    assert "identical: " in done.stdout
    assert "13 lines of metrics.csv" in done.stdout
    assert "killed after step" in done.stderr
    assert (tmp_path / "outputs" / "latest").readlink() == Path("a")
    assert files(tmp_path / "outputs") == {"a", "latest"}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return train(folder, "one", callbacks=LAST_EVERY_3), train(folder, "two", callbacks=LAST_EVERY_3)


def test_two_runs_of_one_config_are_the_same(two):
    verdict = compare(*two)
    assert verdict.difference is None
    assert verdict.tensors > 20
    assert verdict.lines == 7


def spoil_weight(run_dir):
    path = run_dir / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state_dict"]["model.ln_f.weight"][3] += 0.5
    torch.save(checkpoint, path)


def spoil_line(run_dir):
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    lines[3] = lines[3].replace(",", ",1", 1)
    (run_dir / "metrics.csv").write_text("\n".join(lines) + "\n")


def spoil_timing(run_dir):
    text = (run_dir / "metrics.csv").read_text()
    (run_dir / "metrics.csv").write_text("\n".join(f"{line}1" if i else line for i, line in enumerate(text.splitlines())))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_weight, "last.ckpt: state_dict.model.ln_f.weight: 1 of 16 numbers differ, by up to 0.5"),
        (spoil_line, "metrics.csv: line 4.tokens: "),
        (lambda folder: (folder / "metrics.csv").write_text("step\n"), " is in one only"),
        (lambda folder: (folder / "samples.md").write_text(""), "samples.md"),
        (lambda folder: (folder / "checkpoints" / "best.ckpt").unlink(), "best.ckpt is in one only"),
        (spoil_timing, None),
    ],
)
def test_the_first_difference_is_named(two, tmp_path, spoil, said):
    spoilt = shutil.copytree(two[1], tmp_path / "spoilt")
    spoil(spoilt)
    found = compare(two[0], spoilt).difference
    assert found == said if said is None else said in found


def test_nan_is_itself():
    assert list(different({"a": float("nan")}, {"a": float("nan")})) == []
    assert list(different({"a": float("nan")}, {"a": 1.0})) == ["a: nan and 1.0"]
