"""The loaders: a step's share of each process, with and without workers."""

import pytest
import torch
from numbered import Numbers

from tinygpt.batches import IGNORED, BatchOrder
from tinygpt.config import UserError
from tinygpt.data import StepSampler, TextData, TrainingSteps, ValidationBatches, make_order


class Process:
    """All that the data asks of a Trainer."""

    def __init__(self, rank=0, world=1, step=0):
        self.global_rank, self.world_size, self.global_step = rank, world, step


def data(process=None, batch_size=6, **options):
    made = TextData(
        Numbers(500),
        Numbers(131),
        block_size=8,
        vocab_size=500,
        batch_size=batch_size,
        seed=1,
        total_steps=20,
        **options,
    )
    made.trainer = process
    return made


def batches(loader):
    return [batch.tokens.clone() for batch in loader]


def test_a_batch_of_the_loader_is_one_optimizer_step():
    order, found = BatchOrder(500, 8, 6, seed=1), batches(data().train_dataloader())
    assert len(found) == 20
    for step, batch in enumerate(found):
        assert batch.dtype == torch.int64
        assert batch[:, 0].tolist() == order.starts(step).tolist()
        assert torch.equal(batch[:, 1:], batch[:, :-1] + 1)  # y is x shifted by one
        assert batch.shape == (6, 9)


@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_shares_of_the_processes_make_up_the_global_batch(world):
    whole = batches(data().train_dataloader())
    shares = [batches(data(Process(rank, world)).train_dataloader()) for rank in range(world)]
    assert all(torch.equal(torch.cat(parts), batch) for batch, *parts in zip(whole, *shares, strict=True))


def test_workers_load_what_the_process_itself_loads():
    with_workers = batches(data(num_workers=2).train_dataloader())
    alone = batches(data().train_dataloader())
    assert len(alone) == len(with_workers)
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers, strict=True))


def test_the_state_is_the_step_to_go_on_from():
    whole = batches(data().train_dataloader())
    state = data(Process(step=13)).state_dict()
    assert state == {"step": 13}
    resumed = data()
    resumed.load_state_dict(state)
    loader = resumed.train_dataloader()
    assert all(torch.equal(a, b) for a, b in zip(batches(loader), whole[13:], strict=True))
    assert len(StepSampler(13, 20)) == 20  # Lightning counts from the beginning of the run


def test_loading_draws_no_number_from_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batches(data().train_dataloader())
    batches(data().val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"data.global_batch_size=6 does not divide by 4 devices"):
        data(Process(0, 4)).train_dataloader()


@pytest.mark.parametrize(("n_train", "n_val"), [(8, 100), (100, 1), (0, 0)])
def test_a_text_that_is_too_short_is_refused(n_train, n_val):
    with pytest.raises(UserError, match=f"{n_train} training and {n_val} validation tokens") as error:
        make_order(Numbers(n_train), Numbers(n_val), 8, 4, 0)
    assert "longer text" in error.value.hint
    assert make_order(Numbers(9), Numbers(2), 8, 4, 0).rows_per_epoch == 1


def targets(parts):
    flat = torch.cat([batch[:, 1:].flatten() for part in parts for batch in part])
    return sorted(flat[flat != IGNORED].tolist())


@pytest.mark.parametrize("world", [1, 2, 3, 40])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_the_processes_share_out_the_validation(world, size):
    parts = [ValidationBatches(Numbers(131), 8, None, size, rank, world) for rank in range(world)]
    loaded = [[part[i].tokens for i in range(len(part))] for part in parts]
    assert targets(loaded) == list(range(1, 131))
    assert len({len(part) for part in loaded}) == 1  # one without a batch would leave the others waiting
    assert all(len(batch) for part in loaded for batch in part)
    read = [sum(len(batch) for batch in part if (batch != IGNORED).any()) for part in loaded]
    assert max(read) <= -(-17 // world) + size  # no process does the work of all
    assert world != 2 or min(read) > 0


def test_validation_stops_at_its_bound():
    assert targets([batches(data(val_tokens=50).val_dataloader())]) == list(range(1, 50))


def test_a_step_may_be_asked_for_at_any_time():
    steps = TrainingSteps(Numbers(500), BatchOrder(500, 8, 6, seed=1), rank=1, world_size=2)
    assert torch.equal(steps[1000].tokens, steps[1000].tokens)
    assert not torch.equal(steps[1000].tokens, steps[1001].tokens)
