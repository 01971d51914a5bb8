"""Text from a model: the samplers, the token loop and the text that streams from it.

`stream_tokens` is the engine: token ids in, one id per sequence out at each step, and nothing about text. All
else is built on it: `Continuation` turns ids into text that is certain (whole characters, no stop string),
`stream` yields it piece by piece, `generate` and `generate_many` collect it. The engine can be replaced
without touching the rest.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt.cache import KVCache
from tinygpt.config import SampleConfig, UserError
from tinygpt.decode import Decoder
from tinygpt.model import GPT
from tinygpt.precision import convert
from tinygpt.tokenizer import END_OF_TEXT, Detokenizer, Tokenizer

_LARGE = 1e30  # far from any logit, and from what a temperature would take beyond all numbers
GREEDY_BELOW = 1e-5  # a temperature below this is 0: dividing by it would overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. `SampleConfig` says what each field means; UserError outside limits."""

    temperature: float = SampleConfig.temperature
    top_k: int | None = SampleConfig.top_k
    top_p: float | None = SampleConfig.top_p
    min_p: float | None = SampleConfig.min_p
    repetition_penalty: float = SampleConfig.repetition_penalty

    def __post_init__(self) -> None:
        SampleConfig(**asdict(self))  # refuses what is outside its limits

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW


def options(config: SampleConfig) -> dict[str, Any]:
    """The keyword arguments that `generate`, `generate_many` and `stream` share, from a config."""
    names = ["max_new_tokens", "stop", "seed", *(item.name for item in fields(Sampling))]
    return {name: getattr(config, name) for name in names}


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits (B, V), those of the tokens in `seen` (B, V, bool) made smaller (CTRL, arXiv:1909.05858)."""
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty).clamp(-_LARGE, _LARGE)
    return torch.where(seen, penalised, logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Logits (B, V) below the k-th largest become -inf; a tie with it stays."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest largest logits (B, V) whose probabilities reach p stay, at least one (arXiv:1904.09751)."""
    ascending, order = logits.sort()
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p
    drop[:, -1] = False
    return logits.masked_fill(drop.scatter(1, order, drop), -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Logits (B, V) of tokens less likely than p times the likeliest become -inf (arXiv:2407.01082)."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -torch.inf)


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) to draw from: temperature, then top-k, top-p and min-p, in the order of transformers."""
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    return logits


def choose(logits: Tensor, seen: Tensor | None, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """The next token (B,) from logits (B, V), given the tokens that came before (`seen`: B, V, bool; None: no penalty)."""
    if seen is not None and sampling.repetition_penalty != 1:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.greedy:
        return logits.max(-1).indices  # as argmax, in a third of its time on a CPU
    return draw(warp(logits, sampling), torch.rand(len(logits), 1, generator=generator, device=logits.device))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """A token (B,) by the softmax of logits (B, V), for uniform numbers (B, 1) from [0, 1).

    The first whose cumulated probability exceeds the number: one number a token, where torch.multinomial draws V of them.
    """
    cumulated = logits.softmax(-1).cumsum(-1)
    total = cumulated[:, -1:]
    below = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # the product may round up to the total
    return torch.searchsorted(cumulated, below, right=True)[:, 0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode (no dropout) inside, every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def last_logits(model: GPT, idx: Tensor, cache: KVCache | None) -> Tensor:
    """Logits (B, V) of the token after the last of idx (B, T), at least in float32.

    Raises UserError where they are not finite; with a cache this is looked for when a text is read, not at
    each new token.
    """
    reading = cache is None or cache.length == 0
    logits = model.head(model.features(idx, cache)[:, -1])
    if reading and not logits.isfinite().all():
        raise UserError("the model's logits are not finite numbers", "its training diverged: use an earlier checkpoint")
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def stream_tokens(
    model: GPT,
    idx: Tensor,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None = None,
    *,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token (B,) of each sequence in idx (B, T >= 1), max_new_tokens times.

    The model sees block_size tokens at most. Of a longer prompt it reads the last block_size. When the text
    outgrows the block, the newest block_size // 2 tokens (at least one) are read again as if the text began
    with them, and it goes on from there: each token then costs one forward pass of one token, however long
    the text becomes. `use_cache=False` follows the same rule and reads everything again at each step: slow,
    and the same tokens.

    The draws come from a generator of their own: equal seeds draw equal tokens, None draws new ones, and
    torch's global state is untouched. Tokens are on the model's device, and the model is in eval mode until
    the iterator ends or is closed. Raises UserError for settings outside their limits, ValueError for an idx
    that is no (B, T >= 1).
    """
    SampleConfig(max_new_tokens=max_new_tokens, seed=seed)  # refuses what is outside its limits
    if idx.dim() != 2 or not idx.numel():
        raise ValueError(f"idx needs the shape (B, T) and a token at least, and has {tuple(idx.shape)}")
    return _steps(model, idx, max_new_tokens, sampling, seed, use_cache)


