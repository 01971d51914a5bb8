"""Whatever comes in, what goes out is right or a UserError: tokenizers, texts, shards and the sampler, by hypothesis.

The examples are the same each time (see conftest.py).
"""

import contextlib
import copy
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tinygpt.batches import BatchOrder, validation_batch, validation_windows
from tinygpt.config import DataConfig, ModelConfig, TokenizerConfig, UserError
from tinygpt.data import make_order
from tinygpt.generate import generate, generate_many
from tinygpt.model import GPT
from tinygpt.pieces import first_part
from tinygpt.shards import prepare
from tinygpt.tokenizer import (
    GPT2_PATTERN,
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Detokenizer,
    GPT2Tokenizer,
    WordTokenizer,
    from_state,
)

LEARNED_FROM = "the theme of the other thing: don't go there, then thank them; \n" * 9 + "é東🐈\x00\U0010ffff\ufeff"
RANKS = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"\xc3\xa9", b"  ", b"an", b" an"]
TOKENIZERS = {
    "char": CharTokenizer.learn([LEARNED_FROM]),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.learn([LEARNED_FROM], min_frequency=1),
    "gpt2": GPT2Tokenizer(RANKS, GPT2_PATTERN, {"<|endoftext|>": len(RANKS)}),
    "bpe": BPETokenizer.learn([LEARNED_FROM], vocab_size=300),
}
every_kind = pytest.mark.parametrize("kind", TOKENIZERS)

ODD = "\ud800\udbff\udc00\udfff\x00\x1c\x85\ufeff\ufffe\U0010ffff🐈é\u0301\u200d\u2028\r\n\t '<|endoftext|>"
texts = st.text(st.characters(codec="utf-8") | st.sampled_from(ODD) | st.sampled_from("the "), max_size=40)


def tried(work):
    """What `work` gives and None, or None and the UserError that it raises, which always has a hint."""
    try:
        return work(), None
    except UserError as error:
        return None, error if error.hint else pytest.fail(f"no hint: {error}")


@pytest.fixture(scope="module", autouse=True)
def _no_waiting_for_the_disk():
    with mock.patch.object(os, "fsync", return_value=None):
        yield


# Tokenizers


@every_kind
@given(text=texts)
@example(text="\ud83d\udc08")  # a pair that UTF-16 would join
@example(text="\x00" * 3)
def test_any_text_is_encoded_and_comes_back_or_is_refused(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids, error = tried(lambda: tokenizer.encode(text))
    if error:
        surrogate = any("\ud800" <= c <= "\udfff" for c in text)
        assert surrogate or (kind == "char" and set(text) - set(LEARNED_FROM))
        return
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    back = tokenizer.decode(ids)
    if kind == "word":
        assert "<unk>" in back or back.replace(" ", "") == "".join(c for c in text if c == "\n" or not c.isspace())
    else:
        assert back == text


@every_kind
@given(data=st.data())
def test_any_ids_decode_to_the_same_text_at_once_and_one_by_one(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = Detokenizer(tokenizer)
    assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from(ODD[4:]), min_size=1, max_size=60))
@settings(max_examples=40)
def test_what_is_learned_from_any_text_encodes_it_and_survives_its_state(kind, text):
    learn = {
        "char": lambda: CharTokenizer.learn([text]),
        "word": lambda: WordTokenizer.learn([text], min_frequency=1),
        "bpe": lambda: BPETokenizer.learn([text], vocab_size=270),
    }
    tokenizer = learn[kind]()
    again = from_state(json.loads(json.dumps(tokenizer.state())))
    assert again.encode(text) == tokenizer.encode(text)
    assert again.fingerprint() == tokenizer.fingerprint()
    if kind != "word":
        assert again.decode(again.encode(text)) == text


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 400) | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=4,
)
patterns = st.sampled_from(
    ["", "(", "[", "(?:a*)*b", "a{99999}{99999}", "(?<=a)", "\\p{Nope}", ".", "\x00", "(a|aa)+$", "\\"]
)


@every_kind
@given(data=st.data())
def test_a_damaged_state_is_a_tokenizer_or_a_user_error(kind, data):
    state = copy.deepcopy(TOKENIZERS[kind].state())
    name = data.draw(st.sampled_from([*state, "more"]))
    state[name] = data.draw(patterns if name == "pattern" else json_values)
    tokenizer, error = tried(lambda: from_state(state))
    if not error:
        tried(lambda: tokenizer.decode(tokenizer.encode("the cat\n")))


