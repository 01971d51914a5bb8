"""Training tokens a second, like for like: the same shape, batch, block and AdamW, against nanoGPT's `train.py`, the Trainer
of transformers and litgpt's pretraining, each as its users run it, on a CPU in float32.

    python benchmarks/throughput.py [--nanogpt PATH] [--litgpt] [--transformers] [--compiled] [--rounds 3] [--quick]

Every program runs as a process of its own, in turn; a hook of torch's own notes the time of each optimizer step, and what
counts is the median of the steps after the first five. Ours runs twice: with its products in float32, as the peers', and
with `matmul_precision=fastest` (bfloat16 products where the CPU has units for them). litgpt compiles its model, which takes
minutes before the first step and is not counted. --compiled takes our own `compile=true` for a peer, its compiling not
counted either. --litgpt and --transformers need those packages installed (litgpt may be on PYTHONPATH). Writes
benchmarks/results/throughput.json, but for --quick.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from common import ROOT, machine, spread, write_result
from nanogpt_parity import RECIPE, prepare_peer

SKIPPED = 5
# Around a script: times of the optimizer steps into a file, and an end after the last that is asked for.
TIMING = """
import atexit, json, os, runpy, sys, time
times, wanted, unmeasured = [], {steps}, []

def note(*_):
    if unmeasured:
        return
    times.append(time.perf_counter())
    if len(times) == wanted:
        with open({file!r}, "w") as file:
            json.dump(times, file)
        os._exit(0)

def start():
    from torch.optim.optimizer import register_optimizer_step_post_hook
    register_optimizer_step_post_hook(note)

{code}
"""
SCRIPT = """
start()
sys.path.insert(0, os.getcwd())
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
OURS = """
from tinygpt.forecast import Probe
measured = Probe.step_seconds  # the forecast's own steps do not count
def step_seconds(*arguments):
    unmeasured.append(True)
    seconds = measured(*arguments)
    unmeasured.clear()
    return seconds
Probe.step_seconds = step_seconds
"""
TRANSFORMERS = """
start()
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
shape, B = {shape!r}, {batch}
T = shape["block_size"]
config = GPT2Config(
    vocab_size=shape["vocab_size"], n_positions=T, n_embd=shape["n_embd"], n_layer=shape["n_layer"],
    n_head=shape["n_head"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
)
class Windows(torch.utils.data.Dataset):
    def __len__(self): return 10000 * B
    def __getitem__(self, i):
        ids = torch.randint(shape["vocab_size"], (T,), generator=torch.Generator().manual_seed(i))
        return dict(input_ids=ids, labels=ids)
arguments = TrainingArguments(
    output_dir={folder!r}, use_cpu=True, per_device_train_batch_size=B, max_steps=wanted + 1, report_to=[],
    learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, logging_strategy="no", save_strategy="no",
    optim="adamw_torch_fused", disable_tqdm=True,
)
Trainer(model=GPT2LMHeadModel(config), args=arguments, train_dataset=Windows()).train()
"""
LITGPT = """
start()
from pathlib import Path
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.pretrain import setup
shape, B = {shape!r}, {batch}
T = shape["block_size"]
config = Config(
    name="like", block_size=T, vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"],
    n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], bias=shape.get("bias", False),
    rotary_percentage=0.0, parallel_residual=False, norm_class_name="LayerNorm", mlp_class_name="GptNeoxMLP",
)
class Windows(torch.utils.data.Dataset):
    def __len__(self): return 10000 * B
    def __getitem__(self, i):
        return torch.randint(shape["vocab_size"], (T + 1,), generator=torch.Generator().manual_seed(i))
class Data(DataModule):
    def connect(self, tokenizer=None, batch_size=1, max_seq_length=None): self.batch_size = batch_size
    def setup(self, stage=""): pass
    def train_dataloader(self): return torch.utils.data.DataLoader(Windows(), batch_size=self.batch_size)
    def val_dataloader(self): return torch.utils.data.DataLoader(torch.utils.data.Subset(Windows(), range(B)), batch_size=B)
setup(
    "like", model_config=config, out_dir=Path({folder!r}), precision="32-true", data=Data(), devices=1,
    train=TrainArgs(
        max_tokens=1000 * B * T, global_batch_size=B, micro_batch_size=B, log_interval=10**6, save_interval=None,
        lr_warmup_steps=10, max_norm=1.0, tie_embeddings=True,
    ),
    eval=EvalArgs(interval=10**6, initial_validation=False, final_validation=False), logger_name="csv",
)
"""
SHAPES = {
    "nano": {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "vocab_size": 65},
    "mini": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "gpt2_small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 128, "vocab_size": 50257, "bias": True},
}
BATCH = {"nano": 12, "mini": 4, "gpt2_small": 4}
COMPILED = "compile=true"
STEPS = {"nano": 250, "mini": 25, "gpt2_small": 13}


