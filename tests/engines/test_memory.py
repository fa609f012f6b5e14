"""Batches cover every prompt once, waste little on padding, and the engines keep their budget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import batches_of

from bkdlens.data.prompts import Answer, Prompt
from bkdlens.engines.hooks import NOTHING
from bkdlens.engines.memory import (
    CPU_GB,
    MOST_PADDING,
    batch_bytes,
    batches,
    prompt_bytes,
    run_bytes,
    runs_at_once,
)
from bkdlens.errors import BkdlensError

PROMPTS, ANSWERS = [Prompt("", (1, 10))], [Answer("", (11,), 1)]


@pytest.mark.parametrize("budget", [0, 0.0, -1, float("nan")])
def test_no_memory_is_an_error(llama, budget) -> None:
    import bkdlens

    match = f"memory_gb={budget} leaves no room; give a positive number"
    for run in (
        lambda: batch_bytes(llama, budget),
        lambda: list(batches(llama, [(1, 2)], 1, budget)),
        lambda: bkdlens.sweep_patches(llama, PROMPTS, ANSWERS, [], memory_gb=budget),
        lambda: bkdlens.decode(llama, PROMPTS, [NOTHING], [ANSWERS], memory_gb=budget),
    ):
        with pytest.raises(BkdlensError, match=match):
            run()


def test_budgets(llama) -> None:
    """2 GB by default on a CPU; a batch never takes all of it, and less of a smaller one."""
    assert batch_bytes(llama, None) == batch_bytes(llama, CPU_GB)
    most = [batch_bytes(llama, gb)[0] for gb in (0.01, 0.2, 0.5, 1, 8)]
    assert most == sorted(most)
    assert most[0] == 0
    for gb in (0.01, 0.2, 0.5, 1, 8):
        most_bytes, target = batch_bytes(llama, gb)
        assert 0 <= target <= most_bytes < gb * 1e9


def test_estimates_grow_with_what_is_run(llama, loaded) -> None:
    for model in loaded.values():
        assert run_bytes(model, 10, 2) < run_bytes(model, 10, 3) < run_bytes(model, 10, 3, 1)
        assert run_bytes(model, 10, 2) < run_bytes(model, 11, 2)
        assert prompt_bytes(model, 10) < prompt_bytes(model, 11)
        sizes = [runs_at_once(model, length, 4, None) for length in (4, 40, 4000)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1]
        assert runs_at_once(model, 4, 4, 1e-9) == 1
    # Of 4 key-value heads, and 2: less to keep.
    assert run_bytes(loaded["qwen"], 9, 3, 3) < run_bytes(llama, 9, 3, 3)


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(2, 100)), max_size=30),
    st.integers(0, 50),
    st.floats(1, 1e8),
)
def test_batches_cover_every_prompt_once(loaded, sizes, n_runs, budget) -> None:
    """And what is run together is of like lengths and fits, or is one prompt alone."""
    model = loaded["qwen"]
    with batches_of(budget):
        found = list(batches(model, sizes, n_runs, 1.0))
    assert sorted(i for rows, _ in found for i in rows) == list(range(len(sizes)))
    order = [sizes[i] for rows, _ in found for i in rows]
    assert order == sorted(order)
    for rows, runs in found:
        tail, prompt = (max(sizes[i][side] for i in rows) for side in (0, 1))
        needed = len(rows) * (prompt_bytes(model, prompt) + (1 + runs) * run_bytes(model, prompt, tail))
        if len(rows) > 1:
            assert runs == n_runs
            assert needed <= budget
            real = sum(sizes[i][1] + (1 + n_runs) * sizes[i][0] for i in rows)
            assert len(rows) * (prompt + (1 + n_runs) * tail) <= MOST_PADDING * real * (1 + 1e-9)
        elif runs < n_runs:  # as many as fit, or one at a time where nothing does
            assert runs == 1 or needed <= budget
            assert needed + run_bytes(model, prompt, tail) > budget
        else:
            assert runs in (n_runs, 1)


# --- the budget is kept ---------------------------------------------------------------------------

MEASURE = '''
import json, sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
sys.path.insert(0, {tests!r})
from checkpoints import make_tokenizer
import bkdlens
from bkdlens.engines.estimate import estimate
from bkdlens.engines.hooks import Intervention, Patch, Vector
from bkdlens.data.prompts import Answer, Prompt
from bkdlens.types import Head

torch.set_num_threads(1)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=2000, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
    num_attention_heads=8, max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)
model = bkdlens.load(LlamaForCausalLM(config).eval(), tokenizer=make_tokenizer(), device="cpu")
draw = torch.Generator().manual_seed(0)

def ids(n):
    return tuple(torch.randint(4, 2000, (n,), generator=draw).tolist())

def peak():
    """The most memory so far, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def run(what, n, length, tail, memory_gb):
    prompts = [Prompt("", (1, *ids(length - 1))) for _ in range(n)]
    answers = [Answer("", (*ids(tail - 1), 2), tail - 1) for _ in range(n)]
    patches = [Patch("z", l, torch.randn(32, generator=draw), h) for l in range(4) for h in range(8)]
    if what == "sweep":
        bkdlens.sweep_patches(model, prompts, answers, patches, memory_gb=memory_gb)
    elif what == "atp":
        estimate(model, prompts, answers, patches, memory_gb=memory_gb)
    else:
        some = [Intervention((Head(p.layer, p.head),), p.value[None]) for p in patches]
        bkdlens.decode(model, prompts, some, [answers], max_new_tokens=tail, memory_gb=memory_gb)

memory_gb, work = json.loads(sys.argv[1])
for what, *_ in work:
    run(what, 1, 9, 2, memory_gb)  # what is loaded and made once
before, grown = peak(), []
for what, *sizes in work:
    run(what, *sizes, memory_gb)
    grown.append((peak() - before) / 1e9)
print(json.dumps(grown))
'''

# Prompts, their tokens and the answer's: all runs at once would take some times the budget.
MUCH = {
    0.3: [
        ("sweep", 12, 80, 40),
        ("sweep", 1, 300, 200),
        ("decode", 12, 80, 24),
        ("atp", 24, 80, 40),
        ("atp", 1, 300, 200),
    ],
    1.0: [("sweep", 1, 300, 600)],
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("memory_gb", MUCH)
def test_the_engines_keep_their_budget(memory_gb) -> None:
    """The peak memory of a process of its own grows by no more than the budget."""
    script = MEASURE.format(tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", script, json.dumps([memory_gb, MUCH[memory_gb]])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stderr[-2000:]
    for (what, *_), grown in zip(MUCH[memory_gb], json.loads(out.stdout.splitlines()[-1]), strict=True):
        assert grown <= memory_gb, what
