"""What annotations ask for: plain values, from YAML and from checkpoints, that are it and that are not."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest

from tinygpt.kinds import describe, fits


@dataclasses.dataclass
class Group:
    x: int = 1


YES = [
    (1, int),
    (1, float),
    (1.5, float),
    (True, bool),
    ("a", str),
    (None, int | None),
    (None, Optional[int]),  # noqa: UP045 (as Lightning writes it)
    ("a", Union[int, str]),  # noqa: UP007
    ([], list[int]),
    ([1, 2], list[int]),
    ((1, 2), list[int]),
    ([0.9, 1], tuple[float, float]),
    ([1], Iterable[int]),
    ({"a": 1}, dict[str, Any]),
    ({"a": 1}, Mapping[str, int]),
    (16, Literal[16, "16"]),
    (Group(), Group),
    (3, Any),
    (3, object),
    ("a", Path),  # nothing is known of it
    (3, Callable[[], int]),
    (timedelta(1), str | timedelta),
]
NO = [
    (True, int, "a whole number"),
    (True, float, "a number"),
    (1, bool, "true or false"),
    (1.0, int, "a whole number"),
    ("1", int, "a whole number"),
    (None, int, "a whole number"),
    (3, str, "text"),
    ("a", int | None, "a whole number or null"),
    ("abc", list[str], "a list of text"),
    (["a"], list[int], "a list of a whole number"),
    (3, Iterable[int], "a list of a whole number"),
    (3, tuple[float, float], "a list"),
    ([], dict[str, Any], "settings by name"),
    (17, Literal[16, "16"], "one of 16, 16"),
    ({}, Group, "Group"),
    (3, str | timedelta, "text or timedelta"),
]


@pytest.mark.parametrize(("value", "kind"), YES)
def test_what_fits(value, kind):
    assert fits(value, kind)


@pytest.mark.parametrize(("value", "kind", "words"), NO)
def test_what_does_not(value, kind, words):
    assert not fits(value, kind)
    assert describe(kind) == words
