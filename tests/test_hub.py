"""Weights from elsewhere: every file layout of GPT-2 and Llama opens to the same logits; what is broken is named."""

import http.server
import json
import os
import shutil
import socketserver
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import run_inside
from test_model import assert_same_logits, tokens
from test_model import hf_gpt2 as unseeded_gpt2
from test_model import hf_llama as unseeded_llama

import tinygpt
from tinygpt import checkpoint as ckpt
from tinygpt.config import UserError
from tinygpt.pretrained import open_hub
from tinygpt.tokenizer import END_OF_TEXT, BPETokenizer, GPT2Tokenizer
from tinygpt.tokenizer_files import write_tokenizer


def hf_gpt2(**changes):
    """The same each time."""
    torch.manual_seed(1)
    return unseeded_gpt2(**changes)


def hf_llama(**changes):
    torch.manual_seed(1)
    return unseeded_llama(**changes)


REFERENCES = {
    "gpt2": lambda: hf_gpt2(),
    "gpt2, all else": lambda: hf_gpt2(
        n_inner=20, layer_norm_epsilon=1e-2, activation_function="gelu", tie_word_embeddings=False
    ),
    "llama": lambda: hf_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-2),
    "llama, all else": lambda: hf_llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
}


@pytest.fixture(params=REFERENCES)
def reference(request):
    return REFERENCES[request.param]()


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 as transformers saves it."""
    hf_gpt2().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# What can be opened


@pytest.mark.parametrize("shards", [False, True])
def test_what_transformers_saves_opens_to_its_logits(reference, tmp_path, shards):
    reference.save_pretrained(tmp_path, max_shard_size="8KB" if shards else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 if shards else (tmp_path / "model.safetensors").exists()
    model, tokenizer = tinygpt.load(f"hf:{tmp_path}")
    assert_same_logits(model, reference)
    assert tokenizer is None
    assert not model.training
    assert (model.lm_head.weight is model.wte.weight) == reference.config.tie_word_embeddings


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_old_bin_files_open(tmp_path, legacy, prefix):
    reference = hf_gpt2()
    tensors = {k.replace("transformer.", prefix): v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    for layer in range(2):
        tensors[f"{prefix}h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.uint8).tril()
        tensors[f"{prefix}h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(tensors, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    reference.config.save_pretrained(tmp_path)
    assert_same_logits(tinygpt.load(f"hf:{tmp_path}")[0], reference)


def test_a_sharded_bin_opens(tmp_path):
    reference = hf_llama()
    names = list(reference.state_dict())
    table = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for file in set(table.values()):
        torch.save({k: v for k, v in reference.state_dict().items() if table[k] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": table}))
    reference.config.save_pretrained(tmp_path)
    assert_same_logits(tinygpt.load(f"hf:{tmp_path}")[0], reference)


def test_a_head_that_is_stored_instead_of_the_embedding_it_shares(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("transformer.wte.weight")
    save_file(tensors, folder / "model.safetensors")
    assert_same_logits(tinygpt.load(f"hf:{folder}")[0], hf_gpt2())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_become_float32(reference, tmp_path, dtype):
    reference.to(dtype).save_pretrained(tmp_path)
    model, _ = tinygpt.load(f"hf:{tmp_path}")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert_same_logits(model, type(reference).from_pretrained(tmp_path, dtype=torch.float32))


def test_nothing_is_initialised_that_the_file_holds(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, **how: drawn.append(tensor.device.type))
    tinygpt.load(f"hf:{folder}")
    assert set(drawn) == {"meta"}


def test_a_shorter_context_keeps_the_first_positions(reference, tmp_path):
    reference.save_pretrained(tmp_path)
    model, _ = tinygpt.load(f"hf:{tmp_path}", block_size=8)
    idx = tokens(length=8)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), reference(idx).logits, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="9 tokens do not fit"):
        model(tokens(length=9))


def test_positions_that_were_never_learned_are_refused(folder):
    with pytest.raises(UserError, match="more than the 16 positions"):
        tinygpt.load(f"hf:{folder}", block_size=17)


# What cannot


def lie(**values):
    return lambda folder: change(folder / "config.json", **values)


def index(table):
    def damage(folder):
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps(table))

    return damage


def to_bin(content, **how):
    def damage(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin", **how)

    return damage


def retyped(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "transformer.ln_f.bias": torch.zeros(24, dtype=torch.int8)}, folder / "model.safetensors")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


SHARD = "model-00001-of-00001.safetensors"
BROKEN = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
    "deep JSON": (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read"),
    "bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json cannot be read"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 5000), "cannot be read"),
    "empty file": (lambda f: os.truncate(f / "model.safetensors", 0), "cannot be read"),
    "noise": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 1000), "cannot be read"),
    "integers": (retyped, "not floating-point numbers: ln_f.bias torch.int8"),
    "another architecture": (lie(model_type="bert"), "model_type=bert"),
    "a list of architectures": (lie(model_type=[]), "model_type="),
    "an activation of no name": (lie(activation_function={}), "activation_function="),
    "a number that is no float": (lie(layer_norm_epsilon=10**400), "layer_norm_epsilon="),
    "no architecture": (lie(model_type=None), "no model_type"),
    "quantised": (lie(quantization_config={"bits": 4}), "quantization_config"),
    "fewer layers": (lie(n_layer=1), "unknown: h.1"),
    "more layers": (lie(n_layer=3), "missing: h.2"),
    "wider": (lie(n_embd=48), "wrong shape"),
    "more positions": (lie(n_positions=10**6), r"wrong shape: wpe\.weight \(16, 24\)"),
    "larger vocabulary": (lie(vocab_size=2 * 10**9), r"wrong shape: wte\.weight"),
    "an inner width": (lie(n_inner=10**9), "n_inner=1000000000"),
    "terabytes": (lie(vocab_size=10**14), "vocab_size=100000000000000"),
    "more bytes than 64 bits count": (lie(n_embd=2**31 - 8, vocab_size=2**31 - 1), "n_embd=2147483640"),
    "a billion layers": (lie(n_layer=10**9), "n_layer=1000000000"),
    "an odd type": (lie(n_layer="2"), "n_layer=2"),
    "a truth": (lie(n_head=True), "n_head=True"),
    "nothing": (lie(n_head=0), "n_head=0"),
    "below nothing": (lie(n_embd=-24), "n_embd=-24"),
    "not a number": (lie(layer_norm_epsilon=float("nan")), "layer_norm_epsilon=nan"),
    "no end": (lie(layer_norm_epsilon=float("inf")), "layer_norm_epsilon=inf"),
    "no flag": (lie(tie_word_embeddings="yes"), "tie_word_embeddings=yes"),
    "a long name": (lie(model_type="x" * 10**6), "model_type=xxx.*\\.\\.\\."),
    "missing shard": (
        index({"weight_map": {"transformer.wte.weight": "model-00002-of-00002.safetensors"}}),
        "shard model-00002",
    ),
    "incomplete index": (index({"weight_map": {"transformer.wte.weight": SHARD}}), "missing: wpe.weight"),
    "no map": (index({"weight_map": [1]}), "no weight_map"),
    "numbers": (index({"weight_map": {"x": 1}}), "no weight_map"),
    "above": (index({"weight_map": {"x": "../secret.safetensors"}}), r"outside its folder: '\.\./secret"),
    "root": (index({"weight_map": {"x": "/etc/passwd"}}), "outside its folder: '/etc/passwd'"),
    "below": (index({"weight_map": {"x": "a/b.safetensors"}}), "outside its folder"),
    "another system's": (index({"weight_map": {"x": "..\\x.safetensors"}}), "outside its folder"),
    "only dots": (index({"weight_map": {"x": ".."}}), "outside its folder"),
    "a pickle that runs": (to_bin({"x": Bomb()}), "cannot be opened safely"),
    "an old one": (to_bin({"x": Bomb()}, _use_new_zipfile_serialization=False), "pytorch_model.bin cannot be"),
    "a list": (to_bin([torch.zeros(2)]), "something else than named tensors"),
    "a training state": (to_bin({"model": {"w": torch.zeros(2)}}), "something else than named tensors"),
    "a text": (lambda f: (to_bin(1)(f), (f / "pytorch_model.bin").write_text("hello")), "pytorch_model.bin cannot be"),
    "a damaged tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer files"),
    "a damaged export": (lambda f: (f / "tinygpt.json").write_text('{"format": 2}'), "has format 2"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_or_hostile_folder_is_refused_by_name(folder, what, monkeypatch):
    monkeypatch.chdir(folder.parent)
    damage, words = BROKEN[what]
    damage(folder)
    with pytest.raises(UserError, match=words) as caught:
        tinygpt.load("hf:model")
    assert caught.value.hint
    assert len(str(caught.value)) < 700
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_position_embeddings": 2**30}, "block_size=1073741824"),
        ({"max_position_embeddings": 2**23}, "block_size=8388608 asks for"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, "rope_theta=0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type=yarn"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"num_key_value_heads": 5}, "n_kv_head"),
        ({"intermediate_size": 10**12}, "intermediate_size=1000000000000"),
    ],
)
def test_a_llama_config_that_lies_is_refused(tmp_path, values, words):
    hf_llama().save_pretrained(tmp_path)
    lie(**values)(tmp_path)
    with pytest.raises(UserError, match=words):
        tinygpt.load(f"hf:{tmp_path}")


def test_what_is_no_folder_and_no_name_says_so(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no folder \./nowhere"):
        tinygpt.load("hf:./nowhere")
    with pytest.raises(UserError, match="model is a model of Hugging Face's") as caught:
        tinygpt.load("model")
    assert caught.value.hint == "say so: hf:model"


# Tokenizers


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A folder with the files of a learned BPE, and that BPE."""
    text = "the cat sat on the mat, and the dog ran to the hen. Don't they'd say: 3.14\n" * 50
    tokenizer = BPETokenizer.learn([text], 300)
    write_tokenizer(tokenizer, folder := tmp_path_factory.mktemp("bpe"), 16)
    return folder, tokenizer


