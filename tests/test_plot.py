"""Pictures of runs: curves.png, and `python -m tinygpt.plot` as a user types it. What is drawn is read from the figure."""

import csv
import json
import subprocess
import sys

import pytest
from scripts import ROOT

from tinygpt import plot
from tinygpt.summary import read_metrics

COLUMNS = ("step", "tokens", "train/loss", "val/loss", "val/perplexity", "val/accuracy", "lr", "seconds")


def leave(folder, factor=1.0, overrides=(), lines=4):
    """A run directory in which the loss falls to `factor`."""
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for step in range(lines):
            val = (4 * factor / (step + 1), 7, 0.1 * step) if step % 2 == 0 else ("", "", "")
            writer.writerow([step, 96 * step, 3 * factor / (step + 1) if step else "", *val, 1e-3, step / 2])
    (folder / "summary.json").write_text(json.dumps({"overrides": list(overrides)}))
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return leave(tmp_path / "outputs" / "a"), leave(tmp_path / "outputs" / "b", 2.0)


def drawn(figure):
    """The lines of each panel: (axis labels) -> list of [(x, y), ...]."""
    return {
        (axes.get_xlabel(), axes.get_ylabel()): [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
        for axes in figure.axes
    }


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_runs_are_laid_over_each_other(runs, capsys):
    assert plot.main(["outputs/a", "outputs/b"]) == 0
    assert capsys.readouterr().out == "runs.png\n"
    assert (runs[0].parents[1] / "runs.png").read_bytes().startswith(b"\x89PNG")
    figure = plot.overlay(plot.read_runs(runs), ["loss"], list(plot.AXES))
    assert legend(figure) == ["a", "b", "validation", "training, one batch"]
    for x, axes in zip(plot.AXES, figure.axes, strict=True):
        a_train, a_val, b_train, b_val = [list(zip(*line.get_data(), strict=True)) for line in axes.lines]
        scale = {"step": 1, "tokens": 96, "seconds": 0.5}[x]
        assert a_train == [(step * scale, 3 / (step + 1)) for step in (1, 2, 3)]
        assert a_val == [(0, 4), (2 * scale, 4 / 3)]
        assert b_val == [(0, 8), (2 * scale, 8 / 3)]
        assert [point[0] for point in b_train] == [point[0] for point in a_train]
        assert axes.lines[0].get_color() == axes.lines[1].get_color() != axes.lines[2].get_color()


def test_metrics_and_axes_are_chosen(runs):
    assert plot.main(["outputs/a", "outputs/b", "metric=accuracy,val/perplexity,lr", "x=tokens", "out=other.png"]) == 0
    assert (runs[0].parents[1] / "other.png").exists()
    figure = plot.overlay(plot.read_runs(runs), ["accuracy", "lr"], ["tokens"])
    panels = drawn(figure)
    assert panels["", "validation accuracy"] == [[(0, 0), (192, 0.2)]] * 2
    assert [len(line) for line in panels["tokens", "lr"]] == [4, 4]
    assert legend(figure) == ["a", "b"]


def test_a_command_of_its_own(runs):
    command = [sys.executable, "-X", "importtime", "-m", "tinygpt.plot", "outputs/a", "outputs/b/metrics.csv"]
    done = subprocess.run(command, cwd=runs[0].parents[1], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "runs.png\n")
    assert "| matplotlib" in done.stderr
    assert "| torch" not in done.stderr  # a picture is there at once


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["outputs/c"], "outputs/c/metrics.csv cannot be read", "train.py"),
        (["outputs/empty"], "outputs/empty/metrics.csv holds no line", "first validation"),
        (["outputs/words"], "outputs/words/metrics.csv is not a metrics.csv", "train.py"),
        (["outputs/a", "metric=val/acuracy"], "there is no metric val/acuracy", "did you mean val/accuracy?"),
        (["outputs/a", "x=token"], "there is no x token", "did you mean tokens?"),
        (["outputs/a", "metrics=loss"], "there is no key metrics", "did you mean metric?"),
        (["out=a.png"], "there is no run to draw", "outputs/a"),
        (["outputs/a", "out=none/a.png"], "none/a.png cannot be written", "out="),
        (["outputs/a", "out=a.doc"], "a.doc cannot be written", "out="),
        (["outputs/lines", "metric=loss"], "no run has loss over step", "columns"),
    ],
)
def test_what_cannot_be_drawn_is_one_error(runs, capsys, arguments, error, hint):
    outputs = runs[0].parent
    leave(outputs / "empty", lines=0)
    (leave(outputs / "words") / "metrics.csv").write_text("step,tokens\n1,many\n")
    (leave(outputs / "lines") / "metrics.csv").write_text("step,tokens,train/loss\n1,1,nan\n")
    before = set(outputs.parent.rglob("*"))
    assert plot.main(arguments) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"error: {error}")
    assert second.startswith("hint: ")
    assert hint in second
    assert set(outputs.parent.rglob("*")) == before


