"""Heads in a terminal: a heatmap of unicode blocks that is read without colour."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.display.text import plain, signed

# From none to all of the largest effect; a negative one has its sign before it, so colour is not needed.
SHADES, PLAIN_SHADES = " ░▒▓█", " .:*#"
STEPS = (0.05, 0.25, 0.5, 0.75)  # of the largest |ACIE|
POSITIVE, NEGATIVE = "dark_orange3", "dodger_blue2"


def heatmap(attribution: HeadAttribution, width: int, *, unicode: bool = True) -> Group:
    """ACIE by layer (down from the last) and head, two columns a head; wide ones are cut into blocks.

    A cell is a sign and a shade: the shade is the share of the largest |ACIE|, ``−`` marks negative
    effects and ``≈`` estimates.
    """
    acie = attribution.acie
    n_layers, n_heads = acie.shape
    limit = float(acie.abs().max()) or 1.0
    shades, minus, about = (SHADES, "−", "≈") if unicode else (PLAIN_SHADES, "-", "~")
    margin = len(str(n_layers - 1)) + 2
    fit = max(1, (width - margin - len("  head")) // 2)
    blocks: list[RenderableType] = [
        Text(f"ACIE by layer and head, {plain(attribution.label)}", style="bold")
    ]
    for start in range(0, n_heads, fit):
        heads = range(start, min(start + fit, n_heads))
        for layer in reversed(range(n_layers)):
            line = Text(f"{layer:>{margin - 2}} ", no_wrap=True)
            for head in heads:
                value = float(acie[layer, head])
                level = sum(abs(value) >= step * limit for step in STEPS)
                sign = minus if value < 0 and level else " "
                if level and not bool(attribution.exact[layer, head]):
                    sign = about
                line.append(sign + shades[level], POSITIVE if value > 0 else NEGATIVE)
            blocks.append(line)
        marks = "".join(f"{head:>2}" if head % 2 == 0 or n_heads <= 10 else "  " for head in heads)
        blocks.append(Text(" " * (margin - 1) + marks + "  head", style="dim", no_wrap=True))
    key = "  ".join(f"{shades[i + 1]} ≥ {signed(step * limit, 3)[1:]}" for i, step in enumerate(STEPS))
    estimated = "" if bool(attribution.exact.all()) else f"  {about} estimated"
    text = f"{key}  {minus} negative{estimated}"
    blocks.append(Text(text if unicode else text.replace("≥", ">="), style="dim"))
    return Group(*blocks, "")
