"""prepare.py against plain tiktoken, in turn: how much faster a text becomes GPT-2's tokens, and in how much memory.

The text is real (books, Wikipedia) and tiled. The peer is one thread of `tiktoken.encode_ordinary` on the whole text in
memory, and nothing else; ours is all of prepare(): reading the file, hashing, encoding on every core, shards on disk.
Where others compute beside it, the ratio of processor time tells more: it leaves out what a second core adds.
Targets: 1.5 times plain tiktoken on two cores; 100 MB/s of characters; 2 GB of text in less than 1 GB of memory.

    python benchmarks/prepare.py [--quick] [--megabytes 96] [--rounds 5] [--large 2000]
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tiktoken
from common import ROOT, machine, spread, write_result
from server import resident_megabytes

from tinygpt.config import DataConfig, TokenizerConfig
from tinygpt.corpus import data_dir, gpt2_merges
from tinygpt.shards import prepare
from tinygpt.writer import cores

TEXTS = ("books/*.txt", "wikitext2/*.raw", "enwik/*.txt")
SHAKESPEARE = ("tinyshakespeare/input.txt",)


def tiled(patterns: tuple[str, ...], megabytes: float) -> str:
    """The real texts one after the other, as often as it takes."""
    paths = [path for pattern in patterns for path in sorted(data_dir(None).glob(pattern))]
    if not paths:
        sys.exit(f"no {' or '.join(patterns)} in {data_dir(None).absolute()}: set TINYGPT_DATA_DIR")
    text = "".join(path.read_text(encoding="utf-8") for path in paths)
    return text * max(1, round(megabytes * 1e6 / len(text.encode())))


def prepared_in(path: Path, kind: str, cache: Path) -> tuple[float, int]:
    """Seconds that prepare() takes, and the tokens that it makes."""
    start = time.perf_counter()
    data = DataConfig(corpus="text", path=str(path), val_fraction=1e-9, tokenizer=TokenizerConfig(kind))
    tokens = prepare(data, data_dir(None), cache).tokens("all")
    return time.perf_counter() - start, len(tokens)


def against_tiktoken(text: str, rounds: int, folder: Path) -> dict[str, Any]:
    path, megabytes = folder / "text.txt", len(text.encode()) / 1e6
    path.write_text(text, encoding="utf-8", newline="")
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(gpt2_merges(data_dir(None)).parent))
    plain = tiktoken.get_encoding("gpt2")
    ours, theirs, work = [], [], []
    for turn in range(rounds):
        start, busy = time.perf_counter(), time.process_time()
        expected = len(plain.encode_ordinary(text))
        theirs.append(time.perf_counter() - start)
        busy, before = time.process_time(), time.process_time() - busy
        seconds, found = prepared_in(path, "gpt2", folder / f"gpt2-{turn}")
        ours.append(seconds)
        work.append(before / (time.process_time() - busy))
        assert abs(found - expected) <= 9, "the last character alone is cut from the others"
    return {
        "megabytes": megabytes,
        "ratio": spread([b / a for a, b in zip(ours, theirs, strict=True)]),
        "ratio_of_processor_time": spread(work),
        "tinygpt_megabytes_per_second": spread([megabytes / seconds for seconds in ours]),
        "tiktoken_megabytes_per_second": spread([megabytes / seconds for seconds in theirs]),
    }


def characters(text: str, rounds: int, folder: Path) -> dict[str, Any]:
    path, megabytes = folder / "text.txt", len(text.encode()) / 1e6
    folder.mkdir()
    path.write_text(text, encoding="utf-8", newline="")
    seconds = [prepared_in(path, "char", folder / f"char-{turn}")[0] for turn in range(rounds)]
    return {"megabytes": megabytes, "megabytes_per_second": spread([megabytes / second for second in seconds])}


def large(text: str, megabytes: float, kind: str, folder: Path) -> dict[str, Any]:
    """One file of this size through the script, which is one process."""
    path, data = folder / "large.txt", text.encode()
    copies = round(megabytes * 1e6 / len(data))
    with path.open("wb") as file:
        for _ in range(copies):
            file.write(data)
    command = [sys.executable, str(ROOT / "prepare.py"), "data=text", f"data.path={path}", f"data/tokenizer={kind}"]
    start, peak = time.perf_counter(), 0.0
    process = subprocess.Popen([*command, f"cache_dir={folder}/large", f"data_dir={data_dir(None).absolute()}"])
    while process.poll() is None:
        with contextlib.suppress(OSError, StopIteration):  # it has just ended
            peak = max(peak, resident_megabytes(process.pid))  # rusage would count what this process had before the fork
            assert not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(), "its children count too"
        time.sleep(0.02)
    if process.returncode:
        sys.exit("prepare.py failed")
    seconds = time.perf_counter() - start
    size = path.stat().st_size / 1e6
    path.unlink()
    return {"tokenizer": kind, "megabytes": size, "peak_memory_megabytes": peak, "megabytes_per_second": size / seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less than a minute; no result is written")
    parser.add_argument("--megabytes", type=float, default=96, help="of text in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", type=float, default=2000, help="megabytes of the text whose memory is measured")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.megabytes, arguments.rounds, arguments.large = 24, 3, 100
    load = os.getloadavg()[0]  # what others compute on this machine takes from ours and the peer's
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = tiled(TEXTS, arguments.megabytes)
        bpe = against_tiktoken(text, arguments.rounds, folder)
        wide = characters(text, arguments.rounds, folder / "wide")
        ascii = characters(tiled(SHAKESPEARE, arguments.megabytes), arguments.rounds, folder / "ascii")
        big = large(tiled(TEXTS, 0), arguments.large, "gpt2", folder)
    result = {
        "rounds": arguments.rounds,
        "threads": cores(),
        "load_before": load,
        "gpt2": bpe,
        "char": wide,
        "char_ascii": ascii,
        "large": big,
        "tiktoken": version("tiktoken"),
        **machine(),
    }
    ratio, speed, plain = bpe["ratio"], bpe["tinygpt_megabytes_per_second"], bpe["tiktoken_megabytes_per_second"]
    print(
        f"GPT-2's tokens: {ratio['median']:.2f} times plain tiktoken ({ratio['min']:.2f} to {ratio['max']:.2f}), "
        f"{speed['median']:.1f} against {plain['median']:.1f} MB/s, on {cores()} cores; "
        f"of processor time {bpe['ratio_of_processor_time']['median']:.2f} times less"
    )
    for what, measured in (("characters", wide), ("characters, ASCII alone", ascii)):
        rate = measured["megabytes_per_second"]
        print(f"{what}: {rate['median']:.0f} MB/s ({rate['min']:.0f} to {rate['max']:.0f})")
    print(f"{big['megabytes']:,.0f} MB of text: {big['peak_memory_megabytes']:.0f} MB of memory")
    write_result("prepare", result, quick=arguments.quick)


if __name__ == "__main__":
    main()
