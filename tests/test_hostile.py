"""Hostile and damaged checkpoints, opened in every way there is: refused with a reason, no code run, no memory taken."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path

import hostile
import pytest
import scripts
import tiny
import torch
from scripts import files, run_inside

import tinygpt
from tinygpt import checkpoint as ckpt
from tinygpt.config import UserError

SPARE = 64 * 2**20  # bytes: what may be asked for beside twice the file's size


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The last checkpoint of a run of a few steps."""
    folder = tmp_path_factory.mktemp("good")
    return tiny.run(folder, steps=4, every=2) / "checkpoints" / "last.ckpt"


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A current folder in which nothing may explode."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert hostile.EXPLODED not in files(folder)


@contextlib.contextmanager
def peak_memory():
    """How far the memory of this process rises above what it is now, in bytes; nothing where the system cannot tell."""
    risen, reset = [0], Path("/proc/self/clear_refs")
    if not reset.exists():
        yield risen
        return
    reset.write_text("5")  # the highest mark begins anew
    before = held("VmRSS")
    yield risen
    risen[0] = held("VmHWM") - before


def held(name):
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("name", hostile.FILES)
def test_a_hostile_file_is_refused(name, good, tmp_path, place):
    (make, words), path = hostile.FILES[name], tmp_path / "x.ckpt"
    make(good, path)
    with peak_memory() as risen, pytest.raises(UserError) as caught:
        tinygpt.load(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert risen[0] < 2 * path.stat().st_size + SPARE


def refused(done, words):
    assert done.code == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith(" ")]
    assert [line.split(": ")[0] for line in errors] == ["error", "hint"], done.stderr
    assert words in errors[0]


SOME = ("os.mkdir at the top", "a packed pickle", "a path upwards", "a wide model", "a number that is a terabyte", "a bit")
WAYS = {
    "evaluate": ("evaluate", "ckpt={}"),
    "sample": ("sample", "ckpt={}"),
    "export": ("export", "ckpt={}", "format=safetensors", "out=exported"),
    "serve": ("serve", "ckpt={}", "port=0"),
    "init_from": ("train", "init_from={}"),
    "resume": ("train", "resume={}", "trainer.max_steps=6"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_script_refuses_it(way, good, tmp_path, place):
    for name in SOME if way in ("sample", "export") else SOME[::2]:
        (make, words), path = hostile.FILES[name], tmp_path / "x.ckpt"
        make(good, path)
        verb, *arguments = (part.format(path) for part in WAYS[way])
        with peak_memory() as risen:
            refused(run_inside(verb, *arguments, cwd=place), words)
        assert files(place) == set()
        assert risen[0] < 2 * path.stat().st_size + SPARE


@pytest.mark.parametrize(
    "name", [*SOME[:3], SOME[4], "torchscript", "laughs", "millions of dictionaries", "a pickle", "half"]
)
def test_weights_of_hugging_face_s_are_held_to_the_same(name, good, tmp_path, place):
    (make, words), path = hostile.FILES[name], tmp_path / "pytorch_model.bin"
    make(good, path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with peak_memory() as risen, pytest.raises(UserError) as caught:
        tinygpt.load(f"hf:{tmp_path}")
    assert words in str(caught.value) or name in ("a pickle", "half")  # which have the reasons of another reader
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert risen[0] < 2 * path.stat().st_size + SPARE


@pytest.mark.parametrize("name", hostile.STATES)
def test_no_run_goes_on_from_a_hostile_state(name, good, tmp_path, place):
    (make, words), path = hostile.STATES[name], tmp_path / "x.ckpt"
    make(good, path)
    refused(run_inside("train", f"resume={path}", "trainer.max_steps=6", cwd=place), words)


def test_a_script_as_a_process_takes_no_more_memory_than_an_honest_one(good, tmp_path, place):
    code, _, honest = measured("sample", f"ckpt={good}", "max_new_tokens=1")
    assert code == 0
    (make, words), path = hostile.FILES["packed weights"], tmp_path / "x.ckpt"
    make(good, path)
    code, stderr, taken = measured("sample", f"ckpt={path}", "max_new_tokens=1")
    refused(scripts.Done(code, "", stderr), words)
    assert taken < honest + 2 * path.stat().st_size + SPARE


def measured(verb, *arguments):
    """Exit code, standard error, and the most memory that a script held, in bytes."""
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen(scripts.command(verb, *arguments), stdout=subprocess.DEVNULL, stderr=stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        stderr.seek(0)
        return process.returncode, stderr.read(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Damage


def test_every_bit_that_flips_is_noticed_or_means_nothing(good, tmp_path):
    """In headers, values and numbers alike."""
    whole, path, wanted = good.read_bytes(), tmp_path / "x.ckpt", everything(good)
    draw, noticed = random.Random(0), 0
    for place in draw.sample(range(len(whole)), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :])
        try:
            assert everything(path) == wanted
        except UserError:
            noticed += 1
    assert noticed > 100


def everything(path):
    """What a checkpoint holds, as bytes that can be compared."""
    content = ckpt.open_checkpoint(path, whole=True)
    tensors = {name: tensor.numpy().tobytes() for name, tensor in ckpt.named_tensors(content)}
    return tensors, json.dumps(content, sort_keys=True, default=lambda value: str(type(value)))


def test_a_checkpoint_that_is_replaced_while_it_is_opened_is_read_anew(good, tmp_path, monkeypatch):
    """A run saves while sample.py reads: the checksums of the one do not fit the tensors of the other."""
    path, other, load = tmp_path / "x.ckpt", tmp_path / "other.ckpt", torch.load
    path.write_bytes(good.read_bytes())
    content = load(good, weights_only=True)
    content["state_dict"] = {name: weight + 1 for name, weight in content["state_dict"].items()}
    torch.save(content, other)

    def replaced(*arguments, **options):
        if other.exists():
            other.replace(path)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", replaced)
    opened = ckpt.open_checkpoint(path)
    name = "model.wte.weight"
    assert torch.equal(opened["state_dict"][name], content["state_dict"][name])


@pytest.mark.parametrize("whole", [False, True])
def test_what_callbacks_may_keep_opens(good, tmp_path, whole):
    """Lightning's own and other people's states hold more kinds of values than ours."""
    content, path = torch.load(good, weights_only=True), tmp_path / "x.ckpt"
    kept = [
        {1, 2},
        b"bytes",
        Counter("abca"),
        torch.Size((2, 3)),
        torch.device("cpu"),
        torch.bfloat16,
        (1, (2, (3,))),
        2**80,
        -1,
        1e300,
        None,
    ]
    content["callbacks"]["theirs"] = {"kept": kept, (1, 2): torch.nn.Parameter(torch.ones(2)), "none": torch.ones(0, 3)}
    content["callbacks"]["ours"] = OrderedDict(
        half=torch.ones(2, 3).half().t(), number=torch.tensor(3), yes=torch.tensor(True)
    )
    torch.save(content, path)
    opened = ckpt.open_checkpoint(path, whole)
    assert opened["callbacks"]["theirs"]["kept"] == kept
    assert torch.equal(opened["callbacks"]["ours"]["half"], content["callbacks"]["ours"]["half"])
