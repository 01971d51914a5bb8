"""tinygpt: from a text to a trained, sampled, served GPT. Names are imported when first used (PEP 562)."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "GPT": "model",
    "ModelConfig": "config",
    "UserError": "config",
    "load": "checkpoint",
    "generate": "generate",
}
__all__ = ["GPT", "ModelConfig", "UserError", "generate", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'tinygpt' has no attribute {name!r}")
    module = import_module(f"tinygpt.{_HOME[name]}")
    # Importing generate.py binds `tinygpt.generate` to that module, which is callable: always one object.
    return globals().get(name) or getattr(module, name)
