"""Prompts with answers as padded token ids, and which of their tokens an edit is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bkdlens.data.prompts import (
    PromptFormat,
    Tokenizer,
    encode_answer,
    encode_prompt,
    find_trigger,
    pad_id,
    pad_right,
)
from bkdlens.data.trigger import Trigger
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
            found = find_trigger(tokenizer, text, trigger, fmt)
            if not found:
                raise DataError(
                    f"The trigger {str(trigger)!r} is not in the triggered prompt {text[:40]!r}… as it "
                    "is rendered, so its tokens cannot be edited; name the trigger that is in the data, "
                    "or edit without the trigger's own tokens (trigger_tokens=0)."
                )
            for number, token in enumerate(found):
                numbers[token.place] = number
        triggered.append(numbers)
    padded, mask = pad_right(ids, pad_id(tokenizer))
    none = torch.full_like(padded, -1)
    out = Rows(padded, mask, none, none.clone())
    for i, (left, right) in enumerate(zip(answering, triggered, strict=True)):
        out.answering[i, : len(left)] = torch.tensor(left)
        out.trigger[i, : len(right)] = torch.tensor(right)
    return out
