"""What a run goes on from: whether a checkpoint, which is readable, holds all of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinygpt.checkpoint import first_line, open_checkpoint, stored
from tinygpt.config import TrainConfig, UserError
from tinygpt.kinds import describe, fits
from tinygpt.lit import LitGPT
from tinygpt.ranks import has_lost_contact

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
    if opened["global_step"] < 0:
        raise UserError(f"no run can go on from {path}: its global_step is below 0", _ELSE)
    if not is_counts(opened["loops"]):
        raise UserError(f"no run can go on from {path}: its loops hold more than numbers", _ELSE)
    stored(TrainConfig, opened["tinygpt"]["config"], "a run")
    return opened


def is_counts(value: Any) -> bool:
    """Whether there are only numbers, and nothing, in nested dictionaries."""
    if isinstance(value, dict):
        return all(is_counts(part) for part in value.values())
    return value is None or isinstance(value, int | float)


def refuse_misfit(opened: dict[str, Any], module: LitGPT) -> None:
    """UserError unless all that the optimizer has stored of a weight has that weight's shape and type.

    Its fused update does not look: it would read and write beyond what is there.
    """
    try:
        saved, own = opened["optimizer_states"][0], module.configure_optimizers()
        keys = [key for group in saved["param_groups"] for key in group["params"]]
        weights = [weight for group in own.param_groups for weight in group["params"]]
        for key, weight in zip(keys, weights, strict=True):
            for name, value in saved["state"].get(key, {}).items():
                shape, kind = ((), torch.float32) if name == "step" else (weight.shape, weight.dtype)
                if not isinstance(value, Tensor) or value.shape != shape or value.dtype != kind:
                    raise TypeError(f"{name} of weight {key} has another shape or type")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        message = f"the run cannot go on from {opened['path']}: its optimizer's state does not fit: {first_line(error)}"
        raise UserError(message, _ELSE) from error


@contextmanager
def restoring(opened: dict[str, Any] | None, module: LitGPT) -> Iterator[str | None]:
    """The file to go on from, if any. What goes wrong before the first step is then a UserError: it does not fit."""
    path = opened["path"] if opened else None
    try:
        yield path
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        of_others = has_lost_contact(error) or (isinstance(error, OSError) and error.filename != path)
        if opened is None or of_others or module.global_step > opened["global_step"]:
            raise
        message = f"the run cannot go on from {path}: {type(error).__name__}: {first_line(error)}"
        raise UserError(message, f"debug=true shows where; {_ELSE}") from error
