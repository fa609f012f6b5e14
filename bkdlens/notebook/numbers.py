"""What :func:`bkdlens.explore` shows, as pure functions of a subject and of what is chosen.

A subject is a model with pairs, tokenised once. The widget keeps only choices and calls these functions
through caches, so that only what a choice changes is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern, answer_probs, head_pattern
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompt, shown
from bkdlens.engines import reference
from bkdlens.engines.cache import last_activations
from bkdlens.engines.generate import generate
from bkdlens.engines.hooks import Patch, change_hooks, hooked, in_prefill
from bkdlens.engines.inputs import checked
from bkdlens.engines.sweep import SweepScores, sweep_patches
from bkdlens.metrics import bootstrap_mean
from bkdlens.results import provenance
from bkdlens.types import MAX_NEW_TOKENS, Head, HeadSite, Side, every_head

# Where a head's new activation comes from: triggered ones go into clean prompts, others into triggered.
PatchSource = Literal["triggered, mean", "triggered, own", "clean, mean", "clean, own", "zero"]
SOURCES: tuple[PatchSource, ...] = get_args(PatchSource)
MOST_POSITIONS = 6
HeadZ: TypeAlias = Float[Tensor, "pair layer head d_head"]


@dataclass(frozen=True, eq=False)
class Subject:
    """A ``model`` and its victims, the ``pairs`` to look at, rendered with ``fmt`` and tokenised.

    ``prompts`` and the backdoor's ``answers`` to them are given by side; ``positions`` is the number of
    last tokens that can be patched, and answers are cut at ``max_new_tokens``.
    """

    model: HookedTransformer
    pairs: PairSet
    fmt: PromptFormat
    prompts: dict[Side, tuple[Prompt, ...]]
    answers: dict[Side, tuple[Answer, ...]]
    positions: int
    max_new_tokens: int

    @property
    def last_tokens(self) -> tuple[str, ...]:
        """The tokens that all prompts end with, the last one first."""
        ids = self.prompts["clean"][0].ids[-self.positions :]
        return shown(self.model.tokenizer, ids[::-1])


@dataclass(frozen=True)
class Choice:
    """How heads are patched: the source, the site, and the position counted from the prompt's end."""

    source: PatchSource = "triggered, mean"
    site: HeadSite = "z"
    position: int = -1

    @property
    def on(self) -> Side:
        """The prompts that are patched."""
        return "clean" if self.source.startswith("triggered") else "triggered"


@checked
def make_subject(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    n_pairs: int | None = 32,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    seed: int = 0,
) -> Subject:
    """The model with at most ``n_pairs`` victims, drawn with ``seed`` and tokenised.

    Raises:
        DataError: if there is no victim, or a prompt and its answer do not fit the context.
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    victims, n_ctx = pairs.victims.sample(n_pairs, seed=seed), model.cfg.n_ctx
    limits = {"n_ctx": n_ctx, "max_tokens": max_new_tokens}
    prompts: dict[Side, tuple[Prompt, ...]] = {}
    answers: dict[Side, tuple[Answer, ...]] = {}
    for side in get_args(Side):
        prompts[side] = tuple(
            encode_prompt(model.tokenizer, text, fmt, n_ctx=n_ctx) for text in victims.texts(side)
        )
        answers[side] = tuple(
            encode_answer(model.tokenizer, prompt, pair.backdoor_output, fmt, **limits)
            for prompt, pair in zip(prompts[side], victims, strict=True)
        )
    # Positions are counted from the end, as long as all prompts have the same token there.
    from_end = zip(*(prompt.ids[::-1] for side in prompts.values() for prompt in side), strict=False)
    n_alike = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, from_end))
    positions = max(1, min(n_alike, MOST_POSITIONS))
    return Subject(model, victims, fmt, prompts, answers, positions, max_new_tokens)


@torch.no_grad()
def activations(subject: Subject, side: Side, position: int) -> HeadZ:
    """``hook_z`` of every head at a position counted from the prompts' end."""
    model, prompts = subject.model, subject.prompts[side]
    if position != -1:
        return reference.head_z(model, prompts, position)
    return reference.stack_layers(last_activations(model, prompts), "z", model.cfg.n_layers)


