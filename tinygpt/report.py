"""What a run says of itself: the forecast before it, summary.json and the closing panel after it."""

import errno
import logging
import math
import os
import platform
import resource
import shlex
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from tinygpt import __version__
from tinygpt.callbacks import BestCheckpoint
from tinygpt.checkpoint import load_for_text
from tinygpt.config import TrainConfig
from tinygpt.forecast import Forecast
from tinygpt.generate import generate, opening
from tinygpt.lit import LitGPT
from tinygpt.progress import Throughput
from tinygpt.shards import Prepared
from tinygpt.summary import from_here, read_summary, store_summary
from tinygpt.synthetic import Source

log = logging.getLogger(__name__)

SAMPLE_TOKENS = 300


@dataclass
class Outcome:
    """A run while it is going and when it is over."""

    config: TrainConfig
    run_dir: Path
    overrides: list[str]
    prepared: Prepared
    forecast: Forecast
    trainer: L.Trainer
    module: LitGPT
    throughput: Throughput
    start: float = field(default_factory=time.perf_counter)

    def best(self) -> dict[str, Any]:
        """Loss and step of the best validation; the last one where no best checkpoint is kept."""
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, BestCheckpoint):
                return {"loss": callback.loss, "step": callback.step, **callback.metrics}
        return {"step": self.trainer.global_step, **self.module.val_metrics}

    def best_loss(self) -> float:
        return float(self.best().get("loss", math.inf))


def say_forecast(forecast: Forecast, epochs: float, config: TrainConfig, prepared: Prepared, file: TextIO) -> None:
    """Parameters, FLOPs, memory, tokens, steps and time, one line each; the same in train.log."""
    bound = {"entropy": f"{entropy:.4f} nats: no loss can be lower"} if (entropy := known_entropy(config)) else {}
    lines = {
        "corpus": f"{prepared.corpus}: {len(prepared.train):,} training and {len(prepared.val):,} validation tokens, "
        f"{prepared.tokenizer.kind} vocabulary of {prepared.tokenizer.vocab_size:,}",
        **bound,
        "parameters": f"{forecast.parameters:,}",
        "FLOPs per token": f"{forecast.flops_per_token:,}",
        "tokens per step": f"{forecast.tokens_per_step:,} ({config.data.global_batch_size} sequences, "
        f"{forecast.micro_batch_size} at a time)",
        "steps": f"{forecast.steps:,} ({forecast.steps * forecast.tokens_per_step:,} tokens, {epochs:.2f} epochs)",
        "memory": f"about {forecast.memory_bytes / 2**20:,.0f} MiB",
        "time": f"about {duration(forecast.seconds)} ({forecast.tokens_per_step / forecast.step_seconds:,.0f} tokens/s)",
    }
    for name, value in lines.items():
        print(f"{name:>16}  {value}", file=file)
        log.info("%s: %s", name, value)


def known_entropy(config: TrainConfig) -> float | None:
    """Nats a token of a source that tinygpt has made itself."""
    return Source.of(config.data).entropy if config.data.corpus == "synthetic" else None


def duration(seconds: float) -> str:
    """Seconds in the words of the largest two units that fit."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    units = ((86400 * 365, "y"), (86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
    first = next(i for i, (size, _) in enumerate(units) if seconds >= size)
    (big, big_name), (small, small_name) = units[first], units[min(first + 1, len(units) - 1)]
    whole = int(seconds // big)
    return f"{whole} {big_name} {int((seconds - whole * big) // small)} {small_name}"


def write_summary(outcome: Outcome, status: str) -> None:
    """summary.json, whole or not at all."""
    steps, tokens_per_step = outcome.trainer.global_step, outcome.forecast.tokens_per_step
    training_seconds = outcome.throughput.seconds()
    rate = (steps - outcome.throughput.first_step) * tokens_per_step / training_seconds if training_seconds else None
    val, best = outcome.module.val_metrics, outcome.best()
    checkpoint = outcome.run_dir / "checkpoints" / "best.ckpt"
    summary = {
        "status": status,
        "steps": steps,
        "tokens": steps * tokens_per_step,
        "seconds": round(time.perf_counter() - outcome.start, 3),
        "tokens_per_second": rate and round(rate, 1),
        "mfu": rate and round(rate * outcome.forecast.flops_per_token / outcome.forecast.peak_flops, 4),
        "parameters": outcome.forecast.parameters,
        "val_loss": val.get("loss"),
        "best_val_loss": best.get("loss"),
        "best_step": best["step"],
        "val_bits_per_byte": val.get("bits_per_byte"),
        "val_perplexity": val.get("perplexity"),
        "val_accuracy": val.get("accuracy"),
        "checkpoint": str(checkpoint) if checkpoint.exists() else None,
        "seed": outcome.config.seed,
        "corpus": {"name": outcome.prepared.corpus, "sha256": outcome.prepared.sha256},
        **({"entropy": entropy} if (entropy := known_entropy(outcome.config)) else {}),
        "forecast": {
            "seconds": round(outcome.forecast.seconds, 3),
            "step_seconds": outcome.forecast.step_seconds,
            "memory_bytes": outcome.forecast.memory_bytes,
        },
        "peak_memory_bytes": peak_memory(outcome.trainer),
        "versions": versions(),
        "overrides": outcome.overrides,
    }
    store_summary(outcome.run_dir, summary)
    loss = "none yet" if best.get("loss") is None else f"{best['loss']:.4f}"
    log.info("%s after %d steps and %.1f s; best validation loss %s", status, steps, summary["seconds"], loss)


def peak_memory(trainer: L.Trainer) -> int:
    """Bytes: of the device on CUDA, else of this process."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    names = ("torch", "lightning", "hydra-core")
    return {"tinygpt": __version__, "python": platform.python_version(), **{name: version(name) for name in names}}


def print_result(outcome: Outcome) -> None:
    """The closing panel and a sample, on stdout."""
    summary, best = read_summary(outcome.run_dir), outcome.best()
    if not summary:  # the folder has gone at the last moment
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(outcome.run_dir / "summary.json"))
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # a path that is cut short is of no use
    table.add_row("best val loss", f"{best['loss']:.4f} at step {best['step']}")
    if entropy := summary.get("entropy"):
        table.add_row("entropy", f"{entropy:.4f}, which the loss is {best['loss'] / entropy - 1:.2%} above")
    table.add_row("perplexity", f"{math.exp(min(700.0, best['loss'])):.3f}")
    if best.get("bits_per_byte") is not None:
        table.add_row("bits per byte", f"{best['bits_per_byte']:.4f}")
    if summary["tokens_per_second"]:
        table.add_row("speed", f"{summary['tokens_per_second']:,.0f} tokens/s, MFU {summary['mfu']:.1%}")
    table.add_row("time", f"{duration(summary['seconds'])} (forecast {duration(outcome.forecast.seconds)})")
    table.add_row("run", from_here(outcome.run_dir))
    console = Console(file=sys.stdout, soft_wrap=True)
    if summary["checkpoint"]:
        table.add_row("checkpoint", from_here(Path(summary["checkpoint"])))
    console.print(Panel(table, title=outcome.prepared.corpus, expand=False))
    if summary["checkpoint"]:
        model, tokenizer = load_for_text(summary["checkpoint"])
        prompt = opening("\n", tokenizer)
        print(generate(model, tokenizer, prompt, max_new_tokens=SAMPLE_TOKENS, temperature=0.8, seed=1).strip("\n"))
        print(f"\nmore: python sample.py ckpt={shlex.quote(from_here(Path(summary['checkpoint'])))}")
