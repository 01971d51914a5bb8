"""What several test files share. Small: a fixture that one file needs lives in that file."""

import os
from pathlib import Path

import pytest
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


@pytest.fixture
def rhyme() -> str:
    """A small text with apostrophes, runs of spaces, tabs, CRLF, accents, CJK, an emoji."""
    return (
        "The cat's   hat;\tthe cat sat.\n\n  Don't they'd say: 3.14 or 2,718?\r\n"
        "Größe naïve café, 東京の猫 🐈 cafe\u0301 …\u00a0end \n" * 20
    )
