"""What users import: the documented names, each from where the stub says, and lazily."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import bkdlens

# Of version 0.1.
PUBLIC = """
    AblationResult AnswerProbs Backdoor BackdoorVector BehaviourResult BkdlensError Head HeadAttribution
    HeadPattern Intervention PairCache PairSet Patch PatchResult ProbeResult PromptFormat PromptPair Rate
    SteeringResult Study StudySettings Trigger Vector ablate_heads answer_probs attribute_heads
    cache_activations check_data compare_heads decode evaluate explore generate head_pattern inject load
    load_info load_result load_study measure_behaviour metrics patch_heads patched_heads plot read_pairs
    run_study sample_generations steer sweep_layers sweep_patches train_probes write_report zoo
"""


def test_the_exported_names_are_exactly_those_of_the_reference() -> None:
    reference = Path(bkdlens.__file__).parents[1] / "docs" / "reference"
    entries = "".join(page.read_text() for page in reference.glob("*.md"))
    listed = set(re.findall(r"^::: ([\w.]+)$", entries, re.MULTILINE))
    for name in set(bkdlens.__all__) - {"inject", "metrics", "plot", "zoo"}:
        home = getattr(bkdlens, name).__module__
        assert {home, f"{home}.{name}"} & listed, name
    assert set(PUBLIC.split()) <= set(bkdlens.__all__)  # none of version 0.1 is gone
    assert all(getattr(bkdlens, name) is not None for name in bkdlens.__all__)
    assert set(bkdlens.__all__) <= set(dir(bkdlens))


def test_each_is_where_the_stub_says() -> None:
    stub = ast.parse(Path(bkdlens.__file__).with_suffix(".pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom) and node.module]
    for node in imports:
        (alias,) = node.names
        value = getattr(bkdlens, alias.name)
        assert alias.asname == alias.name
        assert value.__module__ == f"bkdlens.{node.module}"


def test_no_module_hides_a_function() -> None:
    """A module of a public name, imported, would stand where the function was."""
    folder = Path(bkdlens.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert modules & set(bkdlens.__all__) == {"inject", "metrics", "plot", "zoo"}


def test_importing_is_quick() -> None:
    script = "import sys, bkdlens; print([m for m in ('torch', 'pandas', 'plotly') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_room_is_crowded() -> None:
    """At most a dozen modules in a folder: a reader guesses a function's file from its name."""
    folder = Path(bkdlens.__file__).parent
    rooms = {path.parent for path in folder.rglob("*.py")}
    crowded = {str(room): n for room in rooms if (n := len(list(room.glob("*.py")))) > 12}
    assert crowded == {}
