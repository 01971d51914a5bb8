"""The token step: what the model computes, one token at a time, over columns that grow or that a mask tells apart."""

import pytest
import torch
from torch import nn

from tinygpt import decode
from tinygpt.cache import KVCache
from tinygpt.config import ModelConfig
from tinygpt.decode import Decoder, product
from tinygpt.model import GPT

LLAMA = {"n_kv_head": 2, "position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "logit_softcap": 5.0}
SHAPES = {
    "plain": {},
    "gpt2": {"bias": True, "mlp": "gelu_tanh"},
    "llama": LLAMA,
    "ours": {"position": "rope", "norm": "rmsnorm", "mlp": "relu2", "qk_norm": True, "tie_embeddings": False},
    "grouped": {"n_kv_head": 1, "qk_norm": True},
}


def make_model(**options):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_embd=32, block_size=16, dropout=0.3, **options), 30)
    for parameter in model.parameters():
        parameter.data *= 8
    return model.double().eval()


def after(model, idx, cut, static):
    """Logits of each token after the first `cut`, which the model reads; the others one by one."""
    cache = KVCache(model.config.n_layer, idx.shape[1])
    with torch.no_grad():
        model(idx[:, :cut], cache)
        decoder = Decoder(model, cache, static)
        return torch.stack([decoder(token) for token in idx[:, cut:].T], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("cut", [1, 9])
def test_a_step_gives_the_logits_of_the_model(monkeypatch, shape, static, cut):
    monkeypatch.setattr(decode, "STRIDE", 4)
    model, idx = make_model(**SHAPES[shape]), torch.randint(30, (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(idx)[:, cut:]
    torch.testing.assert_close(after(model, idx, cut, static), whole, atol=1e-9, rtol=1e-9)


def test_the_static_step_sees_no_column_it_has_not_written(monkeypatch):
    model, idx = make_model(), torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(1))
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new(*args, **kwargs).fill_(torch.nan))
    assert after(model, idx, 3, static=True).isfinite().all()


@pytest.mark.parametrize("static", [False, True])
def test_a_full_cache_is_refused(static):
    model, idx = make_model(), torch.zeros(1, 4, dtype=torch.long)
    cache = KVCache(2, 4)
    with torch.no_grad():
        model(idx, cache)
        with pytest.raises(ValueError, match="5 tokens do not fit into a cache of 4"):
            Decoder(model, cache, static)(idx[:, 0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 8, 32, 33])
def test_every_product_is_the_layers(bias, rows):
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(rows, 24)
    with torch.no_grad():
        torch.testing.assert_close(product(layer)(x), layer(x))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_give_the_logits_of_the_model(monkeypatch, shape):
    monkeypatch.setattr(decode, "STRIDE", 4)
    model, idx = make_model(**SHAPES[shape]).cuda(), torch.randint(30, (3, 16)).cuda()
    cache = KVCache(2, 16)
    with torch.inference_mode():
        whole = model(idx)
        model(idx[:, :3], cache)
        decoder = Decoder(model, cache)
        for _ in range(2):  # the same graphs serve the next text
            cache.length = 3
            steps = torch.stack([decoder(token).clone() for token in idx[:, 3:].T], dim=1)
            torch.testing.assert_close(steps, whole[:, 3:], atol=1e-9, rtol=1e-9)
