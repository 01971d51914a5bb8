"""What a run will cost, before it costs it: a few real steps on a throw-away copy of the model, and arithmetic.

FLOPs per token follow PaLM (arXiv:2204.02311, appendix B): 6 for each parameter of a matrix product and
12 n_layer n_embd T for attention, backward pass included, the causal half not subtracted. MFU is that rate over the
rate of a large matrix product measured on the same device, not over a data sheet's.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tinygpt.batches import validation_rows
from tinygpt.config import ModelConfig, OptimizerConfig
from tinygpt.loss import next_token_loss
from tinygpt.model import GPT, outline
from tinygpt.optim import make_optimizer

PROBE_FLOPS = 2e11  # larger steps are not run but extrapolated: a second or two on two CPU cores
MICRO_TOKENS = 2**15  # on a CPU: tokens per forward pass
MICRO_LOGITS = 2**28  # on a CPU: logits per forward pass, 1 GiB in float32


@dataclass
class Forecast:
    """What a run will do: counts, bytes, FLOP/s and seconds."""

    parameters: int
    flops_per_token: int
    tokens_per_step: int
    micro_batch_size: int
    steps: int
    step_seconds: float
    validation_seconds: float
    seconds: float
    memory_bytes: int
    peak_flops: float


def flops_per_token(model: GPT) -> int:
    """Training FLOPs per token of a full block."""
    table = 0 if model.config.tie_embeddings else model.wte.weight.numel()  # a look-up is no product
    positions = model.wpe.weight.numel() if model.config.position == "learned" else 0
    config = model.config
    return 6 * (model.num_parameters() - table - positions) + 12 * config.n_layer * config.n_embd * config.block_size


def make_forecast(
    config: ModelConfig,
    vocab_size: int,
    optimizer: OptimizerConfig,
    *,
    share: int,
    world_size: int,
    micro_batch_size: int | None,
    steps: int,
    validations: int,
    validation_windows: int,
    device: torch.device,
    precision: str,
    shards: int = 1,
) -> Forecast:
    """Measure this device and extrapolate. share: sequences per step on one device; shards: devices that the weights are
    divided over, whose exchange is not measured. Leaves the random state alone."""
    shape = outline(config, vocab_size)
    random_state, probe = torch.get_rng_state(), Probe(shape, optimizer, device, precision, shards)
    micro = micro_batch_size or probe.largest_micro_batch(share)
    micro = min(share, micro)
    step = probe.step_seconds(share, micro)
    validation = probe.validation_seconds(step / share) * validation_windows / world_size
    peak, memory = matmul_peak(device, precision), probe.memory(micro)
    torch.set_rng_state(random_state)
    return Forecast(
        parameters=shape.num_parameters(),
        flops_per_token=flops_per_token(shape),
        tokens_per_step=share * world_size * config.block_size,
        micro_batch_size=micro,
        steps=steps,
        step_seconds=step,
        validation_seconds=validation,
        seconds=steps * step + validations * validation,
        memory_bytes=memory,
        peak_flops=peak if device.type == "cpu" else peak * world_size,
    )


class Probe:
    """Throw-away models of one shape on one device, and what they were measured to take."""

    def __init__(
        self, shape: GPT, optimizer: OptimizerConfig, device: torch.device, precision: str, shards: int = 1
    ) -> None:
        """shape: the model on the meta device. Where it is divided over several, no probe makes the whole of it."""
        self.config, self.vocab_size, self.optimizer = shape.config, shape.vocab_size, optimizer
        self.device, self.context, self.shards = device, autocast(device, precision), shards
        self.flops = flops_per_token(shape) * shape.config.block_size  # of one sequence
        self.held = resident_bytes() if device.type == "cpu" else 0  # before the probes add to it
        self.weights = sum(p.numel() * p.element_size() for p in shape.parameters())

    def model(self, n_layer: int | None = None) -> GPT:
        return GPT(replace(self.config, n_layer=n_layer or self.config.n_layer), self.vocab_size).to(self.device)

    def tokens(self, rows: int) -> Tensor:
        return torch.randint(self.vocab_size, (rows, self.config.block_size + 1), device=self.device)

    def largest_micro_batch(self, share: int) -> int:
        """On a GPU, the largest of share, share/2, share/4, ... sequences that fit. On a CPU a rule, not a measurement:
        the same config must cut its batches the same way on every machine."""
        T = self.config.block_size
        if self.device.type != "cuda":
            return max(1, min(share, MICRO_TOKENS // T, MICRO_LOGITS // (T * self.vocab_size)))
        micro = share
        if self.shards > 1:
            room = 0.9 * torch.cuda.get_device_properties(self.device).total_memory
            while micro > 1 and self.memory(micro) > room:
                micro = -(-micro // 2)
            return micro
        while micro > 1:
            try:
                self.try_steps(micro)
                return micro
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                micro = -(-micro // 2)
        return micro

    def try_steps(self, rows: int) -> None:
        """Two steps: in the second, the moments are there beside what the backward pass keeps."""
        model, batch = self.model(), self.tokens(rows)
        updater = make_optimizer(model, self.optimizer)
        for _ in range(2):
            self.take_gradients(model, batch, rows)
            self.update(model, updater)

    def step_seconds(self, share: int, micro: int) -> float:
        """Seconds of one optimizer step. A step too large to try is measured with fewer sequences and with one and two
        layers, and extended along both: time is a line in each. The update is paid once, however many sequences."""
        if self.shards == 1 and (self.device.type != "cpu" or self.flops * share <= PROBE_FLOPS):
            model, batch = self.model(), self.tokens(share)
            updater = make_optimizer(model, self.optimizer)

            def work() -> None:
                self.take_gradients(model, batch, micro)
                self.update(model, updater)
                updater.zero_grad()

            return timed(work, self.device)
        flops = [flops_per_token(self.model(n)) for n in (1, 2)]
        few = max(1, int(PROBE_FLOPS / (flops[1] * self.config.block_size)))
        rows = micro if self.device.type == "cuda" else min(micro, few)
        (one, update), (two, second) = (self.step_parts(n, rows) for n in (1, 2))
        layer = flops[1] / flops[0] - 1
        return share / rows * self.extended(one, two, layer) + self.extended(update, second, layer)

    def step_parts(self, n_layer: int, rows: int) -> tuple[float, float]:
        """Seconds to take the gradients of `rows` sequences, and to update the weights with them."""
        model, batch = self.model(n_layer), self.tokens(rows)
        updater = make_optimizer(model, self.optimizer)
        gradients = timed(lambda: self.take_gradients(model, batch, rows), self.device)
        return gradients, timed(lambda: self.update(model, updater), self.device)

    def extended(self, one: float, two: float, layer: float) -> float:
        """Seconds with all layers, from those with one and with two. layer: the part of `one` that a second should add;
        half of it is taken at least, because what a program beside us takes may hide the second layer."""
        return one + max(two - one, one * layer / 2) * (self.config.n_layer - 1)

    def take_gradients(self, model: GPT, batch: Tensor, micro: int) -> None:
        for part in batch.split(micro):
            with self.context():
                loss = next_token_loss(model, model.features(part[:, :-1]), part[:, 1:], "mean")
            loss.backward()

    def update(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.inference_mode()
    def validation_seconds(self, trained: float) -> float:
        """Seconds to validate one window: measured, or where that is too large to try a third of what it takes to train
        on one, which is `trained`."""
        rows = validation_rows(self.config.block_size, self.vocab_size, self.device.type)
        if self.shards > 1 or (self.device.type == "cpu" and self.flops * rows / 3 > PROBE_FLOPS):
            return trained / 3
        model, batch = self.model(), self.tokens(rows)

        def work() -> Tensor:
            with self.context():
                logits = model(batch[:, :-1]).flatten(0, 1).float()
            nll = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
            correct: Tensor = (logits.argmax(dim=-1) == batch[:, 1:].flatten()).sum()
            return nll + correct

        return timed(work, self.device, budget=0.1) / rows

    def memory(self, micro: int) -> int:
        """Bytes at the peak of a step: weights, gradients, two moments (this device's part of them, and one block whole),
        what the backward pass keeps, the logits twice, and on a CPU what this process holds already."""
        one, two = (self.saved_bytes(self.model(n)) for n in (1, 2))
        saved = one + (two - one) * (self.config.n_layer - 1)
        logits = micro * self.config.block_size * self.vocab_size * 4
        gathered = 0 if self.shards == 1 else self.weights // self.config.n_layer
        return self.held + 4 * self.weights // self.shards + gathered + micro * saved + 2 * logits

    def saved_bytes(self, model: GPT) -> int:
        """Bytes that autograd keeps of one sequence's forward pass."""
        storages: dict[int, int] = {}
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), self.context():
            kept = model(self.tokens(1)[:, :-1])  # alive while counting, so that no address is used twice
        total = sum(storages.values())
        del kept
        return total


