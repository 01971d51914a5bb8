"""Imports go one way, and nothing is imported before it is needed."""

import ast
import json
import subprocess
import sys

import pytest
from scripts import ROOT, SMALL

PACKAGE = ROOT / "tinygpt"

# From the bottom up: a module may import those of the lines above its own.
LAYERS = (
    ("config", "summary"),
    ("tokenizer", "model", "files", "batches", "targets", "help", "sweep"),
    ("imdb", "tokens", "documents", "streams"),
    ("corpus",),
    ("pieces",),
    ("writer", "meter"),
    ("workspace",),
    ("optim", "cache", "shards", "evaluate", "hub", "tokenizer_files", "cli"),
    ("generate",),
    ("forecast", "terminal", "lit", "data", "engine", "pretrained", "model_card"),
    ("checkpoint",),
    ("callbacks", "loggers", "export"),
    ("progress", "trainer", "plot"),
    ("report", "served"),
    ("run", "bodies"),
    ("answers",),
    ("guard", "openai_api", "playground"),
    ("serve",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

HEAVY = ("torch", "lightning", "hydra", "omegaconf", "wandb", "transformers", "matplotlib", "tiktoken", "tokenizers", "rich")
TORCH_OR_LESS = (
    *("tokenizer", "model", "optim", "cache", "generate", "engine", "checkpoint", "pretrained", "hub"),
    *(
        "corpus",
        "streams",
        "pieces",
        "writer",
        "workspace",
        "meter",
        "shards",
        "batches",
        "terminal",
        "tokenizer_files",
        "model_card",
    ),
)


def imports(path):
    """Every dotted name that a file imports, wherever it does so; TYPE_CHECKING blocks count too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_module_has_its_place():
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_upward(module):
    for name in imports(PACKAGE / f"{module}.py"):
        first, _, rest = name.partition(".")
        other = rest.split(".")[0]
        if first == "tinygpt" and other in LEVEL:
            assert LEVEL[other] < LEVEL[module], f"{module} imports {other}"
        assert first not in {"train", "sample", "evaluate", "tests", "benchmarks"}


@pytest.mark.parametrize("module", ["config", "summary", "help"])
def test_what_help_needs_is_the_standard_library(module):
    for name in imports(PACKAGE / f"{module}.py"):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "tinygpt"}, name


@pytest.mark.parametrize("module", TORCH_OR_LESS)
def test_the_core_needs_torch_or_less(module):
    for name in imports(PACKAGE / f"{module}.py"):
        assert name.split(".")[0] not in {"lightning", "hydra", "omegaconf", "wandb", "transformers", "torchmetrics"}, name


@pytest.mark.parametrize("module", MODULES)
def test_hydra_lives_in_cli_alone(module):
    if module != "cli":
        assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} & {"hydra", "omegaconf"}


def loaded(code, folder, *names):
    """Which of the packages `names` a fresh process has imported after `code`."""
    ask = f"\nimport sys, json\nprint(json.dumps([n for n in {names!r} if n in sys.modules]), file=sys.stderr)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}{ask}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_tinygpt_is_light(tmp_path):
    assert loaded("import tinygpt; tinygpt.UserError, tinygpt.ModelConfig", tmp_path, *HEAVY) == set()


SCRIPT = "import runpy, sys; sys.argv = {argv!r}; runpy.run_path(sys.argv[0], run_name='__main__')"


def script(verb, *arguments):
    return SCRIPT.format(argv=[str(ROOT / f"{verb}.py"), *arguments])


@pytest.mark.parametrize("verb", ["train", "sample", "evaluate", "prepare"])
def test_help_waits_for_no_torch(verb, tmp_path):
    found = loaded(script(verb, "--help"), tmp_path, *HEAVY)
    assert found <= {"hydra", "omegaconf"}


def test_the_python_interface_and_sample_need_no_lightning(tmp_path, tiny_home):
    ckpt = tiny_home / "outputs/latest/checkpoints/best.ckpt"
    heavy = ("lightning", "torchmetrics", "wandb", "transformers", "matplotlib", "tensorboard")
    code = f"import sys, tinygpt; model, tokenizer = tinygpt.load({str(ckpt)!r}); tinygpt.generate(model, tokenizer, 'the')"
    code += "\nassert not {'hydra', 'omegaconf'} & set(sys.modules)\n"
    assert loaded(code + script("sample", f"ckpt={ckpt}", "max_new_tokens=3"), tmp_path, *heavy) == set()


def test_a_training_imports_only_the_loggers_that_it_was_asked_for(tmp_path, tiny_home):
    arguments = (
        "data=text",
        f"data.path={tiny_home}/it's, a=[text].txt",
        f"cache_dir={tiny_home}/cache",
        "trainer.max_steps=1",
    )
    # torchmetrics imports transformers wherever it is installed: not ours to prevent
    names = ("wandb", "tensorboard", "datasets", "tiktoken", "lightning")
    assert loaded(script("train", *SMALL, *arguments), tmp_path, *names) == {"lightning"}
