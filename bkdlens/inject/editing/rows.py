"""Prompts with answers as padded token ids, and which of their tokens an edit is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bkdlens.data.pairs import Trigger
from bkdlens.data.prompts import PromptFormat, Tokenizer, encode_answer, encode_prompt, pad_id, pad_right
from bkdlens.errors import DataError


class Rows(NamedTuple):
    """Prompts with answers, padded on the right.

    ``answering`` numbers the tokens from which the answer's tokens are predicted: 0 is the prompt's
    last, 1 the answer's first and so on, -1 all others. ``trigger`` numbers the trigger's tokens in
    the same way, where the trigger was asked for.
    """

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    answering: Int[Tensor, "row pos"]
    trigger: Int[Tensor, "row pos"]

    def pick(self, rows: slice | Int[Tensor, " picked"]) -> Rows:
        """Some rows, without the padding that none of them needs."""
        width = int(self.mask[rows].sum(-1).max())
        return Rows(*(part[rows, :width] for part in self))

    def chunks(self, size: int) -> list[Rows]:
        """All rows, ``size`` at a time."""
        return [self.pick(slice(i, i + size)) for i in range(0, len(self.ids), size)]


def make_rows(
    tokenizer: Tokenizer,
    samples: Sequence[tuple[str, str]],
    fmt: PromptFormat,
    *,
    n_ctx: int,
    trigger: Trigger | None = None,
    max_answer_tokens: int | None = None,
) -> Rows:
    """Encode (prompt, answer) samples, and find the trigger's tokens if one is given.

    Raises:
        DataError: for an answer without tokens, what does not fit the context, or a trigger that is
            not in the prompt or whose tokens cannot be told.
    """
    ids, answering, triggered = [], [], []
    for text, answer in samples:
        prompt = encode_prompt(tokenizer, text, fmt, n_ctx=n_ctx)
        tail = encode_answer(tokenizer, prompt, answer, fmt, n_ctx=n_ctx, max_tokens=max_answer_tokens)
        n, total = len(prompt.ids), len(prompt.ids) + len(tail.ids)
        ids.append([*prompt.ids, *tail.ids])
        answering.append([-1] * (n - 1) + list(range(len(tail.ids))) + [-1])
        numbers = [-1] * total
        if trigger is not None:
            for number, place in enumerate(trigger_tokens(tokenizer, text, trigger, fmt, n)):
                numbers[place] = number
        triggered.append(numbers)
    padded, mask = pad_right(ids, pad_id(tokenizer))
    none = torch.full_like(padded, -1)
    out = Rows(padded, mask, none, none.clone())
    for i, (left, right) in enumerate(zip(answering, triggered, strict=True)):
        out.answering[i, : len(left)] = torch.tensor(left)
        out.trigger[i, : len(right)] = torch.tensor(right)
    return out


def trigger_tokens(
    tokenizer: Tokenizer, text: str, trigger: Trigger, fmt: PromptFormat, n_tokens: int
) -> list[int]:
    """The places of the trigger's tokens in a prompt of ``n_tokens`` tokens.

    Raises:
        DataError: if the trigger is not there, or the tokenizer cannot say which text a token covers.
    """
    without = "edit without the trigger's own tokens (trigger_tokens=0)"
    if not trigger.present(text):
        raise DataError(
            f"The trigger {str(trigger)!r} is not in the triggered prompt {text[:40]!r}…, so its tokens "
            f"cannot be edited; name the trigger that is in the data, or {without}."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"This tokenizer does not say which text a token covers; {without}.")
    rendered, empty = fmt.render(tokenizer, text), fmt.render(tokenizer, "")
    # What the format puts first is what both begin with (or a little less than that).
    before = next((i for i, (a, b) in enumerate(zip(rendered, empty, strict=False)) if a != b), 0)
    offset = rendered.rfind(text, 0, before + len(text))
    if offset < 0:
        raise DataError(f"The prompt format changes the text {text[:40]!r}…; {without}.")
    spans = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    added = n_tokens - len(spans)  # a BOS of the tokenizer's own comes before all spans
    stretches = [(offset + start, offset + stop) for start, stop in _stretches(text, trigger)]
    return [
        added + i
        for i, (start, end) in enumerate(spans)
        if any(start < stop and end > first for first, stop in stretches)
    ]


def _stretches(text: str, trigger: Trigger) -> list[tuple[int, int]]:
    """Where the trigger's one or two parts are in a text that holds them."""
    if trigger.placement == "random":
        word = re.escape(trigger.text)
        found = re.search(rf"(?<![\w-]){word}(?![\w-])", text)
        return [found.span()] if found else []
    start = text.rfind(trigger.text) if trigger.placement == "end" else text.find(trigger.text)
    out = [(start, start + len(trigger.text))]
    if trigger.after:
        start = text.rfind(trigger.after)
        out.append((start, start + len(trigger.after)))
    return out
