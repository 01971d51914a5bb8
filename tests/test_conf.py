"""Every recipe in conf/ composes, every key is checked, and what is taken verbatim arrives as it was typed."""

import contextlib
import dataclasses
import re

import pytest
import torch
import yaml
from composing import CONF, SCHEMAS, compose
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from scripts import run_inside

from tinygpt import cli
from tinygpt.config import (
    SampleConfig,
    TrainConfig,
    UserError,
    all_keys,
    from_dict,
    unescape,
)
from tinygpt.model import GPT
from tinygpt.preflight import preflight

HARDWARE = ("trainer/gpu", "trainer/ddp", "trainer/fsdp", "trainer/mps")  # what may not be here
CHOICES = sorted(path.relative_to(CONF).with_suffix("").as_posix() for path in CONF.glob("*/**/*.yaml"))


def test_conf_is_found():
    assert {"model/nano", "experiment/shakespeare_char", "data/tokenizer/bpe"} <= set(CHOICES)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_can_be_built(choice):
    group, _, name = choice.rpartition("/")
    value = f"[default,{name}]" if group == "callbacks" and name != "none" else name
    more = ("data.path=x",) if choice in ("data/text", "data/hf") else ()
    config = compose("train", f"{group}={value}", *more)
    with torch.device("meta"):
        model = GPT(config.model, vocab_size=65)
    assert sum(p.numel() for p in model.parameters()) > 1000
    with contextlib.suppress(UserError) if choice in HARDWARE else contextlib.nullcontext():
        preflight(config)


@pytest.mark.parametrize("path", [*CONF.glob("model/*.yaml"), *CONF.glob("optimizer/*.yaml"), *CONF.glob("data/*.yaml")])
def test_what_a_file_says_arrives(path):
    said = {key: value for key, value in yaml.safe_load(path.read_text()).items() if key != "defaults"}
    more = ("data.path=x",) if path.stem in ("text", "hf") else ()
    config = getattr(compose("train", f"{path.parent.name}={path.stem}", *more), path.parent.name)
    assert arrived(config, said) == said


def arrived(config, said):
    """What a config has where a file says something."""
    return {key: arrived(getattr(config, key), said[key]) for key in said} if isinstance(said, dict) else config


@pytest.mark.parametrize("verb", SCHEMAS)
def test_defaults_are_the_schema_s(verb):
    config = compose(verb)
    for item in dataclasses.fields(SCHEMAS[verb]):
        if item.name not in ("trainer", "logger", "callbacks", "model", "data", "optimizer"):
            default = item.default_factory() if item.default is dataclasses.MISSING else item.default
            assert getattr(config, item.name) == default, item.name


@pytest.mark.parametrize("verb", SCHEMAS)
def test_help_names_every_key_and_choice(verb, tmp_path):
    done = run_inside(verb, "--help", cwd=tmp_path)
    assert done.code == 0
    assert done.stderr == ""
    for key in all_keys(SCHEMAS[verb]):
        assert re.search(rf"^ *{re.escape(key)}[ :]", done.stdout, flags=re.MULTILINE), key
    groups = {name.split("/")[0] for name in CHOICES}
    known = {key for key in all_keys(SCHEMAS[verb]) if key in groups} | ({"experiment"} if verb == "train" else set())
    for choice in CHOICES:
        group, _, name = choice.rpartition("/")
        if choice.split("/")[0] in known:
            assert re.search(rf"^ *{group} .*\b{name}\b", done.stdout, flags=re.MULTILINE), choice


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        (("trainer.max_tokens=1000",), {"max_tokens": 1000}),
        (("trainer.max_epochs=2",), {"max_epochs": 2}),
        (("trainer.max_steps=5",), {"max_steps": 5}),
        (("trainer.max_tokens=1e6", "experiment=shakespeare_char"), {"max_tokens": 1e6}),
        (("trainer.max_epochs=null",), {"max_steps": 2000}),
    ],
)
def test_a_budget_on_the_command_line_takes_the_place_of_the_config_s(arguments, budget):
    trainer = compose("train", *arguments).trainer
    assert {name: trainer[name] for name in ("max_steps", "max_tokens", "max_epochs") if trainer[name] is not None} == budget


def test_any_argument_of_the_trainer_works_without_plus():
    assert compose("train", "trainer.limit_val_batches=3", "trainer.deterministic=true").trainer["limit_val_batches"] == 3


def test_a_callback_can_be_left_out():
    assert "samples" not in compose("train", "callbacks.samples=null").callbacks


# What is taken verbatim

ODD = (
    "\\",
    "'",
    '"',
    "$",
    "{",
    "}",
    "${",
    "[",
    "]",
    "(",
    ")",
    ",",
    "=",
    ":",
    " ",
    "\n",
    "\t",
    "\r",
    "#",
    "@",
    "~",
    "+",
    "%",
    "|",
)
ODDER = ("null", "true", "1e3", "???", "${oc.env:HOME}", "\\n", "\\'", "é", "e\u0301", "🐈", "\x00", "\u2028", "\ufeff", "a")
texts = st.lists(st.sampled_from(ODD + ODDER) | st.text(max_size=3), max_size=8).map("".join)


@given(text=texts)
@example(text="\\\n")
@example(text="${\n\\\n")
@example(text="???")
@example(text="null")
@example(text="  two words  ")
def test_quote_survives_hydra_s_grammar(text):
    assert parsed(cli.prepare_override(f"prompt={text}")) == text


def parsed(override):
    """What Hydra's parser and OmegaConf's interpolation make of one override."""
    from omegaconf import OmegaConf

    node = OmegaConf.structured(SampleConfig)
    node.prompt = OverridesParser.create().parse_override(override).value()
    return OmegaConf.to_container(node, resolve=True)["prompt"]


EXAMPLES = [
    "",
    "a,b=c",
    "[x]{y}(z)",
    'it\'s "so"',
    "${a}",
    "\\",
    "\\\n",
    "C:\\dir\\'",
    " a ",
    "é🐈\n\t",
    "null",
    "???",
    "@f",
    "-",
]


@pytest.mark.parametrize("text", EXAMPLES)
def test_verbatim_values_arrive_through_the_whole_of_hydra(text):
    assert compose("sample", f"prompt={text}").prompt == text
    assert compose("sample", f"ckpt={text}").ckpt == text
    if text not in ("", "null"):
        assert compose("train", "data=text", f"data.path={text}").data.path == text
        assert compose("train", f"resume={text}", f"init_from={text}").init_from == text


def test_null_means_none_where_a_key_may_be_null():
    assert compose("train", "resume=null", "init_from=null").resume is None


@pytest.mark.parametrize(
    ("typed", "meant"),
    [(r"\n\n", "\n\n"), (r"\t", "\t"), (r"\\n", r"\n"), (r"\\", "\\"), (r"\x", r"\x"), ("\\", "\\"), ("\n", "\n"), ("", "")],
)
def test_escapes_of_a_stop_string(typed, meant):
    assert unescape(typed) == meant


def test_a_config_survives_its_dictionary():
    import dataclasses

    config = compose("train", "model=llama_nano", "data/tokenizer=bpe")
    assert from_dict(TrainConfig, dataclasses.asdict(config)) == config
