"""The engine: many texts at once are the same texts, and whoever leaves frees a place."""

import queue
import threading
from contextlib import contextmanager

import pytest
import torch

from tinygpt.config import ModelConfig, UserError
from tinygpt.engine import Drawn, Ended, Engine, Full, Read, Request
from tinygpt.generate import Sampling, stream_tokens
from tinygpt.model import GPT

V = 50


def make_model(**shape):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "init": "normal", **shape}), V)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform, so that a mistake shows
    return model


@contextmanager
def running(model=None, **settings):
    engine = Engine(model or make_model(), **settings)
    try:
        yield engine
    finally:
        engine.close()


def collect(events):
    """(tokens, what the prompt was read as, how it ended)."""
    tokens, read = [], None
    while not isinstance(event := events.get(timeout=30), Ended):
        if isinstance(event, Read):
            read = event
        else:
            tokens.append(event)
    return tokens, read, event


def write(engine, *requests):
    queues = [queue.SimpleQueue() for _ in requests]
    engine.submit(requests, [each.put for each in queues])
    return [collect(each) for each in queues]


def ids(tokens):
    return [drawn.token for drawn in tokens]


@pytest.mark.parametrize(
    "shape", [{"position": "learned"}, {"position": "rope", "n_kv_head": 2}, {"block_size": 1}, {"block_size": 7}], ids=str
)
def test_texts_of_many_lengths_are_what_each_alone_would_be(shape):
    """Prompts shorter and longer than the block, texts that outgrow it, more of them than places."""
    model = make_model(**shape)
    requests = [
        Request(torch.randint(0, V, (1 + 4 * i,)).tolist(), 3 + 5 * i, Sampling(1.0, top_k=None if i % 2 else 20), seed=i)
        for i in range(9)
    ]
    with running(model, max_batch=4) as engine:
        written = write(engine, *requests)
    for request, (tokens, _, end) in zip(requests, written, strict=True):
        alone = stream_tokens(model, torch.tensor([request.ids]), request.max_new_tokens, request.sampling, request.seed)
        assert ids(tokens) == [int(token) for token in alone]
        assert end == Ended("length")


def test_a_long_prompt_does_not_hold_up_the_others():
    """It is read in chunks, and between two chunks the others take a step."""
    model = make_model(block_size=2048)
    order = []
    with running(model) as engine:
        short, long = queue.SimpleQueue(), queue.SimpleQueue()
        engine.submit([Request([1], 200)], [lambda event: (order.append("short"), short.put(event))])
        assert isinstance(short.get(timeout=30), Drawn)
        engine.submit([Request([1] * 2000, 1)], [lambda event: (order.append("long"), long.put(event))])
        begun = len(order)
        collect(long)
        between = order[begun : order.index("long")]
        collect(short)
    assert len(between) >= 4  # 2000 tokens are eight chunks


def test_the_end_token_ends_a_text_and_is_not_given_out():
    request = Request([3], 50, Sampling(0.0))
    with running() as engine:
        ((tokens, _, _),) = write(engine, request)
        second = ids(tokens)[1]
        first = ids(tokens).index(second)
        ((tokens, _, end),) = write(engine, Request([3], 50, Sampling(0.0), end=second))
    assert len(tokens) == first
    assert end.reason == "stop"


def test_a_cancelled_text_ends_and_frees_its_place():
    with running(max_batch=1) as engine:
        events, after = queue.SimpleQueue(), queue.SimpleQueue()
        (job,) = engine.submit([Request([1], 10**6)], [events.put])
        events.get(timeout=30)
        engine.submit([Request([2], 3)], [after.put])
        job.cancel()
        assert collect(events)[2].reason == "cancelled"
        assert len(collect(after)[0]) == 3


def test_those_who_stay_are_not_disturbed_by_those_who_leave():
    model = make_model()
    with running(model, max_batch=4) as engine:
        events = [queue.SimpleQueue() for _ in range(4)]
        requests = [Request([number + 1] * 5, 300 if number < 2 else 30, seed=number) for number in range(4)]
        jobs = engine.submit(requests, [each.put for each in events])
        for each in events[:2]:
            each.get(timeout=30)
        jobs[0].cancel()
        jobs[1].cancel()
        staying = [collect(each)[0] for each in events[2:]]
    for request, tokens in zip(requests[2:], staying, strict=True):
        alone = stream_tokens(model, torch.tensor([request.ids]), 30, request.sampling, request.seed)
        assert ids(tokens) == [int(token) for token in alone]


def test_what_fails_to_deliver_is_cancelled():
    def gone(event):
        raise RuntimeError("nobody listens")

    with running(max_batch=1) as engine:
        engine.submit([Request([1], 10**6)], [gone])
        assert len(write(engine, Request([2], 3))[0][0]) == 3


def test_the_queue_is_bounded_and_takes_all_or_none():
    with running(max_batch=1, max_waiting=2) as engine:
        first = queue.SimpleQueue()
        (job,) = engine.submit([Request([1], 10**6)], [first.put])
        first.get(timeout=30)
        with pytest.raises(Full) as full:
            engine.submit([Request([1], 1)] * 3, [first.put] * 3)
        assert full.value.retry_after >= 1
        assert engine.waiting == 0
        engine.submit([Request([1], 1)] * 2, [first.put] * 2)
        job.cancel()


