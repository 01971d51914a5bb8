"""How GPT-2 (124 M), from scratch, learns a small text by heart: `experiment=gpt2_small_shakespeare`, whole, on a CPU.

    python benchmarks/overfit.py [--run FOLDER]

An hour and more on two cores that multiply bfloat16. --run: where it trains; what is there is gone on with, or taken as it
is. Writes benchmarks/results/overfit.json, what the run leaves to look at beside it, and docs/figures/overfit.png.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, ROOT, machine, write_result

from tinygpt.summary import read_metrics, read_summary

EXPERIMENT = "gpt2_small_shakespeare"
SETTINGS = ("trainer=cpu", "trainer.precision=bf16-mixed", "trainer.log_every_n_steps=10")


def train(run: Path) -> None:
    command = [sys.executable, "train.py", f"experiment={EXPERIMENT}", *SETTINGS, "callbacks.last.every_n_steps=150"]
    subprocess.run([*command, "resume=auto", f"hydra.run.dir={run}"], cwd=ROOT, check=True)


def validations(run: Path) -> list[dict[str, float | None]]:
    """Step, epoch, and the losses of the step's batch and of the validation split."""
    rows = [row for row in read_metrics(run / "metrics.csv") if row["val/loss"]]
    tokens = float(rows[-1]["tokens"]) / 10  # of an epoch, of which the run has ten
    return [
        {
            "step": int(row["step"]),
            "epoch": round(float(row["tokens"]) / tokens, 2),
            "train_loss": float(row["train/loss"]) if row["train/loss"] else None,
            "val_loss": float(row["val/loss"]),
            "val_accuracy": float(row["val/accuracy"]),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the run's directory")
    run = (parser.parse_args().run or Path(tempfile.mkdtemp()) / "run").resolve()
    if read_summary(run).get("status") != "done":
        train(run)
    summary = read_summary(run)
    kept = {
        name: summary[name]
        for name in ("steps", "tokens", "seconds", "parameters", "best_step", "best_val_loss", "val_loss")
    }
    result = {"experiment": EXPERIMENT, "settings": SETTINGS, "seed": summary["seed"], **kept, "rows": validations(run)}
    print(json.dumps(result, indent=1))
    folder = RESULTS / EXPERIMENT
    folder.mkdir(exist_ok=True)
    for name in ("metrics.csv", "samples.md"):
        shutil.copy(run / name, folder / name)
    shutil.copy(run / "curves.png", ROOT / "docs" / "figures" / "overfit.png")
    write_result("overfit", {**result, **machine()})


if __name__ == "__main__":
    main()
