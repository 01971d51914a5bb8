"""How the server shares batches: total tokens/s of many clients at once over one client alone, at gpt2_small on a CPU.

One server, clients over HTTP, in turn: one client, then all at once, several rounds. Every answer is streamed, so that the
time to the first token of each client is seen: nobody waits for another to finish. Target: 32 clients get at least five
times the tokens/s of one.

    python benchmarks/serving.py [--clients 1 4 8 32] [--rounds 3] [--tokens 128] [--model gpt2_small]
"""

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

import httpx
from common import machine, spread, write_result
from server import random_checkpoint, serving

PROMPT = "Before we proceed any further, hear me speak. All: Speak, speak. First Citizen:"


async def ask(client: httpx.AsyncClient, tokens: int, seed: int) -> tuple[float, float]:
    """Seconds to the first and to the last token."""
    start, first = time.perf_counter(), 0.0
    body = {"model": "custom", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0.8, "top_k": 50, "seed": seed}
    # No end-of-text: every answer has as many tokens.
    body |= {"stream": True, "logit_bias": {"50256": -100}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line and not first:
                first = time.perf_counter() - start
    return first, time.perf_counter() - start


async def together(port: int, clients: int, tokens: int) -> dict[str, float]:
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None, limits=limits) as client:
        start = time.perf_counter()
        times = await asyncio.gather(*[ask(client, tokens, seed) for seed in range(clients)])
        seconds = time.perf_counter() - start
    return {
        "tokens_per_second": clients * tokens / seconds,
        "worst_first_token_seconds": max(first for first, _ in times),
        "first_to_finish_seconds": min(last for _, last in times),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--model", default="gpt2_small")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "random.ckpt")
        random_checkpoint(checkpoint, arguments.model)
        with serving(f"ckpt={checkpoint}") as (port, _):
            asyncio.run(together(port, 2, 8))  # warm up
            rounds = [
                {clients: asyncio.run(together(port, clients, arguments.tokens)) for clients in arguments.clients}
                for _ in range(arguments.rounds)
            ]
    alone = arguments.clients[0]
    result = {
        "model": arguments.model,
        "new_tokens": arguments.tokens,
        "rounds": arguments.rounds,
        "clients": {
            str(clients): {
                "ratio_to_one_client": spread(
                    [one[clients]["tokens_per_second"] / one[alone]["tokens_per_second"] for one in rounds]
                ),
                **{name: spread([one[clients][name] for one in rounds]) for name in rounds[0][clients]},
            }
            for clients in arguments.clients
        },
        **machine(),
    }
    for clients, figures in result["clients"].items():
        speed, ratio = figures["tokens_per_second"]["mean"], figures["ratio_to_one_client"]
        print(
            f"{clients:>3} clients: {speed:7.1f} tokens/s, {ratio['mean']:.2f} times one"
            f" ({ratio['min']:.2f} to {ratio['max']:.2f})"
        )
    write_result("serving", result)


if __name__ == "__main__":
    main()
