"""A server of tinygpt's as a process, for the benchmarks that talk to it."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from common import ROOT

from tinygpt.checkpoint import durable_save, make_card
from tinygpt.config import ModelConfig
from tinygpt.corpus import data_dir, gpt2_merges
from tinygpt.model import GPT
from tinygpt.tokenizer import ByteTokenizer, GPT2Tokenizer


def preset(name: str) -> ModelConfig:
    """The shape of conf/model/<name>.yaml."""
    return ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def random_checkpoint(path: Path, shape: str, bytes_only: bool = False) -> None:
    """A model of this shape with its initial weights: how fast it is does not depend on them."""
    torch.manual_seed(0)
    tokenizer = ByteTokenizer() if bytes_only else GPT2Tokenizer.from_merges(gpt2_merges(data_dir(None)))
    model = GPT(preset(shape), tokenizer.vocab_size)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    card = make_card(model, tokenizer, config={}, corpus={})
    durable_save({"state_dict": weights, "tinygpt": card}, path)


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of serve.py."""
    command = [sys.executable, str(ROOT / "serve.py"), "port=0", "playground=false", "gpt2=null", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving"), line + process.stderr.read()
        yield int(line.rsplit(":", 1)[1]), process.pid
    finally:
        process.terminate()
        process.wait()


def resident_megabytes(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024
