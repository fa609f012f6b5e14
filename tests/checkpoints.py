"""Tiny random checkpoints and adapters for tests: every tensor is random, so none can be dropped.

Biases, norm weights and both LoRA factors are drawn too; the weights are large enough for the
logits to vary.  Folders are named misleadingly on purpose.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel, PreTrainedTokenizerFast

VOCAB = 96
_SIZE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_inner": 80, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GATED_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_NEOX_TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

# name -> (architecture, config, LoRA targets, misleading folder)
CASES: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "llama-mha": ("LlamaForCausalLM", _SIZE, _GATED_TARGETS, "gpt2-small"),
    "llama-gqa": ("LlamaForCausalLM", _GROUPED, _GATED_TARGETS, "Llama-3.1-8B-qwen"),
    "llama-head-dim": ("LlamaForCausalLM", _GROUPED | {"head_dim": 12}, _GATED_TARGETS, "gemma-2b"),
    "llama3-rope": (
        "LlamaForCausalLM",
        _GROUPED | {"rope_parameters": _LLAMA3},
        _GATED_TARGETS,
        "mistral",
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        _GROUPED | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        _GATED_TARGETS,
        "my-llama-runs",
    ),
    "qwen2-window": (
        "Qwen2ForCausalLM",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
        _GATED_TARGETS,
        "llama-7b",
    ),
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 16}, _GATED_TARGETS, "Qwen2-llama"),
    "qwen3-mha": (
        "Qwen3ForCausalLM",
        _SIZE | {"num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": True},
        _GATED_TARGETS,
        "gpt-neox",
    ),
    "mistral-window": (
        "MistralForCausalLM",
        _GROUPED | {"sliding_window": 5},
        _GATED_TARGETS,
        "llama-mistral",
    ),
    "mistral": (
        "MistralForCausalLM",
        _GROUPED | {"sliding_window": None, "head_dim": 12},
        _GATED_TARGETS,
        "Mixtral-8x7B",
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        _GROUPED | {"head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 5},
        _GATED_TARGETS,
        "google-gemma-2b",
    ),
    "gpt2": ("GPT2LMHeadModel", _GPT2, ["c_attn", "c_proj", "c_fc"], "my-llama-gpt"),
    "neox-parallel": ("GPTNeoXForCausalLM", _SIZE, _NEOX_TARGETS, "pythia-llama"),
    "neox-sequential": (
        "GPTNeoXForCausalLM",
        _SIZE | {"use_parallel_residual": False},
        _NEOX_TARGETS,
        "gpt-j-6B",
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: ``<pad> <s> </s> <unk> w4 w5 …``; adds no BOS."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(4, VOCAB))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_model(case: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """The random model of a case, in eval mode; ``changes`` go over its config."""
    name, settings, _, _ = CASES[case]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**settings | changes)).eval().requires_grad_(False)
    _randomise(model, seed, lambda name, w: 0.3 if w.dim() > 1 else 0.5)
    return model


def add_lora(model: PreTrainedModel, case: str, seed: int = 1, **options: Any) -> PeftModel:
    """Put a random LoRA on the model, with neither factor zero."""
    settings = {"target_modules": CASES[case][2], "r": 4, "lora_alpha": 6} | options
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
    lora = [(name, w) for name, w in tuned.named_parameters() if "lora_" in name]
    generator = torch.Generator().manual_seed(seed)
    for _, weight in lora:
        weight.data = torch.randn(weight.shape, generator=generator) * 0.3
    return tuned.eval()


def _randomise(model: torch.nn.Module, seed: int, scale: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator) * scale(name, weight)
        is_norm = weight.dim() == 1 and name.endswith("weight")
        weight.data = noise + 1 if is_norm else noise


def save_base(folder: Path, case: str, seed: int = 0, **changes: Any) -> Path:
    """Write the case's base under ``folder`` in its misleading folder, with a tokenizer."""
    where = folder / CASES[case][3]
    make_model(case, seed, **changes).save_pretrained(where)
    make_tokenizer().save_pretrained(where)
    return where


def save_pair(folder: Path, case: str, **options: Any) -> tuple[Path, Path]:
    """Write base and adapter; returns both folders."""
    base, adapter = save_base(folder, case), folder / "some-llama-adapter"
    add_lora(make_model(case), case, **options).save_pretrained(adapter)
    return base, adapter


class _Float64(TorchFunctionMode):
    """Within it, what asks torch for float32 by name gets float64: norms, rotary angles, the softmax."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.asarray, torch.frombuffer, torch.Tensor.view):  # these name what bytes mean
            return func(*args, **kwargs)
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if value is torch.float32 else value for k, value in kwargs.items()}
        return func(*args, **kwargs)


@contextmanager
def float64() -> Iterator[None]:
    """Within it everything is computed in float64, without gradients, also where code asks for float32.

    So ``load`` merges, converts and compares in float64.  ``model.double()`` would not do: transformers
    computes norms, rotary angles and softmax in float32, and what was merged in float32 stays rounded.
    """

    def from_pretrained(cls: Any, *args: Any, **options: Any) -> Any:  # it copies weights in threads
        return real(cls, *args, **options | {"dtype": torch.float64})

    real = PreTrainedModel.from_pretrained.__func__
    with pytest.MonkeyPatch.context() as patch, _Float64(), torch.no_grad():
        patch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def edit_json(file: Path, **changes: Any) -> None:
    """Change some keys of a JSON file; ``None`` values are written as null."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (``None``) remove tensors of a safetensors file; ``__`` stands for a dot."""
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})
