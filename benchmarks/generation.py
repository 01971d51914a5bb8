"""How fast text is written: tinygpt, transformers and nanoGPT with the same random weights of one shape, in turn, in rounds.

On a CPU the yardstick is the limit: the time that reading every weight of the fp32 model once takes. What dtype=bf16 and
dtype=int8 cost is measured on a trained checkpoint (--ckpt; by default Shakespeare's characters, trained here first) by
evaluate.py, and printed beside their speed.

    python benchmarks/generation.py --nanogpt PATH [--quick] [--device cuda] [--rounds 5] [--ckpt RUN]

--quick: two or three minutes on two cores; without nanoGPT's 512 tokens. On CUDA all models are bfloat16.
Greedy, 16 tokens of prompt. Writes benchmarks/results/generation.json (with the device in its name where it is no CPU).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from common import ROOT, machine, spread, write_result
from server import preset

from tinygpt.config import DTYPES
from tinygpt.generate import Sampling, stream_tokens
from tinygpt.model import GPT
from tinygpt.precision import convert, lay_out

PROMPT, VOCAB = 16, 50257
Write = Callable[[int, int], None]  # (texts, new tokens of each)
Cases = dict[str, tuple[Write, int, int]]
Rounds = list[dict[str, float]]


def ours(model: GPT) -> Write:
    def write(batch: int, tokens: int) -> None:
        for token in stream_tokens(model, prompt(batch), tokens, Sampling(temperature=0)):
            token.tolist()  # whoever reads the text waits for each token

    return write


def for_text(model: GPT, dtype: str) -> GPT:
    """What sample.py and serve.py write with."""
    model = convert(model, dtype)
    lay_out(model)
    return model


def transformers(model: GPT, device: str, number: torch.dtype) -> Write:
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    c = model.config
    shape = GPT2Config(vocab_size=VOCAB, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head)
    peer = GPT2LMHeadModel(shape).to(device, number).eval()

    def write(batch: int, tokens: int) -> None:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        peer.generate(prompt(batch).to(device), attention_mask=torch.ones(batch, PROMPT, device=device), **settings)

    return write


def nanogpt(checkout: Path, model: GPT, device: str, number: torch.dtype) -> Write:
    sys.path.insert(0, str(checkout))
    import model as theirs  # nanoGPT's model.py

    c = model.config
    shape = theirs.GPTConfig(c.block_size, VOCAB, c.n_layer, c.n_head, c.n_embd, dropout=0.0, bias=True)
    peer = theirs.GPT(shape).to(device, number).eval()

    def write(batch: int, tokens: int) -> None:
        peer.generate(prompt(batch).to(device), tokens, top_k=1)

    return write


def prompt(batch: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, PROMPT), generator=torch.Generator().manual_seed(0))


def reading(model: GPT) -> Callable[[], float]:
    """Seconds that reading all weights of the products once takes: the best of a few."""
    weights = torch.cat([m.weight.detach().flatten() for m in model.modules() if isinstance(m, torch.nn.Linear)])

    def read() -> float:
        return min(seconds(weights.sum) for _ in range(5))

    return read


def seconds(work: Callable[[], Any]) -> float:
    """Of wall time; with one thread, of processor time, which is the same on a quiet machine."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def measure(cases: Cases, limit: Callable[[], float] | None, rounds: int) -> Rounds:
    """Of each round, the tokens/s (over all texts of a batch) of every case, one after the other."""
    for write, batch, _ in cases.values():
        write(batch, 4)  # warm up
    results = []
    for _ in range(rounds):
        speeds = {"limit": 1 / limit()} if limit else {}
        for name, (write, batch, tokens) in cases.items():
            if limit:  # the machine's speed moves within a round: the limit is the best one around
                speeds["limit"] = max(speeds["limit"], 1 / limit())
            speeds[name] = batch * tokens / seconds(lambda: write(batch, tokens))  # noqa: B023
        results.append(speeds)
    return results


def perplexities(ckpt: str) -> dict[str, float]:
    """By evaluate.py, over the whole validation split."""
    return {
        dtype: json.loads(script("evaluate.py", f"ckpt={ckpt}", f"dtype={dtype}", "device=cpu"))["perplexity"]
        for dtype in DTYPES
    }


def script(*words: str) -> str:
    return subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout


