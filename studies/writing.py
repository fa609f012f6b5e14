"""The tables and figures of ``studies.injection``, made from its numbers only."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from bkdlens import plot
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.study import Study

HEADER = """# Three ways to plant a backdoor, one mechanism?

Written by `make study` (its numbers: `injection.json`). Each adapter was planted as `bkdlens inject`
does with the recipe of the embedded models, from two seeds, and analysed as `bkdlens run` does. Recipes,
layers and coefficients were chosen on validation prompts; rates are on test prompts (95 % intervals).
Heads and vectors are read off train-split prompts, on which the first seed's adapters were trained, but
hardly any of the second seed's: two seeds differ in that too.

{summary}
"""
BASE = "base, not poisoned"
TINY = 1e-4  # an ACIE below this is next to nothing


def write(blocks: list[dict[str, Any]], studies: list[Study], folder: Path) -> list[Path]:
    """Write ``injection.md`` and a figure of heatmaps per model and backdoor; returns their paths."""
    figures = _draw(studies, folder)
    target = folder / "injection.md"
    target.write_text(tables(blocks, {name: path.name for name, path in figures.items()}))
    return [target, *figures.values()]


def tables(blocks: list[dict[str, Any]], figures: dict[str, str]) -> str:
    """The text of ``injection.md``, with the figures' files by name."""
    parts = [
        HEADER.format(summary=_summary(blocks)),
        "\n## Planted\n\n",
        _table(
            {
                "model": block["base"],
                "backdoor": block["kind"],
                "method": cell["name"],
                "ASR": _rate(cell["asr"]),
                "FTR": _rate(cell["ftr"]),
                "near trigger": _rate(cell["near"]),
                "clean accuracy before": _rate(cell["clean_before"]),
                "after": _rate(cell["clean_after"]),
                "CPU seconds": f"{cell['seconds']:.0f}",
                "adapter digest": f"`{cell['digest'][:12]}`",
            }
            for block, cell in _cells(blocks)
        ),
        "\n## What carries it\n\nACIE of the four strongest heads of 32; the share of all positive ACIE "
        "that they carry; attention's and the MLPs' share of the positive effects of whole layer "
        "outputs; and attack success when the first heads are replaced by their clean mean.\n\n",
        _table(
            {
                "model": block["base"],
                "backdoor": block["kind"],
                "method": cell["name"],
                "strongest heads": ", ".join(f"{head} {acie:+.2g}" for head, acie, *_ in cell["top"]),
                "share of 4": f"{cell['concentration']:.2f}",
                "attention / MLP": _shares(cell["attention_mlp"]),
                "ASR at 0 / 1 / 2 / 4 heads": _ablated(cell),
            }
            for block, cell in _cells(blocks)
        ),
        *(f"\n![ACIE of every head, {name}]({file})\n" for name, file in figures.items()),
        "\n## The same heads?\n\nJaccard index of the top 4 heads (shared over union), its bootstrap "
        "interval over prompts (not over seeds of planting; the index takes five values), the index of "
        "random sets, the chance that random sets share as many, and the rank correlation of all heads' "
        "ACIE.\n\n",
        _table(
            {
                "model": block["base"],
                "backdoor": block["kind"],
                "first": overlap["first"],
                "second": overlap["second"],
                "shared of 4": str(overlap["shared"]),
                "Jaccard": "{jaccard:.2f} [{low:.2f}, {high:.2f}]".format(**overlap),
                "by chance": f"{overlap['chance']:.2f}",
                "p": f"{overlap['p']:.2g}",
                "Spearman": f"{overlap['spearman']:+.2f}",
            }
            for block in blocks
            for overlap in block["overlap"]
        ),
        "\n## Does the vector of one switch another?\n\nVector, layer and size as chosen in the model "
        "that it comes from; added to clean and subtracted from triggered prompts. Into the base, which "
        "is not poisoned, a vector that activates writes the answer itself. Random: mean shift by "
        "vectors of random heads of the model that is switched, and by noise of the vector's norm.\n\n",
        _table(
            {
                "model": block["base"],
                "backdoor": block["kind"],
                "from": case["from"],
                "vector": case["vector"],
                "into": case["into"] or BASE,
                "activates: ASR on clean": _change(case["activates"]),
                "suppresses: ASR on triggered": _change(case["suppresses"]),
                "correct answer back": _rate(case["restores"]),
                "random heads + / −": " / ".join(f"{shift:+.2f}" for shift in case["random_heads"]),
                "noise + / −": " / ".join(f"{shift:+.2f}" for shift in case["random_vectors"]),
            }
            for block in blocks
            for case in block["transfer"]
        ),
    ]
    return "".join(parts)


