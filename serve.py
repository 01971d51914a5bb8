"""Serve a trained GPT over HTTP: python serve.py ckpt=latest; python serve.py --help says what else."""

from pathlib import Path

from tinygpt import cli
from tinygpt.config import ServeConfig, UserError
from tinygpt.lean import quick_imports


def work(config: ServeConfig, run_dir: Path, overrides: list[str]) -> None:
    try:
        with quick_imports():  # torch and FastAPI, which --help does not wait for
            from tinygpt.serve import serve
    except ModuleNotFoundError as error:
        raise UserError(f"the server needs the package {error.name}", "pip install -e '.[serve]'") from error
    serve(config)


if __name__ == "__main__":
    cli.main("serve", ServeConfig, work, Path(__file__).parent / "conf")
