"""Arguments of another kind than a function takes become one sentence, before anything is run.

The annotations are the rule: :func:`checked` reads them, so that no function repeats them as code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, wraps
from types import NoneType, UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from torch import Tensor
from transformer_lens import HookedTransformer

from bkdlens.data.backdoor import PromptPair
from bkdlens.data.check import refuse_lost_text
from bkdlens.data.pairs import PairSet
from bkdlens.data.prompts import PromptFormat
from bkdlens.errors import InputError

P = ParamSpec("P")
T = TypeVar("T")

SEVERAL = (Sequence, Iterable)  # as annotated; whatever can be gone through is taken for one
# What a value of a kind is called, and how one comes by it.
NAMES: dict[Any, str] = {
    HookedTransformer: "a model that bkdlens.load gives",
    PairSet: "a PairSet, as bkdlens.read_pairs gives",
    PromptPair: "a PromptPair, one of a PairSet",
    PromptFormat: "a PromptFormat",
    Tensor: "a tensor",
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: "None",
}


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which raises an ``InputError`` for an argument that its annotation does not allow.

    Pairs that come with a model must survive its tokenizer, too (:func:`refuse_lost_text`).
    """
    signature, inner = inspect.signature(function), inspect.unwrap(function)
    places = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    call = f"{function.__name__}({', '.join(name for name in places if name != 'cls')}, …)"
    hints: dict[str, Any] = {}

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if not hints:  # when first called, so that importing stays quick
            hints.update(get_type_hints(inner))
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # which the function raises better
            return function(*args, **kwargs)
        for name, value in given.items():
            if name in hints and not _fits(value, hints[name]):
                raise InputError(
                    f"In {call}, {name} must be {_named(hints[name])}, not {_what(value)}; "
                    f"{_advice(name, value, hints[name])}."
                )
        model = given.get("model")
        for value in given.values():
            if isinstance(value, PairSet) and isinstance(model, HookedTransformer):
                refuse_lost_text(model.tokenizer, value)
        return function(*args, **kwargs)

    return wrapped


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated kind; what the rules below do not know is allowed."""
    kind = get_origin(hint) or getattr(hint, "array_type", hint)
    if kind in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if kind in SEVERAL or (kind is tuple and get_args(hint)[-1:] == (Ellipsis,)):
        if not isinstance(value, Iterable) or isinstance(value, str | Mapping):
            return False
        each = value if isinstance(value, Collection) else ()  # an iterator must not be used up
        return all(_fits(one, get_args(hint)[0]) for one in each) if get_args(hint) else True
    if kind is tuple:
        return isinstance(value, tuple | list)
    if kind is int:
        return hasattr(value, "__index__")
    if kind is float:
        return hasattr(value, "__float__") or hasattr(value, "__index__")
    if kind in (Any, Literal) or not isinstance(kind, type):
        return True  # a choice is checked where it is made
    return isinstance(value, kind)


@lru_cache
def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _named(hint: Any) -> str:
    """The allowed kinds in words, without the ``None`` that only stands for a default."""
    names = []
    for option in _options(hint):
        kind = get_origin(option) or getattr(option, "array_type", option)
        if kind in SEVERAL or (kind is tuple and get_args(option)[-1:] == (Ellipsis,)):
            names.append("several in a list")
        elif kind is Literal:
            names.append("a text")
        elif kind is not NoneType:
            name = getattr(kind, "__name__", str(kind))
            names.append(NAMES.get(kind) or f"a{'n' * (name[0] in 'AEIOU')} {name}")
    return " or ".join(dict.fromkeys(names))


def _what(value: Any) -> str:
    """A wrong value in words: short ones as they are, others by their kind."""
    if value is None or isinstance(value, str | int | float):
        text = repr(value)
        return text if len(text) <= 40 else text[:39] + "…'"
    if isinstance(value, list | tuple | set):
        kinds = sorted({type(each).__name__ for each in value})
        return f"a {type(value).__name__} of {len(value)} {' and '.join(kinds)}".rstrip()
    return f"a {type(value).__name__}"


def _advice(name: str, value: Any, hint: Any) -> str:
    """What to do, as far as the value tells."""
    options = _options(hint)
    if HookedTransformer in options and hasattr(value, "state_dict"):
        return "load it first, with bkdlens.load(model, tokenizer=tokenizer)"
    if isinstance(value, PairSet) and str in options:
        return f"give {name}=pairs.clean or pairs.triggered"
    if _fits([value], hint):
        return f"give {name}=[{value!r}]"
    if isinstance(value, list | tuple) and value and _fits(value[0], hint):
        return f"give one, as in {name}={value[0]!r}"
    return "give one, and mind the order"
