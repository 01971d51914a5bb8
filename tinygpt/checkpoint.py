"""Checkpoints: one file that rebuilds weights, architecture and tokenizer, and that can run no code when it is opened.

`open_any` takes the word `ckpt=` in all its forms: what is no checkpoint of ours (an export, a model of Hugging Face's)
becomes one in memory, so that nobody else needs to know the difference.

A checkpoint is Lightning's dictionary with one more entry, `tinygpt`, the card: plain values that say which model, which
tokenizer and which run it is. Files are always read with `weights_only=True`, after archive.py has looked through them,
and nothing in them names code.
"""

import errno
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from tinygpt.archive import Spec, read_outline, refuse_corrupted
from tinygpt.config import DataConfig, ModelConfig, UserError, from_dict, shorten
from tinygpt.hub import assemble
from tinygpt.kinds import describe, fits
from tinygpt.model import GPT
from tinygpt.precision import convert, lay_out
from tinygpt.pretrained import PREFIX, Pretrained, is_export, open_folder, open_hub
from tinygpt.sweep import key_of
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


def load(
    ckpt: str | Path, device: str | torch.device = "cpu", block_size: int | None = None, dtype: str = "fp32"
) -> tuple[GPT, Tokenizer | None]:
    """The model (in eval mode) and the tokenizer of a checkpoint.

    `block_size` shortens its context; dtype (fp32, bf16 or int8) is what the weights become, see precision.py.

    `ckpt` is a .ckpt file, a run directory (its best), "latest", an exported directory, "hf:NAME" or "hf:DIR". The
    tokenizer is None where hf: brings none that tinygpt can express. Raises UserError where there is no such
    checkpoint, or where it is damaged or not of a kind that tinygpt has.
    """
    _, checkpoint = open_any(ckpt)
    return rebuild(checkpoint if block_size is None else crop(checkpoint, block_size), device, dtype)


def load_for_text(ckpt: str | Path, device: str | torch.device = "cpu", dtype: str = "fp32") -> tuple[GPT, Tokenizer]:
    """As `load`, for those who write texts: laid out for that, and UserError where there is no tokenizer."""
    model, tokenizer = load(ckpt, device, dtype=dtype)
    if tokenizer is None:
        raise UserError(f"{ckpt} brings no tokenizer that tinygpt can express", NO_TOKENIZER)
    lay_out(model)
    return model, tokenizer


NO_TOKENIZER = (
    "put a byte-level BPE's tokenizer.json (or vocab.json and merges.txt) beside the weights; "
    "from Python, tinygpt.load gives the model alone"
)


def open_any(ckpt: str | Path) -> tuple[str, dict[str, Any]]:
    """The file, folder or name that `ckpt` means, in any of the forms that `load` takes, and the opened checkpoint."""
    if str(ckpt).startswith(PREFIX):
        return str(ckpt), as_checkpoint(open_hub(str(ckpt).removeprefix(PREFIX)))
    if is_export(Path(ckpt)):
        return str(ckpt), as_checkpoint(open_folder(Path(ckpt)))
    path = find(ckpt)
    return str(path), open_checkpoint(path)


def as_checkpoint(found: Pretrained) -> dict[str, Any]:
    """What `open_checkpoint` would give, had a run of ours left these weights; of that run only its data may be known."""
    card = {
        "format": FORMAT,
        "model": asdict(found.model),
        "vocab_size": found.vocab_size,
        "tokenizer": found.tokenizer.state() if found.tokenizer else None,
        "config": found.origin.get("config", {}),
        "corpus": found.origin.get("corpus", {}),
    }
    return {"tinygpt": card, "state_dict": {f"model.{name}": tensor for name, tensor in found.weights.items()}}


