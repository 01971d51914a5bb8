"""How long until something happens: `python train.py` to its first optimizer step, against nanoGPT's `train.py` at the
same shape, and `python sample.py` to its first token, against `import torch`.

Each round starts every one of them as a process of its own, in turn. The two trainings run under the same few lines
around `train.py`, which note the time of every optimizer step; both have a budget of one step, so that the last one noted
is the first of the training (our forecast takes steps of its own before). The first token is seen from outside: the
first byte on stdout after the prompt. Beside the wall time of a first step stand its processor seconds, which other
programs delay less. Targets: at most 3 s more than nanoGPT, at most 1 s more than `import torch`.

    python benchmarks/startup.py --nanogpt PATH [--rounds 7] [--quick]

Needs Tiny Shakespeare in $TINYGPT_DATA_DIR or a network, for nanoGPT. Writes benchmarks/results/startup.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, machine, spread, write_result
from nanogpt_parity import RECIPE, prepare_peer

# Notes in a file when each optimizer step has ended, and the processor seconds of this process until then. It imports
# nothing itself: it waits for the script to have imported torch.
NOTING = """
import os, runpy, sys, time

def note(*_):
    with open({file!r}, "w") as file:
        print(time.monotonic(), sum(os.times()[:2]), file=file)

def register(event, _, waiting=[True]):
    if event == "import" and waiting:
        module = sys.modules.get("torch.optim.optimizer")
        if hasattr(module, "register_optimizer_step_post_hook"):
            waiting.clear()
            module.register_optimizer_step_post_hook(note)

sys.addaudithook(register)
sys.path.insert(0, os.getcwd())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
PROMPT = "the"

Times = dict[str, float]


def first_step(argv: list[str], checkout: Path, folder: Path) -> Times:
    noted = folder / "noted"
    start = time.monotonic()
    command = [sys.executable, "-c", NOTING.format(file=str(noted), argv=argv)]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    end, processor = map(float, noted.read_text().split())
    return {"seconds": end - start, "processor_seconds": processor}


def train_ours(folder: Path, number: int) -> Times:
    argv = ["train.py", "trainer=cpu", "trainer.max_steps=1", f"hydra.run.dir={folder}/run{number}"]
    return first_step(argv, ROOT, folder)


def train_peer(checkout: Path, folder: Path) -> Times:
    argv = ["train.py", "config/train_shakespeare_char.py", *RECIPE, "--max_iters=0", f"--out_dir={folder}/peer"]
    return first_step(argv, checkout, folder)


def until_byte(command: list[str], byte: int) -> Times:
    """Until the process has written that many bytes to stdout."""
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        seen = 0
        while seen < byte and (piece := os.read(process.stdout.fileno(), byte - seen)):
            seen += len(piece)
        seconds = time.monotonic() - start
        assert seen == byte, f"{command} has written {seen} bytes"
    return {"seconds": seconds}


def import_torch() -> Times:
    return until_byte([sys.executable, "-c", "import os, torch; os.write(1, b'.')"], 1)


def sample(folder: Path) -> Times:
    arguments = [f"ckpt={folder}/run0", f"prompt={PROMPT}", "max_new_tokens=1"]
    return until_byte([sys.executable, "sample.py", *arguments], len(PROMPT) + 1)


def compare(rounds: list[dict[str, Times]], ours: str, peer: str) -> dict[str, dict[str, dict[str, float]]]:
    """Both, their difference and their ratio, round by round."""
    return {
        unit: {
            "ours": spread([one[ours][unit] for one in rounds]),
            "peer": spread([one[peer][unit] for one in rounds]),
            "difference": spread([one[ours][unit] - one[peer][unit] for one in rounds]),
            "ratio": spread([one[ours][unit] / one[peer][unit] for one in rounds]),
        }
        for unit in rounds[0][ours]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="three rounds; nothing is written")
    arguments = parser.parse_args()
    checkout = arguments.nanogpt.resolve()
    prepare_peer(checkout)
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(1 + (3 if arguments.quick else arguments.rounds)):
            rounds.append(
                {
                    "train_peer": train_peer(checkout, folder),
                    "train": train_ours(folder, number),
                    "torch": import_torch(),
                    "sample": sample(folder),
                }
            )
    rounds = rounds[1:]  # the first has filled the caches
    result = {
        "rounds": len(rounds),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "first_step": compare(rounds, "train", "train_peer"),
        "first_token": compare(rounds, "sample", "torch"),
    }
    for what, target in (("first_step", 3), ("first_token", 1)):
        for unit, found in result[what].items():
            ours, peer, more, ratio = (found[name]["median"] for name in ("ours", "peer", "difference", "ratio"))
            low, high = found["difference"]["min"], found["difference"]["max"]
            print(
                f"{what:>11} {unit:>17}: ours {ours:5.2f}, peer {peer:5.2f}, ratio {ratio:.2f},"
                f" more {more:.2f} ({low:.2f} to {high:.2f}; target {target})"
            )
    write_result("startup", {**result, **machine()}, quick=arguments.quick)


if __name__ == "__main__":
    main()
