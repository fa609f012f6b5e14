"""The peers compute our numbers, and the count is what is multiplied. No time is asserted."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import float64
from tiny import assert_exact, greedy
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench, counts, gpu_7b, peers, results
from benchmarks.workloads import EOS, SHAPES, Size, make_work
from bkdlens.engines.hooks import Patch
from bkdlens.engines.sweep import sweep_patches

TINY = Size("tiny", 3, 4, 32, 48, 96, 2)
ALL = ("published", "transformer_lens", "nnsight", "pyvene")


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def work(request):
    """Four pairs of each shape on a tiny grouped-query Llama."""
    return make_work(request.param, TINY, 4)


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def exact_work(request):
    """The same in float64."""
    with float64():
        return make_work(request.param, TINY, 4)


def installed(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("name", ALL)
def test_peers_compute_our_numbers(exact_work, name) -> None:
    if name in ("nnsight", "pyvene") and not installed(name):
        pytest.skip(f"{name} is not installed (pip install 'bkdlens[bench]')")
    work, cfg = exact_work, exact_work.model.cfg
    z = torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head, dtype=torch.float64)
    heads = [(2, 1), (0, 3), (1, 0), (0, 0)]
    model = work.model if name == "transformer_lens" else work.hf
    prompts = [prompt.ids for prompt in work.prompts]
    answers = [answer.ids[: answer.n_scored] for answer in work.answers]
    patches = [Patch("z", layer, z[layer, head], head) for layer, head in heads]
    with float64():
        found = getattr(peers, name)(model, prompts, answers, heads, z)
        wanted = sweep_patches(work.model, work.prompts, work.answers, patches).whole
    assert_exact(found, wanted)


def test_decoding_peers_are_plain_greedy_decoding(work) -> None:
    prompts, vector = [prompt.ids for prompt in work.prompts], torch.randn(work.model.cfg.d_model)

    def add(resid, hook):
        resid[:, len(prompt) - 1] += vector
        return resid

    wanted = []
    for prompt in prompts:
        wanted.append(greedy(work.model, prompt, [("blocks.1.hook_resid_pre", add)], 6))
    assert peers.hf_generate(work.hf, prompts, 1, vector, 6, EOS) == wanted
    assert peers.tl_generate(work.model, prompts, 1, vector, 6, EOS) == wanted
    # With likely answers a row stops where it has left them, and not before.
    likely = [wanted, [row[:2] + [5] * 4 for row in wanted]]
    assert peers.hf_generate(work.hf, prompts, 1, vector, 6, EOS, likely=likely) == wanted
    short = peers.hf_generate(work.hf, prompts, 1, vector, 6, EOS, likely=likely[1:])
    assert all(row == full[: len(row)] and len(row) < 6 for row, full in zip(short, wanted, strict=True))


@pytest.mark.parametrize("n_pairs", [1, 3])
def test_the_count_is_what_is_multiplied(n_pairs) -> None:
    """Of prompts of one length nothing is padded: little more is run than is counted."""
    work = make_work(SHAPES[1], TINY, 1)
    model, cfg = work.model, work.model.cfg
    prompts, answers = work.prompts * n_pairs, work.answers * n_pairs
    z = torch.randn(cfg.n_layers, cfg.n_heads, cfg.d_head)
    patches = [Patch("z", i, z[i, j], j) for i in range(cfg.n_layers) for j in range(cfg.n_heads)]
    with FlopCounterMode(display=False) as counter:
        sweep_patches(model, prompts, answers, patches)
    done, needed = counter.get_total_flops() / 2, counts.exact_sweep(model, prompts, answers)
    assert needed <= done * 1.001
    assert done < 1.15 * needed


def test_tables_of_a_whole_run(work, tmp_path) -> None:
    which = tuple(name for name in ALL if name not in ("nnsight", "pyvene"))
    lines = list(bench.head_sweep(work, 1e9, 1, which))
    assert [line.name for line in lines][:3] == [*which, "ours, exact"]
    assert all(line.seconds > 0 for line in lines)
    decoders = ("Hugging Face generate, same stopping rule", "Hugging Face generate")
    steering = list(bench.steering_sweep(work, 1, decoders))
    assert [line.name for line in steering][-2:] == ["sweep_layers", "decode, every answer to its end"]
    table = {"size": "tiny", "shape": work.shape.name, "pairs": 4, "rate": 1e9, "answer": 4}
    tables = [
        table | {"kind": kind, "lines": [vars(line) for line in group]}
        for kind, group in (("head sweep", lines), ("steering sweep", steering))
    ]
    content = {"machine": "m", "threads": 1, "repeats": 1, "tables": tables}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert results.write(tmp_path)[0] == tmp_path / "RESULTS.md"
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| ours, exact |" in text
    assert "Not measured: no GPU was at hand." in text


def test_the_7b_benchmark_runs_on_a_tiny_shape(tmp_path) -> None:
    gpu_7b.main(["--device", "cpu", "--models", "tiny", "--pairs", "3", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "results_gpu.json").read_text())["rows"]
    assert [row["answer"] for row in rows] == [4, 14]
    assert all(row["sweep_seconds"] > 0 and 0 < row["roofline"] < 1 for row in rows)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu_7b.main(["--out", str(tmp_path)])
