"""Models by name and the texts that they write, for whoever serves them: text in, pieces of text out, over the engine.

A `Served` is one model with its tokenizer and engine. `begin` queues texts and gives a `Writing`, which is iterated, in
asyncio, for (number of the text, Piece). The HTTP API and the playground are both built on this and on nothing below.
"""

import asyncio
import math
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import nn

from tinygpt.checkpoint import find, load_for_text
from tinygpt.config import UserError
from tinygpt.engine import Drawn, Ended, Engine, Event, Job, Read, Request
from tinygpt.generate import Continuation, Sampling, end_of_text, start_token
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

TOP_LOGPROBS = 5


class UnknownModel(UserError):
    """No model of this name is served, or it could not be loaded."""


class Closing(UserError):
    """The server is going down."""


class TooLong(UserError):
    """A prompt or a text above the server's limits."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_prompt_tokens: int = 16_384
    max_new_tokens: int = 4096
    max_batch: int = 32
    max_waiting: int = 256


@dataclass(frozen=True)
class Ask:
    """One text to write: a prompt (text, or token ids) and how. Fields as in `engine.Request` and `SampleConfig`."""

    prompt: str | Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    score_prompt: bool = False


class TokenInfo(NamedTuple):
    """A token as text, its log probability (None: nothing stood before it), and the likeliest ones' by their text."""

    id: int
    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...]

    @property
    def width(self) -> int:
        """The characters that begin in it: of one in parts, only the first byte counts."""
        if not self.text.startswith("bytes:"):
            return len(self.text)
        return sum(byte[0] not in "89ab" for byte in self.text.split("\\x")[1:])

    @property
    def probability(self) -> float:
        return math.exp(self.logprob) if self.logprob is not None else 1.0


class Piece(NamedTuple):
    """What is new in a text: certain characters (often none), the tokens behind them, and at its end why it ended."""

    text: str = ""
    tokens: tuple[TokenInfo, ...] = ()
    finish_reason: str | None = None  # stop | length
    of_prompt: bool = False  # the tokens are the prompt's, scored


class Served:
    """One model that is served under a name."""

    def __init__(self, name: str, model: GPT, tokenizer: Tokenizer, limits: Limits, created: int) -> None:
        self.name, self.model, self.tokenizer, self.limits, self.created = name, model, tokenizer, limits, created
        self.engine = Engine(model, limits.max_batch, limits.max_waiting)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a prompt, start_token for an empty one. Raises UserError for what the tokenizer does not know."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) > (most := self.limits.max_prompt_tokens):
            raise TooLong(f"the prompt has {len(ids)} tokens, and this server takes {most}", "send the end of it")
        return ids or [start_token(self.tokenizer)]

    def refuse_too_many(self, count: int) -> None:
        """Raises TooLong for more texts at once than may wait. To be asked before they are made."""
        if count > (most := self.limits.max_waiting):
            raise TooLong(f"{count} texts are asked for at once, and this server writes {most}", "ask for fewer")

    async def begin(self, asks: Sequence[Ask]) -> "Writing":
        """Queue all texts or none. Raises engine.Full where there is no room, UserError for a bad ask."""
        self.refuse_too_many(len(asks))
        requests = await asyncio.to_thread(self.requests, asks)  # encoding may take a while
        return Writing(self, asks, requests)

    def requests(self, asks: Sequence[Ask]) -> list[Request]:
        """For the engine. The candidates of one prompt share its ids: a long one is encoded once."""
        ids: dict[int, list[int]] = {}
        for ask in asks:
            if id(ask.prompt) not in ids:
                ids[id(ask.prompt)] = self.encode(ask.prompt)
        return [self.request(ask, ids[id(ask.prompt)]) for ask in asks]

    def request(self, ask: Ask, ids: list[int]) -> Request:
        if ask.max_new_tokens > (most := self.limits.max_new_tokens):
            raise TooLong(f"{ask.max_new_tokens} new tokens are asked for, and this server writes {most}", "ask for fewer")
        return Request(
            ids,
            ask.max_new_tokens,
            ask.sampling,
            ask.seed,
            ask.presence_penalty,
            ask.frequency_penalty,
            ask.logit_bias,
            ask.top_logprobs,
            ask.score_prompt,
            end_of_text(self.tokenizer),
        )

    def info(self, drawn: Drawn, previous: int | None) -> TokenInfo:
        top = tuple((self.text_of(token, previous), logprob) for token, logprob in drawn.top)
        return TokenInfo(drawn.token, self.text_of(drawn.token, previous), drawn.logprob, top)

    def text_of(self, token: int, previous: int | None) -> str:
        """A token as text; bytes that are no whole character as `bytes:\\xe2\\x80`."""
        piece = self.tokenizer.piece(token, previous)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class Writing:
    """Texts being written together: an async iterator of (number of the text, Piece) until all have ended.

    To be used as `async with`: leaving it, for whatever reason, frees the places of the texts that have not ended.
    """

    def __init__(self, served: Served, asks: Sequence[Ask], requests: Sequence[Request]) -> None:
        self._served = served
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.prompt_tokens = [len(request.ids) for request in requests]
        self.completion_tokens = 0
        self._asks = asks
        self._last = [before(ask, request) for ask, request in zip(asks, requests, strict=True)]
        pairs = zip(asks, self._last, strict=True)
        self._texts = [Continuation(served.tokenizer, last, ask.stop) for ask, last in pairs]
        self._open = set(range(len(asks)))
        self._jobs: list[Job] = served.engine.submit(requests, [self._deliver_to(number) for number in range(len(asks))])

    def _deliver_to(self, number: int) -> Callable[[Event], None]:
        return lambda event: self._deliver(number, event)

    def _deliver(self, number: int, event: Event) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel()

    def cancel(self) -> None:
        for number in self._open:
            self._jobs[number].cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        while self._open:
            number, event = await self._events.get()
            if number in self._open:
                piece = self._piece(number, event)
                if piece.finish_reason is not None:
                    self._open.discard(number)
                yield number, piece

    def _piece(self, number: int, event: Event) -> Piece:
        text = self._texts[number]
        if isinstance(event, Read):
            return Piece(tokens=tuple(self._read(event)) if self._asks[number].prompt else (), of_prompt=True)
        if isinstance(event, Ended):
            if event.error is not None:
                raise event.error
            if event.reason == "cancelled":
                raise Closing("the server is going down", "try again in a while")
            return Piece(text.finish(), (), event.reason)
        self.completion_tokens += 1
        info = self._served.info(event, self._last[number])
        self._last[number] = event.token
        certain = text.push(event.token)
        if text.done:  # at a stop string
            self._jobs[number].cancel()
            return Piece(certain, (info,), "stop")
        return Piece(certain, (info,))

    def _read(self, event: Read) -> list[TokenInfo]:
        previous, infos = None, []
        for drawn in event.tokens:
            infos.append(self._served.info(drawn, previous))
            previous = drawn.token
        return infos


