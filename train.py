"""Train a GPT: python train.py [key=value ...]; python train.py --help says which."""

from pathlib import Path

from tinygpt import cli
from tinygpt.config import TrainConfig
from tinygpt.lean import lean_imports


def work(config: TrainConfig, run_dir: Path, overrides: list[str]) -> float | None:
    with lean_imports():  # torch and Lightning, which --help does not wait for
        from tinygpt.run import train
        from tinygpt.verify import verify

    if config.verify_resume:
        verify(run_dir, config.seed)
        return None
    return train(config, run_dir, overrides)


if __name__ == "__main__":
    cli.main("train", TrainConfig, work, Path(__file__).parent / "conf")
