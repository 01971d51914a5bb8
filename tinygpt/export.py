"""Weights out: a directory that transformers loads, or one of our own layout; compared with our logits before it is there.

The directory is built beside its place under another name, opened again by the program that is to use it, compared, and
renamed. So whoever reads sees the earlier export or the new one, and no export that does not give our logits.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tinygpt import __version__
from tinygpt import checkpoint as ckpt
from tinygpt.config import ExportConfig, UserError
from tinygpt.files import expanded
from tinygpt.hub import to_layout
from tinygpt.model import GPT
from tinygpt.model_card import model_card
from tinygpt.pretrained import CARD, FORMAT, PREFIX, WEIGHTS, is_export
from tinygpt.summary import read_summary
from tinygpt.tokenizer import CharTokenizer, Tokenizer
from tinygpt.tokenizer_files import PROBE, end_of_text, write_tokenizer

TOLERANCE = 1e-4
"""How far logits may differ from ours: two programs do the same sums in another order."""


def export(config: ExportConfig) -> str:
    """Write the directory `config.out`; what was written and how near it is, in a line or two.

    Raises UserError, and leaves what was there, where the model cannot be expressed, `out` may not be written, or what
    was written does not give our logits.
    """
    if not config.out:
        raise UserError("export needs out=DIR", "name the directory to write, for example out=my-model")
    out = expanded(config.out).resolve()
    refuse_out(out, config)
    if config.format == "hf":
        need_transformers()
    name, opened = ckpt.open_any(config.ckpt)
    model, tokenizer = ckpt.rebuild(opened)
    if config.format == "hf":
        model = model.float()  # as its layout says; of a model in half the bytes ours would be the less exact logits
    with replacing(out) as folder:
        write, check = {"hf": (write_hf, check_hf), "safetensors": (write_own, check_own)}[config.format]
        notes = write(model, tokenizer, folder)
        write_card(config.format, opened["tinygpt"], model, folder)
        text = model_card(config.format, model, tokenizer, run_summary(name), opened["tinygpt"], notes)
        (folder / "README.md").write_text(text, encoding="utf-8")
        difference = check(model, folder)
    said = f"{config.out}: {model.num_parameters():,} parameters; loaded again, within {difference:.1e} of our logits"
    if config.format == "hf" and not notes:
        said += ", and AutoTokenizer gives our ids"
    return "\n".join([said, *(f"note: {note}" for note in notes)])


# Where to


def refuse_out(out: Path, config: ExportConfig) -> None:
    """UserError where a directory would be lost that is no export."""
    if out.exists() and not out.is_dir():
        raise UserError(f"out={config.out} is a file", "name a directory")
    if not out.is_dir() or not any(out.iterdir()):
        return
    source = None if config.ckpt.startswith(PREFIX) and not ckpt_folder(config).exists() else ckpt_folder(config).resolve()
    if any(place and place.is_relative_to(out) for place in (Path.cwd(), Path.home(), source)):
        raise UserError(f"out={config.out} holds the current folder, your home or the checkpoint itself", "name another")
    if not config.overwrite and (strange := foreign(out)):
        raise UserError(
            f"out={config.out} is not empty, and {strange[0]} there is not from an earlier export",
            "name another directory, or say overwrite=true to replace all that it holds",
        )


def ckpt_folder(config: ExportConfig) -> Path:
    if config.ckpt == "latest":
        return ckpt.LATEST
    return expanded(config.ckpt.removeprefix(PREFIX))


def foreign(out: Path) -> list[str]:
    """What is in a directory beside the files of an earlier export."""
    found = sorted(path.name for path in out.iterdir())
    if not is_export(out):
        return found
    try:
        known = json.loads((out / CARD).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        known = []
    return [name for name in found if name not in known]


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, which takes its place if all goes well and is gone if not."""
    folder = out.with_name(f".{out.name}.{uuid4().hex}")
    try:
        folder.mkdir(parents=True)
        yield folder
        sync(folder)
        swap(folder, out)
    except OSError as error:
        reason = "no room left" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise UserError(
            f"out={out.name} cannot be written: {reason}", "make room, or name another directory with out="
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def swap(folder: Path, out: Path) -> None:
    if out.exists():
        old = out.with_name(f".{out.name}.{uuid4().hex}")
        out.rename(old)
        folder.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)
    ckpt.sync_folder(out.parent)


def sync(folder: Path) -> None:
    """Bring the files to the disk before they get their name."""
    for path in folder.iterdir():
        path.chmod((folder / CARD).stat().st_mode)  # safetensors writes for its owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())


# What


