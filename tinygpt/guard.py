"""What stands between the network and the API: limits on a request's size and time, the API key, and what is counted."""

import asyncio
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import h11
from fastapi import HTTPException, Request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tinygpt.answers import INVALID, error_body
from tinygpt.served import Library

DRAINED = 16  # times max_bytes: up to there a body that is too large is read to its end


class Limited:
    """ASGI middleware: a body that is too large gets 413, one that does not arrive in time 408."""

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float) -> None:
        self.app, self.max_bytes, self.seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            refused = self.too_large()
            if int(declared) <= DRAINED * self.max_bytes:
                await self.drain(self.bounded(receive, DRAINED * self.max_bytes))
            await JSONResponse(error_body(refused.detail, INVALID), 413, headers=refused.headers)(scope, receive, send)
        else:
            await self.app(scope, self.bounded(receive, self.max_bytes), send)

    async def drain(self, receive: Receive) -> None:
        """Read a body that is refused: a client that is still sending when the connection closes may miss the answer."""
        with suppress(HTTPException):
            while (await receive()).get("more_body", False):
                pass

    def bounded(self, receive: Receive, max_bytes: int) -> Receive:
        """`receive`, held to the limits until the body is complete."""
        read, complete, deadline = 0, False, time.monotonic() + self.seconds

        async def limited() -> Message:
            nonlocal read, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                late = f"the request did not arrive within {self.seconds:g} seconds"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            read += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if read > max_bytes:
                raise self.too_large()
            return message

        return limited

    def too_large(self) -> HTTPException:
        return HTTPException(413, f"the request is larger than {self.max_bytes} bytes", {"Connection": "close"})


def in_time(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection that does not send the head of a request within `seconds`: Limited is
    asked only after that."""

    class Timed(H11Protocol):
        head: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.watch(waits=True)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Of a request that is answered the rest is due, too: nobody else waits for it.
            self.watch(waits=self.conn.their_state is h11.IDLE or self.conn.our_state is h11.DONE)

        def connection_lost(self, exc: Exception | None) -> None:
            self.watch(waits=False)
            super().connection_lost(exc)

        def watch(self, waits: bool) -> None:
            if waits and self.head is None:
                self.head = self.loop.call_later(seconds, self.transport.close)
            elif not waits and self.head is not None:
                self.head.cancel()
                self.head = None

    return Timed


class Key:
    """A dependency: the API key as a bearer token, where the server has one."""

    def __init__(self, key: str | None) -> None:
        self.key = key

    def __call__(self, request: Request) -> None:
        if self.key and not self.fits(request.headers.get("authorization", "")):
            raise HTTPException(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})

    def fits(self, authorization: str) -> bool:
        kind, _, given = authorization.partition(" ")
        return kind.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), (self.key or "").encode())


class Meters:
    """What /metrics shows, and the middleware that counts requests. One registry an app."""

    def __init__(self, app: ASGIApp, library: Library, registry: CollectorRegistry) -> None:
        self.app = app
        labels = ["path", "status"]
        self.requests = Counter("tinygpt_requests", "Requests answered", labels, registry=registry)
        self.seconds = Histogram("tinygpt_request_seconds", "Seconds to the end of an answer", ["path"], registry=registry)
        registry.register(EngineMeters(library))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, start = 0, time.monotonic()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = status or 500  # Starlette answers it outside of this middleware
            raise
        finally:
            # The route, not the path asked for: that one could be anything, and each would be a series of its own.
            path = getattr(scope.get("route"), "path", "other")
            self.requests.labels(path, status or 499).inc()
            self.seconds.labels(path).observe(time.monotonic() - start)


class EngineMeters:
    """Read off the engines when they are asked for."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def collect(self) -> Iterable[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        read = CounterMetricFamily("tinygpt_prompt_tokens", "Tokens of prompts read", labels=["model"])
        drawn = CounterMetricFamily("tinygpt_completion_tokens", "Tokens drawn", labels=["model"])
        active = GaugeMetricFamily("tinygpt_texts_active", "Texts being written", labels=["model"])
        waiting = GaugeMetricFamily("tinygpt_texts_waiting", "Texts in the queue", labels=["model"])
        for served in self.library.ready:
            engine, name = served.engine, [served.name]
            read.add_metric(name, engine.tokens_read)
            drawn.add_metric(name, engine.tokens_drawn)
            active.add_metric(name, engine.active)
            waiting.add_metric(name, engine.waiting)
        return [read, drawn, active, waiting]


def exposition(registry: CollectorRegistry) -> bytes:
    """The text format of Prometheus, version 0.0.4."""
    return generate_latest(registry)
