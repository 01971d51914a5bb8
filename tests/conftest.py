"""What several test files share. Small: a fixture that one file needs lives in that file."""

import os
import time
from pathlib import Path

import pytest
import scripts
import tiny
from hypothesis import settings

# The same examples each time, and no test depends on the speed of a machine.
settings.register_profile("tinygpt", deadline=None, derandomize=True, database=None)
settings.load_profile("tinygpt")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, or a skip."""
    folder = os.environ.get("TINYGPT_DATA_DIR")
    if not folder:
        pytest.skip("set TINYGPT_DATA_DIR to a folder with tinyshakespeare/, tiktoken_cache/ and golden/")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_home: Path) -> Path:
    """A run directory that `train.py` has left. Not to be written to."""
    return (tiny_home / "outputs" / "latest").resolve()


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory) -> Path:
    """The folder in which `train.py` was run for `tiny_run`, with the text and the cache. Not to be written to."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_home"  # all workers share one
    try:
        folder.mkdir()
    except FileExistsError:
        wait_for(folder / "done")
    else:
        make_tiny_home(folder)
    return folder


def make_tiny_home(folder: Path) -> None:
    (folder / "it's, a=[text].txt").write_text(tiny.text() + "\nTo be, or not to be: that is it.\n", encoding="utf-8")
    done = scripts.run(
        "train",
        *scripts.SMALL,
        "data=text",
        "data.path=it's, a=[text].txt",
        "trainer.max_steps=20",
        "trainer.val_check_interval=10",
        "optimizer.lr=1e-2",
        "optimizer.warmup_steps=2",
        cwd=folder,
        env={"TINYGPT_CACHE_DIR": str(folder / "cache")},
    )
    (folder / "stdout").write_text(done.stdout, encoding="utf-8")
    (folder / "stderr").write_text(done.stderr, encoding="utf-8")
    (folder / "done").write_text(str(done.code))
    assert done.code == 0, done.stderr


def wait_for(path: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.1)


@pytest.fixture
def quick():
    with tiny.quickly():
        yield


@pytest.fixture
def rhyme() -> str:
    """A small text with apostrophes, runs of spaces, tabs, CRLF, accents, CJK, an emoji."""
    return (
        "The cat's   hat;\tthe cat sat.\n\n  Don't they'd say: 3.14 or 2,718?\r\n"
        "Größe naïve café, 東京の猫 🐈 cafe\u0301 …\u00a0end \n" * 20
    )
