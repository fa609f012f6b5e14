"""Every command explains itself, and nothing heavy is imported for that."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMANDS = (
    "",
    "demo",
    "run",
    "probe",
    "attribute",
    "ablate",
    "steer",
    "report",
    "show",
    "inject",
    "zoo",
)


@pytest.mark.parametrize("command", [*COMMANDS, "data check"])
def test_help_has_an_example(bkdlens_, command):
    code, out, _ = bkdlens_(*command.split(), "--help")
    assert code == 0
    assert "Usage" in out
    if command not in ("", "zoo"):
        assert "Example" in out


def test_help_imports_nothing_heavy():
    script = (
        "import sys; sys.argv = ['bkdlens', '--help']\n"
        "from bkdlens.cli.app import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = ('torch', 'transformers', 'sklearn', 'plotly', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