def need_transformers() -> None:
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise UserError(
            "format=hf compares with transformers before it says done, and that is not installed",
            "pip install -c constraints.txt -e '.[hf]', or format=safetensors",
        ) from error


def write_hf(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> list[str]:
    """config.json, weights and tokenizer files; what could not be written, as notes."""
    settings, tensors = to_layout(model, end_of_text(tokenizer))
    write_json(folder / "config.json", settings)
    if settings["eos_token_id"] is not None:
        ids = {name: settings[name] for name in ("bos_token_id", "eos_token_id")}
        write_json(folder / "generation_config.json", ids)
    save_weights(tensors, folder / WEIGHTS)
    if tokenizer is None:
        return ["the checkpoint brings no tokenizer: none was written"]
    return write_checked_tokenizer(tokenizer, folder, model.config.block_size)


def save_weights(tensors: dict[str, Tensor], path: Path) -> None:
    """safetensors' save_file; what the disk refuses is an OSError, which its own error is not."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        if not (found := re.search(r"os error (\d+)", str(error))):
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def write_checked_tokenizer(tokenizer: Tokenizer, folder: Path, block_size: int) -> list[str]:
    """The tokenizer's files, if AutoTokenizer gives our ids from them; else none, and a note."""
    from transformers import AutoTokenizer

    before = set(folder.iterdir())
    try:
        write_tokenizer(tokenizer, folder, block_size)
        theirs = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
        text = probe(tokenizer)
        if theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text):
            return []
        reason = "transformers would give other ids"
    except (UserError, KeyError) as error:
        reason = str(error)
    for path in set(folder.iterdir()) - before:
        path.unlink()
    return [f"the {tokenizer.kind} tokenizer cannot be written for transformers ({reason}); {CARD} keeps it for tinygpt"]


def probe(tokenizer: Tokenizer) -> str:
    """A text with much of what a tokenizer knows."""
    if isinstance(tokenizer, CharTokenizer):
        return tokenizer.decode(range(tokenizer.vocab_size))
    draw = torch.Generator().manual_seed(0)
    # The text of a special token is characters to us and one token to them (docs/weights.md).
    ordinary = tokenizer.vocab_size - len(getattr(tokenizer, "special_tokens", ()))
    return PROBE + tokenizer.decode(torch.randint(ordinary, (2000,), generator=draw).tolist())


def write_own(model: GPT, tokenizer: Tokenizer | None, folder: Path) -> list[str]:
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_weights(tensors, folder / WEIGHTS)
    return [] if tokenizer else ["the checkpoint brings no tokenizer: none was written"]


def write_card(layout: str, card: dict[str, Any], model: GPT, folder: Path) -> None:
    """What tinygpt needs to load the directory again, and to know it as an export. No path of this machine."""
    data = card["config"].get("data")
    origin = {"corpus": card["corpus"], "config": {"data": data} if data and data.get("path") is None else {}}
    files = sorted({path.name for path in folder.iterdir()} | {CARD, "README.md"})
    write_json(
        folder / CARD,
        {
            "format": FORMAT,
            "layout": layout,
            "tinygpt": __version__,
            "vocab_size": model.vocab_size,
            "model": asdict(model.config),
            "origin": origin,
            "files": files,
            "tokenizer": card["tokenizer"],
        },
    )


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def run_summary(name: str) -> dict[str, Any]:
    """What summary.json, of the run that a checkpoint file lies in, says of that checkpoint."""
    path = Path(name)
    if name.startswith(PREFIX) or path.name not in ("best.ckpt", "last.ckpt"):
        return {}
    summary = read_summary(path.parent.parent)
    return summary if path.name == "best.ckpt" else {key: said for key, said in summary.items() if "best_" not in key}


# Whether it is right


def check_hf(model: GPT, folder: Path) -> float:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # in eval mode
    return compare(model, lambda idx: theirs(idx).logits)


def check_own(model: GPT, folder: Path) -> float:
    again, _ = ckpt.load(folder)
    return compare(model, again)


@torch.no_grad()
def compare(model: GPT, theirs: Callable[[Tensor], Tensor]) -> float:
    """The largest difference from our logits, on ids by chance as long as the context; UserError where it is too large."""
    draw = torch.Generator().manual_seed(0)
    idx = torch.randint(model.vocab_size, (2, min(model.config.block_size, 256)), generator=draw)
    ours = model(idx)
    difference = float((theirs(idx) - ours).abs().max())
    if not difference <= TOLERANCE * max(1.0, ours.abs().max().item()):
        raise UserError(
            f"what was written gives other logits than the checkpoint (by up to {difference:.2g}): nothing was exported",
            "please report this, with the model's settings",
        )
    return difference
