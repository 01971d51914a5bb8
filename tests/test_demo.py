"""`make demo`, with a Python that only writes down what it is asked; and the browser that it opens."""

import os
import signal
import subprocess
import sys

import pytest
import scripts
from conftest import wait_for
from scripts import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs make and a shell")

# Exits with CODE where the command line holds the word FAIL.
PYTHON = """#!/bin/sh
echo "$@" >> "$0.log"
case "$*" in *"$FAIL"*) exit "$CODE";; esac
"""


def demo(folder, fail="nothing", code=0, *arguments):
    """The exit code of `make demo` and the commands that it ran."""
    venv = folder / "venv"
    (venv / "bin").mkdir(parents=True)
    python = venv / "bin" / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    for name in ("venv", "core", "serve"):
        (venv / f"{name}.stamp").touch()
    made = subprocess.run(
        ["make", "--silent", "demo", f"VENV={venv}", *arguments],
        cwd=ROOT,
        env={**os.environ, "FAIL": fail, "CODE": str(code), "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    return made.returncode, (venv / "bin" / "python.log").read_text().splitlines()


SHAKESPEARE = "train.py resume=auto hydra.run.dir=outputs/demo experiment=shakespeare_char_cpu"
PYDOCS = "train.py resume=auto hydra.run.dir=outputs/demo_pydocs"


def test_the_demo_trains_and_serves(tmp_path):
    code, commands = demo(tmp_path, "nothing", 0, "ARGS=port=8001")
    assert code == 0
    assert commands == [SHAKESPEARE, "serve.py ckpt=outputs/demo browser=true port=8001"]


def test_without_the_corpus_the_demo_is_trained_on_what_is_there(tmp_path):
    code, commands = demo(tmp_path, "experiment=", 2)
    assert code == 0
    assert [command.strip() for command in commands] == [
        SHAKESPEARE,
        PYDOCS,
        "serve.py ckpt=outputs/demo_pydocs browser=true",
    ]


@pytest.mark.parametrize(("fail", "code"), [("experiment=", 130), ("experiment=", 1), ("train.py", 2)])
def test_a_training_that_ends_early_is_not_served(tmp_path, fail, code):
    left, commands = demo(tmp_path, fail, code)
    assert left != 0
    assert not any("serve.py" in command for command in commands)
    assert commands[-1] == (PYDOCS if code == 2 else SHAKESPEARE)


def test_the_browser_is_opened_at_the_address(tmp_path, tiny_run):
    pytest.importorskip("fastapi")
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f"#!/bin/sh\necho $1 > {opened}.tmp && mv {opened}.tmp {opened}\n")
    browser.chmod(0o755)
    words = scripts.command("serve", f"ckpt={tiny_run}", "gpt2=null", "port=0", "browser=true", "playground=false")
    environment = {**os.environ, "BROWSER": str(browser), "DISPLAY": ":0"}
    server = subprocess.Popen(words, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        address = server.stderr.readline().split()[-1]
        wait_for(opened)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=30)
    assert opened.read_text().strip() == address
    assert address.startswith("http://127.0.0.1:")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is always a screen")
def test_without_a_screen_no_browser_takes_the_terminal(monkeypatch):
    serve = pytest.importorskip("tinygpt.serve")
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    serve.open_browser("http://127.0.0.1:8000")
    assert opened == []
    monkeypatch.setenv("DISPLAY", ":0")
    serve.open_browser("http://127.0.0.1:8000")
    assert opened == ["http://127.0.0.1:8000"]
