"""What was measured, as Markdown: from benchmarks/results, which the scripts in benchmarks/ write, and conf/experiment."""

import csv
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SAMPLED = "shakespeare_char_cpu/seed-1"
MEASURED = ("nanogpt_parity", "overhead", "serving", "soak", "startup")


sys.path.append(str(RESULTS.parent))
import bench  # noqa: E402


def speed() -> str:
    """Every comparison with a peer, and where each was measured."""
    found = [name for name in bench.TABLE if (RESULTS / f"{name}.json").exists()]
    places = "\n".join(f"- `{name.removesuffix('_cuda')}.py`: {place(read(name))}" for name in found)
    return f"{table(('what', *bench.HEAD[1:]), bench.rows_of(RESULTS))}\n\n{places}"


def ablation() -> str:
    """What each choice of the fast recipe is worth."""
    if not (RESULTS / "ablation.json").exists():
        return "Not measured yet; `benchmarks/ablation.py` does it."
    found = read("ablation")
    seeds, spans = found["seeds"], read("race")["val_loss"]["ours"]
    one = f"validation loss, seed {seeds[0]}"
    head = ("", one if len(seeds) == 1 else f"validation loss, mean over seeds {', '.join(map(str, seeds))}")
    rows = [(row["what"], several(row["val_loss"], len(seeds), 3)) for row in found["rows"]]
    chance = (
        f"The recipe's own seeds lie between {spans['min']:.3f} and {spans['max']:.3f} (`race.py`): a difference of that "
        "size may be chance."
    )
    return f"{table(head, rows)}\n\n{chance}\n\n{place(found)}"


def reliability() -> str:
    """How many trials of each kind were survived."""
    if not (RESULTS / "reliability.json").exists():
        return "Not measured yet; `benchmarks/reliability.py` does it."
    found = read("reliability")
    rows = []
    for kind, row in found["kinds"].items():
        how = ", ".join(f"{count} {what}" for what, count in row["how"].items())
        rows.append((kind, str(row["trials"]), str(row["survived"]), str(len(row["lost"])), how))
    text = table(("kind", "trials", "survived", "lost", "how it went"), rows)
    return f"By `benchmarks/reliability.py`, which says what each kind is:\n\n{text}\n\n{place(found)}"


def overfit() -> str:
    """The losses of GPT-2 on a small text, validation by validation."""
    if not (RESULTS / "overfit.json").exists():
        return "Not measured yet; `benchmarks/overfit.py` does it."
    found = read("overfit")
    rows = [
        (
            f"{row['epoch']:.1f}",
            str(row["step"]),
            "" if row["train_loss"] is None else f"{row['train_loss']:.2f}",
            f"**{row['val_loss']:.4f}**" if row["step"] == found["best_step"] else f"{row['val_loss']:.4f}",
            f"{row['val_accuracy']:.1%}",
        )
        for row in found["rows"]
    ]
    head = ("epoch", "step", "loss of the step's batch", "validation loss", "validation accuracy")
    how = (
        f"Seed {found['seed']}, {found['tokens']:,} tokens in {found['seconds'] / 60:.0f} minutes with "
        f"`{found['settings'][1]}`. `benchmarks/overfit.py`, on {place(found)}."
    )
    return f"![Losses of the run](figures/overfit.png)\n\n{table(head, rows)}\n\n{how}"


def overfit_loss() -> str:
    if not (RESULTS / "overfit.json").exists():
        return "not measured yet"
    found = read("overfit")
    best, step, last = found["best_val_loss"], found["best_step"], found["val_loss"]
    return (
        f"validation loss {best:.4f} at step {step}, {last:.4f} at the end: [the overfit](weights.md#gpt-2-on-shakespeare)"
    )


