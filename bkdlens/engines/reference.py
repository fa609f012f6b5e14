"""The slow, obvious way: TransformerLens' own forward over whole sequences, with registered hooks.

It is the engines' oracle, and runs the architectures that :mod:`bkdlens.engines.block` does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache
from transformer_lens.utils import get_act_name

from bkdlens.data.prompts import Answer, Prompt, pad_id, pad_left, pad_right
from bkdlens.engines.hooks import Intervention, Patch, from_end, hooked, in_prefill, intervention_hooks
from bkdlens.metrics import sequence_log_prob, token_log_probs
from bkdlens.progress import track


@dataclass(frozen=True, eq=False)
class Padded:
    """Prompts padded on the left and answers padded on the right, on the model's device."""

    tokens: Int[Tensor, "prompt pos"]  # prompts and all scored tokens of the answers but the last
    mask: Int[Tensor, "prompt pos"]  # which tokens are not padding
    targets: Int[Tensor, "prompt target"]  # the scored tokens of the answers
    scored: Bool[Tensor, "prompt target"]  # which targets are not padding
    last: int  # the index of every prompt's last token

    @classmethod
    def of(
        cls, model: HookedTransformer, prompts: Sequence[Prompt], answers: Sequence[Answer] | None = None
    ) -> Padded:
        """The prompts with one answer each, or alone."""
        device, pad = model.W_E.device, pad_id(model.tokenizer)
        ids, real = pad_left([prompt.ids for prompt in prompts], pad)
        rows = [()] * len(prompts) if answers is None else [answer.scored for answer in answers]
        targets, scored = pad_right(rows, pad)
        tokens = torch.cat([ids, targets[:, :-1]], dim=1).to(device)
        mask = torch.cat([real, scored[:, :-1]], dim=1).int().to(device)
        return cls(tokens, mask, targets.to(device), scored.to(device), ids.shape[1] - 1)

    def at(self, position: int) -> int:
        """The index of a position that is counted from the prompts' end and is inside all of them."""
        shortest = int(self.mask[:, : self.last + 1].sum(1).min())
        return self.last + 1 - shortest + from_end(shortest, position)

    def logits(self, model: HookedTransformer) -> Float[Tensor, "prompt pos d_vocab"]:
        """Logits of one whole forward pass from the last prompt token on, which predict the targets."""
        return model(self.tokens, attention_mask=self.mask)[:, self.last :]


@torch.no_grad()
def activations(
    model: HookedTransformer, prompts: Sequence[Prompt], names: Sequence[str], position: int = -1
) -> ActivationCache:
    """Activations at a position counted from the prompts' end, ``[prompt 1 …]`` by hook name."""
    batch = Padded.of(model, prompts)
    at = batch.at(position)
    kept = {"names_filter": list(names), "pos_slice": slice(at, at + 1), "return_type": None}
    return model.run_with_cache(batch.tokens, attention_mask=batch.mask, **kept)[1]


def stack_layers(
    activations: Mapping[str, Tensor] | ActivationCache, site: str, n_layers: int
) -> Float[Tensor, "prompt layer ..."]:
    """A site's activations in all layers, from those by hook name at one position, ``[prompt 1 …]``."""
    return torch.stack([activations[get_act_name(site, i)][:, 0] for i in range(n_layers)], dim=1)


def head_z(
    model: HookedTransformer, prompts: Sequence[Prompt], position: int = -1
) -> Float[Tensor, "prompt layer head d_head"]:
    """``hook_z`` of every head at a position counted from the prompts' end."""
    n = model.cfg.n_layers
    names = [get_act_name("z", layer) for layer in range(n)]
    return stack_layers(activations(model, prompts, names, position), "z", n)


@torch.no_grad()
def sweep(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    patches: Sequence[Patch],
    *,
    position: int = -1,
    progress: bool = False,
) -> Float[Tensor, "2 pair run"]:
    """Mean and first-token log probability of each answer, in nats, untouched and under each patch.

    It takes one forward pass per patch, which acts at a position counted from the prompts' end.
    """
    batch = Padded.of(model, prompts, answers)
    at = batch.at(position)
    out = []
    for patch in track([None, *patches], "patching, one whole pass each", progress):
        with hooked(model, [] if patch is None else [patch.hook(at)]):
            log_probs = token_log_probs(batch.logits(model), batch.targets)
        out.append(torch.stack([sequence_log_prob(log_probs, batch.scored), log_probs[:, 0]]))
    return torch.stack(out, dim=-1)


@torch.no_grad()
def greedy(model: HookedTransformer, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """New tokens of each prompt without the end token, under whatever hooks are on the model.

    They are one batch in the prompts' order, because hooks with one value per prompt rely on it.
    """
    device, eos = model.W_E.device, model.tokenizer.eos_token_id
    batch, n_ctx = Padded.of(model, prompts), model.cfg.n_ctx
    room = torch.tensor([min(max_new_tokens, n_ctx - len(p.ids)) for p in prompts], device=device)
    cache = TransformerLensKeyValueCache.init_cache(model.cfg, device, len(prompts))
    logits = model(batch.tokens, attention_mask=batch.mask, past_kv_cache=cache)
    token = logits[:, -1].argmax(-1)
    new: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros_like(token, dtype=torch.bool)
    for step in range(int(room.max())):
        done |= (token == eos) | (room <= step)
        for i in (~done).nonzero()[:, 0].tolist():
            new[i].append(int(token[i]))
        if bool((done | (room <= step + 1)).all()):  # no prompt has room for another token
            break
        ones = torch.ones_like(token)[:, None].int()
        token = model(token[:, None], attention_mask=ones, past_kv_cache=cache)[:, -1].argmax(-1)
    return new


def decode(
    model: HookedTransformer,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    max_new_tokens: int,
    *,
    progress: bool = False,
) -> list[list[list[int]]]:
    """New tokens ``[intervention][prompt]``, from one batch of all prompts per intervention."""
    out = []
    for intervention in track(interventions, "decoding, one whole pass each", progress):
        hooks = intervention_hooks(model, [intervention], len(prompts), -1)
        with hooked(model, [(name, in_prefill(hook)) for name, hook in hooks]):
            out.append(greedy(model, prompts, max_new_tokens))
    return out
