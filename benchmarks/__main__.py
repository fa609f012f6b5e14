"""``python -m benchmarks``: run everything, print the tables, and write RESULTS.md and its picture."""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks import counts
from benchmarks.bench import Line, head_sweep, ratio, steering_sweep
from benchmarks.results import machine, write
from benchmarks.workloads import SHAPES, SIZES, make_work

SWEEPS = ("published", "transformer_lens", "nnsight", "pyvene")
DECODERS = (
    "Hugging Face generate, same stopping rule", "Hugging Face generate", "HookedTransformer.generate",
)  # fmt: skip
# Pairs, and what is timed, by size: the largest against the fewest, for time and memory.
PLAN = {
    "1 M": (16, SWEEPS, DECODERS),
    "33 M": (16, SWEEPS, DECODERS),
    "300 M": (2, ("published", "transformer_lens"), ()),
}


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--sizes", nargs="*", default=[size.name for size in SIZES])
    parser.add_argument("--shapes", nargs="*", default=[shape.name for shape in SHAPES])
    parser.add_argument("--pairs", type=int, help="pairs a model (default: 16; 2 of the largest)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder of RESULTS.md")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    logging.set_verbosity_error()
    given.out.mkdir(parents=True, exist_ok=True)
    tables: list[dict] = []
    for size in SIZES:
        for shape in SHAPES:
            if size.name not in given.sizes or shape.name not in given.shapes:
                continue
            n_pairs, sweeps, decoders = PLAN[size.name]
            work = make_work(shape, size, given.pairs or n_pairs)
            rate = counts.matmul_rate(torch.device("cpu"), torch.float32)
            measured = [
                (
                    "head sweep",
                    partial(head_sweep, work, rate, given.repeats, sweeps, functions=bool(decoders)),
                )
            ]
            if decoders:
                steer = partial(steering_sweep, work, given.repeats, decoders)
                measured.append(("steering sweep", steer))
            for kind, measure in measured:
                print(f"\n{kind}, {size.name}, {shape.name}, {len(work.pairs)} pairs", flush=True)
                lines: list[Line] = []
                for line in measure():
                    lines.append(line)
                    first = ratio(lines, line, lines[0].name)
                    near = "" if line.roofline is None else f"  roofline {line.roofline:.2f}"
                    print(f"  {line.name:46s} {line.seconds:10.2f} s {first:8.1f}×{near}", flush=True)
                tables.append({
                    "kind": kind, "size": size.name, "shape": shape.name, "pairs": len(work.pairs),
                    "rate": rate, "answer": shape.answer, "lines": [asdict(line) for line in lines],
                })  # fmt: skip
            del work
            # After every model: what is done stays, should the rest be stopped.
            content = {
                "machine": machine(), "threads": given.threads, "repeats": given.repeats,
                "python": platform.python_version(), "tables": tables,
            }  # fmt: skip
            (given.out / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    for path in write(given.out):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
