"""A file of torch.save's, looked through before torch opens it.

`torch.load(weights_only=True)` runs no code that a file brings, but it does as the file says with memory: it unpacks an
entry of kilobytes into gigabytes, and copies a number as often as it is told to. So the archive's directory and its pickle
are read here first, with a `Spec` in the place of each tensor, and held to what checkpoints are made of: plain values, and
tensors that lie in the file as they are. Anything else is refused with its reason.

Each entry of the archive has a CRC-32, which torch writes and never reads: `refuse_corrupted` does.
"""

import io
import math
import pickle
import re
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from tinygpt.config import UserError, shorten

_RECORD = re.compile(
    r"(?P<root>(?!\.\.?/)[^/\\]+)/"
    r"(?P<name>data\.pkl|data/\d+|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
_LARGEST_READ = 2**22  # bytes of the archive's directory; a thousand layers with their optimizer take 3 MB
_DEEPEST = 50  # how far values may be nested
_PER_READ, _SPARE = 48, 2**24  # bytes of memory that reading once from a pickle costs; what small files may take
_ITEM_BYTES = {
    **dict.fromkeys(("ByteStorage", "CharStorage", "BoolStorage"), 1),
    **dict.fromkeys(("HalfStorage", "BFloat16Storage", "ShortStorage"), 2),
    **dict.fromkeys(("FloatStorage", "IntStorage"), 4),
    **dict.fromkeys(("DoubleStorage", "LongStorage"), 8),
}
_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64", "bool")


class Spec(NamedTuple):
    """What a file says of one of its tensors."""

    storage: str
    shape: tuple[int, ...]
    nbytes: int


class Outline(NamedTuple):
    """What a file holds: its content, with a Spec for each tensor, and the bytes and CRC-32 of each of its storages."""

    content: Any
    sums: frozenset[tuple[int, int]]


class Refused(Exception):
    """A reason not to open a file."""


def read_outline(path: Path, hint: str) -> Outline:
    """Look through the file; UserError, with `hint`, where it is damaged or holds what no checkpoint has.

    Its tensors are not read, and no more memory is used than about twice what the rest of the file takes on disk.
    """
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            return _outline(archive, path.stat().st_size)
    except Refused as error:
        raise UserError(f"{path} cannot be opened safely: {error}", hint) from error
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            raise UserError(f"{path} is corrupted: the checksum of {_entry(error)} does not match", hint) from error
        raise UserError(f"{path} cannot be read: it is damaged, cut short, or not a checkpoint", hint) from error
    except (OSError, EOFError, ValueError, RuntimeError, KeyError, struct.error, MemoryError) as error:
        raise UserError(f"{path} cannot be read: it is damaged, cut short, or not a checkpoint", hint) from error


def refuse_corrupted(path: Path, tensors: Iterable[tuple[str, Tensor]], sums: frozenset[tuple[int, int]], hint: str) -> None:
    """UserError that names the first of the tensors (name, tensor) whose memory is none of the file's storages."""
    seen = set()
    for name, tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen:
            continue
        seen.add(storage.data_ptr())
        memory = torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,))
        if (storage.nbytes(), zlib.crc32(memory.numpy().data)) not in sums:
            raise UserError(f"{path} is corrupted: the checksum of {name} does not match", hint)


class _Bounded(io.FileIO):
    """A file of which only so much is read at once: zipfile reads a directory whole, whatever its size."""

    def read(self, size: int | None = -1) -> bytes:
        size = _LARGEST_READ if size is None or size < 0 else size  # all: asked for near the end alone
        if size > _LARGEST_READ:
            raise Refused("the directory of its entries is larger than that of any checkpoint")
        return super().read(size)


def _outline(archive: zipfile.ZipFile, file_size: int) -> Outline:
    entries = archive.infolist()
    named = {_name(entry): entry for entry in entries}
    if len(named) != len(entries) or len({entry.filename.split("/")[0] for entry in entries}) != 1:
        raise Refused("entries of its archive hide each other")
    if sum(entry.file_size for entry in entries) > file_size:
        raise Refused("the entries of its archive are larger than the file")
    if "data.pkl" not in named:
        raise Refused("its archive has no data.pkl")
    small = {name: _read(archive, entry) for name, entry in named.items() if not name.startswith("data/")}
    if small.get("byteorder", b"little").decode() != sys.byteorder:
        raise Refused("its numbers have the byte order of another machine")
    storages = {name.removeprefix("data/"): entry for name, entry in named.items() if name.startswith("data/")}
    reader = _Reader(small["data.pkl"], {key: entry.file_size for key, entry in storages.items()}, 2 * file_size + _SPARE)
    return Outline(reader.content(), frozenset((entry.file_size, entry.CRC) for entry in storages.values()))


def _name(entry: zipfile.ZipInfo) -> str:
    """An entry's name below the archive's own; Refused for one that no checkpoint has, and for a packed one."""
    found = _RECORD.fullmatch(entry.filename)
    if not found:
        raise Refused(f"its archive has an entry named {entry.filename[:100]!r}")
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
        raise Refused(f"{entry.filename} is packed: {entry.compress_size:,} bytes that become {entry.file_size:,}")
    return found["name"]


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        return b"".join(iter(lambda: file.read(2**20), b""))


def _entry(error: Exception) -> str:
    found = re.search(r"'(.*)'", str(error))
    return found[1] if found else "an entry"


class _Storage(NamedTuple):
    kind: str
    key: str
    length: int


