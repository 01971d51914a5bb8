"""The order of training batches, and the windows of a validation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numbered import Numbers

from tinygpt.batches import IGNORED, BatchOrder, mix, permute, validation_batch, validation_windows


def words(*values):
    return np.array(values, dtype=np.uint64)


def places(n, key):
    return permute(np.arange(n, dtype=np.uint64), n, np.full(n, key, dtype=np.uint64))


@pytest.mark.parametrize("key", [0, 1, 2**63 + 5])
def test_a_key_names_a_permutation_of_every_length(key):
    for n in range(1, 301):
        assert sorted(places(n, key).tolist()) == list(range(n))


def test_two_keys_name_two_permutations_and_neither_is_the_identity():
    a, b = places(1000, 1), places(1000, 2)
    assert (a != b).mean() > 0.98
    assert (a != np.arange(1000)).mean() > 0.98


def test_a_permutation_of_a_trillion_costs_what_is_asked_of_it():
    n = 10**12 + 39
    index = np.unique(np.random.default_rng(0).integers(0, n, 20_000)).astype(np.uint64)
    there = permute(index, n, np.full(len(index), 7, dtype=np.uint64))
    assert there.max() < n
    assert len(np.unique(there)) == len(index)
    assert 0.48 * n < there.mean() < 0.52 * n


def test_each_index_may_have_a_key_of_its_own():
    mixed = permute(words(5, 5, 6), 100, words(1, 2, 1))
    assert mixed.tolist() == [places(100, 1)[5], places(100, 2)[5], places(100, 1)[6]]


def test_the_hash_is_splitmix64():
    # The first outputs of the reference implementation (Vigna, splitmix64.c) from the state 0.
    step = 0x9E3779B97F4A7C15
    assert mix(words(0, step)).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def epoch_starts(order, epoch):
    """The starts of one epoch, whatever the batches that it is spread over."""
    n = order.rows_per_epoch
    first, last = epoch * n // order.batch_size, -(-(epoch + 1) * n // order.batch_size)
    drawn = np.concatenate([order.starts(step) for step in range(first, last)])
    skip = epoch * n - first * order.batch_size
    return drawn[skip : skip + n]


@given(n_tokens=st.integers(2, 700), block_size=st.integers(1, 60), batch=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_an_epoch_visits_every_window_once(n_tokens, block_size, batch, seed):
    if n_tokens < block_size + 1:
        with pytest.raises(ValueError, match=str(n_tokens)):
            BatchOrder(n_tokens, block_size, batch, seed)
        return
    order = BatchOrder(n_tokens, block_size, batch, seed)
    for epoch in range(3):
        starts = np.sort(epoch_starts(order, epoch))
        offset = starts[0]
        assert starts.tolist() == [offset + i * block_size for i in range(order.rows_per_epoch)]
        assert 0 <= offset < block_size
        assert starts[-1] + block_size + 1 <= n_tokens  # its last target is inside
        assert n_tokens - order.rows_per_epoch * block_size < 3 * block_size  # no window more would have room


def test_each_epoch_has_its_offset_and_its_order():
    order = BatchOrder(10_000, 100, 99, seed=3)
    epochs = [order.starts(step) for step in range(order.rows_per_epoch)]
    assert order.rows_per_epoch == 99
    offsets = [int(starts.min()) for starts in epochs]
    assert len(set(offsets)) > 50  # of 100 possible, 99 drawn: 63 are expected
    assert len({tuple(starts - starts.min()) for starts in epochs}) == len(epochs)


def test_every_offset_comes_up():
    order = BatchOrder(30, 10, 1, seed=0)
    assert {int(order.starts(step)[0]) % 10 for step in range(400)} == set(range(10))


@pytest.mark.parametrize(("n_tokens", "reachable"), [(11, {0}), (12, {0, 1}), (15, {0, 1, 2, 3, 4})])
def test_the_smallest_texts_have_one_window_that_moves_as_far_as_it_can(n_tokens, reachable):
    order = BatchOrder(n_tokens, 10, 4, seed=1)
    drawn = np.concatenate([order.starts(step) for step in range(50)])
    assert order.rows_per_epoch == 1
    assert set(drawn.tolist()) == reachable


def test_a_step_is_the_same_whenever_it_is_asked_for():
    order, again = BatchOrder(5000, 16, 7, seed=5), BatchOrder(5000, 16, 7, seed=5)
    in_turn = [order.starts(step).tolist() for step in range(200)]
    assert [again.starts(step).tolist() for step in reversed(range(200))] == in_turn[::-1]
    assert in_turn != [BatchOrder(5000, 16, 7, seed=6).starts(step).tolist() for step in range(200)]


def test_the_sequence_of_windows_does_not_depend_on_the_batch_size():
    def drawn(batch_size):
        order = BatchOrder(5000, 16, batch_size, seed=5)
        return np.concatenate([order.starts(step) for step in range(1200 // batch_size)]).tolist()

    assert drawn(1) == drawn(12) == drawn(400)


def test_the_order_stays_what_it_is():
    # A checkpoint counts on it: who changes the order changes what every resumed run sees.
    order = BatchOrder(1000, 10, 4, seed=1337)
    assert [order.starts(step).tolist() for step in (0, 1, 1000)] == [
        [145, 245, 205, 495],
        [905, 215, 325, 65],
        [748, 868, 938, 98],
    ]


@given(n=st.integers(2, 300), block_size=st.integers(1, 40), size=st.integers(1, 9), limit=st.none() | st.integers(2, 400))
def test_validation_reads_every_target_once(n, block_size, size, limit):
    tokens, covered = Numbers(n), min(n, limit or n)
    windows = validation_windows(tokens, block_size, limit)
    batches = [
        validation_batch(tokens, block_size, first, min(windows, first + size), limit) for first in range(0, windows, size)
    ]
    batch = np.concatenate(batches)
    assert batch.shape == (windows, block_size + 1)
    targets = batch[:, 1:].ravel()
    assert targets[targets != IGNORED].tolist() == list(range(1, covered))
    assert (batch[:, :-1].ravel()[: covered - 1] == np.arange(covered - 1)).all()  # what is read before each
    assert (batch[-1] != IGNORED).sum() >= 2  # no window of padding alone


def test_the_end_of_the_last_validation_window_is_padding():
    batch = validation_batch(Numbers(8), 5, 0, 2)
    assert batch.tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, IGNORED, IGNORED, IGNORED]]
