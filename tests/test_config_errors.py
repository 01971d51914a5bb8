"""Every key of every config, misspelt, of another type, or outside its limits: exit code 2, the key, the value, the cure.

The cases come from the schemas and from the signatures of what YAML builds, so a new key is tested when it is written.
"""

import dataclasses
import inspect
import math
import random
import re
import shutil
import sys
from pathlib import Path
from unittest import mock

import lightning as L
import pytest
import scripts
import yaml
from composing import CONF, GROUPS, SCHEMAS, compose, fields_of, said

from tinygpt import cli, run
from tinygpt.config import BUDGETS, REFUSED_TRAINER_ARGUMENTS, UserError, all_keys
from tinygpt.help import group_choices
from tinygpt.kinds import fits
from tinygpt.preflight import preflight
from tinygpt.targets import find_target, hints_of
from tinygpt.trainer import OURS


def chosen(verb, key):
    """What must be said for the key to be there."""
    return ("data=pydocs",) if verb == "evaluate" and key.startswith("data.") else ()


def refused(done, *words):
    """Exit code 2, an error that has all the words, a hint, and nothing else."""
    assert done.code == 2, done
    assert "Traceback" not in done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert len(hint) > 10
    for word in words:
        assert word.lower() in error.lower(), done.stderr
    return hint.removeprefix("hint: ")


# Names


def misspelt(key):
    """`key` with one letter of its last word left out, doubled or changed."""
    group, _, name = key.rpartition(".")
    draw = random.Random(key)
    i = draw.randrange(1, len(name))
    wrong = draw.choice([name[:i] + name[i + 1 :], name[:i] + name[i] + name[i:], name[:i] + "q" + name[i + 1 :]])
    return f"{group}.{wrong}" if group else wrong


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_key_misspelt(verb, plus):
    for key in all_keys(SCHEMAS[verb]):
        wrong = misspelt(key)
        hint = refused(said(verb, *chosen(verb, key), f"{plus}{wrong}=1"), f"there is no key {wrong}")
        assert hint == f"did you mean {key}?", (key, wrong)


SMUGGLED = [
    ("+model.extra=1", "model.extra"),
    ("++model.extra=1", "model.extra"),
    ("+foo=1", "foo"),
    ("++foo.bar=1", "foo"),
    ("+model.n_layer.more=1", "model.n_layer"),
    ("+data.tokenizer.kind.x=1", "data.tokenizer.kind"),
    ("+modle=nano", "modle"),
    ("+model@foo=nano", "foo"),
    ("~model.n_layer", "model.n_layer"),
    ("~model.n_layer=4", "model.n_layer"),
    ("~seed", "seed"),
    ("~seeds", "seeds"),
    ("hydra.run.dirr=x", "hydra.run.dirr"),
    ("+hydra.extra=1", "hydra"),
    ("model.n_layer.x=1", "model.n_layer"),
    ("model..n_layer=1", "model..n_layer"),
    ("MODEL.n_layer=1", "MODEL"),
]


OTHER_NAMES = [
    ("optimizer.learning_rate=1e-3", "optimizer.lr"),
    ("batch_size=8", "data.global_batch_size"),
    ("model.hidden_size=64", "model.n_embd"),
    ("max_iters=100", "trainer.max_steps"),
]


@pytest.mark.parametrize(("argument", "ours"), OTHER_NAMES)
def test_what_other_programs_call_it_is_understood(argument, ours):
    assert refused(said("train", argument), "there is no key") == f"did you mean {ours}?"


@pytest.mark.parametrize(("argument", "word"), SMUGGLED)
def test_what_plus_and_tilde_smuggle_is_refused(argument, word):
    refused(said("train", argument), word)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_choice_of_every_group_misspelt(verb, tmp_path):
    for group, choices in group_choices(SCHEMAS[verb], CONF).items():
        chosen = ("data=pydocs",) if verb == "evaluate" and "/" in group else ()
        wrong = misspelt(choices[0])
        hint = refused(said(verb, *chosen, f"{group}={wrong}"), f"there is no {group}={wrong}")
        assert f"did you mean {group}={choices[0]}?" == hint


# Values

