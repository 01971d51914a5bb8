"""Hostile and damaged checkpoints, opened in every way there is: refused with a reason, no code run, no memory taken."""

import contextlib
from pathlib import Path

import hostile
import pytest
import tiny
from scripts import files

import tinygpt
from tinygpt.config import UserError

SPARE = 64 * 2**20  # bytes: what may be asked for beside twice the file's size


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The last checkpoint of a run of a few steps."""
    folder = tmp_path_factory.mktemp("good")
    return tiny.run(folder, steps=4, every=2) / "checkpoints" / "last.ckpt"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """An empty current folder, in which nothing may explode."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert files(folder) == set()


@contextlib.contextmanager
def peak_memory():
    """How far the memory of this process rises above what it is now, in bytes; nothing where the system cannot tell."""
    risen, reset = [0], Path("/proc/self/clear_refs")
    if not reset.exists():
        yield risen
        return
    reset.write_text("5")  # the highest mark begins anew
    before = held("VmRSS")
    yield risen
    risen[0] = held("VmHWM") - before


def held(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused(name, good, tmp_path, place):
    maker, words = hostile.FILES[name]
    path = hostile.write(maker, good, tmp_path / "x.ckpt")
    with peak_memory() as risen, pytest.raises(UserError) as caught:
        tinygpt.load(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value) or "checkpoint" in str(caught.value) or "model" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert risen[0] < 2 * path.stat().st_size + SPARE
