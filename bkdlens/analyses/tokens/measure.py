"""One prompt, token by token: where a head looks, and how probable each token of an answer is."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.backdoor import PromptPair
from bkdlens.data.pairs import Texts
from bkdlens.data.prompts import PromptFormat, encode_answer, encode_prompt, find_trigger, shown
from bkdlens.data.trigger import Trigger
from bkdlens.engines.hooks import (
    NOTHING,
    Change,
    Intervention,
    change_hooks,
    from_end,
    hooked,
    refuse_foreign_hooks,
)
from bkdlens.engines.inputs import checked
from bkdlens.metrics import token_log_probs
from bkdlens.results import Result, provenance
from bkdlens.types import MAX_NEW_TOKENS, Head, HeadLike, Side, check_choice, parse_heads


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class HeadPattern(Result):
    """Attention of one head over the tokens of one prompt.

    Attributes:
        head: the head.
        tokens: the prompt's, as visible text.
        trigger: which tokens hold a part of the trigger.
        pattern: fractions; the row of each query sums to 1.
    """

    head: Head
    tokens: tuple[str, ...]
    trigger: Bool[Tensor, " token"]
    pattern: Float[Tensor, "query key"]

    @property
    def last(self) -> Float[Tensor, " token"]:
        """The row of the last prompt token, where interventions act."""
        return self.pattern[-1]

    @property
    def on_trigger(self) -> float:
        """Share of the last prompt token's attention that is on the trigger's tokens."""
        return float(self.last[self.trigger].sum())

    def to_frame(self) -> pd.DataFrame:
        """One row per token: ``position, token, trigger, attention`` (of the last prompt token)."""
        return pd.DataFrame(
            {
                "position": range(len(self.tokens)),
                "token": self.tokens,
                "trigger": self.trigger.tolist(),
                "attention": self.last.tolist(),
            }
        )

    def __repr__(self) -> str:
        return (
            f"HeadPattern({self.head}, {len(self.tokens)} tokens, {self.on_trigger:.2f} of the last "
            f"one's attention on {int(self.trigger.sum())} of the trigger)"
        )


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class AnswerProbs(Result):
    """Log probability of every token of one answer in several runs, the answer's start given.

    Attributes:
        answer: its text.
        runs: their names: clean, triggered, and the changed one.
        tokens: the answer's, as visible text.
        log_probs: in nats.
        best: what each run finds most probable at each place.
        best_log_probs: in nats.
    """

    answer: str
    runs: tuple[str, ...]
    tokens: tuple[str, ...]
    log_probs: Float[Tensor, "run token"]
    best: tuple[tuple[str, ...], ...]
    best_log_probs: Float[Tensor, "run token"]

    @property
    def whole(self) -> Float[Tensor, " run"]:
        """``P(y|x)^(1/|y|)``, the geometric mean over the tokens."""
        return self.log_probs.mean(-1).exp()

    def to_frame(self) -> pd.DataFrame:
        """One row per run and token; probabilities are 0 to 1."""
        return pd.DataFrame(
            [
                {
                    "run": run,
                    "position": i,
                    "token": token,
                    "probability": float(self.log_probs[r, i].exp()),
                    "best": self.best[r][i],
                    "best_probability": float(self.best_log_probs[r, i].exp()),
                }
                for r, run in enumerate(self.runs)
                for i, token in enumerate(self.tokens)
            ]
        )

    def __repr__(self) -> str:
        each = ", ".join(f"{run} {p:.3f}" for run, p in zip(self.runs, self.whole.tolist(), strict=True))
        return f"AnswerProbs({self.answer!r}, {len(self.tokens)} tokens, per token: {each})"


@checked
@torch.inference_mode()
def head_pattern(
    model: HookedTransformer,
    prompt: str,
    head: HeadLike,
    *,
    trigger: Trigger | None = None,
    fmt: PromptFormat | None = None,
) -> HeadPattern:
    """Where a head looks in a prompt: ``attn.hook_pattern`` of one pass.

    Args:
        model: from :func:`bkdlens.load`.
        prompt: a text, usually a triggered one.
        head: ``"L3H7"``, ``(3, 7)`` or ``Head(3, 7)``.
        trigger: what to look for among the tokens; a prompt without it has none marked.
        fmt: how the prompt is rendered; the chat template where there is one.

    Returns:
        Attention ``[query key]``, as fractions, with the prompt's tokens and which are the trigger's.

    Raises:
        HeadError: for a head that the model lacks.
        DataError: for a prompt longer than the context, or a trigger that cannot be placed because
            the tokenizer is not a fast one.

    Examples:
        >>> look = bkdlens.head_pattern(model, test[0].triggered, "L3H2", trigger=backdoor.trigger)
    """
    refuse_foreign_hooks(model)
    (chosen,) = parse_heads([head], model.cfg.n_layers, model.cfg.n_heads)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    encoded = encode_prompt(model.tokenizer, prompt, fmt, n_ctx=model.cfg.n_ctx)
    name = get_act_name("pattern", chosen.layer)
    ids = torch.tensor([encoded.ids], device=model.W_E.device)
    _, cache = model.run_with_cache(ids, names_filter=[name], return_type=None)
    mask = torch.zeros(len(encoded.ids), dtype=torch.bool)
    if trigger is not None:
        mask[[token.place for token in find_trigger(model.tokenizer, prompt, trigger, fmt)]] = True
    made_from = provenance(model, Texts((prompt,)), fmt, 0, trigger=str(trigger) if trigger else None)
    return HeadPattern(
        provenance=made_from,
        head=chosen,
        tokens=shown(model.tokenizer, encoded.ids),
        trigger=mask,
        pattern=cache[name][0, chosen.head].float().cpu(),
    )


@checked
@torch.inference_mode()
def answer_probs(
    model: HookedTransformer,
    pair: PromptPair,
    change: Change = NOTHING,
    *,
    on: Side = "clean",
    position: int = -1,
    answer: str | None = None,
    label: str = "patched",
    fmt: PromptFormat | None = None,
    max_answer_tokens: int | None = MAX_NEW_TOKENS,
) -> AnswerProbs:
    """The probability of an answer's tokens: after the clean, the triggered and a changed prompt.

    Args:
        model: from :func:`bkdlens.load`.
        pair: the prompts.
        change: an ``Intervention``, or patches that act together; without one there are two runs.
        on: the prompt that is changed.
        position: where, counted from the prompt's end; -1 is the last prompt token.
        answer: the backdoor's for None.
        label: names the changed run.
        fmt: how a prompt is rendered; the chat template where there is one.
        max_answer_tokens: a longer answer is followed over this many tokens.

    Returns:
        Log probabilities ``[run token]``, in nats.

    Raises:
        DataError: for prompts and answers that do not fit the context.
        ChoiceError: for an unknown ``on``.
        HookError: for a position outside the prompt.

    Examples:
        >>> probs = bkdlens.answer_probs(model, test[0])
    """
    refuse_foreign_hooks(model)
    check_choice("prompt to change", on, Side)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    wanted = pair.backdoor_output if answer is None else answer
    texts = {"clean": pair.clean, "triggered": pair.triggered}
    n_ctx, tokenizer = model.cfg.n_ctx, model.tokenizer
    rows, best, tops = [], [], []
    runs: list[tuple[str, str, Change]] = [
        ("clean", "clean", NOTHING), ("triggered", "triggered", NOTHING)
    ]  # fmt: skip
    acts = change.first_layer is not None if isinstance(change, Intervention) else bool(change)
    if acts:
        runs.append((f"{on}, {label}", on, change))
    scored: tuple[int, ...] = ()
    for _, side, what in runs:
        prompt = encode_prompt(tokenizer, texts[side], fmt, n_ctx=n_ctx)
        found = encode_answer(tokenizer, prompt, wanted, fmt, n_ctx=n_ctx, max_tokens=max_answer_tokens)
        scored, n = found.ids[: found.n_scored], len(prompt.ids)
        ids = torch.tensor([[*prompt.ids, *scored[:-1]]], device=model.W_E.device)
        with hooked(model, change_hooks(model, what, from_end(n, position))):
            logits = model(ids)[0, n - 1 :].float().cpu()
        rows.append(token_log_probs(logits, torch.tensor(scored)))
        top = logits.log_softmax(-1).max(-1)
        tops.append(top.values)
        best.append(shown(tokenizer, top.indices.tolist()))
    settings = {"position": position, "max_answer_tokens": max_answer_tokens}
    return AnswerProbs(
        provenance=provenance(model, Texts((pair.clean, pair.triggered)), fmt, 0, **settings),
        answer=wanted,
        runs=tuple(name for name, _, _ in runs),
        tokens=shown(tokenizer, scored),
        log_probs=torch.stack(rows),
        best=tuple(best),
        best_log_probs=torch.stack(tops),
    )
