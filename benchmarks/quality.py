"""What a given time on this machine buys: the two timed recipes, and their losses over the full split.

    python benchmarks/quality.py [--seeds 1337] [--reuse FOLDER] [--quick]

The seconds are those of the whole process (of a run that is reused, those of its summary, without its imports).
--quick: only the first. Targets: 1.65 in nanoGPT's own 98 s; 1.50 in ten minutes. Writes benchmarks/results/quality.json.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import machine, spread, write_result
from nanogpt_parity import train_ours

RECIPES = {"shakespeare_char_cpu_100s": (1.65, 98), "shakespeare_char_cpu_10min": (1.50, 600)}  # loss, seconds


def timed(seed: int, out: Path, experiment: str) -> dict[str, Any]:
    """The summary of a run, with the seconds that its process took."""
    reused, start = (out / f"tinygpt-{seed}" / "summary.json").exists(), time.perf_counter()
    found = train_ours(seed, out, experiment)
    return found if reused else {**found, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337])
    parser.add_argument("--reuse", type=Path, help="a folder of earlier runs: what is in it is not trained again")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    rows = []
    out = (arguments.reuse or Path(tempfile.mkdtemp())).resolve()
    for experiment, (target, limit) in list(RECIPES.items())[: 1 if arguments.quick else None]:
        runs = [timed(seed, out / experiment, experiment) for seed in arguments.seeds]
        seconds, losses = (spread([run[name] for run in runs]) for name in ("seconds", "best_val_loss"))
        rows.append({"experiment": experiment, "target": target, "limit": limit, "seconds": seconds, "val_loss": losses})
        print(json.dumps(rows[-1]), flush=True)
    write_result("quality", {**machine(), "seeds": arguments.seeds, "rows": rows}, quick=arguments.quick)


if __name__ == "__main__":
    main()
