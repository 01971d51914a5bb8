"""Draws the pictures of docs/model.md and docs/train.md from a trained model into docs/figures.

    python docs/figures.py [--run outputs/latest]

Without --run it trains `experiment=shakespeare_char_cpu` first, some minutes on a CPU. The corpus is looked for in
$TINYGPT_DATA_DIR, or downloaded.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tinygpt.checkpoint import find, load, open_checkpoint, stored_data
from tinygpt.config import ModelConfig, OptimizerConfig
from tinygpt.corpus import cache_dir, data_dir
from tinygpt.generate import Sampling, warp
from tinygpt.model import GPT, continuation_mask, rope_tables, rotate
from tinygpt.optim import learning_rate
from tinygpt.shards import Prepared, prepare
from tinygpt.summary import read_metrics
from tinygpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
TEXT = "ROMEO:\nWhere is the good queen?"
PROMPT = "ROMEO:\nI will not be th"
BLUE, ORANGE, GREY, LIGHT = "#2f6fb0", "#c8501e", "#777777", "#9ab8d8"


def draw(name: str, size: tuple[float, float], rows: int, columns: int, paint: Callable[[Any], None], **grid: Any) -> None:
    """A picture of rows x columns axes, filled by `paint`, as docs/figures/NAME.png."""
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    paint(figure.subplots(rows, columns, **grid))
    figure.savefig(FIGURES / f"{name}.png", bbox_inches="tight", pad_inches=0.08, pil_kwargs={"optimize": True})
    print(f"written: docs/figures/{name}.png")


def bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


class Attention(TorchFunctionMode):
    """Notes the attention weights (H, T, T) of every layer, which the model's own fused kernel never shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k = args[:2]
            scores = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]))[0]
            seen = continuation_mask(q.shape[2], k.shape[2], q.device)
            self.weights.append(scores.masked_fill(~seen, -torch.inf).softmax(-1))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def attention(model: GPT, tokenizer: Tokenizer) -> None:
    """All heads small, and three of them large enough to read: a row is a character, a column what it looks at."""
    with Attention() as watch:
        model(torch.tensor([tokenizer.encode(TEXT)]))
    heads = torch.stack(watch.weights)  # (layers, H, T, T)

    def paint_all(grid: Any) -> None:
        for layer, row in enumerate(grid):
            for head, axes in enumerate(row):
                axes.imshow(heads[layer, head].sqrt(), cmap="magma", vmin=0, vmax=1)
                axes.set_title(f"layer {layer + 1}, head {head + 1}", fontsize=8)
                axes.set(xticks=[], yticks=[])

    def paint_three(grid: Any) -> None:
        labels = [visible(character) for character in TEXT]
        for axes, (what, (layer, head)) in zip(grid, telling(heads).items(), strict=True):
            axes.imshow(heads[layer, head].sqrt(), cmap="magma", vmin=0, vmax=1)
            axes.set_title(f"layer {layer + 1}, head {head + 1}: {what}", fontsize=9)
            axes.set_xticks(range(len(labels)), labels, fontsize=7)
            axes.set_yticks(range(len(labels)), labels, fontsize=7)
            axes.tick_params(length=0, pad=2)

    draw("attention", (9.4, 3.6), 1, 3, paint_three)
    draw("heads", (6.4, 6.8), len(heads), heads.shape[1], paint_all)


def telling(heads: Tensor) -> dict[str, tuple[int, int]]:
    """The head that looks most at the character before, at the space or newline before the word, and at most places."""
    opening = [max((i for i in range(place + 1) if TEXT[i].isspace()), default=0) for place in range(len(TEXT))]
    spread = -(heads * heads.clamp_min(1e-9).log()).sum(-1).mean(-1)
    scores = {
        "what came just before": heads.diagonal(-1, -2, -1).mean(-1),
        "where the word begins": heads[:, :, range(len(TEXT)), opening].mean(-1),
        "much at once": spread,
    }
    return {name: divmod(int(score.argmax()), heads.shape[1]) for name, score in scores.items()}


def visible(character: str) -> str:
    return {"\n": "↵", " ": "␣"}.get(character, character)


def positions(model: GPT) -> None:
    """How alike the learned places are, and how rope makes a query and a key alike by their distance."""
    table = F.normalize(model.wpe.weight.detach(), dim=1)
    config = ModelConfig(position="rope")
    x = torch.ones(1, 1, config.block_size, config.head_dim) / math.sqrt(config.head_dim)
    turned = rotate(x, *rope_tables(config))[0, 0]

    def paint(grid: Any) -> None:
        for axes, rows, title in (
            (grid[0], table, "learned: cosine of two rows of wpe"),
            (grid[1], turned, "rope: one vector, turned to two places"),
        ):
            image = axes.imshow(rows @ rows.T, cmap="RdBu_r", vmin=-1, vmax=1)
            axes.set(title=title, xlabel="place", ylabel="place")
        grid[1].figure.colorbar(image, ax=grid, shrink=0.8, label="likeness")

    draw("positions", (9, 3.9), 1, 2, paint)