def with_tokenizer(folder, files, vocab_size, *names):
    """A GPT-2 of this vocabulary, beside tokenizer files."""
    hf_gpt2(vocab_size=vocab_size).save_pretrained(folder)
    for name in names or [path.name for path in files.iterdir()]:
        shutil.copy(files / name, folder / name)
    return f"hf:{folder}"


@pytest.mark.parametrize("names", [(), ("vocab.json", "merges.txt")])
def test_a_byte_level_bpe_becomes_ours(learned, tmp_path, names):
    files, tokenizer = learned
    model, found = tinygpt.load(with_tokenizer(tmp_path, files, tokenizer.vocab_size, *names))
    assert found.state() == tokenizer.state()
    assert found.vocab_size == model.vocab_size


def test_a_padded_vocabulary_keeps_its_logits_and_every_id_has_a_text(learned, tmp_path):
    files, tokenizer = learned
    model, found = tinygpt.load(with_tokenizer(tmp_path, files, tokenizer.vocab_size + 4))
    assert model.vocab_size == found.vocab_size == tokenizer.vocab_size + 4
    assert found.encode("the cat") == tokenizer.encode("the cat")
    assert "unused" in found.decode([found.vocab_size - 1])
    assert found.byte_lengths()[-4:].tolist() == [0] * 4


