"""Which parameters decay, what Muon does to a matrix, and the learning rate at each step."""

import math
from itertools import pairwise

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

from tinygpt.config import ModelConfig, OptimizerConfig
from tinygpt.model import GPT
from tinygpt.optim import Muon, block_matrices, learning_rate, make_optimizer, orthogonalise, param_groups

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
SHAPES = {
    "gpt2": {"bias": True},
    "no biases": {},
    "untied": {"tie_embeddings": False, "bias": True},
    "llama": {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "tie_embeddings": False},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_the_groups_partition_the_parameters(options):
    model = GPT(ModelConfig(**SHAPE, **options), vocab_size=50)
    decayed, kept = (group["params"] for group in param_groups(model.parameters(), 0.1))
    names = {id(p): name for name, p in model.named_parameters()}  # a shared one once
    assert sorted(id(p) for p in [*decayed, *kept]) == sorted(names)
    assert sum(p.numel() for p in [*decayed, *kept]) == model.num_parameters()
    is_vector = {id(p): name.endswith("bias") or "ln_" in name for name, p in zip(names.values(), model.parameters())}  # noqa: B905
    assert all(is_vector[id(p)] for p in kept)
    assert not any(is_vector[id(p)] for p in decayed)


def test_a_frozen_parameter_is_in_no_group():
    model = GPT(ModelConfig(**SHAPE), vocab_size=50)
    model.wpe.weight.requires_grad_(False)
    assert not any(p is model.wpe.weight for group in param_groups(model.parameters(), 0.1) for p in group["params"])


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (24, 8)])
def test_muon_moves_a_matrix_as_torchs_muon_does(shape, monkeypatch):
    # torch's multiplies in bfloat16 always, ours where that is asked for
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    one = Muon([(ours, [shape[0]])], [], muon_lr=0.1, momentum=0.9, muon_weight_decay=0.3)
    other = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.3)
    for _ in range(4):
        before, ours.grad = ours.detach().clone(), torch.randn(shape)
        theirs.grad = ours.grad.clone()
        one.step()
        other.step()
        assert (ours - before).norm() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


@pytest.mark.parametrize("unscaled", [True, False])  # True: to be clipped, as the LightningModule does
@pytest.mark.parametrize("finite", [True, False])
def test_muon_under_a_gradient_scaler(unscaled, finite):
    results = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", enabled=False)):
        torch.manual_seed(0)
        matrix, vector = torch.nn.Parameter(torch.randn(8, 6)), torch.nn.Parameter(torch.randn(6))
        optimizer = Muon([(matrix, [8])], [{"params": [vector], "weight_decay": 0.1}], lr=0.1)
        assert _optimizer_handles_unscaling(optimizer)  # else Lightning unscales what was unscaled to be clipped
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((matrix @ vector).square().sum() * (1.0 if finite or step == 0 else math.inf)).backward()
            if unscaled:
                scaler.unscale_(optimizer)
            if finite or step == 0 or scaler.is_enabled():
                scaler.step(optimizer)
                scaler.update()
        results.append((matrix.detach(), vector.detach()))
    torch.testing.assert_close(results[0], results[1])


def test_newton_schulz_brings_every_singular_value_near_one():
    x = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert 0.6 < values.min() < values.max() < 1.3
    torch.testing.assert_close(orthogonalise(x)[1:2], orthogonalise(x[1:2]))


def test_muon_takes_the_joined_matrices_apart():
    torch.manual_seed(0)
    joined = torch.nn.Parameter(torch.zeros(24, 8))
    parts = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(3)]
    joined.grad = torch.randn(24, 8)
    for part, gradient in zip(parts, joined.grad.split(8), strict=True):
        part.grad = gradient.clone()
    Muon([(joined, [8, 8, 8])], []).step()
    Muon([(part, [8]) for part in parts], []).step()
    torch.testing.assert_close(joined.detach(), torch.cat([part.detach() for part in parts]))


@pytest.mark.parametrize("options", [*SHAPES.values(), {"n_kv_head": 1, "mlp": "relu2"}], ids=[*SHAPES, "grouped"])
def test_with_muon_every_parameter_is_updated_once_by_one_rule(options):
    model = GPT(ModelConfig(**SHAPE, **options), vocab_size=50)
    optimizer = make_optimizer(model, OptimizerConfig(name="muon", muon_lr=0.02, lr=0.001))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    matrices = block_matrices(model)
    assert len(matrices) == 4 * SHAPE["n_layer"]
    assert all(sum(rows) == weight.shape[0] for weight, rows in matrices)
    assert optimizer.param_groups[0]["lr_ratio"] == pytest.approx(20)
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.randint(50, (2, 16))).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))