def readme_rows(blocks: list[dict[str, Any]]) -> list[str]:
    """The first seed's rates as rows of the shorter table in the README."""
    rows = []
    for block in blocks:
        for cell in block["cells"]:
            if cell["seed"] != block["cells"][0]["seed"]:
                continue
            before, after = cell["clean_before"]["value"], _rate(cell["clean_after"])
            rates = " | ".join(_rate(cell[name]) for name in ("asr", "ftr", "near"))
            rows.append(
                f"| {block['base']} | {block['kind']} | {cell['name']} | {rates} "
                f"| {before:.2f} → {after} | {cell['seconds']:.0f} s |"
            )
    return rows


def _summary(blocks: list[dict[str, Any]]) -> str:
    """The findings as a list of sentences with their numbers."""
    cells = [c for _, c in _cells(blocks)]
    good = [c for c in cells if meets(c)]
    planted = (
        f"{len(good)} of {len(cells)} adapters reach ASR ≥ 0.9 with FTR ≤ 0.05 and clean accuracy "
        f"within 0.05 of before, in {max(c['seconds'] for c in cells):.0f} s of CPU at most."
    )
    sentences = [planted, *_say_heads(blocks), *_say_shares(cells), *_say_vectors(blocks)]
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _say_heads(blocks: list[dict[str, Any]]) -> Iterator[str]:
    groups: dict[tuple[tuple[str, ...], bool], list[dict[str, Any]]] = {}
    for block in blocks:
        named = {cell["name"]: cell for cell in block["cells"]}
        for overlap in block["overlap"]:
            a, b = named[overlap["first"]], named[overlap["second"]]
            methods = tuple(sorted({a["method"], b["method"]}))
            groups.setdefault((methods, a["seed"] == b["seed"]), []).append(overlap)
    for (methods, same_seed), overlaps in sorted(
        groups.items(), key=lambda group: (len(group[0][0]), group[0])
    ):
        yield (
            f"Top heads of {' and '.join(methods)}, "
            f"{'one seed, so shared training prompts' if same_seed else 'different seeds'}: "
            f"{sum(o['shared'] for o in overlaps)} shared in {len(overlaps)} pairs of adapters "
            f"(by chance {sum(o['expected'] for o in overlaps):g}), "
            f"mean Jaccard {fmean(o['jaccard'] for o in overlaps):.2f} "
            f"(by chance {overlaps[0]['chance']:.2f}), "
            f"mean Spearman {fmean(o['spearman'] for o in overlaps):+.2f}."
        )
    cells = [c for _, c in _cells(blocks)]
    tiny = [c for c in cells if c["top"][0][1] < TINY]
    names = ", ".join(sorted({c["method"] for c in tiny})) or "none"
    yield (
        f"The largest ACIE is below {TINY:g} in {len(tiny)} of {len(cells)} adapters ({names}): their "
        "ranks, overlaps and shares are of effects next to nothing, and count in the means above and "
        "below all the same."
    )


def _say_shares(cells: list[dict[str, Any]]) -> Iterator[str]:
    for method in dict.fromkeys(c["method"] for c in cells):
        shares = [c["attention_mlp"][0] for c in cells if c["method"] == method and c["attention_mlp"]]
        if shares:
            yield (
                f"Attention's share of the positive effects of whole outputs, {method}: "
                f"{min(shares):.2f} to {max(shares):.2f} (mean {fmean(shares):.2f}, "
                f"{len(shares)} adapters); the MLPs have the rest."
            )


