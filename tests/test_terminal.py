"""The `>>` prompt: through a pipe and on a real terminal; its settings, its history, and each way to end text or session."""

import contextlib
import io
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinygpt import GPT, ModelConfig, UserError, terminal
from tinygpt.tokenizer import CharTokenizer

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


@pytest.fixture(scope="module")
def piped():
    command, typed = [sys.executable, "-c", SESSION, "20"], b"abc\nabc\nxyz\n\nabcdefghab\nquit\nabc\n"
    utf8 = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=typed, capture_output=True, cwd=ROOT, env=utf8, timeout=60)
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
    assert "leave such characters out" in stderr
    assert stderr.count("note:") == 1
    assert "the prompt has 10 tokens; the model reads the last 8" in stderr
    assert "Traceback" not in stderr


def inside(monkeypatch, typed):
    """A session in this process, through a pipe."""
    tokenizer = CharTokenizer("abcdefgh ")
    model = GPT(ModelConfig(n_layer=1, n_embd=16, block_size=8), tokenizer.vocab_size)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    terminal.chat(model, tokenizer, max_new_tokens=20, seed=1)


def test_the_end_of_input_ends_the_session(monkeypatch, capsys):
    inside(monkeypatch, b"abc")
    assert capsys.readouterr().out.count(">> ") == 2


@pytest.mark.parametrize("word", ["quit", " exit "])
def test_a_word_ends_the_session(monkeypatch, word):
    lines = [word, "a second line"]
    monkeypatch.setattr("builtins.input", lambda prompt: lines.pop(0))
    terminal.chat(None, None)  # needs no model
    assert lines == ["a second line"]


def test_input_that_is_no_text_is_a_user_error(monkeypatch):
    with pytest.raises(UserError, match="the input is not in the terminal's encoding"):
        inside(monkeypatch, b"\xff\xfe\n")


@contextlib.contextmanager
def on_a_terminal(tokens, state):
    """A session on a pseudo-terminal, which must end by itself, and well; `state` is the user's state directory."""
    import pty

    child, screen = pty.fork()
    if child == 0:
        os.chdir(ROOT)
        environment = {**os.environ, "XDG_STATE_HOME": str(state), "TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-c", SESSION, str(tokens)], environment)
    try:
        read_until(screen, b">> ")
        yield screen
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        child = 0
    finally:
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        os.close(screen)


needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")


@needs_terminal
def test_on_a_terminal_ctrl_c_ends_the_text_and_ctrl_d_the_session(tmp_path):
    with on_a_terminal(1_000_000_000, tmp_path) as screen:
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


@needs_terminal
def test_the_next_session_remembers_and_the_line_can_be_edited(tmp_path):
    with on_a_terminal(3, tmp_path) as screen:
        for line in (b"ab", b"/top_k 1", b"/top_k 1", b"//"):
            os.write(screen, line + b"\n")
            read_until(screen, b">> ")
        os.write(screen, b"\x04")
    kept = tmp_path / "tinygpt" / "history"
    assert kept.read_text() == "ab\n/top_k 1\n//\n"
    assert kept.stat().st_mode & 0o077 == 0
    with on_a_terminal(3, tmp_path) as screen:
        os.write(screen, b"\x1b[A" * 3)
        read_until(screen, b"ab")
        os.write(screen, b"\x01c\x05d\n")  # c at its beginning, d at its end
        read_until(screen, b">> ")
        os.write(screen, b"\x04")
    assert kept.read_text().splitlines()[-1] == "cabd"


@needs_terminal
def test_a_history_that_cannot_be_kept_is_no_error(tmp_path):
    (tmp_path / "state").write_text("a file where a folder should be")
    with on_a_terminal(3, tmp_path / "state") as screen:
        os.write(screen, b"abc\n")
        seen = read_until(screen, b">> ")
        os.write(screen, b"\x1b[A")
        read_until(screen, b"abc")  # this session's lines are there
        os.write(screen, b"\x15\x04")
    assert b"rror" not in seen


