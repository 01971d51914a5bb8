"""What torch.compile says where it cannot compile: no C++ compiler, no Triton, a GPU that it does not know."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tinygpt.config import UserError


@contextmanager
def explained() -> Iterator[None]:
    """Around a step, whose parts are compiled when they are first called: what fails there is a UserError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, torch.OutOfMemoryError):
            raise inner from None
        reason = str(error).strip().partition("\n")[0]
        hint = "use compile=false; or where it is a compiler that is missing, install g++ or clang, for a GPU Triton too"
        raise UserError(f"compile=true does not work here: {reason}", hint) from error
