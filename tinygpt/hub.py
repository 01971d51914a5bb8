"""The layouts of Hugging Face: a config and named tensors of GPT-2 or Llama become a GPT's, and a GPT's become theirs.

Nothing is downloaded, opened or written here. For each of our parameters a table says under which names it is stored
there, and which rows of it each of them holds.
"""

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tinygpt.config import ModelConfig, UserError, shorten
from tinygpt.model import GPT, inner_width, outline

HubConfig = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Sources = dict[str, tuple[str, ...]]  # our parameter: theirs, in the order in which its rows hold them

_GELUS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# What would change the numbers and has no counterpart in GPT, with the value at which it does nothing.
_GPT2_FIXED = {
    "model_type": "gpt2",
    "quantization_config": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_LLAMA_FIXED = {"model_type": "llama", "quantization_config": None, "hidden_act": "silu"}
_ROPE_FIXED = {"partial_rotary_factor": 1.0}
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
# Their linear layers are Conv1D in GPT-2, whose weight is (in, out).
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_SHOWN = 4  # names in an error message
_LARGEST = 2**31 - 1  # of any size in a config
_FREE_TABLE = 2**26  # bytes of rotations, up to which nobody asks how large the weights are


# In


def read_layout(config: HubConfig, tensors: Tensors) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    """The shape, the vocabulary's size and the weights, by our names, of a config.json and its tensors.

    Weights are in torch's default dtype, and where they were so before they are the same memory (GPT-2's matrices as
    transposed views). Raises UserError that names what is not supported, missing, unknown or misshaped; no memory is asked
    for before.
    """
    readers = {"gpt2": _read_gpt2, "llama": _read_llama}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in readers:
        said = f"model_type={shorten(kind)}" if kind is not None else "no model_type"
        raise UserError(f"the model's config.json says {said}", f"tinygpt reads these layouts: {', '.join(readers)}")
    return readers[kind](config, tensors)


def gpt2_config(config: HubConfig) -> ModelConfig:
    """The ModelConfig of a `GPT2Config` dictionary; dropout, which no weights depend on, is 0.

    Raises UserError where a setting is missing, or is one that GPT does not have.
    """
    _refuse_others(config, _GPT2_FIXED)
    return ModelConfig(
        n_layer=_size(config, "n_layer"),
        n_head=_size(config, "n_head"),
        n_embd=_size(config, "n_embd"),
        block_size=_size(config, "n_positions"),
        n_inner=_optional_size(config, "n_inner"),
        norm="layernorm",
        norm_eps=_number(config, "layer_norm_epsilon", 1e-5),
        position="learned",
        mlp=_gelu(config.get("activation_function", "gelu_new")),
        bias=True,
        tie_embeddings=_flag(config, "tie_word_embeddings", True),
    )


def llama_config(config: HubConfig) -> ModelConfig:
    """The ModelConfig of a `LlamaConfig` dictionary, of transformers 4 or 5; errors as for `gpt2_config`."""
    _refuse_others(config, _LLAMA_FIXED)
    rope = _rope(config)
    bias = _flag(config, "attention_bias", False)
    if config.get("mlp_bias", False) != bias:
        raise _unsupported("mlp_bias", not bias, "the same as attention_bias")
    shape = ModelConfig(
        n_layer=_size(config, "num_hidden_layers"),
        n_head=_size(config, "num_attention_heads"),
        n_embd=_size(config, "hidden_size"),
        block_size=_size(config, "max_position_embeddings"),
        n_kv_head=_optional_size(config, "num_key_value_heads"),
        n_inner=_size(config, "intermediate_size"),
        norm="rmsnorm",
        norm_eps=_number(config, "rms_norm_eps", 1e-6),
        position="rope",
        rope_theta=_number(rope, "rope_theta", 10000.0),
        mlp="swiglu",
        bias=bias,
        tie_embeddings=_flag(config, "tie_word_embeddings", False),
    )
    if config.get("head_dim") not in (None, shape.head_dim):
        raise _unsupported("head_dim", config["head_dim"], f"hidden_size / num_attention_heads, {shape.head_dim}")
    return shape


def from_gpt2(config: HubConfig, tensors: Tensors) -> GPT:
    """A GPT with the weights of a `GPT2LMHeadModel` or `GPT2Model`, in torch's default dtype, on the CPU.

    Raises UserError that names the tensors which are missing, unknown or misshaped.
    """
    return copy.deepcopy(assemble(*_read_gpt2(config, tensors)))


def from_llama(config: HubConfig, tensors: Tensors) -> GPT:
    """A GPT with the weights of a `LlamaForCausalLM`; dtype, device and errors as for `from_gpt2`."""
    return copy.deepcopy(assemble(*_read_llama(config, tensors)))


def assemble(config: ModelConfig, vocab_size: int, weights: Tensors) -> GPT:
    """A GPT whose parameters are the given tensors: nothing is initialised or copied.

    Raises RuntimeError where they do not fit, and before any memory is asked for that they do not vouch for.
    """
    refuse_giant_table(config, weights)
    if config.n_layer > len(weights):
        raise RuntimeError(f"{len(weights)} tensors are not {config.n_layer} layers")
    model = outline(config, vocab_size)
    if config.tie_embeddings:
        weights = {**weights, "lm_head.weight": weights["wte.weight"]}
    model.load_state_dict(weights, assign=True)
    if config.tie_embeddings:
        model.lm_head.weight = model.wte.weight
    return model


def refuse_giant_table(config: ModelConfig, weights: Tensors) -> None:
    """RuntimeError where the rotations, which are in no file, take far more memory than the weights."""
    given = sum(tensor.nbytes for tensor in weights.values())
    table = config.block_size * config.head_dim * 4
    if config.position == "rope" and table > max(_FREE_TABLE, 4 * given):
        raise RuntimeError(f"block_size={config.block_size} asks for {table:,} bytes beside {given:,} of weights")


def _read_gpt2(config: HubConfig, tensors: Tensors) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    shape, vocab_size = gpt2_config(config), _size(config, "vocab_size")
    stored = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    # Older files hold the causal mask among the weights; c_attn.bias is none of these.
    stored = {k: v for k, v in stored.items() if not k.endswith((".attn.bias", ".attn.masked_bias"))}
    stored = {k: v.t() if k.endswith(_CONV1D) and v.dim() == 2 else v for k, v in stored.items()}
    model = _on_meta(shape, vocab_size, stored)
    return shape, vocab_size, _gather(model, {name: (name,) for name, _ in model.named_parameters()}, stored)


def _read_llama(config: HubConfig, tensors: Tensors) -> tuple[ModelConfig, int, dict[str, Tensor]]:
    shape, vocab_size = llama_config(config), _size(config, "vocab_size")
    stored = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    stored = {k: v for k, v in stored.items() if not k.endswith(".rotary_emb.inv_freq")}
    model = _on_meta(shape, vocab_size, stored)
    return shape, vocab_size, _gather(model, {name: llama_sources(name) for name, _ in model.named_parameters()}, stored)


def llama_sources(name: str) -> tuple[str, ...]:
    """Where `LlamaForCausalLM` keeps our parameter `name`, without the prefix `model.`."""
    module, kind = name.rsplit(".", 1)
    prefix = ""
    if module.startswith("h."):
        _, layer, module = module.split(".", 2)
        prefix = f"layers.{layer}."
    return tuple(f"{prefix}{theirs}.{kind}" for theirs in _LLAMA[module])


def _on_meta(config: ModelConfig, vocab_size: int, stored: Tensors) -> GPT:
    """The model without memory, to compare with what is stored."""
    try:
        refuse_giant_table(config, stored)
        return outline(config, vocab_size)
    except RuntimeError as error:  # or sizes whose product is no number of bytes
        raise UserError(f"the model's config.json cannot be meant: {shorten(error)}", _SAME) from error


def _row_counts(config: ModelConfig, parts: int, rows: int) -> list[int]:
    """How the rows of a parameter divide among its sources: queries, keys, values; gate, up; or one."""
    if parts == 3:
        kv = (config.n_kv_head or config.n_head) * config.head_dim
        return [config.n_embd, kv, kv]
    return [inner_width(config)] * 2 if parts == 2 else [rows]


def _parts(model: nn.Module, config: ModelConfig, sources: Sources) -> Iterator[tuple[str, Tensor]]:
    """Each stored name with the rows of our parameter that it holds."""
    for ours, parameter in model.named_parameters():
        rows = _row_counts(config, len(sources[ours]), len(parameter))
        yield from zip(sources[ours], parameter.detach().split(rows), strict=True)


def _gather(model: GPT, sources: Sources, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors by our names, joined where one of ours is several of theirs."""
    wanted = dict(_parts(model, model.config, sources))
    if model.config.tie_embeddings and (head := stored.pop("lm_head.weight", None)) is not None:
        stored.setdefault(sources["wte.weight"][0], head)  # some files hold the shared weight twice, or by this name only
    _report("are missing", [name for name in wanted if name not in stored])
    _report("are unknown", [name for name in stored if name not in wanted])
    _report(
        "have the wrong shape",
        [
            f"{name} {tuple(stored[name].shape)} instead of {tuple(want.shape)}"
            for name, want in wanted.items()
            if stored[name].shape != want.shape
        ],
    )
    _report("are not floating-point numbers", [f"{k} {v.dtype}" for k, v in stored.items() if not v.is_floating_point()])
    dtype = torch.get_default_dtype()
    return {
        ours: torch.cat([stored[name].to(dtype) for name in theirs]) if len(theirs) > 1 else stored[theirs[0]].to(dtype)
        for ours, theirs in sources.items()
    }


_SAME = "the weights and config.json must come from the same model"


def _report(problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise UserError(f"tensors {problem}: {', '.join(shorten(name) for name in names[:_SHOWN])}{more}", _SAME)


def _need(config: HubConfig, name: str) -> Any:
    if config.get(name) is None:
        raise UserError(f"the model's config.json has no {name}", "is it a GPT-2 or Llama model?")
    return config[name]


def _size(config: HubConfig, name: str) -> int:
    value = _need(config, name)
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise _unsupported(name, value, "whole numbers above 0 for it, and none that ask for terabytes", exactly=False)
    return int(value)


def _optional_size(config: HubConfig, name: str) -> int | None:
    return None if config.get(name) is None else _size(config, name)


def _number(config: HubConfig, name: str, default: float) -> float:
    value = config.get(name, default)
    if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:
        raise _unsupported(name, value, "numbers above 0 for it", exactly=False)
    return float(value)


def _flag(config: HubConfig, name: str, default: bool) -> bool:
    value = config.get(name, default)
    if not isinstance(value, bool):
        raise _unsupported(name, value, "true or false for it", exactly=False)
    return value


def _refuse_others(config: HubConfig, fixed: Mapping[str, Any]) -> None:
    for name, only in fixed.items():
        if config.get(name, only) != only:
            raise _unsupported(name, config[name], only)


def _unsupported(name: str, value: Any, only: Any, exactly: bool = True) -> UserError:
    supported = f"{name}={only} only" if exactly else only
    return UserError(f"the model's config.json says {name}={shorten(value)}", f"tinygpt supports {supported}")


def _gelu(name: Any) -> str:
    if not isinstance(name, str) or name not in _GELUS:
        raise _unsupported("activation_function", name, " or ".join(_GELUS))
    return _GELUS[name]


def _rope(config: HubConfig) -> HubConfig:
    """Transformers 5 keeps these in rope_parameters; 4 kept rope_theta beside the others."""
    inner = [config.get(name) or {} for name in ("rope_scaling", "rope_parameters")]
    if not all(isinstance(value, dict) for value in inner):
        raise _unsupported("rope_parameters", inner[-1], "a dictionary for it", exactly=False)
    rope = {**config, **inner[0], **inner[1]}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise _unsupported("rope_type", kind, "default")
    _refuse_others(rope, _ROPE_FIXED)
    return rope


# Out

_GPT2_HOLDS = {"norm": ("layernorm",), "position": ("learned",), "mlp": ("gelu", "gelu_tanh")}
_LLAMA_HOLDS = {"norm": ("rmsnorm",), "position": ("rope",), "mlp": ("swiglu",)}
_BOTH_HOLD = {"qk_norm": (False,), "logit_softcap": (None,)}


def to_layout(model: GPT, end_of_text: int | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config.json and the tensors of the `GPT2LMHeadModel` or `LlamaForCausalLM` that this model is.

    `end_of_text` is the id that begins and ends texts. Raises UserError that names what neither of them can express.
    """
    lacking = {"GPT-2": _lacking(model.config, _GPT2_HOLDS), "Llama": _lacking(model.config, _LLAMA_HOLDS)}
    if model.config.n_kv_head not in (None, model.config.n_head):
        lacking["GPT-2"].append(f"model.n_kv_head={model.config.n_kv_head}")
    if not lacking["GPT-2"]:
        return _gpt2_settings(model, end_of_text), _gpt2_tensors(model)
    if not lacking["Llama"]:
        return _llama_settings(model, end_of_text), _llama_tensors(model)
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise UserError(
        f"{nearest}'s layout cannot express {' and '.join(lacking[nearest])}",
        "format=safetensors keeps everything, for tinygpt to load",
    )


def _lacking(config: ModelConfig, holds: Mapping[str, tuple[Any, ...]]) -> list[str]:
    wanted = {name: getattr(config, name) for name in (*holds, *_BOTH_HOLD)}
    known = {**holds, **_BOTH_HOLD}
    return [f"model.{name}={str(value).lower()}" for name, value in wanted.items() if value not in known[name]]


def _common_settings(model: GPT, end_of_text: int | None) -> dict[str, Any]:
    return {
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.config.tie_embeddings,
        # Said also where there is none: their defaults are ids of other vocabularies.
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "pad_token_id": None,
        "dtype": "float32",
    }


def _gpt2_settings(model: GPT, end_of_text: int | None) -> dict[str, Any]:
    config = model.config
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": inner_width(config),
        "n_positions": config.block_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.mlp == "gelu_tanh" else "gelu",
        **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), config.dropout),
        **_common_settings(model, end_of_text),
    }


