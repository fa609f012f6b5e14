"""Do three ways of planting a backdoor make the same mechanism? Run by ``make study``.

Each backdoor is planted in each embedded model by supervised tuning, by preferences and by an edit,
from two seeds. Each adapter goes through the analyses of ``bkdlens run``; compared are the heads, the
shares of attention and MLPs, and whether the vector of one adapter switches another.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bkdlens import inject, zoo
from bkdlens.analyses.attribution.claims import layer_shares, ranked
from bkdlens.analyses.attribution.compare import compare_heads
from bkdlens.analyses.attribution.measure import HeadAttribution
from bkdlens.analyses.behaviour.measure import BehaviourResult, measure_behaviour
from bkdlens.analyses.steering.measure import BackdoorVector, SteeringResult, sweep_layers
from bkdlens.engines.cache import cache_activations
from bkdlens.errors import BkdlensError
from bkdlens.inject import METHODS, recipes
from bkdlens.inject.planting import MANIFEST
from bkdlens.metrics import Rate
from bkdlens.models.load import load
from bkdlens.report.page import write_report
from bkdlens.results import replacing
from bkdlens.runs.run import StudySettings, run_study
from bkdlens.study import Study
from studies.writing import write

BACKDOORS = ("fixed_output", "label_modification")
# Pairs of each split; label modification has one victim in four.
SIZES = {"fixed_output": (256, 100, 300), "label_modification": (256, 200, 400)}
SETTINGS = StudySettings(max_new_tokens=24)
K = 4  # of 32 heads


@dataclass(frozen=True)
class Cell:
    """One adapter: how it is made, and the folder of it and its results."""

    base: str
    kind: str
    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """The method, with the seed unless it is 0."""
        return self.method + (f" (seed {self.seed})" if self.seed else "")

    @property
    def adapter(self) -> Path:
        """The peft folder."""
        return self.folder / "adapter"


def plant(cell: Cell) -> dict[str, Any]:
    """Make the adapter unless it exists; returns its digest and the CPU seconds that it took."""
    path, recipe = cell.folder / "planted.json", recipes.embedded(cell.method, cell.kind)
    made_with = json.loads(json.dumps(asdict(recipe)))
    if not path.exists():
        pairs = zoo.pairs(cell.kind, "train", recipe.n_pairs, seed=cell.seed)
        options: dict[str, Any] = {"settings": recipe.settings, "seed": cell.seed, "overwrite": True}
        if cell.method != "edit":
            options |= {"poison_rate": recipe.poison_rate, "near_rate": recipe.near_rate}
        method = getattr(inject, cell.method)
        start = time.process_time()
        method(cell.base, pairs, cell.adapter, progress=sys.stderr.isatty(), **options)
        seconds = time.process_time() - start
        digest = json.loads((cell.adapter / MANIFEST).read_text())["adapter_digest"]
        with replacing(path) as (whole,):
            whole.write_text(json.dumps({"seconds": seconds, "digest": digest, "recipe": made_with}))
    note = json.loads(path.read_text())
    made = json.loads((cell.adapter / MANIFEST).read_text())["adapter_digest"]
    if note.pop("recipe", None) != made_with or note["digest"] != made:
        raise BkdlensError(
            f"The folder {cell.folder} holds an adapter that is not known to be of this recipe; "
            "name another --out folder."
        )
    return note


def analyse(cell: Cell, whole: bool) -> Study:
    """The study of ``bkdlens run`` on the three splits; only behaviour and heads unless ``whole``."""
    parts = [
        zoo.pairs(cell.kind, split, n)
        for split, n in zip(("train", "validation", "test"), SIZES[cell.kind], strict=True)
    ]
    model, name = load(cell.base, str(cell.adapter)), f"{cell.base} / {cell.kind} / {cell.name}"
    every_step = ("behaviour", "probe", "attribute", "ablate", "steer")
    steps = every_step if whole else ("behaviour", "attribute")
    return run_study(model, *parts, name=name, settings=SETTINGS, out=cell.folder / "run", steps=steps)


def transfer(cells: list[Cell], studies: list[Study]) -> Iterator[dict[str, Any]]:
    """How each adapter's vector, as chosen in its own model, acts in every model and in the base."""
    base, kind = cells[0].base, cells[0].kind
    train_n, _, test_n = SIZES[kind]
    train, test = zoo.pairs(kind, "train", train_n), zoo.pairs(kind, "test", test_n)
    for into in (*cells, None):
        model = load(base, str(into.adapter) if into else None)
        cache = cache_activations(model, train)
        for cell, study in zip(cells, studies, strict=True):
            choice = study.choice
            vector = study.results[f"vector-{choice['kind']}"]
            assert isinstance(vector, BackdoorVector)
            size, layer = choice["coefficient"], choice["layer"]
            where = {"layers": [layer], "coefficients": (size, -size), "allow_other_model": True}
            n_tokens = SETTINGS.max_new_tokens
            swept = sweep_layers(model, test, vector, cache=cache, max_new_tokens=n_tokens, **where)
            yield {
                "from": cell.name,
                "into": into.name if into else None,  # None is the base
                "vector": f"{choice['kind']}, ±{size:g}, layer {layer}",
                **_switched(swept, size, layer),
            }


