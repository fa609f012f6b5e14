"""What :func:`bkdlens.explore` shows, as pure functions of a subject and of what is chosen.

A subject is a model with some pairs, tokenised once. The widget keeps nothing but choices; it calls
these functions through caches, so that only what a choice changed is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.tokens.measure import AnswerProbs, HeadPattern, answer_probs, head_pattern
from bkdlens.data.backdoor import PromptPair
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import Answer, Prompt, PromptFormat, encode_answer, encode_prompt, shown
from bkdlens.engines import reference
from bkdlens.engines.cache import last_activations
from bkdlens.engines.generate import generate
from bkdlens.engines.hooks import Patch, change_hooks, hooked, in_prefill
from bkdlens.engines.sweep import sweep_patches
from bkdlens.metrics import bootstrap_mean
from bkdlens.results import provenance
from bkdlens.types import Head, HeadSite, Side, check_choice, every_head

# Where a head's new activation comes from; triggered ones go into clean prompts, the others into
# triggered ones.
PatchSource = Literal["triggered, mean", "triggered, own", "clean, mean", "clean, own", "zero"]
SOURCES: tuple[PatchSource, ...] = get_args(PatchSource)
MOST_POSITIONS = 6


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and the victims to look at, tokenised; ``positions`` is how far prompts end alike.

    ``answers`` are the backdoor's, after the clean and after the triggered prompt.
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

    def __post_init__(self) -> None:
        check_choice("source", self.source, PatchSource)
        check_choice("head site", self.site, HeadSite)

    @property
    def on(self) -> Side:
        """The prompts that are patched."""
        return "clean" if self.source.startswith("triggered") else "triggered"


def make_subject(
    model: HookedTransformer,
    pairs: PairSet,
    *,
    n_pairs: int | None = 32,
    fmt: PromptFormat | None = None,
    max_new_tokens: int = 48,
    seed: int = 0,
) -> Subject:
    """Draw and tokenise the victims.

    Args:
        model: from :func:`bkdlens.load`.
        pairs: pairs with victims.
        n_pairs: at most so many victims, drawn with ``seed``.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_new_tokens: where answers are cut, generated and scored ones.
        seed: of the draw.

    Raises:
        DataError: if there is no victim, or a prompt and its answer do not fit the context.
    """
    fmt = fmt or PromptFormat.default(model.tokenizer)
    victims = pairs.victims.sample(n_pairs, seed=seed)
    prompts: dict[Side, tuple[Prompt, ...]] = {}
    answers: dict[Side, tuple[Answer, ...]] = {}
    texts: dict[Side, list[str]] = {"clean": victims.clean, "triggered": victims.triggered}
    for side, own in texts.items():
        prompts[side] = tuple(
            encode_prompt(model.tokenizer, text, fmt, n_ctx=model.cfg.n_ctx) for text in own
        )
        answers[side] = tuple(
            encode_answer(model.tokenizer, prompt, pair.backdoor_output, fmt, n_ctx=model.cfg.n_ctx,
                          max_tokens=max_new_tokens)
            for prompt, pair in zip(prompts[side], victims, strict=True)
        )  # fmt: skip
    same = _common_end([prompt.ids for side in prompts.values() for prompt in side])
    positions = max(1, min(same, MOST_POSITIONS))
    return Subject(model, victims, fmt, prompts, answers, positions, max_new_tokens)


@torch.no_grad()
def activations(subject: Subject, side: Side, position: int) -> Float[Tensor, "pair layer head d_head"]:
    """``hook_z`` of every head at a position counted from the prompts' end."""
    model, prompts = subject.model, subject.prompts[side]
    if position != -1:
        return reference.head_z(model, prompts, position)
    return reference.stack_layers(last_activations(model, prompts), "z", model.cfg.n_layers)


def new_z(
    subject: Subject, choice: Choice, read: Callable[[Side, int], Tensor]
) -> Float[Tensor, "pair layer head d_head"]:
    """What every head's activation becomes in every pair; ``read`` is :func:`activations`."""
    cfg = subject.model.cfg
    if choice.source == "zero":
        return torch.zeros(len(subject.pairs), cfg.n_layers, cfg.n_heads, cfg.d_head, dtype=cfg.dtype,
                           device=subject.model.W_E.device)  # fmt: skip
    z = read("triggered" if choice.on == "clean" else "clean", choice.position)
    return z if choice.source.endswith("own") else z.mean(0, keepdim=True).expand_as(z)