def test_a_history_that_has_grown_long_is_cut(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(terminal, "REMEMBERED", 3)
    kept = terminal.history_file()
    assert terminal.History().read() == []
    kept.parent.mkdir()
    kept.write_bytes(b"".join(b"%d\xff\n" % n for n in range(7)))
    assert terminal.History().read() == ["4\ufffd", "5\ufffd", "6\ufffd"]
    assert kept.read_text(encoding="utf-8").count("\n") == 3


def test_a_pipe_leaves_no_history(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    inside(monkeypatch, b"abc\n")
    assert list(tmp_path.iterdir()) == []


def read_until(screen, end):
    seen = b""
    while end not in seen:
        seen += read_one(screen)
    return seen


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


# Settings


def talk(monkeypatch, capsys, *lines):
    """What a session with these lines asked of the model, (prompt, settings) each, and what it said."""
    asked, typed = [], iter(lines)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed, "quit"))
    monkeypatch.setattr(terminal, "warn_if_cropped", lambda *args: None)
    monkeypatch.setattr(terminal, "stream", lambda model, tokenizer, prompt, **how: asked.append((prompt, how)) or [])
    terminal.chat(None, None, seed=1)
    return asked, capsys.readouterr().err.splitlines()[1:]


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/temperature 0.5", "temperature", 0.5),
        ("/temperature=0", "temperature", 0.0),
        ("/max_new_tokens 7", "max_new_tokens", 7),
        ("/top_k  50 ", "top_k", 50),
        ("/top_p = .9", "top_p", 0.9),
        ("/min_p 0.1", "min_p", 0.1),
        ("/repetition_penalty 1.2", "repetition_penalty", 1.2),
        ("/seed 3", "seed", 3),
        ("/seed none", "seed", None),
        ("/stop END", "stop", ["END"]),
        (r'/stop "\n\n" a\tb "two words"', "stop", ["\n\n", "a\tb", "two words"]),
        (r"/stop \\n", "stop", [r"\n"]),
        ("/stop none", "stop", []),
    ],
)
def test_a_setting_holds_for_the_texts_that_follow(monkeypatch, capsys, line, name, value):
    asked, _ = talk(monkeypatch, capsys, "before", line, "after", "again")
    (_, before), *after = asked
    assert before["seed"] == 1
    assert [how for _, how in after] == [{**before, name: value}] * 2


def test_settings_are_shown_as_they_are_typed(monkeypatch, capsys):
    _, said = talk(monkeypatch, capsys, r'/stop "\n\n" \\', "/top_k 5", "/top_k none", "/settings", "/", "/seed")
    shown = {line.split()[0]: line for line in said if line.startswith("/")}
    fields = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop")
    assert set(shown) == {f"/{name}" for name in fields}
    assert r'/stop "\n\n" "\\"' in shown["/stop"]
    assert "/top_k none" in shown["/top_k"]
    assert "above 1: wilder" in shown["/temperature"]
    assert sum("/temperature" in line for line in said) == 2
    assert said.count("/seed 1    the same seed draws the same text; none: a new one each time") == 1


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/temprature 1", "there is no setting temprature: did you mean /temperature?"),
        ("/setings", "did you mean /settings?"),
        ("/usr/bin", "A text that begins with a slash is typed with two."),
        ("/temperature hot", "temperature=hot is not a number"),
        ("/temperature nan", "temperature must be at least 0"),
        ("/top_k 2.5", "top_k=2.5 is not a whole number"),
        ("/top_p 2", "top_p must be above 0 and at most 1"),
        ("/max_new_tokens 0", "max_new_tokens must be at least 1"),
        ("/stop 'a", "a quote is not closed"),
    ],
)
def test_a_wrong_setting_is_one_line_and_changes_nothing(monkeypatch, capsys, line, words):
    asked, said = talk(monkeypatch, capsys, "before", line, "after")
    assert asked[0][1] == asked[1][1]
    (error,) = said
    assert error.startswith("error: ")
    assert words in error


def test_a_text_may_begin_with_a_slash(monkeypatch, capsys):
    asked, said = talk(monkeypatch, capsys, "//usr", "//", "/help")
    assert [prompt for prompt, _ in asked] == ["/usr", "/"]
    assert any("/temperature 0.5" in line for line in said)
