"""The bodies of the HTTP API: OpenAI's completions and models (its API description, version 2.3.0), and our /generate.

Where OpenAI's schema allows null for "the default", so do these. `top_k`, `min_p` and `repetition_penalty` are additions;
a field that is not known is refused, since a misspelt one would otherwise go unnoticed.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from tinygpt.generate import Sampling
from tinygpt.served import TOP_LOGPROBS, Ask, TokenInfo


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed, not a boolean")
    return value


Number = Annotated[FiniteFloat, BeforeValidator(_no_bool)]
Seed = Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)]
Stop = StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=4)]
# fail_fast: a list with a million wrong items has one error.
Ids = Annotated[list[StrictInt], Field(min_length=1, fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(min_length=1, fail_fast=True)]
Prompt = StrictStr | Ids | Texts | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]


def _nullable(schema: dict[str, Any]) -> None:
    """Say in the description that null stands for a field's default, as in OpenAI's."""
    for name, field in schema["properties"].items():
        if "default" in field and "anyOf" not in field:
            about = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **about}


class Extensions(BaseModel):
    """What both forms of request share beyond OpenAI's fields."""

    model_config = ConfigDict(extra="forbid", json_schema_extra=_nullable)

    @model_validator(mode="before")
    @classmethod
    def null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        unknown = [name for name in values if name not in cls.model_fields]
        more = set(unknown[1:])  # one is enough to say
        return {k: value for k, value in values.items() if (value is not None or k == "prompt") and k not in more}

    top_k: Annotated[StrictInt, Field(ge=1)] | None = Field(None, description="draw from the k likeliest tokens only")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="drop tokens less likely than that times the likeliest"
    )
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] = 1.0


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: StrictBool | None = Field(None, description="one more chunk at the end, with the usage")
    include_obfuscation: StrictBool | None = Field(None, description="accepted, and not done")


class CompletionRequest(Extensions):
    """POST /v1/completions."""

    model: StrictStr
    prompt: Prompt | None
    max_tokens: Annotated[StrictInt, Field(ge=0)] = 16
    temperature: Annotated[Number, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[Number, Field(ge=0, le=1)] = 1.0
    n: Annotated[StrictInt, Field(ge=1, le=128)] = 1
    best_of: Annotated[StrictInt, Field(ge=0, le=20)] | None = Field(None, description="write so many, return the likeliest")
    stop: Stop | None = None
    seed: Seed | None = Field(None, description="the same seed and settings draw the same text")
    logprobs: Annotated[StrictInt, Field(ge=0, le=TOP_LOGPROBS)] | None = None
    echo: StrictBool = False
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] = 0.0
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = Field(None, description="token id to bias")
    suffix: StrictStr | None = Field(None, description="not supported: null or empty")
    user: StrictStr | None = Field(None, description="accepted, and not used")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several, each text or ids; null starts a new text."""
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)

    @property
    def candidates(self) -> int:
        return max(self.n, self.best_of or 0)

    def problem(self) -> tuple[str, str] | None:
        """(field, what is wrong) of fields that contradict each other."""
        if self.suffix:
            return "suffix", "suffix is not supported: the models write forward only"
        if self.best_of and self.best_of < self.n:
            return "best_of", f"best_of={self.best_of} is below n={self.n}"
        if self.stream and self.best_of and self.best_of > self.n:
            return "best_of", "best_of above n cannot be streamed"
        if self.stream_options and not self.stream:
            return "stream_options", "stream_options needs stream=true"
        if any(not token.isascii() or not token.isdecimal() or len(token) > 9 for token in self.logit_bias or ()):
            return "logit_bias", "the keys of logit_bias are token ids"
        if "" in ([self.stop] if isinstance(self.stop, str) else self.stop or []):
            return "stop", "a stop string is empty"
        return None

    def asks(self) -> list[Ask]:
        """The texts to write: `candidates` for each prompt. Equal seeds write equal texts, each candidate its own."""
        wants_scores = self.logprobs is not None or self.candidates > self.n
        bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
        return [
            Ask(
                prompt,
                self.max_tokens,
                self._sampling(),
                _listed(self.stop),
                None if self.seed is None else (self.seed + number) % 2**63,
                self.presence_penalty,
                self.frequency_penalty,
                bias,
                (self.logprobs or 0) if wants_scores else None,
                score_prompt=self.echo and self.logprobs is not None,
            )
            for prompt in self.prompts
            for number in range(self.candidates)
        ]

    def _sampling(self) -> Sampling:
        top_p = self.top_p if 0 < self.top_p < 1 else None
        top_k = 1 if self.top_p == 0 else self.top_k  # no probability mass at all: the likeliest token
        return Sampling(self.temperature, top_k, top_p, self.min_p, self.repetition_penalty)


class GenerateRequest(Extensions):
    """POST /generate, /generate/{model} and /generate_stream."""

    prompt: StrictStr
    max_length: Annotated[StrictInt, Field(ge=1)] = Field(100, description="new tokens at most")
    temperature: Annotated[Number, Field(ge=0, le=100)] = 0.8
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    stop: Stop | None = None
    seed: Seed | None = None

    def ask(self) -> Ask:
        seed = None if self.seed is None else self.seed % 2**63
        sampling = Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty)
        return Ask(self.prompt, self.max_length, sampling, _listed(self.stop), seed)


def _listed(stop: str | list[str] | None) -> list[str]:
    return [stop] if isinstance(stop, str) else stop or []


class GeneratedText(BaseModel):
    generated_text: str = Field(description="the prompt and what follows it")


class Logprobs(BaseModel):
    """text_offset counts characters of this choice's text."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []

    @classmethod
    def of(cls, tokens: list[TokenInfo], offset: int = 0) -> "Logprobs":
        made = cls()
        for token in tokens:
            made.tokens.append(token.text)
            made.token_logprobs.append(token.logprob)
            scored = token.logprob is not None
            made.top_logprobs.append({**dict(token.top), token.text: token.logprob} if scored else None)  # type: ignore[dict-item]
            made.text_offset.append(offset)
            offset += token.width
        return made

    def __add__(self, other: "Logprobs") -> "Logprobs":
        return Logprobs(**{name: getattr(self, name) + getattr(other, name) for name in Logprobs.model_fields})


class Choice(BaseModel):
    text: str
    index: int
    logprobs: Logprobs | None = None
    finish_reason: str | None = Field(json_schema_extra={"enum": ["stop", "length", "content_filter", None]})


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tinygpt"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Error(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    error: Error


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    models: list[str]
