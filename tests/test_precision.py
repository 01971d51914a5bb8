"""Weights as bf16 and int8: close to the trained ones, through every door that takes dtype."""

import json
import math
import queue

import pytest
import scripts
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import tinygpt
from tinygpt import precision
from tinygpt.checkpoint import load_for_text
from tinygpt.config import ModelConfig, UserError
from tinygpt.engine import Request
from tinygpt.generate import Sampling, generate, stream_tokens
from tinygpt.model import GPT
from tinygpt.precision import FewRowsLinear, Int8Linear, PackedLinear, convert, lay_out
from tinygpt.served import Library, Limits, own_memory
from tinygpt.tokenizer import CharTokenizer

OPTIONS = {
    "gpt2": {"bias": True, "mlp": "gelu_tanh"},
    "llama": {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "n_kv_head": 2, "tie_embeddings": False},
    "odd": {"n_embd": 36, "bias": True},  # no multiple of 16, which the kernel of int8 needs
}


def make_model(n_embd=64, **options):
    torch.manual_seed(0)
    return GPT(ModelConfig(n_layer=2, n_head=4, n_embd=n_embd, block_size=64, **options), 11)


def turn(model):
    """Let the matrices lie by columns."""
    for block in model.h:
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            layer.weight = torch.nn.Parameter(layer.weight.detach().t().contiguous().t(), requires_grad=False)


def loss(model, idx):
    with torch.inference_mode():
        return torch.nn.functional.cross_entropy(model(idx)[:, :-1].flatten(0, 1).float(), idx[:, 1:].flatten()).item()


@pytest.mark.parametrize("turned", [False, True])  # as GPT-2's own files have the weights
@pytest.mark.parametrize("rows", [1, 3])  # 64 tokens in a row: the product that unpacks; one: the one that does not
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_logits_stay_close(name, dtype, rows, turned):
    model = make_model(**OPTIONS[name])
    if turned:
        turn(model)
    idx = torch.randint(11, (rows, 64), generator=torch.Generator().manual_seed(1))
    small = convert(model, dtype)
    with torch.inference_mode():
        for part in (idx, idx[:, :1]):
            exact, close = model.eval()(part), small(part).float()
            assert 0 < (exact - close).abs().max() < 0.03 * exact.abs().max()


def test_what_each_format_is_made_of():
    model = make_model(**OPTIONS["gpt2"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = convert(model, "int8")
    layer, weight = small.h[0].mlp.c_fc, model.h[0].mlp.c_fc.weight
    assert isinstance(layer, Int8Linear)
    assert layer.weight.dtype == torch.int8
    assert (layer.weight * layer.scale[:, None].float() - weight).abs().max() <= 0.51 * layer.scale.float().max()
    assert layer.weight.abs().amax(1).min() >= 126  # each output uses the whole range
    assert small.wte.weight.dtype == torch.bfloat16
    kind = PackedLinear if precision.packs(torch.device("cpu")) else torch.nn.Linear
    assert type(convert(model, "bf16").lm_head) is kind
    assert convert(model, "fp32").wte.weight.data_ptr() == model.wte.weight.data_ptr()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UserError, match="dtype=fp64"):
        convert(model, "fp64")


@pytest.mark.parametrize("turned", [False, True])  # as GPT-2's own files have the weights
@pytest.mark.parametrize("name", OPTIONS)
def test_a_model_laid_out_for_a_cpu_computes_the_same(name, turned):
    model = make_model(**OPTIONS[name]).eval()
    laid = convert(model, "fp32")
    if turned:
        turn(laid)
    lay_out(laid)
    assert (laid.lm_head.weight is laid.wte.weight) == model.config.tie_embeddings
    with torch.inference_mode():
        for shape in ((1, 1), (4, 1), (2, 8), (1, 33)):
            idx = torch.randint(11, shape, generator=torch.Generator().manual_seed(1))
            torch.testing.assert_close(laid(idx), model(idx))
        own_memory(laid)
        torch.testing.assert_close(laid(idx), model(idx))
    assert (laid.lm_head.weight is laid.wte.weight) == model.config.tie_embeddings
    for rows in (1, 5):
        prompt = idx[:, :3].repeat(rows, 1)
        drawn, again = (list(stream_tokens(one, prompt, 70, Sampling(temperature=0))) for one in (laid, model))
        assert torch.equal(torch.stack(drawn), torch.stack(again))


def test_few_rows_keep_the_fused_attention():
    laid = convert(make_model(**OPTIONS["gpt2"]), "fp32")
    lay_out(laid)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():  # which raises where it is refused
        laid(torch.zeros(4, 1, dtype=torch.long))
        list(stream_tokens(laid, torch.zeros(5, 2, dtype=torch.long), 3, Sampling(temperature=0)))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="its products are MKL's")
