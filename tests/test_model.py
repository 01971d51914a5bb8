"""The model: equal to Hugging Face's GPT-2 and Llama, from their weights; causal; of the right size."""

import json
import math
from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tinygpt.config import ModelConfig, OptimizerConfig, UserError
from tinygpt.generate import Sampling, stream_tokens
from tinygpt.hub import from_gpt2, from_llama, gpt2_config, llama_config
from tinygpt.kernels import SquaredReLU, attend_by_products
from tinygpt.model import GPT, activate
from tinygpt.optim import make_optimizer

GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3}
LLAMA = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def randomised(reference):
    """Norms and biases too, which start as ones and zeros and would hide a mistake."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return reference.eval()


def hf_gpt2(**changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    return randomised(GPT2LMHeadModel(GPT2Config(**{**GPT2, **changes})))


def hf_llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomised(LlamaForCausalLM(LlamaConfig(**{**LLAMA, **changes})))


def tokens(rows=2, length=16, vocab_size=50):
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_same_logits(ours, reference):
    idx = tokens()
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(idx), reference(idx).logits, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def golden(shared_data):
    """Values of a small GPT-2, computed by transformers in float64, and our model on its weights."""
    folder = shared_data / "golden/hf_gpt2"
    case = json.loads((folder / "meta.json").read_text())["cases"]["small_tied"]
    model = from_gpt2(case["config"], load_file(folder / "small_tied.params.safetensors")).double()
    return case, load_file(folder / "small_tied.golden.safetensors"), model


def loss_of(model, values):
    return F.cross_entropy(model(values["input_ids"]).flatten(0, 1), values["targets"].flatten())


def test_logits_loss_and_every_gradient_equal_gpt2_in_float64(golden):
    case, values, model = golden
    logits = model(values["input_ids"])
    torch.testing.assert_close(logits, values["logits_f64"], atol=1e-12, rtol=0)
    loss = loss_of(model, values)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)
    model.zero_grad()
    loss.backward()
    assert model.num_parameters() == case["params"]
    for name, parameter in model.named_parameters():
        theirs = values[f"grad.transformer.{name}"].double()  # stored in float32
        transposed = parameter.dim() == 2 and name.startswith("h.")
        ours = parameter.grad.t() if transposed else parameter.grad
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-6, msg=name)


def test_greedy_ids_equal_gpt2(golden):
    _, values, model = golden
    ids, prompt_length = values["greedy_ids"], 4  # it begins as the first row of input_ids does
    steps = stream_tokens(model, ids[:, :prompt_length], ids.shape[1] - prompt_length, Sampling(temperature=0))
    assert torch.stack(list(steps), dim=1).tolist() == ids[:, prompt_length:].tolist()


def test_ten_steps_of_adamw_equal_gpt2(golden, shared_data):
    case, values, _ = golden
    folder = shared_data / "golden/hf_gpt2"
    model = from_gpt2(case["config"], load_file(folder / "small_tied.params.safetensors")).double()
    recipe = OptimizerConfig(lr=1e-3, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, grad_clip=1.0)
    optimizer = make_optimizer(model, recipe)
    losses, norms = [], []
    for _ in case["train"]["losses"]:
        loss = loss_of(model, values)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip).item())
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(case["train"]["losses"], abs=1e-9)
    assert norms == pytest.approx(case["train"]["grad_norms_before_clip"], abs=1e-9)


@pytest.mark.parametrize("changes", [{}, {"activation_function": "gelu", "n_inner": 20}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_gpt2_weights_from_hugging_face(changes, prefix):
    reference = hf_gpt2(**changes)
    tensors = {k.replace("transformer.", prefix): v for k, v in reference.state_dict().items()}
    for layer in range(2):  # older files hold these too
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    if not changes:  # files leave out the weight that is shared, or hold it twice
        del tensors["lm_head.weight"]
    assert_same_logits(from_gpt2(reference.config.to_dict(), tensors), reference)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 6, "attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "rms_norm_eps": 1e-2},
    ],
)
def test_llama_weights_from_hugging_face(changes):
    reference = hf_llama(**changes)
    assert_same_logits(from_llama(reference.config.to_dict(), reference.state_dict()), reference)


def test_llama_config_of_transformers_4():
    old = {**LLAMA, "rope_theta": 500.0, "rope_scaling": None, "rms_norm_eps": 1e-5}
    assert llama_config(old).rope_theta == 500.0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop("transformer.h.1.ln_2.bias"), "missing: h.1.ln_2.bias"),
        (lambda t: t.update({"transformer.h.2.ln_1.bias": torch.zeros(24)}), "unknown: h.2.ln_1.bias"),
        (
            lambda t: t.update({"transformer.wpe.weight": torch.zeros(8, 24)}),
            r"shape: wpe.weight \(8, 24\) instead of \(16, 24\)",
        ),
        (lambda t: t.update({"transformer.h.0.attn.c_attn.weight": torch.zeros(72)}), "shape: .*c_attn"),
        (dict.clear, "missing: .* and 24 more"),
    ],
)
def test_gpt2_tensors_that_do_not_fit_are_named(damage, words):
    tensors = dict(hf_gpt2().state_dict())
    damage(tensors)
    with pytest.raises(UserError, match=words):
        from_gpt2(GPT2, tensors)


def test_llama_tensors_that_do_not_fit_are_named():
    tensors = dict(hf_llama().state_dict())
    k, q = "model.layers.0.self_attn.k_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(UserError, match=r"shape: layers.0.self_attn.q_proj.weight \(8, 24\)"):
        from_llama(LLAMA, {**tensors, k: tensors[q], q: tensors[k]})
    del tensors[k]
    with pytest.raises(UserError, match=r"missing: layers.0.self_attn.k_proj.weight"):
        from_llama(LLAMA, tensors)


@pytest.mark.parametrize(
    ("read", "config", "words"),
    [
        (gpt2_config, {**GPT2, "activation_function": "relu"}, "activation_function=relu"),
        (gpt2_config, {**GPT2, "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        (gpt2_config, LLAMA, "no n_layer"),
        (gpt2_config, {**GPT2, "model_type": "opt"}, "model_type=opt"),
        (llama_config, {**LLAMA, "rope_scaling": {"rope_type": "llama3"}}, "rope_type=llama3"),
        (llama_config, {**LLAMA, "rope_scaling": {"type": "linear"}}, "rope_type=linear"),
        (llama_config, {**LLAMA, "attention_bias": True}, "mlp_bias=False"),
        (llama_config, {**LLAMA, "head_dim": 8}, "head_dim=8"),
        (llama_config, {**LLAMA, "hidden_act": "gelu"}, "hidden_act=gelu"),
    ],
)
def test_a_config_with_something_that_gpt_does_not_have_is_refused(read, config, words):
    with pytest.raises(UserError, match=words):
        read(config)


FAMILIES = list(product(("layernorm", "rmsnorm"), ("learned", "rope"), ("gelu", "gelu_tanh", "swiglu", "relu2")))
EXTRAS = {"n_kv_head": 2, "qk_norm": True, "logit_softcap": 5.0, "bias": True}


@pytest.mark.parametrize("extras", [{}, EXTRAS], ids=["plain", "extras"])
@pytest.mark.parametrize(("norm", "position", "mlp"), FAMILIES)
def test_a_token_changes_no_logits_before_it(norm, position, mlp, extras):
    torch.manual_seed(0)
    config = ModelConfig(n_layer=2, n_head=4, n_embd=16, block_size=12, norm=norm, position=position, mlp=mlp, **extras)
    model = GPT(config, 20).eval()
    for parameter in model.parameters():  # at their initial size the differences would be tiny
        parameter.data *= 5
    idx = tokens(2, 12, 20)
    changed = idx.clone()
    changed[:, 7] = (idx[:, 7] + 1) % 20
    with torch.no_grad():
        before, after = model(idx), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=0)
    assert ((before - after)[:, 7:].abs().amax(dim=-1) > 1e-5).all()  # and it does change all after it


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_the_order_of_tokens_matters(position):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, position=position), 20)
    for parameter in model.parameters():
        parameter.data *= 5
    last = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not torch.allclose(last[0], last[1], atol=1e-3)


@pytest.mark.parametrize("init", ["gpt2", "normal", "zero_proj"])
@pytest.mark.parametrize("family", [{}, {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": True}])
def test_the_initial_loss_is_that_of_guessing(init, family):
    torch.manual_seed(0)
    model = GPT(ModelConfig(init=init, **family), 65)
    idx = tokens(8, 64, 65)
    loss = F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(65), rel=0.03)


def test_tied_weights_are_one_tensor_counted_once():
    tied, untied = (GPT(ModelConfig(tie_embeddings=tie), 65) for tie in (True, False))
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight
    assert untied.num_parameters() - tied.num_parameters() == 65 * 128


@pytest.mark.parametrize(
    ("settings", "vocab_size", "parameters"),
    [
        ({}, 65, 804_096),  # nanoGPT's CPU example, counted with its position table
        ({"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}, 65, 10_745_088),
        (
            {
                "n_layer": 12,
                "n_head": 12,
                "n_embd": 768,
                "block_size": 1024,
                "mlp": "gelu_tanh",
                "bias": True,
            },
            50257,
            124_439_808,  # OpenAI's GPT-2
        ),
    ],
)
def test_parameter_counts(settings, vocab_size, parameters):
    with torch.device("meta"):
        assert GPT(ModelConfig(**settings), vocab_size).num_parameters() == parameters


def test_softcap_is_a_tanh_of_the_logits():
    plain, capped = (GPT(ModelConfig(n_layer=1, logit_softcap=cap), 65) for cap in (None, 0.1))
    capped.load_state_dict(plain.state_dict())
    idx = tokens(vocab_size=65)
    torch.testing.assert_close(capped(idx), 0.1 * torch.tanh(plain(idx) / 0.1))
    assert plain(idx).abs().max() > 0.2  # so that the cap is felt


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, idx = GPT(ModelConfig(n_layer=1, dropout=0.5), 65), tokens(vocab_size=65)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_more_tokens_than_the_block_holds_are_refused():
    with pytest.raises(ValueError, match="65 tokens do not fit into block_size=64"):
        GPT(ModelConfig(n_layer=1), 65)(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"n_head": 3}, "n_embd=128 does not divide by model.n_head=3"),
        ({"n_kv_head": 3}, "n_head=4 does not divide by model.n_kv_head=3"),
        ({"position": "rope", "n_head": 128}, "even head width"),
        ({"norm": "batchnorm"}, "model.norm=batchnorm is not known"),
        ({"mlp": "silu"}, "model.mlp=silu"),
        ({"n_layer": 0}, "model.n_layer=0 is out of range"),
        ({"block_size": 0}, "model.block_size=0"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"logit_softcap": 0.0}, "model.logit_softcap=0.0"),
        ({"norm_eps": 0.0}, "model.norm_eps=0.0"),
    ],
)
def test_an_impossible_shape_is_refused(settings, words):
    with pytest.raises(UserError, match=words) as error:
        ModelConfig(**settings)
    assert error.value.hint


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_positions_and_mask_keep_two_texts_in_one_row_apart(position):
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, position=position), 11).eval()
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5, 6, 7, 8]])
    text = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    mask = (text[:, None, :, None] == text[:, None, None, :]) & torch.ones(8, 8, dtype=torch.bool).tril()
    together = model(torch.cat((first, second), dim=1), positions=positions, mask=mask)
    torch.testing.assert_close(together[:, :3], model(first))
    torch.testing.assert_close(together[:, 3:], model(second))


def test_plain_positions_and_mask_change_nothing():
    model = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, position="rope"), 11).eval()
    idx = torch.arange(8)[None]
    same = model(idx, positions=torch.arange(8), mask=torch.ones(8, 8, dtype=torch.bool).tril())
    torch.testing.assert_close(same, model(idx))


def test_squared_relu_has_the_gradient_that_autograd_finds():
    x = torch.randn(5, 7, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(SquaredReLU.apply, (x,))
    torch.testing.assert_close(activate(x, "relu2"), x.relu() ** 2)


def test_attention_by_products_is_attention(monkeypatch):
    q, k, v = (torch.randn(2, 3, 9, 4, requires_grad=True) for _ in range(3))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend_by_products(q, k, v), expected)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    model = GPT(ModelConfig(n_layer=2, n_head=3, n_embd=24, block_size=16), 11)
    idx = torch.randint(11, (2, 16))
    training = model.train()(idx)
    torch.testing.assert_close(training, model.eval()(idx))
