"""The `>>` prompt of `sample.py interactive=true`: a line in, its continuation out as it is written.

Text goes to stdout, everything said about it to stderr. It works the same where stdin is a pipe; on a terminal there are
line editing and a history, which the next session finds again.
"""

import dataclasses
import difflib
import os
import re
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from tinygpt.config import SampleConfig, UserError, unescape
from tinygpt.generate import options, stream
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

HELP = "Type the beginning of a text. Ctrl-C stops a text; quit, exit or Ctrl-D ends the session; /help says more."
MORE = """\
/settings               shows every setting with its value
/temperature 0.5        changes one, for the texts that follow
/top_k none             takes one back
/stop "\\n\\n" END        several values: quotes hold what has spaces or \\n in it
//usr                   a text that begins with a slash
arrow keys, Ctrl-R      edit the line, go through earlier ones and search in them
Ctrl-C                  stops a text; at the prompt, gives up the line
quit, exit or Ctrl-D    ends the session"""
QUIT = ("quit", "exit", "/quit", "/exit")
REMEMBERED = 1000  # lines of history


def chat(model: GPT, tokenizer: Tokenizer, **settings: Any) -> None:
    """Continue each line that is typed, until `quit`, `exit` or the end of input.

    `settings` are the keyword arguments of `generate.stream` to begin with; a line such as `/temperature 0.5` changes
    one. A line that cannot be continued or understood (an unknown character, a setting outside its limits) prints its
    error, and the next one may be typed. Raises UserError where the input is not in the terminal's encoding.
    """
    settings = options(SampleConfig()) | settings
    say(HELP)
    history = History()
    while (line := read_line()) is not None and line.strip() not in QUIT:
        history.add(line)
        try:
            if line.startswith("/") and not line.startswith("//"):
                settings |= command(line[1:], settings)
            else:
                answer(model, tokenizer, line.removeprefix("/"), settings)
        except UserError as error:
            say(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
        except KeyboardInterrupt:
            print()  # the text ends here, the session goes on


def answer(model: GPT, tokenizer: Tokenizer, prompt: str, settings: dict[str, Any]) -> None:
    warn_if_cropped(model, tokenizer, prompt)
    for text in stream(model, tokenizer, prompt, **settings):
        print(text, end="", flush=True)
    print()


def warn_if_cropped(model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    length, block = len(tokenizer.encode(prompt)), model.config.block_size
    if length > block:
        say(f"note: the prompt has {length:,} tokens; the model reads the last {block:,}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


# Settings


def command(line: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What `line`, without its slash, changes in `settings`; what it asks for is printed."""
    name, value = re.findall(r"(?s)^(\w*)[\s=]*(.*)", line.strip())[0]
    if name == "help":
        say(MORE)
    elif name in ("", "settings"):
        say("\n".join(f"/{known + ' ' + shown(settings[known]):<28} {meaning(known)}" for known in settings))
    elif name not in settings:
        close = difflib.get_close_matches(name, [*settings, "settings", "help"], n=1, cutoff=0.5)
        where = f"did you mean /{close[0]}?" if close else "/settings shows those there are."
        raise UserError(f"there is no setting {name}: {where} A text that begins with a slash is typed with two.")
    elif not value:
        say(f"/{name} {shown(settings[name])}    {meaning(name)}")
    else:
        read = read_value(name, value)
        say(f"{name}: {shown(read)}")
        return {name: read}
    return {}


def read_value(name: str, text: str) -> Any:
    """The value of a setting as it is typed; `none` is the schema's default. Raises UserError where it is not one."""
    if text in ("none", "null"):
        return getattr(SampleConfig(), name)
    if name == "stop":
        return split_words(text)
    kind: Any = _field(name).type
    whole = int in getattr(kind, "__args__", (kind,))
    try:
        value: Any = int(text) if whole else float(text)
    except ValueError:
        raise UserError(f"{name}={text} is not a {'whole ' * whole}number") from None
    try:
        SampleConfig(**{name: value})
    except UserError as error:
        raise UserError(f"{error}: {error.hint}") from None
    return value


def _field(name: str) -> dataclasses.Field[Any]:
    return next(item for item in dataclasses.fields(SampleConfig) if item.name == name)


def meaning(name: str) -> str:
    return str(_field(name).metadata["help"]).replace("null", "none")


def split_words(text: str) -> list[str]:
    """Words as a shell takes them, except that a backslash is one: `unescape` reads it."""
    words = shlex.shlex(text, posix=True, punctuation_chars=False)
    words.whitespace_split, words.escape, words.commenters = True, "", ""
    try:
        return [unescape(word) for word in words]
    except ValueError:
        raise UserError(f"a quote is not closed in {text}") from None


def shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, list | tuple):
        escaped = (word.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t") for word in value)
        return " ".join(f'"{word}"' if '"' not in word else f"'{word}'" for word in escaped) or "none"
    return "none" if value is None else str(value)


# Lines and their history


def read_line() -> str | None:
    """One line, or None at the end of input. Ctrl-C gives up the line and asks again."""
    while True:
        try:
            return input(">> ")
        except KeyboardInterrupt:
            print()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError as error:
            raise UserError("the input is not in the terminal's encoding", f"it must be {error.encoding}") from None


class History:
    """Line editing in `input`, and the lines of earlier sessions behind the arrow-up key, where this is a terminal.

    Each line is appended to `history_file` when it is typed, so that it is there however the session ends, and whatever
    another session writes. Where the file cannot be read or written there is no more than this session's lines.
    """

    def __init__(self) -> None:
        self.file, self.last = history_file(), ""
        self.kept = sys.stdin.isatty() and sys.stdout.isatty()
        with suppress(ImportError):  # not every Python has it
            import readline

            for line in self.read() if self.kept else ():
                readline.add_history(line)

    def read(self) -> list[str]:
        """The newest lines; a file that has grown long is cut to them."""
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
            if len(lines) > 2 * REMEMBERED:
                self.file.write_text("".join(f"{line}\n" for line in lines[-REMEMBERED:]), encoding="utf-8")
        except OSError:
            return []
        return lines[-REMEMBERED:]

    def add(self, line: str) -> None:
        if not self.kept or not line.strip() or line == self.last:
            return
        self.last = line
        with suppress(OSError):
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.file.touch(mode=0o600)  # what one types is for nobody else to read
            with self.file.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{line}\n")


def history_file() -> Path:
    """$XDG_STATE_HOME/tinygpt/history, in ~/.local/state unless that is set (XDG base directory specification)."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tinygpt" / "history"
