"""The fewest multiply-adds that exact patching needs, counted, and the rate of the machine at them.

Counted as :mod:`bkdlens.engines.sweep` runs: everything that several runs share is counted once, a
patched run from where it begins to differ. Norms, activation functions, softmax and rotary embeddings
count nothing.
"""

from __future__ import annotations

import torch
from transformer_lens import HookedTransformer

from benchmarks.workloads import median_seconds
from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines.prefix import common_length


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int = 2048) -> float:
    """Multiply-adds a second of a large square product, the median of 9."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def run() -> None:
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return side**3 / median_seconds(run, 9)


def exact_sweep(model: HookedTransformer, prompts: list[Prompt], answers: list[Answer]) -> float:
    """Multiply-adds of all heads of all pairs."""
    cfg = model.cfg
    layers, d = cfg.n_layers, cfg.d_model
    inner, kv = cfg.n_heads * cfg.d_head, (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    qkv, out, mlp = d * (inner + 2 * kv), inner * d, 3 * d * (cfg.d_mlp or 0)
    vocab = d * cfg.d_vocab_out

    def attention(first: int, last: int) -> int:
        """Scores and their products with the values, of queries at positions ``first`` to ``last``."""
        return sum(2 * inner * (position + 1) for position in range(first, last + 1))

    shared = common_length(prompts) if len(prompts) > 1 else 0

    def prefill(first: int, end: int) -> int:
        """Positions ``first`` to ``end`` - 1; of the last layer the keys and values alone."""
        whole = (end - first) * (qkv + out + mlp) + attention(first, end - 1)
        return (layers - 1) * whole + (end - first) * 2 * d * kv

    total = prefill(0, shared)
    for prompt, answer in zip(prompts, answers, strict=True):
        n, tail = len(prompt.ids), answer.n_scored
        total += prefill(shared, n - 1)
        seen = attention(n - 1, n + tail - 2)
        layer = tail * (qkv + out + mlp) + seen
        total += layers * layer + tail * vocab  # the untouched run
        joining = cfg.d_head * d + mlp  # one head's change, and the MLP at the last prompt token
        second = qkv + seen + tail * (out + mlp)
        for patched in range(layers):
            above = layers - 1 - patched
            run = joining + (second + (above - 1) * layer + tail * vocab if above else vocab)
            total += cfg.n_heads * run
    return float(total)
