"""The scripts as a user runs them: as processes of their own, or (faster, for what needs no process) inside this one."""

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ROOT = Path(__file__).parents[1]
SMALL = ("model.n_layer=1", "model.n_head=2", "model.n_embd=16", "model.block_size=16", "callbacks.samples.max_new_tokens=5")


class Done(NamedTuple):
    code: object
    stdout: str
    stderr: str


def command(verb, *arguments):
    return [sys.executable, str(ROOT / f"{verb}.py"), *arguments]


def run(verb, *arguments, cwd, stdin="", env=None):
    """A script as a process, in `cwd`."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", **(env or {})}
    done = subprocess.run(
        command(verb, *arguments), cwd=cwd, input=stdin, capture_output=True, encoding="utf-8", env=environment, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr)


def run_inside(verb, *arguments, cwd, stdin="", env=None):
    """A script in this process, with its own argv, streams, folder and environment."""
    out, err, handlers, level = io.StringIO(), io.StringIO(), logging.root.handlers[:], logging.root.level
    with (
        mock.patch.object(sys, "argv", [str(ROOT / f"{verb}.py"), *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        mock.patch.dict(os.environ, env or {}),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
            code = 0
        except SystemExit as leaving:
            code = leaving.code or 0
        finally:
            for handler in logging.root.handlers:
                if handler not in handlers:
                    handler.close()
            logging.root.handlers[:], logging.root.level = handlers, level
    return Done(code, out.getvalue(), err.getvalue())


def files(folder):
    """Everything below `folder`, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
