"""What a run goes on from: whether a checkpoint, which is readable, holds all of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from tinygpt.checkpoint import first_line, open_checkpoint, stored
from tinygpt.config import TrainConfig, UserError
from tinygpt.kinds import describe, fits
from tinygpt.lit import LitGPT

_NEEDED: dict[tuple[str, ...], dict[str, Any]] = {
    (): {"global_step": int, "optimizer_states": list, "callbacks": dict, "loops": dict},
    ("tinygpt",): {"logger_ids": dict},
    ("tinygpt", "corpus"): {"sha256": str},
    ("tinygpt", "config"): {"model": dict, "data": dict, "optimizer": dict, "trainer": dict, "callbacks": dict, "seed": int},
    ("tinygpt", "config", "data"): {"global_batch_size": int, "val_fraction": float, "tokenizer": dict},
}
_ELSE = "weights alone can be the start of a new run: init_from=CHECKPOINT"


def open_resumable(path: Path) -> dict[str, Any]:
    """The opened checkpoint, every number in it compared with its checksum; UserError where a run cannot go on from it."""
    opened = open_checkpoint(path, whole=True)
    for place, needed in _NEEDED.items():
        holder = reduce(lambda values, name: values[name], place, opened)
        for name, kind in needed.items():
            if not fits(holder.get(name), kind):
                raise UserError(f"no run can go on from {path}: its {name} is not {describe(kind)}", _ELSE)
    stored(TrainConfig, opened["tinygpt"]["config"], "a run")
    return opened


@contextmanager
def restoring(path: str | None, module: LitGPT) -> Iterator[None]:
    """UserError for what goes wrong before the first step of a run that goes on from `path`: what is there does not fit."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if path is None or module.last_step:
            raise
        message = f"the run cannot go on from {path}: {type(error).__name__}: {first_line(error)}"
        raise UserError(message, f"debug=true shows where; {_ELSE}") from error
