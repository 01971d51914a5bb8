"""Training on a CUDA GPU: gpt2_small tokens a second and MFU over a sweep of micro-batches against nanoGPT's bench.py at the
same shape (both compiled, bfloat16, block 1024), and Shakespeare's characters to a validation loss, over three seeds.

    python benchmarks/gpu.py --nanogpt PATH [--micro 8 16 32] [--steps 60] [--seeds 1 2 3] [--only speed|loss]

MFU is over a bfloat16 matrix product measured on the same device. Each run is a process of its own. The experiment compiles
its step; its first seed is also trained without, so that what compiling costs and brings is known. Writes
benchmarks/results/gpu.json after each run: one that is cut short leaves what it measured, and --only keeps the other part.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, earlier_result, machine, spread, write_result

from tinygpt.summary import read_metrics

BLOCK = 1024
SHAPE = (
    "model=gpt2_small",
    f"model.block_size={BLOCK}",
    "model.bias=false",
    "data=shakespeare",
    "trainer=gpu",
    "compile=true",
)


def summary_of(folder: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr[-500:]}
    return json.loads((folder / "summary.json").read_text())


def ours(micro: int, steps: int, folder: Path) -> dict[str, Any]:
    """Medians over the lines of metrics.csv, of five steps each: the compiler works in the first alone."""
    budget = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "data.val_tokens=4096", "callbacks=none")
    batch = (f"data.global_batch_size={micro}", f"data.micro_batch_size={micro}", "trainer.log_every_n_steps=5")
    found = summary_of(folder, *SHAPE, *budget, *batch)
    if "failed" not in found:
        rows = [row for row in read_metrics(folder / "metrics.csv") if row["tokens_per_second"]]
        found = {name: statistics.median(float(row[name]) for row in rows) for name in ("tokens_per_second", "mfu")}
    return found


def nanogpt(checkout: Path, micro: int) -> dict[str, Any]:
    arguments = [f"--batch_size={micro}", f"--block_size={BLOCK}", "--real_data=False", "--compile=True"]
    done = subprocess.run([sys.executable, "bench.py", *arguments], cwd=checkout, capture_output=True, text=True)
    said = re.findall(r"time per iteration: ([\d.]+)ms", done.stdout)
    if not said:
        return {"failed": done.stderr[-500:]}
    return {"tokens_per_second": micro * BLOCK / float(said[-1]) * 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--micro", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", choices=("speed", "loss"))
    arguments = parser.parse_args()
    here = {**machine(), "gpu": torch.cuda.get_device_name(), "block_size": BLOCK}
    kept = earlier_result("gpu") if arguments.only else {}
    same = all(kept.get(name) == value for name, value in here.items())  # else it is of another day or machine
    result: dict[str, Any] = {**(kept if same else {}), **here}
    with tempfile.TemporaryDirectory() as name:
        if arguments.only != "loss":
            speed(result, arguments.nanogpt.resolve(), arguments.micro, arguments.steps, Path(name))
        if arguments.only != "speed":
            loss(result, arguments.seeds, Path(name))


def speed(result: dict[str, Any], checkout: Path, sizes: list[int], steps: int, folder: Path) -> None:
    result["speed"] = []
    for micro in sizes:
        row = {
            "micro_batch": micro,
            "nanogpt": nanogpt(checkout, micro),
            "ours": ours(micro, steps, folder / f"speed-{micro}"),
        }
        if "failed" not in row["ours"] and "failed" not in row["nanogpt"]:
            row["ratio"] = row["ours"]["tokens_per_second"] / row["nanogpt"]["tokens_per_second"]
        result["speed"].append(row)
        print(json.dumps(row), flush=True)
        write_result("gpu", result)


def loss(result: dict[str, Any], seeds: list[int], folder: Path) -> None:
    runs: list[dict[str, Any]] = []
    for number, (seed, compiled) in enumerate([*((seed, True) for seed in seeds), (seeds[0], False)]):
        overrides = ("experiment=shakespeare_char_fast", f"seed={seed}", f"compile={str(compiled).lower()}")
        run = summary_of(folder / f"loss-{number}", *overrides)
        found = {key: run.get(key) for key in ("val_loss", "seconds", "steps", "failed")}
        runs.append({"seed": seed, "compile": compiled, **found})
        done = [one for one in runs if one["compile"] and not one["failed"]]
        result["loss"] = {"runs": runs}
        if done:
            result["loss"] |= {key: spread([one[key] for one in done]) for key in ("val_loss", "seconds")}
        print(json.dumps(runs[-1]), flush=True)
        write_result("gpu", result)


if __name__ == "__main__":
    main()
