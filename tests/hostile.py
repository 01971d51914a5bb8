"""Checkpoints that mean harm or are damaged, each made from a good one: what test_hostile.py opens in every way there is.

`FILES` has, by name, what makes the file and words of the reason for which it is refused.
"""

import os
import pickle
import random
import subprocess
import zipfile

import torch

EXPLODED = "exploded"  # the folder that any code of theirs would make


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


BOMB = Call(os.mkdir, EXPLODED)
CALLS = {
    "os.mkdir": BOMB,
    "eval": Call(eval, f"__import__('os').mkdir({EXPLODED!r})"),
    "Popen": Call(subprocess.Popen, ["mkdir", EXPLODED]),
    "getattr": Call(getattr, BOMB, "x"),
    "torch.load": Call(torch.load, "x"),
}


# Files as entries


def unpack(path):
    """The entries of a good file by their names below the archive's own."""
    with zipfile.ZipFile(path) as archive:
        return {entry.filename.split("/", 1)[1]: archive.read(entry) for entry in archive.infolist()}


def pack(path, entries, packed=(), root="archive/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            how = zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED
            archive.writestr(f"{root}{name}", data, compress_type=how)


def load(good):
    return torch.load(good, weights_only=True)


def saved(change):
    """A maker of what torch.save writes of the changed content."""

    def make(good, path):
        content = load(good)
        torch.save(change(content) or content, path)

    return make


def repacked(change, **options):
    """A maker of the good file with changed entries."""

    def make(good, path):
        entries = unpack(good)
        change(entries)
        pack(path, entries, **options)

    return make


def coded(code):
    """A maker of the good file with another data.pkl."""
    return repacked(lambda entries: entries.update({"data.pkl": b"\x80\x02" + code + b"."}))


def card(**changes):
    return saved(lambda content: content["tinygpt"].update(changes))


def shape(**changes):
    return saved(lambda content: content["tinygpt"]["model"].update(changes))


def config(change):
    return saved(lambda content: change(content["tinygpt"]["config"]))


# Makers with more to them


def spread(content):
    """A number that says it is a terabyte."""
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(1).expand(2**19, 2**19)


def shared(content):
    """One table under hundreds of names."""
    table = content["state_dict"]["model.wte.weight"]
    content["state_dict"].update({f"model.h.{n}.x": table.view(table.shape) for n in range(300)})


def whole_numbers(content):
    content["state_dict"] = {name: weight.long() for name, weight in content["state_dict"].items()}


def laughs(content):
    """Ten lists of ten lists of ten lists, twenty deep, in a few kilobytes."""
    value = ["ha"] * 10
    for _ in range(20):
        value = [value] * 10
    content["tinygpt"]["tokenizer"] = {"kind": "word", "words": value}


def cycle(content):
    value = []
    value.append(value)
    content["tinygpt"]["config"]["data"] = value


def nested_key():
    """A dictionary whose key is a tuple of twice a tuple of twice a tuple: to hash it takes for ever."""
    levels = b""
    for n in range(60):
        get = pickle.BINGET + bytes([n])
        levels += get + get + pickle.TUPLE2 + pickle.BINPUT + bytes([n + 1])
    return pickle.EMPTY_DICT + pickle.EMPTY_TUPLE + pickle.BINPUT + b"\0" + levels + pickle.NONE + pickle.SETITEM


def copies(count=3000):
    """As many dictionaries made of one long one as a small file has room to ask for."""
    numbers = b"".join(pickle.BININT2 + n.to_bytes(2, "little") + pickle.NONE for n in range(count))
    long = pickle.EMPTY_DICT + pickle.BINPUT + b"\0" + pickle.MARK + numbers + pickle.SETITEMS
    copy = b"ccollections\nOrderedDict\n" + pickle.BINGET + b"\0" + pickle.TUPLE1 + pickle.REDUCE
    return pickle.MARK + long + copy * count + pickle.TUPLE


def directory(good, path):
    """Nothing but the directory of an archive, of 300,000 entries."""
    with zipfile.ZipFile(path, "w") as archive:
        entry = zipfile.ZipInfo("archive/data.pkl")
        archive.writestr(entry, b"")
        archive.filelist *= 300_000


def overlapping(good, path):
    """Entries that are all the same bytes: small in the file, large together."""
    pack(path, {"data.pkl": bytes(2**20)})
    with zipfile.ZipFile(path, "a") as archive:
        first = archive.infolist()[0]
        for number in range(2000):
            entry = zipfile.ZipInfo(f"archive/data/{number}")
            entry.CRC, entry.file_size, entry.compress_size = first.CRC, first.file_size, first.compress_size
            entry.header_offset = first.header_offset
            archive.filelist.append(entry)
        archive._didModify = True


def twice(good, path):
    """Two entries of one name, of which each program reads another."""
    entries = unpack(good)
    pack(path, entries)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(BOMB, protocol=2))


