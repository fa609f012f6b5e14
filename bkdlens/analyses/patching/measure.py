"""The everyday helper: replace some heads' activations at the last prompt token and see what changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeAlias, get_args

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import ActivationCache, HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PairSet, Texts
from bkdlens.data.prompts import Prompt, PromptFormat, encode_answer, encode_prompts
from bkdlens.engines import reference
from bkdlens.engines.cache import PairCache, refuse_other_backdoor, transferred
from bkdlens.engines.hooks import HookFunction, hooked, in_prefill, refuse_foreign_hooks
from bkdlens.engines.inputs import checked
from bkdlens.errors import DataError, HookError
from bkdlens.metrics import sequence_prob, token_log_probs
from bkdlens.results import Result, provenance
from bkdlens.types import AblationMode, Head, HeadLike, HeadSite, Which, check_choice, parse_heads

SOURCES = ("zero", "mean")  # by name
Source: TypeAlias = PairCache | ActivationCache | Tensor | str | Sequence[str]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchResult(Result):
    """Next-token logits before and after the patch, and its effect on a target answer.

    Attributes:
        heads: those whose activation was replaced.
        source: what by, in words.
        site: ``"z"`` or ``"result"``.
        prompts: as they were given.
        targets: an answer per prompt; None where none was given.
        logits_before: of the next token.
        logits_after: of the next token, under the patch.
        before: probability of the target, ``P(y|x)^(1/|y|)``, 0 to 1; NaN without one.
        after: probability of the target under the patch.
        next_before: the most likely next token.
        next_after: the most likely next token under the patch.
    """

    heads: tuple[Head, ...]
    source: str
    site: str
    prompts: tuple[str, ...]
    targets: tuple[str, ...] | None
    logits_before: Float[Tensor, "prompt d_vocab"]
    logits_after: Float[Tensor, "prompt d_vocab"]
    before: Float[Tensor, " prompt"]
    after: Float[Tensor, " prompt"]
    next_before: tuple[str, ...]
    next_after: tuple[str, ...]

    @property
    def effect(self) -> Float[Tensor, " prompt"]:
        """Change of the target's probability."""
        return self.after - self.before

    @property
    def divergence(self) -> Float[Tensor, " prompt"]:
        """KL divergence of the next-token distribution, before from after, in nats."""
        before, after = (x.log_softmax(-1) for x in (self.logits_before, self.logits_after))
        return (before.exp() * (before - after)).sum(-1).clamp(min=0)

    def to_frame(self) -> pd.DataFrame:
        """One row per prompt; probabilities are 0 to 1, ``kl`` is in nats."""
        frame = pd.DataFrame(
            {
                "prompt": self.prompts,
                "next_before": self.next_before,
                "next_after": self.next_after,
                "kl": self.divergence.tolist(),
            }
        )
        if self.targets is not None:
            frame["target"] = self.targets
            frame["before"], frame["after"] = self.before.tolist(), self.after.tolist()
            frame["effect"] = self.effect.tolist()
        return frame

    def __repr__(self) -> str:
        named = ", ".join(map(str, self.heads))
        effect = "" if self.targets is None else f", mean effect {float(self.effect.mean()):+.3f}"
        changed = sum(a != b for a, b in zip(self.next_before, self.next_after, strict=True))
        return (
            f"PatchResult({named} from {self.source}, {len(self.prompts)} prompts, "
            f"next token changed in {changed}{effect})"
        )