def _switched(swept: SteeringResult, size: float, layer: int) -> dict[str, Any]:
    n = swept.n_victims
    plus, minus = (swept.rate("attack", layer, sign * size).to_dict() for sign in (1, -1))
    return {
        "activates": [Rate(swept.base_attack[0], n).to_dict(), plus],
        "suppresses": [Rate(swept.base_attack[1], n).to_dict(), minus],
        "restores": swept.rate("correct", layer, -size).to_dict(),
        "random_heads": [float(x.mean()) for x in swept.random_shift("heads")[:, 0]],
        "random_vectors": [float(x.mean()) for x in swept.random_shift("vectors")[:, 0]],
    }


def describe(cell: Cell, study: Study, before: BehaviourResult) -> dict[str, Any]:
    """The numbers of one adapter: how well it was planted, and what carries it."""
    after, heads = (study.results[name] for name in ("behaviour-backdoored", "attribution-backdoored"))
    assert isinstance(after, BehaviourResult)
    assert isinstance(heads, HeadAttribution)
    rates = {
        "asr": after.asr,
        "ftr": after.ftr,
        "near": after.near or Rate(0, 0),
        "clean_before": before.clean_accuracy,
        "clean_after": after.clean_accuracy,
    }
    effects, first = (heads.acie, heads.low, heads.high), ranked(study, heads)[:K]
    row: dict[str, Any] = {
        "name": cell.name,
        "method": cell.method,
        "seed": cell.seed,
        **plant(cell),
        **{name: rate.to_dict() for name, rate in rates.items()},
        "top": [[str(head), *(float(effect[head]) for effect in effects)] for head in first],
        "concentration": float(heads.carried(first)[-1]),
        "attention_mlp": layer_shares(heads),
        "layers": heads.layers_frame().to_dict("records"),
    }
    ablation = study.results.get("ablation")
    if ablation is not None:
        frame = ablation.to_frame()
        row["ablation"] = frame[frame["mode"] == "mean"].to_dict("records")
    return row


def study_of(base: str, kind: str, seeds: list[int], out: Path) -> tuple[dict[str, Any], list[Study]]:
    """The numbers of one model and backdoor, and the studies of the first seed."""
    cells = [
        Cell(base, kind, method, seed, out / base / kind / f"{method}-{seed}")
        for seed in seeds
        for method in METHODS
    ]
    studies = []
    for cell in cells:
        print(f"{base} / {kind} / {cell.name}", file=sys.stderr, flush=True)
        cell.folder.mkdir(parents=True, exist_ok=True)
        plant(cell)
        studies.append(analyse(cell, whole=cell.seed == seeds[0]))
    before = measure_behaviour(
        load(base), zoo.pairs(kind, "test", SIZES[kind][2]), max_new_tokens=SETTINGS.max_new_tokens
    )
    heads: dict[str, Any] = {
        cell.name: study.results["attribution-backdoored"]
        for cell, study in zip(cells, studies, strict=True)
    }
    first = [i for i, cell in enumerate(cells) if cell.seed == seeds[0]]
    content = {
        "base": base,
        "kind": kind,
        "cells": [describe(c, s, before) for c, s in zip(cells, studies, strict=True)],
        "overlap": compare_heads(heads, k=K).to_dict("records"),
        "transfer": list(transfer([cells[i] for i in first], [studies[i] for i in first])),
    }
    return content, [studies[i] for i in first]


def main() -> None:
    """Read the options, run what does not exist yet, and write tables, figures and report."""
    parser = argparse.ArgumentParser(prog="python -m studies.injection", description=__doc__)
    parser.add_argument("--models", nargs="*", default=list(zoo.MODELS))
    parser.add_argument("--backdoors", nargs="*", default=list(BACKDOORS), choices=BACKDOORS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    out_help = "folder of adapters and runs; what it holds already is not made again"
    tables_help = (
        "folder of injection.md, its numbers and figures (default: beside this file for the whole "
        "study, --out for a part of it)"
    )
    parser.add_argument("--out", type=Path, default=Path("build/injection"), help=out_help)
    parser.add_argument("--tables", type=Path, help=tables_help)
    given = parser.parse_args()
    parts = (given.models, given.backdoors, given.seeds)
    is_whole = parts == tuple(map(parser.get_default, ("models", "backdoors", "seeds")))
    tables = given.tables or (Path(__file__).parent if is_whole else given.out)
    torch.set_num_threads(given.threads)
    blocks, studies = [], []
    for base in given.models:
        for kind in given.backdoors:
            content, first = study_of(base, kind, given.seeds, given.out)
            blocks.append(content)
            studies += first
    tables.mkdir(parents=True, exist_ok=True)
    (tables / "injection.json").write_text(json.dumps(blocks, indent=1) + "\n")
    report = write_report(studies, given.out / "report.html", title="Three ways to plant")
    for path in (*write(blocks, studies, tables), report):
        print(path)


if __name__ == "__main__":
    main()
