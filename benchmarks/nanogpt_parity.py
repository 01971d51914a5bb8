"""Does `experiment=shakespeare_char_cpu` reach what nanoGPT's CPU recipe reaches?

Trains both on Tiny Shakespeare for 2000 steps with several seeds and evaluates each final model with our evaluation over
the whole validation split (nanoGPT's own figure samples 15,000 tokens of it). nanoGPT is a checkout given by path:

    python benchmarks/nanogpt_parity.py --nanogpt PATH [--seeds 1 2 3] [--reuse FOLDER]

Needs the corpus in $TINYGPT_DATA_DIR or a network. Writes benchmarks/results/nanogpt_parity.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from common import ROOT, machine, spread, write_result

from tinygpt.config import DataConfig, ModelConfig, TokenizerConfig
from tinygpt.corpus import SHAKESPEARE, cache_dir, data_dir
from tinygpt.evaluate import evaluate
from tinygpt.files import obtain
from tinygpt.model import GPT
from tinygpt.shards import prepare

RECIPE = [
    *("--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=100", "--block_size=64", "--batch_size=12"),
    *("--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0"),
    "--always_save_checkpoint=True",
]
# nanoGPT fixes its seed in the code; this moves it.
SEEDED = """
import runpy, sys, torch
original = torch.manual_seed
torch.manual_seed = lambda seed: original(seed + {seed})
sys.argv = {argv}
runpy.run_path("train.py", run_name="__main__")
"""


def train_peer(checkout: Path, seed: int, out: Path) -> Path:
    """nanoGPT's final checkpoint for a seed; trained only where it is not there yet."""
    file = out / f"nanogpt-{seed}" / "ckpt.pt"
    if not file.exists():
        argv = ["train.py", "config/train_shakespeare_char.py", *RECIPE, f"--out_dir={file.parent}"]
        subprocess.run([sys.executable, "-c", SEEDED.format(seed=seed, argv=argv)], cwd=checkout, check=True)
    return file


def prepare_peer(checkout: Path) -> None:
    folder = checkout / "data" / "shakespeare_char"
    if not (folder / "train.bin").exists():
        shutil.copy(obtain(SHAKESPEARE, data_dir(None)), folder / "input.txt")
        subprocess.run([sys.executable, "prepare.py"], cwd=folder, check=True)


def load_peer(file: Path) -> GPT:
    """nanoGPT's weights in our model: the names differ by a prefix."""
    checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    arguments = {name: checkpoint["model_args"][name] for name in ("n_layer", "n_head", "n_embd", "block_size", "bias")}
    model = GPT(ModelConfig(**arguments), checkpoint["model_args"]["vocab_size"])
    model.load_state_dict({name.removeprefix("transformer."): value for name, value in checkpoint["model"].items()})
    return model


def train_ours(seed: int, out: Path, experiment: str = "shakespeare_char_cpu", overrides: Sequence[str] = ()) -> dict:
    run = out / f"tinygpt-{seed}"
    command = [sys.executable, "train.py", f"experiment={experiment}", f"seed={seed}", f"hydra.run.dir={run}", *overrides]
    if not (run / "summary.json").exists():
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return json.loads((run / "summary.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--reuse", type=Path, help="a folder of earlier runs: what is in it is not trained again")
    arguments = parser.parse_args()
    out = (arguments.reuse or Path(tempfile.mkdtemp())).resolve()
    checkout = arguments.nanogpt.resolve()
    prepare_peer(checkout)
    config = DataConfig(corpus="shakespeare", tokenizer=TokenizerConfig(kind="char"))
    prepared = prepare(config, data_dir(None), cache_dir(None))
    lengths = prepared.tokenizer.byte_lengths()
    rows = []
    for seed in arguments.seeds:
        peer = evaluate(load_peer(train_peer(checkout, seed, out)), prepared.val, lengths)
        ours = train_ours(seed, out)
        rows.append({"seed": seed, "nanogpt": peer["loss"], "tinygpt": ours["val_loss"]})
        print(f"seed {seed}: nanoGPT {peer['loss']:.4f}, tinygpt {ours['val_loss']:.4f}", flush=True)
    peer_mean, our_mean = (spread([row[name] for row in rows]) for name in ("nanogpt", "tinygpt"))
    print(f"mean over {len(rows)} seeds: nanoGPT {peer_mean['mean']:.4f}, tinygpt {our_mean['mean']:.4f}")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    result = {"peer_commit": commit, "rows": rows, "nanogpt": peer_mean, "tinygpt": our_mean}
    write_result("nanogpt_parity", {**result, **machine()})


if __name__ == "__main__":
    main()
