"""Every command that the README shows is run, in the README's order, in one empty directory.

Only the size is changed: a few steps of a tiny model, which the commands themselves do not ask for.
"""

import os
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import tiny
from scripts import Done, run_inside
from together import train_together

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "data.val_tokens=500"]
MADE_BY_CI = ("make ", "python3 -m venv", ". .venv", "pip install")  # the set-up: .ci/run does it


def commands_of(path):
    """The lines of a page's sh blocks, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return list(dict.fromkeys(re.sub(r"\s+#.*", "", line) for line in lines))


COMMANDS = [line for line in commands_of(ROOT / "README.md") if not line.startswith(MADE_BY_CI)]


def shrink(words):
    """The command's own words, and what makes it small."""
    if words[1] == "sample.py":
        return [*words, "max_new_tokens=4"]
    if words[1] != "train.py" or "--help" in words:
        return words
    steps = "trainer.max_steps=4" if "resume=latest" in words else "trainer.max_steps=2"
    model = ["data.val_tokens=500"] if {"resume=latest", "init_from=latest", "init_from=hf:my-model"} & set(words) else TINY
    epochs = any(word.startswith("trainer.max_epochs") for word in words)
    budget = ["data=text", "data.path=my.txt"] if epochs else [steps]
    return [*words, *model, *budget, "data.global_batch_size=4" if not {"resume=latest"} & set(words) else "seed=1337"]


def test_the_readme_shows_commands():
    assert len(COMMANDS) > 15


@pytest.fixture(scope="module")
def playground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my.txt").write_text("The while statement is used for repeated execution.\n" * 200, encoding="utf-8")
    return folder


def run(command):
    words = shrink(shlex.split(command))
    verb = words[1].removesuffix(".py")
    if verb == "serve":
        return serve(words)
    if verb == "-m":  # which looks for the module there
        there = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, *words[1:]], env=there, capture_output=True, text=True)
        return Done(done.returncode, done.stdout, done.stderr)
    with tiny.quickly():
        if "trainer=ddp_cpu" in words:  # as processes of their own: test_ddp.py
            first, second = train_together(*words[2:], cwd=".")
            return Done(first.code or second.code, first.stdout, first.stderr + second.stderr)
        return run_inside(verb, *words[2:], cwd=".", stdin="The\nquit\n")


def serve(words):
    """The server is asked for a text, then stopped."""
    words = [sys.executable, str(ROOT / words[1]), *words[2:], "port=0", "playground=false"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, encoding="utf-8") as server:
        line = server.stderr.readline()
        answer = urllib.request.Request(
            f"{line.rsplit(' ', 1)[1].strip()}/generate/custom", b'{"prompt": "The "}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(answer, timeout=60) as text:
            out = text.read().decode()
        server.terminate()
    return Done(0, out, line)


def test_every_command_of_the_readme_works(playground, monkeypatch, shared_data):
    monkeypatch.chdir(playground)
    monkeypatch.setenv("TINYGPT_CACHE_DIR", str(playground / "cache"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    for command in COMMANDS:
        code, out, err = run(command)
        assert code == 0, f"{command}\n{err}"
        assert out.strip(), f"{command} printed nothing"


def test_the_python_of_the_readme_works(playground, monkeypatch, capsys, tiny_run):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tiny_run.parent)
    exec(code.replace("outputs/latest", str(tiny_run)))
    assert capsys.readouterr().out.startswith("The ")
