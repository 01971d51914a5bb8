"""What a given time on this machine buys: whole processes of the two timed recipes, and their losses over the full split.

    python benchmarks/quality.py [--seeds 1] [--quick]

--quick: only the first. Targets: 1.65 in nanoGPT's own 98 s; 1.50 in ten minutes. Writes benchmarks/results/quality.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from common import machine, spread, write_result
from nanogpt_parity import train_ours

RECIPES = {"shakespeare_char_cpu_100s": 1.65, "shakespeare_char_cpu_10min": 1.50}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for experiment, target in list(RECIPES.items())[: 1 if arguments.quick else None]:
            seconds, losses = [], []
            for seed in arguments.seeds:
                started = time.perf_counter()
                losses.append(train_ours(seed, Path(name) / experiment, experiment)["best_val_loss"])
                seconds.append(time.perf_counter() - started)
            rows.append({"experiment": experiment, "target": target, "seconds": spread(seconds), "val_loss": spread(losses)})
            print(json.dumps(rows[-1]), flush=True)
    write_result("quality", {**machine(), "seeds": arguments.seeds, "rows": rows}, quick=arguments.quick)


if __name__ == "__main__":
    main()
