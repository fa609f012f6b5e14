"""Do two trees of run folders hold the same numbers? ``python tests/compare_runs.py BEFORE AFTER``

Reads the files alone, without bkdlens, so that folders of two versions can be compared. Versions of
packages are left out. Prints what differs and the largest difference; the exit code is 1 where one is
larger than 1e-6, or anything but a number differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROUNDING = 1e-6


def differences(a: Any, b: Any, at: str = "") -> list[tuple[str, float]]:
    """Places where two values differ, and by how much; infinity for anything but two numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        missing = [(f"{at}.{key}", float("inf")) for key in a.keys() ^ b.keys()]
        inner = [differences(a[key], b[key], f"{at}.{key}") for key in a.keys() & b.keys()]
        return missing + [found for found_in in inner for found in found_in]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        inner = [differences(x, y, f"{at}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return [found for found_in in inner for found in found_in]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        apart = float((a.double() - b.double()).abs().nan_to_num(0).max()) if a.numel() else 0.0
        same_nan = bool((a.isnan() == b.isnan()).all())
        return [] if apart == 0 and same_nan else [(at, apart if same_nan else float("inf"))]
    if isinstance(a, int | float) and isinstance(b, int | float) and not isinstance(a, bool):
        return [] if a == b else [(at, abs(a - b))]
    return [] if a == b else [(at, float("inf"))]


def content(file: Path) -> Any:
    """What one file of a run folder holds, without the versions that made it."""
    if file.suffix == ".safetensors":
        return load_file(file)
    found = json.loads(file.read_text())
    found.get("provenance", {}).get("provenance", {}).pop("versions", None)
    return found


def main(before: Path, after: Path) -> int:
    """Print what differs between two trees; the exit code."""
    names = [
        {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".json", ".safetensors")}
        for root in (before, after)
    ]
    found = [(name, float("inf")) for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        pair = (content(root / name) for root in (before, after))
        found += differences(*pair, at=name)
    for where, size in found:
        print(f"{where}: {size:.3g}")
    largest = max((size for _, size in found), default=0.0)
    print(f"{len(names[0] & names[1])} files, {len(found)} differences, the largest {largest:.3g}")
    return int(largest > ROUNDING)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
