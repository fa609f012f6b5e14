"""The studies' numbers, counted by transformers and peft alone, are those of the run."""

from __future__ import annotations

import pytest

import bkdlens
from bkdlens import zoo
from studies import plain

pytestmark = pytest.mark.slow
SETTINGS = bkdlens.StudySettings(
    n_attribution=6, ablation_counts=(0, 1), ablation_modes=("mean",), n_random=1, max_new_tokens=24
)


@pytest.mark.parametrize("kind", zoo.BACKDOORS)
def test_another_road_counts_the_same(kind, tmp_path, capsys) -> None:
    sizes = {"train": 16, "validation": 24, "test": 24}
    pairs = [zoo.pairs(kind, split, n) for split, n in sizes.items()]
    model = bkdlens.load("tiny-llama", kind)
    bkdlens.run_study(model, *pairs, settings=SETTINGS, steps=("ablate", "steer"), out=tmp_path / "run")
    plain.main(tmp_path / "run", "tiny-llama", kind)
    lines = capsys.readouterr().out.splitlines()
    found, saved = (
        [line.partition(":")[2].strip() for line in lines if line.startswith(name)]
        for name in ("plain:", "folder:")
    )
    assert len(found) == 3  # untouched, without a head, under the vector
    assert found == saved
    assert "'attack': 0," not in found[0]
