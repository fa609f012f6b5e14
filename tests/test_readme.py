"""The README's first snippet runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_first_snippet_runs(capsys):
    snippet = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(snippet[1], "README.md", "exec"), names)
    assert capsys.readouterr().out.strip() == "Sports"
    assert names["probes"].accuracy.shape == (names["model"].cfg.n_layers + 1,)
