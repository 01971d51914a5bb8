"""The loss in chunks is the loss, and so are its gradients."""

import shutil

import pytest
import torch

from tinygpt import loss
from tinygpt.batches import IGNORED
from tinygpt.config import ModelConfig
from tinygpt.loss import cross_entropy, next_token_loss
from tinygpt.model import GPT


@pytest.mark.parametrize("rule", [loss.chunk_loss, loss.fusible_chunk_loss])
@pytest.mark.parametrize("factor", [1, 3])  # 1: the gradients are handed on as they are
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"logit_softcap": 2.0}, {"tie_embeddings": False}], ids=["tied", "softcap", "untied"]
)
def test_loss_and_gradients_in_chunks_are_those_of_all_logits_at_once(monkeypatch, options, reduction, factor, rule):
    monkeypatch.setattr(loss, "LARGE", 0)
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 3 * 50)  # three rows at a time
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, **options), vocab_size=50)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    idx, targets = torch.randint(50, (2, 7)), torch.randint(50, (2, 7))
    targets[1, 3:] = IGNORED
    found = []
    for measured in (
        next_token_loss(model, model.features(idx), targets, reduction, 0.5, rule),
        cross_entropy(model(idx), targets, reduction) * 0.5,
    ):
        model.zero_grad()
        (measured * factor).backward()
        found.append((measured.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a compiler")
def test_the_compiled_rule_is_the_rule_for_every_size_of_chunk():
    torch.manual_seed(0)
    rule, weight = torch.compile(loss.fusible_chunk_loss), torch.randn(50, 8)
    for rows, softcap in ((14, 2.0), (13, None)):
        x, targets, share = torch.randn(rows, 8), torch.randint(50, (rows,)), torch.rand(rows)
        for dtype in (torch.float32, torch.bfloat16):
            for part in (slice(0, 5), slice(5, 10), slice(10, None)):
                product = (x[part] @ weight.T).to(dtype)
                given = (50, targets[part], share[part], softcap)
                found, gradient = rule(product.clone(), *given)
                expected, its_gradient = loss.chunk_loss(product.clone(), *given)
                torch.testing.assert_close(found, expected)
                torch.testing.assert_close(gradient, its_gradient)


def test_under_autocast_the_products_are_in_bfloat16(monkeypatch):
    torch.manual_seed(0)
    model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), vocab_size=50)
    idx, targets = torch.randint(50, (2, 8)), torch.randint(50, (2, 8))
    exact = cross_entropy(model(idx), targets, "mean")
    monkeypatch.setattr(loss, "LARGE", 0)
    with torch.autocast("cpu", torch.bfloat16):
        measured = next_token_loss(model, model.features(idx), targets, "mean")
    measured.backward()
    assert measured.dtype == model.wte.weight.grad.dtype == torch.float32
    torch.testing.assert_close(measured, exact, rtol=0, atol=2e-3)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_that_pad_a_product_count_for_nothing(dtype, softcap):
    torch.manual_seed(0)
    product, targets, share = 3 * torch.randn(5, 60), torch.randint(50, (5,)), torch.rand(5)
    product = product.to(dtype).float().requires_grad_()
    logits = product[:, :50] if softcap is None else softcap * torch.tanh(product[:, :50] / softcap)
    expected = (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * share).sum()
    expected.backward()
    for rule in (loss.chunk_loss, loss.fusible_chunk_loss):
        found, gradient = rule(product.detach().to(dtype, copy=True), 50, targets, share, softcap)
        torch.testing.assert_close(found, expected.detach())
        torch.testing.assert_close(gradient, product.grad.to(dtype))
