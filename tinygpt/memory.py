"""The process's memory and the arithmetic of its products: what is set once, before any tensor is made."""

import ctypes
import sys

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_memory() -> None:
    """Let glibc keep the memory that tensors give back, instead of handing it to the system and asking again.

    By default each allocation of 32 MiB or more is mapped anew, and the system clears its pages at first touch: a step of
    gpt2_small, with logits of hundreds of MiB, then waits for pages. Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def set_matmul_precision(wanted: str, device: str) -> None:
    """What float32 products are made of: see `TrainConfig.matmul_precision`. fastest: medium where the device, "cuda" or
    "cpu", has units for it (NVIDIA's tensor cores, Intel's AMX), else high, which changes nothing on a CPU."""
    if wanted == "fastest":
        has_units = device == "cuda" or (device == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)())
        wanted = "medium" if has_units else "high"
    torch.set_float32_matmul_precision(wanted)
