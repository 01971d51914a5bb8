"""Every tokenizer: what goes in comes out, states rebuild it, and bad input is named."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinygpt import tokenizer as module
from tinygpt.config import TokenizerConfig, UserError
from tinygpt.tokenizer import (
    BPETokenizer,
    ByteTokenizer,
    CharTokenizer,
    Detokenizer,
    GPT2Tokenizer,
    Tokenizer,
    WordTokenizer,
    build,
    from_state,
)

RANKS = [bytes([value]) for value in range(256)] + [b"th", b"the", b" the", b"\xc3\xa9", b"  ", b"an", b" an"]
LEARNED_FROM = "the theme of the other thing: don't go there, then thank them; other things gather.\n" * 9

TOKENIZERS: dict[str, Tokenizer] = {
    "char": CharTokenizer.learn([LEARNED_FROM, "é東🐈"]),
    "byte": ByteTokenizer(),
    "word": WordTokenizer.learn([LEARNED_FROM], min_frequency=1),
    "gpt2": GPT2Tokenizer(RANKS, module.GPT2_PATTERN, {module.END_OF_TEXT: len(RANKS)}),
    "bpe": BPETokenizer.learn([LEARNED_FROM], vocab_size=300),
}

every_kind = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
any_text = st.text(st.characters(codec="utf-8"))


def test_every_kind_of_the_config_is_here():
    (kind,) = [item for item in TokenizerConfig.__dataclass_fields__.values() if item.name == "kind"]
    assert set(kind.metadata["choices"]) == set(TOKENIZERS)


# Round trips


@pytest.mark.parametrize("kind", ["byte", "gpt2", "bpe"])
@given(text=any_text)
def test_any_text_round_trips(kind, text):
    tokenizer = TOKENIZERS[kind]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=st.text(sorted(set(LEARNED_FROM + "é東🐈"))))
def test_known_characters_round_trip(text):
    tokenizer = TOKENIZERS["char"]
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=any_text)
def test_words_round_trip_up_to_spaces(text):
    tokenizer = WordTokenizer.learn([text], min_frequency=1)
    once = tokenizer.decode(tokenizer.encode(text))
    assert once.replace(" ", "") == "".join(c for c in text if c == "\n" or not c.isspace())
    assert tokenizer.decode(tokenizer.encode(once)) == once


def test_words_are_joined_by_one_space_and_none_beside_newlines():
    text = "Don't   stop,\n\n  they said -- it's\tnot rock'n'roll . \n"
    tokenizer = WordTokenizer.learn([text], min_frequency=1)
    assert tokenizer.decode(tokenizer.encode(text)) == "Don't stop ,\n\nthey said - - it's not rock'n ' roll .\n"


def test_rare_and_new_words_become_unknown():
    tokenizer = WordTokenizer.learn(["a a b"], min_frequency=2)
    assert tokenizer.encode("a b c") == [1, 0, 0]
    assert tokenizer.decode([1, 0, 0]) == "a <unk> <unk>"


@every_kind
def test_encode_array_is_encode(tokenizer):
    ids = tokenizer.encode_array(LEARNED_FROM)
    assert np.issubdtype(ids.dtype, np.unsignedinteger)
    assert ids.tolist() == tokenizer.encode(LEARNED_FROM)
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


@every_kind
def test_nothing_encodes_to_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


@every_kind
def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.decode([token])


@every_kind
def test_ids_may_be_of_any_integer_type(tokenizer):
    ids = tokenizer.encode("the thing")
    assert tokenizer.decode(torch.tensor(ids)) == tokenizer.decode(np.array(ids)) == tokenizer.decode(iter(ids))


# Vocabularies


def test_characters_are_in_the_order_of_their_code_points():
    assert CharTokenizer.learn(["ba\n", "éZ"]).encode("\nZabé") == [0, 1, 2, 3, 4]


def test_words_are_ordered_by_frequency_then_alphabet():
    tokenizer = WordTokenizer.learn(["d c b a c ", "b c"], min_frequency=1)
    assert tokenizer.encode("c b a d") == [1, 2, 3, 4]


def test_ids_take_as_few_bytes_as_they_can():
    sizes = (2, 2**8, 2**8 + 1, 2**16, 2**16 + 1)
    assert [module.token_dtype(size).str for size in sizes] == ["|u1", "|u1", "<u2", "<u2", "<u4"]


def test_a_learned_bpe_is_the_same_in_another_process():
    """Another process hashes strings with another seed: an order taken from a set would differ."""
    script = (
        "import sys; from tinygpt.tokenizer import BPETokenizer, WordTokenizer; text = sys.stdin.read()\n"
        "print(BPETokenizer.learn([text], 300).fingerprint(), WordTokenizer.learn([text], 1).fingerprint())"
    )
    found = subprocess.run(
        [sys.executable, "-c", script],
        input=LEARNED_FROM,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert found.stdout.split() == [TOKENIZERS["bpe"].fingerprint(), TOKENIZERS["word"].fingerprint()]


def test_bpe_learns_what_was_asked_for():
    text = " ".join(f"{number} bottles" for number in range(2000))
    tokenizer = BPETokenizer.learn([text], vocab_size=400)
    assert tokenizer.vocab_size == 400
    assert tokenizer.encode(" bottles") == [max(tokenizer.encode(" bottles"))]
    assert BPETokenizer.learn([], vocab_size=400).vocab_size == 256


def test_build_learns_characters_from_all_text_and_words_from_the_training_split():
    def texts():
        return ["train ", "val"]

    def train_texts():
        return ["train "]

    def built(kind):
        return build(TokenizerConfig(kind, min_frequency=1), texts, train_texts, pytest.fail)

    assert built("char").encode("val")
    assert built("word").encode("train val") == [1, 0]
    assert built("bpe").fingerprint() == BPETokenizer.learn(train_texts(), 1024).fingerprint()
    assert built("byte").vocab_size == 256


# States


@every_kind
def test_state_survives_json_and_weights_only_load(tokenizer):
    file = io.BytesIO()
    torch.save({"tokenizer": tokenizer.state()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["tokenizer"]
    for state in (loaded, json.loads(json.dumps(tokenizer.state()))):
        again = from_state(state)
        assert type(again) is type(tokenizer)
        assert again.fingerprint() == tokenizer.fingerprint()
        assert again.vocab_size == tokenizer.vocab_size
        assert again.encode(LEARNED_FROM) == tokenizer.encode(LEARNED_FROM)
        assert again.decode(range(tokenizer.vocab_size)) == tokenizer.decode(range(tokenizer.vocab_size))


def test_fingerprints_tell_tokenizers_apart():
    others = [CharTokenizer("ab"), CharTokenizer("abc"), BPETokenizer.learn([LEARNED_FROM], 270)]
    prints = [tokenizer.fingerprint() for tokenizer in [*TOKENIZERS.values(), *others]]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize(
    "state",
    [
        {"kind": "sentencepiece"},
        {"kind": ["char"]},
        {},
        None,
        {"kind": "char"},
        {"kind": "char", "characters": 7},
        {"kind": "char", "characters": ""},
        {"kind": "char", "characters": "\ud800"},
        {"kind": "word", "words": ["a", "a"]},
        {"kind": "word", "words": [1]},
        {"kind": "gpt2", "ranks": "AA== AQ==", "pattern": ".", "special_tokens": {}},
        {**TOKENIZERS["bpe"].state(), "ranks": TOKENIZERS["bpe"].state()["ranks"] + " !"},
        {**TOKENIZERS["bpe"].state(), "pattern": "("},
        {**TOKENIZERS["gpt2"].state(), "special_tokens": {"<|endoftext|>": 3}},
    ],
    ids=lambda state: str(state)[:50],
)
def test_a_damaged_or_unknown_state_is_a_user_error(state):
    with pytest.raises(UserError, match=r"damaged|not known") as caught:
        from_state(state)
    assert caught.value.hint


# Bytes per token


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "bpe"])
def test_byte_lengths_add_up_to_the_text(kind):
    tokenizer, text = TOKENIZERS[kind], LEARNED_FROM + "é東🐈"
    lengths = tokenizer.byte_lengths()
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_special_tokens_have_no_length_and_words_none_at_all():
    assert TOKENIZERS["gpt2"].byte_lengths()[-1] == 0
    assert TOKENIZERS["word"].byte_lengths() is None


# Streaming


def streamed(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [stream.push(token) for token in ids] + [stream.finish()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(kind, data):
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streaming_holds_back_half_a_character_alone():
    assert streamed(TOKENIZERS["byte"], "a🐈b".encode()) == ["a", "", "", "", "🐈", "b", ""]
    assert streamed(TOKENIZERS["byte"], "a🐈".encode()[:-1]) == ["a", "", "", "", "\ufffd"]


def test_streaming_goes_on_from_a_prompt():
    tokenizer = TOKENIZERS["word"]
    first, second = tokenizer.encode("other thing")
    assert Detokenizer(tokenizer, previous=first).push(second) == " thing"
    assert Detokenizer(tokenizer).push(second) == "thing"


# Bad text


@every_kind
def test_half_a_surrogate_pair_is_a_user_error(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D, at position 4") as caught:
        tokenizer.encode("the \ud83d thing")
    assert caught.value.hint


def test_an_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'ß' \(U\+00DF\) at position 4") as caught:
        TOKENIZERS["char"].encode("the ß and ß")
    assert "data/tokenizer=byte" in caught.value.hint
    with pytest.raises(UserError, match=r"U\+10FFFF"):
        TOKENIZERS["char"].encode("\U0010ffff")
    with pytest.raises(UserError, match=r"'ß' .* at position 1 is unknown, like U\+0007 à ô further on$"):
        TOKENIZERS["char"].encode("ißôaàß\aô")


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
def test_endless_runs_of_spaces_encode(kind):
    """tiktoken's pattern gives up on these by itself."""
    text = "x" + " " * 400_000 + "a\n" + "\n" * 400_000 + "\x1c" + "\u3000" * 400_000
    assert TOKENIZERS[kind].decode(TOKENIZERS[kind].encode(text)) == text


