"""Importing Lightning and torchmetrics without what they import only where it happens to be installed.

torchmetrics, which Lightning imports whole, asks lightning_utilities what is installed and imports all of it: matplotlib
for `Metric.plot`, transformers for BERTScore. That is as long again as the rest of Lightning, before the first step of
runs that need neither.
"""

import contextlib
import re
from collections.abc import Iterator

SPARED = ("matplotlib", "transformers")


@contextlib.contextmanager
def lean_imports() -> Iterator[None]:
    """What is imported inside is told that the packages in SPARED are not installed; their own imports work as ever."""
    from lightning_utilities.core.imports import RequirementCache

    ask = RequirementCache.__bool__

    def ask_unless_spared(self: RequirementCache) -> bool:
        if re.split(r"\W", self.requirement or "")[0] in SPARED:
            self.available, self.message = False, f"{self.requirement} is not needed here"
        return ask(self)

    RequirementCache.__bool__ = ask_unless_spared  # type: ignore[method-assign]
    try:
        yield
    finally:
        RequirementCache.__bool__ = ask  # type: ignore[method-assign]
