"""A bare PyTorch loop over our model and our batches: the peer of overhead.py. Prints one JSON object."""

import argparse
import json
import resource
import sys
import time

import torch

from tinygpt.batches import BatchOrder
from tinygpt.config import DataConfig, ModelConfig, OptimizerConfig
from tinygpt.corpus import cache_dir, data_dir
from tinygpt.model import GPT
from tinygpt.optim import learning_rate, make_optimizer
from tinygpt.shards import prepare

WARM_UP = 10  # steps that do not count: the run that this is compared with has validated before its first step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    prepared = prepare(DataConfig(), data_dir(None), cache_dir(None))
    torch.manual_seed(1337)
    model, config = GPT(ModelConfig(), prepared.tokenizer.vocab_size), OptimizerConfig()
    optimizer = make_optimizer(model, config)
    order = BatchOrder(len(prepared.train), 64, 12, 1337)
    for step in range(-WARM_UP, steps):
        if step == 0:
            start = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(max(0, step), steps, config)
        batch = torch.from_numpy(prepared.train.windows(order.starts(max(0, step)), 65))
        logits = model(batch[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"step_seconds": seconds / steps, "peak_bytes": peak, "loss": float(loss)}))


if __name__ == "__main__":
    main()
