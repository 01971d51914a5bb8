"""The server over a socket, as its clients meet it: OpenAI's own client, plain HTTP, and clients that misbehave."""

import asyncio
import contextlib
import json
import re
import resource
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
import scripts
import uvicorn
import yaml

from tinygpt.checkpoint import load
from tinygpt.config import ServeConfig, UserError
from tinygpt.generate import generate
from tinygpt.serve import connections, listening, make_app, named_checkpoints
from tinygpt.served import Library, Limits

BLOCK = 16


@contextlib.contextmanager
def serving(run, *, gpt2=None, limits=None, api_key=None, playground=False, **config):
    """(address, library) of a server in this process."""
    settings = ServeConfig(ckpt=str(run), playground=playground, **config)
    library = Library(limits or Limits(max_prompt_tokens=500, max_new_tokens=2000, max_waiting=64), "cpu")
    library.add("custom", str(run))
    if gpt2:
        library.add("gpt2", gpt2, later=True)
    with listening("127.0.0.1", 0) as listener:
        server = uvicorn.Server(connections(make_app(library, settings, api_key), settings))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", library
        finally:
            server.should_exit = True
            thread.join(timeout=30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(tiny_run):
    with serving(tiny_run, gpt2="/a/path/of/this/machine") as (address, library):
        yield address, library


@pytest.fixture
def address(server):
    return server[0]


@pytest.fixture
def engine(server):
    return server[1].default.engine


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(address, path, body, **options):
    return httpx.post(f"{address}{path}", json=body, timeout=60, **options)


def complete(address, **fields):
    return post(address, "/v1/completions", {"model": "custom", "prompt": "the cat", **fields})


def eventually(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


# --- OpenAI's client


def test_openai_client_completes(client, tiny_run):
    answer = client.completions.create(model="custom", prompt="the cat", max_tokens=12, seed=3, temperature=0.7)
    model, tokenizer = load(tiny_run)
    same = generate(model, tokenizer, "the cat", max_new_tokens=12, seed=3, temperature=0.7)
    assert "the cat" + answer.choices[0].text == same  # a seed means the same here and in sample.py
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.to_dict() == {"prompt_tokens": 7, "completion_tokens": 12, "total_tokens": 19}
    assert (answer.object, answer.model) == ("text_completion", "custom")


def test_openai_client_streams_what_it_completes(client):
    asked = {"model": "custom", "prompt": ["the cat", "a dog"], "n": 2, "max_tokens": 9, "seed": 5}
    whole = client.completions.create(**asked)
    texts, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        assert chunk.object == "text_completion"
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4  # each choice is another draw
    assert reasons == ["length"] * 4
    assert usage == whole.usage


def test_openai_client_sends_ids_and_lists_of_them(client, server):
    tokenizer = server[1].default.tokenizer
    ids = tokenizer.encode("the cat")
    texts = [
        client.completions.create(model="custom", prompt=prompt, max_tokens=8, seed=1).choices
        for prompt in ("the cat", ids, [ids], ["the cat"])
    ]
    assert {choices[0].text for choices in texts} == {texts[0][0].text}


def test_logprobs_and_echo(client, server):
    model, tokenizer = server[1].default.model, server[1].default.tokenizer
    answer = client.completions.create(
        model="custom", prompt="the cat", max_tokens=5, logprobs=2, echo=True, temperature=1.3
    )
    choice = answer.choices[0]
    lp = choice.logprobs
    assert choice.text.startswith("the cat")
    assert "".join(lp.tokens) == choice.text
    assert [choice.text[start] for start in lp.text_offset] == lp.tokens
    assert lp.token_logprobs[0] is None
    import torch

    ids = tokenizer.encode(choice.text)
    expected = model(torch.tensor([ids])).detach().log_softmax(-1)[0, :-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert lp.token_logprobs[1:] == pytest.approx(expected.tolist(), abs=1e-4)
    assert all(token in top and len(top) in (2, 3) for token, top in list(zip(lp.tokens, lp.top_logprobs, strict=True))[1:])
    streamed = list(
        client.completions.create(model="custom", prompt="the cat", max_tokens=5, logprobs=1, echo=True, stream=True)
    )
    assert streamed[0].choices[0].text == "the cat"
    assert len(streamed[0].choices[0].logprobs.tokens) == 7


def test_a_prompt_is_scored_without_writing(client):
    answer = client.completions.create(model="custom", prompt="the cat", max_tokens=0, logprobs=0, echo=True)
    assert answer.choices[0].text == "the cat"
    assert len(answer.choices[0].logprobs.token_logprobs) == 7


def test_stop_strings_and_best_of(client):
    free = client.completions.create(model="custom", prompt="the", max_tokens=60, seed=2)
    stop = free.choices[0].text[20:23]
    held = client.completions.create(model="custom", prompt="the", max_tokens=60, seed=2, stop=[stop, "never"])
    assert held.choices[0].text == free.choices[0].text[: free.choices[0].text.index(stop)]
    assert held.choices[0].finish_reason == "stop"
    assert held.usage.completion_tokens < 60
    each = client.completions.create(model="custom", prompt="the", max_tokens=8, seed=2, n=4, logprobs=0)
    best = client.completions.create(model="custom", prompt="the", max_tokens=8, seed=2, n=1, best_of=4)
    likeliest = max(each.choices, key=lambda choice: sum(choice.logprobs.token_logprobs))
    assert best.choices[0].text == likeliest.text


def test_the_candidates_of_a_prompt_are_encoded_once(address, server, monkeypatch):
    tokenizer, encoded = server[1].default.tokenizer, []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: (encoded.append(text), encode(text))[1])
    answer = complete(address, prompt=["the cat", "a dog"], n=5, max_tokens=2)
    assert len(answer.json()["choices"]) == 10
    assert encoded == ["the cat", "a dog"]


def test_penalties_and_bias_reach_the_draw(client, server):
    token = server[1].default.tokenizer.encode("s")[0]
    text = (
        client.completions.create(model="custom", prompt="the", max_tokens=5, logit_bias={str(token): 100}).choices[0].text
    )
    assert text == "sssss"
    kept = {"model": "custom", "prompt": "the", "max_tokens": 40, "temperature": 0}
    plain = client.completions.create(**kept).choices[0].text
    varied = client.completions.create(**kept, frequency_penalty=2).choices[0].text
    assert len(set(varied)) > len(set(plain))


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == ["custom", "gpt2"]
    assert client.models.retrieve("custom").owned_by == "tinygpt"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-5")
    assert error.value.code == "model_not_found"


def test_openai_client_understands_the_errors(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-5", prompt="the")
    with pytest.raises(openai.UnprocessableEntityError) as error:
        client.completions.create(model="custom", prompt="the", temperature=3)
    assert error.value.param == "temperature"


def test_answers_fit_openais_description(address, shared_data):
    from jsonschema import Draft202012Validator

    path = shared_data / "openai_api" / "completions_and_models_subset.yaml"
    description = yaml.safe_load(path.read_text(encoding="utf-8"))

    def fits(name, instance):
        schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
        Draft202012Validator(schema).validate(instance)

    whole = complete(address, max_tokens=4, logprobs=2, n=2).json()
    fits("CreateCompletionResponse", whole)
    assert "object" in whole
    fits("ListModelsResponse", httpx.get(f"{address}/v1/models").json())
    fits("Model", httpx.get(f"{address}/v1/models/custom").json())
    fits("ErrorResponse", complete(address, n=0).json())
    request = description["components"]["schemas"]["CreateCompletionRequest"]["properties"]
    ours = httpx.get(f"{address}/openapi.json").json()["components"]["schemas"]["CompletionRequest"]["properties"]
    assert set(request) <= set(ours)
    for name, field in request.items():  # a default is the same as theirs
        if name not in ("prompt", "stop", "stream_options", "suffix", "best_of"):
            assert ours[name].get("default") == field.get("default"), name


# --- /generate, health, metrics, docs


def test_generate_by_name_and_by_default(address, tiny_run):
    body = {"prompt": "the cat", "max_length": 20, "temperature": 0.5, "seed": 9}
    answers = [post(address, path, body).json() for path in ("/generate/custom", "/generate")]
    model, tokenizer = load(tiny_run)
    expected = generate(model, tokenizer, "the cat", max_new_tokens=20, temperature=0.5, seed=9)
    assert answers == [{"generated_text": expected}] * 2


def test_generate_streams(address):
    body = {"prompt": "the cat", "max_length": 20, "seed": 9}
    with httpx.stream("POST", f"{address}/generate_stream", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert events[-1]["generated_text"] == "the cat" + "".join(event["text"] for event in events[:-1])
    assert events[-1] == post(address, "/generate", body).json() | {"finish_reason": "length"}


def test_a_pretrained_model_is_loaded_on_first_use(tiny_run):
    with serving(tiny_run, gpt2=str(tiny_run)) as (address, library):
        assert [served.name for served in library.ready] == ["custom"]
        assert post(address, "/generate/gpt2", {"prompt": "the", "max_length": 3}).status_code == 200
        assert httpx.get(f"{address}/health").json() == {"status": "ok", "models": ["custom", "gpt2"]}


def test_metrics_count(address, engine):
    def value(name):
        found = re.search(rf"^{re.escape(name)} (\S+)$", httpx.get(f"{address}/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = value('tinygpt_completion_tokens_total{model="custom"}')
    ok = 'tinygpt_requests_total{path="/v1/completions",status="200"}'
    requests = value(ok)
    complete(address, max_tokens=7)
    assert value('tinygpt_completion_tokens_total{model="custom"}') == before + 7
    assert value(ok) == requests + 1
    assert value('tinygpt_texts_active{model="custom"}') == 0
    httpx.get(f"{address}/no/such/page")
    assert 'path="/no/such/page"' not in httpx.get(f"{address}/metrics").text


def test_one_request_cannot_ask_for_millions_of_texts(address):
    """Nor does it take the memory to make them, or a million errors."""
    before = peak_memory()
    answer = complete(address, prompt=[""] * 100_000, n=128)
    assert (answer.status_code, "at once" in answer.text) == (422, True)
    assert complete(address, prompt=[{}] * 100_000).status_code == 422
    assert peak_memory() < before + 300e6


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_model_that_loads_slowly_holds_up_no_other(tiny_run, monkeypatch):
    with serving(tiny_run, gpt2=str(tiny_run)) as (address, library):
        go, loads, load, answers = threading.Event(), [], library._load, []

        def slow(name):
            loads.append(name)
            go.wait(60)
            return load(name)

        monkeypatch.setattr(library, "_load", slow)
        asking = [
            threading.Thread(target=lambda: answers.append(complete(address, model="gpt2", max_tokens=1).status_code))
            for _ in range(12)
        ]
        for thread in asking:
            thread.start()
        eventually(lambda: loads)
        assert complete(address, max_tokens=1).status_code == 200
        go.set()
        for thread in asking:
            thread.join()
        assert loads == ["gpt2"]  # once for all
        assert answers == [200] * 12


def test_the_docs_page_loads_nothing_from_elsewhere(address):
    page = httpx.get(f"{address}/docs").text
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert links
    for link in links:
        assert link.startswith("/"), link
        assert httpx.get(address + link).status_code == 200


# --- many at once


def test_clients_share_batches_and_nobody_waits_for_another(address, engine):
    """While a long text is written, short ones begin and end."""
    with httpx.stream("POST", f"{address}/generate_stream", json={"prompt": "the", "max_length": 2000}) as long:
        lines = long.iter_lines()
        next(lines)
        for _ in range(3):
            assert complete(address, max_tokens=3).status_code == 200
        assert engine.active == 1
    eventually(lambda: engine.active == 0)


def test_many_clients_are_served_together(address):
    async def all_at_once():
        async with httpx.AsyncClient(base_url=address, timeout=60, limits=httpx.Limits(max_connections=40)) as client:
            body = {"model": "custom", "prompt": "the cat", "max_tokens": 30}
            return await asyncio.gather(*[client.post("/v1/completions", json=body | {"seed": n}) for n in range(40)])

    answers = asyncio.run(all_at_once())
    assert [answer.status_code for answer in answers] == [200] * 40
    assert len({answer.json()["choices"][0]["text"] for answer in answers}) > 30


def test_five_hundred_clients_are_served_or_told_to_wait(tiny_run):
    async def ask(port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        body = json.dumps({"prompt": "the", "max_length": 20}).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        answer = (await reader.read()).decode()
        writer.close()
        return int(answer.split()[1]), "retry-after:" in answer.lower()

    async def all_at_once(port):
        return await asyncio.gather(*[ask(port) for _ in range(500)])

    with serving(tiny_run, limits=Limits(max_batch=4, max_waiting=8)) as (address, _):
        answers = asyncio.run(all_at_once(int(address.rsplit(":", 1)[1])))
        assert set(answers) == {(200, False), (429, True)}
        assert httpx.get(f"{address}/health").status_code == 200


def test_a_client_that_goes_away_frees_its_place(address, engine):
    with httpx.stream("POST", f"{address}/generate_stream", json={"prompt": "the", "max_length": 2000}) as stream:
        next(stream.iter_lines())
        assert engine.active == 1
    eventually(lambda: engine.active == 0)


def test_a_client_that_goes_away_before_the_answer_frees_its_place(address, engine):
    drawn = engine.tokens_drawn
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/generate", json={"prompt": "the", "max_length": 2000}, timeout=httpx.Timeout(30, read=0.15))
    eventually(lambda: engine.active == 0)
    assert engine.tokens_drawn < drawn + 2000


def test_a_slow_reader_holds_up_nobody(address, engine):
    with raw(address) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        send_json(slow, "/generate_stream", {"prompt": "the", "max_length": 1000})
        assert complete(address, max_tokens=3).status_code == 200
        eventually(lambda: engine.active == 0)  # its text is written all the same
    assert complete(address, max_tokens=3).status_code == 200


# --- bad input


@contextlib.contextmanager
def raw(address):
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        yield connection


def send_json(connection, path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)


BAD_FIELDS = {
    "n=10000": ({"n": 10000}, "n"),
    "n=0": ({"n": 0}, "n"),
    "a temperature that is text": ({"temperature": "hot"}, "temperature"),
    "a negative temperature": ({"temperature": -1}, "temperature"),
    "a boolean for a number": ({"temperature": True}, "temperature"),
    "too many new tokens": ({"max_tokens": 10**9}, None),
    "a misspelt field": ({"max_token": 3}, "max_token"),
    "an id outside the vocabulary": ({"prompt": [10**6]}, None),
    "a negative id": ({"prompt": [-1]}, None),
    "an id that is no integer": ({"prompt": [1.5]}, "prompt"),
    "no prompts": ({"prompt": []}, "prompt"),
    "an empty list of ids": ({"prompt": [[]]}, "prompt"),
    "a prompt that is a number": ({"prompt": 3}, "prompt"),
    "an unknown character": ({"prompt": "the 東京"}, None),
    "half a surrogate pair": ({"prompt": "the \ud800"}, None),
    "a bias outside the vocabulary": ({"logit_bias": {"99999": 1}}, None),
    "a bias of a word": ({"logit_bias": {"the": 1}}, "logit_bias"),
    "a suffix": ({"suffix": "end"}, "suffix"),
    "fewer than n": ({"n": 3, "best_of": 2}, "best_of"),
    "best_of in a stream": ({"stream": True, "best_of": 2}, "best_of"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "an empty stop string": ({"stop": ""}, "stop"),
    "five stop strings": ({"stop": list("abcde")}, "stop"),
    "too many texts at once": ({"prompt": ["the"] * 100, "n": 100}, None),
    "six log probabilities": ({"logprobs": 6}, "logprobs"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused_by_name(address, name):
    fields, param = BAD_FIELDS[name]
    answer = httpx.post(
        f"{address}/v1/completions",
        content=json.dumps({"model": "custom", "prompt": "the", **fields}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b'{"model": "custom", "prompt"', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"model": "custom", "prompt": "the", "temperature": NaN}', "application/json", 422),
        (b'{"model": "custom", "prompt": "the", "temperature": Infinity}', "application/json", 422),
        (b"[]", "application/json", 422),
        (b"", "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": "custom", "prompt": "the"}', "text/plain", 422),
        (b'{"model": "other", "prompt": "the"}', "application/json", 404),
        (b'{"model": "gpt2", "prompt": "the"}', "application/json", 404),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bodies_that_cannot_be_used(address, content, kind, status):
    answer = httpx.post(f"{address}/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert "path/of/this" not in answer.text


def test_prompts_and_bodies_have_limits(address):
    assert complete(address, prompt="the " * 200).status_code == 422
    assert complete(address, prompt="t" * 1_000_000).status_code == 422
    assert complete(address, prompt="t" * 2_000_000).status_code == 413
    chunks = iter([b'{"model": "custom", "prompt": "', *[b"t" * 100_000] * 20, b'"}'])  # its length is not said
    answer = httpx.post(f"{address}/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413


def test_other_paths_and_methods_are_told_in_the_same_shape(address):
    for answer in (
        httpx.get(f"{address}/nope"),
        httpx.get(f"{address}/generate"),
        httpx.delete(f"{address}/v1/models/custom"),
    ):
        assert answer.status_code in (404, 405)
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_half_a_request_is_given_up(tiny_run):
    with serving(tiny_run, timeout=0.3) as (address, _), raw(address) as half:
        half.sendall(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        assert b" 408 " in half.recv(1000).split(b"\r\n")[0]
        with raw(address) as idle:
            idle.sendall(b"POST /nope HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            assert b" 404 " in idle.recv(1000).split(b"\r\n")[0]
            idle.sendall(b"x")  # of a body that nobody reads
            while idle.recv(1000):  # until it is closed
                pass
        for head in (b"", b"POST /generate HTTP/1.1\r\nHost: x\r\n"):
            with raw(address) as silent:
                silent.sendall(head)
                assert silent.recv(1000) == b""  # closed
        assert complete(address, max_tokens=1).status_code == 200


def test_a_full_queue_answers_429_with_retry_after(tiny_run):
    with serving(tiny_run, limits=Limits(max_new_tokens=100_000, max_batch=1, max_waiting=1)) as (address, library):
        with httpx.stream("POST", f"{address}/generate_stream", json={"prompt": "the", "max_length": 100_000}) as first:
            lines = first.iter_lines()  # dropping it would close the connection
            next(lines)
            second = threading.Thread(target=complete, args=[address], kwargs={"max_tokens": 1})
            second.start()
            eventually(lambda: library.default.engine.waiting == 1)
            answer = complete(address, max_tokens=1)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
            with client, pytest.raises(openai.RateLimitError):
                client.completions.create(model="custom", prompt="the")
        second.join()


def test_a_failure_says_nothing_of_the_machine(tiny_run, monkeypatch):
    with serving(tiny_run) as (address, library):
        monkeypatch.setattr(library.default.model, "features", lambda *rest: Path("/a/path/of/this/machine").read_text())
        answer = complete(address)
        assert answer.status_code == 500
        assert "path" not in answer.text
        assert 'status="500"' in httpx.get(f"{address}/metrics").text
        streamed = complete(address, stream=True).text
        assert json.loads(streamed.removeprefix("data: "))["error"]["type"] == "server_error"
        assert "path" not in streamed
        monkeypatch.undo()
        assert complete(address).status_code == 200


def test_the_api_key_is_needed_where_there_is_one(tiny_run):
    with serving(tiny_run, api_key="a secret") as (address, _):
        assert httpx.get(f"{address}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "a secret"}):
            answer = post(address, "/generate", {"prompt": "the"}, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert httpx.get(f"{address}/metrics").status_code == 401
        with openai.OpenAI(base_url=f"{address}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{address}/v1", api_key="a secret") as client:
            assert client.completions.create(model="custom", prompt="the").choices


def test_other_origins_are_let_in_only_where_named(address, tiny_run):
    ask = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    assert not [name for name in httpx.options(f"{address}/generate", headers=ask).headers if "access-control" in name]
    with serving(tiny_run, cors=["https://example.org"]) as (open_address, _):
        allowed = httpx.options(f"{open_address}/generate", headers=ask).headers["access-control-allow-origin"]
    assert allowed == "https://example.org"


@pytest.mark.filterwarnings("ignore")
def test_requests_made_from_its_own_description_find_no_server_error(server):
    """schemathesis: what the description allows and what it does not."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance

    address, _ = server
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path_regex="static-offline")
    checks = (not_a_server_error, response_schema_conformance, status_code_conformance)
    tried = set()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def check(case):
            body = case.body if isinstance(case.body, dict) else {}
            for name in ("max_tokens", "max_length"):
                if isinstance(body.get(name), int) and body[name] > 20:
                    body[name] = 20  # long texts test nothing more
            tried.add(case.call_and_validate(checks=checks).status_code)

        check()
    assert {200, 422} <= tried


# --- the script


@contextlib.contextmanager
def script(*arguments, cwd):
    """serve.py as a process: (process, address)."""
    command = scripts.command("serve", "port=0", "gpt2=null", "playground=false", *arguments)
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, encoding="utf-8")
    try:
        line = process.stderr.readline()
        yield process, line.rsplit(" ", 1)[1].strip()
    finally:
        process.kill()
        process.communicate()


def test_the_script_serves_until_it_is_told_to_stop(tiny_home, tmp_path):
    """Several checkpoints by name; one of them is deleted, and another cut short, while they are served."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.ckpt").write_bytes((tiny_home / "outputs/latest/checkpoints/best.ckpt").read_bytes())
    with script("ckpt={first:a.ckpt,second:b.ckpt}", cwd=tmp_path) as (process, address):
        (tmp_path / "a.ckpt").unlink()
        (tmp_path / "b.ckpt").write_bytes(b"")
        for name in ("first", "second"):
            answer = post(address, f"/generate/{name}", {"prompt": "the"})
            assert answer.json()["generated_text"].startswith("the")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == -signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} == {"a.ckpt", "b.ckpt"} - {"a.ckpt"}  # no folder is left


def test_a_text_that_is_written_when_the_server_stops_ends_with_a_word_of_it(tiny_home):
    """After a few seconds of grace; and nothing is said on the terminal but what was said at the start."""
    with script("max_new_tokens=1000000", cwd=tiny_home) as (process, address):
        body = {"prompt": "the", "max_length": 1_000_000}
        with httpx.stream("POST", f"{address}/generate_stream", json=body, timeout=60) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            process.send_signal(signal.SIGTERM)
            *_, last = lines
        assert "going down" in json.loads(last.removeprefix("data: "))["error"]["message"]
        assert process.wait(timeout=20) == -signal.SIGTERM
        assert "Traceback" not in process.stderr.read()


def test_what_cannot_be_served_is_one_line(tiny_home, tmp_path):
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        done = scripts.run_inside("serve", f"port={port}", cwd=tiny_home)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: cannot listen at 127.0.0.1:{port}: ")
    done = scripts.run_inside("serve", "port=0", "ckpt=nowhere", cwd=tmp_path)
    assert done.code == 2
    assert done.stderr.startswith("error: there is no checkpoint nowhere")


@pytest.mark.parametrize(
    ("ckpt", "named"),
    [
        ("outputs/a", {"custom": "outputs/a"}),
        ("{a:outputs/a}", {"a": "outputs/a"}),
        ("{a:x,y.ckpt, b:hf:gpt2}", {"a": "x,y.ckpt", "b": "hf:gpt2"}),
    ],
)
def test_checkpoints_are_named(ckpt, named):
    assert named_checkpoints(ckpt) == named


@pytest.mark.parametrize("ckpt", ["{}", "{a}", "{a:}", "{a:x,a:y}", "{a b:x}"])
def test_names_that_cannot_be_read_are_refused(ckpt):
    with pytest.raises(UserError, match="ckpt="):
        named_checkpoints(ckpt)
