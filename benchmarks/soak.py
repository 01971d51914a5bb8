"""Hours of mixed traffic against one server: does its memory stay flat, and does it go on answering?

Clients of many kinds at once: whole answers and streams, some that leave in the middle, some that send nonsense. Once a
second the server's resident memory is noted; the result is its slope after a warm-up of a tenth of the time, what
was answered, and whether the engine was idle at the end. A server error ends the run.

    python benchmarks/soak.py [--minutes 60] [--clients 6] [--pause 0.3]
"""

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from common import machine, write_result
from server import random_checkpoint, resident_megabytes, serving


class Traffic:
    """Clients that ask until the time is over; `answers` counts statuses."""

    def __init__(self, port: int, until: float, pause: float) -> None:
        self.address, self.until, self.pause = f"http://127.0.0.1:{port}", until, pause
        self.answers: Counter[str] = Counter()

    async def client(self, seed: int) -> None:
        draw = random.Random(seed)
        async with httpx.AsyncClient(base_url=self.address, timeout=120) as client:
            while time.monotonic() < self.until:
                kind = draw.choice((self.whole, self.whole, self.stream, self.leave, self.nonsense))
                self.answers[await kind(client, draw)] += 1
                await asyncio.sleep(draw.uniform(0, 2 * self.pause))

    def body(self, draw: random.Random) -> dict[str, object]:
        prompt = "".join(draw.choice("abcdefghij \n") for _ in range(draw.randrange(1, 2000)))
        return {"model": "custom", "prompt": prompt, "max_tokens": draw.randrange(1, 200), "n": draw.choice((1, 1, 1, 4))}

    async def whole(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        answer = await client.post("/v1/completions", json=self.body(draw) | {"logprobs": 3})
        return self.sound(answer.status_code)

    async def stream(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        async with client.stream("POST", "/v1/completions", json=self.body(draw) | {"stream": True}) as answer:
            async for _ in answer.aiter_lines():
                pass
            return self.sound(answer.status_code)

    async def leave(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        body = self.body(draw) | {"stream": True, "max_tokens": 1000}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
        return "left in the middle"

    async def nonsense(self, client: httpx.AsyncClient, draw: random.Random) -> str:
        junk = draw.choice(
            ('{"model": "custom"', '{"prompt": 3}', '{"model": "no", "prompt": ""}', "x" * draw.randrange(2**21))
        )
        answer = await client.post("/v1/completions", content=junk, headers={"Content-Type": "application/json"})
        return self.sound(answer.status_code)

    def sound(self, status: int) -> str:
        if status >= 500:
            raise SystemExit(f"the server answered {status}")
        return str(status)


async def watch(pid: int, until: float) -> list[tuple[float, float]]:
    """(seconds, megabytes), once a second."""
    seen, start = [], time.monotonic()
    while time.monotonic() < until:
        seen.append((time.monotonic() - start, resident_megabytes(pid)))
        await asyncio.sleep(1)
    return seen


async def soak(port: int, pid: int, minutes: float, clients: int, pause: float) -> dict[str, object]:
    until = time.monotonic() + 60 * minutes
    traffic = Traffic(port, until, pause)
    memory, *_ = await asyncio.gather(watch(pid, until), *[traffic.client(seed) for seed in range(clients)])
    async with httpx.AsyncClient(base_url=traffic.address) as client:
        for _ in range(100):
            metrics = (await client.get("/metrics")).text
            if idle := 'tinygpt_texts_active{model="custom"} 0.0' in metrics:
                break
            await asyncio.sleep(0.1)
    settled = memory[len(memory) // 10 :]
    slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
    return {
        "minutes": minutes,
        "answers": dict(sorted(traffic.answers.items())),
        "megabytes_after_warm_up": settled[0][1],
        "megabytes_at_the_end": settled[-1][1],
        "megabytes_at_most": max(megabytes for _, megabytes in memory),
        "megabytes_per_hour": slope * 3600,
        "idle_at_the_end": idle,
        "memory_each_minute": [round(megabytes, 1) for _, megabytes in memory[::60]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--pause", type=float, default=0.3, help="mean seconds between a client's requests")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "random.ckpt")
        random_checkpoint(checkpoint, "nano", bytes_only=True)
        with serving(f"ckpt={checkpoint}") as (port, pid):
            result = asyncio.run(soak(port, pid, arguments.minutes, arguments.clients, arguments.pause))
    print(result)
    write_result("soak", result | machine())


if __name__ == "__main__":
    main()