# Texts


def counts(block):
    """Sizes of texts where something changes: around nothing, a window, two windows, and their tenths."""
    return st.sampled_from(
        [0, 1, 2, block - 1, block, block + 1, block + 2, 2 * block, 10 * block, 11 * block + 1]
    ) | st.integers(0, 200)


lines = st.sampled_from(["\r\n", "\n", "\r", "\ufeff", "é", "🐈", "a", "bc ", "\x85", "\u2028"])


@given(
    parts=st.lists(lines, min_size=1, max_size=6),
    size=counts(8),
    mark=st.booleans(),
    kind=st.sampled_from(["char", "byte", "word"]),
    block=st.integers(1, 12),
    batch=st.integers(1, 5),
    fraction=st.sampled_from([0.1, 0.5, 0.001, 0.999]),
)
@settings(max_examples=40)
def test_a_text_of_any_size_trains_whole_windows_or_is_refused(parts, size, mark, kind, block, batch, fraction):
    text = ("".join(parts) * (1 + size))[:size]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text.txt").write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode())
        tokenizer = TokenizerConfig(kind, min_frequency=1)
        config = DataConfig(corpus="text", path=str(folder / "text.txt"), val_fraction=fraction, tokenizer=tokenizer)
        prepared, error = tried(lambda: prepare(config, folder, folder / "cache"))
        if error:
            assert not text.removeprefix("\ufeff")
            return
        order, error = tried(lambda: make_order(prepared.train, prepared.val, block, batch, seed=1))
        if error:
            assert len(prepared.train) <= block or len(prepared.val) < 2
            return
        if not mark and text.startswith("\ufeff"):
            text = text[1:]  # a mark it is
        border = first_part(len(text), fraction)
        assert ids(prepared.train) == prepared.tokenizer.encode(text[:border])  # CRLF stays CRLF
        assert ids(prepared.val) == prepared.tokenizer.encode(text[border:])
        assert isinstance(order, BatchOrder)
        for step in (0, 1, order.rows_per_epoch, 10**9):
            rows = order.read(prepared.train, step, slice(None)).tokens
            assert rows.shape == (batch, block + 1)
        windows = validation_windows(prepared.val, block)
        read = validation_batch(prepared.val, block, 0, windows)
        assert (read[:, 1:] >= 0).sum() == len(prepared.val) - 1  # each is a target once


def ids(tokens):
    return tokens.windows(np.array([0]), len(tokens))[0].tolist()


@given(head=st.binary(max_size=40), tail=st.binary(max_size=20))
@settings(max_examples=40)
def test_any_bytes_are_a_text_or_refused(head, tail):
    content = head + b"some text, long enough to be one\r\n" * 3 + tail
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "text.txt").write_bytes(content)
        config = DataConfig(corpus="text", path=str(folder / "text.txt"), tokenizer=TokenizerConfig("byte"))
        prepared, error = tried(lambda: prepare(config, folder, folder / "cache"))
        if error:
            assert str(folder / "text.txt") in str(error)
            return
        assert bytes(ids(prepared.tokens("all"))) == content.removeprefix(b"\xef\xbb\xbf")


