"""``python -m benchmarks.atp_study``: attribution patching and bfloat16 held against the exact sweep.

On every embedded model and backdoor: Spearman's rank correlation over all heads, how many of the exact
top k heads are among the estimate's, whether screening finds them, and where AtP misleads most.
"""

from __future__ import annotations

from pathlib import Path

import torch
from scipy.stats import spearmanr

import bkdlens
from bkdlens import zoo
from bkdlens.analyses.attribution.measure import HeadAttribution, attribute_heads
from bkdlens.engines.cache import cache_activations

BACKDOORS = ("label_modification", "fixed_output", "jailbreak")
ROW = "| {} | {} | {:.2f} | {}/4 | {}/8 | {}/4 | {}/4 | {:.4f} | {} |"
HEAD = """## How well attribution patching estimates the exact sweep

`python -m benchmarks.atp_study`: {pairs} test pairs at most, mean triggered activation from the training
pairs, 32 heads a model. *Rank* is Spearman's correlation of ACIE over all heads; *top k* how many of the
exact top k heads AtP ranks among its own top k (by chance k²/32: 0.5 of 4, 2 of 8); *screened* the same
of the top 4 where AtP picks the quarter of the heads that is patched exactly; *bfloat16* the same of
the exact sweep in that precision, and the largest difference of ACIE that it makes.

| model | backdoor | rank | AtP top 4 | AtP top 8 | screened top 4 | bfloat16 top 4 | bfloat16, max Δ | AtP misleads most at (exact, estimate) |
|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501


def study(model_name: str, backdoor: str, n_pairs: int) -> str:
    """One row of the table."""
    pairs, source = zoo.pairs(backdoor, "test"), zoo.pairs(backdoor, "train")
    found: dict[str, HeadAttribution] = {}
    for dtype in ("float32", "bfloat16"):
        model = bkdlens.load(model_name, adapter=backdoor, dtype=dtype, device="cpu")
        cache = cache_activations(model, source.sample(256, seed=0))
        for method in ("exact", "atp", "screened"):
            if dtype == "float32" or method == "exact":
                found[f"{dtype} {method}"] = attribute_heads(
                    model, pairs, cache=cache, n_pairs=n_pairs, method=method
                )
    exact, atp = found["float32 exact"], found["float32 atp"]
    half = found["bfloat16 exact"]

    def shared(other: HeadAttribution, k: int) -> int:
        return len(set(exact.top(k)) & set(other.top(k)))

    worst = max(exact.ranking, key=lambda head: abs(float(exact.acie[head] - atp.acie[head])))
    misled = f"{worst}: {float(exact.acie[worst]):+.3f}, {float(atp.acie[worst]):+.3f}"
    rank = spearmanr(exact.acie.flatten(), atp.acie.flatten()).statistic
    return ROW.format(
        model_name, backdoor, rank, shared(atp, 4), shared(atp, 8),
        shared(found["float32 screened"], 4), shared(half, 4),
        float((exact.acie - half.acie).abs().max()), misled,
    )  # fmt: skip


def main(n_pairs: int = 96) -> None:
    """All rows, printed and written beside RESULTS.md."""
    torch.set_num_threads(1)
    text = HEAD.format(pairs=n_pairs)
    for model_name in ("tiny-llama", "tiny-qwen"):
        for backdoor in BACKDOORS:
            text += study(model_name, backdoor, n_pairs) + "\n"
            print(text.splitlines()[-1], flush=True)
    (Path(__file__).parent / "atp.part.md").write_text(text)


if __name__ == "__main__":
    main()
