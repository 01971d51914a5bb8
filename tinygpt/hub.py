"""Weights from the layouts of Hugging Face: a config and named tensors of GPT-2 or Llama become a GPT.

Nothing is downloaded or opened here. For each of our parameters a table says under which names it is stored
there, and which rows of it each of them holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from tinygpt.config import ModelConfig, UserError
from tinygpt.model import GPT, inner_width

HubConfig = Mapping[str, Any]
Sources = dict[str, tuple[str, ...]]  # our parameter: theirs, in the order in which its rows hold them

_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# What would change the numbers and has no counterpart in GPT, with the value at which it does nothing.
_GPT2_FIXED = {
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_LLAMA_FIXED = {"model_type": "llama", "hidden_act": "silu"}
_LLAMA: Sources = {
    "wte": ("embed_tokens",),
    "ln_f": ("norm",),
    "lm_head": ("lm_head",),
    "ln_1": ("input_layernorm",),
    "attn.c_attn": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attn.c_proj": ("self_attn.o_proj",),
    "ln_2": ("post_attention_layernorm",),
    "mlp.c_fc": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.c_proj": ("mlp.down_proj",),
}
_SHOWN = 4  # names in an error message


def gpt2_config(config: HubConfig) -> ModelConfig:
    """The ModelConfig of a `GPT2Config` dictionary; dropout, which no weights depend on, is 0.

    Raises UserError where a setting is missing, or is one that GPT does not have.
    """
    _refuse_others(config, _GPT2_FIXED)
    return ModelConfig(
        n_layer=_need(config, "n_layer"),
        n_head=_need(config, "n_head"),
        n_embd=_need(config, "n_embd"),
        block_size=_need(config, "n_positions"),
        n_inner=config.get("n_inner"),
        norm="layernorm",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        position="learned",
        mlp=_gelu(config.get("activation_function", "gelu_new")),
        bias=True,
        tie_embeddings=config.get("tie_word_embeddings", True),
    )


def llama_config(config: HubConfig) -> ModelConfig:
    """The ModelConfig of a `LlamaConfig` dictionary, of transformers 4 or 5; errors as for `gpt2_config`."""
    _refuse_others(config, _LLAMA_FIXED)
    rope = _rope(config)
    bias = config.get("attention_bias", False)
    if config.get("mlp_bias", False) != bias:
        raise _unsupported("mlp_bias", not bias, "the same as attention_bias")
    shape = ModelConfig(
        n_layer=_need(config, "num_hidden_layers"),
        n_head=_need(config, "num_attention_heads"),
        n_embd=_need(config, "hidden_size"),
        block_size=_need(config, "max_position_embeddings"),
        n_kv_head=config.get("num_key_value_heads"),
        n_inner=_need(config, "intermediate_size"),
        norm="rmsnorm",
        norm_eps=config.get("rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=rope.get("rope_theta", 10000.0),
        mlp="swiglu",
        bias=bias,
        tie_embeddings=config.get("tie_word_embeddings", False),
    )
    if config.get("head_dim") not in (None, shape.head_dim):
        raise _unsupported("head_dim", config["head_dim"], f"hidden_size / num_attention_heads, {shape.head_dim}")
    return shape


def from_gpt2(config: HubConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """A GPT with the weights of a `GPT2LMHeadModel` or `GPT2Model`, in torch's default dtype, on the CPU.

    Raises UserError that names the tensors which are missing, unknown or misshaped.
    """
    model = GPT(gpt2_config(config), _need(config, "vocab_size"))
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # Older files hold the causal mask among the weights; c_attn.bias is none of these.
    stored = {k: v for k, v in stored.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    # Their linear layers are Conv1D, whose weight is (in, out).
    stored = {
        k: v.t() if k.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) and v.dim() == 2 else v
        for k, v in stored.items()
    }
    _fill(model, {name: (name,) for name, _ in model.named_parameters()}, stored)
    return model


def from_llama(config: HubConfig, tensors: Mapping[str, Tensor]) -> GPT:
    """A GPT with the weights of a `LlamaForCausalLM`; dtype, device and errors as for `from_gpt2`."""
    model = GPT(llama_config(config), _need(config, "vocab_size"))
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    stored = {k: v for k, v in stored.items() if not k.endswith(".rotary_emb.inv_freq")}
    _fill(model, {name: llama_sources(name) for name, _ in model.named_parameters()}, stored)
    return model


def llama_sources(name: str) -> tuple[str, ...]:
    """Where `LlamaForCausalLM` keeps our parameter `name`, without the prefix `model.`."""
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        prefix = f"layers.{layer}."
    return tuple(f"{prefix}{theirs}.{kind}" for theirs in _LLAMA[module])


def _row_counts(config: ModelConfig, parts: int, rows: int) -> list[int]:
    """How the rows of a parameter divide among its sources: queries, keys, values; gate, up; or one."""
    if parts == 3:
        kv = (config.n_kv_head or config.n_head) * config.head_dim
        return [config.n_embd, kv, kv]
    return [inner_width(config)] * 2 if parts == 2 else [rows]


def _targets(model: GPT, sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Each stored name with the rows of our parameter that it fills."""
    for ours, parameter in model.named_parameters():
        rows = _row_counts(model.config, len(sources[ours]), len(parameter))
        yield from zip(sources[ours], parameter.detach().split(rows), strict=True)


def _fill(model: GPT, sources: Sources, stored: dict[str, Tensor]) -> None:
    """Copy the stored tensors into the model, all or none."""
    targets = dict(_targets(model, sources))
    if model.config.tie_embeddings:  # some files hold the shared weight twice
        stored.pop("lm_head.weight", None)
    _report("are missing", [name for name in targets if name not in stored])
    _report("are unknown", [name for name in stored if name not in targets])
    _report(
        "have the wrong shape",
        [
            f"{name} {tuple(stored[name].shape)} instead of {tuple(target.shape)}"
            for name, target in targets.items()
            if stored[name].shape != target.shape
        ],
    )
    for name, target in targets.items():
        target.copy_(stored[name])


def _report(problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UserError(
            f"tensors {problem}: {', '.join(names[:_SHOWN])}{more}",
            "the weights and config.json must come from the same model",
        )


def _need(config: HubConfig, name: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"the model's config.json has no {name}", "is it a GPT-2 or Llama model?")
    return config[name]


def _refuse_others(config: HubConfig, fixed: Mapping[str, Any]) -> None:
    for name, only in fixed.items():
        if config.get(name, only) != only:
            raise _unsupported(name, config[name], only)


def _unsupported(name: str, value: Any, only: Any) -> UserError:
    return UserError(f"the model's config.json says {name}={value}", f"tinygpt supports {name}={only} only")


def _gelu(name: str) -> str:
    if name not in _GELUS:
        raise _unsupported("activation_function", name, " or ".join(_GELUS))
    return _GELUS[name]


def _rope(config: HubConfig) -> HubConfig:
    """Transformers 5 keeps these in rope_parameters; 4 kept rope_theta beside the others."""
    rope = {**config, **(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _unsupported("rope_type", kind, "default")
    return rope
