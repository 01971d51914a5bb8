"""Text to tokens on disk: the same tokens however it is cut, all or nothing, once for all who ask."""

import errno
import gzip
import json
import logging
import multiprocessing
import os
import pickle
import shutil
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import corpus as corpus_module
from tinygpt import pieces, workspace, writer
from tinygpt import shards as module
from tinygpt.config import DataConfig, TokenizerConfig, UserError
from tinygpt.pieces import ahead, first_part, recut
from tinygpt.shards import prepare
from tinygpt.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    Tokenizer,
    WordTokenizer,
)
from tinygpt.tokens import Tokens

KINDS = ("char", "byte", "word", "bpe")


def config(path, kind="char", **options) -> DataConfig:
    tokenizer = TokenizerConfig(kind, vocab_size=280, min_frequency=1)
    return DataConfig(corpus="text", path=str(path), tokenizer=tokenizer, **options)


@pytest.fixture
def file(tmp_path, rhyme):
    path = tmp_path / "rhyme.txt"
    path.write_bytes(rhyme.encode())
    return path


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def tiny_chunks(monkeypatch):
    monkeypatch.setattr(corpus_module, "CHUNK_SIZE", 5)


def ids(tokens: Tokens) -> list[int]:
    return tokens.windows(np.array([0]), len(tokens))[0].tolist()


def manifest(prepared) -> dict:
    return json.loads((prepared.folder / "manifest.json").read_text())


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The split


def test_shakespeare_splits_where_nanogpt_splits_it():
    assert first_part(1_115_394, 0.1) == 1_003_854


@given(characters=st.integers(0, 10**12))
def test_the_default_split_is_nanogpts(characters):
    assert first_part(characters, 0.1) == int(characters * 0.9)