def crop(checkpoint: dict[str, Any], block_size: int) -> dict[str, Any]:
    """The opened checkpoint with another context: learned positions can only be cut, rotations reach any."""
    card, weights = checkpoint["tinygpt"], dict(checkpoint["state_dict"])
    shape = replace(stored(ModelConfig, card["model"], "a model"), block_size=block_size)
    if shape.position == "learned":
        known = card["model"]["block_size"]
        if block_size > known:
            raise UserError(
                f"model.block_size={block_size} is more than the {known} positions that the weights have learned",
                f"model.block_size={known} or less",
            )
        if (table := weights.get("model.wpe.weight")) is not None:  # else build_model says that it is missing
            weights["model.wpe.weight"] = table[:block_size]
    return {**checkpoint, "tinygpt": {**card, "model": asdict(shape)}, "state_dict": weights}


def rebuild(
    checkpoint: dict[str, Any], device: str | torch.device = "cpu", dtype: str = "fp32"
) -> tuple[GPT, Tokenizer | None]:
    """The model, in eval mode, and the tokenizer of an opened checkpoint."""
    model, tokenizer = build_model(checkpoint).to(device).eval(), stored_tokenizer(checkpoint)
    if tokenizer is not None:
        check_vocabulary(checkpoint, tokenizer)
    return model if dtype == "fp32" else convert(model, dtype), tokenizer


def stored_tokenizer(checkpoint: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer of an opened checkpoint; None where hf: brought none."""
    state = checkpoint["tinygpt"]["tokenizer"]
    return None if state is None else from_state(state)


def refuse_other_tokenizer(checkpoint: dict[str, Any], overrides: Sequence[str]) -> None:
    """UserError where the command line asks for another kind of tokenizer than the checkpoint of a run brings."""
    own = checkpoint["tinygpt"]["tokenizer"]
    asked = [item.partition("=") for item in overrides if key_of(item) in ("data/tokenizer", "data.tokenizer.kind")]
    for key, _, value in asked:
        kind = value.strip("'\"")
        if own is not None and kind != own["kind"] and {kind, own["kind"]} != {"gpt2", "bpe"}:  # hf: says bpe to both
            raise UserError(
                f"{key}={kind}: the checkpoint brings its own tokenizer, {own['kind']}, and its weights know no other",
                f"leave {key}= out: another tokenizer needs a new model",
            )


def check_vocabulary(checkpoint: dict[str, Any], tokenizer: Tokenizer) -> None:
    """UserError unless the tokenizer is of the size that the weights were made for."""
    size = checkpoint["tinygpt"]["vocab_size"]
    if tokenizer.vocab_size != size:
        raise UserError(
            f"the weights know {size:,} tokens, and the {tokenizer.kind} tokenizer of the data has {tokenizer.vocab_size:,}",
            "choose the tokenizer that they were trained with, for example data/tokenizer=gpt2",
        )


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
    if (path / "config.json").is_file():
        raise UserError(f"{ckpt} is a model of Hugging Face's", f"say so: {PREFIX}{ckpt}")
    if str(ckpt) == "latest" and not path.exists():
        raise UserError("there is no run yet: outputs/latest does not exist", "train one first: python train.py")
    if not path.is_dir():
        raise UserError(f"there is no checkpoint {ckpt}", "give a .ckpt file, a run directory, or ckpt=latest")
    for name in dict.fromkeys((which, "best", "last")):
        if (file := path / "checkpoints" / f"{name}.ckpt").is_file():
            return file
    raise UserError(f"the folder {ckpt} holds no checkpoints/best.ckpt", "give a run directory or a .ckpt file")


def open_checkpoint(path: Path, whole: bool = False) -> dict[str, Any]:
    """The whole dictionary of a checkpoint file, tensors memory-mapped; UserError where it cannot be used.

    The weights are compared with their checksums; with `whole` so is all else that a run goes on from.
    """
    before = identity(path)
    outline = read_outline(path, NOT_OURS)
    refuse_foreign(path, outline.content)
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (*UNREADABLE, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read: it is damaged, cut short, or not a checkpoint", NOT_OURS) from error
    if identity(path) != before:  # a run has saved meanwhile
        return open_checkpoint(path, whole)
    card = checkpoint["tinygpt"]
    card["model"] = asdict(stored(ModelConfig, card["model"], "a model"))  # whole, also where it is an older version's
    refuse_corrupted(path, named_tensors(checkpoint if whole else checkpoint["state_dict"]), outline.sums, COPY_AGAIN)
    return checkpoint


NOT_OURS = "use a checkpoint that `python train.py` wrote, for example outputs/latest/checkpoints/best.ckpt"
COPY_AGAIN = "copy it again from where it came from, or use another: a run keeps best.ckpt and last.ckpt"
UNREADABLE = (RuntimeError, EOFError, OSError, KeyError, ValueError, TypeError, AttributeError, MemoryError)


def identity(path: Path) -> tuple[int, ...]:
    """Changes when the file is replaced."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def named_tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested values, with the keys that lead to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from named_tensors(part, f"{name}.{key}" if name else str(key))


CARD = {"model": dict, "vocab_size": int, "tokenizer": dict | None, "config": dict, "corpus": dict}


def refuse_foreign(path: Path, content: Any) -> None:
    """UserError unless the outline of a file is that of a checkpoint of ours."""
    card = content.get("tinygpt") if isinstance(content, dict) else None
    if not isinstance(card, dict):
        raise UserError(f"{path} was not written by tinygpt", NOT_OURS)
    if card.get("format") != FORMAT:
        raise UserError(
            f"{path} has format {shorten(card.get('format'))}, and this tinygpt reads {FORMAT}", "upgrade tinygpt"
        )
    for name, kind in CARD.items():
        if name not in card or not fits(card[name], kind):
            raise UserError(f"{path} is no checkpoint: its {name} is not {describe(kind)}", NOT_OURS)
    weights = content.get("state_dict")
    specs = list(weights.values()) if isinstance(weights, dict) else []
    if not specs or not all(isinstance(spec, Spec) for spec in specs) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"{path} is no checkpoint: it holds no weights", NOT_OURS)
    if len(kinds := {spec.storage for spec in specs}) > 1 or not kinds <= FLOATS:
        raise UserError(f"{path} is no checkpoint: its weights are of the types {', '.join(sorted(kinds))}", NOT_OURS)