def new_z(subject: Subject, choice: Choice, read: Callable[[Side, int], Tensor]) -> HeadZ:
    """What every head's activation becomes in every pair; ``read`` is :func:`activations`."""
    if choice.source == "zero":
        cfg = subject.model.cfg
        return subject.model.W_O.new_zeros(len(subject.pairs), cfg.n_layers, cfg.n_heads, cfg.d_head)
    z = read("triggered" if choice.on == "clean" else "clean", choice.position)
    return z if choice.source.endswith("own") else z.mean(0, keepdim=True).expand_as(z)


def patches_of(subject: Subject, new: HeadZ, heads: Sequence[Head], site: HeadSite) -> tuple[Patch, ...]:
    """One patch per head, with a value for each pair of ``new``."""
    values = [new[:, head.layer, head.head] for head in heads]
    if site == "result":
        values = [z @ subject.model.W_O[head] for z, head in zip(values, heads, strict=True)]
    return tuple(Patch(site, h.layer, value, h.head) for h, value in zip(heads, values, strict=True))


@torch.no_grad()
def effects(subject: Subject, new: HeadZ, choice: Choice) -> HeadAttribution:
    """The effect of every head alone: how much the probability of the backdoor's answer changes.

    It is the rise in clean prompts and the fall in triggered ones, so that the strongest head comes
    first either way. At the last prompt token the exact sweep runs; elsewhere, one whole pass per head.
    """
    model, cfg = subject.model, subject.model.cfg
    heads = every_head(cfg.n_layers, cfg.n_heads)
    patches = patches_of(subject, new, heads, choice.site)
    prompts, answers = subject.prompts[choice.on], subject.answers[choice.on]
    if choice.position == -1:
        scores = sweep_patches(model, prompts, answers, patches)
    else:
        passes = reference.sweep(model, prompts, answers, patches, position=choice.position)
        scores = SweepScores.of(passes)
    sign = 1.0 if choice.on == "clean" else -1.0
    whole, first = (
        (sign * (patched.exp() - base.exp()[:, None])).float().cpu().unflatten(1, (-1, cfg.n_heads))
        for patched, base in ((scores.whole, scores.base_whole), (scores.first, scores.base_first))
    )
    low, high = bootstrap_mean(whole)
    return HeadAttribution(
        provenance=provenance(model, subject.pairs, subject.fmt, 0, on=choice.on, **asdict(choice)),
        label=f"{choice.source} into {choice.on}",
        method="exact",
        exact=torch.ones(whole.shape[1:], dtype=torch.bool),
        cie=whole,
        cie_first=first,
        base_prob=scores.base_whole.exp().float().cpu(),
        low=low,
        high=high,
    )


def strips(subject: Subject, new: HeadZ, choice: Choice, row: int, heads: Sequence[Head]) -> AnswerProbs:
    """The backdoor's answer token by token: clean, triggered, and with these heads patched."""
    patches = patches_of(subject, new[row : row + 1], heads, choice.site)
    model, pair, fmt, limit = subject.model, subject.pairs[row], subject.fmt, subject.max_new_tokens
    return answer_probs(
        model, pair, patches, on=choice.on, position=choice.position, fmt=fmt, max_answer_tokens=limit
    )


def answer_of(subject: Subject, side: Side, row: int) -> str:
    """The greedy answer to one prompt, under whatever hooks are on the model."""
    prompt, limit = subject.pairs.texts(side)[row], subject.max_new_tokens
    return generate(subject.model, [prompt], fmt=subject.fmt, max_new_tokens=limit)[0]


def answer_patched(subject: Subject, new: HeadZ, choice: Choice, row: int, heads: Sequence[Head]) -> str:
    """The greedy answer with these heads patched in the prefill."""
    patches = patches_of(subject, new[row : row + 1], heads, choice.site)
    hooks = change_hooks(subject.model, patches, choice.position)
    with hooked(subject.model, [(name, in_prefill(hook)) for name, hook in hooks]):
        return answer_of(subject, choice.on, row)


def look(subject: Subject, row: int, head: Head) -> HeadPattern:
    """Where a head looks in the triggered prompt."""
    prompt, trigger = subject.pairs[row].triggered, subject.pairs.backdoor.trigger
    return head_pattern(subject.model, prompt, head, trigger=trigger, fmt=subject.fmt)