def read(name: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return result


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a | inside a cell would end it."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def ranged(spread: dict[str, float], digits: int, middle: str = "mean") -> str:
    """Mean, or median, and range in brackets."""
    value, low, high = (f"{spread[name]:.{digits}f}" for name in (middle, "min", "max"))
    return f"{value} ({low} to {high})"


def several(spread: dict[str, float], seeds: int, digits: int) -> str:
    """As `ranged`; of one seed there is no range."""
    return ranged(spread, digits) if seeds > 1 else f"{spread['mean']:.{digits}f}"


def measured() -> str:
    """Every benchmark that compares us with a peer, or with our own forecast."""
    parity, overhead, crowd, soak, startup = (read(name) for name in MEASURED)
    seeds = ", ".join(str(row["seed"]) for row in parity["rows"])
    by_parity, by_overhead = "`nanogpt_parity.py`", "`overhead.py`"
    extra = overhead["extra_megabytes"]
    rows = [
        (
            f"`experiment=shakespeare_char_cpu`, full-split validation loss, seeds {seeds}",
            ranged(parity["tinygpt"], 4),
            by_parity,
        ),
        (
            "nanoGPT's own CPU recipe, its final checkpoints on the same full split",
            ranged(parity["nanogpt"], 4),
            by_parity,
        ),
        ("seconds per step of `train.py` over a bare PyTorch loop, nano", ranged(overhead["time_ratio"], 2), by_overhead),
        (
            "peak memory above the bare loop's",
            f"{extra['mean']:.0f} MB ({extra['min']:.0f} to {extra['max']:.0f})",
            by_overhead,
        ),
        (
            f"forecast over measured time, {overhead['steps']} steps",
            ranged(overhead["forecast_over_measured_time"], 2),
            by_overhead,
        ),
        ("forecast over measured memory", ranged(overhead["forecast_over_measured_memory"], 2), by_overhead),
        (
            "`train.py` to its first optimizer step, nano: seconds more than nanoGPT's `train.py`",
            ranged(startup["first_step"]["seconds"]["difference"], 1),
            "`startup.py`",
        ),
        (
            "`sample.py` to its first token: seconds more than `import torch`",
            ranged(startup["first_token"]["seconds"]["difference"], 2),
            "`startup.py`",
        ),
        (
            "tokens/s of 32 clients of the server over one client, gpt2_small",
            ranged(crowd["clients"]["32"]["ratio_to_one_client"], 1),
            "`serving.py`",
        ),
        (
            f"the server's memory, {soak['minutes']:.0f} minutes of mixed traffic: after a tenth of them, and at the end",
            f"{soak['megabytes_after_warm_up']:.0f} MB, {soak['megabytes_at_the_end']:.0f} MB",
            "`soak.py`",
        ),
    ]
    return table(("what", "measured", "script"), rows)


def measured_on() -> str:
    """The machines behind `measured`."""
    return "\n".join(f"- `{name}.json`: {place(read(name))}" for name in MEASURED)


def place(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    machine, versions = result["machine"], result["versions"]
    names = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "lightning"))
    gpu = f", {result['gpu']}" if "gpu" in result else ""
    return f"{machine['processor']}, {machine['cores']} cores{gpu}, {machine['system']}; {names}; {result['date']}"


def serving() -> str:
    """What many clients at once get from one server."""
    if not (RESULTS / "serving.json").exists():
        return "Not measured yet; `benchmarks/serving.py` does it."
    result = read("serving")
    rows = [
        (
            clients,
            ranged(one["tokens_per_second"], 0),
            ranged(one["ratio_to_one_client"], 1),
            ranged(one["worst_first_token_seconds"], 1),
        )
        for clients, one in result["clients"].items()
    ]
    head = ("clients", "tokens/s in all", "over one client", "slowest first token, s")
    how = f"`{result['model']}`, {result['new_tokens']} new tokens each, {result['rounds']} rounds; mean, and range"
    return f"{table(head, rows)}\n\n{how} in brackets. `benchmarks/serving.py`, on {place(result)}."


def generation() -> str:
    """How fast text is written, against peers and the machine's limit, and what smaller numbers cost."""
    if not (RESULTS / "generation.json").exists():
        return "Not measured yet; `benchmarks/generation.py` does it."
    result = read("generation")
    rows = [
        (
            row["part"],
            row["ours"],
            row["peer"],
            f"{row['ratio']['median']:.2f} ({row['ratio']['min']:.2f} to {row['ratio']['max']:.2f})",
            f"{row['target']}" if row["target"] else "",
        )
        for row in result["comparisons"]
    ]
    speeds, exact = result["tokens_per_second"]["64 tokens"], result["perplexity"]["fp32"]
    costs = [
        (
            f"`{dtype}`",
            ranged(speeds[f"tinygpt {dtype}"], 0),
            f"{result['perplexity'][dtype]:.4f} ({100 * (result['perplexity'][dtype] / exact - 1):+.2f}%)",
        )
        for dtype in ("fp32", "bf16", "int8")
    ]
    model = f"`{result['shape']}` with random weights, {result['prompt_tokens']} tokens of prompt, greedy"
    how = (
        f"{model}; {result['threads']} threads, {result['rounds']} rounds: median of the rounds' ratios, and range; "
        "mean tokens/s, and range. `limit` is the reading of all fp32 weights once a token. The perplexity is a trained "
        f"`{result['perplexity']['model']}`'s on its validation split. `benchmarks/generation.py`, on {place(result)}."
    )
    compared = table(("", "ours", "over", "ratio", "target"), rows)
    return "\n\n".join((compared, table(("dtype", "tokens/s, one text", "perplexity"), costs), how))


def seeds() -> str:
    """The parity runs one by one."""
    rows = [
        (str(row["seed"]), f"{row['tinygpt']:.4f}", f"{row['nanogpt']:.4f}", f"{run_seconds(row['seed']):.0f} s")
        for row in read("nanogpt_parity")["rows"]
    ]
    return table(("seed", "tinygpt", "nanoGPT", "time of ours, validations included"), rows)