def test_the_split_is_exact():
    assert first_part(10, 0.9) == 1
    assert [first_part(100, percent / 100) for percent in range(1, 100)] == list(range(99, 0, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_splits_are_the_text(file, cache, rhyme, kind):
    prepared = prepare(config(file, kind, val_fraction=0.3), cache, cache)
    border = first_part(len(rhyme), 0.3)
    assert ids(prepared.train) == prepared.tokenizer.encode(rhyme[:border])
    assert ids(prepared.val) == prepared.tokenizer.encode(rhyme[border:])
    assert ids(prepared.tokens("all")) == ids(prepared.tokens("train")) + ids(prepared.tokens("val"))


def test_what_is_learned_from_what(tmp_path, cache):
    """Characters from the whole text; words and merges from the training split alone."""
    path = tmp_path / "text.txt"
    path.write_text("known words " * 90 + "unseen éx y " * 10)
    assert "é" in prepare(config(path, "char"), cache, cache).tokenizer.state()["characters"]
    assert prepare(config(path, "word"), cache, cache).tokenizer.state()["words"] == ["known", "words"]
    text = path.read_text()
    trained = BPETokenizer.learn([text[: first_part(len(text), 0.1)]], 280)
    assert prepare(config(path, "bpe"), cache, cache).tokenizer.fingerprint() == trained.fingerprint()


def test_gpt2_on_shakespeare_has_nanogpts_counts(shared_data, cache):
    data = DataConfig(corpus="shakespeare", tokenizer=TokenizerConfig("gpt2"))
    prepared = prepare(data, shared_data, cache)
    assert (len(prepared.train), len(prepared.val)) == (301_966, 36_059)
    assert prepared.sha256 == corpus_module.SHAKESPEARE.sha256
    assert prepared.corpus == "shakespeare"
    assert manifest(prepared)["splits"]["val"]["characters"] == 111_540


# Chunks


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_do_not_show_in_the_tokens(file, cache, kind, monkeypatch):
    whole = prepare(config(file, kind), cache, cache / "whole")
    for size in (1, 4, 100):
        monkeypatch.setattr(corpus_module, "CHUNK_SIZE", size)
        chunked = prepare(config(file, kind), cache, cache / str(size))
        assert chunked.tokenizer.fingerprint() == whole.tokenizer.fingerprint()
        assert ids(chunked.tokens("all")) == ids(whole.tokens("all"))
        assert chunked.sha256 == whole.sha256


RANKS = [bytes([value]) for value in range(256)] + [b"  ", b" a", b"a'", b"'s", b" \n", b"\n\n", b"aa", b"!!"]
WHOLE: list[Tokenizer] = [
    GPT2Tokenizer(RANKS, GPT2_PATTERN, {}),
    WordTokenizer.learn(["a s ' ! é 's a's aa as"], min_frequency=1),
]


@given(chunks=st.lists(st.text("as'! \n\t\r\x1c\x85\xa0\u3000é1", max_size=8)))
def test_pieces_have_the_tokens_of_the_whole(chunks):
    pieces, text = list(recut(chunks)), "".join(chunks)
    assert "".join(pieces) == text
    for tokenizer in WHOLE:
        assert [token for piece in pieces for token in tokenizer.encode(piece)] == tokenizer.encode(text)


def test_a_text_is_cut_before_the_last_space_and_cut_anyway_when_long(monkeypatch):
    assert list(recut(["one two th", "ree  \n ", " four", ""])) == ["one two", " three", "  \n  four"]
    monkeypatch.setattr(pieces, "LONGEST_CARRY", 8)
    assert list(recut(["abc"] * 4)) == ["abcabcabc", "abc"]


@pytest.mark.parametrize("kind", ["char", "byte", "word"])
def test_memory_stays_bounded(tmp_path, cache, monkeypatch, kind):
    monkeypatch.setattr(corpus_module, "CHUNK_SIZE", 2**15)
    monkeypatch.setattr(pieces, "BATCH_CHARACTERS", 2**15)
    path = tmp_path / "long.txt"
    path.write_text("so long a text \n" * 2**18)
    tracemalloc.start()
    prepare(config(path, kind), cache, cache)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


# On disk


def test_the_folder_says_what_it_holds(file, cache, rhyme, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_TOKENS", 500)
    prepared = prepare(config(file), cache, cache)
    told = manifest(prepared)
    assert prepared.folder.parent == cache
    assert prepared.folder.name.startswith("text-char-")
    assert told["dtype"] == "|u1"
    assert told["fingerprint"] == prepared.tokenizer.fingerprint()
    border = first_part(len(rhyme), 0.1)
    for split, text in {"train": rhyme[:border], "val": rhyme[border:]}.items():
        entry = told["splits"][split]
        assert (entry["characters"], entry["bytes"], entry["tokens"]) == (
            len(text),
            len(text.encode()),
            len(text),
        )
        assert entry["shards"][0]["file"] == f"{split}-00000.bin"
        raw = b"".join((prepared.folder / shard["file"]).read_bytes() for shard in entry["shards"])
        assert np.frombuffer(raw, "u1").tolist() == prepared.tokenizer.encode(text)
    assert [shard["tokens"] for shard in told["splits"]["train"]["shards"][:2]] == [500, 500]


def test_characters_that_an_earlier_version_prepared_are_not_prepared_again(file, cache, monkeypatch):
    prepared = prepare(config(file), cache, cache)
    wanted, told = ids(prepared.tokens("all")), manifest(prepared)
    for path in prepared.folder.glob("*.bin"):
        path.write_bytes(np.fromfile(path, "u1").astype("<u2").tobytes())
    (prepared.folder / "manifest.json").write_text(json.dumps({**told, "format": 2, "dtype": "<u2"}))
    monkeypatch.setattr(module, "_fill", lambda *arguments: pytest.fail("prepared again"))
    assert ids(prepare(config(file), cache, cache).tokens("all")) == wanted


def test_large_vocabularies_take_four_bytes(tmp_path, cache):
    path = tmp_path / "wide.txt"
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x14000)]))
    path.write_text(text, encoding="utf-8", newline="")
    prepared = prepare(config(path), cache, cache)
    assert manifest(prepared)["dtype"] == "<u4"
    assert ids(prepared.tokens("all")) == list(range(len(text)))


def test_preparing_twice_does_nothing(file, cache, monkeypatch):
    first = prepare(config(file), cache, cache)
    monkeypatch.setattr(module, "_fill", pytest.fail)
    again = prepare(config(file), cache, cache)
    assert again.folder == first.folder
    assert ids(again.train) == ids(first.train)


def test_another_wish_is_another_folder(file, cache):
    wishes = [config(file), config(file, val_fraction=0.2), config(file, "byte"), config(file, "bpe")]
    wishes.append(DataConfig(corpus="text", path=str(file), tokenizer=TokenizerConfig("bpe", vocab_size=290)))
    folders = [prepare(wish, cache, cache).folder for wish in wishes]
    file.write_text("another text\n" * 9)
    folders.append(prepare(wishes[0], cache, cache).folder)
    assert len(set(folders)) == len(folders)
    # vocab_size means nothing to char: the same folder
    same = DataConfig(corpus="text", path=str(file), tokenizer=TokenizerConfig("char", vocab_size=999))
    assert prepare(same, cache, cache).folder == folders[-1]


