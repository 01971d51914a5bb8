"""What Lightning, Hydra and our callbacks cost: `python train.py` against a bare PyTorch loop, at nano on a CPU.

The two run in turn, each as a process of its own, over the same model and the same batches. Targets: at most 5% more
time a step, at most 300 MB more memory at the peak; --help within 2 s.

    python benchmarks/overhead.py [--rounds 5] [--steps 400]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, spread, write_result


def bare(steps: int) -> dict[str, float]:
    command = [sys.executable, "benchmarks/bare_loop.py", f"--steps={steps}"]
    return json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)


def ours(steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"trainer.max_steps={steps}", f"hydra.run.dir={folder}/run", "trainer=cpu"]
        subprocess.run([sys.executable, str(ROOT / "train.py"), *overrides], cwd=folder, check=True, capture_output=True)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    per_step = summary["tokens"] / summary["steps"] / summary["tokens_per_second"]
    return {
        "step_seconds": per_step,
        "peak_bytes": summary["peak_memory_bytes"],
        "seconds": summary["seconds"],
        "forecast_seconds": summary["forecast"]["seconds"],
        "forecast_bytes": summary["forecast"]["memory_bytes"],
    }


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    rounds = [{"bare": bare(arguments.steps), "tinygpt": ours(arguments.steps)} for _ in range(arguments.rounds)]
    result = {
        "steps": arguments.steps,
        "time_ratio": spread([r["tinygpt"]["step_seconds"] / r["bare"]["step_seconds"] for r in rounds]),
        "bare_step_seconds": spread([r["bare"]["step_seconds"] for r in rounds]),
        "tinygpt_step_seconds": spread([r["tinygpt"]["step_seconds"] for r in rounds]),
        "extra_megabytes": spread([(r["tinygpt"]["peak_bytes"] - r["bare"]["peak_bytes"]) / 1e6 for r in rounds]),
        "forecast_over_measured_time": spread([r["tinygpt"]["forecast_seconds"] / r["tinygpt"]["seconds"] for r in rounds]),
        "forecast_over_measured_memory": spread(
            [r["tinygpt"]["forecast_bytes"] / r["tinygpt"]["peak_bytes"] for r in rounds]
        ),
        "help_seconds": spread([help_seconds() for _ in rounds]),
    }
    for name, value in result.items():
        print(f"{name:>30}  {value if isinstance(value, int) else {k: round(v, 4) for k, v in value.items()}}")
    write_result("overhead", {**result, **machine()})


if __name__ == "__main__":
    main()
