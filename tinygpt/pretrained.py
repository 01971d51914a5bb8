"""Weights from a folder in the layout of Hugging Face, from a name on its hub, or from what export.py has written.

Opening runs no code: safetensors and JSON hold none, and `.bin` files are read with `weights_only=True`. What a file
says of sizes is held against the tensors that are there before any memory is asked for.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tinygpt.archive import read_outline
from tinygpt.config import ModelConfig, UserError
from tinygpt.files import expanded
from tinygpt.hub import read_layout
from tinygpt.tokenizer import Tokenizer, from_state
from tinygpt.tokenizer_files import read_tokenizer

PREFIX = "hf:"
CARD = "tinygpt.json"
"""What makes a folder an export: which layout, which tokenizer, which corpus, and which files are its own."""
WEIGHTS = "model.safetensors"
FORMAT = 1

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FETCHED = (
    "config.json",
    WEIGHTS,
    f"{WEIGHTS}.index.json",
    "model-*.safetensors",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
)
_BIN = "pytorch_model.bin"
_GET_AGAIN = "it is damaged or cut short: get it again"


class Pretrained(NamedTuple):
    """A model's shape, its weights by our names, the tokenizer where there is one, and what is known of its corpus."""

    model: ModelConfig
    vocab_size: int
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None
    origin: dict[str, Any]


def is_export(folder: Path) -> bool:
    """Whether export.py has written this folder."""
    return (folder / CARD).is_file()


def open_hub(source: str) -> Pretrained:
    """The model that `hf:NAME` or `hf:DIR` means, given without the prefix.

    Raises UserError where there is none, or none that tinygpt can express.
    """
    folder = expanded(source)
    if not folder.is_dir():
        if not _NAME.fullmatch(source):
            raise UserError(f"there is no folder {source}", "hf: takes a folder, or a name on the hub such as hf:gpt2")
        folder = fetch(source)
    return open_folder(folder)


def open_folder(folder: Path) -> Pretrained:
    """The model of a folder: an export in either layout, or one of Hugging Face's."""
    card = read_card(folder) if is_export(folder) else {}
    if card.get("layout") == "safetensors":
        return _own_layout(folder, card)
    config = read_json(folder / "config.json", "the folder of a model holds config.json beside the weights")
    model, vocab_size, weights = read_layout(config, read_tensors(folder))
    tokenizer = _card_tokenizer(card, vocab_size) or read_tokenizer(folder, vocab_size)
    return Pretrained(model, vocab_size, weights, tokenizer, card.get("origin", {}))


def read_card(folder: Path) -> dict[str, Any]:
    """The card of an export. Raises UserError where this version cannot read it."""
    card = read_json(folder / CARD, _GET_AGAIN)
    if card.get("format") != FORMAT:
        found = card.get("format")
        raise UserError(f"{folder / CARD} has format {found}, and this tinygpt reads {FORMAT}", "upgrade tinygpt")
    if not isinstance(card.setdefault("origin", {}), dict):
        raise UserError(f"{folder / CARD} is not what export.py writes: its origin is no object", _GET_AGAIN)
    return card


def _own_layout(folder: Path, card: dict[str, Any]) -> Pretrained:
    try:
        model, vocab_size = ModelConfig(**card["model"]), card["vocab_size"]
        if type(vocab_size) is not int:
            raise TypeError("vocab_size")
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CARD} does not describe a model of tinygpt's: {error!r}", _GET_AGAIN) from error
    return Pretrained(
        model, vocab_size, read_safetensors(folder / WEIGHTS), _card_tokenizer(card, vocab_size), card.get("origin", {})
    )


def _card_tokenizer(card: dict[str, Any], vocab_size: int) -> Tokenizer | None:
    """The tokenizer of an export; None where its weights have been replaced by some of another vocabulary."""
    tokenizer = from_state(card["tokenizer"]) if card.get("tokenizer") else None
    return tokenizer if tokenizer and tokenizer.vocab_size == vocab_size else None


