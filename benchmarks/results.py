"""``results*.json`` to RESULTS.md and its picture."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "transformer-lens", "nnsight", "pyvene")
HEADER = """# Measured speed

Written by `make bench` (float32, {threads} thread{s}, medians of {repeats} runs after one more).
A peer whose cost is the same for every head, layer or intervention is timed on a part and multiplied,
as the column *timed* says. Machine: {machine}. {versions}.

*Difference* is the largest difference from our numbers, in nats of the answer's log probability per
token (of decoding: answers judged otherwise), compared before timing. *Roofline* is the fewest
multiply-adds that the exact method needs (`counts.py`), over time × the rate of a 2048³ matrix product
measured in the same run.
"""


def machine() -> str:
    """Processor and cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor()}, {len(names) or '?'} cores"


def versions() -> str:
    """Of what was timed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def write(folder: Path) -> list[Path]:
    """Make the tables and the picture from the numbers in ``folder``."""
    content = json.loads((folder / "results.json").read_text())
    n = content["threads"]
    text = HEADER.format(
        threads=n, s="" if n == 1 else "s", repeats=content["repeats"],
        machine=content["machine"], versions=versions(),
    )  # fmt: skip
    if note := content.get("note"):  # what a reader of this record should know
        text += f"\n{note}\n"
    for table in content["tables"]:
        text += _table(table)
    text += _gpu(folder / "results_gpu.json")
    for extra in sorted(folder.glob("*.part.md")):
        text += "\n" + extra.read_text()
    (folder / "RESULTS.md").write_text(text)
    written = [folder / "RESULTS.md"]
    picture = _picture(content, folder / "speed.svg")
    return [*written, picture] if picture else written


def _table(table: dict[str, Any]) -> str:
    lines = table["lines"]
    rows = [
        f"\n## {table['kind'].capitalize()}, {table['size']} model, {table['shape']} shape "
        f"({table['pairs']} pairs, {table['answer']}-token answers)\n",
        "| | seconds | times faster than the first | timed | difference | roofline |",
        "|---|---|---|---|---|---|",
    ]
    for line in lines:
        difference = "" if line["difference"] is None else f"{line['difference']:.1e}"
        roofline = "" if line["roofline"] is None else f"{line['roofline']:.2f}"
        times = lines[0]["seconds"] / line["seconds"]
        rows.append(
            f"| {line['name']} | {line['seconds']:.2f} | {times:.1f} | {line['part']} | {difference} "
            f"| {roofline} |"
        )
    return "\n".join(rows) + "\n"


def _gpu(path: Path) -> str:
    head = "\n## 7B shapes on a GPU (`python -m benchmarks.gpu_7b`)\n\n"
    if not path.exists():
        return head + "Not measured: no GPU was at hand.\n"
    content = json.loads(path.read_text())
    rows = [
        f"{content['machine']}, bfloat16, random weights.\n",
        "| model | answer tokens | pairs | sweep, s | peak GB | roofline | ASR evaluations a minute |",
        "|---|---|---|---|---|---|---|",
    ]
    rows += [
        f"| {r['model']} | {r['answer']} | {r['pairs']} | {r['sweep_seconds']:.1f} | {r['peak_gb']:.1f} "
        f"| {r['roofline']:.2f} | {r['evaluations_per_minute']:.0f} |"
        for r in content["rows"]
    ]
    return head + "\n".join(rows) + "\n"


def _picture(content: dict[str, Any], path: Path) -> Path | None:
    """Seconds a pair by model size, one panel an answer length."""
    try:
        import matplotlib
    except ImportError:
        print("No picture: matplotlib is not installed (pip install 'bkdlens[bench]').")
        return None
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bkdlens"  # the same numbers give the same file
    import matplotlib.pyplot as plt

    ways = {
        "published": ("published algorithm", "#5b5b5b", "s", ":"),
        "transformer_lens": ("TransformerLens, one run a head", "#0072B2", "^", "--"),
        "nnsight": ("nnsight, a layer's heads a batch", "#E69F00", "D", "--"),
        "pyvene": ("pyvene, a layer's heads a batch", "#CC79A7", "v", "--"),
        "ours, exact": ("bkdlens, exact", "#D55E00", "o", "-"),
        "ours, AtP": ("bkdlens, AtP (estimate)", "#009E73", "o", "-"),
    }
    sweeps = [table for table in content["tables"] if table["kind"] == "head sweep"]
    shapes = list(dict.fromkeys((table["shape"], table["answer"]) for table in sweeps))
    sizes = list(dict.fromkeys(table["size"] for table in sweeps))
    fig, axes = plt.subplots(1, len(shapes), figsize=(9, 3.8), sharey=True, squeeze=False)
    for axis, (shape, answer) in zip(axes[0], shapes, strict=True):
        for name, (label, colour, marker, dash) in ways.items():
            points = [
                (sizes.index(table["size"]), line["seconds"] / table["pairs"])
                for table in sweeps
                if table["shape"] == shape
                for line in table["lines"]
                if line["name"] == name
            ]
            if points:
                axis.plot(*zip(*points, strict=True), dash, color=colour, marker=marker, label=label)
        axis.set_yscale("log")
        axis.set_xticks(range(len(sizes)), sizes)
        axis.set_xlabel("parameters")
        axis.set_title(f"{shape} lengths, {answer}-token answers", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("seconds a pair, all heads")
    handles = {
        label: handle
        for axis in axes[0]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    fig.legend(
        handles.values(), handles.keys(), loc="lower center", ncols=3, frameon=False, fontsize=8.5
    )
    fig.tight_layout(rect=(0, 0.13, 1, 1))
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    return path