def autocast(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    dtypes = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    if precision not in dtypes:
        return nullcontext
    return lambda: torch.autocast(device.type, dtype=dtypes[precision])


def timed(work: Callable[[], object], device: torch.device, budget: float = 0.25) -> float:
    """Seconds of `work`: the median of its repetitions, because a program beside us makes some of them very slow."""
    return statistics.median(repeat(work, device, budget))


def repeat(work: Callable[[], object], device: torch.device, budget: float) -> list[float]:
    """Seconds of each of up to 20 repetitions in `budget` seconds, after one that does not count.

    Five are tried even beyond the budget where that takes no more than five times as long.
    """
    work()
    seconds: list[float] = []
    while not seconds or (sum(seconds) < (budget if len(seconds) >= 5 else 5 * budget) and len(seconds) < 20):
        synchronise(device)
        start = time.perf_counter()
        work()
        synchronise(device)
        seconds.append(time.perf_counter() - start)
    return seconds


def synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def resident_bytes() -> int:
    """The memory that this process holds; where the system does not say, the most that it has held so far."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def matmul_peak(device: torch.device, precision: str) -> float:
    """FLOP/s of a large square matrix product in the precision that training multiplies in."""
    n = 8192 if device.type == "cuda" else 1024
    dtype = {"bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    a = torch.randn(n, n, device=device, dtype=dtype or torch.float32)
    return 2 * n**3 / min(repeat(lambda: a @ a, device, budget=0.1))  # a peak: the best of them
