"""All comparisons that need no GPU, one after the other, and one table of all results: target, ours, peer, ratio, spread.

    python benchmarks/bench.py --nanogpt PATH [--quick]        or: make bench-quick NANOGPT=PATH, make bench NANOGPT=PATH

--quick: fewer rounds, under ten minutes, nothing kept; else about an hour, into benchmarks/results. transformers comes with
the [dev] extra, but training with it needs `accelerate` too; that and litgpt are measured where they can be imported. A
script that fails is named, and the others go on.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import ELSEWHERE, RESULTS, ROOT

Row = tuple[str, str, str, str, str, str]  # what, target, ours, peer, ratio, its spread


def ratio_row(what: str, target: str, ours: str, peer: str, ratio: dict[str, float]) -> Row:
    return what, target, ours, peer, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} to {ratio['max']:.2f}"


def race(found: dict[str, Any]) -> Iterator[Row]:
    seconds, loss = found["seconds"], found["val_loss"]
    ours, peer = (f"{seconds[name]['mean']:.1f} s" for name in ("ours", "nanogpt"))
    yield ratio_row("nanoGPT's CPU recipe, whole process", "4", ours, peer, found["ratio"])
    ours, peer = (f"{loss[name]['mean']:.4f}" for name in ("ours", "nanogpt"))
    yield "its loss, full split", "1.898 or less", ours, peer, "", f"{loss['ours']['min']:.4f} to {loss['ours']['max']:.4f}"


def quality(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        loss, seconds = row["val_loss"], row["seconds"]["mean"]
        around = "one seed" if len(found["seeds"]) == 1 else f"{loss['min']:.4f} to {loss['max']:.4f}"
        yield (
            f"loss of {row['experiment']}",
            f"{row['target']:.2f} or less in {row['limit']} s",
            f"{loss['mean']:.4f}, {seconds:.0f} s",
            "",
            "",
            around,
        )


def throughput(found: dict[str, Any]) -> Iterator[Row]:
    for what, ratio in found["ratio"].items():
        peer, model, name = what.split()
        rows = [row for row in found["rounds"] if (row["peer"], row["model"]) == (peer, model)]
        ours, theirs = (
            f"{sum(row[key] for row in rows) / len(rows):.0f} tok/s" for key in (f"ours_{name}", "peer_tokens_per_second")
        )
        target = {"nanogpt": "1.25", "transformers": "1.3", "litgpt": "1.3"}.get(peer, "")
        yield ratio_row(f"training {model}, {name}, {peer}", target, ours, theirs, ratio)


def generation(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["comparisons"]:
        what = f"{'' if found['device'] == 'cpu' else 'GPU, '}generation, {row['part']}: {row['ours']}"
        speeds = found["tokens_per_second"][row["part"]]
        ours, peer = (f"{speeds[row[name]]['median']:.1f} tok/s" for name in ("ours", "peer"))
        yield ratio_row(what, str(row["target"] or ""), ours, f"{row['peer']} {peer}", row["ratio"])


def preparation(found: dict[str, Any]) -> Iterator[Row]:
    gpt2 = found["gpt2"]
    ours, peer = (f"{gpt2[f'{name}_megabytes_per_second']['median']:.0f} MB/s" for name in ("tinygpt", "tiktoken"))
    yield ratio_row("prepare.py, GPT-2 BPE", "1.5", ours, f"tiktoken {peer}", gpt2["ratio"])
    for name in ("char", "char_ascii"):
        speed = found[name]["megabytes_per_second"]
        around = f"{speed['min']:.0f} to {speed['max']:.0f}"
        yield f"prepare.py, {name}", "100 MB/s", f"{speed['median']:.0f} MB/s", "", "", around
    big = found["large"]
    what, peak = f"prepare.py, memory for {big['megabytes'] / 1000:.1f} GB of text", big["peak_memory_megabytes"]
    yield what, "less than 1000 MB", f"{peak:.0f} MB", "", "", "one run"


def gpu(found: dict[str, Any]) -> Iterator[Row]:
    for row in found.get("speed", []):
        if "ratio" in row:
            ours, peer = (f"{row[name]['tokens_per_second']:.0f} tok/s" for name in ("ours", "nanogpt"))
            what = f"GPU, training gpt2_small, micro-batch {row['micro_batch']}, MFU {row['ours']['mfu']:.0%}, nanogpt"
            yield what, "1.3, MFU 55%", ours, peer, f"{row['ratio']:.2f}", "one run"
    if loss := found.get("loss", {}).get("val_loss"):
        ours = f"{loss['mean']:.4f}, {found['loss']['seconds']['mean']:.0f} s"
        done = sum(run["compile"] and not run["failed"] for run in found["loss"]["runs"])
        around = "one seed" if done == 1 else f"{loss['min']:.4f} to {loss['max']:.4f}, {done} seeds"
        yield "GPU, loss of shakespeare_char_fast", "1.45 or less in 30 s", ours, "", "", around


def startup(found: dict[str, Any]) -> Iterator[Row]:
    for name, what, limit in (("first_step", "train.py", 3), ("first_token", "sample.py", 1)):
        row = found[name]["seconds"]
        ours, peer, more = (row[key]["median"] for key in ("ours", "peer", "difference"))
        around = f"{row['difference']['min']:.2f} to {row['difference']['max']:.2f} s"
        what = f"{what} to its {name.replace('_', ' ')}"
        yield what, f"{limit} s more", f"{ours:.2f} s", f"{peer:.2f} s", f"{more:+.2f} s", around


TABLE = {
    "race": race,
    "quality": quality,
    "throughput": throughput,
    "generation": generation,
    "prepare": preparation,
    "startup": startup,
    "gpu": gpu,
    "generation_cuda": generation,
}


def commands(nanogpt: str, quick: bool) -> Iterator[list[str]]:
    peer, short = ["--nanogpt", nanogpt], ["--quick"] if quick else []
    yield ["startup.py", *peer, *short]
    yield ["race.py", *peer, *short]
    yield ["quality.py", *short]
    transformers = ["--transformers"] if find_spec("accelerate") else []
    litgpt = ["--litgpt"] if find_spec("litgpt") and not quick else []
    whole = [] if quick else ["--compiled", "--rounds", "2"]  # a third would take the hour
    yield ["throughput.py", *peer, *transformers, *litgpt, *whole, *short]
    yield ["generation.py", *peer, *short]
    yield ["prepare.py", *short]


HEAD: Row = ("", "target", "ours", "peer", "ratio", "spread")


def rows_of(folder: Path) -> list[Row]:
    """A line for each comparison whose result is in the folder."""
    rows: list[Row] = []
    for name, extract in TABLE.items():
        if (folder / f"{name}.json").exists():
            rows += extract(json.loads((folder / f"{name}.json").read_text()))
    return rows


def show(folder: Path) -> None:
    rows = [HEAD, *rows_of(folder)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--show", action="store_true", help="only the table of the committed results")
    arguments = parser.parse_args()
    if arguments.show:
        show(RESULTS)
        return
    failed = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if arguments.quick else RESULTS
        for script, *words in commands(str(Path(arguments.nanogpt).resolve()), arguments.quick):
            print(f"-- {script}", file=sys.stderr, flush=True)
            command = [sys.executable, str(ROOT / "benchmarks" / script), *words]
            done = subprocess.run(command, env={**os.environ, ELSEWHERE: str(folder)}, stdout=sys.stderr)
            failed += [script] if done.returncode else []
        show(folder)
    if failed:
        sys.exit(f"error: these failed, see above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
