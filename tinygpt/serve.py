"""The HTTP API: OpenAI's completions, /generate, health and metrics, over the models of a Library.

`make_app` builds it, `serve` runs it.
"""

import asyncio
import json
import os
import re
import socket
import sys
import time
import webbrowser
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi_offline import FastAPIOffline
from prometheus_client import CollectorRegistry
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import PlainTextResponse, Response, StreamingResponse

import tinygpt
from tinygpt.answers import ERRORS, EVENTS, HANDLERS, answer, events, gather
from tinygpt.bodies import GeneratedText, GenerateRequest, Health
from tinygpt.checkpoint import pick_device
from tinygpt.config import ServeConfig, UserError
from tinygpt.guard import Key, Limited, Meters, exposition, in_time
from tinygpt.openai_api import openai_routes
from tinygpt.served import Library, Limits, Served, Writing

GRACE = 5  # seconds


def make_app(library: Library, config: ServeConfig, api_key: str | None = None) -> FastAPI:
    """The application that serves `library`; closing it closes the library."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(library.close)

    app = FastAPIOffline(title="tinygpt", version=tinygpt.__version__, lifespan=lifespan, redoc_url=None)
    registry = CollectorRegistry()
    app.add_middleware(Limited, max_bytes=config.max_body_bytes, seconds=config.timeout)
    app.add_middleware(Meters, library=library, registry=registry)
    if config.cors:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors, allow_methods=["*"], allow_headers=["*"])
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)

    @app.get("/health", response_model=Health)
    def health() -> Health:
        """That the server answers, and the models that are loaded."""
        return Health(models=[served.name for served in library.ready])

    guarded = [Depends(Key(api_key))]

    @app.get("/metrics", dependencies=guarded, response_class=PlainTextResponse, responses={401: ERRORS[401]})
    def metrics() -> Response:
        """Counts for Prometheus."""
        return Response(exposition(registry), media_type="text/plain; version=0.0.4")

    app.include_router(openai_routes(library), dependencies=guarded)
    app.include_router(generate_routes(library), dependencies=guarded)
    if config.playground:
        add_playground(app, library, config, api_key)
    return app


def add_playground(app: FastAPI, library: Library, config: ServeConfig, api_key: str | None) -> None:
    try:
        from tinygpt.playground import mount  # gradio takes its time to import
    except ModuleNotFoundError as error:
        hint = "pip install -c constraints.txt -e '.[serve]', or playground=false"
        raise UserError(f"the playground needs the package {error.name}", hint) from error
    mount(app, library, config, api_key)


def generate_routes(library: Library) -> APIRouter:
    router = APIRouter(tags=["generate"])

    async def write(served: Served, asked: GenerateRequest, request: Request) -> Response:
        writing = await served.begin([asked.ask()])

        async def finished() -> GeneratedText:
            (text,) = await gather(writing, 1)
            return GeneratedText(generated_text=asked.prompt + text.text)

        return await answer(request, writing, finished())

    @router.post("/generate", response_model=GeneratedText, responses=ERRORS)
    async def generate(asked: GenerateRequest, request: Request) -> Response:
        """The prompt and what follows it, by the first model."""
        return await write(library.default, asked, request)

    @router.post("/generate/{model}", response_model=GeneratedText, responses=ERRORS)
    async def generate_by(model: str, asked: GenerateRequest, request: Request) -> Response:
        """The same by the model of this name."""
        return await write(await library.fetch(model), asked, request)

    @router.post("/generate_stream", response_class=StreamingResponse, responses=ERRORS | EVENTS)
    async def generate_stream(asked: GenerateRequest) -> Response:
        """As server-sent events: `{"text": ...}` for each piece, at the end `{"generated_text": ...}`."""
        writing = await library.default.begin([asked.ask()])
        return events(pieces(asked.prompt, writing), writing)

    return router


async def pieces(prompt: str, writing: Writing) -> AsyncIterator[str]:
    """What /generate_stream sends."""
    whole = prompt
    async for _, piece in writing:
        whole += piece.text
        if piece.text:
            yield json.dumps({"text": piece.text})
        if piece.finish_reason:
            yield json.dumps({"generated_text": whole, "finish_reason": piece.finish_reason})


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UserError where a checkpoint cannot be opened or the port is taken."""
    with listening(config.host, config.port) as listener:
        library = Library(
            Limits(config.max_prompt_tokens, config.max_new_tokens, config.max_batch, config.max_waiting),
            pick_device(config.device),
            config.dtype,
        )
        for name, source in named_checkpoints(config.ckpt).items():
            library.add(name, source)
        if config.gpt2 is not None and "gpt2" not in library.names:
            library.add("gpt2", config.gpt2, later=True)
        app = make_app(library, config, config.api_key or os.environ.get("TINYGPT_API_KEY"))
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        later = [name for name in library.names if name not in {served.name for served in library.ready}]
        asked = f" ({', '.join(later)}: loaded when asked for)" if later else ""
        print(f"serving {', '.join(library.names)}{asked} at http://{host}:{port}", file=sys.stderr, flush=True)
        if config.browser:
            Thread(target=open_browser, args=(f"http://{host}:{port}",), daemon=True).start()  # it waits for the server
        Server(connections(app, config), library).run(sockets=[listener])


def connections(app: FastAPI, config: ServeConfig) -> uvicorn.Config:
    """How uvicorn speaks with the network."""
    return uvicorn.Config(
        app,
        http=in_time(config.timeout),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=2 * GRACE,
    )


class Server(uvicorn.Server):
    """When it is told to stop, what is being written has GRACE seconds to end; then its clients hear of it."""

    def __init__(self, settings: uvicorn.Config, library: Library) -> None:
        super().__init__(settings)
        self.library = library

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await asyncio.gather(super().shutdown(sockets), self.close_library())

    async def close_library(self) -> None:
        end = time.monotonic() + GRACE
        while time.monotonic() < end and any(served.engine.active or served.engine.waiting for served in self.library.ready):
            await asyncio.sleep(0.05)
        await asyncio.to_thread(self.library.close)


def open_browser(url: str) -> None:
    """Show `url` to the user; without a screen nothing happens, where `webbrowser` would take over the terminal."""
    if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens there: taken before a checkpoint is loaded, so that a port in use is known at once."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:  # the latter for a name that is none
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen at {host}:{port}: {reason}", "choose another host= or port=") from error
    with listener:
        yield listener


def named_checkpoints(ckpt: str) -> dict[str, str]:
    """{name: checkpoint}: `custom` for a single one; `{a:path,b:path}` names several."""
    if not (ckpt.startswith("{") and ckpt.endswith("}")) or Path(ckpt).exists():
        return {"custom": ckpt}
    named: dict[str, str] = {}
    for item in re.split(r",\s*(?=[\w.-]+:)", ckpt[1:-1].strip()):
        name, separator, source = item.partition(":")
        if not separator or not re.fullmatch(r"[\w.-]+", name.strip()) or not source.strip() or name.strip() in named:
            raise UserError(f"ckpt={ckpt} cannot be read at {item!r}", "write ckpt={name:path,other:path}, each name once")
        named[name.strip()] = source.strip()
    return named