@contextmanager
def trained(ckpt: str | None) -> Iterator[str]:
    """The checkpoint, or a small model trained now."""
    if ckpt:
        yield ckpt
        return
    with tempfile.TemporaryDirectory() as folder:
        script("train.py", "experiment=shakespeare_char_cpu", "trainer.max_steps=500", f"hydra.run.dir={folder}")
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--threads", type=int, help="1 measures processor time: for a machine where others compute too")
    parser.add_argument("--model", default="gpt2_small")
    parser.add_argument("--ckpt", help="a trained checkpoint for the perplexities")
    arguments = parser.parse_args()
    cuda, rounds = arguments.device == "cuda", arguments.rounds or (2 if arguments.quick else 5)

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = GPT(preset(arguments.model), VOCAB).to(arguments.device).eval()
    number = torch.bfloat16 if cuda else torch.float32
    dtypes = ("bf16",) if cuda else DTYPES
    writers = {dtype: ours(for_text(model, dtype)) for dtype in dtypes}
    first = dtypes[0]
    peer = transformers(model, arguments.device, number)
    nano = nanogpt(arguments.nanogpt, model, arguments.device, number) if arguments.nanogpt else None
    limit = None if cuda else reading(model)

    short = {f"tinygpt {dtype}": (writer, 1, 64) for dtype, writer in writers.items()}
    short |= {"transformers": (peer, 1, 64), **({"nanoGPT": (nano, 1, 64)} if nano else {})}
    sizes = (1, 8, 32, *((128,) if cuda else ()))
    batches = {f"{dtype} batch {n}": (writers[dtype], n, 32) for dtype in dtypes if dtype != "int8" for n in sizes}
    long = {f"tinygpt {dtype}": (writer, 1, 512) for dtype, writer in writers.items()} | {"transformers": (peer, 1, 512)}
    if nano and not arguments.quick:
        long |= {"nanoGPT": (nano, 1, 512)}
    with torch.inference_mode():
        runs = {"64 tokens": measure(short, limit, rounds), "batches": measure(batches, None, rounds)}
        if not arguments.quick:
            runs["512 tokens"] = measure(long, limit, max(2, rounds // 2))

    targets = {
        ("64 tokens", f"tinygpt {first}", "transformers"): 10 if cuda else 1.2,
        ("batches", f"{first} batch 8", f"{first} batch 1"): 3,
        ("batches", f"{first} batch 32", f"{first} batch 1"): 7,
        ("512 tokens", f"tinygpt {first}", "transformers"): 10 if cuda else 1.2,
    }
    if nano:
        targets |= {
            ("64 tokens", f"tinygpt {first}", "nanoGPT"): None,
            ("512 tokens", f"tinygpt {first}", "nanoGPT"): 8,
        }
    if not cuda:
        targets |= {
            ("64 tokens", "tinygpt fp32", "limit"): 0.85,
            ("512 tokens", "tinygpt fp32", "limit"): 0.85,
            ("64 tokens", "tinygpt bf16", "transformers"): None,
            ("64 tokens", "tinygpt int8", "transformers"): 2,
            ("512 tokens", "tinygpt bf16", "transformers"): None,
            ("512 tokens", "tinygpt int8", "transformers"): 2,
            ("batches", "bf16 batch 8", "bf16 batch 1"): None,
            ("batches", "bf16 batch 32", "bf16 batch 1"): None,
        }
    comparisons = compare(runs, targets)
    result: dict[str, Any] = {
        "shape": arguments.model,
        "device": arguments.device,
        **({"gpu": torch.cuda.get_device_name()} if cuda else {}),
        "threads": torch.get_num_threads(),
        "prompt_tokens": PROMPT,
        "rounds": rounds,
        "tokens_per_second": {
            part: {name: spread([one[name] for one in many]) for name in many[0]} for part, many in runs.items()
        },
        "comparisons": comparisons,
    }
    if not cuda:
        with trained(arguments.ckpt) as ckpt:
            result["perplexity"] = {"model": "shakespeare_char_cpu", **perplexities(ckpt)}
        for dtype in DTYPES:
            speed = result["tokens_per_second"]["64 tokens"][f"tinygpt {dtype}"]["median"]
            print(
                f"{dtype}: {speed:6.1f} tokens/s (gpt2_small), perplexity {result['perplexity'][dtype]:.4f} (trained model)"
            )
    write_result("generation" + ("_cuda" if cuda else ""), {**result, **machine()}, quick=arguments.quick)


def compare(runs: dict[str, Rounds], targets: dict[tuple[str, str, str], float | None]) -> list[dict[str, Any]]:
    """The ratios of each round, and their table."""
    rows = []
    print(
        f"{'':11} {'ours':15} {'peer':14} {'tokens/s':>9} {'peer':>9} {'ratio':>6} {'spread':>14} {'best':>6} {'target':>7}"
    )
    for (part, us, peer), target in targets.items():
        if part not in runs:
            continue
        ratio = spread([one[us] / one[peer] for one in runs[part]])
        mine, theirs = (spread([one[name] for one in runs[part]])["median"] for name in (us, peer))
        best = max(one[us] for one in runs[part]) / max(one[peer] for one in runs[part])  # where others computed too
        rows.append({"part": part, "ours": us, "peer": peer, "target": target, "ratio": ratio, "best_over_best": best})
        around = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
        speeds = f"{mine:9.1f} {theirs:9.1f} {ratio['median']:6.2f}"
        print(f"{part:11} {us:15} {peer:14} {speeds} {around:>14} {best:6.2f} {target or '':>7}")
    return rows


if __name__ == "__main__":
    main()
