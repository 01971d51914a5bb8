"""What is set once for a process: memory that is kept, and what products are made of."""

import subprocess
import sys

import pytest
import torch

from tinygpt.memory import set_matmul_precision

FAULTS = """
import resource, torch
from tinygpt.memory import keep_memory

if {kept}:
    keep_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sum([faults() for _ in range(30)][20:]) // 10)  # at first the blocks that come back are a little too small
"""


def page_faults(kept: bool) -> int:
    command = [sys.executable, "-c", FAULTS.format(kept=kept)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_large_tensor_that_comes_back_finds_its_memory_still_there():
    assert page_faults(kept=True) < 1000
    assert page_faults(kept=False) > 4000  # as otherwise the system clears its pages again: this test can tell


@pytest.mark.parametrize(
    ("device", "units", "expected"),
    [("cpu", True, "medium"), ("cpu", False, "high"), ("cuda", False, "medium"), ("mps", True, "high")],
)
def test_fastest_is_bfloat16_only_where_there_are_units_for_it(monkeypatch, device, units, expected):
    chosen = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what counts is where the run is
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: units, raising=False)
    set_matmul_precision("fastest", device)
    set_matmul_precision("highest", device)
    assert chosen == [expected, "highest"]