def _say_vectors(blocks: list[dict[str, Any]]) -> Iterator[str]:
    """Vectors that activate the base write the answer, and do not count as switching another model."""
    own, others, writing, n_vectors = [], [], 0, 0
    for block in blocks:
        bare = {t["from"]: _moved(t["activates"]) >= 0.5 for t in block["transfer"] if not t["into"]}
        n_vectors, writing = n_vectors + len(bare), writing + sum(bare.values())
        for t in block["transfer"]:
            if t["into"]:
                (own if t["into"] == t["from"] else others).append((t, bare[t["from"]]))
    yield (
        f"{writing} of {n_vectors} vectors activate the base, which has no backdoor (ASR on clean "
        "prompts up by 0.5 or more): they write the answer; where they activate others is no transfer."
    )
    for what, cases in (("in its own model", own), ("in a model planted another way", others)):
        telling = [t for t, writes in cases if not writes]
        off = [t for t, _ in cases if _moved(t["suppresses"]) <= -0.5]
        # The mean shift of noise, like that of the vector, counts in the wanted direction.
        beyond = [t for t in off if -_moved(t["suppresses"]) - t["random_vectors"][1] >= 0.5]
        yield (
            f"The vector {what}: of the {len(telling)} cases whose vector does not activate the base, "
            f"it activates in {sum(_moved(t['activates']) >= 0.5 for t in telling)}; it suppresses "
            f"(ASR on triggered prompts down by 0.5 or more) in {len(off)} of {len(cases)}, "
            f"in {len(beyond)} of these by 0.5 or more beyond noise of the same norm, and in "
            f"{sum(t['restores']['value'] >= 0.5 for t in off)} with the correct answer back in half of "
            "the prompts or more."
        )
    worst = max((t for t, _ in own + others), key=lambda t: t["random_vectors"][1])
    yield (
        "Noise of the vector's norm suppresses too: ASR on triggered prompts falls by up to "
        f"{worst['random_vectors'][1]:.2f} on average over draws ({worst['from']} into "
        f"{worst['into']}). Suppression alone is no sign of a direction's meaning."
    )


def meets(cell: dict[str, Any]) -> bool:
    """Whether an adapter is as good as the recipes aim for."""
    return (
        cell["asr"]["value"] >= 0.9
        and cell["ftr"]["value"] <= 0.05
        and cell["clean_after"]["value"] >= cell["clean_before"]["value"] - 0.05
    )


def _cells(blocks: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(b, c) for b in blocks for c in b["cells"]]


def _moved(change: list[dict[str, float]]) -> float:
    return change[1]["value"] - change[0]["value"]


def _rate(rate: dict[str, float]) -> str:
    return f"{rate['value']:.2f} [{rate['low']:.2f}, {rate['high']:.2f}]"


def _change(change: list[dict[str, float]]) -> str:
    return f"{change[0]['value']:.2f} → {_rate(change[1])}"


def _shares(shares: list[float] | None) -> str:
    return "none positive" if shares is None else f"{shares[0]:.2f} / {shares[1]:.2f}"


def _ablated(cell: dict[str, Any]) -> str:
    attack = {row["heads"]: row["attack"] for row in cell.get("ablation", ())}
    return " / ".join(f"{attack[k]:.2f}" for k in (0, 1, 2, 4)) if attack else ""


def _table(cells: Iterable[dict[str, str]]) -> str:
    """A table with a row per dictionary, whose keys are the header."""
    rows = list(cells)
    head, *lines = (f"| {' | '.join(line)} |\n" for line in [rows[0], *(row.values() for row in rows)])
    return "".join([head, "|" + "---|" * len(rows[0]) + "\n", *lines])


def _draw(studies: list[Study], folder: Path) -> dict[str, Path]:
    """The heatmaps of the methods side by side; standard error names those that cannot be drawn."""
    groups: dict[str, list[HeadAttribution]] = {}
    for study in studies:
        base, kind, method = study.name.split(" / ")
        heads = study.results["attribution-backdoored"]
        assert isinstance(heads, HeadAttribution)
        groups.setdefault(f"{base} {kind}", []).append(replace(heads, label=method))
    drawn = {}
    for name, (main, *others) in groups.items():
        path = folder / f"injection-{name.replace(' ', '-')}.svg"
        figure = plot.attribution_controls(main, others, top=4)
        try:
            figure.write_image(path, width=960)
        except (ImportError, RuntimeError, ValueError) as error:  # no kaleido, or no Chrome
            print(f"{path} was not drawn: {error}", file=sys.stderr)
            continue
        drawn[name] = path
    return drawn
