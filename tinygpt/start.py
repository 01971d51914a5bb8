"""Where a run starts from: nothing, other weights, or a checkpoint that it goes on with, and what that may not change."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tinygpt import checkpoint as ckpt
from tinygpt.config import ModelConfig, TrainConfig, UserError, from_dict
from tinygpt.resume import open_resumable
from tinygpt.shards import Prepared
from tinygpt.summary import read_summary

STORED = (  # what a checkpoint says of its run's config: nothing of the machine, and not what may be built
    *("model", "data", "optimizer", "trainer", "callbacks", "seed", "compile", "matmul_precision"),
    *("skip_nonfinite", "stop_at_loss"),
)
FIXED = ("model", "seed")  # what a resumed run may not change, beside corpus, tokenizer and global batch
ENDS = ("trainer", "stop_at_loss", "callbacks")  # what decides when a run is done


def starting_checkpoint(config: TrainConfig, run_dir: Path) -> dict[str, Any] | None:
    """The opened checkpoint to resume from, with its path under "path"; None for a new run."""
    if config.resume is None:
        return None
    if config.init_from and config.resume != "auto":  # which is a new run's command too
        raise UserError("resume and init_from exclude each other", "resume goes on with a run; init_from starts a new one")
    path = run_dir / "checkpoints" / "last.ckpt" if config.resume == "auto" else ckpt.find(config.resume, "last")
    if config.resume == "auto" and not path.exists():
        return None
    return {**open_resumable(path), "path": str(path.resolve())}  # outputs/latest is about to move


def continued(config: TrainConfig, overrides: Sequence[str], card: dict[str, Any]) -> TrainConfig:
    """The checkpoint's config with the command line's overrides on top.

    resume=auto repeats the command of the run, so there the command is the config.
    """
    keys = override_keys(overrides)
    if config.init_from:
        return replace(config, model=replace(ModelConfig(**card["model"]), dropout=config.model.dropout))
    if config.resume == "auto" or "experiment" in keys:
        return config
    stored = {name: value for name, value in card["config"].items() if name in STORED}  # a file may say more
    given, values = asdict(config), {**asdict(config), **stored}
    values["trainer"], values["data"] = dict(values["trainer"]), dict(values["data"])
    for key in keys:
        set_path(values, given, key.split("."))
    restored: TrainConfig = from_dict(TrainConfig, values)
    return restored


def override_keys(overrides: Sequence[str]) -> list[str]:
    """The dotted keys that the command line names."""
    return [override.partition("=")[0].lstrip("+~").replace("/", ".").split("@")[0] for override in overrides]


def set_path(target: dict[str, Any], source: dict[str, Any], path: list[str]) -> None:
    """Copy the entry at `path` from source to target; a path that is not there (hydra.*) is not ours."""
    head, *rest = path
    if head not in source:
        return
    if rest and isinstance(source[head], dict):
        target[head] = dict(target.get(head) or {})
        set_path(target[head], source[head], rest)
    else:
        target[head] = source[head]


def already_done(config: TrainConfig, run_dir: Path, started: dict[str, Any]) -> float | None:
    """The best loss of a run that has reached its budget, after saying so."""
    summary = read_summary(run_dir)
    if summary.get("status") != "done" or not same_end(config, started):
        return None
    print(f"{run_dir} is done: {summary['steps']} steps, best validation loss {summary['best_val_loss']:.4f}")
    return float(summary["best_val_loss"])


def had_stopped(config: TrainConfig, started: dict[str, Any]) -> bool:
    """Whether the run had ended before its budget, and is asked for with the same command."""
    return config.resume == "auto" and started.get("stopped") is True and same_end(config, started)


def same_end(config: TrainConfig, started: dict[str, Any]) -> bool:
    was = started["tinygpt"]["config"]
    return all(was.get(name) == getattr(config, name) for name in ENDS)


def refuse_changes(config: TrainConfig, prepared: Prepared, checkpoint: dict[str, Any]) -> None:
    """A resumed run goes on with the same model, data and seed, or it is another run."""
    card = checkpoint["tinygpt"]
    was, now = card["config"], asdict(config)
    changed = [name for name in FIXED if was[name] != now[name]]
    if was["data"]["global_batch_size"] != config.data.global_batch_size:
        changed.append("data.global_batch_size")
    if was["data"].get("layout", "stream") != config.data.layout:
        changed.append("data.layout")
    if "training_weights" in checkpoint and not any(is_ema(node) for node in config.callbacks.values()):
        changed.append("callbacks (its weights are an average: keep ema)")
    if card["tokenizer"] != prepared.tokenizer.state():
        changed.append("data.tokenizer")
    if card["corpus"]["sha256"] != prepared.sha256 or fractions(was["data"]) != fractions(now["data"]):
        changed.append("the corpus")
    if changed:
        raise UserError(
            f"a resumed run cannot change {' and '.join(changed)}",
            "leave it as it was, or start a new run (init_from=CHECKPOINT keeps the weights)",
        )


def fractions(data: dict[str, Any]) -> tuple[float, float]:
    return data["val_fraction"], data.get("test_fraction", 0.0)


def is_ema(node: Any) -> bool:
    return isinstance(node, dict) and node.get("_target_") == "tinygpt.callbacks.EMA"


def refuse_budget(config: TrainConfig, steps: int, taken: int) -> None:
    """A resumed run needs steps to take; only resume=auto may find that all are taken, and write what was not written."""
    if taken > steps or (taken == steps and config.resume != "auto"):
        raise UserError(
            f"the checkpoint has taken {taken} steps, and the budget is {steps}",
            f"give a larger one, for example trainer.max_steps={2 * taken}",
        )


def starting_weights(config: TrainConfig, overrides: Sequence[str]) -> dict[str, Any]:
    """The opened checkpoint of init_from: its model, with the config's dropout and the block_size that is asked for.

    The command line asks by its key; an experiment does by having a smaller one.
    """
    _, opened = ckpt.open_any(str(config.init_from))
    ckpt.refuse_other_tokenizer(opened, overrides)
    keys, wanted = override_keys(overrides), config.model.block_size
    stored = opened["tinygpt"]["model"]["block_size"]
    if "model.block_size" in keys or ("experiment" in keys and wanted < stored):
        opened = ckpt.crop(opened, wanted)
    card = opened["tinygpt"]
    return {**opened, "tinygpt": {**card, "model": {**card["model"], "dropout": config.model.dropout}}}
