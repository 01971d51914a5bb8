"""What is wrong with a run's config, found before any text is read.

Names and types are compared with signatures, and what Lightning itself refuses comes out by building its objects once,
to be thrown away.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import Logger

from tinygpt.config import BUDGETS, ModelConfig, TrainConfig, UserError, nearest, shorten
from tinygpt.model import outline
from tinygpt.sharding import check_sharding
from tinygpt.targets import build, check_node, is_node
from tinygpt.trainer import accelerator, check_trainer, make_trainer

AUTO = (*BUDGETS, "precision")  # what the trainer group says in words of ours


def preflight(config: TrainConfig) -> str:
    """The device that the run will be on, cpu, cuda or mps; UserError where something that it needs cannot be made."""
    check_trainer(config.trainer)
    check_sharding(config)
    allow = config.allow_targets
    check_node(config.trainer, "trainer", L.Trainer, allow, ignore=AUTO)
    for name, node in config.logger.items():
        check_known(config.logger, "logger", name)
        check_node(node, f"logger.{name}", Logger, allow)
    for name in config.callbacks:
        check_known(config.callbacks, "callbacks", name)
    device = accelerator(config.trainer)
    refuse_giant(config.model, device)
    callbacks = [build(node, f"callbacks.{name}", L.Callback, allow) for name, node in config.callbacks.items()]
    try_trainer(config.trainer, device, callbacks, allow)
    return device


def try_trainer(settings: dict[str, Any], device: str, callbacks: list[L.Callback], allow: Sequence[str]) -> None:
    """UserError where Lightning refuses to make the Trainer, with the setting that is the reason."""

    def make(without: str = "") -> torch.device:
        given = {name: value for name, value in settings.items() if name != without}
        trainer = make_trainer(given, steps=1, device=device, run_dir=Path(), callbacks=callbacks, loggers=[], allow=allow)
        return trainer.strategy.root_device

    threads = torch.get_num_threads()
    try:
        if (own := make()).type == "cuda":
            torch.cuda.set_device(own)  # the forecast measures where this process will train
    except UserError as error:
        reason = next((name for name in settings if name != "_target_" and succeeds(partial(make, name))), None)
        if reason is None or f"trainer.{reason}=" in str(error):
            raise
        why = str(error).removeprefix("trainer: ")
        raise UserError(f"trainer.{reason}={shorten(settings[reason])}: {why}", error.hint) from error
    finally:
        torch.set_num_threads(threads)  # which several processes on one machine divide


def succeeds(work: Callable[[], object]) -> bool:
    try:
        work()
    except UserError:
        return False
    return True


def check_known(nodes: dict[str, Any], kind: str, name: str) -> None:
    """UserError for settings of a node that is not there: most likely its name is misspelt."""
    if not is_node(nodes[name]):
        known = [other for other, node in nodes.items() if is_node(node)]
        hint = f"{nearest(name, known, f'{kind}.')}, or " if known else ""
        hint += f"say which class: {kind}.{name}._target_=tinygpt.callbacks.EMA, for example"
        raise UserError(f"{kind}.{name} has no _target_", hint)


def refuse_giant(model: ModelConfig, device: str) -> None:
    """UserError for a model of which two layers, which the forecast measures, are larger than this machine's memory."""
    if device != "cpu" or not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    layer = outline(replace(model, n_layer=1, block_size=1, position="learned"), 1).h
    positions = model.block_size * (model.n_embd if model.position == "learned" else model.head_dim)
    needed = 4 * (positions + min(model.n_layer, 2) * sum(p.numel() for p in layer.parameters()))
    if needed > memory:
        raise UserError(
            f"two layers of model.n_embd={model.n_embd}, model.block_size={model.block_size} take {needed / 2**30:,.0f} GB",
            f"this machine has {memory / 2**30:,.0f} GB: choose a smaller model",
        )
