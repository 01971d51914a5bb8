"""The forecast: FLOPs by hand, the rule for micro-batches, memory that grows as it should. No times are asserted."""

import pytest
import torch

from tinygpt.config import ModelConfig, OptimizerConfig
from tinygpt.forecast import MICRO_LOGITS, MICRO_TOKENS, Probe, flops_per_token, make_forecast, matmul_peak
from tinygpt.model import GPT
from tinygpt.report import duration

CPU = torch.device("cpu")
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8}


def probe(vocab_size=50, shards=1, **options):
    with torch.device("meta"):
        outline = GPT(ModelConfig(**{**SHAPE, **options}), vocab_size)
    return Probe(outline, OptimizerConfig(), CPU, "32-true", shards)


def forecast(share=6, world_size=1, micro_batch_size=None, steps=10, **options):
    return make_forecast(
        ModelConfig(**{**SHAPE, **options}),
        50,
        OptimizerConfig(),
        share=share,
        world_size=world_size,
        micro_batch_size=micro_batch_size,
        steps=steps,
        validations=3,
        validation_windows=7,
        device=CPU,
        precision="32-true",
    )


def test_flops_of_gpt2_by_hand():
    # A layer multiplies by 12 C^2 weights: 4 C^2 in attention, 8 C^2 in the MLP; norms have two vectors of C each.
    model = GPT(ModelConfig(**SHAPE), 50)
    C, layers, T, V = 16, 2, 8, 50
    products = layers * 12 * C * C + V * C  # the tied table is the output head's product
    norms = (2 * layers + 1) * C
    assert flops_per_token(model) == 6 * (products + norms) + 12 * layers * C * T


def test_tying_the_embeddings_saves_memory_and_no_flops():
    tied, untied = (GPT(ModelConfig(**SHAPE, tie_embeddings=tie), 50) for tie in (True, False))
    assert flops_per_token(tied) == flops_per_token(untied)
    assert untied.num_parameters() - tied.num_parameters() == 50 * 16


def test_rotations_cost_no_look_up():
    learned, rope = GPT(ModelConfig(**SHAPE), 50), GPT(ModelConfig(**SHAPE, position="rope"), 50)
    assert flops_per_token(learned) == flops_per_token(rope)


def test_gpt2_small_has_its_124_million_parameters():
    shape = ModelConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, bias=True)
    with torch.device("meta"):
        model = GPT(shape, 50257)
    assert model.num_parameters() == 124_439_808
    assert flops_per_token(model) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


def test_the_counts_of_a_forecast():
    found = forecast(share=6, world_size=2, steps=10)
    assert found.parameters == GPT(ModelConfig(**SHAPE), 50).num_parameters()
    assert found.flops_per_token == flops_per_token(GPT(ModelConfig(**SHAPE), 50))
    assert (found.tokens_per_step, found.steps, found.micro_batch_size) == (6 * 2 * 8, 10, 6)
    assert found.seconds == pytest.approx(10 * found.step_seconds + 3 * found.validation_seconds)
    assert min(found.step_seconds, found.validation_seconds, found.memory_bytes, found.peak_flops) > 0


@pytest.mark.parametrize(
    ("share", "wanted", "options", "micro"),
    [(6, None, {}, 6), (6, 4, {}, 4), (6, 100, {}, 6), (6, 1, {}, 1)],
)
def test_micro_batches_are_what_is_asked_for_and_no_larger_than_the_share(share, wanted, options, micro):
    assert forecast(share=share, micro_batch_size=wanted, **options).micro_batch_size == micro


def test_micro_batches_on_a_cpu_follow_a_rule():
    assert probe().largest_micro_batch(5) == 5
    assert probe(block_size=1024).largest_micro_batch(1000) == MICRO_TOKENS // 1024
    assert probe(vocab_size=100_000, block_size=1024).largest_micro_batch(1000) == MICRO_LOGITS // (1024 * 100_000)
    assert probe(block_size=2 * MICRO_TOKENS).largest_micro_batch(3) == 1


def test_what_a_forward_pass_keeps_grows_by_the_same_for_each_layer():
    p = probe()
    one, two, three, five = (p.saved_bytes(p.model(n)) for n in (1, 2, 3, 5))
    assert 0 < one < two
    assert three - two == two - one
    assert five - three == 2 * (two - one)


def test_a_wider_model_and_a_larger_micro_batch_take_more_memory():
    assert probe(n_embd=512).memory(4) > probe().memory(4)
    assert probe(block_size=256).memory(64) > probe(block_size=256).memory(1)


def test_each_of_several_devices_holds_its_part_of_the_weights_and_a_block():
    whole, parts = (probe(n_layer=4, shards=shards) for shards in (1, 4))
    held = 4 * whole.weights
    saved = {one: one.memory(2) - one.held for one in (whole, parts)}
    assert saved[whole] - saved[parts] == held - (held // 4 + whole.weights // 4)


def test_a_step_too_large_to_try_is_extended_from_a_small_one(monkeypatch):
    monkeypatch.setattr("tinygpt.forecast.PROBE_FLOPS", 0)
    tried = []

    def parts(self, n_layer, rows):
        tried.append((n_layer, rows))
        return 0.25 + n_layer, 0.5 + n_layer

    monkeypatch.setattr(Probe, "step_parts", parts)
    assert probe(n_layer=5).step_seconds(share=8, micro=4) == 8 * (0.25 + 5) + (0.5 + 5)  # one update for all of them
    assert tried == [(1, 1), (2, 1)]  # nothing of the full size is run
    assert probe().validation_seconds(trained=3.0) == 1.0


def test_the_small_steps_can_be_taken(monkeypatch):
    monkeypatch.setattr("tinygpt.forecast.PROBE_FLOPS", 0)
    assert probe(n_layer=3).step_seconds(share=4, micro=2) > 0
    probe().try_steps(2)  # with which a GPU's micro-batch is found


def test_a_machine_that_is_busy_elsewhere_gives_no_time_below_zero(monkeypatch):
    """The second layer seemed to take less than none."""
    monkeypatch.setattr("tinygpt.forecast.PROBE_FLOPS", 0)
    monkeypatch.setattr(Probe, "step_parts", lambda self, n_layer, rows: (2.0 / n_layer, 1.0 / n_layer))
    assert probe(n_layer=12).step_seconds(share=1, micro=1) > 3.0


def test_a_forecast_leaves_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    forecast()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_peak_is_a_rate():
    assert matmul_peak(CPU, "32-true") > 1e6


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "0 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h"), (4e7, "1 y 97 d")],
)
def test_durations_in_words(seconds, words):
    assert duration(seconds) == words