def edited(spec_of):
    def prepare(files):
        spec = json.loads((files / "tokenizer.json").read_text())
        spec_of(spec)
        (files / "tokenizer.json").write_text(json.dumps(spec))

    return prepare


def in_front(spec):
    """Special tokens first, as many trained tokenizers have them."""
    spec["model"]["vocab"] = {"<s>": 0} | {token: 1 + i for token, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [
        {"id": 0, "content": "<s>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ]


def swapped(spec):
    spec["model"]["merges"][3:5] = spec["model"]["merges"][4:2:-1]


def with_a_word(spec):
    word = {"id": 300, "content": "hen", "special": False}
    spec["added_tokens"] = [word | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]


OTHERS = {
    "a word added": edited(with_a_word),
    "merges left to chance": edited(lambda spec: spec["model"].update(dropout=0.9)),
    "special tokens in front": edited(in_front),
    "lower case": edited(lambda spec: spec.update(normalizer={"type": "Lowercase"})),
    "a space in front": edited(lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True)),
    "merges out of order": edited(swapped),
    "no cutting": edited(lambda spec: spec["pre_tokenizer"].update(use_regex=False)),
    "cut otherwise": edited(lambda spec: spec.update(pre_tokenizer={"type": "Whitespace"})),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_tokenizer_that_ours_cannot_be_is_none(learned, tmp_path, what):
    files = tmp_path / "files"
    shutil.copytree(learned[0], files)
    OTHERS[what](files)
    model, found = tinygpt.load(with_tokenizer(tmp_path / "model", files, 310, "tokenizer.json"))
    assert found is None
    assert model.vocab_size == 310


def test_another_pattern_is_kept(learned, tmp_path):
    from tokenizers import Tokenizer

    pattern = r"(?i:'s|'t|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    files = tmp_path / "files"
    shutil.copytree(learned[0], files)
    both = {"type": "Sequence", "pretokenizers": [split, level]}
    edited(lambda spec: spec.update(pre_tokenizer=both))(files)
    _, found = tinygpt.load(with_tokenizer(tmp_path / "model", files, 310, "tokenizer.json"))
    text = "The cat's hat:\n  12345 (they'd) ran   to the hen"
    assert found.encode(text) == Tokenizer.from_file(str(files / "tokenizer.json")).encode(text).ids
    assert found.encode(text) != learned[1].encode(text)  # as "   to" is cut otherwise


def test_gpt2_s_own_files_are_gpt2_s_tokenizer(shared_data, tmp_path):
    """The two files of OpenAI under the names that Hugging Face gives them."""
    cache = shared_data / "tiktoken_cache"
    merges = cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    shutil.copy(cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", tmp_path / "vocab.json")
    shutil.copy(merges, tmp_path / "merges.txt")
    hf_gpt2(vocab_size=50257).save_pretrained(tmp_path)
    _, found = tinygpt.load(f"hf:{tmp_path}")
    assert isinstance(found, GPT2Tokenizer)
    assert found.state() == GPT2Tokenizer.from_merges(merges).state()  # so cached tokens are shared
    assert found.special_tokens == {END_OF_TEXT: 50256}


# Names on the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs, over one folder."""

    def do_HEAD(self):
        self.answer(send=False)

    def do_GET(self):
        self.answer(send=True)

    def answer(self, send):
        name = self.path.partition("?")[0].rpartition("/")[2]
        if "/resolve/" in self.path:
            self.server.asked.add(name)
            body = (self.server.folder / name).read_bytes()
        elif self.server.known in self.path:
            files = [{"rfilename": path.name} for path in self.server.folder.iterdir()]
            entries = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in self.server.folder.iterdir()
            ]
            whole = {"id": self.server.known, "sha": "1" * 40, "siblings": files}
            body = json.dumps(entries if "/tree/" in self.path else whole).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub on this machine that knows tiny/gpt2, and an empty cache."""
    from huggingface_hub import constants

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.known, server.asked = folder, "tiny/gpt2", set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        server.shutdown()


def test_a_name_is_fetched_once_and_only_the_files_that_are_needed(hub, folder, monkeypatch):
    for name in ("pytorch_model.bin", "train.py", "tokenizer.model", "model.onnx"):
        (folder / name).write_text("not needed")
    assert_same_logits(tinygpt.load("hf:tiny/gpt2")[0], hf_gpt2())
    assert hub.asked == {"config.json", "model.safetensors"}
    hub.shutdown()
    hub.server_close()
    assert_same_logits(tinygpt.load("hf:tiny/gpt2")[0], hf_gpt2())  # from the cache


def test_a_name_that_the_hub_does_not_know(hub):
    with pytest.raises(UserError, match=r"cannot fetch tiny/other .*HTTP 404") as caught:
        open_hub("tiny/other")
    assert "hf:DIR" in caught.value.hint


def test_without_a_connection_the_error_names_the_files(hub):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError, match=r"cannot fetch tiny/gpt2 .*no connection") as caught:
        open_hub("tiny/gpt2")
    for word in ("config.json", "model.safetensors", "tiny/gpt2", "hf:DIR"):
        assert word in caught.value.hint


def test_without_the_library_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub") as caught:
        open_hub("gpt2")
    assert "pip install -c constraints.txt -e '.[hf]'" in caught.value.hint


# The commands


@pytest.fixture(scope="module")
def home(learned, tmp_path_factory):
    """A folder with a model, one without a tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("home")
    with_tokenizer(folder / "model", *learned[:1], learned[1].vocab_size)
    hf_gpt2().save_pretrained(folder / "bare")
    (folder / "my.txt").write_text("the cat sat on the mat, and the dog ran to the hen.\n" * 100)
    return folder


TEXT = ("data=text", "data.path=my.txt", "cache_dir=cache")


def test_sample_and_evaluate_take_hf(home):
    done = run_inside("sample", "ckpt=hf:model", "prompt=the cat", "max_new_tokens=5", cwd=home)
    assert (done.code, done.stdout[:7]) == (0, "the cat")
    done = run_inside("evaluate", "ckpt=hf:model", *TEXT, cwd=home)
    assert json.loads(done.stdout)["checkpoint"] == "hf:model"
    assert json.loads(done.stdout)["bits_per_byte"] > 0


@pytest.mark.parametrize(
    ("verb", "arguments", "words"),
    [
        ("sample", ["ckpt=hf:bare"], "hf:bare brings no tokenizer"),
        ("evaluate", ["ckpt=hf:model"], "bring no corpus"),
        ("evaluate", ["ckpt=hf:bare", *TEXT], "the weights know 50 tokens, and the char tokenizer of the data has"),
        ("train", ["init_from=hf:bare", *TEXT], "the weights know 50 tokens"),
        ("train", ["init_from=hf:model", "model.block_size=17", *TEXT], "more than the 16 positions"),
        ("train", ["init_from=hf:nowhere/", *TEXT], "there is no folder nowhere/"),
    ],
)
def test_what_weights_lack_is_said_in_one_line(home, verb, arguments, words):
    done = run_inside(verb, *arguments, cwd=home)
    error, hint = done.stderr.strip().splitlines()[-2:]
    assert done.code == 2
    assert error.startswith("error: ")
    assert words in error
    assert hint.startswith("hint: ")
    assert not (home / "outputs").exists()


def test_the_experiment_fine_tunes_whatever_has_gpt2_s_layout(shared_data, tmp_path):
    """The recipe for the pretrained GPT-2, on random weights with GPT-2's vocabulary, in an old file."""
    cache, model = shared_data / "tiktoken_cache", tmp_path / "model"
    reference = hf_gpt2(vocab_size=50257, n_layer=1)
    tensors = {k.removeprefix("transformer."): v for k, v in reference.state_dict().items() if k != "lm_head.weight"}
    reference.config.save_pretrained(model)
    torch.save({**tensors, "h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}, model / "pytorch_model.bin")
    shutil.copy(cache / "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6", model / "vocab.json")
    shutil.copy(cache / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee", model / "merges.txt")
    small = ("trainer.max_steps=2", "trainer.val_check_interval=1", "data.val_tokens=200", "optimizer.lr=0.01")
    more = ("data.global_batch_size=4", "callbacks.samples=null", f"hydra.run.dir={tmp_path}/run")
    recipe = ("experiment=finetune_gpt2_shakespeare", "init_from=hf:model")
    done = run_inside("train", *recipe, *small, *more, f"data_dir={shared_data}", "cache_dir=cache", cwd=tmp_path)
    assert done.code == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["best_step"], summary["corpus"]["name"]) == (2, "shakespeare")
    tuned, tokenizer = ckpt.load(tmp_path / "run")
    assert tokenizer.kind == "gpt2"
    assert tuned.config.block_size == 16  # the weights' own: the recipe's is larger
    assert not torch.equal(tuned.wte.weight, reference.transformer.wte.weight)


def test_fine_tuning_starts_from_the_weights_cropped_and_with_their_tokenizer(home, learned, tmp_path):
    still = ("optimizer.lr=1e-12", "trainer.max_steps=1", "data.global_batch_size=4", f"hydra.run.dir={tmp_path}/run")
    done = run_inside("train", "init_from=hf:model", "model.block_size=8", "model.dropout=0.1", *TEXT, *still, cwd=home)
    shutil.rmtree(home / "outputs", ignore_errors=True)
    assert done.code == 0, done.stderr
    model, tokenizer = ckpt.load(tmp_path / "run")
    assert (model.config.block_size, model.config.dropout, model.config.mlp) == (8, 0.1, "gelu_tanh")
    assert tokenizer.state() == learned[1].state()
    reference, idx = hf_gpt2(vocab_size=learned[1].vocab_size), tokens(length=8)
    with torch.no_grad():
        torch.testing.assert_close(model(idx), reference(idx).logits, atol=1e-5, rtol=0)
