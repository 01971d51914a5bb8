"""Many texts written at once by one model: continuous batching over one cache of keys and values.

`Engine.submit` takes requests in token ids and returns at once; what is drawn goes to the callable that came with them. A
thread of the engine's own reads each new prompt in chunks between the steps of the others, draws one token for every
text at each step, and hands the place of a text that ends to the next in the queue. Nothing here knows about text,
HTTP or asyncio.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from tinygpt.cache import RaggedCache
from tinygpt.config import SampleConfig, UserError
from tinygpt.generate import Sampling, draw, penalise_repetition, warp
from tinygpt.model import GPT

CHUNK = 256  # tokens of prompts read between two steps: what a step may be held up by


class Full(Exception):
    """The queue is full; `retry_after` is how many seconds a place takes to become free, as seen so far."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("the queue is full")
        self.retry_after = retry_after


class Closed(UserError):
    """The engine takes no more."""


class Broken(UserError):
    """The model is at fault, not who asked."""


@dataclass(frozen=True)
class Request:
    """One text to write. Raises UserError for what is outside its limits.

    presence_penalty and frequency_penalty are taken off the logits of tokens drawn so far, once each and per occurrence;
    logit_bias is added. top_logprobs: how many alternatives to report with each token (None: no log probabilities).
    score_prompt: report those of the prompt's tokens too. `end` is the token that ends the text.
    """

    ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    score_prompt: bool = False
    end: int | None = None

    def __post_init__(self) -> None:
        SampleConfig(max_new_tokens=max(1, self.max_new_tokens), seed=self.seed)
        if not self.ids or self.max_new_tokens < 0:
            raise UserError("a request needs a token at least, and max_new_tokens of 0 or more", "give a prompt")


class Drawn(NamedTuple):
    """A token; its log probability under the model (before temperature), and the likeliest ones', where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Read(NamedTuple):
    """The prompt's tokens with their log probabilities: None for those the model had nothing to read before."""

    tokens: list[Drawn]


class Ended(NamedTuple):
    """No more will come. reason: "stop" at the end token, "length" at max_new_tokens, "cancelled", or "error"."""

    reason: str
    error: Exception | None = None


Event = Drawn | Read | Ended
Deliver = Callable[[Event], None]


