"""Checkpoints: what goes in comes out, nothing in one can run code, and a damaged one is a clear error."""

import os
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tinygpt import checkpoint as module
from tinygpt.checkpoint import build_model, durable_save, find, load, make_card, open_checkpoint, pick_device, stored_data
from tinygpt.config import DataConfig, ModelConfig, TokenizerConfig, UserError
from tinygpt.generate import generate
from tinygpt.model import GPT
from tinygpt.tokenizer import CharTokenizer

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 1}
SHAPES = {
    "gpt2, tied": {"bias": True},
    "gpt2, untied": {"bias": True, "tie_embeddings": False},
    "llama, tied": LLAMA,
    "llama, untied": {**LLAMA, "tie_embeddings": False},
}
TOKENIZER = CharTokenizer("abcdefgh \n")


def made(**options):
    torch.manual_seed(0)
    return GPT(ModelConfig(**SHAPE, **options), TOKENIZER.vocab_size).eval()


def content(model):
    config = {"data": asdict(DataConfig(tokenizer=TokenizerConfig("char"), val_fraction=0.2))}
    return {
        "state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
        "tinygpt": make_card(model, TOKENIZER, config, {"name": "text", "sha256": "0"}),
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
    }


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "checkpoints" / "best.ckpt"
    durable_save(content(made()), path)
    return path


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_model_comes_back_with_its_logits_and_its_tokenizer(tmp_path, options):
    model, path = made(**options), tmp_path / "a.ckpt"
    durable_save(content(model), path)
    back, tokenizer = load(path)
    idx = torch.randint(TOKENIZER.vocab_size, (3, 12))
    with torch.no_grad():
        assert torch.equal(back(idx), model(idx))  # through the tables of RoPE too, which are in no file
    assert back.config == model.config
    assert not back.training
    assert (back.lm_head.weight is back.wte.weight) == model.config.tie_embeddings
    assert back.num_parameters() == model.num_parameters()
    assert tokenizer.state() == TOKENIZER.state()
    assert generate(back, tokenizer, "abc", max_new_tokens=20, seed=1) == generate(
        model, TOKENIZER, "abc", max_new_tokens=20, seed=1
    )


def test_a_lone_file_is_enough(tmp_path, file, monkeypatch):
    alone = tmp_path / "alone"
    alone.mkdir()
    file.rename(alone / "x.ckpt")
    monkeypatch.chdir(alone)
    model, _ = load("x.ckpt")
    assert model.config.n_embd == 16


def test_a_loaded_model_can_be_trained(file):
    model, _ = load(file)
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    again, _ = load(file)
    assert not torch.equal(again.wte.weight, model.wte.weight)  # and the file is as it was
    assert torch.equal(again.wte.weight, made().wte.weight)


def test_the_data_of_the_run_is_remembered(file):
    data = stored_data(open_checkpoint(file)["tinygpt"])
    assert data == DataConfig(tokenizer=TokenizerConfig("char"), val_fraction=0.2)


def test_where_a_checkpoint_is_looked_for(tmp_path, file, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find(file) == file
    assert find(tmp_path) == file
    assert find(tmp_path, "last") == file  # where there is only one
    last = file.with_name("last.ckpt")
    last.write_bytes(file.read_bytes())
    assert find(tmp_path, "last") == last
    assert find(tmp_path) == file
    file.unlink()
    assert find(tmp_path) == last
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "latest").symlink_to(tmp_path)
    assert find("latest").resolve() == last.resolve()


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="there is no run yet") as error:
        find("latest")
    assert "python train.py" in error.value.hint
    with pytest.raises(UserError, match="there is no checkpoint nowhere"):
        find("nowhere")
    with pytest.raises(UserError, match="holds no checkpoints"):
        find(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_checkpoint_cannot_run_code(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "evil.ckpt"
    torch.save({**content(made()), "callbacks": Bomb()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError):
        load(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError):
        load(path)
    assert not Path("exploded").exists()


def test_a_file_cut_short_at_any_length_is_refused(file):
    whole = file.read_bytes()
    for length in [*range(0, 64, 7), *range(64, len(whole), len(whole) // 40), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"best\.ckpt") as error:
            load(file)
        assert "outputs/latest" in error.value.hint


@pytest.mark.parametrize(
    "foreign",
    [
        {"state_dict": {}},
        [1, 2],
        torch.zeros(3),
        {"model": {"w": torch.zeros(2)}, "tinygpt": 3},
        {"tinygpt": {"format": 1}},
        {"tinygpt": {"format": 1, "model": {"n_wings": 2}, "vocab_size": 3, "tokenizer": {}}, "state_dict": {}},
        {"tinygpt": {"format": 1, "model": {"n_layer": "x"}, "vocab_size": "y", "tokenizer": {}}, "state_dict": {}},
    ],
)
def test_another_programs_file_is_refused(tmp_path, foreign):
    path = tmp_path / "other.ckpt"
    torch.save(foreign, path)
    with pytest.raises(UserError, match=r"other\.ckpt|checkpoint"):
        load(path)


def test_a_text_file_and_a_folder_are_refused(tmp_path):
    path = tmp_path / "notes.ckpt"
    path.write_text("these are my notes")
    with pytest.raises(UserError, match=r"notes\.ckpt"):
        load(path)


def test_a_newer_format_says_what_to_do(tmp_path):
    later = content(made())
    later["tinygpt"]["format"] = module.FORMAT + 1
    durable_save(later, tmp_path / "later.ckpt")
    with pytest.raises(UserError, match="has format 2") as error:
        load(tmp_path / "later.ckpt")
    assert "upgrade" in error.value.hint


def test_weights_that_do_not_fit_are_refused():
    wrong = content(made())
    wrong["tinygpt"]["model"]["n_embd"] = 32
    with pytest.raises(UserError, match="do not fit its model"):
        build_model(wrong)
    short = content(made())
    del short["state_dict"]["model.ln_f.weight"]
    with pytest.raises(UserError, match="do not fit its model"):
        build_model(short)


def test_a_failure_while_saving_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def half(value, out):
        out.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="No space"):
        durable_save({}, file)
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == ["best.ckpt"]


def test_a_save_that_is_interrupted_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def interrupted(value, out):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        durable_save({}, file)
    assert file.read_bytes() == before
    assert len(list(file.parent.iterdir())) == 1


def test_a_save_is_on_disk_before_it_has_its_name(file, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    durable_save({"x": 1}, file)
    assert events == ["fsync", "rename", "fsync"]  # the file, its name, its folder


def test_devices():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    missing = next(name for name in ("cuda", "mps") if not getattr(torch, name).is_available())
    with pytest.raises(UserError, match=f"device={missing} is not available"):
        pick_device(missing)
