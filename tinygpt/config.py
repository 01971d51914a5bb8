"""Every setting that tinygpt owns, as dataclasses: one documented default per field, standard library only.

A value that no run could use is refused here, when the config is built, with the name of the key in the message. What
depends on two settings is checked in `__post_init__`. Arguments of `L.Trainer`, of callbacks and of loggers are theirs:
they stay plain dictionaries.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinygpt.kinds import describe, fits

BUDGETS = ("max_steps", "max_tokens", "max_epochs")


class UserError(ValueError):
    """Something that the user can put right: the scripts print `error: MESSAGE`, then the hint, and exit with 2."""

    code = 2

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def option(default: Any, help: str, **limits: Any) -> Any:
    """A field with its meaning and the limits that `check` holds it to: choices=, ge= (at least), gt= (above), le=, lt=."""
    metadata = {"help": help, **limits}
    if isinstance(default, list | dict) or dataclasses.is_dataclass(default):
        return field(default_factory=lambda: _fresh(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _fresh(default: Any) -> Any:
    return default() if isinstance(default, type) else default.copy()


def group(kind: type, help: str) -> Any:
    """A field that holds a whole group of settings."""
    return field(default_factory=kind, metadata={"help": help})


_TESTS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", lambda value, limit: value >= limit),
    "gt": ("above", lambda value, limit: value > limit),
    "le": ("at most", lambda value, limit: value <= limit),
    "lt": ("below", lambda value, limit: value < limit),
}


def check(config: Any, prefix: str) -> None:
    """Raise UserError where a field of `config` (a dataclass instance) is not of its type, or outside the limits that it
    declares."""
    for item in dataclasses.fields(config):
        value, limits, name = getattr(config, item.name), item.metadata, f"{prefix}{item.name}"
        if not fits(value, item.type):
            raise UserError(f"{name}={shorten(value)} is not {describe(item.type)}", "see --help for its meaning")
        if "choices" in limits and value not in (*limits["choices"], None):
            raise UserError(f"{name}={value} is not known", f"choose one of: {', '.join(limits['choices'])}")
        if isinstance(value, int | float) and not _in_range(value, limits):
            words = [f"{_TESTS[key][0]} {limits[key]}" for key in _TESTS if key in limits] or ["a finite number"]
            raise UserError(f"{name}={value} is out of range", f"{name} must be {' and '.join(words)}")


def _in_range(value: float, limits: Mapping[str, Any]) -> bool:
    finite = isinstance(value, int) or math.isfinite(value)
    return finite and all(holds(value, limits[key]) for key, (_, holds) in _TESTS.items() if key in limits)


def shorten(value: Any) -> str:
    """A value that came from outside, fit for one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."


