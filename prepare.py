"""A corpus as tokens on disk, where train.py finds them: python prepare.py data=text data.path=my.txt data/tokenizer=gpt2"""

import json
from pathlib import Path

from tinygpt import cli
from tinygpt.config import PrepareConfig


def work(config: PrepareConfig, run_dir: Path, overrides: list[str]) -> None:
    from tinygpt.corpus import cache_dir, data_dir  # numpy, which --help does not wait for
    from tinygpt.shards import SPLITS, prepare

    prepared = prepare(config.data, data_dir(config.data_dir), cache_dir(config.cache_dir))
    tokens = {split: len(prepared.tokens(split)) for split in SPLITS}
    what = {"corpus": prepared.corpus, "sha256": prepared.sha256, "vocab_size": prepared.tokenizer.vocab_size}
    print(json.dumps({"folder": str(prepared.folder), **what, "tokens": tokens}))


if __name__ == "__main__":
    cli.main("prepare", PrepareConfig, work, Path(__file__).parent / "conf")