@torch.inference_mode()
def _steps(
    model: GPT, idx: Tensor, max_new_tokens: int, sampling: Sampling, seed: int | None, use_cache: bool
) -> Iterator[Tensor]:
    block, device = model.config.block_size, model.wte.weight.device
    generator = torch.Generator(device)
    generator.manual_seed(generator.seed() if seed is None else seed)
    idx = idx.to(device)
    seen = seen_tokens(idx, model.vocab_size) if sampling.repetition_penalty != 1 else None
    window = idx.new_zeros(len(idx), block + 1)  # what the model sees, and the token after it
    length = min(block, idx.shape[1])
    window[:, :length] = idx[:, -length:]
    reader = Reader(model, min(block, length + max_new_tokens)) if use_cache else None
    with evaluating(model):
        for _ in range(max_new_tokens):
            if length > block:
                kept = max(1, block // 2)
                window[:, :kept] = window[:, length - kept : length].clone()
                length = kept
                if reader is not None:
                    reader.cache.clear()
            text = window[:, :length]
            logits = last_logits(model, text, None) if reader is None else reader.logits(text)
            token = choose(logits, seen, sampling, generator)
            if seen is not None:
                seen.scatter_(1, token[:, None], True)
            window[:, length] = token
            length += 1
            yield token


class Reader:
    """Reads what is new in a window: the prompt by the model, into a cache, and each later token by a Decoder."""

    def __init__(self, model: GPT, capacity: int) -> None:
        self.model, self.cache = model, KVCache(model.config.n_layer, capacity)
        self._decoder: Decoder | None = None

    def logits(self, window: Tensor) -> Tensor:
        """Logits (B, V) of the token after the last of window (B, T), at least in float32."""
        length = self.cache.length
        if not length or torch.is_autocast_enabled(window.device.type):
            return last_logits(self.model, window[:, length:], self.cache)
        if self._decoder is None:
            self._decoder = Decoder(self.model, self.cache)
        logits = self._decoder(window[:, length])
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def seen_tokens(idx: Tensor, vocab_size: int) -> Tensor:
    """Which tokens occur in each row of idx (B, T): (B, V), bool."""
    return torch.zeros(len(idx), vocab_size, dtype=torch.bool, device=idx.device).scatter_(1, idx, True)


class Continuation:
    """The new text of one sample, given out as soon as it is certain; `done` when the sample has ended.

    It ends at the end-of-text token, or before the stop string that is complete first (of several, the
    longest). Text that may turn out to begin one is held back. `previous` is the token before the first.
    """

    def __init__(self, tokenizer: Tokenizer, previous: int | None = None, stop: Sequence[str] = ()) -> None:
        self.done = False
        self._stop, self._end_of_text = stop, end_of_text(tokenizer)
        self._detokenizer = Detokenizer(tokenizer, previous)
        self._held = ""
        self._stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come; nothing more once `done`."""
        if self.done:
            return ""
        if token == self._end_of_text:
            self.done = True
            return ""
        return self._release(self._detokenizer.push(token))

    def finish(self) -> str:
        """What was held back, now that no token follows."""
        if self._stopped:
            return ""
        text = self._release(self._detokenizer.finish()) + self._held
        self._held = ""
        return text

    def _release(self, text: str) -> str:
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if ends:
            self.done, self._stopped, self._held = True, True, ""
            return text[: min(ends)[1]]
        certain = len(text) - longest_beginning(text, self._stop)
        self._held = text[certain:]
        return text[:certain]


def longest_beginning(text: str, stop: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    return max((n for word in stop for n in range(1, len(word)) if text.endswith(word[:n])), default=0)


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The token that ends a text, where the tokenizer has one."""
    special_tokens: dict[str, int] = getattr(tokenizer, "special_tokens", {})
    token: int | None = getattr(tokenizer, "eot_id", special_tokens.get(END_OF_TEXT))
    return token


def start_token(tokenizer: Tokenizer) -> int:
    """What an empty prompt starts from: end-of-text where there is one, else a newline, else token 0."""
    if (token := end_of_text(tokenizer)) is not None:
        return token
    try:
        return (tokenizer.encode("\n") or [0])[0]
    except UserError:
        return 0


def opening(prompt: str, tokenizer: Tokenizer) -> str:
    """`prompt`; for the default one, a newline, "" where the tokenizer has none: a text may be a single line."""
    try:
        if prompt == "\n":
            tokenizer.encode(prompt)
    except UserError:
        return ""
    return prompt


def _begin(
    model: GPT, tokenizer: Tokenizer | None, prompt: str, stop: Sequence[str], count: int
) -> tuple[Tensor, list[Continuation]]:
    """The prompt's ids (count, T) and as many empty continuations of it."""
    if tokenizer is None:
        raise UserError("this checkpoint holds no tokenizer", "give the one that the model was trained with")
    if tokenizer.vocab_size != model.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens and the model {model.vocab_size}"
        raise UserError(f"the tokenizer has {sizes}", "use the tokenizer that the model was trained with")
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stop:
        raise UserError("a stop string is empty", "an empty string occurs everywhere: leave it out")
    ids = tokenizer.encode(prompt)
    # A word tokenizer puts a space between two words; a prompt that ends in one has it already.
    previous = ids[-1] if ids and not prompt[-1].isspace() else None
    idx = torch.tensor([ids or [start_token(tokenizer)]]).expand(count, -1)
    return idx, [Continuation(tokenizer, previous, stop) for _ in range(count)]


def stream(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = SampleConfig.max_new_tokens,
    stop: Sequence[str] = (),
    seed: int | None = None,
    dtype: str | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Yield the text after `prompt` in pieces that are never empty; arguments and errors as for `generate`.

    Joined, the pieces are what `generate` adds to the prompt for the same seed. Errors come at the call,
    before the first piece.
    """
    idx, (sample,) = _begin(model, tokenizer, prompt, stop, 1)
    model = model if dtype is None else convert(model, dtype)
    tokens = stream_tokens(model, idx, max_new_tokens, Sampling(**sampling), seed)
    return _pieces(tokens, sample)


def _pieces(tokens: Iterator[Tensor], sample: Continuation) -> Iterator[str]:
    for token in tokens:
        if text := sample.push(int(token)):
            yield text
        if sample.done:
            break
    if text := sample.finish():
        yield text


def generate(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = SampleConfig.max_new_tokens,
    stop: Sequence[str] = (),
    seed: int | None = None,
    dtype: str | None = None,
    **sampling: Any,
) -> str:
    """`prompt` and the text that the model writes after it, of max_new_tokens tokens or fewer.

    It ends before any of the `stop` strings (in the new text) and at the tokenizer's end-of-text. `sampling`
    are the fields of `Sampling`: temperature, top_k, top_p, min_p and repetition_penalty. Equal seeds write
    equal texts; None writes a new one. An empty prompt starts from `start_token`, which the text does not
    show; of a prompt longer than block_size the model reads the end (see `stream_tokens`). dtype (fp32, bf16 or int8) writes
    with a copy of the weights in that format; `load(ckpt, dtype=...)` makes it once for many texts.

    Raises UserError for a setting outside its limits, and for a prompt that the tokenizer cannot encode.
    """
    sampling |= {"max_new_tokens": max_new_tokens, "stop": stop, "seed": seed, "dtype": dtype}
    (text,) = generate_many(model, tokenizer, prompt, 1, **sampling)
    return text


def generate_many(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    num_samples: int,
    *,
    max_new_tokens: int = SampleConfig.max_new_tokens,
    stop: Sequence[str] = (),
    seed: int | None = None,
    dtype: str | None = None,
    **sampling: Any,
) -> list[str]:
    """As many texts that begin with `prompt`, drawn together in one batch; otherwise as `generate`."""
    SampleConfig(num_samples=num_samples)  # refuses what is outside its limits
    idx, samples = _begin(model, tokenizer, prompt, stop, num_samples)
    model = model if dtype is None else convert(model, dtype)
    texts = [[prompt] for _ in samples]
    for tokens in stream_tokens(model, idx, max_new_tokens, Sampling(**sampling), seed):
        for text, sample, token in zip(texts, samples, tokens.tolist(), strict=True):
            text.append(sample.push(token))
        if all(sample.done for sample in samples):
            break
    return ["".join(text) + sample.finish() for text, sample in zip(texts, samples, strict=True)]


class _CallableModule(ModuleType):
    """`tinygpt.generate(...)` is the function, although importing this file binds that name to the module."""

    def __call__(self, model: GPT, tokenizer: Tokenizer, prompt: str, **settings: Any) -> str:
        return generate(model, tokenizer, prompt, **settings)


sys.modules[__name__].__class__ = _CallableModule