def test_log_probabilities_are_the_models_own():
    model = make_model()
    prompt = [5, 9, 2, 7]
    with running(model) as engine:
        ((tokens, read, _),) = write(engine, Request(prompt, 3, Sampling(1.5, top_k=3), top_logprobs=2, score_prompt=True))
    full = model(torch.tensor([[*prompt, *ids(tokens)]])).detach().log_softmax(-1)[0]
    assert [drawn.token for drawn in read.tokens] == prompt
    assert read.tokens[0].logprob is None
    for place, drawn in enumerate([*read.tokens[1:], *tokens], start=1):
        assert drawn.logprob == pytest.approx(float(full[place - 1, drawn.token]), abs=1e-4)
        assert [token for token, _ in drawn.top] == full[place - 1].topk(2).indices.tolist()


def test_a_prompt_is_scored_without_writing_also_past_the_block():
    model = make_model(block_size=4)
    with running(model) as engine:
        ((tokens, read, end),) = write(engine, Request([1, 2, 3, 4, 5, 6], 0, score_prompt=True))
    assert tokens == []
    assert end.reason == "length"
    assert [drawn.token for drawn in read.tokens] == [1, 2, 3, 4, 5, 6]
    assert [drawn.logprob is None for drawn in read.tokens] == [True, True, True, False, False, False]


def test_bias_bans_and_forces_and_penalties_end_a_loop():
    with running() as engine:
        ((forced, _, _),) = write(engine, Request([1], 5, Sampling(1.0), logit_bias={7: 1e4}))
        assert ids(forced) == [7] * 5
        ((banned, _, _),) = write(engine, Request([1], 5, Sampling(0.0), logit_bias={7: 1e4, 8: 1e4}, presence_penalty=2e4))
        assert sorted(ids(banned)[:2]) == [7, 8]
        ((counted, _, _),) = write(
            engine, Request([1], 4, Sampling(0.0), logit_bias={7: 1e4, 8: 1e4}, frequency_penalty=5e3)
        )
    assert sorted(ids(counted)) == [7, 7, 8, 8]


def test_repetition_penalty_sees_the_prompt():
    model = make_model()
    settings = Sampling(0.0, repetition_penalty=1.8)
    with running(model) as engine:
        ((tokens, _, _),) = write(engine, Request([4, 8], 12, settings))
    assert ids(tokens) == [int(token) for token in stream_tokens(model, torch.tensor([[4, 8]]), 12, settings)]


def test_a_failing_step_is_told_to_those_in_it_and_the_next_are_served():
    model = make_model()
    with running(model) as engine:
        features, model.features = model.features, lambda *rest: 1 / 0
        ((_, _, end),) = write(engine, Request([1], 3))
        assert isinstance(end.error, ZeroDivisionError)
        model.features = features
        assert len(write(engine, Request([1], 3))[0][0]) == 3


def test_logits_that_are_no_numbers_end_their_own_text_alone():
    model = make_model()
    with torch.no_grad():
        model.wte.weight[9] = torch.nan  # tied: a text with this token makes its own logits nan
        model.lm_head.weight = torch.nn.Parameter(model.wte.weight.nan_to_num())
    with running(model) as engine:
        good = Request([1, 2], 9, Sampling(0.0), logit_bias={9: -1e9})
        (_, _, bad), (together, _, fine) = write(engine, Request([9], 3), good)
        ((alone, _, _),) = write(engine, good)
    assert "not finite" in str(bad.error)
    assert (ids(together), fine.reason) == (ids(alone), "length")  # also what it had read when the other's place was filled


def test_a_text_that_is_given_up_while_it_waits_frees_its_place():
    with running(max_batch=1, max_waiting=1) as engine:
        (first,) = engine.submit([Request([1], 10**6)], [lambda _: None])
        ended = queue.SimpleQueue()
        (second,) = engine.submit([Request([1], 1)], [ended.put])
        second.cancel()
        assert ended.get(timeout=30) == Ended("cancelled")
        engine.submit([Request([1], 1)], [lambda _: None])
        first.cancel()


@pytest.mark.parametrize(
    "request_",
    [{"ids": [V]}, {"ids": [-1]}, {"ids": [1], "logit_bias": {V: 1.0}}, {"ids": []}, {"max_new_tokens": -1}],
    ids=str,
)
def test_bad_requests_are_refused_before_they_wait(request_):
    with running() as engine, pytest.raises(UserError):
        engine.submit([Request(**{"ids": [1], "max_new_tokens": 1, **request_})], [print])


def test_closing_ends_what_is_written_and_what_waits():
    engine = Engine(make_model(), max_batch=1)
    events = [queue.SimpleQueue(), queue.SimpleQueue()]
    engine.submit([Request([1], 10**6)] * 2, [each.put for each in events])
    engine.close()
    assert [collect(each)[2].reason for each in events] == ["cancelled", "cancelled"]
    assert not any(thread.name == "tinygpt-engine" and thread.is_alive() for thread in threading.enumerate())


def test_an_idle_engine_holds_no_cache():
    with running() as engine:
        write(engine, Request([1], 3))
        for _ in range(1000):
            if not engine._cache.keys:
                break
            threading.Event().wait(0.01)
        assert engine._cache.keys == []
