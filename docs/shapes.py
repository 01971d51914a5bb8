"""The shapes of tinygpt/model.py at every step, seen by hooks on real modules; on torch's meta device, so without work."""

from collections.abc import Callable
from typing import Any

import torch
import yaml
from results import ROOT, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tinygpt.config import ModelConfig
from tinygpt.loss import cross_entropy
from tinygpt.model import GPT

Shape = tuple[int, ...]

# No two of these numbers, nor of their products below, are equal: so a shape can be read back as letters.
LETTERS = {2: "B", 7: "T", 15: "C", 3: "H", 5: "D", 11: "V", 45: "3 C", 60: "4 C", 1: "1"}
SYMBOLIC = ModelConfig(n_layer=1, n_head=3, n_embd=15, block_size=7, mlp="gelu")
B = 12  # data.global_batch_size, as in the recipes
MODELS = {"nano": 65, "gpt2_small": 50257}  # each with a vocabulary: Shakespeare's characters, GPT-2's tokens

STEPS = {
    "idx": ("token ids", "`idx`"),
    "wte": ("a row of the embedding table for each token", "`wte(idx)`"),
    "wpe": ("a row of the position table for each place", "`wpe.weight[:T]`"),
    "x": ("their sum: the residual stream", "`x`"),
    "ln_1": ("normalised for the attention", "`h[0].ln_1(x)`"),
    "c_attn": ("queries, keys and values side by side", "`h[0].attn.c_attn(...)`"),
    "q": ("queries, cut into heads", "`q`"),
    "k": ("keys", "`k`"),
    "v": ("values", "`v`"),
    "scores": ("how much each place attends to each: `softmax(q kᵀ / √D)`, masked", "inside `scaled_dot_product_attention`"),
    "y": ("the values, averaged by those weights", "`self.attend(q, k, v, mask)`"),
    "attn.c_proj": ("heads side by side again, and mixed", "`h[0].attn.c_proj(...)`"),
    "mid": ("added to the residual stream", "`x = x + self.attn(...)`"),
    "ln_2": ("normalised for the MLP", "`h[0].ln_2(x)`"),
    "c_fc": ("widened, each place apart", "`h[0].mlp.c_fc(...)`"),
    "active": ("the activation", "`activate(...)`"),
    "mlp.c_proj": ("narrowed again", "`h[0].mlp.c_proj(...)`"),
    "block": ("added to the residual stream: the block's output, and the next one's input", "`x + self.mlp(...)`"),
    "ln_f": ("after the last block: normalised", "`ln_f(x)`"),
    "logits": ("one score per token of the vocabulary, at each place", "`lm_head(...)`"),
    "loss": ("the mean over all B T places", "`cross_entropy(logits, targets)`"),
}


class Heads(TorchFunctionMode):
    """Notes what goes into attention and what comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, Shape] = {}

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            named = {"q": args[0], "k": args[1], "v": args[2], "y": out}
            self.seen |= {name: tuple(x.shape) for name, x in named.items()}
            self.seen["scores"] = (*self.seen["q"][:3], self.seen["k"][2])
        return out


def watch(config: ModelConfig, vocab_size: int, batch: int) -> dict[str, Shape]:
    """The shapes of one forward pass of `batch` full blocks, by the names of STEPS."""
    with torch.device("meta"):
        model, idx = GPT(config, vocab_size), torch.zeros(batch, config.block_size, dtype=torch.long)
    block, seen = model.h[0], {"idx": tuple(idx.shape), "wpe": tuple(model.wpe.weight[: config.block_size].shape)}
    leaves = {"wte": model.wte, "ln_1": block.ln_1, "c_attn": block.attn.c_attn, "attn.c_proj": block.attn.c_proj}
    leaves |= {"ln_2": block.ln_2, "c_fc": block.mlp.c_fc, "mlp.c_proj": block.mlp.c_proj, "block": block}
    leaves |= {"ln_f": model.ln_f, "logits": model.lm_head}
    for name, module in leaves.items():
        module.register_forward_hook(note_output(seen, name))
    for name, module in {"x": block, "mid": block.ln_2, "active": block.mlp.c_proj}.items():
        module.register_forward_pre_hook(note_input(seen, name))
    with Heads() as heads:
        logits = model(idx)
    return {**seen, **heads.seen, "loss": tuple(cross_entropy(logits, idx, reduction="mean").shape)}


def note_output(seen: dict[str, Shape], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda _module, _args, out: seen.update({name: tuple(out.shape)})


def note_input(seen: dict[str, Shape], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda _module, args: seen.update({name: tuple(args[0].shape)})


def steps() -> str:
    """A row per step: in letters, and for each of MODELS."""
    seen = [watch(SYMBOLIC, 11, 2), *(watch(preset(name), vocabulary, B) for name, vocabulary in MODELS.items())]
    rows = []
    for name, (meaning, code) in STEPS.items():
        letters, *numbers = (shapes[name] for shapes in seen)
        rows.append((meaning, code, letter(letters), *(written(shape) for shape in numbers)))
    return table(("step", "in the code", "shape", *(f"`{name}`" for name in MODELS)), rows)


def letters() -> str:
    """What the letters stand for, for each of MODELS."""
    configs = [(preset(name), vocabulary) for name, vocabulary in MODELS.items()]
    rows = [
        ("B", "sequences in a batch", "`data.global_batch_size`", *(str(B) for _ in configs)),
        ("T", "tokens in a sequence", "at most `model.block_size`", *(str(c.block_size) for c, _ in configs)),
        ("C", "width: numbers per token", "`model.n_embd`", *(str(c.n_embd) for c, _ in configs)),
        ("H", "attention heads", "`model.n_head`", *(str(c.n_head) for c, _ in configs)),
        ("D", "width of a head", "C / H", *(str(c.head_dim) for c, _ in configs)),
        ("V", "tokens in the vocabulary", "from the tokenizer", *(str(v) for _, v in configs)),
        ("", "blocks, one after the other", "`model.n_layer`", *(str(c.n_layer) for c, _ in configs)),
    ]
    return table(("letter", "meaning", "in the config", *(f"`{name}`" for name in MODELS)), rows)


def letter(shape: Shape) -> str:
    return f"`({', '.join(LETTERS[n] for n in shape)})`"


def written(shape: Shape) -> str:
    return f"`({', '.join(map(str, shape))})`"


def preset(name: str) -> ModelConfig:
    return ModelConfig(**yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text(encoding="utf-8")))


def parameters() -> str:
    """A row per kind of parameter: shape and count, for each of MODELS."""
    with torch.device("meta"):
        models = [GPT(preset(name), vocabulary) for name, vocabulary in MODELS.items()]
    names = list(dict.fromkeys(kind for model in models for kind in counted(model)))
    rows = [(f"`{name}`", *(described(counted(model).get(name)) for model in models)) for name in names]
    rows.append(("in all", *(f"**{model.num_parameters():,}**" for model in models)))
    return table(("parameter", *(f"`{name}`" for name in MODELS)), rows)


def counted(model: GPT) -> dict[str, list[Tensor]]:
    """Parameters by name, those of all blocks under one name; a shared one once."""
    found: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".")
        found.setdefault(f"h.*.{rest.partition('.')[2]}" if head == "h" else name, []).append(parameter)
    return found


def described(parameters: list[Tensor] | None) -> str:
    if parameters is None:
        return "-"
    times = f"{len(parameters)} × " if len(parameters) > 1 else ""
    return f"{times}{written(tuple(parameters[0].shape))} = {sum(p.numel() for p in parameters):,}"