OTHERS = {  # by type: what is none
    "int": ("abc", "1.5", "true", "[1]", "{a:1}", "1e400", "''"),
    "float": ("abc", "true", "[1]", "{a:1}", "nan", "inf", "-inf"),
    "bool": ("maybe", "3.5", "[true]", "{a:1}", "''"),
    "str": ("[a]", "{a:1}"),
    "list": ("abc", "3", "{a:1}", "[[a]]", "[{a:1}]"),
    "dict": ("abc", "3", "[1]"),
}
VERBATIM = ("prompt", "ckpt", "resume", "init_from", "out", "data.path", "gpt2", "api_key")


def kinds(item):
    text = re.sub(r"<class '(.*?)'>", r"\1", str(item.type))
    return text.split("[")[0].split(" | ")[0], "None" in text


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_key_with_a_value_of_another_type(verb):
    for key, item in fields_of(SCHEMAS[verb]):
        if key in VERBATIM or key in GROUPS:
            continue
        kind, optional = kinds(item)
        for value in (*OTHERS[kind], *(() if optional else ("null",))):
            shown = value.strip("[]{}'").split(":")[0]
            refused(said(verb, *chosen(verb, key), f"{key}={value}"), key, shown)


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_key_outside_its_limits(verb):
    for key, item in fields_of(SCHEMAS[verb]):
        limits = item.metadata
        wrong = [limits["ge"] - 1] if "ge" in limits else [limits["gt"]] if "gt" in limits else []
        wrong += [limits["le"] + 1] if "le" in limits else [limits["lt"]] if "lt" in limits else []
        wrong += [10**30, -(10**30)] if kinds(item)[0] == "int" and {"le", "lt"} & set(limits) else []
        wrong += ["nonsense"] if "choices" in limits else []
        for value in wrong:
            hint = refused(said(verb, *chosen(verb, key), f"{key}={value}"), f"{key}={value}")
            bounds = limits.get("choices") or [limits[name] for name in ("ge", "gt", "le", "lt") if name in limits]
            assert all(str(bound) in hint for bound in bounds), hint


@pytest.mark.parametrize("verb", SCHEMAS)
def test_every_group_with_something_else(verb):
    for group in group_choices(SCHEMAS[verb], CONF):
        chosen = ("data=pydocs",) if verb == "evaluate" and "/" in group else ()
        for value in ("3", "[3]", "true", "''", *(() if group in cli.OPEN_GROUPS else ("{a:1}",))):
            refused(said(verb, *chosen, f"{group}={value}", quick=False), group)


# What YAML builds

TRAINER = {  # values that no run could use, by argument of Lightning's
    "accelerator": ("abc", 3, ["cpu"]),
    "strategy": ("foo", 3, [], "ddp_spawn"),
    "devices": ("abc", 0, 1.5, -5, {"a": 1}, []),
    "num_nodes": ("abc", 1.5, 0, -1),
    "precision": (17, "abc", ["16"], 1.5),
    "fast_dev_run": ("abc", -1),
    "max_steps": ("abc", 0, -5, 1.5, math.inf, math.nan, True, 10**30),
    "max_tokens": ("abc", 0, math.inf),
    "max_epochs": ("abc", 0, -1, math.inf),
    "min_steps": ("abc", 1.5),
    "max_time": ("abc", 3, {"hours": "many"}, {"ages": 1}),
    "limit_train_batches": ("abc", -1, 1.5),
    "limit_val_batches": ("abc", -1, 1.5),
    "limit_test_batches": ("abc", -1),
    "limit_predict_batches": ("abc", -1),
    "overfit_batches": ("abc", -1, 1.5),
    "val_check_interval": ("abc", 0, -1, 0.5, True),
    "log_every_n_steps": ("abc", 1.5, -1, 0),
    "enable_progress_bar": ("abc", 3),
    "deterministic": ("abc", 3),
    "benchmark": ("abc", 3),
    "inference_mode": ("abc", 3, None),
    "profiler": ("abc", 3),
    "detect_anomaly": ("abc", 3, None),
    "barebones": ("abc", 3, True),
    "plugins": ("abc", 3),
    "sync_batchnorm": ("abc", 3),
    "reload_dataloaders_every_n_epochs": ("abc", -1, 1.5),
    "enable_autolog_hparams": ("abc", 3),
    "model_registry": (3, ["a"]),
    "_target_": ("abc", "lightning.Fabric", "lightning.Trainr", "os.system", "tinygpt.model.GPT"),
}