def test_a_given_tokenizer_is_used_and_finds_what_it_made_before(file, cache, tmp_path, monkeypatch):
    other = tmp_path / "other.txt"
    other.write_text("The cat sat. " * 9)
    tokenizer = prepare(config(file), cache, cache).tokenizer
    prepared = prepare(config(other, "bpe"), cache, cache, tokenizer)
    assert ids(prepared.tokens("all")) == tokenizer.encode(other.read_text())
    monkeypatch.setattr(module, "_fill", pytest.fail)
    assert prepare(config(other), cache, cache, tokenizer).folder == prepared.folder
    assert prepare(config(file), cache, cache, tokenizer).tokenizer.fingerprint() == tokenizer.fingerprint()


def test_an_unknown_character_is_located_in_the_whole_text(file, cache, rhyme, tiny_chunks):
    position = rhyme.index("ß")
    for val_fraction in (0.1, 0.99):  # in either split
        with pytest.raises(UserError, match=f"at position {position} "):
            prepare(config(file, val_fraction=val_fraction), cache, cache, CharTokenizer(set(rhyme) - {"ß"}))
    assert visible(cache) == []


@pytest.mark.parametrize("tail", [b"", b" \xff"])
def test_a_failure_leaves_nothing_behind(tmp_path, cache, tail):
    path = tmp_path / "bad.txt.gz"
    path.write_bytes(gzip.compress(tail))
    with pytest.raises(UserError, match=r"empty|not UTF-8"):
        prepare(config(path), cache, cache)
    assert visible(cache) == []


def test_a_text_that_changes_meanwhile_is_refused(file, cache, monkeypatch):
    build = module.build

    def change(*arguments):
        tokenizer = build(*arguments)
        file.write_text(file.read_text().swapcase())
        return tokenizer

    monkeypatch.setattr(module, "build", change)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(config(file, "byte"), cache, cache)


def test_a_full_disk_is_a_user_error(file, cache, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=f"no room left for tokens in {cache}") as caught:
        prepare(config(file), cache, cache)
    assert "TINYGPT_CACHE_DIR" in caught.value.hint
    assert visible(cache) == []


def test_a_cache_that_cannot_be_written_is_a_user_error(file):
    with pytest.raises(UserError, match=f"cannot write to the cache folder {file}/cache") as caught:
        prepare(config(file), file, file / "cache")
    assert "TINYGPT_CACHE_DIR" in caught.value.hint


# Damage


def cut(folder):
    shard = folder / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda folder: (folder / "val-00000.bin").unlink(),
        lambda folder: (folder / "tokenizer.json").write_text("{"),
        lambda folder: (folder / "tokenizer.json").write_text('{"kind": "byte"}'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").unlink(),
    ],
    ids=["cut", "no val", "tokenizer", "other tokenizer", "manifest list", "manifest half", "no manifest"],
)
def test_a_damaged_folder_is_built_again(file, cache, caplog, damage):
    first = prepare(config(file), cache, cache)
    expected = ids(first.tokens("all"))
    damage(first.folder)
    with caplog.at_level(logging.WARNING):
        again = prepare(config(file), cache, cache)
    assert f"{first.folder} are damaged" in caplog.text
    assert again.folder == first.folder
    assert ids(again.tokens("all")) == expected
    assert visible(cache) == [first.folder.name]
    caplog.clear()
    prepare(config(file), cache, cache)
    assert not caplog.records


def test_what_a_killed_process_left_does_no_harm(file, cache, tmp_path):
    whole = prepare(config(file), cache, tmp_path / "elsewhere").folder
    leftover = cache / f".{whole.name}.0123456789abcdef"
    shutil.copytree(whole, leftover)
    (leftover / "manifest.json").unlink()
    prepared = prepare(config(file), cache, cache)
    assert prepared.folder == cache / whole.name
    assert visible(cache) == [leftover.name, whole.name]


# Several at once


