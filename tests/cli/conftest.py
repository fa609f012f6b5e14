"""The shell as a fixture."""

from __future__ import annotations

import pytest
from shell import run


@pytest.fixture
def bkdlens_(monkeypatch, capsys):
    """One command in this process: exit code, standard output, standard error."""
    return lambda *arguments: run(monkeypatch, capsys, *arguments)