@checked
def patch_heads(
    model: HookedTransformer,
    prompts: str | Sequence[str] | PairSet,
    heads: HeadLike | Sequence[HeadLike],
    source: Source,
    *,
    target: str | Sequence[str] | None = None,
    site: HeadSite = "z",
    fmt: PromptFormat | None = None,
    allow_other_model: bool = False,
) -> PatchResult:
    """Replace heads' activations at the last prompt token and compare the model before and after.

    Args:
        model: from :func:`bkdlens.load`.
        prompts: one text or several; a ``PairSet`` stands for its clean prompts with the backdoor's
            answers as targets.
        heads: ``"L3H7"``, ``(3, 7)``, ``Head(3, 7)``, or several.
        source: what the heads' ``z`` becomes: a ``PairCache`` (mean over its triggered victims); an
            ``ActivationCache`` (mean over its rows, last position); a tensor ``[head d_head]``,
            ``[prompt head d_head]`` or ``[layer head d_head]``; other prompts (as many, or one for
            all); ``"zero"``; or ``"mean"`` (over these prompts themselves).
        target: an answer, or one for each prompt, whose probability is followed.
        site: replace ``hook_z`` or ``hook_result``; the numbers are the same.
        fmt: how a prompt is rendered; the cache's, or the chat template.
        allow_other_model: whether a cache of another model is meant, and not a mistake.

    Returns:
        Logits ``[prompt d_vocab]`` of the next token and the target's probability ``[prompt]``, before
        and after.

    Raises:
        HeadError: for a head that the model lacks.
        DataError: for prompts, targets or sources that do not fit each other or the context.
        HookError: for a cache of another model.
        ChoiceError: for an unknown site.

    Examples:
        >>> patched = bkdlens.patch_heads(model, test.clean[:2], "L1H0", source=cache, target="World")
        >>> frame = patched.to_frame()
    """
    refuse_foreign_hooks(model)
    check_choice("head site", site, HeadSite)
    other = _check_source(model, source, allow_other_model)
    if isinstance(prompts, PairSet):
        if isinstance(source, PairCache):
            refuse_other_backdoor(source, prompts)
        target = prompts.backdoor_outputs if target is None else target
        texts = prompts.clean
    else:
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise DataError("There are no prompts to patch; give at least one.")
    fmt = fmt or getattr(source, "fmt", None) or PromptFormat.default(model.tokenizer)
    chosen = parse_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    encoded = encode_prompts(model, texts, fmt)
    if isinstance(target, str):
        target = [target] * len(texts)
    if target is not None and len(target) != len(texts):
        raise DataError(
            f"There are {len(target)} targets for {len(texts)} prompts; give one for all, or one each."
        )
    z = _source_z(model, source, chosen, texts, fmt)
    before = _score(model, encoded, target, fmt)
    position = -before.width
    with hooked(model, _hooks(model, chosen, z, site, position)):
        after = _score(model, encoded, target, fmt)
    pairs_like = prompts if isinstance(prompts, PairSet) else Texts(tuple(texts))
    return PatchResult(
        provenance=provenance(
            model, pairs_like, fmt, 0, position="last prompt token, prefill only", **other
        ),
        heads=chosen,
        source=_name(source),
        site=site,
        prompts=tuple(texts),
        targets=tuple(target) if target is not None else None,
        logits_before=before.logits,
        logits_after=after.logits,
        before=before.prob,
        after=after.prob,
        next_before=_next(model, before.logits),
        next_after=_next(model, after.logits),
    )


@checked
@contextmanager
def patched_heads(
    model: HookedTransformer,
    heads: HeadLike | Sequence[HeadLike],
    source: Source,
    *,
    site: HeadSite = "z",
    fmt: PromptFormat | None = None,
    allow_other_model: bool = False,
) -> Iterator[HookedTransformer]:
    """The model under a patch of heads, for :func:`bkdlens.generate` or any run on whole prompts.

    The patch acts on the last position of every pass over more than one token, so not on decoding
    steps. ``"mean"`` needs prompts to average over, so give them as the source here.

    Args:
        model, heads, source, site, fmt, allow_other_model: as in :func:`patch_heads`.

    Yields:
        The model, as it is outside the context but for the hooks.

    Raises:
        HookError: if the model was not run inside the context, or for a cache of another model.

    Examples:
        >>> with bkdlens.patched_heads(model, "L1H0", cache):
        ...     answer = bkdlens.generate(model, test[0].clean)
    """
    check_choice("head site", site, HeadSite)
    if isinstance(source, str) and source == "mean":
        raise DataError('The source "mean" has no prompts here; give the prompts as the source.')
    _check_source(model, source, allow_other_model)
    fmt = fmt or getattr(source, "fmt", None) or PromptFormat.default(model.tokenizer)
    chosen = parse_heads(heads, model.cfg.n_layers, model.cfg.n_heads)
    z = _source_z(model, source, chosen, None, fmt)
    hooks = [(name, in_prefill(f)) for name, f in _hooks(model, chosen, z, site, -1)]
    with hooked(model, hooks):
        yield model


@dataclass(frozen=True, eq=False)
class _Scores:
    logits: Float[Tensor, "prompt d_vocab"]
    prob: Float[Tensor, " prompt"]
    width: int  # how many positions from the end the last prompt token is


@torch.inference_mode()
def _score(
    model: HookedTransformer, prompts: Sequence[Prompt], targets: Sequence[str] | None, fmt: PromptFormat
) -> _Scores:
    """One full forward pass over prompts padded on the left and targets padded on the right."""
    answers = None
    if targets is not None:
        answers = [
            encode_answer(model.tokenizer, prompt, target, fmt, n_ctx=model.cfg.n_ctx)
            for prompt, target in zip(prompts, targets, strict=True)
        ]
    batch = reference.Padded.of(model, prompts, answers)
    logits = batch.logits(model).float().cpu()
    if targets is None:
        prob = torch.full((len(prompts),), torch.nan)
    else:
        prob = sequence_prob(token_log_probs(logits, batch.targets.cpu()), batch.scored.cpu())
    return _Scores(logits[:, 0], prob, logits.shape[1])