def prepared_by_two(file, cache):
    """What two threads get that ask for the same tokens at the same time."""
    results = []
    threads = [threading.Thread(target=lambda: results.append(prepare(config(file), cache, cache))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    return results


def test_whoever_is_second_waits_for_the_first(file, cache, monkeypatch):
    fill, filling, waited = module._fill, threading.Event(), threading.Event()

    def slow(*arguments):
        assert not filling.is_set(), "the work is done twice"
        filling.set()
        assert waited.wait(20)
        fill(*arguments)

    monkeypatch.setattr(module, "_fill", slow)
    monkeypatch.setattr(workspace.log, "warning", lambda message: "waiting for it" in message and waited.set())
    results = prepared_by_two(file, cache)
    assert results[0].folder == results[1].folder
    assert visible(cache) == [results[0].folder.name]


def test_without_locks_whoever_is_second_uses_the_tokens_of_the_first(file, cache, monkeypatch):
    """Both build to the end before either gives its folder the final name."""
    monkeypatch.setattr(workspace, "_lock", lambda folder: None)
    ready, publish = threading.Barrier(2, timeout=20), module._publish

    def together(folder, target):
        ready.wait()
        return publish(folder, target)

    monkeypatch.setattr(module, "_publish", together)
    results = prepared_by_two(file, cache)
    assert ids(results[0].train) == ids(results[1].train)
    assert visible(cache) == [results[0].folder.name]


def prepare_and_report(start, path, cache, results):
    start.wait()
    prepared = prepare(config(path, "bpe"), Path(cache), Path(cache))
    results.put((prepared.folder.name, ids(prepared.tokens("all"))))


def test_two_processes_prepare_at_once(file, cache):
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(2), context.Queue()
    workers = [context.Process(target=prepare_and_report, args=(start, str(file), str(cache), results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0] == found[1]
    assert visible(cache) == [found[0][0]]


# Windows


@pytest.fixture
def numbered(tmp_path):
    """0 to 99 in shards of 30."""
    files = []
    for number, start in enumerate(range(0, 100, 30)):
        files.append(tmp_path / f"{number}.bin")
        np.arange(start, min(start + 30, 100)).astype("<u2").tofile(files[-1])
    return Tokens(files, [30, 30, 30, 10], "<u2")


@given(starts=st.lists(st.integers(0, 20), max_size=8), length=st.integers(0, 80))
def test_windows_reach_over_shards(tmp_path_factory, starts, length):
    tokens = numbered.__wrapped__(tmp_path_factory.getbasetemp())
    windows = tokens.windows(np.array(starts, dtype=np.int64), length)
    assert windows.dtype == np.int64
    assert windows.shape == (len(starts), length)
    assert windows.tolist() == [list(range(start, start + length)) for start in starts]


def test_windows_outside_the_split_are_refused(numbered):
    assert ids(numbered) == list(range(100))
    for start in (-1, 91):
        with pytest.raises(IndexError):
            numbered.windows(np.array([0, start]), 10)


def test_tokens_travel_to_a_worker_as_names_alone(numbered):
    packed = pickle.dumps(numbered)
    assert numbered.windows(np.array([29]), 2).tolist() == [[29, 30]]
    assert len(pickle.dumps(numbered)) == len(packed)
    assert ids(pickle.loads(packed)) == ids(numbered)


def test_tokens_add_up(numbered):
    assert ids(numbered + numbered) == [*range(100), *range(100)]
    assert len(numbered + Tokens([], [], "<u2")) == 100


def test_an_empty_split_is_empty(tmp_path, cache):
    path = tmp_path / "one.txt"
    path.write_text("x")
    prepared = prepare(config(path), cache, cache)
    assert (len(prepared.train), len(prepared.val)) == (0, 1)
    assert ids(prepared.tokens("all")) == [0]
    assert prepared.train.windows(np.array([], dtype=np.int64), 4).shape == (0, 4)


def test_what_was_done_before_is_read_again_where_ctrl_c_ends_it_and_the_rest_ahead():
    """A reader's first batch comes after all that an earlier process has done."""
    threads = []

    def batches():
        for name in ("first", "second", "third"):
            threads.append(threading.get_ident())
            yield name
        raise UserError("the text has changed")

    coming = ahead(batches())
    assert next(coming) == "first"
    assert threads[0] == threading.get_ident()
    assert next(coming) == "second"
    assert threads[1] != threading.get_ident()
    assert next(coming) == "third"
    with pytest.raises(UserError, match="has changed"):
        next(coming)
    before = threading.active_count()
    left = ahead(batches())
    next(left)
    left.close()  # whoever writes has failed
    assert threading.active_count() == before
