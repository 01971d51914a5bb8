"""How long does it take to reach what nanoGPT's CPU recipe reaches? Whole processes, in turn, seed by seed.

For each seed nanoGPT trains its 2000 steps, then ours trains `experiment=shakespeare_char_cpu_fast`; both from the start of
the process to its end, validation, samples and checkpoints included. Both final models are evaluated here, in float32, over
the whole validation split. nanoGPT is a checkout given by path:

    python benchmarks/race.py --nanogpt PATH [--seeds 1 2 3 4 5] [--quick]

--quick: one seed. Writes benchmarks/results/race.json, but for --quick.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from common import machine, spread, write_result
from nanogpt_parity import load_peer, prepare_peer, train_ours, train_peer

from tinygpt.checkpoint import load
from tinygpt.config import DataConfig, TokenizerConfig
from tinygpt.corpus import cache_dir, data_dir
from tinygpt.evaluate import evaluate
from tinygpt.model import GPT
from tinygpt.shards import prepare

EXPERIMENT = "shakespeare_char_cpu_fast"


def full_split_loss(model: GPT) -> float:
    """Nats a character, over the whole validation split, in float32."""
    data = DataConfig(corpus="shakespeare", tokenizer=TokenizerConfig(kind="char"))
    val = prepare(data, data_dir(None), cache_dir(None)).val
    return float(evaluate(model, val, None, batch_size=64)["loss"])


def round_of(checkout: Path, seed: int, folder: Path) -> dict:
    started = time.perf_counter()
    checkpoint = train_peer(checkout, seed, folder)
    peer_seconds = time.perf_counter() - started
    started = time.perf_counter()
    summary = train_ours(seed, folder, EXPERIMENT)
    our_seconds = time.perf_counter() - started
    theirs, (ours, _) = load_peer(checkpoint), load(folder / f"tinygpt-{seed}")
    row = {
        "seed": seed,
        "seconds": {"nanogpt": peer_seconds, "ours": our_seconds, "ours_training": summary["seconds"]},
        "ratio": peer_seconds / our_seconds,
        "val_loss": {"nanogpt": full_split_loss(theirs), "ours": full_split_loss(ours)},
        "parameters": {"nanogpt": theirs.num_parameters(), "ours": ours.num_parameters()},
        "steps": summary["steps"],
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--quick", action="store_true", help="one seed, nothing written")
    arguments = parser.parse_args()
    prepare_peer(arguments.nanogpt)
    with tempfile.TemporaryDirectory() as folder:
        seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
        rounds = [round_of(arguments.nanogpt.resolve(), seed, Path(folder)) for seed in seeds]
    result = {
        **machine(),
        "threads": torch.get_num_threads(),
        "experiment": EXPERIMENT,
        "ratio": spread([row["ratio"] for row in rounds]),
        "seconds": {name: spread([row["seconds"][name] for row in rounds]) for name in ("nanogpt", "ours")},
        "val_loss": {name: spread([row["val_loss"][name] for row in rounds]) for name in ("nanogpt", "ours")},
        "rounds": rounds,
    }
    print(json.dumps({name: result[name] for name in ("ratio", "seconds", "val_loss")}, indent=1))
    write_result("race", result, quick=arguments.quick)


if __name__ == "__main__":
    main()
