"""The README.md of an export: what the model is, how its run went by its own summary.json, how to load it."""

from collections.abc import Sequence
from typing import Any

from tinygpt.config import ModelConfig
from tinygpt.model import GPT
from tinygpt.tokenizer import Tokenizer

Rows = list[tuple[str, str]]

USE = {
    "hf": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIR")
tokenizer = AutoTokenizer.from_pretrained("DIR")
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=NEW, do_sample=True)[0]))""",
    "safetensors": """import tinygpt

model, tokenizer = tinygpt.load("DIR")
print(tinygpt.generate(model, tokenizer, "The", max_new_tokens=NEW))""",
}


def model_card(
    layout: str,
    model: GPT,
    tokenizer: Tokenizer | None,
    summary: dict[str, Any],
    card: dict[str, Any],
    notes: Sequence[str] = (),
) -> str:
    """Markdown. `summary` is the run's summary.json or empty; nothing of it that names a place on a machine is used."""
    numbers = measured(summary)
    use = USE[layout].replace("NEW", str(min(50, model.config.block_size // 2)))  # transformers stops at the context's end
    parts = [
        "---",
        f"library_name: {'transformers' if layout == 'hf' else 'tinygpt'}",
        "pipeline_tag: text-generation",
        "tags:\n- tinygpt",
        "---",
        f"# A GPT of {model.num_parameters():,} parameters\n",
        table([*shape(model.config), *vocabulary(model, tokenizer), *corpus(card, summary)]),
        "\n## How its training went\n",
        table(numbers) if numbers else "These weights came without the record of a run.",
        "\n## Use\n",
        f"DIR is this directory.\n\n```python\n{use}\n```",
        *(f"\nNote: {note}." for note in notes),
    ]
    return "\n".join(parts) + "\n"


def table(rows: Rows) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def shape(config: ModelConfig) -> Rows:
    heads = f"{config.n_head}" + (f" ({config.n_kv_head} for keys and values)" if config.n_kv_head else "")
    kind = f"{config.norm}, {config.position} positions, {config.mlp}"
    return [
        ("layers, heads, width", f"{config.n_layer}, {heads}, {config.n_embd}"),
        ("context", f"{config.block_size:,} tokens"),
        ("kind", kind),
    ]


def vocabulary(model: GPT, tokenizer: Tokenizer | None) -> Rows:
    return [("vocabulary", f"{model.vocab_size:,}" + (f", {tokenizer.kind} tokenizer" if tokenizer else ""))]


def corpus(card: dict[str, Any], summary: dict[str, Any]) -> Rows:
    known = summary.get("corpus") or card["corpus"]
    return [("trained on", f"{known['name']} (sha256 {known['sha256']})")] if known else []


def measured(summary: dict[str, Any]) -> Rows:
    """What summary.json says, as far as it says it. `best` is what was exported, unless another file was named."""
    formats = {
        "best_val_loss": ("best validation loss, nats per token", ".4f"),
        "best_step": ("at step", ",d"),
        "val_loss": ("validation loss at the end", ".4f"),
        "val_bits_per_byte": ("bits per byte at the end", ".4f"),
        "val_perplexity": ("perplexity at the end", ".3f"),
        "val_accuracy": ("accuracy at the end", ".4f"),
        "steps": ("steps", ",d"),
        "tokens": ("tokens seen", ",d"),
        "seconds": ("seconds", ",.0f"),
        "seed": ("seed", "d"),
    }
    rows = [(words, format(summary[name], form)) for name, (words, form) in formats.items() if summary.get(name) is not None]
    versions = summary.get("versions") or {}
    return [*rows, ("versions", ", ".join(f"{name} {value}" for name, value in versions.items()))] if rows else []