@dataclass
class ModelConfig:
    """The shape of a decoder-only transformer. The vocabulary is not in it: that comes from the tokenizer."""

    n_layer: int = option(4, "number of transformer blocks", ge=1, le=1000)
    n_head: int = option(4, "attention heads in each block", ge=1, le=2**16)
    n_embd: int = option(128, "width of the residual stream", ge=1, le=2**20)
    block_size: int = option(64, "longest context, in tokens", ge=1, le=2**24)
    n_kv_head: int | None = option(None, "key/value heads (grouped-query attention); null: n_head", ge=1, le=2**16)
    n_inner: int | None = option(
        None, "width inside the MLP; null: 4 n_embd, for swiglu 8/3 n_embd up to a multiple of 32", ge=1, le=2**22
    )
    norm: str = option("layernorm", "normalisation", choices=("layernorm", "rmsnorm"))
    norm_eps: float = option(1e-5, "added to the variance in every norm", gt=0)
    position: str = option("learned", "positions: a table, or rotations of queries and keys", choices=("learned", "rope"))
    rope_theta: float = option(10000.0, "base wavelength of the rotations", gt=0)
    mlp: str = option("gelu", "MLP activation", choices=("gelu", "gelu_tanh", "swiglu", "relu2"))
    qk_norm: bool = option(False, "normalise each head's queries and keys (RMS, no weights)")
    bias: bool = option(False, "biases in linear layers and layer norms")
    tie_embeddings: bool = option(True, "the output head shares the token embedding's weights")
    dropout: float = option(0.0, "dropout on embeddings, attention and residuals", ge=0, lt=1)
    logit_softcap: float | None = option(None, "c: logits become c tanh(logits / c); null: off", gt=0)
    init: str = option(
        "gpt2",
        "gpt2: normal(0.02), residual projections scaled by 1/sqrt(2 n_layer); normal: normal(0.02) everywhere; "
        "zero_proj: 1/sqrt(fan-in), residual projections at zero",
        choices=("gpt2", "normal", "zero_proj"),
    )

    def __post_init__(self) -> None:
        check(self, "model.")
        if self.n_embd % self.n_head:
            below, above = self.n_embd // self.n_head * self.n_head, -(-self.n_embd // self.n_head) * self.n_head
            near = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"model.n_embd={self.n_embd} does not divide by model.n_head={self.n_head}",
                f"every head needs the same width: try model.n_embd={near}, or another n_head",
            )
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise UserError(
                f"model.n_head={self.n_head} does not divide by model.n_kv_head={self.n_kv_head}",
                "every key/value head serves the same number of query heads",
            )
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(
                f"model.position=rope needs an even head width, and n_embd / n_head is {self.head_dim}",
                "change model.n_embd or model.n_head",
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


@dataclass
class TokenizerConfig:
    """How text becomes tokens."""

    kind: str = option("char", "the tokenizer", choices=("char", "byte", "word", "gpt2", "bpe"))
    vocab_size: int = option(1024, "bpe: number of tokens to learn, the 256 bytes included", ge=256, le=2**24)
    min_frequency: int = option(2, "word: rarer words become <unk>", ge=1)
    specials: list[str] = option([], "word: entries of the vocabulary beside <unk> that no text has, such as <pad>")

    def __post_init__(self) -> None:
        check(self, "data.tokenizer.")
        for special in self.specials:
            if not re.fullmatch(r"<\w+>", special) or special == "<unk>" or self.specials.count(special) > 1:
                raise UserError(
                    f"data.tokenizer.specials={self.specials}: {special!r} cannot be one",
                    "each is a name of its own in angle brackets, such as <pad>; <unk> is there already",
                )


CORPORA = ("pydocs", "shakespeare", "books", "imdb", "text", "hf", "synthetic")
OF_DOCUMENTS = ("imdb", "hf")  # the corpora that know where each of their documents begins


@dataclass
class DataConfig:
    """Which text, which tokens, which batches."""

    corpus: str = option("pydocs", "where the text comes from", choices=CORPORA)
    path: str | None = option(
        None,
        "corpus=text: a file, a folder or a glob (.gz and .xz are unpacked); "
        "corpus=hf: a data set of the Hugging Face hub, or a folder of parquet or JSON-lines files",
    )
    subset: str | None = option(None, "hf: the configuration of the data set, where it has several")
    revision: str | None = option(None, "hf: a branch, tag or commit of the data set; null: its newest")
    hf_split: str = option("train", "hf: which of the data set's own splits is read")
    column: str = option("text", "hf: the column that holds the text")
    synthetic_symbols: int = option(8, "synthetic: letters of the source", ge=2, le=27)
    synthetic_order: int = option(2, "synthetic: how many letters the next one depends on", ge=1, le=3)
    synthetic_length: int = option(1_000_000, "synthetic: letters of the text", ge=100)
    synthetic_seed: int = option(0, "synthetic: which source", ge=0, lt=2**63)
    max_documents: int | None = option(None, "hf: read the first so many documents; null: all", ge=1)
    tokenizer: TokenizerConfig = group(TokenizerConfig, "how text becomes tokens")
    clean: bool = option(False, "imdb: lower case; tags and every character but a-z and white space deleted")
    val_fraction: float = option(
        0.1,
        "the part kept for validation: the last of the text but for the test's; hf: by a hash of each document",
        gt=0,
        lt=1,
    )
    test_fraction: float = option(0.0, "the part kept for evaluate.py split=test: the very last of the text", ge=0, lt=1)
    val_tokens: int | None = option(None, "validate on the first so many tokens; null: the whole split", ge=2)
    layout: str = option(
        "stream",
        "what a sequence is: a window of the joined text | a window, attention and positions kept inside each document | "
        "the beginning of one document, padded",
        choices=("stream", "packed", "padded"),
    )
    global_batch_size: int = option(12, "sequences per optimizer step, over all devices", ge=1, le=2**24)
    micro_batch_size: int | None = option(
        None, "sequences per forward pass on one device; null: found for you", ge=1, le=2**24
    )
    num_workers: int = option(0, "processes that load batches; 0: the training process itself", ge=0, le=1024)

    def __post_init__(self) -> None:
        check(self, "data.")
        self._check_place()
        if self.val_fraction + self.test_fraction >= 1:
            raise UserError(
                f"data.val_fraction={self.val_fraction} and data.test_fraction={self.test_fraction} leave no training text",
                "together they must stay below 1",
            )
        if self.clean and self.corpus != "imdb":
            raise UserError(f"data.clean has no meaning for the corpus {self.corpus}", "it is the cleaning of data=imdb")
        if self.layout != "stream" and self.corpus not in OF_DOCUMENTS:
            raise UserError(
                f"data.layout={self.layout} needs documents, and the corpus {self.corpus} is one running text",
                f"use data.layout=stream, or a corpus of documents: {', '.join(OF_DOCUMENTS)}",
            )

    def _check_place(self) -> None:
        if self.corpus in _PLACES and not self.path:
            raise UserError(f"data={self.corpus} needs data.path", _PLACES[self.corpus])
        if self.corpus not in _PLACES and self.path:
            raise UserError(
                f"data.path has no meaning for the corpus {self.corpus}", "say data=text to train on your own text"
            )
        for name in ("subset", "revision", "max_documents"):
            if self.corpus != "hf" and getattr(self, name) is not None:
                raise UserError(f"data.{name} has no meaning for the corpus {self.corpus}", "it is for data=hf")


_PLACES = {
    "text": "give a file, a folder or a glob: data.path=my.txt",
    "hf": "give a data set of the hub, or a folder: data.path=roneneldan/TinyStories",
}


@dataclass
class OptimizerConfig:
    """The update rule and the learning rate over the run."""

    name: str = option("adamw", "the update rule; muon: Muon for the blocks' matrices", choices=("adamw", "muon"))
    lr: float = option(1e-3, "peak learning rate", gt=0)
    betas: list[float] = option([0.9, 0.99], "decay of the two running moments")
    eps: float = option(1e-8, "added to the denominator", gt=0)
    muon_lr: float = option(0.02, "muon: peak learning rate of the matrices; lr is that of all else", gt=0)
    muon_momentum: float = option(0.95, "muon: decay of the gradients' running mean", ge=0, lt=1)
    muon_weight_decay: float = option(0.0, "muon: decay of the matrices", ge=0)
    weight_decay: float = option(0.1, "decay of matrices and embeddings; vectors are never decayed", ge=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0: no clipping", ge=0)
    schedule: str = option(
        "cosine",
        "learning rate after the warm-up: half a cosine | flat, then a linear descent (WSD) | one cycle | flat",
        choices=("cosine", "wsd", "onecycle", "constant"),
    )
    warmup_steps: int = option(100, "steps of linear warm-up (onecycle: see rise_fraction)", ge=0)
    min_lr_ratio: float = option(0.1, "learning rate at the end, as a fraction of lr", ge=0, le=1)
    decay_fraction: float = option(0.2, "wsd: the last part of the run, where the learning rate falls", gt=0, le=1)
    rise_fraction: float = option(0.3, "onecycle: the first part of the run, where the learning rate rises", gt=0, lt=1)

    def __post_init__(self) -> None:
        check(self, "optimizer.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"optimizer.betas={self.betas} must be two numbers in [0, 1)", "for example [0.9, 0.95]")


@dataclass
class SweepConfig:
    """Several runs: what -m makes of the values that it is given."""

    method: str = option("grid", "every combination | a search by Optuna", choices=("grid", "optuna"))
    trials: int = option(20, "optuna: how many settings are tried", ge=1)
    seed: int = option(0, "optuna: decides what is tried", ge=0, lt=2**32)
    startup_trials: int = option(
        5, "optuna: so many are drawn by chance and trained to their end, as something to go by", ge=1
    )
    prune: bool = option(True, "optuna: end a trial whose best validation loss is above the others' median at that step")
    prune_after: int = option(1, "optuna: the first step at which a trial may be ended", ge=1)
    parallel: int = option(1, "optuna: trials begun together, for a launcher that runs several side by side", ge=1)

    def __post_init__(self) -> None:
        check(self, "sweep.")


@dataclass
class TrainConfig:
    """One training run."""

    model: ModelConfig = group(ModelConfig, "the shape of the GPT")
    data: DataConfig = group(DataConfig, "text, tokens and batches")
    optimizer: OptimizerConfig = group(OptimizerConfig, "update rule and learning rate")
    trainer: dict[str, Any] = option(
        {}, "the budget (exactly one of max_steps, max_tokens, max_epochs) and any argument of lightning.Trainer"
    )
    logger: dict[str, Any] = option({}, "Lightning loggers, by name")
    callbacks: dict[str, Any] = option({}, "Lightning callbacks, by name")
    sweep: SweepConfig = group(SweepConfig, "several runs with -m: every combination, or a search")
    allow_targets: list[str] = option(
        [],
        "packages beside lightning, tinygpt, torchmetrics and torch's nn, optim, profiler and distributed.fsdp that a "
        "_target_ may name; on the command line only",
    )
    seed: int = option(1337, "decides initial weights, batches and dropout", ge=0, lt=2**63)
    matmul_precision: str = option(
        "high",
        "products of float32: exact | TF32 on a GPU | bfloat16 | bfloat16 where there are units for it, else high",
        choices=("highest", "high", "medium", "fastest"),
    )
    compile: bool = option(False, "compile the model with torch.compile (for GPUs: on CPUs it was slower)")
    resume: str | None = option(None, "auto, or a checkpoint or run directory to continue from")
    init_from: str | None = option(None, "weights (with shape and tokenizer) to start from: whatever ckpt= may be")
    skip_nonfinite: int = option(
        0, "so many steps whose loss or gradient is not finite are skipped; one more, and the run stops", ge=0
    )
    stop_at_loss: float | None = option(None, "end when the training or validation loss reaches this", gt=0)
    dry_run: bool = option(False, "print the forecast and stop")
    verify_resume: bool = option(
        False, "train twice, kill the second run at a step by chance, resume it, and compare: the proof that it is the same"
    )
    data_dir: str | None = option(None, "where corpora live; null: $TINYGPT_DATA_DIR, else data/")
    cache_dir: str | None = option(None, "where tokens are kept; null: $TINYGPT_CACHE_DIR, else data/cache")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")
        self.logger, self.callbacks = without_null(self.logger), without_null(self.callbacks)
        for name, instead in REFUSED_TRAINER_ARGUMENTS.items():
            if self.trainer.get(name) is not None:
                raise UserError(f"trainer.{name} is not used here", f"say {instead}")
        given = [name for name in BUDGETS if self.trainer.get(name) is not None]
        if len(given) != 1:
            raise UserError(
                f"the run needs exactly one budget, and has {' and '.join(given) or 'none'}",
                "set one of trainer.max_steps, trainer.max_tokens, trainer.max_epochs",
            )
        refuse_budget(given[0], self.trainer[given[0]])


def refuse_budget(name: str, value: Any) -> None:
    """UserError for a budget that no run could have; only epochs may be parts of a whole."""
    if not fits(value, float) or not 0 < value <= 2**53 or (name != "max_epochs" and value != int(value)):
        kind = "number" if name == "max_epochs" else "whole number"
        raise UserError(f"trainer.{name}={shorten(value)} is out of range", f"it must be a {kind} above 0 and at most 2^53")


def without_null(nodes: dict[str, Any]) -> dict[str, Any]:
    """callbacks.samples=null leaves that one out."""
    return {name: node for name, node in nodes.items() if node is not None}


REFUSED_TRAINER_ARGUMENTS = {
    "accumulate_grad_batches": "data.micro_batch_size=N (sequences per forward pass; data.global_batch_size stays true)",
    "gradient_clip_val": "optimizer.grad_clip=X",
    "gradient_clip_algorithm": "optimizer.grad_clip=X (the norm is clipped)",
}


DTYPES = ("fp32", "bf16", "int8")
DTYPE_HELP = "the weights: as trained | half the bytes | matrices as 8-bit integers; each writes faster than the one before"

CKPT = "a .ckpt file, a run directory, latest, an exported directory, hf:NAME or hf:DIR"


@dataclass
class PrepareConfig:
    """A corpus as tokens, ahead of the training that will find them."""

    data: DataConfig = group(DataConfig, "text and tokens")
    data_dir: str | None = option(None, "where corpora live; null: $TINYGPT_DATA_DIR, else data/")
    cache_dir: str | None = option(None, "where tokens are kept; null: $TINYGPT_CACHE_DIR, else data/cache")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")


@dataclass
class SampleConfig:
    """Text from a checkpoint."""

    ckpt: str = option("latest", CKPT)
    prompt: str = option("\n", "the text to continue; @FILE reads a file, - standard input")
    num_samples: int = option(1, "how many continuations", ge=1, le=2**16)
    max_new_tokens: int = option(256, "how many tokens each", ge=1)
    temperature: float = option(0.8, "0: always the likeliest token; above 1: wilder", ge=0, le=10**6)
    top_k: int | None = option(None, "draw from the k likeliest tokens only", ge=1)
    top_p: float | None = option(None, "draw from the likeliest tokens that together reach probability p", gt=0, le=1)
    min_p: float | None = option(None, "drop tokens less likely than min_p times the likeliest", ge=0, le=1)
    repetition_penalty: float = option(1.0, "above 1: tokens already seen become less likely", gt=0, le=10**6)
    stop: list[str] = option([], r"end a sample before any of these strings; \n, \t and \\ are decoded")
    seed: int | None = option(None, "the same seed draws the same text; null: a new one each time", ge=0, lt=2**63)
    interactive: bool = option(False, "a >> prompt that streams; quit or Ctrl-D ends it")
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("fp32", DTYPE_HELP, choices=DTYPES)
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")


@dataclass
class EvaluateConfig:
    """The loss of a checkpoint on a text."""

    ckpt: str = option("latest", CKPT)
    split: str = option("val", "which part of the corpus", choices=("train", "val", "test", "all"))
    rows: str = option(
        "windows",
        "every token once, in windows of block_size | the first block_size tokens of each document",
        choices=("windows", "openings"),
    )
    data: DataConfig | None = option(None, "another text (data=text data.path=...); null: the checkpoint's own corpus")
    batch_size: int | None = option(None, "windows per forward pass; null: found for you", ge=1, le=2**16)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("fp32", DTYPE_HELP, choices=DTYPES)
    data_dir: str | None = option(None, "where corpora live; null: $TINYGPT_DATA_DIR, else data/")
    cache_dir: str | None = option(None, "where tokens are kept; null: $TINYGPT_CACHE_DIR, else data/cache")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")


@dataclass
class ServeConfig:
    """Models over HTTP, and the playground."""

    ckpt: str = option("latest", f"{CKPT}; served as `custom`; or several: {{name:path,other:path}}")
    gpt2: str | None = option("hf:gpt2", "what the model `gpt2` is loaded from on its first use; null: no such model")
    host: str = option("127.0.0.1", "the address to listen at; 0.0.0.0: every one of this machine")
    port: int = option(8000, "the port to listen at; 0: a free one", ge=0, lt=65536)
    api_key: str | None = option(None, "what clients must send as a bearer token; null: $TINYGPT_API_KEY, else none")
    cors: list[str] = option([], "origins whose web pages may call the API, such as https://example.org")
    playground: bool = option(True, "the web page at /")
    browser: bool = option(False, "open that page in a web browser, where there is a screen")
    max_batch: int = option(32, "texts written at once by each model; more wait", ge=1, le=2**16)
    max_waiting: int = option(256, "texts that may wait for each model; more are refused with 429", ge=1)
    max_prompt_tokens: int = option(16384, "tokens of one prompt; the model reads the last block_size", ge=1)
    max_new_tokens: int = option(4096, "new tokens of one text", ge=1)
    max_body_bytes: int = option(2**20, "bytes of one request", ge=1024)
    timeout: float = option(30.0, "seconds that a request may take to arrive", gt=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("fp32", DTYPE_HELP, choices=DTYPES)
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")


@dataclass
class ExportConfig:
    """The weights of a checkpoint as a directory for other programs."""

    ckpt: str = option("latest", CKPT)
    format: str = option(
        "hf",
        "hf: what transformers and vLLM load (GPT-2 or Llama) | safetensors: any model, for tinygpt",
        choices=("hf", "safetensors"),
    )
    out: str | None = option(None, "the directory to write; an earlier export there is replaced")
    overwrite: bool = option(False, "replace the directory whatever it holds")
    debug: bool = option(False, "show the traceback of an error")

    def __post_init__(self) -> None:
        check(self, "")


def inner_schema(item: dataclasses.Field[Any]) -> type | None:
    """The dataclass that a field holds, also where it may be null."""
    for kind in getattr(item.type, "__args__", (item.type,)):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def from_dict(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass `kind` from plain nested dictionaries, as `dataclasses.asdict` makes them."""
    inner = {item.name: inner_schema(item) for item in dataclasses.fields(kind)}
    return kind(**{name: _nested(inner.get(name), value) for name, value in values.items()})


def _nested(kind: type | None, value: Any) -> Any:
    return from_dict(kind, value) if kind and isinstance(value, dict) else value


def unescape(text: str) -> str:
    r"""\n, \t and \\ in a value of the command line become a newline, a tab and a backslash; other backslashes stay."""
    return re.sub(r"\\([nt\\])", lambda match: {"n": "\n", "t": "\t", "\\": "\\"}[match[1]], text)


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """A hint that names the key that was probably meant."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{close[0]}?" if close else "known: " + ", ".join(f"{prefix}{k}" for k in known)


def all_keys(kind: type, prefix: str = "") -> list[str]:
    """Every key of a schema, dotted."""
    keys = []
    for item in dataclasses.fields(kind):
        keys.append(f"{prefix}{item.name}")
        if inner := inner_schema(item):
            keys += all_keys(inner, f"{prefix}{item.name}.")
    return keys
