"""A small IMDB: reviews by chance in both forms in which the real ones come, with checksums that fit."""

import hashlib
import io
import json
import lzma
import random
import tarfile

from tinygpt import imdb

WORDS = ("the film", "is", "not", "a", "great", "story", "of two", "people", "who", "act", "badly", "it's", "10/10")


def make(n=40, seed=0):
    """n reviews, half of each label and half of each part: (part, label, number, rating, text)."""
    draw = random.Random(seed)
    parts = [(part, label) for part in ("train", "test") for label in ("neg", "pos")]
    made = []
    for part, label in parts:
        for number in range(n // 4):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(1, 30)))
            made.append((part, label, number, draw.randrange(1, 11), f"{label.title()}, {number}: {text}.<br /><br />End."))
    return made


def write_archive(folder, reviews, monkeypatch):
    """As the authors publish it, in another order than by number, with files that are no labelled review."""
    path = folder / imdb.ARCHIVE.path
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {f"aclImdb/{part}/{label}/{number}_{rating}.txt": text for part, label, number, rating, text in reviews[::-1]}
    files |= {"aclImdb/train/unsup/0_0.txt": "not labelled", "aclImdb/README": "read me", "aclImdb/train/urls_neg.txt": "u"}
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    monkeypatch.setattr(imdb, "ARCHIVE", imdb.ARCHIVE._replace(sha256=sha256(path)))
    return path


def write_json_lines(folder, reviews, monkeypatch):
    sums = {}
    for name in imdb.JSON_LINES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            json.dumps({"id": f"{label}/{number}_{rating}", "label": label, "rating": rating, "text": text})
            for part, label, number, rating, text in reviews
            if part in name
        ]
        path.write_bytes(lzma.compress("".join(line + "\n" for line in lines).encode()))
        sums[name] = sha256(path)
    monkeypatch.setattr(imdb, "JSON_LINES", sums)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
