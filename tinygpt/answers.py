"""How the server answers: whole or as server-sent events, and errors in OpenAI's shape.

Nothing that the machine knows of itself (paths, tracebacks) is in an answer.
"""

import asyncio
import json
import math
import sys
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse

from tinygpt.bodies import ErrorResponse
from tinygpt.config import UserError
from tinygpt.engine import Broken, Closed, Full
from tinygpt.served import Closing, Piece, TokenInfo, UnknownModel, Writing

INVALID = "invalid_request_error"
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The body is not JSON"},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong"},
    404: {"model": ErrorResponse, "description": "The model is not served"},
    408: {"model": ErrorResponse, "description": "The request did not arrive in time"},
    413: {"model": ErrorResponse, "description": "The request is too large"},
    415: {"model": ErrorResponse, "description": "The body is not said to be JSON"},
    422: {"model": ErrorResponse, "description": "A field is outside its limits"},
    429: {
        "model": ErrorResponse,
        "description": "The queue is full",
        "headers": {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}},
    },
}
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": EVENT}}, "description": "Whole, or as server-sent events"}
}


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Text:
    """One text, put together from its pieces."""

    def __init__(self) -> None:
        self.text, self.reason = "", ""
        self.tokens: list[TokenInfo] = []
        self.of_prompt: list[TokenInfo] = []

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.reason = piece.finish_reason or self.reason
        (self.of_prompt if piece.of_prompt else self.tokens).extend(piece.tokens)

    def score(self) -> float:
        """Log probability per token; a text without any is the last choice."""
        return sum(token.logprob or 0.0 for token in self.tokens) / len(self.tokens) if self.tokens else -math.inf


async def gather(writing: Writing, count: int) -> list[Text]:
    texts = [Text() for _ in range(count)]
    async for number, piece in writing:
        texts[number].add(piece)
    return texts


async def answer(request: Request, writing: Writing, whole: Any) -> Response:
    """The awaited answer; a client that goes away before frees its places."""
    work, left = asyncio.ensure_future(whole), asyncio.ensure_future(gone(request))
    async with writing:
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            return JSONResponse(work.result().model_dump())
        finally:
            work.cancel()
            left.cancel()


async def gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def events(contents: AsyncIterator[str], writing: Writing) -> StreamingResponse:
    """Server-sent events; what goes wrong on the way is the last of them."""

    async def lines() -> AsyncIterator[str]:
        async with writing:
            try:
                async for content in contents:
                    yield f"data: {content}\n\n"
            except Exception as error:
                status, body = told(error)
                print(f"a stream ended with {status}: {error!r}", file=sys.stderr)
                yield f"data: {json.dumps(body)}\n\n"

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


def told(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and body of an error; of one that is not the client's, no word about the machine."""
    if isinstance(error, Full):
        return 429, error_body("too many texts are waiting: try again later", "rate_limit_error", None, "queue_full")
    if isinstance(error, UnknownModel):
        return 404, error_body(f"{error}; {error.hint}", INVALID, "model", "model_not_found")
    if isinstance(error, Closing | Closed | Broken):
        return 500 if isinstance(error, Broken) else 503, error_body(str(error), "server_error")
    if isinstance(error, UserError):
        return 422, error_body(f"{error}; {error.hint}" if error.hint else str(error), INVALID)
    return 500, error_body("the server failed at this request; its log says more", "server_error")


async def on_error(_: Request, error: Exception) -> Response:
    status, body = told(error)
    if isinstance(error, Broken):  # of what is no UserError uvicorn says it
        print(f"a request ended with {status}: {error}", file=sys.stderr, flush=True)
    headers = {"Retry-After": str(error.retry_after)} if isinstance(error, Full) else {}
    return JSONResponse(body, status, headers)


async def on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = "authentication_error" if error.status_code == 401 else INVALID
    return JSONResponse(error_body(str(error.detail), kind), error.status_code, error.headers)


async def on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return JSONResponse(error_body("the body is not valid JSON", INVALID), 400)
    where = [str(part) for part in first["loc"][1:]]
    field = where[0] if where else None
    return JSONResponse(error_body(f"{'.'.join(where) or 'body'}: {first['msg']}", INVALID, field), 422)


HANDLERS: dict[Any, Any] = {
    UserError: on_error,
    Full: on_error,
    Exception: on_error,
    HTTPException: on_http_error,
    RequestValidationError: on_invalid,
}