@given(text=st.text("a!1 \n\t\r\x1c\xa0é'", max_size=60))
def test_cutting_long_runs_of_spaces_changes_no_token(text):
    long = text.replace("\t", " " * 10_000).replace("\r", "\n" * 9_999)
    tokenizer = TOKENIZERS["gpt2"]
    parts = [token for part in module._cut_long_spaces(long) for token in tokenizer.encode(part)]
    assert parts == tokenizer.encode(long)


# GPT-2 itself


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return GPT2Tokenizer.from_merges(shared_data / "tiktoken_cache/6d1cbeee0f20b3d9449abfede4726ed8212e3aee")


def test_gpt2_is_tiktokens_own(gpt2, shared_data, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken_cache"))
    reference = tiktoken.get_encoding("gpt2")
    assert gpt2.vocab_size == reference.n_vocab == 50257
    assert gpt2.special_tokens == {"<|endoftext|>": reference.eot_token}
    assert [gpt2.piece(token) for token in range(50257)] == [
        reference.decode_single_token_bytes(token) for token in range(50257)
    ]


def test_gpt2_golden_cases(gpt2, shared_data):
    golden = shared_data / "golden/gpt2_tokenizer/ggml-vocab-gpt-2.gguf"
    texts = golden.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    outputs = golden.with_suffix(".gguf.out").read_text().split("\n")
    ids = [[int(token) for token in line.split()] for line in outputs]
    assert len(texts) == len(ids) == 47
    assert [gpt2.encode(text) for text in texts] == ids
    assert [gpt2.decode(line) for line in ids] == texts


def test_gpt2_counts_shakespeare(gpt2, shared_data):
    text = (shared_data / "tinyshakespeare/input.txt").read_text(encoding="utf-8")
    restored = from_state(gpt2.state())
    assert len(gpt2.encode_array(text)) == 338_025
    assert np.array_equal(restored.encode_array(text), gpt2.encode_array(text))


def test_gpt2_does_not_take_its_special_token_from_text(gpt2):
    ids = gpt2.encode("<|endoftext|>")
    assert 50256 not in ids
    assert gpt2.decode(ids) == gpt2.decode([50256]) == "<|endoftext|>"