class Job:
    """One request on its way. `cancel` frees its place before the next step."""

    def __init__(self, request: Request, deliver: Deliver, model: GPT) -> None:
        device = model.wte.weight.device
        self.request, self.deliver = request, deliver
        self.window = list(request.ids)[-model.config.block_size :]  # what the model sees
        self.read = 0  # how much of the window is in the cache
        self.drawn = 0
        self.cancelled = False
        self.submitted = time.monotonic()
        before = request.ids[: -len(self.window)] if request.score_prompt else ()
        self.scores: list[Drawn] = [Drawn(token) for token in before]
        self.generator = torch.Generator(device)
        self.generator.manual_seed(self.generator.seed() if request.seed is None else request.seed)
        self.counts: Tensor | None = None  # of the tokens drawn
        if request.presence_penalty or request.frequency_penalty:
            self.counts = torch.zeros(model.vocab_size, device=device)
        self.bias: Tensor | None = None
        if bias := request.logit_bias:
            self.bias = torch.zeros(model.vocab_size, device=device)
            self.bias[list(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        self.seen: Tensor | None = None
        if request.sampling.repetition_penalty != 1:
            self.seen = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
            self.seen[list(request.ids)] = True

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes anything."""
        return self.counts is not None or self.seen is not None or self.bias is not None

    @property
    def unread(self) -> int:
        return len(self.window) - self.read

    def cancel(self) -> None:
        self.cancelled = True

    def push(self, token: int, block_size: int) -> None:
        """The token drawn is the next to be read. A window that is full goes on from its newer half (generate.py)."""
        self.drawn += 1
        if self.counts is not None:
            self.counts[token] += 1
        if self.seen is not None:
            self.seen[token] = True
        self.window.append(token)
        if len(self.window) > block_size:
            self.window, self.read = self.window[-max(1, block_size // 2) :], 0

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits (V,) with the bias and the penalties."""
        request = self.request
        if self.counts is not None:
            logits = logits - request.frequency_penalty * self.counts - request.presence_penalty * (self.counts > 0)
        if self.bias is not None:
            logits = logits + self.bias
        if self.seen is not None:
            logits = penalise_repetition(logits, self.seen, request.sampling.repetition_penalty)
        return logits


class Engine:
    """Serves one model, up to max_batch texts at a time, with up to max_waiting more in its queue.

    The model is put into eval mode and is the engine's from then on. `submit` may be called from any thread; events are
    delivered from the engine's own, so `deliver` must return quickly.
    """

    def __init__(self, model: GPT, max_batch: int = 32, max_waiting: int = 256) -> None:
        self.model, self.max_batch, self.max_waiting = model.eval(), max_batch, max_waiting
        self.tokens_read = self.tokens_drawn = 0
        self._cache = RaggedCache(model)
        self._jobs: list[Job] = []  # job i has row i of the cache
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._seconds = 1.0  # that a text took from queue to end: a running mean
        self._thread = threading.Thread(target=self._run, name="tinygpt-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        return len(self._jobs)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Iterable[Request], deliver: Sequence[Deliver]) -> list[Job]:
        """Queue all requests or none, each with the callable that its events go to.

        Raises Full where the queue has no room for all, UserError for ids outside the vocabulary.
        """
        requests = list(requests)
        with self._change:
            self._refuse_full(len(requests))  # before the work of making them
        for ids in {id(request.ids): request.ids for request in requests}.values():  # which many may share
            self._check(ids)
        for bias in {id(request.logit_bias): request.logit_bias for request in requests}.values():
            self._check(bias)
        jobs = [Job(request, to, self.model) for request, to in zip(requests, deliver, strict=True)]
        with self._change:
            self._refuse_full(len(jobs))
            self._waiting.extend(jobs)
            self._change.notify()
        return jobs

    def _refuse_full(self, more: int) -> None:
        if self._closed:
            raise Closed("the engine is closed", "the server is going down")
        free = max(0, self.max_batch - len(self._jobs)) + self.max_waiting
        if len(self._waiting) + more > free:
            raise Full(min(60, max(1, math.ceil(self._seconds))))

    def close(self) -> None:
        """End what is being written and stop the thread."""
        with self._change:
            self._closed = True
            self._change.notify()
        self._thread.join(timeout=30)

    def _check(self, tokens: Iterable[int]) -> None:
        top = self.model.vocab_size
        for token in tokens:
            if not 0 <= token < top:
                raise UserError(f"the token {token} is outside the vocabulary of {top}", f"use ids from 0 to {top - 1}")

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait():
            try:
                self._change_places()
                self._read_prompts()
                self._step()
            except Exception as error:  # out of memory, say: those who were in the batch hear of it, the next are served
                for job in self._jobs:
                    self._deliver(job, Ended("error", error))
                self._jobs.clear()
                self._cache.drop()
        for job in (*self._jobs, *self._waiting):
            self._deliver(job, Ended("cancelled"))

    def _wait(self) -> bool:
        """Sleep while there is nothing to do; False when closed."""
        with self._change:
            while not (self._closed or self._jobs or self._waiting):
                self._cache.drop()
                self._change.wait()
        return not self._closed

    def _change_places(self) -> None:
        """Let go of the cancelled, take in who waits."""
        for job in [job for job in self._jobs if job.cancelled]:
            self._end(job, "cancelled")
        with self._change:
            for job in [job for job in self._waiting if job.cancelled]:
                self._waiting.remove(job)
                self._deliver(job, Ended("cancelled"))
            while self._waiting and len(self._jobs) < self.max_batch:
                self._jobs.append(self._waiting.popleft())

    def _read_prompts(self) -> None:
        """Read up to CHUNK tokens of the texts that are behind by more than one; the last token is the step's."""
        behind = [(row, job) for row, job in enumerate(self._jobs) if job.unread > 1]
        if not behind:
            return
        chunk = min(CHUNK, max(job.unread for _, job in behind) - 1)
        behind = behind[: max(1, CHUNK // chunk)]
        chunk = min(chunk, max(job.unread for _, job in behind) - 1)
        counts = [min(chunk, job.unread - 1) for _, job in behind]
        pairs = zip(behind, counts, strict=True)
        tokens = [job.window[job.read : job.read + n] + [0] * (chunk - n) for (_, job), n in pairs]
        rows = torch.tensor([row for row, _ in behind], device=self._cache.like.device)
        hidden = self._forward(rows, tokens, [job.read for _, job in behind], counts)
        for (_, job), n, states in zip(behind, counts, hidden, strict=True):
            if job.request.score_prompt and job.drawn == 0:
                self._score(job, states[:n])
            job.read += n
        self.tokens_read += sum(counts)

    def _step(self) -> None:
        """One token for each text that has been read up to its last token."""
        ready = [job.unread == 1 for job in self._jobs]
        if not any(ready):
            return
        tokens = [[job.window[-1] if go else 0] for job, go in zip(self._jobs, ready, strict=True)]
        starts = [job.read if go else 0 for job, go in zip(self._jobs, ready, strict=True)]
        hidden = self._forward(slice(0, len(self._jobs)), tokens, starts, [int(go) for go in ready])
        jobs = [job for job, go in zip(self._jobs, ready, strict=True) if go]
        chosen = hidden[torch.tensor(ready, device=hidden.device), -1] if len(jobs) < len(ready) else hidden[:, -1]
        logits = self.model.head(chosen)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        sound = logits.sum(-1).isfinite().tolist()  # one pass, where isfinite() makes four
        for job in jobs:
            job.read += 1  # of all before any row moves: what has just been written moves with it
        for job, fine in zip(jobs, sound, strict=True):
            if job.request.score_prompt and job.drawn == 0:
                self._deliver(job, Read([*job.scores, *self._last_prompt_token(job)]))
            if not fine:
                self._end(job, "error", Broken("the model's logits are not finite numbers", "its training diverged"))
        if not all(sound):
            jobs, logits = [job for job, fine in zip(jobs, sound, strict=True) if fine], logits[torch.tensor(sound)]
        self._draw(jobs, logits)

    def _forward(self, rows: slice | Tensor, tokens: list[list[int]], starts: list[int], counts: list[int]) -> Tensor:
        """Hidden states (n, T, C) of `tokens` (n, T), which follow the `starts` (n) tokens that each row holds.

        Of row i the first counts[i] tokens are real: what fills it up is written where nobody looks.
        """
        device, block = self._cache.like.device, self.model.config.block_size
        total = max(start + n for start, n in zip(starts, counts, strict=True))
        self._cache.reserve(len(self._jobs), total)
        steps = torch.arange(len(tokens[0]), device=device)
        positions = torch.tensor(starts, device=device)[:, None] + steps
        real = steps < torch.tensor(counts, device=device)[:, None]
        self._cache.aim(rows, positions.where(real, self._cache.columns), total)
        mask = torch.arange(total, device=device) <= positions[:, :, None]  # (n, T, total)
        idx = torch.tensor(tokens, device=device)
        return self.model.features(idx, self._cache, positions.clamp(max=block - 1), mask[:, None])

    def _draw(self, jobs: list[Job], logits: Tensor) -> None:
        """The next token of each job from its logits (n, V); texts with the same settings are filtered together."""
        self.tokens_drawn += len(jobs)
        adjusted = logits.clone() if any(job.adjusts for job in jobs) else logits
        groups: dict[Sampling, list[int]] = {}
        for number, job in enumerate(jobs):
            groups.setdefault(job.request.sampling, []).append(number)
            if job.adjusts:
                adjusted[number] = job.adjust(logits[number])
        for sampling, members in groups.items():
            rows = adjusted if len(members) == len(jobs) else adjusted[members]
            for number, token in zip(members, _choose(rows, sampling, [jobs[n].generator for n in members]), strict=True):
                self._hand_out(jobs[number], token, logits[number])

    def _hand_out(self, job: Job, token: int, logits: Tensor) -> None:
        request = job.request
        if request.max_new_tokens:
            if token == request.end:
                self._end(job, "stop")
                return
            job.push(token, self.model.config.block_size)
            self._deliver(job, report(token, logits, request.top_logprobs))
        if job.drawn >= request.max_new_tokens:
            self._end(job, "length")

    def _score(self, job: Job, states: Tensor) -> None:
        """Log probabilities of the prompt's tokens that follow those of `states` (n, C)."""
        if not job.read:
            job.scores.append(Drawn(job.window[0]))
        following = job.window[job.read + 1 : job.read + 1 + len(states)]
        for token, logits in zip(following, self.model.head(states).float(), strict=True):
            job.scores.append(report(token, logits, job.request.top_logprobs or 0))

    def _last_prompt_token(self, job: Job) -> list[Drawn]:
        return [Drawn(job.window[0])] if len(job.window) == 1 else []

    def _end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """Free the place of a job; the last row of the cache fills it."""
        row = next(number for number, other in enumerate(self._jobs) if other is job)
        if error is not None:
            self._cache.erase(row)
        last = self._jobs.pop()
        if last is not job:
            self._cache.move(len(self._jobs), row, last.read)
            self._jobs[row] = last
        self._seconds += 0.1 * (time.monotonic() - job.submitted - self._seconds)
        self._deliver(job, Ended(reason, error))

    def _deliver(self, job: Job, event: Event) -> None:
        try:
            job.deliver(event)
        except Exception:  # whoever asked has gone
            job.cancel()


def _choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> list[int]:
    """The next tokens from logits (n, V), each text with its own generator, as `generate.choose` does for one."""
    if sampling.greedy:
        tokens = logits.argmax(-1)
    else:
        uniform = torch.cat([torch.rand(1, 1, generator=generator, device=logits.device) for generator in generators])
        tokens = draw(warp(logits, sampling), uniform)
    return [int(token) for token in tokens.tolist()]


def report(token: int, logits: Tensor, top: int | None) -> Drawn:
    """The token with its log probability and the `top` likeliest ones', from logits (V,); without them where top is None."""
    if top is None:
        return Drawn(token)
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(min(top, len(logprobs)))
    pairs = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Drawn(token, float(logprobs[token]), pairs)
