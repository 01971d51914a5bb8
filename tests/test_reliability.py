"""A few trials of benchmarks/reliability.py: real processes, real signals, a disk that really is full."""

import subprocess
import sys

from scripts import ROOT


def test_whatever_happens_to_a_run_its_checkpoints_load_and_it_goes_on(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "reliability.py"), "--only", "kill,signal,disk,folder"]
    done = subprocess.run([*command, "--trials", "12"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines()[1:]:
        kind, tried, survived, lost, *_ = line.split()
        found[kind] = tuple(map(int, (tried, survived, lost)))
    assert set(found) == {"kill", "signal", "disk", "folder"}, done.stdout
    for kind, (tried, survived, lost) in found.items():
        assert (survived, lost) == (tried, 0), done.stdout
        assert tried or kind == "disk"  # for which a file system must be mounted
