"""Batches of documents: each once an epoch, at any step, in any share; padding and neighbours change no loss."""

import itertools
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tinygpt.batches import IGNORED, Batch
from tinygpt.config import ModelConfig, OptimizerConfig
from tinygpt.data import ValidationBatches, make_order
from tinygpt.documents import PackedOrder, PaddedOrder, opening_lengths, openings, positions_within
from tinygpt.evaluate import document_mask, evaluate, predict, read_rows
from tinygpt.lit import LitGPT
from tinygpt.model import GPT

VOCAB = 13


class Documents:
    """A split in memory: documents of these lengths, each a 0 and then numbers by chance."""

    def __init__(self, lengths, seed=0):
        self.documents = np.cumsum([0, *lengths])
        self.ids = np.random.default_rng(seed).integers(1, VOCAB, self.documents[-1])
        self.ids[self.documents[:-1]] = 0

    def __len__(self):
        return len(self.ids)

    def windows(self, starts, length):
        assert starts.min() >= 0
        assert starts.max() + length <= len(self.ids)
        return self.ids[starts[:, None] + np.arange(length)]

    def document(self, i):
        """Its ids and the one that follows, where there is one."""
        return self.ids[self.documents[i] : self.documents[i + 1] + 1]


LENGTHS = [5, 1, 9, 3, 30, 2, 8, 8, 4, 12]


def model(**options):
    torch.manual_seed(0)
    made = GPT(ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, **options), VOCAB)
    with torch.no_grad():
        for p in made.parameters():  # initial logits are near zero: make them tell tokens apart
            p.mul_(8)
    return made


# Padded


def test_a_padded_row_is_the_beginning_of_a_document():
    tokens = Documents(LENGTHS)
    lengths = opening_lengths(tokens, 8)
    assert lengths.tolist() == [5, 1, 8, 3, 8, 2, 8, 8, 4, 8]
    rows = openings(tokens, lengths, np.array([3, 1, 0]))
    assert rows.shape == (3, 6)  # the longest of them, and its last target
    for row, i in zip(rows, (3, 1, 0), strict=True):
        assert row.tolist() == [*tokens.document(i), *[IGNORED] * (6 - len(tokens.document(i)))]
    assert openings(tokens, lengths, np.array([4]))[0].tolist() == tokens.document(4)[:9].tolist()  # cut at block_size
    assert opening_lengths(Documents([3, 4]), 8).tolist() == [3, 3]  # nothing follows the last of the split
    assert openings(Documents([3, 1]), np.array([3, 0]), np.array([1])).tolist() == [[0, IGNORED]]


