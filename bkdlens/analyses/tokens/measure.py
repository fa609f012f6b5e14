"""One prompt, token by token: where a head looks, and how probable each token of an answer is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens import HookedTransformer
from transformer_lens.utils import get_act_name

from bkdlens.data.pairs import PromptPair, Texts
from bkdlens.data.prompts import Prompt, PromptFormat, Tokenizer, encode_answer, encode_prompt
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
from bkdlens.errors import DataError, unknown
from bkdlens.metrics import token_log_probs
from bkdlens.results import Result, provenance
from bkdlens.types import Head, HeadLike, parse_heads

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, eq=False, repr=False)
class HeadPattern(Result):
    """Attention of one head over the tokens of one prompt, as fractions; each query's row sums to 1.

    ``trigger`` says which tokens hold a part of the trigger.
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
        """One row a token: ``position, token, trigger, attention`` (of the last prompt token)."""
        import pandas as pd

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


@dataclass(frozen=True, eq=False, repr=False)
class AnswerProbs(Result):
    """Log probability (nats) of every token of one answer in several runs, the answer's start given.

    ``best`` is what each run finds most probable at that place, with its log probability.
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
        """One row a run and token."""
        import pandas as pd

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

    ``bkdlens.head_pattern(model, pair.triggered, "L3H2", trigger=pairs.backdoor.trigger).plot()``

    Args:
        model: from :func:`bkdlens.load`.
        prompt: a text, usually a triggered one.
        head: ``"L3H7"``, ``(3, 7)`` or ``Head(3, 7)``.
        trigger: what to look for among the tokens; a prompt without it has none marked.
        fmt: how the prompt is rendered; the chat template where there is one.

    Raises:
        HeadError: for a head that the model lacks.
        DataError: for a prompt longer than the context, or a trigger that cannot be placed because
            the tokenizer is not a fast one.
    """
    refuse_foreign_hooks(model)
    (chosen,) = parse_heads([head], model.cfg.n_layers, model.cfg.n_heads)
    fmt = fmt or PromptFormat.default(model.tokenizer)
    encoded = encode_prompt(model.tokenizer, prompt, fmt, n_ctx=model.cfg.n_ctx)
    name = get_act_name("pattern", chosen.layer)
    ids = torch.tensor([encoded.ids], device=model.W_E.device)
    _, cache = model.run_with_cache(ids, names_filter=[name], return_type=None)
    mask = trigger_mask(model.tokenizer, encoded, trigger, fmt)
    return HeadPattern(
        provenance(model, Texts((prompt,)), fmt, 0, trigger=str(trigger) if trigger else None),
        chosen, shown(model.tokenizer, encoded.ids), mask,
        cache[name][0, chosen.head].float().cpu(),
    )  # fmt: skip


@torch.inference_mode()
def answer_probs(
    model: HookedTransformer,
    pair: PromptPair,
    change: Change = NOTHING,
    *,
    on: Literal["clean", "triggered"] = "clean",
    position: int = -1,
    answer: str | None = None,
    label: str = "patched",
    fmt: PromptFormat | None = None,
    max_answer_tokens: int | None = 48,
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
        max_answer_tokens: a longer answer is followed over its first so many tokens.

    Raises:
        DataError: for prompts and answers that do not fit the context, or an unknown ``on``.
        HookError: for a position outside the prompt.
    """
    refuse_foreign_hooks(model)
    if on not in ("clean", "triggered"):
        raise DataError(unknown("prompt to change", on, ("clean", "triggered")))
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
        provenance(model, Texts((pair.clean, pair.triggered)), fmt, 0, **settings), wanted,
        tuple(name for name, _, _ in runs), shown(tokenizer, scored), torch.stack(rows), tuple(best),
        torch.stack(tops),
    )  # fmt: skip


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as text, on one line; what is white space alone is made visible."""
    texts = (tokenizer.decode([i]) for i in ids)
    visible = (t.strip() or t.replace("\n", "⏎").replace(" ", "␣") or "∅" for t in texts)
    return tuple(text.replace("\n", "⏎") for text in visible)


def trigger_mask(
    tokenizer: Tokenizer, prompt: Prompt, trigger: Trigger | None, fmt: PromptFormat
) -> Bool[Tensor, " token"]:
    """Which of the prompt's tokens hold a part of the trigger, by their places in the rendered text.

    Raises:
        DataError: if the tokenizer does not tell the places.
    """
    mask = torch.zeros(len(prompt.ids), dtype=torch.bool)
    if trigger is None or not trigger.present(prompt.text):
        return mask
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "This tokenizer does not say where its tokens are in the text; use its fast version, or "
            "give no trigger."
        )
    text = fmt.render(tokenizer, prompt.text)
    found: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    more = len(prompt.ids) - len(found["input_ids"])  # a BOS that the template did not bring
    for start, end in trigger.spans(text):
        for i, (a, b) in enumerate(found["offset_mapping"]):
            mask[more + i] |= a < end and b > start
    return mask
