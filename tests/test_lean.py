"""Importing in less time leaves no trace but what was imported. What is spared: tests/test_layers.py."""

import gc
import sys
from contextlib import suppress

from lightning_utilities.core.imports import RequirementCache

from tinygpt.lean import lean_imports, quick_imports


def test_what_is_spared_is_spared_only_inside():
    with suppress(ModuleNotFoundError), lean_imports():
        assert not RequirementCache("matplotlib")
        assert not RequirementCache("transformers>=4.4.0")
        assert RequirementCache("torch>=2.2.0")
        assert RequirementCache(module="torch.utils")
        raise ModuleNotFoundError
    assert RequirementCache("matplotlib")


def test_the_collector_rests_only_inside(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with suppress(ModuleNotFoundError), quick_imports():
        assert not gc.isenabled()
        raise ModuleNotFoundError
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_where_torch_is_there_already_nothing_is_frozen():
    before = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