# From the hub


def fetch(name: str) -> Path:
    """The folder, in huggingface_hub's cache, of a model on the hub: config, safetensors and tokenizer files only.

    Raises UserError that says where the files are to be had, if they are not here and cannot be fetched.
    """
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        hint = "pip install -c constraints.txt -e '.[hf]', or give a folder: hf:DIR"
        raise UserError("hf:NAME needs huggingface_hub", hint) from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(_FETCHED)))
    except Exception as error:  # the library's own, its HTTP client's and the system's
        reason = _reason(error, constants.HF_HUB_OFFLINE)
        raise UserError(
            f"cannot fetch {name} from {constants.ENDPOINT}: {reason}",
            f"put config.json, {WEIGHTS} and tokenizer.json of {constants.ENDPOINT}/{name} in a folder and say hf:DIR",
        ) from error


def _reason(error: Exception, offline: bool) -> str:
    if offline:
        return "HF_HUB_OFFLINE is set, and it is not in the cache"
    status = next((r.status_code for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)
    if status in (401, 403, 404):
        return f"there is no such model, or it needs a login (HTTP {status})"
    if isinstance(error, OSError) and error.errno:  # a full disk, say
        return error.strerror or str(error)
    return f"HTTP {status}" if status else "no connection, and it is not in the cache"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# From a folder


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """A JSON object. Raises UserError that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"there is no {path.name} in {path.parent}", advice) from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}", _GET_AGAIN) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", advice)
    return value


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder, from one file or from shards; safetensors, else pytorch_model.bin.

    Memory-mapped where the file allows it. Raises UserError that names what is missing or damaged.
    """
    for name, read in ((WEIGHTS, read_safetensors), (_BIN, read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        if (index := folder / f"{name}.index.json").is_file():
            tensors: dict[str, Tensor] = {}
            for shard, wanted in _shards(index).items():
                held = read(folder / shard)
                tensors |= {key: held[key] for key in wanted if key in held}
            return tensors
    raise UserError(
        f"there is no {WEIGHTS} in {folder}",
        f"the weights are {WEIGHTS}, its shards with {WEIGHTS}.index.json, or {_BIN}; the hub's .bin files are not fetched",
    )


def _shards(index: Path) -> dict[str, list[str]]:
    """The files of an index, all there and all beside it, with the names of the tensors that each holds."""
    table = read_json(index, _GET_AGAIN).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(shard, str) for shard in table.values()):
        raise UserError(f"{index} has no weight_map from tensors to files", _GET_AGAIN)
    shards: dict[str, list[str]] = {}
    for tensor, shard in table.items():
        shards.setdefault(shard, []).append(tensor)
    for shard in shards:
        if not re.fullmatch(r"\w[\w.-]*", shard):
            raise UserError(f"{index} names a file outside its folder: {shard!r}", "shards lie beside the index")
        if not (index.parent / shard).is_file():
            raise UserError(f"the shard {shard} is missing in {index.parent}", "get the rest of the model's files")
    return shards


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}", _GET_AGAIN) from error


def read_bin(path: Path) -> dict[str, Tensor]:
    """torch.save's dictionary of tensors, without running what else a pickle may hold."""
    try:
        packed = zipfile.is_zipfile(path)  # before torch 1.6 the format was another one, which cannot be mapped
        if packed:
            read_outline(path, f"use {WEIGHTS}")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} cannot be opened safely: it holds more than tensors", f"use {WEIGHTS}") from error
    except UserError:
        raise
    except Exception as error:  # the errors of torch's reader of old files are of all kinds
        raise UserError(f"{path} cannot be read", _GET_AGAIN) from error
    named = isinstance(tensors, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    if not named:
        raise UserError(f"{path} holds something else than named tensors", "is it a checkpoint of training? export it first")
    return dict(tensors)
