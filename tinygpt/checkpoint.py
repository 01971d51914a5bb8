"""Checkpoints: one file that rebuilds weights, architecture and tokenizer, and that can run no code when it is opened.

A checkpoint is Lightning's dictionary with one more entry, `tinygpt`, the card: plain values that say which model, which
tokenizer and which run it is. Files are always read with `weights_only=True`, and nothing in them names code.
"""

import os
import pickle
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tinygpt.config import DataConfig, ModelConfig, TokenizerConfig, UserError
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer, from_state

FORMAT = 1
LATEST = Path("outputs/latest")


def make_card(model: GPT, tokenizer: Tokenizer, config: dict[str, Any], corpus: dict[str, str]) -> dict[str, Any]:
    """The entry that makes a checkpoint complete; config and corpus say what the run was."""
    return {
        "format": FORMAT,
        "model": asdict(model.config),
        "vocab_size": model.vocab_size,
        "tokenizer": tokenizer.state(),
        "config": config,
        "corpus": corpus,
    }


def load(ckpt: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """The model (in eval mode) and the tokenizer of a checkpoint: a .ckpt file, a run directory (its best) or "latest".

    Raises UserError where there is none, or where the file is damaged or not tinygpt's.
    """
    return rebuild(open_checkpoint(find(ckpt)), device)


def rebuild(checkpoint: dict[str, Any], device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer]:
    """The model, in eval mode, and the tokenizer of an opened checkpoint."""
    return build_model(checkpoint).to(device).eval(), from_state(checkpoint["tinygpt"]["tokenizer"])


def pick_device(wanted: str) -> str:
    """cpu, cuda or mps; auto is the best that is here. Raises UserError where the one asked for is not."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, is_here in here.items() if is_here)
    if not here[wanted]:
        raise UserError(f"device={wanted} is not available here", "use device=cpu")
    return wanted


def find(ckpt: str | Path, which: str = "best") -> Path:
    """The file that `ckpt` means; `which` (best or last) decides for a run directory."""
    path = LATEST if str(ckpt) == "latest" else Path(ckpt)
    if path.is_file():
        return path
    if str(ckpt) == "latest" and not path.exists():
        raise UserError("there is no run yet: outputs/latest does not exist", "train one first: python train.py")
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {ckpt}", "give a .ckpt file, a run directory, or ckpt=latest")
    for name in dict.fromkeys((which, "best", "last")):
        if (file := path / "checkpoints" / f"{name}.ckpt").is_file():
            return file
    raise UserError(f"the folder {ckpt} holds no checkpoints/best.ckpt", "give a run directory or a .ckpt file")


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The whole dictionary of a checkpoint file, tensors memory-mapped; UserError where it cannot be used."""
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is not a checkpoint that can be opened safely", NOT_OURS) from error
    except (RuntimeError, EOFError, OSError, zipfile.BadZipFile, KeyError, ValueError) as error:
        raise UserError(f"{path} cannot be read: it is damaged, cut short, or not a checkpoint", NOT_OURS) from error
    card = checkpoint.get("tinygpt") if isinstance(checkpoint, dict) else None
    if not isinstance(card, dict):
        raise UserError(f"{path} was not written by tinygpt", NOT_OURS)
    if card.get("format") != FORMAT:
        raise UserError(f"{path} has format {card.get('format')}, and this tinygpt reads {FORMAT}", "upgrade tinygpt")
    return checkpoint


NOT_OURS = "use a checkpoint that `python train.py` wrote, for example outputs/latest/checkpoints/best.ckpt"


def build_model(checkpoint: dict[str, Any]) -> GPT:
    """The GPT of an opened checkpoint, on its memory-mapped weights: nothing is initialised or copied."""
    card, prefix = checkpoint["tinygpt"], "model."
    try:
        with torch.device("meta"):
            model = GPT(ModelConfig(**card["model"]), card["vocab_size"])
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        model.load_state_dict(weights, assign=True)
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint does not describe a model of tinygpt's: {error!r}", NOT_OURS) from error
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its model: {first_line(error)}", NOT_OURS) from error
    if model.config.tie_embeddings:
        model.lm_head.weight = model.wte.weight
    return model


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def stored_data(card: dict[str, Any]) -> DataConfig:
    """The data settings that a checkpoint's run used."""
    data = dict(card["config"]["data"])
    return DataConfig(**{**data, "tokenizer": TokenizerConfig(**data["tokenizer"])})


def durable_save(content: Any, path: Path) -> None:
    """Write beside the target, flush to disk, rename: whoever reads sees the old file or the new one, never a part.

    Raises OSError where the disk is full or the folder is gone; the previous file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
