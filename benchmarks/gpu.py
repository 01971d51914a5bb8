"""Training on a CUDA GPU: gpt2_small tokens a second and MFU over a sweep of micro-batches against nanoGPT's bench.py at the
same shape (both compiled, bfloat16, block 1024), and Shakespeare's characters to a validation loss, over three seeds.

    python benchmarks/gpu.py --nanogpt PATH [--micro 8 16 32] [--steps 40] [--seeds 1 2 3] [--only speed|loss]

MFU is over a bfloat16 matrix product measured on the same device. Each run is a process of its own. Writes
benchmarks/results/gpu.json after each part, so that a run cut short leaves what it measured.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, spread, write_result

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
    """The mean over the steps after the compiler's: the rate of a long run less that of its first tenth."""
    budget = (f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}", "data.val_tokens=4096", "callbacks=none")
    batch = (f"data.global_batch_size={micro}", f"data.micro_batch_size={micro}", "trainer.log_every_n_steps=5")
    found = summary_of(folder, *SHAPE, *budget, *batch)
    if "failed" not in found:
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        rates = [
            float(row[rows[0].index("tokens_per_second")]) for row in rows[1:] if row[rows[0].index("tokens_per_second")]
        ]
        found = {"tokens_per_second": sorted(rates)[len(rates) // 2], "mfu": found["mfu"]}
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
    result: dict[str, Any] = {**machine(), "gpu": torch.cuda.get_device_name(), "block_size": BLOCK}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only != "loss":
            result["speed"] = []
            for micro in arguments.micro:
                row = {"micro_batch": micro, "nanogpt": nanogpt(arguments.nanogpt.resolve(), micro)}
                row["ours"] = ours(micro, arguments.steps, folder / f"speed-{micro}")
                if "failed" not in row["ours"] and "failed" not in row["nanogpt"]:
                    row["ratio"] = row["ours"]["tokens_per_second"] / row["nanogpt"]["tokens_per_second"]
                result["speed"].append(row)
                print(json.dumps(row), flush=True)
            write_result("gpu", result)
        if arguments.only != "speed":
            runs = [
                summary_of(folder / f"loss-{seed}", "experiment=shakespeare_char_fast", f"seed={seed}")
                for seed in arguments.seeds
            ]
            kept = [{key: run.get(key) for key in ("val_loss", "seconds", "steps", "failed")} for run in runs]
            done = [run for run in kept if not run["failed"]]
            result["loss"] = {"runs": kept}
            if done:
                result["loss"] |= {key: spread([run[key] for run in done]) for key in ("val_loss", "seconds")}
            print(json.dumps(result["loss"], indent=1))
            write_result("gpu", result)


if __name__ == "__main__":
    main()
