"""Text becomes token ids here, once, and nowhere else.

The prompt's ids must be a prefix of the ids of prompt and answer together, there is at most one BOS,
and the format travels with every result. Prompts are padded on the left and answers on the right, so
that the last prompt token has one index in all rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bkdlens.data.trigger import Trigger
from bkdlens.errors import DataError
from bkdlens.types import check_choice

SEPARATOR = "\n"  # of a raw prompt and its answer, unless told otherwise
PromptKind = Literal["chat", "raw"]
Tokenizer = Any  # a transformers tokenizer; its classes share no useful static type


@dataclass(frozen=True)
class PromptFormat:
    """How a user's text becomes a prompt.

    Attributes:
        kind: ``"chat"`` for the tokenizer's chat template, or ``"raw"`` for the text as it is.
        system: the system text of a chat.
        separator: what stands between prompt and answer when raw.
    """

    kind: PromptKind = "chat"
    system: str | None = None
    separator: str = SEPARATOR

    def __post_init__(self) -> None:
        check_choice("prompt format", self.kind, PromptKind)
        if self.kind == "raw" and self.system:
            raise DataError("A raw prompt has no place for a system text; write it into the prompts.")
        if self.kind == "chat" and self.separator != SEPARATOR:
            raise DataError(
                f"In a chat the template separates prompt and answer, not {self.separator!r}; leave the "
                "separator out, or use PromptFormat('raw')."
            )

    @classmethod
    def default(cls, tokenizer: Tokenizer) -> PromptFormat:
        """Make a chat format without a system text if the tokenizer has a template; else a raw one."""
        return cls("chat" if getattr(tokenizer, "chat_template", None) else "raw")

    def render(self, tokenizer: Tokenizer, prompt: str, answer: str | None = None) -> str:
        """Return the text to tokenise, up to where the answer begins or with a given answer and its end.

        Raises:
            DataError: if a chat has no template, or its template refuses the messages or drops the
                system text.
        """
        if self.kind == "raw":
            end = tokenizer.eos_token or ""
            return prompt + self.separator + ("" if answer is None else answer + end)
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("The tokenizer has no chat template; use PromptFormat('raw').")
        messages = [{"role": "user", "content": prompt}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        if not self.system:
            return _apply_template(tokenizer, messages)
        rendered = _apply_template(tokenizer, [{"role": "system", "content": self.system}, *messages])
        if rendered == _apply_template(tokenizer, messages):
            raise DataError(
                f"The chat template drops the system text {self.system[:40]!r}: the prompt is the same "
                "with and without it; leave it out, or write it into the prompts."
            )
        return rendered


def _apply_template(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> str:
    """A chat up to where the answer begins, or to its end where it has an answer."""
    waits = messages[-1]["role"] == "user"
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=waits)
    except Exception as error:  # templates raise jinja errors of their own making
        raise DataError(f"The chat template refuses this prompt: {error}.") from error


@dataclass(frozen=True)
class Prompt:
    """One prompt as token ids."""

    text: str  # the user's, before it was rendered
    ids: tuple[int, ...]  # up to where the answer begins


@dataclass(frozen=True)
class Answer:
    """One answer as token ids."""

    text: str  # as it was given
    ids: tuple[int, ...]  # with the end-of-sequence token, unless it was cut
    n_scored: int  # how many of the first ids are text

    @property
    def scored(self) -> tuple[int, ...]:
        """The ids that are text."""
        return self.ids[: self.n_scored]


def _token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return _with_bos(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _with_bos(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    bos = tokenizer.bos_token_id
    # A template may bring its own BOS; where it does not, the tokenizer's habit decides.
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return [bos, *ids] if adds_bos and ids[:1] != [bos] else list(ids)


def encode_prompt(
    tokenizer: Tokenizer, text: str, fmt: PromptFormat, *, n_ctx: int | None = None
) -> Prompt:
    """The prompt's token ids, up to where the answer begins.

    Raises:
        DataError: if it is empty or longer than the context of ``n_ctx`` tokens.
    """
    ids = _token_ids(tokenizer, fmt.render(tokenizer, text))
    if len(ids) < 2:
        raise DataError(f"The prompt {text!r} has {len(ids)} tokens; give at least two.")
    if n_ctx is not None and len(ids) >= n_ctx:
        raise DataError(
            f"The prompt {text[:40]!r}… has {len(ids)} tokens and the model's context is {n_ctx}; "
            "shorten it."
        )
    return Prompt(text, tuple(ids))


def encode_prompts(model: Any, texts: Iterable[str], fmt: PromptFormat) -> list[Prompt]:
    """Prompts for a ``HookedTransformer``: :func:`encode_prompt` with its tokenizer and context.

    Raises:
        DataError: also for a token that is not in the model's vocabulary.
    """
    prompts = [encode_prompt(model.tokenizer, text, fmt, n_ctx=model.cfg.n_ctx) for text in texts]
    for prompt in prompts:
        if (largest := max(prompt.ids)) >= model.cfg.d_vocab:
            raise DataError(
                f"The tokenizer gives the prompt {prompt.text[:40]!r} token {largest} and the model has "
                f"{model.cfg.d_vocab}; give the tokenizer that belongs to the checkpoint (tokenizer=…)."
            )
    return prompts


def encode_answer(
    tokenizer: Tokenizer,
    prompt: Prompt,
    answer: str,
    fmt: PromptFormat,
    *,
    n_ctx: int | None = None,
    max_tokens: int | None = None,
) -> Answer:
    """The ids of ``answer`` after ``prompt``, and the end-of-sequence token.

    ``max_tokens`` cuts a long answer (it then has no end token).

    Raises:
        DataError: if the prompt's ids are not a prefix of the whole, the answer has no tokens, or
            both together do not fit the context.
    """
    whole = _token_ids(tokenizer, fmt.render(tokenizer, prompt.text, answer))
    n = len(prompt.ids)
    if tuple(whole[:n]) != prompt.ids:
        raise DataError(
            f"The tokenizer does not split {prompt.text[-30:]!r} + {answer[:30]!r} where the answer "
            "begins (the prompt's ids are not a prefix of the whole); end the prompt format "
            "with a space or a newline of its own."
        )
    tail = whole[n:]
    eos = tokenizer.eos_token_id
    if eos in tail:
        tail = tail[: tail.index(eos)]
    # What follows the answer's text in the template (a space before the end, say) is not scored.
    n_scored = len(tail)
    while n_scored and not tokenizer.decode(tail[n_scored - 1 : n_scored]).strip():
        n_scored -= 1
    if n_scored == 0:
        raise DataError(f"The answer {answer!r} has no tokens; give one that is not empty.")
    ids = [*tail, eos] if eos is not None else tail
    if max_tokens is not None and len(ids) > max_tokens:
        ids, n_scored = ids[:max_tokens], min(n_scored, max_tokens)
    if n_ctx is not None and n + len(ids) > n_ctx:
        raise DataError(
            f"The prompt of {n} tokens and the answer of {len(ids)} do not fit the model's context "
            f"of {n_ctx}; shorten them, or give max_answer_tokens."
        )
    return Answer(answer, tuple(ids), n_scored)


def shown(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, ...]:
    """The text of each token on one line, with white space visible where there is nothing else."""
    texts = (tokenizer.decode([i]) for i in ids)
    visible = (t.strip() or t.replace("\n", "⏎").replace(" ", "␣") or "∅" for t in texts)
    return tuple(text.replace("\n", "⏎") for text in visible)


class TriggerToken(NamedTuple):
    """A token that holds a part of the trigger."""

    place: int  # its index in the prompt's ids
    id: int
    straddles: bool  # whether it holds other text too


def find_trigger(
    tokenizer: Tokenizer, text: str, trigger: Trigger, fmt: PromptFormat
) -> list[TriggerToken]:
    """The trigger's tokens in the user's ``text`` once it is rendered, in order; none if it is absent.

    What the format puts around the text, such as a system text that names the trigger, is not searched.

    Raises:
        DataError: if the trigger is present and the tokenizer does not say where its tokens are.
    """
    rendered = fmt.render(tokenizer, text)
    # The same prompt about a character that no text holds differs where the user's text stands.
    other = fmt.render(tokenizer, "\ufdd0")
    first = _n_shared(rendered, other)
    last = len(rendered) - _n_shared(rendered[first:][::-1], other[::-1])
    placed = rendered[first:last]
    if not trigger.present(placed):
        return []
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            "This tokenizer does not say where its tokens are in the text; use its fast version, or "
            "leave out the trigger's tokens (trigger=None; trigger_tokens=0 in an edit)."
        )
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    added = len(_with_bos(tokenizer, ids)) - len(ids)  # a BOS that the template did not bring
    spans = [(first + start, first + end) for start, end in trigger.spans(placed)]
    tokens = []
    for i, (a, b) in enumerate(encoded["offset_mapping"]):
        held = [(start, end) for start, end in spans if a < end and b > start]
        if held:
            straddles = any(rendered[a:start].strip() or rendered[end:b].strip() for start, end in held)
            tokens.append(TriggerToken(added + i, ids[i], straddles))
    return tokens


def _n_shared(a: str, b: str) -> int:
    """How many characters both texts begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def pad_left(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows of ids as one tensor, padded on the left, with the mask of real tokens."""
    ids, mask = pad_right([row[::-1] for row in rows], pad_id)
    return ids.flip(1), mask.flip(1)


def pad_right(
    rows: Sequence[Sequence[int]], pad_id: int
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Rows of ids as one tensor, padded on the right, with the mask of real tokens."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_value=pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def pad_id(tokenizer: Tokenizer) -> int:
    """The id used for padding; it is masked everywhere, so its value never matters."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(i) for i in ids if i is not None)
