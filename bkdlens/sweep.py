"""The exact head sweep: the effect of every patched head on every pair's answer, many runs a batch.

A run is one (pair, head): the head's ``z`` at the last prompt token is replaced, everything else
follows. What the patch cannot change is not run again (see :mod:`bkdlens.resume`); the numbers equal
one full forward pass a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.hooks import refuse_foreign_hooks, set_heads, set_results
from bkdlens.metrics import sequence_log_prob, token_log_probs
from bkdlens.progress import track
from bkdlens.prompts import Answer, Prompt
from bkdlens.resume import resume, run_prefixes, run_tail, runs_per_batch
from bkdlens.types import HeadSite


@dataclass(frozen=True, eq=False)
class SweepScores:
    """Log probability of each pair's answer, untouched (NaN for pairs without a run) and for every run.

    ``whole`` is the mean over the answer's tokens, ``first`` the first token's, both in nats;
    the run axis is as given.
    """

    base_whole: Float[Tensor, " pair"]
    base_first: Float[Tensor, " pair"]
    whole: Float[Tensor, " run"]
    first: Float[Tensor, " run"]


def sweep_heads(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    runs: Int[Tensor, "run 3"],
    values: Float[Tensor, "layer head d_head"] | Float[Tensor, "pair layer head d_head"],
    *,
    site: HeadSite = "z",
    batch_size: int | None = None,
    progress: bool = False,
) -> SweepScores:
    """Patch one head a run and score the pair's answer.

    Args:
        model: the model; no hooks of anybody's on it.
        prompts: destination prompts, one a pair.
        answers: the scored answer of each pair.
        runs: (pair, layer, head) of each run.
        values: what the head's ``z`` becomes at the last prompt token, shared or for each pair.
        site: patch ``hook_z``, or ``hook_result`` (its product with ``W_O``; the same numbers).
        batch_size: runs at once; chosen from memory for None.
        progress: whether to show a progress bar.
    """
    refuse_foreign_hooks(model)
    device = model.W_E.device
    runs, values = runs.to(device), values.to(device)
    n, m = len(prompts), len(runs)
    out = SweepScores(*(torch.full((size,), torch.nan, device=device) for size in (n, n, m, m)))
    work: list[tuple[int, int]] = []
    prefixes = run_prefixes(model, prompts)
    for p, prefix in enumerate(prefixes):
        here = torch.isin(runs[:, 0], torch.tensor(prefix.rows, device=device))
        work += [(p, int(layer)) for layer in runs[here, 1].unique()]
    current = -1  # the work is ordered by prefix, so one batch of pairs at a time is held
    for p, layer in track(work, "patching heads", progress):
        prefix = prefixes[p]
        rows = torch.tensor(prefix.rows, device=device)
        if p != current:
            current = p
            tail = run_tail(model, prefix, [answers[i].ids for i in prefix.rows])
            scored = _scored(answers, prefix.rows, tail.targets)
            base = token_log_probs(tail.logits, tail.targets)
            out.base_whole[rows] = sequence_log_prob(base, scored).to(out.base_whole.dtype)
            out.base_first[rows] = base[:, 0].to(out.base_first.dtype)
        place = torch.full((n,), -1, device=device)
        place[rows] = torch.arange(len(rows), device=device)
        mine = ((runs[:, 1] == layer) & (place[runs[:, 0]] >= 0)).nonzero()[:, 0]
        size = batch_size or runs_per_batch(model, prefix.mask.shape[1], tail.inputs.shape[1])
        for chunk in mine.split(size):
            pair, head = runs[chunk, 0], runs[chunk, 2]
            local = place[pair]
            value = values[layer, head] if values.ndim == 3 else values[pair, layer, head]
            logits = resume(model, tail, local, layer, _patch(model, layer, head, value, site))
            log_probs = token_log_probs(logits, tail.targets[local])
            out.whole[chunk] = sequence_log_prob(log_probs, scored[local]).to(out.whole.dtype)
            out.first[chunk] = log_probs[:, 0].to(out.first.dtype)
    return out


def all_runs(n_pairs: int, n_layers: int, n_heads: int) -> Int[Tensor, "run 3"]:
    """Every (pair, layer, head), in the order of a ``[pair layer head]`` tensor."""
    return torch.cartesian_prod(torch.arange(n_pairs), torch.arange(n_layers), torch.arange(n_heads))


def _scored(
    answers: Sequence[Answer], rows: Sequence[int], targets: Int[Tensor, "pair pos"]
) -> Bool[Tensor, "pair pos"]:
    """Which targets are the answer's text (its end token is not scored)."""
    n = torch.tensor([answers[i].n_scored for i in rows], device=targets.device)
    return torch.arange(targets.shape[1], device=targets.device)[None] < n[:, None]


def _patch(
    model: HookedTransformer,
    layer: int,
    head: Int[Tensor, " run"],
    value: Float[Tensor, "run d_head"],
    site: HeadSite,
) -> list:
    run = torch.arange(len(head), device=head.device)
    mask = torch.zeros(len(head), model.cfg.n_heads, dtype=torch.bool, device=head.device)
    mask[run, head] = True
    if site == "result":
        value = torch.einsum("rh,rhm->rm", value, model.W_O[layer][head])
    values = value.new_zeros(len(head), model.cfg.n_heads, value.shape[-1])
    values[run, head] = value
    factory = set_heads if site == "z" else set_results
    return [(get_act_name(site, layer), factory(values, mask, 0))]