def patches_of(
    subject: Subject, new: Float[Tensor, "pair layer head d_head"], heads: Sequence[Head], site: HeadSite
) -> tuple[Patch, ...]:
    """A patch a head, with a value for each pair of ``new``."""
    out = []
    for head in heads:
        value = new[:, head.layer, head.head]
        if site == "result":
            value = value @ subject.model.W_O[head.layer, head.head]
        out.append(Patch(site, head.layer, value, head.head))
    return tuple(out)


@torch.no_grad()
def effects(
    subject: Subject, new: Float[Tensor, "pair layer head d_head"], choice: Choice
) -> HeadAttribution:
    """The effect of every head alone, as a ``HeadAttribution``.

    Into clean prompts it is how much the probability of the backdoor's answer rises, into triggered
    ones how much it falls, so that the strongest head comes first either way. At the last prompt token
    the exact sweep runs; elsewhere one whole pass a head.
    """
    model, cfg = subject.model, subject.model.cfg
    heads = every_head(cfg.n_layers, cfg.n_heads)
    patches = patches_of(subject, new, heads, choice.site)
    prompts, answers = subject.prompts[choice.on], subject.answers[choice.on]
    if choice.position == -1:
        found = sweep_patches(model, prompts, answers, patches)
        whole, first = found.whole.exp(), found.first.exp()
        base, base_first = found.base_whole.exp(), found.base_first.exp()
    else:
        scores = reference.sweep(model, prompts, answers, patches, position=choice.position).exp()
        (base, whole), (base_first, first) = ((s[:, 0], s[:, 1:]) for s in scores)
    sign = 1.0 if choice.on == "clean" else -1.0
    shape = (len(prompts), cfg.n_layers, cfg.n_heads)
    cie = (sign * (whole - base[:, None])).float().cpu().view(shape)
    cie_first = (sign * (first - base_first[:, None])).float().cpu().view(shape)
    low, high = bootstrap_mean(cie)
    settings = {"source": choice.source, "on": choice.on, "site": choice.site,
                "position": choice.position}  # fmt: skip
    return HeadAttribution(
        provenance=provenance(model, subject.pairs, subject.fmt, 0, **settings),
        label=f"{choice.source} into {choice.on}",
        method="exact",
        exact=torch.ones(shape[1:], dtype=torch.bool),
        cie=cie,
        cie_first=cie_first,
        base_prob=base.float().cpu(),
        low=low,
        high=high,
    )


def strips(
    subject: Subject,
    new: Float[Tensor, "pair layer head d_head"],
    choice: Choice,
    row: int,
    heads: Sequence[Head],
) -> AnswerProbs:
    """The backdoor's answer token by token: clean, triggered, and with these heads patched."""
    own = patches_of(subject, new[row : row + 1], heads, choice.site)
    return answer_probs(
        subject.model, subject.pairs[row], own, on=choice.on, position=choice.position,
        label="patched", fmt=subject.fmt, max_answer_tokens=subject.max_new_tokens,
    )  # fmt: skip


def answer_of(subject: Subject, side: Side, row: int) -> str:
    """The greedy answer to one prompt."""
    return _generate(subject, _text(subject.pairs[row], side))


def answer_patched(
    subject: Subject,
    new: Float[Tensor, "pair layer head d_head"],
    choice: Choice,
    row: int,
    heads: Sequence[Head],
) -> str:
    """The greedy answer with these heads patched in the prefill."""
    model = subject.model
    own = patches_of(subject, new[row : row + 1], heads, choice.site)
    hooks = [(name, in_prefill(hook)) for name, hook in change_hooks(model, own, choice.position)]
    with hooked(model, hooks):
        return _generate(subject, _text(subject.pairs[row], choice.on))


def look(subject: Subject, row: int, head: Head) -> HeadPattern:
    """Where a head looks in the triggered prompt."""
    return head_pattern(
        subject.model, subject.pairs[row].triggered, head, trigger=subject.pairs.backdoor.trigger,
        fmt=subject.fmt,
    )  # fmt: skip


def _generate(subject: Subject, prompt: str) -> str:
    answer = generate(subject.model, prompt, fmt=subject.fmt, max_new_tokens=subject.max_new_tokens)
    assert isinstance(answer, str)
    return answer


def _text(pair: PromptPair, side: Side) -> str:
    return pair.clean if side == "clean" else pair.triggered


def _common_end(rows: Sequence[Sequence[int]]) -> int:
    """How many last ids all rows share."""
    n = 0
    while n < min(map(len, rows)) and len({row[-n - 1] for row in rows}) == 1:
        n += 1
    return n
