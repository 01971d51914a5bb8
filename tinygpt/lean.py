"""Importing torch and Lightning in less time than they take by themselves."""

import contextlib
import gc
import re
import sys
from collections.abc import Iterator

SPARED = ("matplotlib", "transformers")


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Imports inside run without the garbage collector, which would go over their half a million objects several times,
    a fifth of the time that they take, and find next to none to free; nor does it ever look at them later."""
    if "torch" in sys.modules:  # not the first import of a script's process: what to freeze is not ours to say
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """As `quick_imports`, for Lightning and torchmetrics: they are told that the packages in SPARED are not installed.

    torchmetrics, which Lightning imports whole, imports whatever it finds installed: matplotlib for `Metric.plot`,
    transformers for BERTScore. Our own imports of them work as ever.
    """
    from lightning_utilities.core.imports import RequirementCache

    ask = RequirementCache.__bool__

    def ask_unless_spared(self: RequirementCache) -> bool:
        if re.split(r"\W", self.requirement or "")[0] in SPARED:
            self.available, self.message = False, f"{self.requirement} is not needed here"
        return ask(self)

    RequirementCache.__bool__ = ask_unless_spared  # type: ignore[method-assign]
    try:
        with quick_imports():
            yield
    finally:
        RequirementCache.__bool__ = ask  # type: ignore[method-assign]
