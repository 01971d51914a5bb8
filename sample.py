"""Write text with a trained GPT: python sample.py ckpt=latest prompt="To be"; python sample.py --help says what else."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinygpt import cli
from tinygpt.config import SampleConfig, UserError, unescape
from tinygpt.lean import quick_imports

if TYPE_CHECKING:
    from tinygpt.model import GPT
    from tinygpt.tokenizer import Tokenizer


def work(config: SampleConfig, run_dir: Path, overrides: list[str]) -> None:
    with quick_imports():  # torch, which --help does not wait for
        from tinygpt.checkpoint import load_for_text, pick_device
        from tinygpt.generate import generate_many, opening, options
        from tinygpt.terminal import chat, warn_if_cropped

    model, tokenizer = load_for_text(config.ckpt, pick_device(config.device), config.dtype)
    settings = options(config) | {"stop": [unescape(text) for text in config.stop]}
    if config.interactive:
        chat(model, tokenizer, **settings)
        return
    prompt = opening(read_prompt(config.prompt), tokenizer)
    warn_if_cropped(model, tokenizer, prompt)
    if config.num_samples == 1:
        write_one(model, tokenizer, prompt, settings)
        return
    for number, text in enumerate(generate_many(model, tokenizer, prompt, config.num_samples, **settings), 1):
        print(f"--- {number} of {config.num_samples} ---\n{text}")


def write_one(model: "GPT", tokenizer: "Tokenizer", prompt: str, settings: dict[str, Any]) -> None:
    """The prompt, and what follows as it is drawn."""
    from tinygpt.generate import stream

    pieces = stream(model, tokenizer, prompt, **settings)  # refuses the prompt here, before it is shown
    print(prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def read_prompt(prompt: str) -> str:
    """The prompt itself; @FILE is that file's text, - what comes on standard input."""
    if prompt != "-" and not prompt.startswith("@"):
        return prompt
    try:
        return sys.stdin.read() if prompt == "-" else Path(prompt[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        name = "on standard input" if prompt == "-" else f"file {prompt[1:]}"
        raise UserError(f"the prompt {name} cannot be read: {reason}", "prompt=@FILE takes a text in UTF-8") from error


if __name__ == "__main__":
    cli.main("sample", SampleConfig, work, Path(__file__).parent / "conf")
