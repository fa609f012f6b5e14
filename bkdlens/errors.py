"""The errors of bkdlens: one sentence with what was given, what is allowed and what to do.

The shell prints the message alone and exits with code 2; in Python they are ordinary exceptions.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class BkdlensError(Exception):
    """Any error that the caller can fix; the message says how."""


class DataError(BkdlensError):
    """A data file, a prompt or an answer that cannot be used as it is."""


class CheckpointError(BkdlensError):
    """A checkpoint or adapter that cannot be loaded, or must not be trusted."""


class HeadError(BkdlensError):
    """A head or layer that the model does not have."""


class ChoiceError(BkdlensError, ValueError):
    """A name that is not one of a closed set: ``ChoiceError("vector site", "zz", ("resid_pre", …))``."""

    def __init__(self, what: str, given: object, allowed: Iterable[object]) -> None:
        super().__init__(what, given, tuple(allowed))

    def __str__(self) -> str:
        return unknown(*self.args)


class InputError(BkdlensError, TypeError):
    """An argument of another kind than the function takes."""


class HookError(BkdlensError):
    """An intervention that never fired, or does not fit the model."""


class ResultError(BkdlensError):
    """A saved result that is missing, damaged or of another kind."""


def unknown(what: str, given: object, allowed: Iterable[object]) -> str:
    """The sentence for a name that is not one of a closed set: ``unknown("site", "zz", SITES)``."""
    names = [str(name) for name in allowed]
    close = get_close_matches(str(given), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return f"There is no {what} {given!r}; use one of: {', '.join(names)}.{hint}"


def one_line(error: BaseException) -> str:
    """The message of an error of another library, on one line."""
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