@settings(max_examples=40)
@given(n=st.integers(1, 150), batch=st.integers(1, 30), seed=st.integers(0, 2**32), sizes=st.integers(0, 2**32))
def test_an_epoch_visits_every_document_once(n, batch, seed, sizes):
    lengths = np.random.default_rng(sizes).integers(1, 20, n)
    order = PaddedOrder(Documents(lengths), 8, batch, seed)
    steps = -(-3 * n // batch)
    drawn = np.concatenate([order.rows(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(drawn[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_padded_steps_are_pure_functions_of_seed_and_step():
    tokens = Documents(np.random.default_rng(0).integers(1, 40, 500))
    order, again, other = (PaddedOrder(tokens, 32, 12, seed) for seed in (5, 5, 6))
    in_turn = [order.rows(step).tolist() for step in range(150)]
    assert [again.rows(step).tolist() for step in reversed(range(150))] == in_turn[::-1]
    assert [other.rows(step).tolist() for step in range(150)] != in_turn
    # A checkpoint counts on it: who changes the order changes what every resumed run sees.
    assert [row[:4] for row in in_turn[:2]] == STAYS


STAYS = [[49, 141, 336, 493], [378, 474, 67, 225]]


def test_documents_of_a_length_share_a_batch():
    lengths = np.random.default_rng(0).integers(1, 400, 5000)
    order = PaddedOrder(Documents(lengths), 400, 16, seed=1)
    read = [order.lengths[order.rows(step)] for step in range(312)]
    full, computed = sum(row.sum() for row in read), sum(len(row) * row.max() for row in read)
    unsorted = [order.lengths[order.drawn(step, step + 1)] for step in range(312)]
    assert computed < 1.1 * full  # little is padding
    assert sum(len(row) * row.max() for row in unsorted) > 1.7 * full  # as it would be by chance
    assert abs(np.corrcoef(np.arange(312), [row.mean() for row in read])[0, 1]) < 0.2  # long and short take turns


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_the_devices_make_up_the_batch(layout, world):
    tokens = Documents(LENGTHS * 9)
    order = make_order(tokens, tokens, 8, 6, 1, layout)
    for step in range(40):
        whole = order.read(tokens, step, slice(0, 6))
        parts = [order.read(tokens, step, slice(i * 6 // world, (i + 1) * 6 // world)) for i in range(world)]
        assert {part.targets for part in parts} == {whole.targets}
        rows = [row[row != IGNORED].tolist() for part in parts for row in part.tokens]
        assert rows == [row[row != IGNORED].tolist() for row in whole.tokens]
        if layout == "padded":
            assert sum(len(row) - 1 for row in rows) == whole.targets
        else:
            assert torch.equal(torch.cat([part.positions for part in parts]), whole.positions)


def gradients(batch, micro, world=1):
    """The step's loss and gradients: the mean over devices, each of which has a share of the batch."""
    net, losses = model(), []
    for part in batch.split(len(batch.tokens) // world):
        lit = LitGPT(net, OptimizerConfig(), total_steps=1, micro_batch_size=micro, seed=0, card={}, byte_lengths=None)
        trainer = SimpleNamespace(world_size=world, strategy=SimpleNamespace())
        with (
            mock.patch.object(LitGPT, "trainer", trainer),
            mock.patch.object(LitGPT, "manual_backward", lambda self, loss: (loss / world).backward()),
        ):
            losses.append(float(lit.accumulate(part)))
    return sum(losses) / world, [p.grad for p in net.parameters()]


@pytest.mark.parametrize("layout", ["padded", "packed", "stream"])
def test_the_loss_of_a_step_is_the_mean_over_its_targets_however_it_is_cut(layout):
    tokens = Documents(LENGTHS * 3)
    order = make_order(tokens, tokens, 8, 6, 1, layout)
    batch = order.read(tokens, 2, slice(0, 6))
    net = model()
    logits, targets = predict(net, batch)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    wanted.backward()
    if layout == "padded":
        assert len({int((row != IGNORED).sum()) for row in targets}) > 1  # rows of several lengths
    for micro, world in ((6, 1), (1, 1), (4, 1), (2, 2), (1, 3)):
        loss, grads = gradients(batch, micro, world)
        assert loss == pytest.approx(float(wanted.detach()), rel=1e-5)
        for mine, p in zip(grads, net.parameters(), strict=True):
            torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=2e-5)


# Packed


def test_positions_begin_anew_with_each_document_and_each_window():
    tokens = Documents([3, 4, 5])
    assert positions_within(tokens, np.array([0, 2, 4]), 7).tolist() == [
        [0, 1, 2, 0, 1, 2, 3],
        [0, 0, 1, 2, 3, 0, 1],
        [0, 1, 2, 0, 1, 2, 3],
    ]


def test_packed_windows_are_the_streams():
    tokens = Documents(LENGTHS * 5)
    packed, stream = (make_order(tokens, tokens, 8, 4, 3, layout) for layout in ("packed", "stream"))
    assert isinstance(packed, PackedOrder)
    for step in range(30):
        a, b = (order.read(tokens, step, slice(0, 4)) for order in (packed, stream))
        assert torch.equal(a.tokens, b.tokens)
        assert b.positions is None
        assert a.targets is b.targets is None


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_document_in_a_packed_window_reads_as_if_it_were_alone(position):
    tokens, net = Documents([3, 4, 5, 6]), model(position=position)
    starts = np.array([1, 5])
    positions = torch.from_numpy(positions_within(tokens, starts, 8))
    batch = Batch(torch.from_numpy(tokens.windows(starts, 9)), positions)
    logits, _ = predict(net, batch)
    for row, places, found in zip(batch.tokens[:, :-1], positions, logits, strict=True):
        cuts = [*torch.nonzero(places == 0).flatten().tolist(), 8]
        assert len(cuts) > 2
        alone = torch.cat([net(row[None, a:b])[0] for a, b in itertools.pairwise(cuts)])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
    stream, _ = predict(net, Batch(batch.tokens))
    assert not torch.allclose(stream, logits, atol=1e-2)  # and the neighbours would have been seen


def test_the_mask_by_hand():
    mask = document_mask(torch.tensor([[0, 1, 0, 1]]))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


# Validation


def test_validation_of_a_packed_run_keeps_documents_apart():
    tokens, net = Documents(LENGTHS), model()
    loaded = ValidationBatches(tokens, 8, None, 4, 0, 1, layout="packed")
    assert loaded[0].positions.tolist()[:2] == [[0, 1, 2, 3, 4, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]
    found, stream = (evaluate(net, tokens, None, layout=layout) for layout in ("packed", "stream"))
    assert found["tokens"] == stream["tokens"] == len(tokens) - 1
    nll = 0.0
    for start in range(0, len(tokens) - 1, 8):
        window, at = tokens.ids[start : start + 9], start
        while at < start + len(window) - 1:
            end = min(start + len(window) - 1, *(d for d in tokens.documents if d > at))
            part = torch.from_numpy(tokens.ids[at : end + 1])
            with torch.no_grad():
                nll += float(F.cross_entropy(net(part[None, :-1])[0], part[1:], reduction="sum"))
            at = end
    assert found["loss"] == pytest.approx(nll / found["tokens"], rel=1e-5)
    assert found["loss"] != pytest.approx(stream["loss"], rel=1e-3)


@pytest.mark.parametrize("limit", [None, 20])
def test_the_openings_of_every_document_are_judged_once(limit):
    tokens, net = Documents(LENGTHS), model()
    nll, hits, n = 0.0, 0, 0
    for i in range(len(LENGTHS) if limit is None else 5):  # five documents begin before token 20
        row = torch.from_numpy(tokens.document(i)[:9])
        with torch.no_grad():
            logits = net(row[None, :-1])[0]
        nll += float(F.cross_entropy(logits, row[1:], reduction="sum"))
        hits, n = hits + int((logits.argmax(-1) == row[1:]).sum()), n + len(row) - 1
    for size in (1, 3, 100):
        found = evaluate(net, tokens, None, rows="openings", batch_size=size, limit=limit)
        assert found["tokens"] == n
        assert found["loss"] == pytest.approx(nll / n, rel=1e-5)
        assert found["accuracy"] == pytest.approx(hits / n)


def test_openings_of_one_text_are_refused():
    text = Documents([50])
    text.documents = None
    with pytest.raises(ValueError, match="one running text"):
        list(read_rows(text, 8, 4, None, "stream", "openings"))
