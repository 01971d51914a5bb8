"""The playground: a page at / (Gradio) on which the models of a Library write, their tokens coloured by probability.

No request of the page leaves the machine. What a model writes may hold anything: it is sent as data, and playground.js
draws it as text, never as markup.
"""

import asyncio
import json
import math
import os
import re
import secrets
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported: it is never to call home,
os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = "1000000000"  # nor to sum up after each event what nobody looks at

import gradio as gr
from fastapi import FastAPI
from gradio.route_utils import CustomCORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from tinygpt.answers import told
from tinygpt.config import ServeConfig, UserError
from tinygpt.generate import Sampling
from tinygpt.served import TOP_LOGPROBS, Ask, Library, Piece, Served
from tinygpt.tokenizer import Tokenizer

HERE = Path(__file__).parent
LONGEST, MOST_TEXTS = 2000, 8  # what the sliders end at, where the server's own limits are higher
SHOWN_OF_PROMPT = 400  # characters of the prompt before each text
HEADER = '<h1>tinygpt</h1><p>Give the model a beginning, and it writes on. <a href="docs">HTTP API</a></p>'
PAUSE = 0.1  # seconds between two updates of the page
BANDS = (0.8, 0.5, 0.2, 0.05)  # a token is in band 0 with a probability of 0.8 or more, ..., in band 4 below 0.05
# What the page needs, and so what is passed to Gradio: no uploads, no files, no second API beside the documented one.
PATHS = re.compile(
    r"/|/(assets|static|svelte)/.+|/(config|theme\.css|favicon\.ico|manifest\.json|login|logout)"
    r"|/gradio_api/(queue/(join|data)|run/predict|heartbeat/\w+|app_id|startup-events|login_check|info)/?"
)