def test_the_table_has_every_argument_of_the_trainer():
    ours = {*OURS, *REFUSED_TRAINER_ARGUMENTS, "self"}
    assert set(TRAINER) - {"_target_", "max_tokens"} == set(inspect.signature(L.Trainer.__init__).parameters) - ours


@pytest.fixture(scope="module")
def default():
    return compose("train")


def unusable(config, **changes):
    """The error of a run with these settings, which may not read any data."""
    with (
        mock.patch.object(run, "prepare", side_effect=AssertionError("data was read")),
        pytest.raises(UserError) as caught,
    ):
        run.run(dataclasses.replace(config, **changes), Path("nowhere"), ())
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", TRAINER)
def test_a_trainer_that_cannot_be_is_refused_before_any_data_is_read(default, name):
    for value in TRAINER[name]:
        budget = dict.fromkeys(BUDGETS) if name in BUDGETS else {}
        error = unusable(default, trainer={**default.trainer, **budget, name: value})
        assert name in error, (value, error)
        assert str(value).strip("[]{}'").split("'")[0] in error, (value, error)


def test_a_misspelt_argument_of_the_trainer_is_refused(default):
    for name in set(TRAINER) - {"_target_"}:
        wrong = misspelt(name)
        with pytest.raises(UserError, match=f"there is no key trainer.{wrong}") as caught:
            run.run(dataclasses.replace(default, trainer={**default.trainer, wrong: 1}), Path("nowhere"), ())
        assert caught.value.hint == f"did you mean trainer.{name}?"


def nodes():
    """Every callback and logger of conf/, by the group and its name, with what the file says."""
    for kind in ("callbacks", "logger"):
        for path in sorted((CONF / kind).glob("*.yaml")):
            for name, node in yaml.safe_load(path.read_text()).items():
                if isinstance(node, dict):
                    yield pytest.param(kind, name, node, id=f"{kind}.{name}")


@pytest.mark.parametrize(("kind", "name", "node"), list(nodes()))
def test_a_node_that_cannot_be_is_refused_before_any_data_is_read(default, kind, name, node):
    target = find_target(node["_target_"], "", ("tinygpt", "lightning"))
    hints = hints_of(target)
    for argument in inspect.signature(target).parameters:
        if argument in ("save_dir", "id", "kwargs"):
            continue
        wrong = misspelt(argument)
        if "kwargs" not in inspect.signature(target).parameters:
            error = unusable(default, **{kind: {name: {**node, wrong: 1}}})
            assert error == f"there is no key {kind}.{name}.{wrong}"
        for value in ({"a": 1}, ["abc"], "abc", 1.5):
            if argument in hints and not fits(value, hints[argument]):
                assert f"{kind}.{name}.{argument}={value}" in unusable(default, **{kind: {name: {**node, argument: value}}})


BEYOND = [
    ("ema", {"_target_": "tinygpt.callbacks.EMA", "decay": 1.0}, "decay=1.0"),
    ("last", {"_target_": "tinygpt.callbacks.LastCheckpoint", "every_n_steps": 0}, "every_n_steps=0"),
    ("early", {"_target_": "lightning.pytorch.callbacks.EarlyStopping"}, "monitor"),
    ("early", {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "mode": "up"}, "up"),
    ("timer", {"_target_": "lightning.pytorch.callbacks.Timer", "duration": "long"}, "long"),
    ("linear", {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1}, "is no Callback"),
    ("logger", {"_target_": "tinygpt.loggers.CSVLogger", "save_dir": "x"}, "is no Callback"),
    ("function", {"_target_": "tinygpt.checkpoint.find", "ckpt": "x"}, "is no Callback"),
    ("timer", {"_target_": "torch.utils.benchmark.Timer", "stmt": "x"}, "not allowed"),
    ("cli", {"_target_": "lightning.pytorch.cli.LightningCLI"}, "not allowed"),
    ("system", {"_target_": "os.system", "command": "x"}, "os.system is not allowed"),
    ("empty", {"_target_": ""}, "is not allowed"),
    ("number", {"_target_": 3}, "has no _target_"),
    ("nothing", {}, "has no _target_"),
    ("text", "abc", "has no _target_"),
]


@pytest.mark.parametrize(("name", "node", "words"), BEYOND, ids=[words for *_, words in BEYOND])
def test_a_callback_that_refuses_its_arguments_does_so_before_any_data_is_read(default, name, node, words):
    error = unusable(default, callbacks={name: node})
    assert f"callbacks.{name}" in error
    assert words in error


