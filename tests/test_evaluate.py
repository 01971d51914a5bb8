"""Metrics against plain sums, bits per byte by hand, and evaluation over a whole split."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tinygpt.batches import IGNORED
from tinygpt.config import ModelConfig
from tinygpt.evaluate import TextMetrics, evaluate
from tinygpt.model import GPT
from tinygpt.tokenizer import GPT2_PATTERN, BPETokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer


class Ids:
    """A split in memory."""

    def __init__(self, ids):
        self.ids = np.asarray(ids, dtype=np.int64)

    def __len__(self):
        return len(self.ids)

    def windows(self, starts, length):
        return np.stack([self.ids[start : start + length] for start in starts])


def model(vocab_size, **options):
    torch.manual_seed(0)
    made = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, **options), vocab_size)
    with torch.no_grad():
        for p in made.parameters():  # initial logits are near zero: make them tell tokens apart
            p.mul_(8)
    return made


def test_metrics_are_means_over_the_tokens_that_are_there():
    torch.manual_seed(1)
    logits, targets = torch.randn(3, 5, 11) * 3, torch.randint(11, (3, 5))
    targets[2, 2:] = IGNORED
    lengths = np.arange(1, 12)
    metrics = TextMetrics(lengths)
    metrics.update(logits[:2], targets[:2])
    metrics.update(logits[2:], targets[2:])
    nll, correct, n_bytes, n = 0.0, 0, 0, 0
    for row, target in zip(logits.flatten(0, 1).double(), targets.flatten().tolist(), strict=True):
        if target != IGNORED:
            nll -= math.log(row.exp()[target] / row.exp().sum())
            correct += int(row.argmax()) == target
            n_bytes, n = n_bytes + int(lengths[target]), n + 1
    assert n == 12
    assert metrics.compute() == {
        "loss": pytest.approx(nll / n, rel=1e-6),
        "perplexity": pytest.approx(math.exp(nll / n), rel=1e-5),
        "bits_per_byte": pytest.approx(nll / math.log(2) / n_bytes, rel=1e-6),
        "accuracy": pytest.approx(correct / n),
        "tokens": n,
    }


def test_metrics_begin_anew_after_a_reset():
    metrics = TextMetrics(np.array([1, 1]))
    metrics.update(torch.randn(1, 3, 2), torch.zeros(1, 3, dtype=torch.long))
    metrics.reset()
    metrics.update(torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.long))
    assert metrics.compute()["loss"] == pytest.approx(math.log(2))
    assert metrics.compute()["bits_per_byte"] == pytest.approx(1.0)  # one bit a token, a token is a byte
    assert metrics.compute()["tokens"] == 2


def test_half_precision_logits_are_summed_in_full():
    logits, targets = torch.randn(2, 100, 50).bfloat16(), torch.randint(50, (2, 100))
    metrics = TextMetrics(None)
    metrics.update(logits, targets)
    wanted = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    assert metrics.compute()["loss"] == pytest.approx(float(wanted), rel=1e-6)


def test_a_model_in_half_precision_is_judged_in_full():
    """trainer.precision=bf16-true converts the whole module, this sum included."""
    metrics = TextMetrics(None)
    metrics.to(dtype=torch.bfloat16)
    metrics.reset()
    logits, targets = torch.randn(500, 1, 4, 5), torch.randint(5, (500, 1, 4))
    for one, wanted in zip(logits, targets, strict=True):
        metrics.update(one, wanted)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 2), targets.flatten()).item()
    assert metrics.compute()["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_hopeless_loss_has_an_infinite_perplexity_and_raises_nothing():
    metrics = TextMetrics(None)
    metrics.update(torch.tensor([[[0.0, 1e6]]]), torch.tensor([[0]]))
    assert metrics.compute()["perplexity"] == math.inf


def uniform_bits(tokenizer, text):
    """Bits per byte of a model that knows nothing: log2(vocabulary) a token, over the text's bytes, the first left out."""
    ids = tokenizer.encode(text)
    rest = len(text.encode()) - len(tokenizer.piece(ids[0]))
    return (len(ids) - 1) * math.log2(tokenizer.vocab_size) / rest


def toy_gpt2():
    """GPT-2's kind of tokenizer on bytes and two merges, one of which joins the bytes of é."""
    ranks = [bytes([value]) for value in range(256)] + ["é".encode(), b"th"]
    return GPT2Tokenizer(ranks, GPT2_PATTERN, {"<|endoftext|>": len(ranks)})


TEXT = "the café — thé 東京 🐈 théâtre " * 3
TOKENIZERS = {
    "char": CharTokenizer(TEXT),
    "gpt2": toy_gpt2(),
    "bpe": BPETokenizer.learn([TEXT], 270),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bits_per_byte_of_a_model_that_knows_nothing(name):
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(TEXT)
    assert len(ids) < len(TEXT.encode())  # some tokens are several bytes
    metrics = TextMetrics(tokenizer.byte_lengths())
    logits = torch.zeros(1, len(ids) - 1, tokenizer.vocab_size)
    metrics.update(logits, torch.tensor([ids[1:]]))
    assert metrics.compute()["bits_per_byte"] == pytest.approx(uniform_bits(tokenizer, TEXT))


def test_there_are_no_bits_per_byte_where_the_tokenizer_loses_text():
    tokenizer = WordTokenizer.learn(["a b c a b"], 2)
    found = evaluate(model(tokenizer.vocab_size), Ids(tokenizer.encode("a b c a")), tokenizer.byte_lengths())
    assert found["bits_per_byte"] is None
    assert found["tokens"] == 3


@pytest.mark.parametrize("n", [2, 8, 9, 10, 100])
@pytest.mark.parametrize("limit", [None, 23])
def test_evaluation_equals_a_plain_loop_over_the_windows(n, limit):
    net, ids = model(13), np.random.default_rng(n).integers(0, 13, n)
    seen = torch.from_numpy(ids[: limit or n])
    losses, hits = [], []
    with torch.no_grad():
        for start in range(0, len(seen) - 1, 8):
            window = seen[start : start + 9]
            logits = net(window[None, :-1])[0]
            losses += F.cross_entropy(logits, window[1:], reduction="none").tolist()
            hits += (logits.argmax(-1) == window[1:]).tolist()
    found = evaluate(net, Ids(ids), np.ones(13), limit=limit)
    assert found["tokens"] == len(losses) == len(seen) - 1
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["accuracy"] == pytest.approx(sum(hits) / len(hits))
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))


def test_the_batch_size_changes_nothing():
    net, ids = model(13), Ids(np.random.default_rng(0).integers(0, 13, 150))
    one, *others = (evaluate(net, ids, np.ones(13), batch_size=size) for size in (1, 2, 7, 1000))
    for other in others:
        assert other == pytest.approx(one, rel=1e-5)


def test_evaluation_switches_dropout_off_and_then_leaves_the_model_as_it_was():
    net, ids = model(13, dropout=0.5).train(), Ids(np.arange(13))
    assert evaluate(net, ids, None) == evaluate(net, ids, None)
    assert net.training
    assert all(p.grad is None for p in net.parameters())