def test_texts_are_written_by_a_model_laid_out(tiny_run):
    model, _ = load_for_text(tiny_run)
    assert isinstance(model.lm_head, FewRowsLinear)
    assert model.lm_head.weight.t().is_contiguous()
    assert type(tinygpt.load(tiny_run)[0].lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_processor_without_the_kernels_computes_the_same(monkeypatch, dtype):
    model, idx = make_model(**OPTIONS["gpt2"]), torch.randint(11, (2, 5))
    with torch.inference_mode():
        fast = convert(model, dtype)(idx)
        monkeypatch.setattr(precision, "packs", lambda device: False)
        monkeypatch.setattr(precision, "FEW_ROWS", 0)
        torch.testing.assert_close(convert(model, dtype)(idx), fast, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("rows", [1, 5, 20])
def test_texts_are_written_in_every_format(dtype, rows):
    small = convert(make_model(**OPTIONS["llama"]), dtype)
    idx = torch.randint(11, (rows, 7))
    drawn = torch.stack(list(stream_tokens(small, idx, 70, Sampling(top_k=5), seed=1)))
    assert drawn.shape == (70, rows)
    own_memory(small)  # as the server does
    again = torch.stack(list(stream_tokens(small, idx, 70, Sampling(top_k=5), seed=1)))
    assert torch.equal(drawn, again)


def test_the_server_serves_it(tiny_run):
    library = Library(Limits(), "cpu", "int8")
    try:
        library.add("custom", str(tiny_run))
        events: queue.SimpleQueue = queue.SimpleQueue()
        served = library.get("custom")
        assert isinstance(served.model.lm_head, Int8Linear)
        served.engine.submit([Request([1, 2, 3], 5, seed=1)] * 2, [events.put] * 2)
        received = [events.get(timeout=60) for _ in range(12)]
        assert [type(event).__name__ for event in received].count("Drawn") == 10
    finally:
        library.close()


def test_generate_takes_a_dtype():
    tokenizer, model = CharTokenizer("\nabcdefghij"), make_model()
    text = generate(model, tokenizer, "abc", max_new_tokens=20, seed=1, dtype="int8")
    assert text == generate(convert(model, "int8"), tokenizer, "abc", max_new_tokens=20, seed=1)
    assert model.wte.weight.dtype == torch.float32
    with pytest.raises(UserError, match="dtype=int4"):
        tinygpt.generate(model, tokenizer, "abc", dtype="int4")
    with pytest.raises(UserError, match="converted already"):
        tinygpt.generate(convert(model, "int8"), tokenizer, "abc", dtype="bf16")


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_the_scripts_take_a_dtype(tiny_home, tiny_run, dtype):
    ckpt = f"ckpt={tiny_run}"
    text = scripts.run_inside("sample", ckpt, f"dtype={dtype}", "prompt=the", "max_new_tokens=20", "seed=1", cwd=tiny_home)
    assert (text.code, text.stdout[:3]) == (0, "the"), text.stderr
    done = scripts.run_inside("evaluate", ckpt, f"dtype={dtype}", cwd=tiny_home)
    assert done.code == 0, done.stderr
    metrics = json.loads(done.stdout)
    exact = json.loads((tiny_run / "summary.json").read_text())["best_val_loss"]
    assert metrics["dtype"] == dtype
    assert metrics["loss"] != exact
    assert math.isclose(metrics["loss"], exact, rel_tol=0.01)


def test_an_unknown_dtype_is_refused_by_name(tiny_home, tiny_run):
    done = scripts.run_inside("sample", f"ckpt={tiny_run}", "dtype=int4", cwd=tiny_home)
    assert done.code == 2
    assert "error: dtype=int4 is not known" in done.stderr
    assert "fp32, bf16, int8" in done.stderr