class _Weighed(io.BytesIO):
    """A pickle that allows for so many bytes of memory to be made of it."""

    def __init__(self, content: bytes, memory: int) -> None:
        super().__init__(content)
        self.memory = memory

    def read(self, size: int | None = -1) -> bytes:
        self.memory -= _PER_READ + 4 * (size or 0)  # a character takes up to four bytes
        if self.memory < 0:
            raise Refused("its values take far more memory than the file has bytes")
        return super().read(size)


_FOLLOW: dict[int, Callable[[Any], None]] = {**pickle._Unpickler.dispatch}
_INSTRUCTIONS = b"".join(
    (
        *(pickle.PROTO, pickle.STOP, pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID, pickle.MARK),
        *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
        *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
        *(pickle.BINFLOAT, pickle.BINUNICODE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET),
    )
)
_MISTAKES = (KeyError, IndexError, AttributeError, TypeError, EOFError, ValueError, struct.error, pickle.UnpicklingError)


class _Reader(pickle._Unpickler):
    """A data.pkl, followed with a Spec for each tensor. Only the instructions below are followed, only the names in
    `known` mean anything, and nothing is called but the methods of this class."""

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {code: _FOLLOW[code] for code in _INSTRUCTIONS}

    def __init__(self, code: bytes, storages: dict[str, int], memory: int) -> None:
        self.code = _Weighed(code, memory)
        super().__init__(self.code)
        self.storages, self.nbytes = storages, 0
        self.known: dict[str, Any] = {
            "collections.OrderedDict": self.ordered,
            "collections.Counter": self.as_given,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_parameter": self.parameter,
            "torch.device": self.device,
            "torch.Size": self.as_given,
            "__builtin__.set": self.as_given,
            "builtins.set": self.as_given,
            "_codecs.encode": self.encode,
        }

    def content(self) -> Any:
        try:
            content = self.load()
        except _MISTAKES as error:
            raise Refused(f"its data.pkl is not that of a checkpoint ({type(error).__name__})") from error
        if self.nbytes > 2 * sum(self.storages.values()):  # tied weights are there twice
            raise Refused("its tensors are more than twice as large as what it stores of them")
        refuse_tangled(content, budget=len(self.code.getbuffer()))
        return content

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name in _ITEM_BYTES or name in _DTYPES):
            return name
        if f"{module}.{name}" not in self.known:
            raise Refused(f"it names code, {module}.{name}")
        return self.known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, key, count = pid[1], pid[2], pid[4]
        if pid[0] != "storage" or len(pid) != 5 or kind not in _ITEM_BYTES or not isinstance(count, int):
            raise Refused("it refers to something else than storages")
        if self.storages.get(key) != count * _ITEM_BYTES[kind]:
            raise Refused(f"it says of the storage {key} that it holds {count:,} numbers, and that is not its size")
        return _Storage(kind, key, count)

    def load_setitems(self) -> None:
        self.refuse_keys(self.stack[::2])
        _FOLLOW[pickle.SETITEMS[0]](self)

    def load_setitem(self) -> None:
        self.refuse_keys(self.stack[-2:-1])
        _FOLLOW[pickle.SETITEM[0]](self)

    def load_build(self) -> None:
        held, state = self.stack[-2:]
        if type(held) is not OrderedDict or type(state) is not dict or set(state) != {"_metadata"}:
            raise Refused("it sets attributes of its objects")
        _FOLLOW[pickle.BUILD[0]](self)

    dispatch |= {pickle.SETITEMS[0]: load_setitems, pickle.SETITEM[0]: load_setitem, pickle.BUILD[0]: load_build}

    @staticmethod
    def refuse_keys(keys: list[Any]) -> None:
        """To find the hash of a tuple in a tuple in a tuple can take for ever."""
        if any(isinstance(part, tuple) for key in keys if isinstance(key, tuple) for part in key):
            raise Refused("a key of its dictionaries is nested")

    # What the names stand for

    def ordered(self) -> OrderedDict[Any, Any]:
        return OrderedDict()

    def device(self, kind: str, index: int = 0) -> str:
        return kind

    def as_given(self, items: Any) -> Any:
        self.code.memory -= _PER_READ * len(items)
        self.refuse_keys(list(items))
        return items

    def encode(self, text: str, encoding: str) -> str:  # how bytes are written
        if encoding != "latin1":
            raise Refused(f"it asks for the encoding {encoding!r}")
        return text

    def parameter(self, data: Spec, requires_grad: bool, hooks: Any) -> Spec:
        if not isinstance(data, Spec) or hooks:
            raise Refused("a parameter of it is more than a tensor")
        return data

    def tensor(
        self, storage: _Storage, offset: int, size: Any, stride: Any, requires_grad: bool, hooks: Any, metadata: Any = None
    ) -> Spec:
        if not isinstance(storage, _Storage) or hooks or metadata or len(size) != len(stride):
            raise Refused("a tensor of it is more than numbers")
        if len(size) > 64 or not all(isinstance(n, int) and 0 <= n < 2**63 for n in (offset, *size, *stride)):
            raise Refused(f"a tensor of it has the impossible shape {shorten(size)}")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        if max(count - 1, last) >= storage.length:
            raise Refused(f"a tensor of the shape {shorten(size)} cannot lie in a storage of {storage.length:,} numbers")
        nbytes = count * _ITEM_BYTES[storage.kind]
        self.nbytes += nbytes
        return Spec(storage.kind, tuple(size), nbytes)


def refuse_tangled(content: Any, budget: int) -> None:
    """Refused for values that hold each other, or that unfold to more than `budget` of them."""
    waiting = [(content, 0)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Spec) or not isinstance(value, dict | list | tuple):
            continue
        budget -= len(value)
        if depth > _DEEPEST or budget < 0:
            raise Refused("its values are nested without end")
        waiting += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
