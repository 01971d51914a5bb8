"""The whole loop against the truth: on a source of known entropy the loss ends within 1% of it, and never below."""

import json

import numpy as np
import pytest
from scripts import run_inside

from tinygpt.config import DataConfig
from tinygpt.synthetic import Source


def test_the_entropy_of_a_chain_that_can_be_solved_by_hand():
    source = Source(2, 1, seed=0)
    a, b = 0.1, 0.4  # from the first letter to the second, and back
    source.table = np.array([[1 - a, a], [b, 1 - b]])

    def binary(p):
        return -p * np.log(p) - (1 - p) * np.log(1 - p)

    assert source.stationary == pytest.approx([b / (a + b), a / (a + b)], abs=1e-12)
    assert source.entropy == pytest.approx((b * binary(a) + a * binary(b)) / (a + b), abs=1e-12)


def test_the_text_has_the_entropy_that_is_computed():
    """Judged by its own source, letter by letter."""
    source, length = Source(8, 2, seed=3), 200_000
    letters = ["\nabcdefg".index(letter) for letter in "".join(source.text(length))]
    assert len(letters) == length
    context, surprise = 0, 0.0
    for letter in letters:
        surprise -= np.log(source.table[context, letter])
        context = (context * 8 + letter) % 64
    assert surprise / length == pytest.approx(source.entropy, rel=0.01)


def test_a_source_is_its_seeds():
    first = "".join(Source(8, 2, seed=0).text(100_000))
    assert first == "".join(Source(8, 2, seed=0).text(100_000))
    assert first.startswith("".join(Source(8, 2, seed=0).text(100)))
    assert first[:100] != "".join(Source(8, 2, seed=1).text(100))
    assert Source.of(DataConfig(corpus="synthetic", synthetic_seed=1)).entropy != Source(8, 2, seed=0).entropy


def test_training_ends_within_one_percent_of_the_entropy(tmp_path):
    """Batches, attention, loss, optimizer, schedule, validation, checkpoint and evaluation at once: no part may be wrong."""
    done = run_inside("train", "experiment=synthetic", "trainer=cpu", "hydra.run.dir=run", cwd=tmp_path)
    assert done.code == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["entropy"] == Source(8, 2, seed=0).entropy
    assert summary["entropy"] < summary["best_val_loss"] < 1.01 * summary["entropy"]
    assert f"{summary['entropy']:.4f} nats" in done.stderr
    evaluated = json.loads(run_inside("evaluate", "ckpt=run", "device=cpu", cwd=tmp_path).stdout)
    assert evaluated["loss"] == pytest.approx(summary["best_val_loss"], abs=1e-5)
