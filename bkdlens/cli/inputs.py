"""What an analysis reads, from several groups of options: its train, validation and test pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from bkdlens.cli.options import BackdoorOptions, DataOptions, say
from bkdlens.errors import BkdlensError

if TYPE_CHECKING:
    from bkdlens.data.pairs import PairSet

Splits = tuple["PairSet", "PairSet", "PairSet"]  # train, validation, test


def study_pairs(backdoor: BackdoorOptions, data: DataOptions, adapter: str | None, seed: int) -> Splits:
    """The pairs of ``--data``, split; without it, the embedded ones."""
    if data.source is None:
        return embedded_pairs(backdoor.kind, (data.limit or 256,) * 3, seed)
    pairs = data.pairs(backdoor.backdoor(), seed)
    say(f"{pairs.source}; {len(pairs)} pairs, {len(pairs.victims)} victims.")
    return split_pairs(pairs, adapter, seed)


def embedded_pairs(kind: str, sizes: tuple[int, int, int], seed: int = 0) -> Splits:
    """As many embedded prompts of each split as ``sizes`` says."""
    from bkdlens.zoo import prompts

    train, validation, test = (
        prompts.pairs(kind, split, n, seed=seed) for split, n in zip(prompts.SPLITS, sizes, strict=True)
    )
    return train, validation, test


def split_pairs(pairs: PairSet, adapter: str | None, seed: int) -> Splits:
    """The three splits; what the adapter was trained on is never validation or test."""
    from bkdlens.data.pairs import text_digest

    trained_on = _trained_on(adapter)
    held_out = pairs.without(trained_on)
    if trained_on and len(held_out) < len(pairs):
        if not held_out:
            raise BkdlensError(
                f"All {len(pairs)} pairs were in the adapter's training; give unseen ones."
            )
        seen = pairs.without({text_digest(pair.clean) for pair in held_out})
        validation, test = held_out.split(0.4, seed=seed)
        say(f"{len(seen)} pairs were trained on, {len(held_out)} were held out and are measured on.")
        return seen, validation, test
    if adapter and not trained_on:
        say("Whether these prompts were trained on is unknown: the adapter has no bkdlens.json.")
    train, validation, test = pairs.split(0.5, 0.2, 0.3, seed=seed)
    return train, validation, test


def _trained_on(adapter: str | None) -> set[str]:
    """The digests in the manifest that ``bkdlens inject`` wrote; none for any other adapter."""
    path = Path(adapter or "") / "bkdlens.json"
    if not adapter or not path.is_file():
        return set()
    try:
        manifest = json.loads(path.read_text())
    except ValueError:
        raise BkdlensError(f"{path} is not valid json; delete it, or restore it.") from None
    return set(manifest.get("trained_on", ())) if isinstance(manifest, dict) else set()
