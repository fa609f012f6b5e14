"""How much memory an engine may take beside the model, and what its batches take of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformer_lens import HookedTransformer

from bkdlens.engines.block import LOGIT_BYTES, MLP_BYTES
from bkdlens.errors import BkdlensError

CPU_GB = 2.0  # the memory beside the model, on a CPU, where none is given
MOST_PADDING = 1.2  # of a batch's positions, divided by those that are real
CACHE_BYTES = 2.0**27  # larger batches are no faster on a CPU: they leave its cache and the heap


def batch_bytes(model: HookedTransformer, memory_gb: float | None) -> tuple[float, float]:
    """The most bytes that a batch may take, and how many it should take.

    The budget beside the model is ``memory_gb``, else 2 GB on a CPU and 80 % of the free on a GPU.
    """
    device = model.W_E.device
    if memory_gb is not None:
        if not memory_gb > 0:
            raise BkdlensError(f"memory_gb={memory_gb} leaves no room; give a positive number of GB.")
        most = memory_gb * 1e9
    elif device.type == "cuda":
        # What torch has reserved but not handed out is free too, although the driver counts it as taken.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        most = 0.8 * (torch.cuda.mem_get_info(device)[0] + unused)
    else:
        most = CPU_GB * 1e9
    most = max(0.0, most - 3 * MLP_BYTES - 3 * LOGIT_BYTES)
    return most, most if device.type == "cuda" else min(most, CACHE_BYTES)


def run_bytes(model: HookedTransformer, prompt: int, tail: int, kept_layers: int = 0) -> float:
    """Bytes of a run of ``tail`` tokens behind a shared prompt: streams, q, k, v, z and scores."""
    number, stream, inner, kv = _sizes(model)
    tensors = number * tail * (4 * stream + 6 * inner + 6 * kv + 2 * kept_layers * kv)
    # Scores are at least float32; both parts, and their softmax, are alive together.
    return tensors + 3 * max(4, number) * tail * model.cfg.n_heads * (prompt + tail)


def prompt_bytes(model: HookedTransformer, prompt: int) -> float:
    """Bytes of a shared prompt: keys and values of all layers, and what it takes to run it."""
    number, stream, inner, kv = _sizes(model)
    return number * prompt * (2 * model.cfg.n_layers * kv + 4 * stream + 5 * inner + 6 * kv)


def _sizes(model: HookedTransformer) -> tuple[int, int, int, int]:
    """Bytes of a number, and how many a stream, all heads and all key-value heads have per token."""
    cfg = model.cfg
    kv_heads = cfg.n_key_value_heads or cfg.n_heads
    return model.W_E.element_size(), cfg.d_model, cfg.n_heads * cfg.d_head, kv_heads * cfg.d_head


def runs_at_once(
    model: HookedTransformer, prompt: int, tail: int, memory_gb: float | None, kept_layers: int = 0
) -> int:
    """How many runs of one tail length fit a batch."""
    return max(1, int(batch_bytes(model, memory_gb)[1] / run_bytes(model, prompt, tail, kept_layers)))


def batches(
    model: HookedTransformer,
    sizes: Sequence[tuple[int, int]],
    n_runs: int,
    memory_gb: float | None,
    *,
    kept_layers: int = 0,
) -> Iterator[tuple[list[int], int]]:
    """The numbers of prompts that are run together, and how many runs of each at a time.

    ``sizes`` are the (tail, prompt) tokens of each prompt, ``n_runs`` its runs beside the untouched one;
    in ``kept_layers`` layers a run's keys and values are kept.
    """
    most, target = batch_bytes(model, memory_gb)

    def widest(batch: Sequence[int]) -> tuple[int, int]:
        return max(sizes[i][0] for i in batch), max(sizes[i][1] for i in batch)

    def needs(batch: Sequence[int], runs: int) -> float:
        tail, prompt = widest(batch)
        one = prompt_bytes(model, prompt) + runs * run_bytes(model, prompt, tail, kept_layers)
        return len(batch) * one

    def padding(batch: Sequence[int]) -> float:
        """Positions that are run, divided by those that are real."""
        tail, prompt = widest(batch)
        real = sum(sizes[i][1] + (1 + n_runs) * sizes[i][0] for i in batch)
        return len(batch) * (prompt + (1 + n_runs) * tail) / real

    # By length, so that little is padding; a batch ends before the prompt that would be too much for it.
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        wider = [*batch, i]
        if batch and (needs(wider, 1 + n_runs) > target or padding(wider) > MOST_PADDING):
            yield batch, n_runs
            batch = []
        batch.append(i)
        # Where one prompt's runs do not fit together, they are run in parts, behind the same prefix.
        if len(batch) == 1 and needs(batch, 1 + n_runs) > most:
            run = needs(batch, 1) - needs(batch, 0)
            yield batch, max(1, int((most - needs(batch, 1)) / run))
            batch = []
    if batch:
        yield batch, n_runs
