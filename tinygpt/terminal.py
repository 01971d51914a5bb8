"""The `>>` prompt of `sample.py interactive=true`: a line in, its continuation out as it is written.

Text goes to stdout, everything said about it to stderr. It works the same where stdin is a pipe.
"""

import sys
from contextlib import suppress
from typing import Any

from tinygpt.config import UserError
from tinygpt.generate import stream
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

HELP = "Type the beginning of a text. Ctrl-C stops a text; quit, exit or Ctrl-D ends the session."
QUIT = ("quit", "exit")


def chat(model: GPT, tokenizer: Tokenizer, **settings: Any) -> None:
    """Continue each line that is typed, until `quit`, `exit` or the end of input.

    `settings` are the keyword arguments of `generate.stream`. A line that cannot be continued (an unknown
    character, a setting outside its limits) prints its error, and the next one may be typed. Raises UserError
    where the input is not in the terminal's encoding.
    """
    use_line_editing()
    say(HELP)
    while (line := read_line()) is not None and line.strip() not in QUIT:
        try:
            warn_if_cropped(model, tokenizer, line)
            for text in stream(model, tokenizer, line, **settings):
                print(text, end="", flush=True)
            print()
        except UserError as error:
            say(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))
        except KeyboardInterrupt:
            print()  # the text ends here, the session goes on


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


def use_line_editing() -> None:
    """Arrow keys and history in `input`, where the platform has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401


def warn_if_cropped(model: GPT, tokenizer: Tokenizer, prompt: str) -> None:
    length, block = len(tokenizer.encode(prompt)), model.config.block_size
    if length > block:
        say(f"note: the prompt has {length:,} tokens; the model reads the last {block:,}")


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
