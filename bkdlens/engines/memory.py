"""How much memory an engine may take beside the model, and what its batches take of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformer_lens import HookedTransformer

from bkdlens.engines.block import LOGIT_BYTES, MLP_BYTES
from bkdlens.errors import BkdlensError

CPU_GB = 2.0  # what may be taken beside the model where nobody says how much
MOST_PADDING = 1.2  # of a batch's positions, over those that are real
CACHE_BYTES = 2.0**27  # larger batches are no faster on a CPU: they leave its cache and the heap


def batch_bytes(model: HookedTransformer, memory_gb: float | None) -> tuple[float, float]:
    """What one batch may take of the memory that may be taken beside the model, and what it should.

    That memory is what was asked for, or 2 GB on a CPU, or 80 % of what is free on a GPU.

    Raises:
        BkdlensError: for a budget that is not positive.
    """
    device = model.W_E.device
    if memory_gb is not None:
        if not memory_gb > 0:
            raise BkdlensError(f"memory_gb={memory_gb} leaves no room; give a positive number of GB.")
        most = memory_gb * 1e9
    elif device.type == "cuda":
        # What torch has reserved and not handed out is free for us, though not for the driver.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        most = 0.8 * (torch.cuda.mem_get_info(device)[0] + held)
    else:
        most = CPU_GB * 1e9
    most = max(0.0, most - 3 * MLP_BYTES - 3 * LOGIT_BYTES)
    return most, most if device.type == "cuda" else min(most, CACHE_BYTES)


def run_bytes(model: HookedTransformer, prompt: int, tail: int, kept_layers: int = 0) -> float:
    """What a run of ``tail`` tokens takes behind a shared prompt: streams, q, k, v, z and scores."""
    cfg, number = model.cfg, model.W_E.element_size()
    inner, kv = cfg.n_heads * cfg.d_head, (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    tensors = number * tail * (4 * cfg.d_model + 6 * inner + 6 * kv + 2 * kept_layers * kv)
    # Scores are at least float32; both parts, and their softmax, are alive together.
    return tensors + 3 * max(4, number) * tail * cfg.n_heads * (prompt + tail)


def prompt_bytes(model: HookedTransformer, prompt: int) -> float:
    """What a shared prompt takes: keys and values of all layers, and what it takes to run it."""
    cfg, number = model.cfg, model.W_E.element_size()
    inner, kv = cfg.n_heads * cfg.d_head, (cfg.n_key_value_heads or cfg.n_heads) * cfg.d_head
    running = 4 * cfg.d_model + 5 * inner + 6 * kv
    return number * prompt * (2 * cfg.n_layers * kv + running)


def runs_at_once(
    model: HookedTransformer, prompt: int, tail: int, memory_gb: float | None, kept_layers: int = 0
) -> int:
    """How many runs of one tail length fit a batch."""
    _, target = batch_bytes(model, memory_gb)
    return max(1, int(target / run_bytes(model, prompt, tail, kept_layers)))


def batches(
    model: HookedTransformer,
    sizes: Sequence[tuple[int, int]],
    n_runs: int,
    memory_gb: float | None,
    *,
    kept_layers: int = 0,
) -> Iterator[tuple[list[int], int]]:
    """Prompts of like lengths that are run together, and how many runs of each at a time.

    Args:
        model: the model.
        sizes: (tail, prompt) tokens of each prompt.
        n_runs: of each prompt, beside the untouched one.
        memory_gb: the budget.
        kept_layers: of how many layers a run's keys and values are kept.

    Yields:
        The prompts' numbers, and how many runs of each fit at a time.
    """
    most, target = batch_bytes(model, memory_gb)

    def widest(batch: Sequence[int]) -> tuple[int, int]:
        return max(sizes[i][0] for i in batch), max(sizes[i][1] for i in batch)

    def needs(batch: Sequence[int], runs: int) -> float:
        tail, prompt = widest(batch)
        one = prompt_bytes(model, prompt) + runs * run_bytes(model, prompt, tail, kept_layers)
        return len(batch) * one

    def padding(batch: Sequence[int]) -> float:
        """Positions that are run over those that are real."""
        tail, prompt = widest(batch)
        real = sum(sizes[i][1] + (1 + n_runs) * sizes[i][0] for i in batch)
        return len(batch) * (prompt + (1 + n_runs) * tail) / real

    # By length, so that little is padding; a batch is closed as soon as one more prompt is too much.
    batch: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: sizes[i]):
        wider = [*batch, i]
        if batch and (needs(wider, 1 + n_runs) > target or padding(wider) > MOST_PADDING):
            yield batch, n_runs
            batch = []
        batch.append(i)
        # One prompt's runs that do not fit together are run in parts, behind the same prefix.
        if len(batch) == 1 and needs(batch, 1 + n_runs) > most:
            run = needs(batch, 1) - needs(batch, 0)
            yield batch, max(1, int((most - needs(batch, 1)) / run))
            batch = []
    if batch:
        yield batch, n_runs