# Shards


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A prepared text: its folder, its config, its tokens."""
    folder = tmp_path_factory.mktemp("shelf")
    many = "".join(map(chr, range(0x100, 0x200)))  # so that an id takes two bytes, and their order matters
    (folder / "text.txt").write_text(LEARNED_FROM.replace("\0", "") + many, encoding="utf-8", newline="")
    config = DataConfig(corpus="text", path=str(folder / "text.txt"), tokenizer=TokenizerConfig("char"))
    return folder, config, ids(prepare(config, folder, folder / "cache").tokens("all"))


def bitten(content, data):
    """A file cut short, made longer, of the other byte order, of somebody else's, or with a few other bytes."""
    how = data.draw(st.sampled_from(["cut", "longer", "swapped", "foreign", "gone", "empty"]))
    if how == "cut":
        return content[: data.draw(st.integers(0, max(0, len(content) - 1)))]
    if how == "longer":
        return content + data.draw(st.binary(min_size=1, max_size=9))
    if how == "swapped":
        return np.frombuffer(content[: len(content) // 2 * 2], "<u2").byteswap().tobytes() + content[len(content) // 2 * 2 :]
    if how == "foreign":
        return np.random.default_rng(data.draw(st.integers(0, 99))).bytes(len(content))
    return None if how == "gone" else b""


@contextlib.contextmanager
def copied(shelf, name):
    """A copy of the shelf's cache, and the path of a file in it."""
    with tempfile.TemporaryDirectory() as place:
        cache = shutil.copytree(shelf[0] / "cache", Path(place) / "cache")
        (path,) = cache.glob(f"*/{name}")
        yield cache, path


@given(data=st.data())
@settings(max_examples=30)
def test_damaged_shards_are_made_again(shelf, data):
    folder, config, wanted = shelf
    name = data.draw(st.sampled_from(["train-00000.bin", "val-00000.bin", "manifest.json", "tokenizer.json"]))
    with copied(shelf, name) as (cache, path):
        new = bitten(path.read_bytes(), data)
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        assert ids(prepare(config, folder, cache).tokens("all")) == wanted


@given(data=st.data())
@settings(max_examples=30)
def test_a_manifest_that_lies_is_not_believed(shelf, data):
    folder, config, wanted = shelf
    with copied(shelf, "manifest.json") as (cache, path):
        manifest = json.loads(path.read_text())
        where = data.draw(
            st.sampled_from([("dtype",), ("splits",), ("splits", "train"), ("splits", "val", "shards"), ("fingerprint",)])
        )
        holder = manifest
        for key in where[:-1]:
            holder = holder[key]
        holder[where[-1]] = data.draw(st.sampled_from([">u2", "<u4", "<i2", "|u1", "O"]) | json_values)
        path.write_text(json.dumps(manifest))
        assert ids(prepare(config, folder, cache).tokens("all")) == wanted


# The sampler

MODEL = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=8, block_size=6), TOKENIZERS["char"].vocab_size).eval()
for parameter in MODEL.parameters():
    parameter.data *= 20  # logits far apart
number = st.floats() | st.integers(-3, 60) | st.sampled_from([0.0, 1e-45, 1e-38, 1e-5, 1e-6, 1.0, 1e6, 3e38, 1e308, 2**70])


@given(
    temperature=number,
    top_k=st.none() | st.integers(-2, 10**6) | st.just(2**70),
    top_p=st.none() | number,
    min_p=st.none() | number,
    repetition_penalty=number,
    seed=st.none() | st.integers(-2, 2**64),
    stop=st.lists(st.text("the \n", max_size=3), max_size=2),
)
@settings(max_examples=200)
@example(temperature=1e-5, top_k=None, top_p=None, min_p=None, repetition_penalty=1e-45, seed=1, stop=[])
@example(temperature=1e6, top_k=None, top_p=1e-45, min_p=1.0, repetition_penalty=1e6, seed=1, stop=[])
def test_any_sampling_writes_or_is_refused(stop, **sampling):
    options = {"max_new_tokens": 8, "stop": stop, **sampling}
    text, error = tried(lambda: generate(MODEL, TOKENIZERS["char"], "the", **options))
    assert bool(error) == out_of_limits(**options)
    if error:
        return
    assert text.startswith("the")
    assert len(text) <= 3 + 8
    if sampling["seed"] is not None:
        assert generate(MODEL, TOKENIZERS["char"], "the", **options) == text


def out_of_limits(temperature, top_k, top_p, min_p, repetition_penalty, seed, stop, max_new_tokens):
    return (
        not 0 <= temperature <= 10**6
        or (top_k is not None and top_k < 1)
        or (top_p is not None and not 0 < top_p <= 1)
        or (min_p is not None and not 0 <= min_p <= 1)
        or not 0 < repetition_penalty <= 10**6
        or (seed is not None and not 0 <= seed < 2**63)
        or "" in stop
    )


@given(value=json_values | st.binary(max_size=3), name=st.sampled_from(["temperature", "top_k", "top_p", "min_p", "seed"]))
@settings(max_examples=60)
def test_a_setting_of_any_type_writes_or_is_refused(name, value):
    _, error = tried(lambda: generate_many(MODEL, TOKENIZERS["char"], "the", 2, max_new_tokens=2, **{name: value}))
    assert not error or name in str(error)


@given(prompt=texts)
@settings(max_examples=60)
def test_any_prompt_is_continued_or_refused(prompt):
    text, error = tried(lambda: generate(MODEL, TOKENIZERS["char"], prompt, max_new_tokens=3, seed=1))
    if error:
        assert set(prompt) - set(LEARNED_FROM)
        return
    assert text.startswith(prompt)
    assert torch.isfinite(MODEL(torch.tensor([TOKENIZERS["char"].encode(prompt or "t")[-6:]]))).all()