def test_a_node_inside_a_node_is_held_to_the_same(default):
    early = {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss"}
    for target in ("os.system", "tinygpt.checkpoint.durable_save", "tinygpt.files.Download", "tinygpt.served.Library"):
        error = unusable(default, callbacks={"x": {**early, "patience": {"_target_": target}}})
        assert f"callbacks.x.patience._target_={target}" in error


def test_a_package_is_trusted_on_the_command_line_alone(default, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("import lightning as L\nclass Mine(L.Callback):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    node = {"x": {"_target_": "theirs.Mine"}}
    assert "theirs.Mine is not allowed" in unusable(default, callbacks=node)
    preflight(dataclasses.replace(default, callbacks=node, allow_targets=["theirs"]))
    assert "is no Callback" in unusable(default, callbacks={"x": {"_target_": "os.PathLike"}}, allow_targets=["os"])


def test_a_recipe_cannot_trust_a_package(tmp_path):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "evil.yaml").write_text("# @package _global_\nallow_targets: [os]\n")
    cli.register("train", SCHEMAS["train"])
    with pytest.raises(UserError, match="is in a file of the config"):
        cli.compose("train", SCHEMAS["train"], conf, ["experiment=evil"])
    assert cli.compose("train", SCHEMAS["train"], CONF, ["allow_targets=[theirs]"]).allow_targets == ["theirs"]


EVIL = {
    "callbacks": "hydra: {callbacks: {x: {_target_: distutils.spawn.spawn, cmd: [mkdir, exploded]}}}",
    "job_logging": "hydra: {job_logging: {formatters: {x: {(): os.mkdir, path: exploded}}}}",
    "hydra_logging": "hydra: {hydra_logging: {handlers: {x: {class: subprocess.Popen, args: [mkdir, exploded]}}}}",
    "handlers": "hydra: {job_logging: {handlers: {x: {class: logging.os.mkdir, path: exploded}}}}",
    "formatters": "hydra: {job_logging: {formatters: {x: '${oc.create:{class:os.mkdir,format:exploded}}'}}}",
    "loggers": "seed: 1\nhydra: {job_logging: {loggers: '${seed}'}}",
}


TRUSTING = 'hydra: {sweeper: {params: {allow_targets: "[os]"}}}'
CHOSEN = ("-m", "experiment=evil,null")


@pytest.mark.parametrize("sweep", [("experiment=evil",), ("-m", "seed=1,2", "experiment=evil"), CHOSEN], ids=str)
@pytest.mark.parametrize("part", EVIL)
def test_a_recipe_has_hydra_call_nothing(part, sweep, tmp_path, monkeypatch, capsys):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{EVIL[part]}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *sweep, "dry_run=true"])
    parts = ("callbacks", "job_logging", "hydra_logging")
    with pytest.raises(SystemExit) as left:
        cli.main("train", SCHEMAS["train"], lambda *_: None, conf)
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: hydra.{'' if part in parts else 'job_logging.'}{part}")
    assert {path.name for path in tmp_path.iterdir()} == {"conf"}


def test_a_recipe_cannot_trust_a_package_for_the_jobs_of_a_sweep(tmp_path, monkeypatch, capsys):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{TRUSTING}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "experiment=evil", "seed=1,2", "dry_run=true"])
    with pytest.raises(SystemExit) as left:
        cli.main("train", SCHEMAS["train"], lambda *_: None, conf)
    assert left.value.code == 2
    assert "allow_targets=[os] is in a file" in capsys.readouterr().err


GIANTS = [{"n_embd": 2**20}, {"n_layer": 1000, "n_embd": 2**19}]


@pytest.mark.parametrize("shape", GIANTS, ids=str)
def test_a_model_larger_than_the_machine_is_refused_before_any_data_is_read(default, shape):
    assert "GB" in unusable(default, model=dataclasses.replace(default.model, **shape))


def test_what_lightning_refuses_is_said_before_a_text_that_is_not_there(tmp_path):
    done = scripts.run_inside("train", "trainer.precision=17", "data=text", "data.path=missing.txt", cwd=tmp_path)
    refused(done, "trainer.precision=17")
    assert scripts.files(tmp_path) == set()
