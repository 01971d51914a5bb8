"""A training run of a second: what the tests of the training core share."""

import contextlib
import csv
import json
import random
from pathlib import Path
from unittest import mock

from tinygpt.config import DataConfig, ModelConfig, OptimizerConfig, TokenizerConfig, TrainConfig
from tinygpt.run import train

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16}
TRAINER = {"_target_": "lightning.Trainer", "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1}
CALLBACKS = {
    "best": {"_target_": "tinygpt.callbacks.BestCheckpoint"},
    "last": {"_target_": "tinygpt.callbacks.LastCheckpoint", "every_n_steps": None},
    "samples": {"_target_": "tinygpt.callbacks.Samples", "prompt": "\n", "max_new_tokens": 20},
}
LAST_EVERY_3 = {**CALLBACKS, "last": {**CALLBACKS["last"], "every_n_steps": 3}}
EMA = {"ema": {"_target_": "tinygpt.callbacks.EMA", "decay": 0.9}}
CSV = {"csv": {"_target_": "tinygpt.loggers.CSVLogger"}}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran\n", "hen", "who", "sang\n", "to", "us.")


def text(length=3000, seed=0):
    """Words by chance: nothing that repeats, so that losses tell one step from another."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length // 3))[:length]


def corpus(folder: Path, content=None) -> str:
    path = folder / "text.txt"
    if not path.exists():
        path.write_text(content or text(), encoding="utf-8")
    return str(path)


def settings(folder: Path, steps=6, every=3, *, model=None, data=None, optimizer=None, trainer=None, **rest) -> TrainConfig:
    """The config of a run on a small text in `folder`."""
    budget = {} if trainer and {"max_tokens", "max_epochs"} & set(trainer) else {"max_steps": steps}
    return TrainConfig(
        model=ModelConfig(**{**SHAPE, **(model or {})}),
        data=DataConfig(
            **{
                "corpus": "text",
                "path": corpus(folder),
                "global_batch_size": 6,
                "tokenizer": TokenizerConfig("char"),
                **(data or {}),
            }
        ),
        optimizer=OptimizerConfig(**{"lr": 1e-2, "warmup_steps": 2, **(optimizer or {})}),
        trainer={**TRAINER, **budget, "val_check_interval": every, **(trainer or {})},
        cache_dir=str(folder / "cache"),
        **{"logger": CSV, "callbacks": CALLBACKS, **rest},
    )


@contextlib.contextmanager
def quickly():
    """Leave out what takes longer than a run of a few steps: the curves, measuring this machine, most of the closing
    sample, and waiting for the disk."""
    with (
        mock.patch("tinygpt.run.draw_curves"),
        mock.patch("tinygpt.forecast.repeat", return_value=[1.0]),
        mock.patch("tinygpt.report.SAMPLE_TOKENS", 5),
        mock.patch("os.fsync"),
    ):
        yield


def run(folder: Path, name="run", overrides=(), quick=True, **changes) -> Path:
    """Train in folder/name, `quickly` unless told otherwise, and give that directory."""
    run_dir = folder / name
    run_dir.mkdir(exist_ok=True)
    with contextlib.chdir(folder), quickly() if quick else contextlib.nullcontext():  # whose outputs/latest it moves
        train(settings(folder, **changes), run_dir, overrides)
    return run_dir


def rows(run_dir: Path):
    with (run_dir / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def column(run_dir: Path, name: str):
    """(step, value) where there is one."""
    return [(int(row["step"]), float(row[name])) for row in rows(run_dir) if row[name]]


def summary(run_dir: Path):
    return json.loads((run_dir / "summary.json").read_text())
