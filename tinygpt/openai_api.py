"""OpenAI's endpoints: /v1/completions and /v1/models, by its API description (version 2.3.0)."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

import tinygpt
from tinygpt.answers import ERRORS, EVENTS, INVALID, Text, answer, error_body, events, gather
from tinygpt.bodies import Choice, Completion, CompletionRequest, Logprobs, Model, Models, Usage
from tinygpt.served import Library, Served, TokenInfo, UnknownModel, Writing

FINGERPRINT = f"tinygpt-{tinygpt.__version__}"


def openai_routes(library: Library) -> APIRouter:
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models", response_model=Models, responses={401: ERRORS[401]})
    def models() -> Models:
        """The models that may be asked for."""
        return Models(data=[model_card(library, name) for name in library.names])

    @router.get("/models/{model}", response_model=Model, responses={code: ERRORS[code] for code in (401, 404)})
    def model(model: str) -> Model:
        """One of them."""
        if model not in library.names:
            raise UnknownModel(f"the model {model!r} is not served here", f"it serves {', '.join(library.names)}")
        return model_card(library, model)

    @router.post("/completions", response_model=Completion, responses=ERRORS | EVENTS)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continue one prompt or several. `stream` sends server-sent events."""
        if problem := asked.problem():
            return JSONResponse(error_body(problem[1], INVALID, problem[0]), 422)
        served = await library.fetch(asked.model)
        served.refuse_too_many(len(asked.prompts) * asked.candidates)
        writing = await served.begin(await asyncio.to_thread(asked.asks))
        head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": FINGERPRINT,
        }
        if asked.stream:
            return events(completion_chunks(served, asked, writing, head), writing)
        return await answer(request, writing, completion(served, asked, writing, head))

    return router


def model_card(library: Library, name: str) -> Model:
    loaded = {served.name: served.created for served in library.ready}
    return Model(id=name, created=loaded.get(name, 0))


async def completion(served: Served, asked: CompletionRequest, writing: Writing, head: dict[str, Any]) -> Any:
    """The whole answer to a completion request."""
    texts = await gather(writing, len(asked.prompts) * asked.candidates)
    choices: list[Choice] = []
    for first, prompt in zip(range(0, len(texts), asked.candidates), asked.prompts, strict=True):
        candidates = texts[first : first + asked.candidates]
        if asked.candidates > asked.n:
            candidates = sorted(candidates, key=Text.score, reverse=True)
        for text in candidates[: asked.n]:
            echoed = prompt_text(served, prompt) if asked.echo else ""
            scores = Logprobs.of(text.of_prompt) + Logprobs.of(text.tokens, len(echoed))
            logprobs = scores if asked.logprobs is not None else None
            choices.append(Choice(text=echoed + text.text, index=len(choices), logprobs=logprobs, finish_reason=text.reason))
    return Completion(**head, choices=choices, usage=usage(writing, asked.candidates))


def usage(writing: Writing, candidates: int) -> Usage:
    read, written = sum(writing.prompt_tokens[::candidates]), writing.completion_tokens
    return Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def prompt_text(served: Served, prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt)


async def completion_chunks(
    served: Served, asked: CompletionRequest, writing: Writing, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer as it comes: a chunk for each piece of text, the last of each choice with its finish_reason."""
    with_usage = bool(asked.stream_options and asked.stream_options.include_usage)
    null_usage = {"usage": None} if with_usage else {}

    def chunk(index: int, text: str, tokens: Sequence[TokenInfo] = (), reason: str | None = None) -> str:
        logprobs = None
        if asked.logprobs is not None and tokens:
            logprobs = Logprobs.of(list(tokens), offsets[index]).model_dump()
        offsets[index] += sum(token.width for token in tokens)
        choice = {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
        return json.dumps({**head, "choices": [choice], **null_usage})

    offsets = [0] * len(asked.prompts) * asked.n
    prompts = [prompt for prompt in asked.prompts for _ in range(asked.n)]
    echoed = set()
    async for index, piece in writing:
        if asked.echo and index not in echoed and (piece.of_prompt or not asked.logprobs):
            echoed.add(index)
            shown = prompt_text(served, prompts[index])
            yield chunk(index, shown, piece.tokens if piece.of_prompt else ())
            offsets[index] = len(shown)
        if not piece.of_prompt and (piece.text or piece.tokens or piece.finish_reason):
            yield chunk(index, piece.text, piece.tokens, piece.finish_reason)
    if with_usage:
        yield json.dumps({**head, "choices": [], "usage": usage(writing, asked.n).model_dump()})
    yield "[DONE]"
