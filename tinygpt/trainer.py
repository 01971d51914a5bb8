"""From the trainer group to a `lightning.Trainer`: what hardware there is, how many steps the budget buys, and which of
Lightning's arguments are ours to set."""

import inspect
import logging
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from tinygpt.callbacks import DurableIO
from tinygpt.config import BUDGETS, UserError, nearest
from tinygpt.ranks import launched
from tinygpt.targets import build

OURS = {
    "callbacks": "callbacks=... and callbacks.NAME._target_=...",
    "logger": "logger=csv, tensorboard, wandb or none",
    "default_root_dir": "hydra.run.dir=...",
    "min_epochs": "trainer.min_steps=N (a run is one endless epoch)",
    "num_sanity_val_steps": "nothing: every run begins with a whole validation",
    "check_val_every_n_epoch": "trainer.val_check_interval=N (optimizer steps)",
    "enable_checkpointing": "callbacks=none for no checkpoints",
    "use_distributed_sampler": "nothing: the batches are divided by tinygpt",
    "enable_model_summary": "dry_run=true",
}


LEAST = {"log_every_n_steps": 1, "num_nodes": 1}  # which Lightning does not look at


def check_trainer(settings: dict[str, Any]) -> None:
    """Refuse names that `L.Trainer` does not have, those that are ours, and hardware that is not here."""
    known = [name for name in inspect.signature(L.Trainer.__init__).parameters if name != "self"]
    for name, value in settings.items():
        if name in OURS and value is not None:
            raise UserError(f"trainer.{name} is set by tinygpt", f"use {OURS[name]}")
        if name not in (*known, "_target_", "max_tokens"):
            raise UserError(f"there is no key trainer.{name}", nearest(name, [*known, "max_tokens"], "trainer."))
    interval = settings.get("val_check_interval")
    if isinstance(interval, bool) or not isinstance(interval, int | None) or (interval is not None and interval < 1):
        raise UserError(f"trainer.val_check_interval={interval} is out of range", "it counts optimizer steps: 1 or more")
    refuse_unfit(settings)
    for name, least in LEAST.items():
        if isinstance(value := settings.get(name), int) and value < least:
            raise UserError(f"trainer.{name}={value} is out of range", f"it must be at least {least}")


def refuse_unfit(settings: dict[str, Any]) -> None:
    """UserError for what Lightning takes and a run of ours cannot be with."""
    if re.search("spawn|fork|notebook", str(settings.get("strategy"))):
        raise UserError(f"trainer.strategy={settings['strategy']} is for notebooks", "use trainer.strategy=ddp")
    if settings.get("limit_val_batches") == 0:
        raise UserError(
            "trainer.limit_val_batches=0: without a validation there is no checkpoint", "data.val_tokens=N makes them short"
        )


def accelerator(settings: dict[str, Any]) -> str:
    """cpu, cuda or mps. Raises UserError where the one asked for is not here."""
    wanted = settings.get("accelerator") or "auto"
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted in ("auto", "gpu"):
        found = next(name for name, is_here in here.items() if is_here)
        if wanted == "gpu" and found == "cpu":
            raise UserError("trainer.accelerator=gpu: there is no GPU here", "use trainer=cpu")
        return found
    if not here.get(wanted, True):
        name = {"cuda": "CUDA GPU", "mps": "Apple GPU (MPS)"}[wanted]
        raise UserError(f"no {name} is available (trainer.accelerator={wanted})", f"use trainer=cpu{why_no_gpu(wanted)}")
    return str(wanted)


def why_no_gpu(wanted: str) -> str:
    if wanted == "cuda" and torch.version.cuda is None:
        return "; this build of torch has no CUDA: install one that does"
    return ""


def precision(settings: dict[str, Any], device: str) -> str:
    """auto is bf16-mixed on a CUDA device that has it, else 32-true."""
    wanted = str(settings.get("precision") or "auto")
    if wanted != "auto":
        return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}.get(wanted, wanted)
    return "bf16-mixed" if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"


def world_size(settings: dict[str, Any], device: str) -> int:
    """Processes of the run: what a launcher says, else devices times nodes."""
    if found := launched():
        return found[0] * found[1]
    devices = settings.get("devices", 1)
    here = torch.cuda.device_count() if device == "cuda" else 1
    count = here if devices in ("auto", -1, "-1", None) else device_count(devices)
    if device == "cuda" and count > here:
        raise UserError(f"trainer.devices={devices}: there are {here} GPUs here", f"use trainer.devices={here}")
    return max(1, count) * machines(settings)


def machines(settings: dict[str, Any]) -> int:
    return int(settings.get("num_nodes") or 1)


def processes_here(settings: dict[str, Any], device: str) -> int:
    """Processes of the run on this machine."""
    found = launched()
    return found[0] if found else world_size(settings, device) // machines(settings)


def device_count(devices: Any) -> int:
    """How many `trainer.devices` names: a number, a list of them, or such a list as text, 0,1."""
    if isinstance(devices, list) or "," in str(devices):
        return len(devices) if isinstance(devices, list) else len(devices.strip(",").split(","))
    try:
        return int(devices)
    except ValueError as error:
        raise UserError(f"trainer.devices={devices} is not known", "a number, a list of them, or auto") from error


def total_steps(settings: dict[str, Any], batch_size: int, tokens_per_row: float, rows_per_epoch: int) -> int:
    """Optimizer steps that the budget buys; an epoch is one visit of every window or document."""
    name = next(name for name in BUDGETS if settings.get(name) is not None)
    value = float(settings[name])
    units = {"max_steps": 1.0, "max_tokens": batch_size * tokens_per_row, "max_epochs": batch_size / rows_per_epoch}
    return max(1, math.ceil(round(value / units[name], 6)))


def make_trainer(
    settings: dict[str, Any],
    *,
    steps: int,
    device: str,
    run_dir: Path,
    callbacks: list[L.Callback],
    loggers: list[Any],
    allow: Sequence[str] = (),
) -> L.Trainer:
    """The Trainer of a run: one endless epoch of `steps` batches, each an optimizer step. allow: see targets.py."""
    quieten()
    plugins = settings.get("plugins") or []
    overridden = {
        **{name: value for name, value in settings.items() if name not in BUDGETS},
        "accelerator": device,
        "precision": precision(settings, device),
        "max_steps": steps,
        "max_epochs": -1,
        "min_epochs": 0,  # else trainer.min_steps waits for the endless epoch's end
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "default_root_dir": str(run_dir),
        "plugins": [*plugins, DurableIO()],
        "callbacks": callbacks,
        "logger": loggers,
    }
    if found := launched():  # torchrun knows how many it has started: no need to say it twice
        overridden["devices"], overridden["num_nodes"] = found
    if device == "cpu" and (here := processes_here(settings, device)) > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    trainer = build(overridden, "trainer", L.Trainer, allow)
    assert isinstance(trainer, L.Trainer)
    return trainer


def quieten() -> None:
    """Lightning says through its own handler what our forecast says better; its warnings do not fit our loader."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # tokens come from memory maps: workers would slow it down
        ".*dataloader is not resumable.*",  # it is: its batches are a function of the step
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*The number of training batches.*",
        ".*GPU available but not used.*",
        ".*sync_dist=True.*",  # torchmetrics has reduced these values already
    ):
        warnings.filterwarnings("ignore", message=message)
