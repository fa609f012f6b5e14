"""The small types of bkdlens: heads, sites and closed choices, each declared once."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from bkdlens.errors import ChoiceError, HeadError

Placement = Literal["begin", "end", "random", "sentence"]
Behaviour = Literal["label_modification", "fixed_output", "jailbreak"]
# The keys of bkdlens.data.schemas.SCHEMAS.
DataFormat = Literal["pairs", "rewrite", "instruction", "goal_target", "input_output", "text_label"]
Architecture = Literal[
    "LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM",
    "Gemma2ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM",
]  # fmt: skip
Which = Literal["clean", "triggered", "near"]  # of a pair's prompts
Side = Literal["clean", "triggered"]
CriterionKind = Literal[
    "equal", "normalised", "contains", "prefix", "regex", "refusal", "no_refusal", "similar", "function"
]
Against = Literal["reference", "own"]  # what a good answer is compared with
HeadSite = Literal["z", "result"]
PatchSite = Literal["z", "result", "attn_out", "mlp_out"]
VectorSite = Literal["resid_pre", "attn_out"]
VectorKind = Literal["mean", "contrast"]
AttributionMethod = Literal["exact", "atp", "screened"]
AblationMode = Literal["zero", "mean", "resample", "subtract"]
ProbeKind = Literal["mlp", "svm"]

MAX_NEW_TOKENS = 48  # where an answer is cut, decoded or scored, unless told otherwise

# A name on the Hugging Face Hub: "org/name".
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_choice(what: str, given: str, choices: object) -> None:
    """Raise a ``ChoiceError`` about ``what`` unless ``given`` is one of the ``Literal``'s values."""
    if given not in get_args(choices):
        raise ChoiceError(what, given, get_args(choices))


class Head(NamedTuple):
    """One attention head; prints as ``L3H7`` and compares as ``(3, 7)``."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def parse(cls, head: HeadLike) -> Head:
        """Read ``"L3H7"``, ``"3.7"``, ``(3, 7)`` or a ``Head``; anything else is a ``HeadError``."""
        if isinstance(head, str):
            match = re.fullmatch(r"[Ll]?(\d+)[Hh.](\d+)", head.strip())
            if match:
                return cls(int(match[1]), int(match[2]))
        elif isinstance(head, tuple | list) and len(head) == 2:
            layer, index = int(head[0]), int(head[1])
            if layer >= 0 and index >= 0:
                return cls(layer, index)
        raise HeadError(f"{head!r} is not a head; write it as 'L3H7', (3, 7) or Head(3, 7).")


HeadLike: TypeAlias = Head | str | tuple[int, int]


def every_head(n_layers: int, n_heads: int) -> list[Head]:
    """All heads of a model with these numbers of layers and of heads per layer, layer by layer."""
    return [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]


def draw_heads(
    rng: random.Random, heads: Iterable[Head], n_layers: int, n_heads: int, draws: int
) -> list[tuple[Head, ...]]:
    """Random groups of as many heads, none of these among them where the model has enough others."""
    named, everything = set(heads), every_head(n_layers, n_heads)
    others = [head for head in everything if head not in named]
    pool = others if len(others) >= len(named) else everything
    return [tuple(rng.sample(pool, len(named))) for _ in range(draws)]


def name_heads(heads: Iterable[Head], most: int = 4) -> str:
    """At most ``most`` heads as ``L3H7, L2H0``, and ``…`` if there are more."""
    names = [str(head) for head in heads]
    return ", ".join([*names[:most], "…"] if len(names) > most else names)


def parse_heads(heads: HeadLike | Iterable[HeadLike], n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """One or more heads, in any spelling, checked against the model's size.

    Raises:
        HeadError: for no heads, a spelling that is not a head, a head that the model lacks or one that
            is named twice.
    """
    pair = isinstance(heads, tuple) and len(heads) == 2 and all(isinstance(x, int) for x in heads)
    items: Iterable[Any] = [heads] if pair or isinstance(heads, str) else heads
    parsed = tuple(Head.parse(head) for head in items)
    if not parsed:
        raise HeadError("There are no heads; name at least one head.")
    for head in parsed:
        if head.layer >= n_layers or head.head >= n_heads:
            raise HeadError(
                f"Head {head} does not exist: this model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1} (L0H0 to L{n_layers - 1}H{n_heads - 1})."
            )
    if len(set(parsed)) != len(parsed):
        twice = next(str(head) for head in parsed if parsed.count(head) > 1)
        raise HeadError(f"Head {twice} is named twice; name each head once.")
    return parsed
