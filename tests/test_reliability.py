"""A few trials of benchmarks/reliability.py: real processes, real signals, a disk that really is full."""

import subprocess
import sys

import pytest
from scripts import ROOT


@pytest.mark.parametrize(("kind", "trials"), [("kill", 8), ("signal", 12), ("disk", 12), ("folder", 20)])
def test_whatever_happens_to_a_run_its_checkpoints_load_and_it_goes_on(kind, trials, tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--only", kind, "--trials", str(trials)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    name, tried, survived, lost, *how = done.stdout.splitlines()[1].split()
    if kind == "disk" and tried == "0":
        pytest.skip("no file system may be mounted here")
    assert (name, lost) == (kind, "0"), done.stdout
    assert int(tried) == int(survived) > 0
    assert how
