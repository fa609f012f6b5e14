"""What is timed, and against what: the lines of the tables in RESULTS.md.

Numbers are compared before anything is timed. A peer whose cost is the same for every head (or layer,
or intervention) is timed on some of them and multiplied by their number; ours is always run whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import counts, peers
from benchmarks.workloads import EOS, FORMAT, Work, median_seconds
from bkdlens.analyses.attribution.measure import attribute_heads
from bkdlens.analyses.steering.measure import BackdoorVector, sweep_layers
from bkdlens.data.prompts import encode_answer, encode_prompt
from bkdlens.engines.cache import PairCache, cache_activations
from bkdlens.engines.estimate import estimate
from bkdlens.engines.generate import decode
from bkdlens.engines.hooks import Intervention, Patch, Vector
from bkdlens.engines.sweep import sweep_patches

SAME = 1e-4  # largest difference of log probabilities: random float32 models differ by some 1e-5


@dataclass(frozen=True)
class Line:
    """One way of doing the whole work: seconds, and its largest difference from ours."""

    name: str
    seconds: float
    part: str = "whole"
    difference: float | None = None
    roofline: float | None = None


def head_sweep(
    work: Work, rate: float, repeats: int, which: tuple[str, ...], *, functions: bool = True
) -> Iterator[Line]:
    """Every head of every pair, by each peer, by our engines and by the user's ``functions``."""
    model, cfg, hf = work.model, work.model.cfg, work.hf
    prompts = [prompt.ids for prompt in work.prompts]
    answers = [answer.ids[: answer.n_scored] for answer in work.answers]
    cache = cache_activations(model, work.pairs, fmt=FORMAT)
    z = cache.mean_z("triggered", victims=False)
    heads = [(layer, head) for layer in range(cfg.n_layers) for head in range(cfg.n_heads)]
    patches = [Patch("z", layer, z[layer, head], head) for layer, head in heads]
    exact = sweep_patches(model, work.prompts, work.answers, patches)

    def compare(found: torch.Tensor, some: list[tuple[int, int]]) -> float:
        ours = exact.whole[:, [heads.index(head) for head in some]]
        difference = float((found - ours).abs().max())
        if not difference < SAME:
            raise SystemExit(f"The numbers differ by {difference:.1e}: nothing was timed.")
        return difference

    apart = max(1, cfg.n_layers // 2)
    single = [(layer, layer % cfg.n_heads) for layer in range(0, cfg.n_layers, apart)]
    whole_layer = [(cfg.n_layers // 2, head) for head in range(cfg.n_heads)]
    every: dict[str, Callable[..., torch.Tensor]] = {
        "published": partial(peers.published, hf),
        "transformer_lens": partial(peers.transformer_lens, model),
        "nnsight": partial(peers.nnsight, hf),
        "pyvene": partial(peers.pyvene, hf),
    }
    for name in which:
        by_head = name in ("published", "transformer_lens")
        some, times = (single[:1], len(heads)) if by_head else (whole_layer, cfg.n_layers)
        checked = single if by_head else whole_layer
        difference = compare(every[name](prompts, answers, checked, z), checked)
        seconds = median_seconds(partial(every[name], prompts, answers, some, z), repeats)
        part = f"{'a head' if by_head else 'a layer'} × {times}"
        yield Line(name, times * seconds, part, difference)
    needed = counts.exact_sweep(model, work.prompts, work.answers) / rate
    options = {
        "n_pairs": None, "victims_only": False, "fmt": FORMAT, "max_answer_tokens": work.shape.answer,
    }  # fmt: skip
    ours: dict[str, Callable[[], object]] = {
        "ours, exact": lambda: sweep_patches(model, work.prompts, work.answers, patches),
        "ours, AtP": lambda: estimate(model, work.prompts, work.answers, patches),
        "attribute_heads, exact": lambda: attribute_heads(model, work.pairs, cache=cache, **options),
        "attribute_heads, screened": lambda: attribute_heads(
            model, work.pairs, cache=cache, method="screened", **options
        ),
        "attribute_heads, AtP": lambda: attribute_heads(
            model, work.pairs, cache=cache, method="atp", **options
        ),
        "cache_activations and attribute_heads, exact": lambda: attribute_heads(
            model, work.pairs, **options
        ),
    }
    for name, run_ours in ours.items():
        if not functions and not name.startswith("ours"):
            continue
        seconds = median_seconds(run_ours, repeats)
        yield Line(name, seconds, roofline=needed / seconds if name == "ours, exact" else None)


def steering_sweep(work: Work, repeats: int, which: tuple[str, ...]) -> Iterator[Line]:
    """All layers, both signs, the vector and 20 controls: what the user's ``sweep_layers`` does."""
    model, cfg, length = work.model, work.model.cfg, work.shape.answer
    cache = cache_activations(model, work.pairs, fmt=FORMAT)
    heads = attribute_heads(model, work.pairs, cache=cache, fmt=FORMAT, method="atp").top(4)
    vector = BackdoorVector.from_cache(cache, heads)
    interventions = _steering(cache, vector)
    prompts = {
        side: [encode_prompt(model.tokenizer, text, FORMAT) for text in getattr(work.pairs, side)]
        for side in ("clean", "triggered")
    }
    guesses = {
        side: [
            [
                encode_answer(model.tokenizer, prompt, answer, FORMAT, max_tokens=length)
                for prompt, answer in zip(prompts[side], outputs, strict=True)
            ]
            for outputs in (work.pairs.backdoor_outputs, work.pairs.clean_outputs)
        ]
        for side in prompts
    }
    batches = sum(1 + len(i) for i in interventions.values()) + 1 + 2 * cfg.n_layers
    likely = [[a.ids for a in guess] for guess in guesses["clean"]]
    some = interventions["clean"][:: max(1, len(interventions["clean"]) // 4)][1:3]
    ids = [prompt.ids for prompt in prompts["clean"]]
    ours = decode(model, prompts["clean"], some, guesses["clean"], finish=False, max_new_tokens=length)
    ways: dict[str, Callable[[Vector], list[list[int]]]] = {
        "Hugging Face generate, same stopping rule": lambda v: peers.hf_generate(
            work.hf, ids, v.layer, v.value, length, EOS, likely=likely
        ),
        "Hugging Face generate": lambda v: peers.hf_generate(
            work.hf, ids, v.layer, v.value, length, EOS
        ),
        "HookedTransformer.generate": lambda v: peers.tl_generate(
            model, ids, v.layer, v.value, length, EOS
        ),
    }
    for name, way in ways.items():
        if name not in which:
            continue
        agree = total = 0
        few = some[:1] if name.startswith("Hooked") else some  # it takes several times as long
        for i, intervention in enumerate(few):
            for row, new in enumerate(way(intervention.vectors[0])):
                gives = [list(guess[row].ids) == list(new) for guess in guesses["clean"]]
                agree += (gives.index(True) if any(gives) else -1) == int(ours.choice[i, row])
                total += 1
        if agree < total:
            raise SystemExit(f"{name} judges {total - agree} of {total} answers otherwise than we do.")
        seconds = median_seconds(lambda way=way, few=few: [way(i.vectors[0]) for i in few], repeats)
        part = f"{len(few)} intervention{'s' * (len(few) > 1)} × {batches / len(few):g}"
        yield Line(name, seconds * batches / len(few), part, 0.0)

    def sweep() -> object:
        return sweep_layers(model, work.pairs, vector, cache=cache, fmt=FORMAT, max_new_tokens=length)

    yield Line("sweep_layers", median_seconds(sweep, repeats))
    quarter = {side: every[::4] for side, every in interventions.items()}

    def texts() -> object:
        """As where success is no exact answer: everything is decoded to its end."""
        return [
            decode(model, prompts[side], quarter[side], guesses[side], max_new_tokens=length)
            for side in quarter
        ]

    times = batches / sum(map(len, quarter.values()))
    seconds = times * median_seconds(texts, repeats)
    yield Line("decode, every answer to its end", seconds, f"a quarter × {times:.1f}")


def _steering(cache: PairCache, vector: BackdoorVector) -> dict[str, list[Intervention]]:
    """The interventions of :func:`bkdlens.sweep_layers`, by side."""
    from bkdlens.analyses.steering.measure import _random_heads, _random_vectors

    directions = [
        vector.direction, *_random_heads(cache, vector, 10, 0), *_random_vectors(vector, 10, 0),
    ]  # fmt: skip
    layers = range(cache.model.cfg.n_layers)
    return {
        side: [
            Intervention(vectors=(Vector("resid_pre", layer, sign * direction),))
            for direction in directions
            for layer in layers
        ]
        for side, sign in (("clean", 1.0), ("triggered", -1.0))
    }


def ratio(lines: list[Line], line: Line, name: str) -> float:
    """How many times faster ``line`` is than the line called ``name``; NaN where that was not timed."""
    other = next((one.seconds for one in lines if one.name == name), math.nan)
    return other / line.seconds
