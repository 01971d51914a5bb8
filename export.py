"""The weights of a checkpoint as a directory for other programs: python export.py ckpt=latest format=hf out=my-model"""

from pathlib import Path

from tinygpt import cli
from tinygpt.config import ExportConfig
from tinygpt.lean import quick_imports


def work(config: ExportConfig, run_dir: Path, overrides: list[str]) -> None:
    with quick_imports():  # torch, which --help does not wait for
        from tinygpt.export import export

    print(export(config))


if __name__ == "__main__":
    cli.main("export", ExportConfig, work, Path(__file__).parent / "conf")