def masks() -> None:
    """What may attend to what, in the four situations that occur."""
    device = torch.device("cpu")
    causal = continuation_mask(8, 8, device)
    document = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    packed = causal & (document[:, None] == document)
    padded = causal & (torch.arange(8) < 6)
    panels = (
        ("training: up to itself", causal),
        ("cache: 3 new after 5 read", continuation_mask(3, 8, device)),
        ("padding: the last 2 hold nothing", padded),
        ("two documents in one row", packed),
    )

    def paint(grid: Any) -> None:
        for axes, (title, mask) in zip(grid, panels, strict=True):
            axes.imshow(mask, cmap="Blues", vmin=0, vmax=1.4)
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("key", fontsize=8)
            axes.set_xticks(np.arange(9) - 0.5, [], minor=False)
            axes.set_yticks(np.arange(len(mask) + 1) - 0.5, [])
            axes.grid(color="white", linewidth=1.5)
            axes.tick_params(length=0)
        grid[0].set_ylabel("query", fontsize=8)

    draw("masks", (9.4, 2.7), 1, 4, paint)


def entropies(prepared: Prepared) -> dict[str, float]:
    """Validation losses of guesses that need no network, in nats a character, counted on the training split."""
    train, val = (split.windows(np.array([0]), len(split))[0] for split in (prepared.train, prepared.val))
    size = prepared.tokenizer.vocab_size
    single = np.bincount(train, minlength=size) + 1.0
    pairs = np.bincount(train[:-1] * size + train[1:], minlength=size**2).reshape(size, size) + 1.0
    pairs /= pairs.sum(axis=1, keepdims=True)
    return {
        "every character as likely": math.log(size),
        "how often each occurs": float(-np.log(single / single.sum())[val].mean()),
        "given the one before": float(-np.log(pairs[val[:-1], val[1:]]).mean()),
    }


def curves(run: Path, guesses: dict[str, float]) -> None:
    """Loss against steps, with the guesses that a model should pass on its way."""
    rows = read_metrics(run / "metrics.csv")
    train = [(int(row["step"]), float(row["train/loss"])) for row in rows if row["train/loss"]]
    val = [(int(row["step"]), float(row["val/loss"])) for row in rows if row["val/loss"]]

    def paint(axes: Axes) -> None:
        last = val[-1][0]
        axes.plot(*zip(*train, strict=True), color=LIGHT, linewidth=1, label="train (one batch)")
        axes.plot(*zip(*val, strict=True), color=ORANGE, marker="o", markersize=3.5, label="validation (the whole split)")
        axes.annotate(f"{val[-1][1]:.2f}", val[-1], xytext=(4, -3), textcoords="offset points", color=ORANGE)
        for name, loss in guesses.items():
            axes.axhline(loss, color=GREY, linewidth=0.8, linestyle="--")
            axes.text(last, loss + 0.03, f"{name}: {loss:.2f}", ha="right", fontsize=8, color="#444444")
        axes.set(xlabel="optimizer step", ylabel="loss (nats per character)")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, 0.72))
        bare(axes)

    draw("loss", (8, 4.2), 1, 1, paint)


@torch.inference_mode()
def sampling(model: GPT, tokenizer: Tokenizer) -> None:
    """The same logits under several settings: what the next character is drawn from."""
    logits = model(torch.tensor([tokenizer.encode(PROMPT)]))[:, -1]
    order = logits[0].argsort(descending=True)[:14]
    labels = [visible(tokenizer.decode([int(token)])) for token in order]
    settings: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 2.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.3},
    ]

    def paint(grid: Any) -> None:
        for axes, chosen in zip(grid.flat, settings, strict=True):
            probabilities = warp(logits, Sampling(**chosen)).softmax(-1)[0]
            shown = probabilities[order]
            axes.bar(range(len(order)), shown, color=[BLUE if p > 0 else GREY for p in shown])
            axes.set_xticks(range(len(order)), labels, fontsize=9)
            rest = float(1 - shown.sum())
            axes.set_title(" ".join(f"{k}={v}" for k, v in chosen.items()), fontsize=9, family="monospace")
            axes.text(0.98, 0.9, f"all others: {max(0.0, rest):.1%}", transform=axes.transAxes, ha="right", fontsize=8)
            axes.tick_params(axis="x", length=0)
            bare(axes)
        for row in grid:
            row[0].set_ylabel("probability")

    draw("sampling", (9.2, 4.8), 2, 3, paint, sharey=True)


def schedules() -> None:
    """The learning rate over a run of 1000 steps under each schedule."""
    steps, names = range(1000), ("cosine", "wsd", "onecycle", "constant")

    def paint(grid: Any) -> None:
        for axes, name in zip(grid, names, strict=True):
            config = OptimizerConfig(schedule=name)
            axes.plot(steps, [learning_rate(step, len(steps), config) for step in steps], color=BLUE)
            axes.set_title(f"schedule={name}", fontsize=9, family="monospace")
            axes.set(xlabel="step", ylim=(0, 1.08e-3))
            bare(axes)
        grid[0].set_ylabel("learning rate")

    draw("schedules", (9.4, 2.4), 1, 4, paint, sharey=True)


def train(folder: str) -> Path:
    run = Path(folder) / "run"
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "experiment=shakespeare_char_cpu", f"hydra.run.dir={run}"],
        check=True,
        cwd=folder,
    )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="the directory of a run on Shakespeare's characters")
    given = parser.parse_args().run
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        run = given or train(folder)
        checkpoint = find(run)
        model, tokenizer = load(checkpoint)
        data = stored_data(open_checkpoint(checkpoint)["tinygpt"])
        prepared = prepare(data, data_dir(None), cache_dir(None), tokenizer)
        curves(run, entropies(prepared))
    attention(model, tokenizer)
    positions(model)
    masks()
    sampling(model, tokenizer)
    schedules()


if __name__ == "__main__":
    main()
