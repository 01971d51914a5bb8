"""Weights out: transformers and tinygpt load what export.py wrote, to the same logits and ids; what cannot be is said."""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from scripts import files, run_inside
from test_model import tokens

import tinygpt
from tinygpt import checkpoint as ckpt
from tinygpt import export as module
from tinygpt.config import DataConfig, ExportConfig, ModelConfig, TokenizerConfig, UserError
from tinygpt.export import export
from tinygpt.model import GPT
from tinygpt.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer
from tinygpt.tokenizer_files import merges, to_library

SHAPE = {"n_layer": 2, "n_head": 4, "n_embd": 24, "block_size": 16}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
EXPRESSIBLE = {
    "GPT2LMHeadModel": {"bias": True, "mlp": "gelu_tanh"},
    "GPT2LMHeadModel without biases": {"n_kv_head": 4},
    "GPT2LMHeadModel, all else": {"n_inner": 20, "norm_eps": 1e-2, "tie_embeddings": False, "dropout": 0.3},
    "LlamaForCausalLM": LLAMA,
    "LlamaForCausalLM, all else": {
        **LLAMA,
        "bias": True,
        "n_kv_head": 2,
        "n_inner": 20,
        "rope_theta": 50.0,
        "norm_eps": 1e-2,
    },
    "LlamaForCausalLM, untied": {**LLAMA, "tie_embeddings": False},
}
REFUSED = {
    "GPT-2's layout cannot express model.mlp=relu2": {"mlp": "relu2"},
    "GPT-2's layout cannot express model.qk_norm=true": {"qk_norm": True},
    "GPT-2's layout cannot express model.logit_softcap=30.0": {"logit_softcap": 30.0},
    "GPT-2's layout cannot express model.n_kv_head=2": {"n_kv_head": 2},
    "GPT-2's layout cannot express model.norm=rmsnorm": {"norm": "rmsnorm"},
    "Llama's layout cannot express model.mlp=gelu": {**LLAMA, "mlp": "gelu"},
    "Llama's layout cannot express model.norm=layernorm": {**LLAMA, "norm": "layernorm"},
    "Llama's layout cannot express model.qk_norm=true and model.logit_softcap=5.0": {
        **LLAMA,
        "qk_norm": True,
        "logit_softcap": 5.0,
    },
}
SMALL = CharTokenizer("abcdefgh \n")


