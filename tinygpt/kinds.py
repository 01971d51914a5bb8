"""Whether a plain value, from YAML, a command line or a checkpoint, is what an annotation asks for."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "settings by name",
}
_LISTS = (list, tuple, set, Iterable, Sequence)


def fits(value: Any, kind: Any, alone: bool = True) -> bool:
    """Whether `value` is of the annotation `kind`. A whole number is a number, and true is neither.

    Of a class that is neither a dataclass nor Python's own nothing is known: where it stands `alone`, not as one of several,
    whatever is given for it is taken to fit.
    """
    origin, inside = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, part, alone=False) for part in inside)
    if origin is Literal:
        return value in inside
    if origin in _LISTS:
        parts = inside if origin is not tuple else ()
        return isinstance(value, list | tuple | set) and all(fits(item, part) for item in value for part in parts)
    if origin in (int, float):
        return isinstance(value, (int, float) if origin is float else int) and not isinstance(value, bool)
    if origin in (bool, str, NoneType, dict, Mapping) or dataclasses.is_dataclass(origin):
        return isinstance(value, origin)
    return alone or origin is Any or not isinstance(origin, type) or isinstance(value, origin)


def describe(kind: Any) -> str:
    """An annotation in words: `a whole number or null`."""
    origin, inside = get_origin(kind) or kind, get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(describe(part) for part in inside))
    if origin is Literal:
        return f"one of {', '.join(map(str, inside))}"
    if origin in _LISTS:
        return f"a list of {describe(inside[0])}" if inside and origin is not tuple else "a list"
    return _WORDS.get(origin) or str(getattr(origin, "__name__", origin))