def torchscript(good, path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def half(good, path):
    content = good.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def flipped(good, path):
    """One bit of the largest of the weights."""
    content = bytearray(good.read_bytes())
    weight = load(good)["state_dict"]["model.wte.weight"].numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 4
    path.write_bytes(content)


def flipped_moments(good, path):
    content = bytearray(good.read_bytes())
    moment = max((v["exp_avg"] for v in load(good)["optimizer_states"][0]["state"].values()), key=torch.numel)
    content[content.index(moment.numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


def plain(value):
    return lambda good, path: path.write_bytes(pickle.dumps(value))


FILES = {
    # code
    **{f"{name} at the top": (saved(lambda _, call=call: call), "names code") for name, call in CALLS.items()},
    "code in the hyper-parameters": (saved(lambda c: c.update(hyper_parameters={"lr": BOMB})), "names code, posix.mkdir"),
    "code in a callback's state": (saved(lambda c: c["callbacks"].update(EarlyStopping={"wait": BOMB})), "names code"),
    "code in the optimizer's state": (saved(lambda c: c["optimizer_states"][0]["state"].update({0: BOMB})), "names code"),
    "code among the weights": (saved(lambda c: c["state_dict"].update({"model.x": BOMB})), "names code"),
    "code in the card": (card(tokenizer=BOMB), "names code"),
    "code as a key": (saved(lambda c: c.update({BOMB: 1})), "names code"),
    "a pickle": (plain(BOMB), "cannot be read"),
    "the old format": (lambda good, path: torch.save(BOMB, path, _use_new_zipfile_serialization=False), "cannot be read"),
    "a module": (saved(lambda _: torch.nn.Linear(2, 2)), "names code, torch.nn"),
    "torchscript": (torchscript, "entry named"),
    "two of one name": (twice, "hide each other"),
    # archives
    "a packed pickle": (
        repacked(lambda e: e.update({"data.pkl": bytes(2**26)}), packed=("data.pkl",)),
        "bytes that become 67,108,864",
    ),
    "packed weights": (repacked(lambda e: e.update({"data/0": bytes(2**26)}), packed=("data/0",)), "packed"),
    "a path upwards": (repacked(lambda e: e.update({"../../exploded": b""})), "entry named"),
    "a path from the root": (repacked(lambda e: None, root="/exploded/"), "entry named"),
    "a path for Windows": (repacked(lambda e: e.update({"..\\exploded": b""})), "entry named"),
    "a root upwards": (repacked(lambda e: None, root="../"), "entry named"),
    "a long directory": (directory, "directory"),
    "entries over each other": (overlapping, "larger than the file"),
    # pickles
    "a tensor made at once": (coded(b"ctorch\nFloatTensor\n\x8a\x05\x00\x00\x00\x00\x10\x85R"), "torch.FloatTensor"),
    "bytes made at once": (coded(b"c__builtin__\nbytearray\n\x8a\x05\x00\x00\x00\x00\x10\x85R"), "bytearray"),
    "a method of a tensor": (coded(b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n)R"), "names code"),
    "attributes": (coded(b"ccollections\nOrderedDict\n)R}X\x06\x00\x00\x00valuesK\x01sb"), "attributes"),
    "objects of classes": (coded(b"ccollections\nOrderedDict\n)\x81"), "not that of a checkpoint"),
    "copies of a dictionary": (coded(copies()), "not that of a checkpoint"),
    "a nested key": (coded(nested_key()), "nested"),
    "millions of dictionaries": (coded(b"(" + b"}" * 2**22 + b"t"), "memory"),
    "a pit": (coded(b"]" * 20_000 + b"a" * 19_999), "nested without end"),
    "laughs": (saved(laughs), "nested without end"),
    "a cycle": (saved(cycle), "nested without end"),
    # shapes
    "a number that is a terabyte": (saved(spread), "cannot lie in a storage of 1 numbers"),
    "one table under many names": (saved(shared), "twice as large"),
    "a wide model": (shape(n_embd=2**40, n_head=2), "n_embd=1099511627776"),
    "a wide model within limits": (shape(n_embd=2**20, n_head=2), "do not fit"),
    "a deep model": (shape(n_layer=10**9), "n_layer=1000000000"),
    "a deep model within limits": (shape(n_layer=1000), "do not fit"),
    "a long table": (shape(block_size=2**24, position="rope"), "bytes beside"),
    "a table longer than memory": (shape(block_size=2**60, position="rope"), "block_size="),
    "a large vocabulary": (card(vocab_size=2**50), "fit"),
    "no vocabulary": (card(vocab_size=-1), "fit"),
    "a vocabulary of text": (card(vocab_size="many"), "vocab_size"),
    "another vocabulary": (card(tokenizer={"kind": "byte"}), "256"),
    "a shape of text": (shape(n_layer="1"), "n_layer=1 is not a whole number"),
    "a shape of truth": (shape(n_layer=True), "n_layer=True"),
    "a shape that is no number": (shape(norm_eps=float("nan")), "norm_eps=nan"),
    "a shape of nothing": (shape(n_embd=None), "n_embd=None"),
    "a shape with more": (shape(n_wings=2), "n_wings"),
    "no shape": (card(model=[1, 2]), "model is not"),
    "no tokenizer": (card(tokenizer={"kind": "telepathy"}), "telepathy"),
    "a tokenizer that lies": (card(tokenizer={"kind": "char", "characters": 7}), "tokenizer is damaged"),
    "whole numbers": (
        saved(lambda c: c.update(state_dict={k: v.long() for k, v in c["state_dict"].items()})),
        "LongStorage",
    ),
    "no weights": (saved(lambda c: c.update(state_dict={})), "no weights"),
    "weights that are text": (saved(lambda c: c.update(state_dict={"model.wte.weight": "heavy"})), "no weights"),
    # damage
    "half": (half, "damaged"),
    "nothing": (lambda good, path: path.write_bytes(b""), "damaged"),
    "a bit": (flipped, "model.wte.weight does not match"),
    "noise": (lambda good, path: path.write_bytes(random.Random(0).randbytes(10_000)), "damaged"),
}


# What is refused only where a run is to go on from it

PLANTED = {"_target_": "os.mkdir", "path": EXPLODED}
TIMER = {"_target_": "torch.utils.benchmark.Timer", "setup": f"pass\rimport os\ros.mkdir({EXPLODED!r})"}
LAMBDA = {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}
RUN = {"_target_": "subprocess.Popen", "args": ["mkdir", EXPLODED]}
EARLY = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}

STATES = {
    "a target": (config(lambda c: c["callbacks"].update(x=PLANTED)), "os.mkdir is not allowed"),
    "a target of torch's": (config(lambda c: c["callbacks"].update(x=TIMER)), "Timer is not allowed"),
    "a target in a target": (
        config(lambda c: c["callbacks"].update(x={**EARLY, "patience": PLANTED})),
        "x.patience._target_=os.mkdir",
    ),
    "a target for the trainer": (config(lambda c: c["trainer"].update(_target_="os.mkdir")), "os.mkdir is not allowed"),
    "a target in the trainer": (config(lambda c: c["trainer"].update(profiler=PLANTED)), "os.mkdir is not allowed"),
    "a function of ours": (
        config(lambda c: c["callbacks"].update(x={"_target_": "tinygpt.checkpoint.sync_folder", "folder": "."})),
        "is no Callback",
    ),
    "a target that it allows itself": (
        config(lambda c: c.update(allow_targets=["subprocess"], callbacks={"x": {**LAMBDA, "on_fit_start": RUN}})),
        "subprocess.Popen is not allowed",
    ),
    "no config": (card(config={}), "model is not"),
    "data that is none": (config(lambda c: c.update(data=3)), "data is not"),
    "data with more": (config(lambda c: c["data"].update(wings=2)), "wings"),
    "a seed of text": (config(lambda c: c.update(seed="lucky")), "seed is not"),
    "steps below none": (saved(lambda c: c.update(global_step=-3)), "global_step is below 0"),
    "no steps": (saved(lambda c: c.update(global_step="many")), "global_step"),
    "loops of text": (saved(lambda c: c.update(loops={"fit_loop": "x"})), "its loops hold more than numbers"),
    "callbacks of text": (
        saved(lambda c: c["callbacks"].update(BestCheckpoint={"loss": "x", "step": 1, "metrics": {}})),
        "cannot go",
    ),
    "moments of another shape": (
        saved(lambda c: c["optimizer_states"][0]["state"][0].update(exp_avg=torch.zeros(3))),
        "exp_avg of weight 0 has another shape",
    ),
    "no moments": (saved(lambda c: c.update(optimizer_states=[{}])), "state does not fit"),
    "a bit of the moments": (flipped_moments, "corrupted: the checksum of optimizer_states"),
}
