"""One optimizer step: equal to a bare PyTorch loop however its batch is cut, its dropout a function of the step."""

import math

import pytest
import torch
from tiny import CALLBACKS, column, corpus, run, settings, text
from torch.nn import functional as F

from tinygpt.batches import BatchOrder
from tinygpt.checkpoint import load, open_checkpoint
from tinygpt.compiling import explained
from tinygpt.config import UserError
from tinygpt.corpus import cache_dir, data_dir
from tinygpt.model import GPT
from tinygpt.optim import learning_rate, make_optimizer
from tinygpt.shards import prepare

NO_SAMPLES = {name: node for name, node in CALLBACKS.items() if name != "samples"}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(run_dir):
    state = open_checkpoint(run_dir / "checkpoints" / "last.ckpt")["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("model.")}


def train(folder, name="run", **changes):
    return run(folder, name, **{"steps": 5, "every": 5, "callbacks": NO_SAMPLES, **changes})


def bare_loop(config):
    """The same run with nothing but PyTorch: its losses, gradient norms and weights."""
    prepared = prepare(config.data, data_dir(None), cache_dir(config.cache_dir))
    torch.manual_seed(config.seed)
    model = GPT(config.model, prepared.tokenizer.vocab_size)
    optimizer = make_optimizer(model, config.optimizer)
    steps, T = config.trainer["max_steps"], config.model.block_size
    order = BatchOrder(len(prepared.train), T, config.data.global_batch_size, config.seed)
    losses, norms = [], []
    for step in range(steps):
        batch = torch.from_numpy(prepared.train.windows(order.starts(step), T + 1))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, config.optimizer)
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, norms, {f"model.{name}": value for name, value in model.state_dict().items()}


def test_a_run_is_a_bare_loop_bit_for_bit(tmp_path):
    changes = {"steps": 8, "every": 3, "optimizer": {"grad_clip": 0.5}}
    losses, norms, state = bare_loop(settings(tmp_path, **changes))
    run_dir = train(tmp_path, **changes)
    assert column(run_dir, "train/loss") == list(enumerate(losses, start=1))
    assert column(run_dir, "grad_norm") == list(enumerate(norms, start=1))
    found = weights(run_dir)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_the_cut_into_micro_batches_changes_nothing(tmp_path):
    runs = [weights(train(tmp_path, f"by{n}", data={"micro_batch_size": n})) for n in (6, 1, 2, 3, 4)]
    for other in runs[1:]:
        for name, value in runs[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=2e-6)
    whole, cut = (dict(column(tmp_path / f"by{n}", "train/loss")) for n in (6, 4))
    assert cut == pytest.approx(whole, abs=1e-5)


def test_a_repeated_text_is_learnt_by_heart(tmp_path):
    corpus(tmp_path, "abcdefghijkl" * 200)
    run_dir = train(tmp_path, steps=120, every=120, optimizer={"lr": 3e-2})
    assert column(run_dir, "train/loss")[0][1] == pytest.approx(math.log(12), abs=0.1)  # it begins knowing nothing
    assert column(run_dir, "train/loss")[-1][1] < 0.1
    assert column(run_dir, "val/loss")[-1][1] < 0.1


def test_one_batch_is_overfitted(tmp_path):
    corpus(tmp_path, text(58))
    # The training split is one window, or nearly: only learning it by heart brings the loss down.
    changes = {"optimizer": {"lr": 3e-2, "weight_decay": 0.0}, "model": {"n_embd": 32, "block_size": 50}}
    run_dir = train(tmp_path, steps=200, every=200, **changes)
    assert column(run_dir, "train/loss")[-1][1] < 0.1
    assert column(run_dir, "val/loss")[-1][1] > 1


def test_gradients_are_clipped(tmp_path):
    # With AdamW's eps far above the gradients an update is proportional to them.
    def first_step(name, clip):
        optimizer = {"grad_clip": clip, "eps": 1e3, "lr": 100.0, "weight_decay": 0.0, "warmup_steps": 0}
        run_dir = train(tmp_path, name, steps=1, every=1, optimizer=optimizer)
        torch.manual_seed(1337)
        model, tokenizer = load(run_dir / "checkpoints" / "last.ckpt")
        torch.manual_seed(1337)
        start = dict(GPT(model.config, tokenizer.vocab_size).named_parameters())
        moved = sum(float((p - start[name]).detach().square().sum()) for name, p in model.named_parameters()) ** 0.5
        return moved, column(run_dir, "grad_norm")[0][1]

    (free, norm), (bound, norm_again) = first_step("free", 0.0), first_step("bound", 0.01)
    assert norm == norm_again > 0.1  # what is logged is the norm before clipping
    assert bound / free == pytest.approx(0.01 / norm, rel=2e-2)


def test_dropout_is_a_function_of_seed_and_step(tmp_path):
    changes = {"model": {"dropout": 0.3}}
    one, two = train(tmp_path, "one", **changes), train(tmp_path, "two", every=1, **changes)
    assert column(one, "train/loss") == column(two, "train/loss")  # validations in between draw nothing from it
    dry, other = train(tmp_path, "dry"), train(tmp_path, "other", seed=7, **changes)
    assert column(one, "train/loss") != column(dry, "train/loss")
    assert column(one, "train/loss") != column(other, "train/loss")


def test_each_step_drops_something_else(tmp_path):
    corpus(tmp_path, "ab" * 300)  # batches are alike, and the learning rate is next to nothing
    optimizer = {"lr": 1e-12, "weight_decay": 0.0}
    losses = column(train(tmp_path, model={"dropout": 0.5}, optimizer=optimizer), "train/loss")
    assert len({loss for _, loss in losses}) == 5


def test_the_learning_rate_that_is_logged_is_the_schedules(tmp_path):
    run_dir = train(tmp_path)
    config = settings(tmp_path).optimizer
    assert column(run_dir, "lr") == [(step + 1, learning_rate(step, 5, config)) for step in range(5)]


def test_validation_loss_is_that_of_the_whole_split(tmp_path):
    from tinygpt.evaluate import evaluate

    run_dir = train(tmp_path)
    config = settings(tmp_path)
    prepared = prepare(config.data, data_dir(None), cache_dir(config.cache_dir))
    model, tokenizer = load(run_dir / "checkpoints" / "last.ckpt")
    found = evaluate(model, prepared.val, tokenizer.byte_lengths(), batch_size=3)
    for name in ("loss", "bits_per_byte", "perplexity", "accuracy"):
        assert column(run_dir, f"val/{name}")[-1] == (5, pytest.approx(found[name], rel=1e-5))


def test_only_a_compiler_is_blamed_for_what_a_compiler_said():
    from torch._inductor.exc import InductorError

    with pytest.raises(UserError, match=r"compile=true does not work here: RuntimeError: ptxas has failed$"), explained():
        raise InductorError(RuntimeError("ptxas has failed\nlog"), None)
    with pytest.raises(torch.OutOfMemoryError), explained():  # for which run.py has a hint of its own
        raise InductorError(torch.OutOfMemoryError("full"), None)
    with pytest.raises(RuntimeError, match="the user's own"), explained():
        raise RuntimeError("the user's own")
