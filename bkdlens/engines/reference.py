"""The slow, obvious way: TransformerLens' own forward over whole sequences, with registered hooks.

It is the oracle of the engines, and what runs on architectures that :mod:`bkdlens.engines.block` does
not know.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

from bkdlens.data.prompts import Answer, Prompt, pad_id, pad_left, pad_right
from bkdlens.engines.hooks import Hooks, Intervention, Patch, hooked, in_prefill, intervention_hooks
from bkdlens.metrics import sequence_log_prob, token_log_probs
from bkdlens.progress import track


@torch.no_grad()
def sweep(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    patches: Sequence[Patch],
    *,
    progress: bool = False,
) -> Float[Tensor, "2 pair run"]:
    """Mean and first-token log probability of each pair's answer, untouched and under each patch.

    One forward pass over all prompts and answers a patch: prompts padded on the left and answers on
    the right, so that the last prompt token is one shared position.
    """
    device, pad = model.W_E.device, pad_id(model.tokenizer)
    ids, real = pad_left([prompt.ids for prompt in prompts], pad)
    targets, scored = pad_right([answer.ids[: answer.n_scored] for answer in answers], pad)
    tokens = torch.cat([ids, targets[:, :-1]], dim=1).to(device)
    mask = torch.cat([real, scored[:, :-1]], dim=1).int().to(device)
    targets, scored = targets.to(device), scored.to(device)
    last = ids.shape[1] - 1
    runs: list[Hooks] = [[], *([patch.hook(last)] for patch in patches)]
    out = []
    for hooks in track(runs, "patching, one whole pass each", progress):
        with hooked(model, hooks):
            logits = model(tokens, attention_mask=mask)[:, last:]
        found = token_log_probs(logits, targets)
        out.append(torch.stack([sequence_log_prob(found, scored), found[:, 0]]))
    return torch.stack(out, dim=-1)


@torch.no_grad()
def greedy(model: HookedTransformer, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """New tokens of each prompt, under whatever hooks are on the model.

    One batch, padded on the left: hooks with a value for each prompt rely on the prompts' order. Rows
    end before their end-of-sequence token, or where the context is full.
    """
    device, eos = model.W_E.device, model.tokenizer.eos_token_id
    ids, mask = pad_left([prompt.ids for prompt in prompts], pad_id(model.tokenizer))
    room = torch.tensor(
        [min(max_new_tokens, model.cfg.n_ctx - len(prompt.ids)) for prompt in prompts], device=device
    )
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, len(prompts))
    logits = model(ids.to(device), attention_mask=mask.int().to(device), past_kv_cache=cache)
    token = logits[:, -1].argmax(-1)
    out: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros_like(token, dtype=torch.bool)
    for step in range(int(room.max())):
        done |= (token == eos) | (room <= step)
        for i in (~done).nonzero()[:, 0].tolist():
            out[i].append(int(token[i]))
        if bool((done | (room <= step + 1)).all()):
            break
        ones = torch.ones_like(token)[:, None].int()
        token = model(token[:, None], attention_mask=ones, past_kv_cache=cache)[:, -1].argmax(-1)
    return out


def decode(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    max_new_tokens: int,
    *,
    progress: bool = False,
) -> list[list[list[int]]]:
    """New tokens, ``[intervention][prompt]``: one batch of all prompts an intervention."""
    out = []
    for intervention in track(interventions, "decoding, one whole pass each", progress):
        hooks = intervention_hooks(model, [intervention], len(prompts), -1)
        with hooked(model, [(name, in_prefill(hook)) for name, hook in hooks]):
            out.append(greedy(model, prompts, max_new_tokens))
    return out