def _hooks(
    model: HookedTransformer,
    heads: Sequence[Head],
    z: Float[Tensor, "*prompt head d_head"],
    site: HeadSite,
    position: int,
) -> list[tuple[str, HookFunction]]:
    """Hooks that set each head's activation at ``position``, whatever the batch size turns out to be."""
    hooks = []
    for layer in sorted({head.layer for head in heads}):
        here = [k for k, head in enumerate(heads) if head.layer == layer]
        index = [heads[k].head for k in here]
        value = z[..., here, :].to(model.W_E.device, model.cfg.dtype)
        if site == "result":
            value = torch.einsum("...hd,hdm->...hm", value, model.W_O[layer][index])
        hooks.append((get_act_name(site, layer), _set(value, index, position)))
    return hooks


def _set(value: Tensor, index: list[int], position: int) -> HookFunction:
    def hook(activation: Tensor, hook: object) -> Tensor:
        batch = activation.shape[0]
        if value.ndim == 3 and value.shape[0] != batch:
            raise HookError(
                f"The source has {value.shape[0]} prompts and {batch} are run; give one, or as many."
            )
        activation = activation.clone()
        activation[:, position, index] = value.to(activation)
        return activation

    return hook


def _check_source(model: HookedTransformer, source: Source, allow_other_model: bool) -> dict[str, Any]:
    """Settings that tell of another model's cache; an error for a word that is hardly a prompt."""
    if isinstance(source, PairCache | ActivationCache):
        return transferred(model, "The cache", source.model, allow_other_model=allow_other_model)
    if isinstance(source, str) and source not in SOURCES:
        words = [*SOURCES, *get_args(Which), *get_args(AblationMode)]
        if get_close_matches(source.strip().lower(), words, n=1, cutoff=0.8):
            raise DataError(
                f"source={source!r} would be a prompt of one word, which is hardly meant; give a cache "
                "(its mean over triggered victims), prompts such as pairs.triggered, "
                f'"zero" or "mean", or the word in a list, [{source!r}], if it is a prompt.'
            )
    return {}


def _source_z(
    model: HookedTransformer,
    source: Source,
    heads: Sequence[Head],
    texts: Sequence[str] | None,
    fmt: PromptFormat,
) -> Float[Tensor, "*prompt head d_head"]:
    cfg = model.cfg
    layers, index = (list(axis) for axis in zip(*heads, strict=True))
    if isinstance(source, PairCache):
        return source.mean_z("triggered")[layers, index]
    if isinstance(source, ActivationCache):
        if not source.has_batch_dim:
            raise DataError("The source cache has no batch axis; cache without remove_batch_dim.")
        stack = [source[get_act_name("z", layer)] for layer in range(cfg.n_layers)]
        z = torch.stack([s[:, -1] if s.ndim == 4 else s for s in stack], dim=1)
        return z.mean(0)[layers, index]
    if isinstance(source, Tensor):
        if source.shape == (cfg.n_layers, cfg.n_heads, cfg.d_head):
            return source[layers, index]
        if source.shape[-2:] == (len(heads), cfg.d_head) and source.ndim in (2, 3):
            return source
        raise DataError(
            f"The source tensor has shape {tuple(source.shape)}; give [{len(heads)} {cfg.d_head}], "
            f"[prompt {len(heads)} {cfg.d_head}] or [{cfg.n_layers} {cfg.n_heads} {cfg.d_head}]."
        )
    if isinstance(source, str) and source == "zero":
        return torch.zeros(len(heads), cfg.d_head)
    own = isinstance(source, str) and source == "mean"
    others = list(texts or []) if own else [source] if isinstance(source, str) else list(source)
    z = reference.head_z(model, encode_prompts(model, others, fmt))[:, layers, index]
    if own:
        return z.mean(0)
    if texts is not None and len(others) not in (1, len(texts)):
        raise DataError(
            f"There are {len(others)} source prompts for {len(texts)} prompts; give one, or as many."
        )
    return z[0] if len(others) == 1 else z


def _name(source: Source) -> str:
    if isinstance(source, PairCache):
        return f"mean of {int(source.victims.sum())} triggered"
    if isinstance(source, ActivationCache):
        return "mean of a cache"
    if isinstance(source, Tensor):
        return "a tensor"
    return source if isinstance(source, str) and source in SOURCES else "other prompts"


def _next(model: HookedTransformer, logits: Float[Tensor, "prompt d_vocab"]) -> tuple[str, ...]:
    return tuple(model.tokenizer.decode([i]) for i in logits.argmax(-1).tolist())