def before(ask: Ask, request: Request) -> int | None:
    """The token that the first one is written after; None where it begins a text or a word."""
    spaced = isinstance(ask.prompt, str) and (not ask.prompt or ask.prompt[-1].isspace())
    return None if spaced else request.ids[-1]


class Library:
    """The models of one server. Those given as a source only are loaded when they are first asked for."""

    def __init__(self, limits: Limits, device: str, dtype: str = "fp32") -> None:
        self._limits, self._device, self._dtype = limits, device, dtype
        self._ready: dict[str, Served] = {}
        self._sources: dict[str, str] = {}
        self._loading = threading.Lock()
        self._loads: dict[str, Future[Served]] = {}

    def add(self, name: str, source: str, *, later: bool = False) -> None:
        """Serve the checkpoint `source` as `name`. Raises UserError where it cannot be opened."""
        self._sources[name] = source
        if not later:
            self._load(name)

    @property
    def names(self) -> list[str]:
        """Every name that may be asked for."""
        return list(self._sources)

    @property
    def ready(self) -> list[Served]:
        return list(self._ready.values())

    @property
    def default(self) -> Served:
        return next(iter(self._ready.values()))

    def get(self, name: str) -> Served:
        """The model of this name, loaded now if it was not yet (which takes its time: not for the event loop).

        Raises UnknownModel where there is none.
        """
        if name in self._ready:
            return self._ready[name]
        if name not in self._sources:
            raise UnknownModel(f"the model {name!r} is not served here", f"it serves {', '.join(self.names)}")
        with self._loading:
            try:
                return self._ready.get(name) or self._load(name)
            except UserError as error:  # its message may name files of this machine: that is for the log
                print(f"the model {name} cannot be loaded: {error}; {error.hint}", file=sys.stderr, flush=True)
                raise UnknownModel(f"the model {name!r} cannot be loaded here", "the server's log says why") from error

    async def fetch(self, name: str) -> Served:
        """As `get`, for the event loop: one thread of its own loads, however many ask, and the end waits for none."""
        if name in self._ready or name not in self._sources:
            return self.get(name)
        if (loading := self._loads.get(name)) is None:
            self._loads[name] = loading = Future()
            loading.set_running_or_notify_cancel()  # whoever leaves does not end it for the others
            threading.Thread(target=self._load_into, args=(loading, name), daemon=True).start()
        return await asyncio.wrap_future(loading)

    def _load_into(self, loading: "Future[Served]", name: str) -> None:
        try:
            loading.set_result(self.get(name))
        except Exception as error:
            loading.set_exception(error)
        finally:
            del self._loads[name]

    def _load(self, name: str) -> Served:
        source = self._sources[name]
        model, tokenizer = load_for_text(source, self._device, self._dtype)
        own_memory(model)
        self._ready[name] = served = Served(name, model, tokenizer, self._limits, created(source))
        return served

    def close(self) -> None:
        for served in self._ready.values():
            served.engine.close()


def own_memory(model: GPT) -> None:
    """Copy memory-mapped weights: a checkpoint that is deleted or cut short while it is served must not matter."""
    tied = getattr(model.lm_head, "weight", None) is model.wte.weight
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(parameter.clone(), requires_grad=False))
    if tied:
        model.lm_head.weight = model.wte.weight


def created(source: str) -> int:
    """When a checkpoint was written; now, where that cannot be told."""
    try:
        return int(Path(find(source)).stat().st_mtime)
    except (UserError, OSError):
        return int(time.time())