def _llama_settings(model: GPT, end_of_text: int | None) -> dict[str, Any]:
    config = model.config
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head or config.n_head,
        "head_dim": config.head_dim,
        "hidden_size": config.n_embd,
        "intermediate_size": inner_width(config),
        "max_position_embeddings": config.block_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,  # for transformers 4; the next is for 5
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "hidden_act": "silu",
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "attention_dropout": 0.0,
        **_common_settings(model, end_of_text),
    }


def _gpt2_tensors(model: GPT) -> dict[str, Tensor]:
    theirs = outline(replace(model.config, bias=True), model.vocab_size)  # where we have no bias, they have zeros
    ours = dict(model.named_parameters())
    return {
        name if name.startswith("lm_head") else f"transformer.{name}": _conv1d(name, ours[name].detach())
        if name in ours
        else torch.zeros(parameter.shape)
        for name, parameter in theirs.named_parameters()
    }


def _conv1d(name: str, tensor: Tensor) -> Tensor:
    return tensor.t().contiguous() if name.endswith(_CONV1D) else tensor


def _llama_tensors(model: GPT) -> dict[str, Tensor]:
    sources = {name: llama_sources(name) for name, _ in model.named_parameters()}
    return {
        name if name.startswith("lm_head") else f"model.{name}": part.contiguous()
        for name, part in _parts(model, model.config, sources)
    }