FLOATS = {"FloatStorage", "BFloat16Storage", "HalfStorage", "DoubleStorage"}


def stored(kind: type, values: Any, what: str) -> Any:
    """The dataclass that a checkpoint holds as a dictionary. Raises UserError where it does not describe one."""
    try:
        return from_dict(kind, {**values})
    except TypeError as error:
        raise UserError(f"the checkpoint does not describe {what} of tinygpt's: {first_line(error)}", NOT_OURS) from error


def build_model(checkpoint: dict[str, Any]) -> GPT:
    """The GPT of an opened checkpoint, on its memory-mapped weights: nothing is initialised or copied."""
    card, prefix = checkpoint["tinygpt"], "model."
    try:
        weights = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
        return assemble(stored(ModelConfig, card["model"], "a model"), card["vocab_size"], weights)
    except (KeyError, TypeError) as error:
        raise UserError(f"the checkpoint does not describe a model of tinygpt's: {error!r}", NOT_OURS) from error
    except RuntimeError as error:
        raise UserError(f"the checkpoint's weights do not fit its model: {first_line(error)}", NOT_OURS) from error


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def stored_data(card: dict[str, Any]) -> DataConfig:
    """The data settings that a checkpoint's run used. Raises UserError where it knows of none."""
    if not isinstance(card["config"], dict) or "data" not in card["config"]:
        raise UserError("these weights bring no corpus", "name one: data=shakespeare, or data=text data.path=my.txt")
    data: DataConfig = stored(DataConfig, card["config"]["data"], "data")
    return data


def durable_save(content: Any, path: Path) -> None:
    """Write beside the target, flush to disk, rename: whoever reads sees the old file or the new one, never a part.

    Raises OSError where the disk is full or the folder is gone; the previous file is then as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(content, file, path)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write(content: Any, file: BinaryIO, path: Path) -> None:
    """torch.save, with an OSError where the disk refuses: torch's own way is a RuntimeError about positions."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        if "inline_container" not in str(error):
            raise
        number = errno.EIO if shutil.disk_usage(path.parent).free > 2**20 else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(path)) from error


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
