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
    ("kinds", "summary", "lean", "ranks", "kernels"),
    ("config",),
    ("tokenizer", "model", "files", "batches", "targets", "help", "sweep", "memory", "lock", "finite", "archive"),
    ("imdb", "tokens", "documents", "streams", "synthetic", "plot", "launch", "compiling"),
    ("corpus", "ranking", "search"),
    ("multirun",),
    ("pieces",),
    ("writer", "meter"),
    ("workspace",),
    ("optim", "loss", "cache", "shards", "evaluate", "hub", "tokenizer_files", "cli"),
    ("decode", "precision", "sharding"),
    ("generate",),
    ("forecast", "terminal", "lit", "data", "engine", "pretrained", "model_card"),
    ("checkpoint",),
    ("callbacks", "loggers", "export", "resume"),
    ("progress", "trainer", "pruning"),
    ("report", "served", "verify", "preflight", "start"),
    ("watch",),
    ("run", "bodies"),
    ("answers",),
    ("guard", "openai_api", "playground"),
    ("serve",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")

HEAVY = ("torch", "lightning", "hydra", "omegaconf", "wandb", "transformers", "matplotlib", "tiktoken", "tokenizers", "rich")
TORCH_OR_LESS = (
    *("tokenizer", "model", "optim", "loss", "memory", "cache", "decode", "precision", "generate", "engine", "checkpoint"),
    *("pretrained", "hub", "corpus", "streams", "pieces", "writer", "workspace", "meter", "shards", "batches", "terminal"),
    *("tokenizer_files", "model_card", "lock", "finite", "synthetic", "sweep", "launch", "ranking", "search", "archive"),
    *("kinds", "ranks", "kernels", "compiling"),
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


@pytest.mark.parametrize("module", ["config", "kinds", "summary", "help"])
def test_what_help_needs_is_the_standard_library(module):
    for name in imports(PACKAGE / f"{module}.py"):
        assert name.split(".")[0] in {*sys.stdlib_module_names, "tinygpt"}, name


@pytest.mark.parametrize("module", TORCH_OR_LESS)
def test_the_core_needs_torch_or_less(module):
    for name in imports(PACKAGE / f"{module}.py"):
        assert name.split(".")[0] not in {"lightning", "hydra", "omegaconf", "wandb", "transformers", "torchmetrics"}, name


@pytest.mark.parametrize("module", MODULES)
def test_hydra_lives_in_cli_and_for_sweeps_in_multirun(module):
    if module not in ("cli", "multirun"):
        assert not {name.split(".")[0] for name in imports(PACKAGE / f"{module}.py")} & {"hydra", "omegaconf"}


def loaded(code, folder, *names, at="sys.modules"):
    """Which of the packages and modules `names` a fresh process has imported after `code`, or by `at`."""
    ask = f"\nimport sys, json\nprint(json.dumps([n for n in {names!r} if n in {at}]), file=sys.stderr)"
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


# What torch's own optimizers import: its compiler, and the algebra that that needs.
COMPILER = ("torch._dynamo", "sympy")
# What is installed beside us, or is ours but not needed to begin.
ELSEWHERE = (
    *("transformers", "datasets", "tiktoken", "tokenizers", "wandb", "tensorboard", "matplotlib", "scipy", "pandas"),
    *(
        "gradio",
        "fastapi",
        "optuna",
        "aiohttp",
        "requests",
        "huggingface_hub",
        "torchvision",
        "onnx",
        "jsonargparse",
        "IPython",
    ),
)


def without(*names):
    return f"\nassert not (there := set({names!r}) & set(sys.modules)), there\n"


def test_sample_evaluate_and_the_server_need_little_beside_torch(tiny_home):
    """One after the other in one process: what is not there after one was not needed by any before."""
    ckpt = tiny_home / "outputs/latest/checkpoints/best.ckpt"
    code = f"import sys, tinygpt; model, tokenizer = tinygpt.load({str(ckpt)!r}); tinygpt.generate(model, tokenizer, 'the')"
    code += without("hydra", "omegaconf") + script("sample", f"ckpt={ckpt}", "max_new_tokens=3")
    code += without("lightning", "torchmetrics", "rich", *COMPILER, *ELSEWHERE)
    code += script("evaluate", "ckpt=latest", "cache_dir=cache") + without("lightning", *ELSEWHERE)
    code += "import tinygpt.serve"
    assert loaded(code, tiny_home, "torch", "torchmetrics", "gradio", "pandas") == {"torch", "torchmetrics"}


# What is there after the last optimizer step, which is the first but for those that the forecast tries.
AT_STEP = """
from torch.optim.optimizer import register_optimizer_step_post_hook
at_step = set()
register_optimizer_step_post_hook(lambda *_: at_step.update(sys.modules))
"""


def test_a_training_needs_little_beside_lightning_to_take_its_first_step(tmp_path, tiny_home):
    arguments = (
        "data=text",
        f"data.path={tiny_home}/it's, a=[text].txt",
        f"cache_dir={tiny_home}/cache",
        "trainer.max_steps=1",
    )
    code = AT_STEP + script("train", *SMALL, *arguments)
    assert loaded(code, tmp_path, "lightning", *ELSEWHERE, at="at_step") == {"lightning"}
