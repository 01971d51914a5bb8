"""torch.compile, whose failures are the machine's: no C++ compiler, no Triton, a GPU that it does not know."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from tinygpt.config import UserError

P = ParamSpec("P")
R = TypeVar("R")


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """The function, compiled at its first call, which raises UserError where that cannot be done."""
    quick = torch.compile(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return quick(*args, **kwargs)
        except Exception as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).strip().partition("\n")[0]
            hint = "install a C++ compiler (g++ or clang), for a GPU Triton too; or use compile=false"
            raise UserError(f"compile=true does not work here: {reason}", hint) from error

    return call
