"""The `>>` prompt: through a pipe, on a real terminal, and with every way to end a text or a session."""

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygpt import terminal

# A session on a small random model, as a process of its own.
SESSION = """
import sys, torch
from tinygpt import GPT, ModelConfig
from tinygpt.terminal import chat
from tinygpt.tokenizer import CharTokenizer
torch.manual_seed(0)
torch.set_num_threads(1)
tokenizer = CharTokenizer("abcdefgh ")
model = GPT(ModelConfig(n_layer=1, n_embd=16, block_size=8), tokenizer.vocab_size)
chat(model, tokenizer, max_new_tokens=int(sys.argv[1]), seed=1)
"""
ROOT = Path(__file__).parents[1]


def session(typed):
    command = [sys.executable, "-c", SESSION, "20"]
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    return subprocess.run(command, input=typed, capture_output=True, cwd=ROOT, env=utf8, timeout=60)


@pytest.fixture(scope="module")
def piped():
    done = session(b"abc\nabc\nxyz\n\nabcdefghab\nquit\nabc\n")
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def test_each_line_is_continued_until_quit(piped):
    stdout, _ = piped
    first, second, unknown, empty, long, end = stdout.removeprefix(">> ").split(">> ")
    assert len(first) == 21
    assert first[-1] == "\n"
    assert first == second  # one seed, one text
    assert unknown == ""
    assert len(empty) == len(long) == 21
    assert end == ""


def test_what_is_said_about_the_text_goes_to_stderr(piped):
    _, stderr = piped
    assert "Ctrl-D" in stderr
    assert "error: the character 'x'" in stderr
    assert "leave this one out" in stderr
    assert stderr.count("note:") == 1
    assert "the prompt has 10 tokens; the model reads the last 8" in stderr
    assert "Traceback" not in stderr


def test_the_end_of_input_ends_the_session():
    done = session(b"abc")
    assert done.returncode == 0
    assert done.stdout.count(b">> ") == 2
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("word", ["quit", " exit "])
def test_a_word_ends_the_session(monkeypatch, word):
    lines = [word, "a second line"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    terminal.chat(None, None)  # needs no model
    assert lines == ["a second line"]


def test_input_that_is_no_text_is_a_user_error():
    assert b"UserError: the input is not in the terminal's encoding" in session(b"\xff\xfe\n").stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_ctrl_c_ends_the_text_and_ctrl_d_the_session():
    import pty

    child, screen = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", SESSION, "1000000000"])
    try:
        read_until(screen, b">> ")
        os.write(screen, b"abc\n")
        read_until(screen, b"abc\r\n")  # the echo
        assert read_one(screen)  # the text has begun, and would never end
        os.write(screen, b"\x03")
        read_until(screen, b">> ")
        time.sleep(0.5)  # readline misses a Ctrl-C that comes between its prompt and its waiting
        os.write(screen, b"\x03")  # at the prompt: gives up the line
        read_until(screen, b">> ")
        os.write(screen, b"\x1b[A")  # history: the line before
        read_until(screen, b"abc")
        os.write(screen, b"\n")
        read_until(screen, b"\r\n")
        assert read_one(screen)
        os.write(screen, b"\x03")
        read_until(screen, b">> ")
        os.write(screen, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(screen)


def read_until(screen, end):
    seen = b""
    while end not in seen:
        seen += read_one(screen)


def read_one(screen, seconds=30):
    ready, _, _ = select.select([screen], [], [], seconds)
    assert ready, "nothing came"
    return os.read(screen, 1)


def test_a_setting_outside_its_limits_is_said_at_each_line(monkeypatch, capsys):
    lines = iter(["a", "quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def refuse(*args, **settings):
        raise terminal.UserError(f"temperature={settings['temperature']} is out of range")

    monkeypatch.setattr(terminal, "stream", refuse)
    monkeypatch.setattr(terminal, "warn_if_cropped", lambda *args: None)
    terminal.chat(None, None, temperature=-1)
    assert "error: temperature=-1 is out of range\n" in capsys.readouterr().err