def tokens_per_second(code: str, model: str, cwd: Path, folder: Path) -> float:
    file = folder / "times.json"
    file.unlink(missing_ok=True)
    program = TIMING.format(steps=STEPS[model], file=str(file), code=code)
    done = subprocess.run([sys.executable, "-c", program], cwd=cwd, capture_output=True, text=True)
    if not file.exists():
        raise RuntimeError(done.stderr[-2000:])
    times = json.loads(file.read_text())[SKIPPED:]
    seconds = statistics.median(later - earlier for earlier, later in pairwise(times))
    return BATCH[model] * SHAPES[model]["block_size"] / seconds


def ours(model: str, folder: Path, *overrides: str) -> float:
    data = "shakespeare_char" if model != "gpt2_small" else "shakespeare"
    argv = [
        *("train.py", f"model={model}", f"data={data}", "trainer=cpu", f"data.global_batch_size={BATCH[model]}"),
        *(f"data.micro_batch_size={BATCH[model]}", f"model.block_size={SHAPES[model]['block_size']}", "model.dropout=0"),
        *("trainer.max_steps=2000", "trainer.val_check_interval=2000", "data.val_tokens=2000", "callbacks=none"),
        *(f"hydra.run.dir={folder}/run", *overrides),
    ]
    return tokens_per_second(OURS + SCRIPT.format(argv=argv), model, ROOT, folder)


def nanogpt(checkout: Path, folder: Path) -> float:
    argv = ["train.py", "config/train_shakespeare_char.py", *RECIPE, "--eval_interval=100000", f"--out_dir={folder}/peer"]
    return tokens_per_second(SCRIPT.format(argv=argv), "nano", checkout, folder)


def with_model(code: str, model: str, folder: Path) -> float:
    return tokens_per_second(
        code.format(shape=SHAPES[model], batch=BATCH[model], folder=f"{folder}/peer"), model, folder, folder
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--litgpt", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round, without gpt2_small; nothing is written")
    arguments = parser.parse_args()
    contests = []  # (peer, model, how it is measured)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.nanogpt:
            checkout = arguments.nanogpt.resolve()
            prepare_peer(checkout)
            contests.append(("nanogpt", "nano", lambda: nanogpt(checkout, folder)))
        for peer, wanted, code in (
            ("transformers", arguments.transformers, TRANSFORMERS),
            ("litgpt", arguments.litgpt, LITGPT),
        ):
            sizes = ("mini",) if arguments.quick else ("mini", "gpt2_small")
            for model in sizes if wanted else ():
                contests.append((peer, model, lambda code=code, model=model: with_model(code, model, folder)))
        for model in SHAPES if arguments.compiled else ():
            contests.append((COMPILED, model, lambda model=model: ours(model, folder, "compile=true")))
        rounds = []
        for number in range(1 if arguments.quick else arguments.rounds):
            for peer, model, measure in contests:
                row = {
                    "round": number,
                    "peer": peer,
                    "model": model,
                    "peer_tokens_per_second": measure(),
                    "ours_float32": ours(model, folder),
                }
                if peer != COMPILED:
                    row["ours_fastest"] = ours(model, folder, "matmul_precision=fastest")
                rounds.append(row)
                print(json.dumps(row), flush=True)
    ratios = {
        f"{peer} {model} {name}": spread(
            [
                row[f"ours_{name}"] / row["peer_tokens_per_second"]
                for row in rounds
                if (row["peer"], row["model"]) == (peer, model)
            ]
        )
        for peer, model in dict.fromkeys((row["peer"], row["model"]) for row in rounds)
        for name in (("float32",) if peer == COMPILED else ("float32", "fastest"))
    }
    print(json.dumps(ratios, indent=1))
    write_result(
        "throughput",
        {**machine(), "batch": BATCH, "shapes": SHAPES, "ratio": ratios, "rounds": rounds},
        quick=arguments.quick,
    )


if __name__ == "__main__":
    main()