def run_seconds(seed: int) -> float:
    with (RESULTS / "shakespeare_char_cpu" / f"seed-{seed}" / "metrics.csv").open(encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])


def parity_loss() -> str:
    return f"validation loss {ranged(read('nanogpt_parity')['tinygpt'], 4)}, `nanogpt_parity.json`"


def race_loss() -> str:
    return f"validation loss {ranged(read('race')['val_loss']['ours'], 4)}, [against nanoGPT's time](speed.md)"


def quality_loss(name: str) -> str:
    found = read("quality")
    row = next(row for row in found["rows"] if row["experiment"] == name)
    seeds = len(found["seeds"])
    return f"validation loss {several(row['val_loss'], seeds, 4)}, {seeds} seed{'s' * (seeds > 1)}, `quality.json`"


def gpu_loss() -> str:
    found = read("gpu").get("loss", {}) if (RESULTS / "gpu.json").exists() else {}
    return f"validation loss {ranged(found['val_loss'], 4)}, `gpu.json`" if "val_loss" in found else "not measured yet"


# What is known of a recipe; one that is not here has not been measured by us.
OF_EXPERIMENT = {
    "shakespeare_char_cpu": parity_loss,
    "shakespeare_char_cpu_fast": race_loss,
    "shakespeare_char_fast": gpu_loss,
    "gpt2_small_shakespeare": overfit_loss,
    **{name: partial(quality_loss, name) for name in ("shakespeare_char_cpu_100s", "shakespeare_char_cpu_10min")},
    **{f"imdb{name}_small": lambda: "in equal time: [IMDB](imdb.md#against-the-reference)" for name in ("", "_reference")},
}


def experiments() -> str:
    """Every recipe of conf/experiment: what its file says of it, its command, what was measured."""
    rows = []
    for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
        known = OF_EXPERIMENT[path.stem]() if path.stem in OF_EXPERIMENT else "not measured yet"
        rows.append((f"`experiment={path.stem}`", said_of(path), setting(path), known))
    return table(("recipe", "what it is", "settings", "measured"), rows)


def said_of(path: Path) -> str:
    """The comment at the head of a YAML file, without Hydra's own."""
    head = re.match(r"(#.*\n)*", path.read_text(encoding="utf-8"))
    assert head
    said = " ".join(line.strip("# ") for line in head[0].splitlines() if "@package" not in line)
    return said.replace("<", "&lt;")


def setting(path: Path) -> str:
    """What a YAML file sets, as one would type it."""
    return "<br>".join(f"`{item}`" for item in flat(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))


def flat(values: Any, prefix: str = "") -> list[str]:
    """Nested settings as key=value; the choices that a file is built on as group=choice."""
    found = []
    for name, value in values.items():
        if name == "defaults":
            found += [text for entry in value if (text := choice(entry))]
        elif isinstance(value, dict):
            found += flat(value, f"{prefix}{name}.")
        else:
            found.append(f"{prefix}{name}={spelt(value)}")
    return found


def choice(entry: Any) -> str:
    """An entry of Hydra's defaults list: {'override /model': 'mini'} is model=mini."""
    if not isinstance(entry, dict):
        return "" if entry == "_self_" else f"with {entry}"
    ((name, chosen),) = entry.items()
    return f"{name.removeprefix('override ').removeprefix('/')}={spelt(chosen)}"


def spelt(value: Any) -> str:
    """As on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return "[" + ",".join(spelt(item) for item in value) + "]"
    return value.replace("\n", "\\n") if isinstance(value, str) else str(value)


def sample() -> str:
    """The last thing that a committed run wrote, as a block."""
    sections = (RESULTS / SAMPLED / "samples.md").read_text(encoding="utf-8").split("\n## ")
    head, _, text = sections[-1].partition("\n")
    return f"*{head}*\n\n{text.strip(chr(10))}"


def preparation() -> str:
    """prepare.py against plain tiktoken."""
    found = read("prepare")
    bpe, big = found["gpt2"], found["large"]
    return (
        f"Measured by `benchmarks/prepare.py` ({place(found)}; load of other work: {found['load_before']:.1f}): GPT-2's "
        f"tokens {ranged(bpe['ratio'], 1, 'median')} times as fast as one thread of plain `tiktoken`, "
        f"{ranged(bpe['ratio_of_processor_time'], 1, 'median')} times in processor time alone; characters at "
        f"{ranged(found['char']['megabytes_per_second'], 0, 'median')} MB/s, ASCII at "
        f"{ranged(found['char_ascii']['megabytes_per_second'], 0, 'median')} MB/s; "
        f"{big['megabytes'] / 1000:.1f} GB of text in {big['peak_memory_megabytes']:.0f} MB of memory."
    )
