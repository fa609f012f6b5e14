"""``python -m benchmarks.gpu_7b``: 7B shapes, random bfloat16 weights, one GPU, under 9 minutes.

Seconds and peak memory of the exact sweep of all heads of 96 pairs, its roofline fraction, and how many
(prompt, intervention) answers are judged a minute. Writes ``results_gpu.json`` and RESULTS.md anew.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks import counts, results
from benchmarks.workloads import SHAPES, Shape, lengths, word_tokenizer
from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines.generate import decode
from bkdlens.engines.hooks import Intervention, Patch, Vector
from bkdlens.engines.sweep import sweep_patches
from bkdlens.models.architectures import hooked_config, hooked_weights

SECONDS = 8 * 60  # after which no further line is begun
MEMORY_GB = 22.0  # beside the model

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 1024,
}  # fmt: skip
QWEN = {
    "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS: dict[str, tuple[type, type, dict[str, int]]] = {
    "Llama-2-7B": (LlamaConfig, LlamaForCausalLM, LLAMA),
    "Qwen2.5-7B": (Qwen2Config, Qwen2ForCausalLM, QWEN),
    "tiny": (LlamaConfig, LlamaForCausalLM, TINY),
}


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> HookedTransformer:
    """A random model of that shape, its weights laid out as :func:`bkdlens.load` leaves them."""
    config_class, model_class, fields = MODELS[name]
    config = config_class(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            hf = model_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    cfg = hooked_config(model_class.__name__, config)
    cfg.dtype = dtype
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = HookedTransformer(cfg, move_to_device=False)
    model.load_state_dict(hooked_weights(model_class.__name__, hf, cfg), strict=False, assign=True)
    model.cfg.device = str(device)
    model.to(device, print_details=False)
    # Only its end token is needed; a vocabulary of words would take minutes to make.
    model.tokenizer = word_tokenizer(16)
    return model.eval().requires_grad_(False)


def measure(
    name: str, shape: Shape, n_pairs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """One line of the table."""
    model = random_model(name, device, dtype)
    cfg, rng = model.cfg, random.Random(shape.name)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(4, cfg.d_vocab) for _ in range(n)]

    begin, answer = tokens(shape.common), tokens(shape.answer)
    prompts = [
        Prompt("", (*begin, *tokens(max(2, length - shape.common))))
        for length in lengths(shape, n_pairs, rng)
    ]
    answers = [Answer("", tuple(answer), len(answer))] * n_pairs
    torch.manual_seed(0)
    z = 0.1 * torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head, device=device, dtype=dtype)
    patches = [Patch("z", i, z[i, j], j) for i in range(cfg.n_layers) for j in range(cfg.n_heads)]

    def seconds(run: Any) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter() - start

    sweep_patches(model, prompts[:1], answers[:1], patches, memory_gb=MEMORY_GB)  # warm
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    swept = seconds(lambda: sweep_patches(model, prompts, answers, patches, memory_gb=MEMORY_GB))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    rate = counts.matmul_rate(device, dtype, 8192 if device.type == "cuda" else 256)
    interventions = [
        Intervention(vectors=(Vector("resid_pre", layer, sign * torch.randn(cfg.d_model)),))
        for layer in range(cfg.n_layers)
        for sign in (1.0, -1.0)
    ]
    judged = seconds(
        lambda: decode(
            model, prompts, interventions, [answers], finish=False, max_new_tokens=shape.answer,
            memory_gb=MEMORY_GB,
        )
    )  # fmt: skip
    return {
        "model": name, "shape": shape.name, "answer": shape.answer, "pairs": n_pairs,
        "sweep_seconds": swept, "peak_gb": peak / 1e9,
        "roofline": counts.exact_sweep(model, prompts, answers) / (rate * swept),
        "evaluations_per_minute": 60 * n_pairs * len(interventions) / judged,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_7b", description=__doc__)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=["Llama-2-7B", "Qwen2.5-7B"])
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU; try --device cpu --models tiny --pairs 4.")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start, rows = perf_counter(), []
    for name in given.models:
        for shape in SHAPES:
            if perf_counter() - start > SECONDS:
                print(f"{name}, {shape.name}: left out, the time is up")
                continue
            short = replace(shape, lengths=(*shape.lengths[:4], min(shape.lengths[4], 250)))
            rows.append(measure(name, short, given.pairs, device, dtype))
            print(json.dumps(rows[-1]), flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    machine = torch.cuda.get_device_name() if device.type == "cuda" else results.machine()
    given.out.mkdir(parents=True, exist_ok=True)
    content = {"machine": machine, "rows": rows}
    (given.out / "results_gpu.json").write_text(json.dumps(content, indent=1) + "\n")
    if (given.out / "results.json").exists():
        results.write(given.out)


if __name__ == "__main__":
    main()
