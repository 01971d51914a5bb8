"""What each choice of `experiment=shakespeare_char_cpu_fast` is worth: the recipe with one of them undone, seed by seed.

    python benchmarks/ablation.py [--seeds 1 2]

The validation loss is over the whole split; the seconds are those of the run. Writes benchmarks/results/ablation.json.
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import machine, spread, write_result
from nanogpt_parity import train_ours

EXPERIMENT = "shakespeare_char_cpu_fast"
VARIANTS: dict[str, list[str]] = {
    "the recipe": [],
    "AdamW for the matrices too (lr 3e-3, betas 0.9 0.99)": [
        "optimizer=adamw",
        "optimizer.lr=3e-3",
        "optimizer.betas=[0.9,0.99]",
    ],
    "Muon's momentum 0.95": ["optimizer.muon_momentum=0.95"],
    "half the learning rates": ["optimizer.lr=2e-2", "optimizer.muon_lr=0.03"],
    "betas 0.9 0.99": ["optimizer.betas=[0.9,0.99]"],
    "learning rate by half a cosine": ["optimizer.schedule=cosine"],
    "four layers of 128": ["model.n_layer=4", "model.n_embd=128"],
    "one layer of 248": ["model.n_layer=1", "model.n_embd=248"],
    "eight heads": ["model.n_head=8"],
    "learned positions": ["model.position=learned"],
    "GELU": ["model.mlp=gelu"],
    "no norm of queries and keys": ["model.qk_norm=false"],
    "RMSNorm": ["model.norm=rmsnorm"],
    "a tied head": ["model.tie_embeddings=true"],
    "no softcap": ["model.logit_softcap=null"],
    "projections not zero at first (init=gpt2)": ["model.init=gpt2"],
    "24 sequences, half the steps": ["data.global_batch_size=24", "trainer.max_steps=140", "trainer.val_check_interval=140"],
    "products in float32": ["matmul_precision=high"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for number, (what, overrides) in enumerate(VARIANTS.items()):
            folder = Path(name) / str(number)
            runs = [train_ours(seed, folder, EXPERIMENT, overrides) for seed in arguments.seeds]
            row = {
                "what": what,
                "overrides": overrides,
                "val_loss": spread([run["val_loss"] for run in runs]),
                "seconds": spread([run["seconds"] for run in runs]),
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    write_result("ablation", {**machine(), "experiment": EXPERIMENT, "seeds": arguments.seeds, "rows": rows})


if __name__ == "__main__":
    main()
