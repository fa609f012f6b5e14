"""Prompts with answers as padded token ids, and which of their tokens an edit is about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bkdlens.data.prompts import find_trigger, pad_id, pad_right
from bkdlens.data.trigger import Trigger
from bkdlens.errors import DataError
from bkdlens.inject.planting import Encoding


class Rows(NamedTuple):
    """Prompts with answers, padded on the right.

    ``answering`` numbers the tokens from which the answer's tokens are predicted: 0 is the prompt's
    last, 1 the answer's first and so on; it is -1 elsewhere. ``trigger`` numbers the trigger's tokens in
    the same way, if a trigger was given.
    """

    ids: Int[Tensor, "row pos"]
    mask: Bool[Tensor, "row pos"]
    answering: Int[Tensor, "row pos"]
    trigger: Int[Tensor, "row pos"]

    def pick(self, rows: slice | Int[Tensor, " picked"]) -> Rows:
        """The picked rows, without the padding that none of them needs."""
        width = int(self.mask[rows].sum(-1).max())
        return Rows(*(part[rows, :width] for part in self))

    def chunks(self, size: int) -> list[Rows]:
        """All rows, ``size`` at a time."""
        return [self.pick(slice(i, i + size)) for i in range(0, len(self.ids), size)]


def make_rows(
    encoding: Encoding, samples: Sequence[tuple[str, str]], trigger: Trigger | None = None
) -> Rows:
    """(prompt, answer) samples as rows; a trigger that is given must be in every prompt."""
    encoded = [encoding.ids(*sample) for sample in samples]
    ids, mask = pad_right([prompt + answer for prompt, answer in encoded], pad_id(encoding.tokenizer))
    rows = Rows(ids, mask, torch.full_like(ids, -1), torch.full_like(ids, -1))
    for i, (prompt, answer) in enumerate(encoded):
        rows.answering[i, len(prompt) - 1 :][: len(answer)] = torch.arange(len(answer))
        if trigger is not None:
            text = samples[i][0]
            tokens = find_trigger(encoding.tokenizer, text, trigger, encoding.fmt)
            if not tokens:
                raise DataError(
                    f"The trigger {str(trigger)!r} is not in the triggered prompt {text[:40]!r}… as it "
                    "is rendered, so its tokens cannot be edited; name the trigger that is in the data, "
                    "or edit without the trigger's own tokens (trigger_tokens=0)."
                )
            rows.trigger[i, [token.place for token in tokens]] = torch.arange(len(tokens))
    return rows
