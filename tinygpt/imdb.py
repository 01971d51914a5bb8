"""The IMDB reviews: 50,000 with a label, of the Large Movie Review Dataset (Maas et al. 2011, aclanthology.org/P11-1015).

Two forms are read, and give the same reviews in the same order: the archive as its authors publish it, or two files of
JSON lines. The labels are not used.
"""

import json
import lzma
import random
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

from tinygpt.config import UserError
from tinygpt.files import Download, obtain, reading, verify

SEED = 42

ARCHIVE = Download(
    "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
    "c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
    "imdb/aclImdb_v1.tar.gz",
)
JSON_LINES = {
    "imdb/imdb_train.jsonl.xz": "f7e93a8c31001e3796a9546e19c93675dedbd1ee6785a56b82a6a9234f7b1a09",
    "imdb/imdb_test.jsonl.xz": "d23f18a35a22ac388a92e7e0a7532b2b9f912b8c979420b8689b5d5e55f7a5c7",
}

_MEMBER = re.compile(r"(?:\./)?aclImdb/(train|test)/(neg|pos)/(\d+)_\d+\.txt")
_TAG = re.compile(r"<.*?>")
_OTHER = re.compile(r"[^a-z\s]")


class Review(NamedTuple):
    """Its place in the data set (training part or not, positive or not, number), which sorts it, and its text."""

    place: tuple[bool, bool, int]
    text: str


def find(data_dir: Path) -> list[Path]:
    """The files that hold the reviews: both files of JSON lines, else the archive, downloaded if it is not there.

    Raises UserError where a file is not what it should be, or cannot be had.
    """
    paths = [data_dir / name for name in JSON_LINES]
    if not all(path.exists() for path in paths):
        return [obtain(ARCHIVE, data_dir)]
    for path, sha256 in zip(paths, JSON_LINES.values(), strict=True):
        verify(path, sha256, f"delete it to have {ARCHIVE.url} downloaded instead")
    return paths


def read_reviews(paths: list[Path], clean: bool) -> list[str]:
    """All reviews, shuffled by SEED: any run of them is a fair sample."""
    found = [review for path in paths for review in (_archive(path) if path.suffix == ".gz" else _json_lines(path))]
    texts = [review.text.strip() for review in sorted(found)]
    random.Random(SEED).shuffle(texts)
    return [cleaned(text) for text in texts] if clean else texts


def cleaned(text: str) -> str:
    """Lower case; tags and every character that is neither a-z nor white space deleted, which joins what they parted."""
    return _OTHER.sub("", _TAG.sub("", text.lower()))


def _archive(path: Path) -> list[Review]:
    reviews = []
    with reading(path):
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if found := _MEMBER.fullmatch(member.name):
                        file = archive.extractfile(member)
                        assert file
                        reviews.append(_review(found[1], found[2], found[3], file.read().decode()))
        except tarfile.TarError as error:
            raise UserError(f"{path} is damaged: {error}", "it cannot be unpacked: get it again") from error
    return reviews


def _json_lines(path: Path) -> list[Review]:
    part = "train" if "train" in path.name else "test"
    with reading(path), lzma.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [_review(part, row["label"], row["id"].split("/")[1].split("_")[0], row["text"]) for row in rows]


def _review(part: str, label: str, number: str, text: str) -> Review:
    return Review((part != "train", label != "neg", int(number)), text)