def test_adamw_takes_what_the_config_says():
    model = GPT(ModelConfig(**SHAPE), vocab_size=50)
    config = OptimizerConfig(lr=0.02, betas=[0.8, 0.95], eps=1e-6, weight_decay=0.3)
    optimizer = make_optimizer(model, config)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.02, (0.8, 0.95), 1e-6)


def test_decay_alone_shrinks_the_matrices_and_leaves_the_vectors():
    model = GPT(ModelConfig(**SHAPE, bias=True), vocab_size=50)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    make_optimizer(model, OptimizerConfig(lr=0.1, weight_decay=0.5)).step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.dim() == 2 else 1.0))


def rate(step, **options):
    return learning_rate(step, 1000, OptimizerConfig(lr=2.0, **options))


def test_warm_up_is_a_line_that_begins_above_zero():
    rates = [rate(step, warmup_steps=100, schedule="constant") for step in range(102)]
    assert rates[0] == pytest.approx(2 / 101)
    assert rates[49] == pytest.approx(2 * 50 / 101)
    assert rates[99] == pytest.approx(2 * 100 / 101)
    assert rates[100] == rates[101] == 2.0


def test_cosine():
    options = {"warmup_steps": 100, "min_lr_ratio": 0.1, "schedule": "cosine"}
    assert rate(0, **options) == pytest.approx(2 / 101)
    assert rate(100, **options) == 2.0
    assert rate(325, **options) == pytest.approx(0.2 + 1.8 * (2 + math.sqrt(2)) / 4)  # a quarter of the way
    assert rate(550, **options) == pytest.approx(1.1)  # half-way between 2.0 and 0.2
    assert rate(1000, **options) == pytest.approx(0.2)
    assert rate(5000, **options) == pytest.approx(0.2)  # never rises again


def test_wsd_is_flat_and_then_a_line():
    options = {"warmup_steps": 100, "min_lr_ratio": 0.1, "decay_fraction": 0.2, "schedule": "wsd"}
    assert rate(0, **options) == pytest.approx(2 / 101)
    assert [rate(step, **options) for step in (100, 500, 800)] == [2.0, 2.0, 2.0]
    assert rate(850, **options) == pytest.approx(1.55)
    assert rate(900, **options) == pytest.approx(1.1)
    assert rate(1000, **options) == pytest.approx(0.2)


def test_wsd_whose_descent_would_begin_before_the_warm_up_ends_waits_for_it():
    options = {"warmup_steps": 600, "min_lr_ratio": 0.0, "decay_fraction": 0.9, "schedule": "wsd"}
    assert rate(600, **options) == pytest.approx(2.0)
    assert rate(800, **options) == pytest.approx(1.0)


def test_one_cycle():
    options = {"rise_fraction": 0.3, "min_lr_ratio": 0.01, "schedule": "onecycle"}
    assert rate(0, **options) == pytest.approx(2 / 25)
    assert rate(150, **options) == pytest.approx((2 + 2 / 25) / 2)
    assert rate(300, **options) == pytest.approx(2.0)
    assert rate(650, **options) == pytest.approx(1.01)
    assert rate(1000, **options) == pytest.approx(0.02)


def test_constant():
    assert [rate(step, warmup_steps=0, schedule="constant") for step in (0, 500, 1000)] == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "onecycle", "constant"])
@pytest.mark.parametrize("total", [1, 2, 7, 300])
@pytest.mark.parametrize("warmup", [0, 1, 5, 100, 10_000])
def test_up_and_then_down_within_bounds_whatever_the_lengths(schedule, total, warmup):
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.1)
    rates = [learning_rate(step, total, config) for step in range(total)]
    peak = rates.index(max(rates))
    assert all(a <= b + 1e-12 for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(rates[peak:]))
    assert all(0 < value <= 1 for value in rates)


def test_a_warm_up_longer_than_the_run_is_as_long_as_the_run():
    config = OptimizerConfig(lr=1.0, warmup_steps=100)
    assert [learning_rate(step, 4, config) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