def mount(app: FastAPI, library: Library, config: ServeConfig, api_key: str | None) -> None:
    """Serve the page wherever no route of `app` answers. With an api_key it asks for a login: any name, and the key."""
    fits = (lambda _, given: secrets.compare_digest(given.encode(), api_key.encode())) if api_key else None
    gr.mount_gradio_app(
        app,
        make_page(library, config),
        path="/",
        auth=fits,
        auth_message="The password is the server's API key; the name may be any.",
        css_paths=HERE / "playground.css",
        theme=gr.themes.Default(
            primary_hue="blue",
            font=["system-ui", "sans-serif"],  # those of the reader's machine: none is loaded
            font_mono=["ui-monospace", "monospace"],
        ).set(  # darker than by default: read on white, and white on them
            body_text_color_subdued="*neutral_500",
            block_info_text_color="*neutral_500",
            button_primary_background_fill="*primary_600",
            button_primary_background_fill_hover="*primary_700",
        ),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    # As a mount at / it would hide the answers 404 and 405 of the API, and Gradio's rules for other origins the server's.
    page = app.router.routes.pop().app  # type: ignore[attr-defined]
    page.user_middleware = [each for each in page.user_middleware if each.cls is not CustomCORSMiddleware]
    app.router.default = only(PATHS, page, otherwise=app.router.default)


def only(paths: re.Pattern[str], page: ASGIApp, otherwise: ASGIApp) -> ASGIApp:
    async def choose(scope: Scope, receive: Receive, send: Send) -> None:
        ours = scope["type"] == "http" and paths.fullmatch(scope["path"])
        await (page if ours else otherwise)(scope, receive, send)

    return choose


class Settings(NamedTuple):
    """The page's controls, in their order. Those that are emptied are None, but for the seed's text."""

    prompt: str
    model: str
    length: int
    outputs: int
    temperature: float
    top_k: int
    top_p: float
    seed: str

    def asks(self) -> list[Ask]:
        """The texts to write, each with a seed of its own. Raises UserError for what is not given, or outside its limits."""
        if empty := [name for name, value in self._asdict().items() if value is None]:
            raise UserError(f"{empty[0].replace('_', '-')} has no value", "set it")
        sampling = Sampling(self.temperature, self.top_k or None, self.top_p if self.top_p < 1 else None)
        first = seed_of(self.seed)
        seeds = [(first + number) % 2**63 for number in range(self.outputs)]
        return [Ask(self.prompt, self.length, sampling, seed=seed, top_logprobs=TOP_LOGPROBS) for seed in seeds]


def seed_of(text: str) -> int:
    """The seed as it was typed; any where none was: it is shown with the text, which can so be had again."""
    text = text.strip()
    if not text:
        return secrets.randbelow(10**6)
    if not (text.isdecimal() and len(text) < 20 and (seed := int(text)) < 2**63):
        raise UserError(f"the seed {text[:30]!r} is not a whole number from 0 to 2⁶³ - 1", "leave it empty for any")
    return seed


class Draft:
    """What the page shows of the texts asked for by one press of the button, as it grows.

    Each text is lines of JSON, which playground.js draws: the prompt, then tokens, at last why it ended. Lines are only ever
    added, so that Gradio sends no more than what is new.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.tokens, self.state, self.status = 0, "busy", ""
        self.began = time.monotonic()

    def begin(self, prompt: str, outputs: int) -> None:
        shown = prompt if len(prompt) <= SHOWN_OF_PROMPT else "…" + prompt[-SHOWN_OF_PROMPT:]
        self.texts = [line(prompt=shown)] * outputs
        self.began = time.monotonic()

    def add(self, number: int, piece: Piece) -> None:
        for token in piece.tokens:
            top = [[text, round(math.exp(logprob), 4)] for text, logprob in token.top]
            self.texts[number] += line(text=piece.text, token=token.text, p=round(token.probability, 4), top=top)
        self.tokens += len(piece.tokens)
        if piece.finish_reason:
            self.texts[number] += line(text=piece.text, end=piece.finish_reason)

    def say(self, status: str, state: str = "busy") -> None:
        self.status, self.state = status, state

    def summary(self) -> str:
        texts = f"{len(self.texts)} texts, " if len(self.texts) > 1 else ""
        tokens = f"{self.tokens} token" + "s" * (self.tokens != 1)
        return f"{texts}{tokens} in {time.monotonic() - self.began:.1f} s"

    def view(self) -> dict[str, Any]:
        """The value of the page's view."""
        return {"state": self.state, "status": self.status, "texts": list(self.texts)}


def line(**values: Any) -> str:
    return json.dumps(values) + "\n"


async def compose(library: Library, controls: Sequence[Any], draft: Draft) -> None:
    """Write all the texts into `draft`; what goes wrong is its status. To cancel this frees their places."""
    try:
        settings = Settings(*controls)
        asks = settings.asks()
        if settings.model not in [served.name for served in library.ready]:
            draft.say(f"Loading {settings.model} …")
        served = await library.fetch(settings.model)
        async with await served.begin(asks) as writing:
            draft.begin(settings.prompt, settings.outputs)
            draft.say("Waiting for a place …" if served.engine.active >= served.engine.max_batch else "Writing …")
            async for number, piece in writing:
                draft.add(number, piece)
                draft.say("Writing …")
        told_of = cropped(served, writing.prompt_tokens[0])
        draft.say(f"{draft.summary()}, seed {asks[0].seed}{told_of}", "done")
    except Exception as error:
        status, body = told(error)
        if status >= 500:
            print(f"the playground failed: {error!r}", file=sys.stderr, flush=True)
        draft.say(body["error"]["message"], "error")


def cropped(served: Served, prompt_tokens: int) -> str:
    seen = served.model.config.block_size
    return f". Of the prompt's {prompt_tokens} tokens the model read the last {seen}" if prompt_tokens > seen else ""


def make_page(library: Library, config: ServeConfig) -> gr.Blocks:
    """The page and what its buttons do."""
    running: dict[str, asyncio.Task[None]] = {}  # by the page's session: each page that is open has its own

    async def write(request: gr.Request, *controls: Any) -> AsyncIterator[tuple[Any, ...]]:
        await stop(request)
        draft, session = Draft(), str(request.session_hash)
        running[session] = work = asyncio.create_task(compose(library, controls, draft))
        try:
            while not work.done():
                yield draft.view(), *buttons(busy=True)
                await asyncio.wait([work], timeout=PAUSE)
            if work.cancelled():
                draft.say(f"Stopped: {draft.summary()}", "done")
            yield draft.view(), *buttons(busy=False)
        finally:  # also where the page has been closed
            work.cancel()
            if running.get(session) is work:
                del running[session]

    async def stop(request: gr.Request) -> None:
        if work := running.get(str(request.session_hash)):
            work.cancel()

    return layout(library, config, write, stop)


def buttons(*, busy: bool) -> tuple[Any, Any]:
    return gr.update(interactive=not busy), gr.update(interactive=busy)


def layout(library: Library, config: ServeConfig, write: Callable[..., Any], stop: Callable[..., Any]) -> gr.Blocks:
    examples = examples_for([served.tokenizer for served in library.ready])
    longest = min(LONGEST, config.max_new_tokens)
    page = gr.Blocks(title="tinygpt", analytics_enabled=False)
    with page:
        gr.HTML(HEADER, elem_id="header")
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=300):
                prompt = gr.Textbox(
                    examples[0] if examples else "",
                    label="Prompt",
                    info="Shift + Enter writes",
                    lines=3,
                    max_lines=12,
                    max_length=max(1, (config.max_body_bytes - 1024) // 6),  # a character takes up to 6 bytes as JSON
                )
                if examples:
                    gr.Examples([[example] for example in examples], [prompt], label="Or begin with", elem_id="examples")
                with gr.Row(elem_id="buttons"):
                    start = gr.Button("Write", variant="primary", elem_id="write")
                    halt = gr.Button("Stop", interactive=False, elem_id="stop")
                    gr.Checkbox(
                        True, label="Colour tokens by probability", elem_id="colours", container=False, interactive=True
                    )
                gr.HTML(legend(), elem_id="legend")
                view = gr.HTML(
                    {"state": "empty", "status": "What the model writes appears here.", "texts": []},
                    html_template='<p role="status"></p><div class="texts"></div>',
                    js_on_load=(HERE / "playground.js").read_text(encoding="utf-8"),
                    apply_default_css=False,
                    bands=BANDS,
                    elem_id="view",
                )
            with gr.Column(scale=2, min_width=280, elem_id="settings"):
                settings = [
                    gr.Dropdown(library.names, value=library.default.name, label="Model", filterable=False),
                    slider(1, longest, min(200, longest), 1, "Maximum length", "in new tokens"),
                    slider(1, min(MOST_TEXTS, config.max_waiting), 1, 1, "Number of outputs"),
                    slider(0, 2, 0.8, 0.05, "Temperature", "0: the likeliest"),
                    slider(0, 200, 0, 1, "Top-k", "0: off"),
                    slider(0.01, 1, 1, 0.01, "Top-p", "1: off"),
                    gr.Textbox(label="Seed", placeholder="any", max_lines=1),
                ]
        event = {"queue": True, "show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}
        gr.on([start.click, prompt.submit], write, [prompt, *settings], [view, start, halt], trigger_mode="once", **event)
        halt.click(stop, None, None, queue=False, show_progress="hidden", api_visibility="private")
    page.max_threads = config.max_batch + config.max_waiting  # who waits does so in the engine's queue, and is told
    page.queue(max_size=config.max_waiting)
    return page


def slider(least: float, most: float, value: float, step: float, label: str, info: str | None = None) -> gr.Slider:
    return gr.Slider(least, most, value, step=step, label=label, info=info, buttons=[])


def legend() -> str:
    marks = [f"{least:.0%}" for least in BANDS]
    names = [f"over {marks[0]}", *(f"{low} to {high}" for high, low in pairwise(marks)), f"under {marks[-1]}"]
    keys = " ".join(f'<span class="token p{band}">{name}</span>' for band, name in enumerate(names))
    return f'<div class="keys" title="under the model, before temperature and filters">Probability: {keys}</div>'


def examples_for(tokenizers: Sequence[Tokenizer]) -> list[str]:
    """Prompts without a character that one of the tokenizers does not know."""
    plays, prose = ["ROMEO:\n", "First Citizen:\n", "KING RICHARD III:\nMy lord, "], ["The ", "Once upon a time", "It was "]
    # The characters of Shakespeare's plays as they are used here have one digit, the 3 of an act.
    from_plays = all(knows(each, "KING: 3") and not knows(each, "1") for each in tokenizers)
    return [text for text in (plays if from_plays else prose) if all(knows(each, text) for each in tokenizers)]


def knows(tokenizer: Tokenizer, text: str) -> bool:
    try:
        return tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()
    except UserError:
        return False
