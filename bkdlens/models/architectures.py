"""From a Hugging Face config to a ``HookedTransformerConfig``, one small function per architecture.

TransformerLens' own ``convert_hf_model_config`` guesses the architecture from words in the path
("llama" in a folder's name), caps ``n_ctx`` and computes ``d_head`` as ``hidden_size // n_heads``.
Here the architecture is what the checkpoint's ``config.json`` declares, every number comes from
that config, and whatever TransformerLens would silently drop is refused.  Only its weight
converters are reused; no weight is folded, centred or moved.

Sources: TransformerLens 3.9 ``loading_from_pretrained.py`` and ``pretrained/weight_conversions``;
transformers 5 ``models/*/modeling_*.py`` and ``modeling_rope_utils.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformer_lens import HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions import (
    convert_gemma_weights,
    convert_gpt2_weights,
    convert_llama_weights,
    convert_mistral_weights,
    convert_neox_weights,
    convert_qwen2_weights,
    convert_qwen3_weights,
)
from transformers import PreTrainedModel

from bkdlens.errors import CheckpointError
from bkdlens.types import Architecture

# Activations whose names mean the same function in transformers and in TransformerLens.
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class Conversion:
    """How the models of one architecture become a ``HookedTransformer``."""

    fields: Callable[[Any], dict[str, Any]]  # config -> fields of ``HookedTransformerConfig``
    weights: Callable[[Any, HookedTransformerConfig], dict[str, torch.Tensor]]  # by TransformerLens


def conversion(architecture: object) -> Conversion:
    """The conversion of the architecture that ``config.json`` declares; raise if there is none."""
    if architecture not in CONVERSIONS:
        raise CheckpointError(
            f"Architecture {architecture!r} is not supported; supported are: {', '.join(CONVERSIONS)}."
        )
    return CONVERSIONS[architecture]


def hooked_config(name: str, config: Any) -> HookedTransformerConfig:
    """The config of what ``config`` describes, float32 on the CPU; raise if that cannot be computed."""
    fields = {
        "original_architecture": name,
        "d_vocab": config.vocab_size,
        "dtype": torch.float32,
        "device": "cpu",
        "init_weights": False,
        "default_prepend_bos": False,  # load() sets it to what the tokenizer itself does
        **conversion(name).fields(config),
    }
    _only("activation", fields["act_fn"], ACTIVATIONS)
    return HookedTransformerConfig(**fields)


def hooked_weights(
    name: str, model: PreTrainedModel, cfg: HookedTransformerConfig
) -> dict[str, torch.Tensor]:
    """The weights under TransformerLens' names, as detached views of ``model``'s own storage.

    Tied embeddings become two tensors: editing ``W_U`` must not edit ``W_E``.
    """
    state = {key: w.detach() for key, w in conversion(name).weights(model, cfg).items()}
    if state["unembed.W_U"].data_ptr() == state["embed.W_E"].data_ptr():
        state["unembed.W_U"] = state["unembed.W_U"].clone()
    return state


def _only(what: str, given: object, allowed: tuple[object, ...]) -> None:
    if given not in allowed:
        names = " or ".join(map(repr, allowed))
        raise CheckpointError(
            f"This checkpoint has {what} {given!r}, which TransformerLens would not compute "
            f"correctly; supported is {names}."
        )


def _rope(config: Any) -> dict[str, Any]:
    """Rotary fields; transformers 5 keeps them in ``rope_parameters`` (default or ``llama3``)."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    _only("rope scaling", kind, ("default", "llama3"))
    fields = {
        "positional_embedding_type": "rotary",
        "rotary_adjacent_pairs": False,
        "rotary_base": rope["rope_theta"],
    }
    if kind == "llama3":  # https://arxiv.org/abs/2309.00071, section 3.2
        fields |= {
            "use_NTK_by_parts_rope": True,
            "NTK_by_parts_factor": rope["factor"],
            "NTK_by_parts_low_freq_factor": rope["low_freq_factor"],
            "NTK_by_parts_high_freq_factor": rope["high_freq_factor"],
            "NTK_original_ctx_len": rope["original_max_position_embeddings"],
        }
    return fields


def _windows(config: Any, layer_types: list[str] | None) -> dict[str, Any]:
    """Sliding windows per layer; a key is seen if ``key > query - window`` in both libraries."""
    layer_types = layer_types or ["full_attention"] * config.num_hidden_layers
    for kind in layer_types:
        _only("attention layer", kind, ("full_attention", "sliding_attention"))
    if config.sliding_window is None or "sliding_attention" not in layer_types:
        return {}
    return {
        "use_local_attn": True,
        "window_size": config.sliding_window,
        "attn_types": ["local" if kind.startswith("sliding") else "global" for kind in layer_types],
    }