def test_help_says_the_keys(capsys):
    assert plot.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("metric=", "x=", "out=", "tokens", "perplexity"))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["one/a", "one/b"], ["a", "b"]),
        (["2026-11-20/10-00-00", "2026-11-21/10-00-00"], ["2026-11-20", "2026-11-21"]),
        (["x/1/y", "x/2/z"], ["1/y", "2/z"]),
        (["x", "x/y"], ["x", "y"]),
        (["lr=1e-3", "lr=2e-3"], ["lr=1e-3", "lr=2e-3"]),
        (["only"], ["only"]),
        (["a", "a", "../a"], ["a"]),
    ],
)
def test_the_legend_has_what_differs(tmp_path, monkeypatch, names, expected):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in dict.fromkeys(name for name in names if name != "../a"):
        leave(tmp_path / "here" / name)
    if "../a" in names:
        (tmp_path / "a").symlink_to(tmp_path / "here" / "a")
    paths, _ = plot.read_arguments(names)
    assert [run.label for run in plot.read_runs(paths)] == expected


def test_the_legend_has_the_overrides_that_differ(tmp_path):
    first = leave(tmp_path / "0", overrides=["optimizer.lr=1e-3", "seed=1", "hydra.run.dir=0"])
    second = leave(tmp_path / "1", overrides=["seed=1", "optimizer.lr=2e-3"])
    assert [run.label for run in plot.read_runs([first, second])] == ["0: optimizer.lr=1e-3", "1: optimizer.lr=2e-3"]


def test_many_runs_can_be_told_apart(tmp_path):
    paths = [leave(tmp_path / str(n)) for n in range(12)]
    figure = plot.overlay(plot.read_runs(paths), ["accuracy"], ["step"])
    looks = {(line.get_color(), str(line.get_linestyle()), line._unscaled_dash_pattern) for line in figure.axes[0].lines}
    assert len(looks) == 12


def test_curves_show_loss_accuracy_and_perplexity(runs):
    figure = plot.curves(read_metrics(runs[0] / "metrics.csv"), "title")
    panels = drawn(figure)
    train, val, best = panels["tokens", "loss (nats per token)"]
    assert (len(train), len(val), best) == (3, 2, [(192, 4 / 3)])
    assert panels["", "validation accuracy"] == [[(0, 0), (192, 0.2)]]
    assert panels["tokens", "validation perplexity"] == [[(0, 7), (192, 7)]]


LITTLE = ["", "0,0,,2.5,7,0.1,,0.1\n", "1,96,2.5,,,,1,0.1\n", "1,96,nan,inf,inf,nan,1,0.1\n"]


@pytest.mark.parametrize("lines", LITTLE)
def test_curves_of_little_or_nothing_are_drawn(tmp_path, lines):
    (tmp_path / "metrics.csv").write_text(",".join(COLUMNS) + f"\n{lines}")
    plot.draw_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", "a title with $ and _ in it: $x_")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
