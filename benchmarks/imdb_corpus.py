"""The IMDB corpus in numbers: how large the cleaned word vocabulary is for which split, and what padding costs.

The reference reports 39,270 words and does not say how it split the reviews. Here are the sizes for the usual ways to
split 80/10/10 with seed 42, the spread over splits by chance, and what `data=imdb` has.

    python benchmarks/imdb_corpus.py [--splits 100]

Needs the corpus in $TINYGPT_DATA_DIR or a network. Writes benchmarks/results/imdb_corpus.json.
"""

import argparse
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import machine, spread, write_result

from tinygpt import imdb
from tinygpt.config import DataConfig, TokenizerConfig
from tinygpt.corpus import data_dir
from tinygpt.documents import PaddedOrder
from tinygpt.shards import prepare

REFERENCE, SPECIALS, MIN_FREQUENCY, SEED = 39_270, 3, 5, 42
WORDS = TokenizerConfig("word", min_frequency=MIN_FREQUENCY, specials=["<pad>"])


def shuffled_by_python(n: int) -> list[int]:
    order = list(range(n))
    random.Random(SEED).shuffle(order)
    return order


# scikit-learn's train_test_split and pandas' sample draw from RandomState, datasets' from default_rng, torch's random_split
# from randperm. Which end of the permutation is the training split differs too.
SHUFFLES: dict[str, Callable[[int], object]] = {
    "random.shuffle": shuffled_by_python,
    "numpy RandomState.permutation": lambda n: np.random.RandomState(SEED).permutation(n),
    "numpy default_rng.permutation": lambda n: np.random.default_rng(SEED).permutation(n),
    "torch.randperm": lambda n: torch.randperm(n, generator=torch.Generator().manual_seed(SEED)).numpy(),
}


class Counts:
    """The words of every review, as numbers."""

    def __init__(self, texts: list[str]) -> None:
        ids: dict[str, int] = {}
        self.documents = [np.array([ids.setdefault(word, len(ids)) for word in text.split()], dtype=int) for text in texts]
        self.words = len(ids)

    def vocabulary(self, chosen: list[int]) -> int:
        """Words that are frequent enough in the chosen reviews, and the specials."""
        counts = np.bincount(np.concatenate([self.documents[i] for i in chosen]), minlength=self.words)
        return int((counts >= MIN_FREQUENCY).sum()) + SPECIALS


def vocabularies(splits: int) -> dict[str, object]:
    texts = imdb.read_reviews(imdb.find(data_dir(None)), clean=True)
    by_number = [0] * len(texts)  # the reviews as the data set numbers them: the first half is its training part
    for place, number in enumerate(shuffled_by_python(len(texts))):
        by_number[number] = place
    counts, train = Counts([texts[place] for place in by_number]), len(texts) * 8 // 10
    sizes = {}
    for name, shuffle in SHUFFLES.items():
        order = np.asarray(shuffle(len(texts)))
        sizes[f"{name}, the first 80%"] = counts.vocabulary(order[:train].tolist())
        sizes[f"{name}, the last 80%"] = counts.vocabulary(order[-train:].tolist())
    draw = np.random.default_rng(0)
    by_chance = [counts.vocabulary(draw.permutation(len(texts))[:train].tolist()) for _ in range(splits)]
    found = {**spread([float(size) for size in by_chance]), "sd": float(np.std(by_chance)), "splits": splits}
    return {"reference": REFERENCE, "by_recipe": sizes, "by_chance": found}


def prepared_corpora() -> dict[str, object]:
    """Vocabulary, tokens and seconds of three ways to prepare the corpus, and what padding adds to the first."""
    ways = {
        "words, cleaned": DataConfig(corpus="imdb", clean=True, test_fraction=0.1, tokenizer=WORDS),
        "words, raw": DataConfig(corpus="imdb", test_fraction=0.1, tokenizer=WORDS),
        "bpe, raw": DataConfig(corpus="imdb", test_fraction=0.1, tokenizer=TokenizerConfig("bpe", vocab_size=8192)),
    }
    found: dict[str, object] = {}
    for name, config in ways.items():
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            prepared = prepare(config, data_dir(None), Path(folder))
            seconds = round(time.process_time() - start, 1)  # of the processor: the machine may be busy
            tokens = {split: len(prepared.tokens(split)) for split in ("train", "val", "test")}
            entry = {"vocabulary": prepared.tokenizer.vocab_size, "tokens": tokens, "seconds": seconds}
            if config.clean:
                entry["padding"] = {T: padding(prepared.train, T) for T in (64, 256, 1024)}
            found[name] = entry
    return found


def padding(tokens: object, block_size: int) -> dict[str, float]:
    """Positions computed for each token that counts, batches of 64: by length, as they are drawn, and full width."""
    order = PaddedOrder(tokens, block_size, 64, 1)
    steps = range(order.rows_per_epoch // 64)
    bucketed, drawn = ([order.lengths[rows(s)] for s in steps] for rows in (order.rows, lambda s: order.drawn(s, s + 1)))
    real = sum(int(lengths.sum()) for lengths in bucketed)
    ratio = {
        "by length": sum(64 * int(lengths.max()) for lengths in bucketed) / real,
        "as drawn": sum(64 * int(lengths.max()) for lengths in drawn) / sum(int(lengths.sum()) for lengths in drawn),
        "full width": 64 * block_size * len(steps) / real,
    }
    return {name: round(value, 3) for name, value in ratio.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=100)
    result = {"vocabulary": vocabularies(parser.parse_args().splits), "prepared": prepared_corpora()}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    for name, value in result.items():
        print(name, value)
    write_result("imdb_corpus", {**result, "peak_bytes": peak, **machine()})


if __name__ == "__main__":
    main()