def _gated(config: Any, *, grouped: bool = True) -> dict[str, Any]:
    """What Llama, Qwen, Mistral and Gemma share: RMS norms, rotary positions, a gated MLP.

    ``grouped`` says that the weight converter always writes grouped keys and values (``_W_K``);
    Llama's and Qwen3's do so only if there are fewer of them than heads.
    """
    d_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    _only("partial rotary factor", rope.get("partial_rotary_factor") or 1.0, (1.0,))
    # TransformerLens' converters have no place for these biases and would drop them.
    _only("attention_bias", getattr(config, "attention_bias", False), (False,))
    _only("mlp_bias", getattr(config, "mlp_bias", False), (False,))
    grouped = grouped or config.num_key_value_heads != config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "n_key_value_heads": config.num_key_value_heads if grouped else None,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.rms_norm_eps,
        "act_fn": getattr(config, "hidden_activation", None) or config.hidden_act,
        "normalization_type": "RMS",
        "final_rms": True,
        "gated_mlp": True,
        "rotary_dim": d_head,
        **_rope(config),
    }


def _qwen2(config: Any) -> dict[str, Any]:
    return _gated(config) | _windows(config, config.layer_types)


def _qwen3(config: Any) -> dict[str, Any]:
    fields = _gated(config, grouped=False) | _windows(config, config.layer_types)
    return fields | {"use_qk_norm": True}


def _mistral(config: Any) -> dict[str, Any]:
    # transformers ignores layer_types here and gives every layer the window, or none.
    every_layer = ["sliding_attention"] * config.num_hidden_layers
    return _gated(config) | _windows(config, every_layer)


def _gemma2(config: Any) -> dict[str, Any]:
    _only("use_bidirectional_attention", bool(config.use_bidirectional_attention), (False,))
    fields = _gated(config) | _windows(config, config.layer_types)
    return fields | {
        "attn_scale": config.query_pre_attn_scalar**0.5,
        "attn_scores_soft_cap": config.attn_logit_softcapping or -1.0,  # -1: no cap
        "output_logits_soft_cap": config.final_logit_softcapping or -1.0,
        "use_normalization_before_and_after": True,
    }


def _gpt2(config: Any) -> dict[str, Any]:
    _only("add_cross_attention", config.add_cross_attention, (False,))
    return {
        "d_model": config.n_embd,
        "d_head": config.n_embd // config.n_head,
        "n_heads": config.n_head,
        "d_mlp": config.n_inner or 4 * config.n_embd,
        "n_layers": config.n_layer,
        "n_ctx": config.n_positions,
        "eps": config.layer_norm_epsilon,
        "act_fn": config.activation_function,
        "use_attn_scale": config.scale_attn_weights,
        "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
        "normalization_type": "LN",
    }


def _neox(config: Any) -> dict[str, Any]:
    _only("attention_bias", config.attention_bias, (True,))
    d_head = config.hidden_size // config.num_attention_heads
    return {
        "d_model": config.hidden_size,
        "d_head": d_head,
        "n_heads": config.num_attention_heads,
        "d_mlp": config.intermediate_size,
        "n_layers": config.num_hidden_layers,
        "n_ctx": config.max_position_embeddings,
        "eps": config.layer_norm_eps,
        "act_fn": config.hidden_act,
        "normalization_type": "LN",
        "parallel_attn_mlp": config.use_parallel_residual,
        "rotary_dim": int(d_head * (config.rope_parameters.get("partial_rotary_factor") or 1.0)),
        **_rope(config),
    }


CONVERSIONS: dict[Architecture, Conversion] = {
    "LlamaForCausalLM": Conversion(partial(_gated, grouped=False), convert_llama_weights),
    "Qwen2ForCausalLM": Conversion(_qwen2, convert_qwen2_weights),
    "Qwen3ForCausalLM": Conversion(_qwen3, convert_qwen3_weights),
    "MistralForCausalLM": Conversion(_mistral, convert_mistral_weights),
    "Gemma2ForCausalLM": Conversion(_gemma2, convert_gemma_weights),
    "GPT2LMHeadModel": Conversion(_gpt2, convert_gpt2_weights),
    "GPTNeoXForCausalLM": Conversion(_neox, convert_neox_weights),
}