def random_model(vocab_size, **options):
    """No parameter as it was initialised: zeros and ones would hide a mistake."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**SHAPE, **options}), vocab_size).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.2
    return model


def saved(path, tokenizer=SMALL, data=None, **options):
    """A checkpoint file of a random model, and the model."""
    model = random_model(tokenizer.vocab_size, **options)
    config = {"data": asdict(data or DataConfig(tokenizer=TokenizerConfig(tokenizer.kind)))}
    card = ckpt.make_card(model, tokenizer, config, {"name": "pydocs", "sha256": "0"})
    ckpt.durable_save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}, "tinygpt": card}, path)
    return model


def written(folder, **settings):
    return export(ExportConfig(ckpt=str(folder / "a.ckpt"), out=str(folder / "out"), **settings))


def same_logits(theirs, model, atol=1e-5):
    idx = tokens(vocab_size=model.vocab_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs(idx), model(idx), atol=atol, rtol=0)


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_transformers_loads_what_hf_writes(tmp_path, name):
    import transformers

    model = saved(tmp_path / "a.ckpt", **EXPRESSIBLE[name])
    written(tmp_path)
    theirs, report = getattr(transformers, re.split(r"\W", name)[0]).from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same_logits(lambda idx: theirs(idx).logits, model)
    assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is type(theirs)
    assert theirs.generation_config.eos_token_id is None  # another vocabulary's would end texts early
    again, tokenizer = tinygpt.load(tmp_path / "out")
    same_logits(again, model)
    assert tokenizer.state() == SMALL.state()


@pytest.mark.parametrize("words", REFUSED)
def test_what_no_layout_has_is_refused_by_name_and_safetensors_keeps_it(tmp_path, words):
    model = saved(tmp_path / "a.ckpt", **REFUSED[words])
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        written(tmp_path)
    assert "format=safetensors" in caught.value.hint
    assert files(tmp_path) == {"a.ckpt"}
    written(tmp_path, format="safetensors")
    again, tokenizer = tinygpt.load(tmp_path / "out")
    same_logits(again, model, atol=0)
    assert again.config == model.config
    assert tokenizer.state() == SMALL.state()


# Tokenizers


@pytest.fixture(scope="module")
def tokenizers(request):
    rhyme = (Path(__file__).parent / "test_tokenizer.py").read_text(encoding="utf-8")
    kinds = [
        CharTokenizer(rhyme),
        ByteTokenizer(),
        WordTokenizer.learn([rhyme], 2),
        BPETokenizer.learn([rhyme], 500),
    ]
    return {tokenizer.kind: tokenizer for tokenizer in kinds}


def check_ids(folder, tokenizer, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder, model_max_length=10**9)
    for text in texts:
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["char", "byte", "word", "bpe"])
def test_auto_tokenizer_gives_our_ids(tmp_path, tokenizers, kind, rhyme):
    tokenizer = tokenizers[kind]
    text = (Path(__file__).parent / "test_tokenizer.py").read_text(encoding="utf-8")
    saved(tmp_path / "a.ckpt", tokenizer)
    assert "AutoTokenizer gives our ids" in written(tmp_path)
    check_ids(tmp_path / "out", tokenizer, [text, "\n\n the cat\n", " "] + ([rhyme] if kind != "char" else []))


def test_gpt2_s_tokenizer_and_its_merges(tmp_path, shared_data):
    path = shared_data / "tiktoken_cache/6d1cbeee0f20b3d9449abfede4726ed8212e3aee"
    tokenizer = GPT2Tokenizer.from_merges(path)
    saved(tmp_path / "a.ckpt", tokenizer, n_layer=1)
    written(tmp_path)
    out = tmp_path / "out"
    text = (shared_data / "tinyshakespeare/input.txt").read_text()[:50_000]
    cases = (shared_data / "golden/gpt2_tokenizer/ggml-vocab-gpt-2.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    check_ids(out, tokenizer, [text, *cases])
    merged = [line for line in (out / "merges.txt").read_text().splitlines() if not line.startswith("#version")]
    assert merged == path.read_text(encoding="utf-8").split("\n")[1:-1]  # OpenAI's list, from the ranks alone
    assert json.loads((out / "generation_config.json").read_text()) == {"bos_token_id": 50256, "eos_token_id": 50256}
    shutil.move(out / "tinygpt.json", tmp_path)  # as if transformers had written it
    assert tinygpt.load(f"hf:{out}")[1].state() == tokenizer.state()


few = st.lists(st.sampled_from([*"aabbc't1 .\n", "  ", "é", "猫", "\u0301", "\x1c", "\x85"]), max_size=60).map("".join)


@settings(max_examples=300)
@given(text=few)
def test_no_text_has_other_ids_in_the_library(text):
    for tokenizer, library in small_tokenizers():
        assert library.encode(text).ids == tokenizer.encode(text)


def small_tokenizers(made=[]):  # noqa: B006 (made once)
    if not made:
        learned_from = "abab cabba aab' t'aa bbb.1 aaaa baab abba cab 猫é " * 40
        kinds = BPETokenizer.learn([learned_from], 330), WordTokenizer.learn([learned_from], 1), ByteTokenizer()
        made += [(tokenizer, to_library(tokenizer)) for tokenizer in kinds]
    return made


def test_a_bpe_that_no_merges_make_is_no_bpe():
    ranks = [bytes([value]) for value in range(256)] + [b"abc"]
    with pytest.raises(UserError, match="b'abc' of the BPE is no merge"):
        merges(ranks)


def test_a_tokenizer_that_cannot_be_written_is_said_and_kept_for_us(tmp_path):
    ranks = [bytes([value]) for value in range(256)] + [b"abc"]
    tokenizer = BPETokenizer(ranks, r"\S+|\s+", {})
    saved(tmp_path / "a.ckpt", tokenizer)
    said = written(tmp_path)
    assert "note: the bpe tokenizer cannot be written for transformers" in said
    assert "AutoTokenizer gives" not in said
    assert "cannot be written" in (tmp_path / "out/README.md").read_text()
    assert not [name for name in files(tmp_path / "out") if name.startswith(("tokenizer", "vocab", "merges"))]
    assert tinygpt.load(tmp_path / "out")[1].state() == tokenizer.state()


def test_other_ids_are_noticed(tmp_path, tokenizers, monkeypatch):
    monkeypatch.setattr("tinygpt.tokenizer_files._WORD", r"\S+")
    saved(tmp_path / "a.ckpt", tokenizers["word"])
    assert "transformers would give other ids" in written(tmp_path)


# Where it goes


@pytest.fixture
def ready(tmp_path):
    saved(tmp_path / "a.ckpt")
    return tmp_path


def test_an_earlier_export_is_replaced_and_nothing_else_is(ready):
    written(ready)
    first = files(ready / "out")
    written(ready, format="safetensors")
    assert files(ready / "out") < first  # no file of the other layout is left to be loaded by mistake
    (ready / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty, and notes\.txt there is not from an earlier export"):
        written(ready)
    assert (ready / "out" / "notes.txt").read_text() == "mine"
    written(ready, overwrite=True)
    assert files(ready / "out") == first
    assert {path.name for path in ready.iterdir()} == {"a.ckpt", "out"}


def test_a_directory_that_is_no_export_is_left(ready):
    (ready / "out").mkdir()
    written(ready)  # an empty one is as good as none
    shutil.rmtree(ready / "out")
    (ready / "out").mkdir()
    (ready / "out" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json there is not from an earlier export"):
        written(ready)


@pytest.mark.parametrize("place", [".", "..", "a.ckpt", "a.ckpt/x"])
def test_places_that_would_cost_more_than_an_export(ready, monkeypatch, place):
    (ready / "inner").mkdir()
    monkeypatch.chdir(ready / "inner" if place == ".." else ready)
    before = files(ready)
    with pytest.raises(UserError, match="out"):
        export(ExportConfig(ckpt=str(ready / "a.ckpt"), out=place, overwrite=True))
    assert files(ready) == before


@pytest.mark.parametrize("place", ["outputs", "outputs/latest", "outputs/run"])
def test_the_newest_run_is_not_exported_over_itself(ready, monkeypatch, place):
    run = ready / "outputs" / "run" / "checkpoints"
    run.mkdir(parents=True)
    shutil.copy(ready / "a.ckpt", run / "best.ckpt")
    (ready / "outputs" / "latest").symlink_to("run")
    monkeypatch.chdir(ready)
    before = files(ready)
    with pytest.raises(UserError, match="the checkpoint itself"):
        export(ExportConfig(out=place, format="safetensors", overwrite=True))
    assert files(ready) == before


@pytest.mark.parametrize("layout", ["hf", "safetensors"])
def test_a_wrong_export_is_never_there(ready, monkeypatch, layout):
    written(ready)
    before = (ready / "out/model.safetensors").read_bytes()
    save = module.save_file

    def damaged(tensors, path, metadata):
        name = sorted(tensors)[3]
        save({**tensors, name: tensors[name] * 1.01}, path, metadata=metadata)

    monkeypatch.setattr(module, "save_file", damaged)
    with pytest.raises(UserError, match="gives other logits than the checkpoint"):
        written(ready, format=layout)
    assert (ready / "out/model.safetensors").read_bytes() == before
    assert {path.name for path in ready.iterdir()} == {"a.ckpt", "out"}


def test_a_full_disk_leaves_the_earlier_export(ready, monkeypatch):
    written(ready)

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")  # as it does

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="no room left"):
        written(ready)
    assert {path.name for path in ready.iterdir()} == {"a.ckpt", "out"}
    assert tinygpt.load(ready / "out")[0].config.n_embd == 24


def test_without_transformers_the_error_names_the_extra(ready, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="transformers") as caught:
        written(ready)
    assert "pip install -c constraints.txt -e '.[hf]'" in caught.value.hint
    written(ready, format="safetensors")


def test_out_must_be_said():
    with pytest.raises(UserError, match="export needs out=DIR"):
        export(ExportConfig())


# The commands


@pytest.fixture(scope="module")
def exported(tiny_home, tmp_path_factory):
    """The tiny run, exported by the script into a folder of its own."""
    folder = tmp_path_factory.mktemp("exported")
    done = run_inside("export", f"ckpt={tiny_home}/outputs/latest", "out=it's [mine], a=b", cwd=folder)
    assert done.code == 0, done.stderr
    assert done.stdout.startswith("it's [mine], a=b: ")
    return folder / "it's [mine], a=b"


def test_the_script_leaves_one_directory_that_samples_as_the_run_does(exported, tiny_home, tmp_path):
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    arguments = ("prompt=the", "max_new_tokens=20", "seed=1")
    texts = {
        run_inside("sample", f"ckpt={place}", *arguments, cwd=tmp_path).stdout
        for place in (exported, f"hf:{exported}", f"{tiny_home}/outputs/latest")
    }
    assert len(texts) == 1
    assert next(iter(texts)).startswith("the")


def test_no_file_of_it_names_a_place_on_this_machine(exported, tiny_home):
    places = [str(Path.cwd()), str(tiny_home), str(exported.parent), "a=[text]", str(Path.home()), "outputs/"]
    for path in exported.iterdir():
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path.name


def test_the_card_says_what_the_summary_says(exported, tiny_run):
    card, summary = (exported / "README.md").read_text(), json.loads((tiny_run / "summary.json").read_text())
    for text in (f"{summary['best_val_loss']:.4f}", summary["corpus"]["sha256"], f"| seed | {summary['seed']} |", "GPT"):
        assert text in card
    model = "AutoModelForCausalLM"
    (code,) = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert model in code
    exec(code.replace('"DIR"', repr(str(exported))))


def test_evaluate_and_train_go_on_from_an_export(exported, tiny_home, tmp_path):
    text = ("data=text", f"data.path={tiny_home}/it's, a=[text].txt", f"cache_dir={tiny_home}/cache")
    run, again = (
        json.loads(run_inside("evaluate", f"ckpt={place}", *text, cwd=tmp_path).stdout)
        for place in (f"{tiny_home}/outputs/latest", exported)
    )
    assert again["loss"] == run["loss"]
    done = run_inside("evaluate", f"ckpt={exported}", cwd=tmp_path)
    assert "bring no corpus" in done.stderr  # a path of the machine that it was trained on would be of no use
    steps = ("trainer.max_steps=1", "optimizer.lr=1e-12")
    done = run_inside("train", f"init_from={exported}", *text, *steps, f"hydra.run.dir={tmp_path}/new", cwd=tmp_path)
    assert done.code == 0, done.stderr
    first = tinygpt.load(tmp_path / "new")[0].state_dict()
    torch.testing.assert_close(first, tinygpt.load(exported)[0].state_dict(), atol=1e-9, rtol=0)


def test_an_export_of_a_known_corpus_can_be_evaluated_without_naming_it(ready):
    written(ready, format="safetensors")
    _, opened = ckpt.open_any(ready / "out")
    assert ckpt.stored_data(opened["tinygpt"]) == DataConfig(tokenizer=TokenizerConfig("char"))
