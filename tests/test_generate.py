"""Generation: the samplers of transformers, a cache that changes nothing, seeds, stop strings, streaming."""

import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tinygpt
from tinygpt import generate as module
from tinygpt.config import ModelConfig, SampleConfig, UserError
from tinygpt.decode import Decoder
from tinygpt.generate import (
    Continuation,
    KVCache,
    Sampling,
    choose,
    generate,
    generate_many,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    last_logits,
    options,
    penalise_repetition,
    stream,
    stream_tokens,
    warp,
)
from tinygpt.model import GPT
from tinygpt.tokenizer import ByteTokenizer, CharTokenizer, WordTokenizer

ROOT = Path(__file__).parents[1]
GREEDY = Sampling(temperature=0)
LLAMA_LIKE = {
    "n_kv_head": 2,
    "position": "rope",
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "qk_norm": True,
    "logit_softcap": 5.0,
    "tie_embeddings": False,
}


def make_model(vocab_size=30, block_size=16, **options):
    """A model whose logits are far apart, in float64: so that rounding decides nothing."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=block_size, **options), vocab_size)
    for parameter in model.parameters():
        parameter.data *= 8
    return model.double().eval()


def ids(rows=2, length=5, vocab_size=30):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def tokens(*args, **kwargs):
    return torch.stack(list(stream_tokens(*args, **kwargs)), dim=1)


class Scripted:
    """Stands for the engine: it yields what it is told, so that a test decides the text."""

    def __init__(self, monkeypatch, *rows):
        self.steps = 0
        self.rows = torch.tensor(rows).T
        monkeypatch.setattr(module, "stream_tokens", self)

    def __call__(self, *args, **kwargs):
        for column in self.rows:
            self.steps += 1
            yield column


# The samplers


logits_and_seed = st.tuples(st.sampled_from([1, 2, 7, 50]), st.integers(0, 2**16), st.booleans())


def random_logits(size, seed, ties):
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


@given(logits_and_seed, st.integers(1, 60))
def test_top_k_is_that_of_transformers(given, k):
    from transformers import TopKLogitsWarper

    logits = random_logits(*given)
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@given(logits_and_seed, st.sampled_from([1e-9, 1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]))
def test_top_p_is_that_of_transformers(given, p):
    from transformers import TopPLogitsWarper

    logits = random_logits(*given)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.25, 0.5, 0.75])
def test_top_p_where_probabilities_reach_it_exactly(p):
    from transformers import TopPLogitsWarper

    logits = torch.zeros(1, 4)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@given(logits_and_seed, st.sampled_from([0.0, 0.01, 0.05, 0.3, 1.0]))
def test_min_p_is_that_of_transformers(given, p):
    from transformers import MinPLogitsWarper

    logits = random_logits(*given)
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))


@given(logits_and_seed, st.sampled_from([0.5, 1.1, 2.0]))
def test_repetition_penalty_is_that_of_transformers(given, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(*given)
    idx = ids(3, 6, logits.shape[1])
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, idx, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(idx, logits.clone())
    assert torch.equal(penalise_repetition(logits, seen, penalty), theirs)


@given(logits_and_seed, st.sampled_from([0.3, 1.0, 1.7]))
def test_the_samplers_come_in_the_order_of_transformers(given, temperature):
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper
    from transformers import TopKLogitsWarper as TopK
    from transformers import TopPLogitsWarper as TopP

    logits = random_logits(*given)
    theirs = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopK(20), TopP(0.8), MinPLogitsWarper(0.1)])
    ours = warp(logits, Sampling(temperature=temperature, top_k=20, top_p=0.8, min_p=0.1))
    assert torch.equal(ours, theirs(None, logits))


def test_the_penalty_acts_on_raw_logits_and_on_greedy_choices():
    logits, seen = torch.tensor([[2.0, 1.5, -1.0]]), torch.tensor([[True, False, False]])
    assert choose(logits, seen, GREEDY, torch.Generator()).item() == 0
    assert choose(logits, seen, Sampling(0, repetition_penalty=1.4), torch.Generator()).item() == 1


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, -1)
    seen = torch.zeros(20_000, 4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    counts = choose(logits, seen, Sampling(1.0), generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.015, rtol=0)
    counts = choose(logits, seen, Sampling(1.0, top_k=2), generator).bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), atol=0.015, rtol=0)


@pytest.mark.parametrize("same", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"temperature": 1e-9}])
def test_the_narrowest_sampling_is_greedy(same):
    model = make_model()
    narrow = tokens(model, ids(), 20, Sampling(**{"temperature": 1.0, **same}), seed=3)
    assert torch.equal(narrow, tokens(model, ids(), 20, GREEDY))


def test_the_penalty_remembers_what_the_block_has_dropped():
    model = make_model(vocab_size=12, block_size=4)
    drawn = tokens(model, ids(1, 1, 12), 11, Sampling(0, repetition_penalty=1e6))
    # With a penalty this large a token comes back only when no unseen one is left with a positive logit.
    plain = tokens(model, ids(1, 1, 12), 11, GREEDY)
    assert len(drawn.unique()) > len(plain.unique())
    seen, context = {ids(1, 1, 12).item()}, ids(1, 1, 12)
    for step in range(11):
        window = context if context.shape[1] <= 4 else context[:, -(2 + (context.shape[1] - 5) % 3) :]
        with torch.no_grad():
            logits = model(window)[0, -1]
        for token in seen:
            logits[token] = logits[token] * 1e6 if logits[token] < 0 else logits[token] / 1e6
        assert drawn[0, step] == logits.argmax()
        seen.add(drawn[0, step].item())
        context = torch.cat((context, drawn[:, step : step + 1]), dim=1)


# The engine


@pytest.mark.parametrize("options", [{}, {"bias": True, "mlp": "gelu_tanh"}, LLAMA_LIKE], ids=["plain", "gpt2", "llama"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 40])
def test_the_cache_changes_no_token_also_far_past_the_block(options, block_size, length):
    model = make_model(block_size=block_size, **options)
    cached = tokens(model, ids(2, length), 60, GREEDY)
    assert torch.equal(cached, tokens(model, ids(2, length), 60, GREEDY, use_cache=False))
    assert cached.shape == (2, 60)


def test_within_the_block_every_token_is_the_likeliest_after_all_before_it():
    model = make_model(block_size=32)
    text = torch.cat((ids(), tokens(model, ids(), 27, GREEDY)), dim=1)
    with torch.no_grad():
        assert torch.equal(model(text[:, :-1])[:, 4:].argmax(-1), text[:, 5:])


def test_a_long_prompt_is_read_from_its_end():
    model = make_model()
    long, end = ids(1, 50), ids(1, 50)[:, -16:]
    assert torch.equal(tokens(model, long, 20, GREEDY), tokens(model, end, 20, GREEDY))


def test_past_the_block_the_newest_half_is_read_again():
    model = make_model(block_size=8)
    text = torch.cat((ids(1, 8), tokens(model, ids(1, 8), 2, GREEDY)), dim=1)
    with torch.no_grad():
        assert text[0, 8] == model(text[:, :8])[0, -1].argmax()
        assert text[0, 9] == model(text[:, 5:9])[0, -1].argmax()


def test_with_the_cache_a_token_costs_one_token(monkeypatch):
    model, read = make_model(block_size=8), []
    features, step = model.features, Decoder.__call__
    monkeypatch.setattr(model, "features", lambda idx, cache: read.append(idx.shape[1]) or features(idx, cache))
    monkeypatch.setattr(Decoder, "__call__", lambda self, token: read.append(token[0].numel()) or step(self, token))
    tokens(model, ids(1, 3), 12, GREEDY)
    assert read == [3, 1, 1, 1, 1, 1, 4, 1, 1, 1, 1, 4]


def test_only_the_last_position_reaches_the_head(monkeypatch):
    model, shapes = make_model(), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda x: shapes.append(tuple(x.shape)) or head(x))
    tokens(model, ids(2, 10), 2, GREEDY)
    assert shapes == [(2, 32), (2, 32)]


@pytest.mark.parametrize("options", [{}, LLAMA_LIKE], ids=["gpt2", "llama"])
@pytest.mark.parametrize("cuts", [[16], [1] * 16, [5, 1, 7, 3], [15, 1]])
def test_a_cache_filled_in_parts_gives_the_logits_of_the_whole(options, cuts):
    model, idx = make_model(**options), ids(2, 16)
    cache = KVCache(2, 16)
    with torch.no_grad():
        parts = [model(part, cache) for part in idx.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(idx), atol=1e-9, rtol=1e-9)
    assert cache.length == 16
    with torch.no_grad(), pytest.raises(ValueError, match="17 tokens do not fit"):
        model(idx[:, :1], cache)


def test_a_cache_refuses_more_than_its_capacity():
    cache, k = KVCache(1, 4), torch.zeros(1, 1, 5, 2)
    with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
        cache.extend(0, k, k)


def test_the_same_seed_draws_the_same_and_leaves_the_global_state_alone():
    model, wild = make_model(), Sampling(3.0)
    before = torch.get_rng_state()
    first, again, other = (tokens(model, ids(), 30, wild, seed) for seed in (5, 5, 6))
    fresh, fresher = (tokens(model, ids(), 30, wild) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(fresh, fresher)
    assert torch.equal(before, torch.get_rng_state())


def test_rows_of_a_batch_draw_on_their_own():
    rows = tokens(make_model(), ids(1).expand(4, -1), 30, Sampling(3.0), seed=1)
    assert len({tuple(row) for row in rows.tolist()}) == 4


def test_each_module_gets_its_mode_back_and_dropout_is_off():
    model = make_model(dropout=0.5).train()
    model.h[0].eval()
    assert torch.equal(tokens(model, ids(), 20, GREEDY), tokens(model, ids(), 20, GREEDY))
    assert (model.training, model.h[0].training, model.h[1].mlp.training) == (True, False, True)
    steps = stream_tokens(model, ids(), 20, GREEDY)
    assert model.training
    next(steps)
    assert not model.training
    del steps  # abandoned half-way
    assert model.training


def test_inference_mode_is_on_for_the_model_and_does_not_leak_between_tokens(monkeypatch):
    model, modes = make_model(), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda x: modes.append(torch.is_inference_mode_enabled()) or head(x))
    steps = stream_tokens(model, ids(), 3, GREEDY)
    next(steps)
    next(steps)
    assert modes == [True, True]
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_float_type(dtype):
    model = make_model().to(dtype)
    assert tokens(model, ids(), 20, Sampling(1.0, top_p=0.9)).shape == (2, 20)
    assert last_logits(model, ids(), None).dtype == torch.float32  # sums of many probabilities need it


def test_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert tokens(make_model().float(), ids(), 20, Sampling(1.0)).shape == (2, 20)


@pytest.mark.parametrize("idx", [torch.zeros(1, 0, dtype=torch.long), torch.tensor([1, 2])])
def test_ids_of_the_wrong_shape_are_refused(idx):
    with pytest.raises(ValueError, match="needs the shape"):
        stream_tokens(make_model(), idx, 1, GREEDY)


@pytest.mark.parametrize("length", [1, 5])
def test_a_diverged_model_is_said_to_be(length):
    model = make_model()
    model.wte.weight.data[:] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        tokens(model, ids(1, length), 3, Sampling(1.0))


# Text


CHARACTERS = CharTokenizer("\nabcdefghij ")
MODEL = make_model(CHARACTERS.vocab_size)


def test_the_text_begins_with_the_prompt_and_has_the_tokens_asked_for():
    text = generate(MODEL, CHARACTERS, "abc", max_new_tokens=50, seed=1)
    assert text.startswith("abc")
    assert len(text) == 53
    assert text == generate(MODEL, CHARACTERS, "abc", max_new_tokens=50, seed=1)
    assert text != generate(MODEL, CHARACTERS, "abc", max_new_tokens=50, seed=2)


def test_many_samples_differ_and_one_is_that_of_generate():
    many = generate_many(MODEL, CHARACTERS, "abc", 4, max_new_tokens=40, seed=1, temperature=3.0)
    assert len(set(many)) == 4
    assert all(text.startswith("abc") and len(text) == 43 for text in many)
    one = generate_many(MODEL, CHARACTERS, "abc", 1, max_new_tokens=40, seed=1)
    assert one == [generate(MODEL, CHARACTERS, "abc", max_new_tokens=40, seed=1)]


@pytest.mark.parametrize("stop", [(), ["a"], ["ab", "c d"], "hi"])
@pytest.mark.parametrize("seed", range(4))
def test_the_stream_joined_is_what_generate_adds(stop, seed):
    settings = {"max_new_tokens": 60, "seed": seed, "temperature": 3.0, "stop": stop}
    pieces = list(stream(MODEL, CHARACTERS, "abc", **settings))
    text = generate(MODEL, CHARACTERS, "abc", **settings)
    assert "abc" + "".join(pieces) == text
    assert "" not in pieces
    whole = generate(MODEL, CHARACTERS, "abc", **{**settings, "stop": ()})[3:]
    stops = [stop] if isinstance(stop, str) else stop
    assert text[3:] == whole[: min([whole.find(s) for s in stops if s in whole], default=None)]


def test_the_stream_comes_piece_by_piece(monkeypatch):
    engine = Scripted(monkeypatch, CHARACTERS.encode("abcdefghij"))
    assert "".join(islice(stream(MODEL, CHARACTERS, "a"), 3)) == "abc"
    assert engine.steps == 3


def test_the_stream_of_bytes_holds_back_half_characters():
    model = make_model(256)
    pieces = list(stream(model, ByteTokenizer(), "é", max_new_tokens=80, temperature=3.0, seed=0))
    text = generate(model, ByteTokenizer(), "é", max_new_tokens=80, temperature=3.0, seed=0)
    assert "é" + "".join(pieces) == text


def test_a_character_of_many_tokens_arrives_whole(monkeypatch):
    Scripted(monkeypatch, [*"a🐈!".encode(), 0xF0])
    assert list(stream(make_model(256), ByteTokenizer(), "x")) == ["a", "🐈", "!", "\ufffd"]


@pytest.mark.parametrize(
    ("stop", "pieces"),
    [
        (["cd"], ["a", "b"]),
        (["cdx"], ["a", "b", "cde", "f"]),  # held back until it could not be one
        (["ef"], ["a", "b", "c", "d"]),
        (["fg"], ["a", "b", "c", "d", "e", "f"]),  # held back to the end, then given
        (["bcde", "c"], ["a", "b"]),  # the one that is complete first
        (["d", "bcd", "cd"], ["a"]),  # of several, the longest
        (["a"], []),
    ],
)
def test_stop_strings(monkeypatch, stop, pieces):
    engine = Scripted(monkeypatch, CHARACTERS.encode("abcdef"))
    assert list(stream(MODEL, CHARACTERS, "cd", stop=stop)) == pieces
    ends = ["abcdef".find(word) + len(word) for word in stop if word in "abcdef"]
    assert engine.steps == min(ends, default=6)  # no token is drawn that no one will see


def test_nothing_follows_a_stop_string_not_even_half_a_character():
    tokenizer = Pieces(["a", "b\udcf0"])
    sample = Continuation(tokenizer, None, ["b"])
    assert [sample.push(0), sample.push(1), sample.push(0), sample.finish()] == ["a", "", "", ""]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_a_text_ends_where_the_first_stop_string_is_complete(text, stop):
    """However the text is cut into tokens, and without ever giving out a piece of the stop string."""
    end = next((n for n in range(len(text) + 1) if text[:n].endswith(tuple(stop))), None) if stop else None
    found = [s for s in stop if end is not None and text[:end].endswith(s)]
    expected = text if end is None else text[: end - max(map(len, found))]
    for words in ([*text], [text[i : i + 3] for i in range(0, len(text), 3)]):
        tokenizer = Pieces(sorted(set(words)))
        sample = Continuation(tokenizer, None, stop)
        pieces = [sample.push(tokenizer.words.index(word)) for word in words] + [sample.finish()]
        assert "".join(pieces) == expected
        assert sample.done == (end is not None)


class Pieces(WordTokenizer):
    """Tokens are just strings."""

    def __init__(self, words):
        super().__init__([])
        self.words = words

    def piece(self, token, previous=None):
        return self.words[token].encode("utf-8", "surrogateescape")


def test_finished_samples_hold_nothing_up(monkeypatch):
    a, b = CHARACTERS.encode("abcde fghij"), CHARACTERS.encode("a bcdefghij")
    engine = Scripted(monkeypatch, a, b)
    assert generate_many(MODEL, CHARACTERS, "j", 2, stop=" ") == ["jabcde", "ja"]
    assert engine.steps == 6


class EndOfText(CharTokenizer):
    eot_id = 3


def test_the_end_of_text_token_ends_a_sample(monkeypatch):
    engine = Scripted(monkeypatch, [4, 4, 3, 4, 4])
    tokenizer = EndOfText("\nabcdefghij ")
    assert generate(MODEL, tokenizer, "a") == "a" + 2 * tokenizer.decode([4])
    assert engine.steps == 3


@pytest.mark.parametrize(
    ("tokenizer", "token"),
    [
        (EndOfText("\nabc"), 3),
        (CharTokenizer("\nab"), 0),
        (CharTokenizer("\t\nab"), 1),
        (CharTokenizer("ab"), 0),
    ],
)
def test_an_empty_prompt_starts_somewhere_that_is_not_shown(tokenizer, token):
    model = make_model(tokenizer.vocab_size)
    text = generate(model, tokenizer, "", max_new_tokens=5, temperature=0)
    ends = [*tokens(model, torch.tensor([[token]]), 5, GREEDY)[0].tolist(), getattr(tokenizer, "eot_id", -1)]
    ends = ends[: ends.index(ends[-1])] if isinstance(tokenizer, EndOfText) else ends[:-1]
    assert text == tokenizer.decode(ends)


@pytest.mark.parametrize(("prompt", "text"), [("to", "to be"), ("to ", "to be"), ("", "be"), ("to\n", "to\nbe")])
def test_words_join_the_prompt_with_one_space(monkeypatch, prompt, text):
    tokenizer = WordTokenizer(["to", "be", "\n"])
    Scripted(monkeypatch, tokenizer.encode("be"))
    assert generate(make_model(4), tokenizer, prompt) == text


@pytest.mark.parametrize("write", [generate, stream])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"min_p": -1.0}, "min_p=-1.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"seed": -1}, "seed=-1"),
        ({"stop": [""]}, "stop string is empty"),
    ],
)
def test_settings_outside_their_limits_are_refused_at_the_call(write, settings, words):
    with pytest.raises(UserError, match=words) as error:
        write(MODEL, CHARACTERS, "a", **settings)
    assert error.value.hint


def test_other_mistakes_are_refused_too():
    with pytest.raises(UserError, match="num_samples=0"):
        generate_many(MODEL, CHARACTERS, "a", 0)
    with pytest.raises(UserError, match="'z'"):
        generate(MODEL, CHARACTERS, "az")
    with pytest.raises(UserError, match="no tokenizer"):
        generate(MODEL, None, "a")
    with pytest.raises(UserError, match="the tokenizer has 2 tokens and the model 12"):
        generate(MODEL, CharTokenizer("ab"), "a")
    with pytest.raises(TypeError, match="temprature"):
        generate(MODEL, CHARACTERS, "a", temprature=1.0)


def test_a_config_becomes_the_keyword_arguments():
    config = SampleConfig(max_new_tokens=7, temperature=2.0, top_k=3, stop=["x"], seed=4)
    expected = {"max_new_tokens": 7, "temperature": 2.0, "top_k": 3, "stop": ["x"], "seed": 4}
    assert options(config) == {**expected, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
    assert len(generate(MODEL, CHARACTERS, "a", **options(config))) == 8


def test_a_prompt_longer_than_the_block_is_kept_in_the_text():
    assert generate(MODEL, CHARACTERS, "abc" * 20, max_new_tokens=3, seed=1).startswith("abc" * 20)


# Each in a child of a process that has imported torch, which takes longest, and nothing of ours.
NAMES = """
import os, sys
import torch
for first in ("", "import tinygpt.generate", "from tinygpt.generate import stream"):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, first
        continue
    import tinygpt
    exec(first)
    from tinygpt.tokenizer import CharTokenizer
    tokenizer = CharTokenizer("abx")
    model = tinygpt.GPT(tinygpt.ModelConfig(n_layer=1), tokenizer.vocab_size)
    for _ in range(2):
        assert tinygpt.generate.Sampling
        assert len(tinygpt.generate(model, tokenizer, "x", max_new_tokens=5)) == 6
    from tinygpt import generate
    assert generate is tinygpt.generate
    assert not {"lightning", "hydra", "omegaconf"} & set(sys.modules)
    os._exit(0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_the_name_is_a_function_and_a_file():
    done = subprocess.run([sys.executable, "-c", NAMES], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_name_in_this_process():
    assert tinygpt.generate(MODEL, CHARACTERS, "a", max_new_tokens=5, seed=1) == generate(
        MODEL, CHARACTERS, "a", max_new_tokens=5, seed=1
    )
