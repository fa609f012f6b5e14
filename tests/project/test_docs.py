"""The documentation site: built without a warning, and read from a disk without a network."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None,
    reason="mkdocs is not installed: pip install -e '.[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """As ``make docs`` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(folder)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return folder


def test_every_public_name_has_its_reference(site) -> None:
    import bkdlens

    text = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    homes = {name: getattr(getattr(bkdlens, name), "__module__", None) for name in bkdlens.__all__}
    missing = [name for name, home in homes.items() if home and f'id="{home}.{name}"' not in text]
    assert missing == []


def test_formulae_are_set_and_roles_are_read(site) -> None:
    method = (site / "method.html").read_text()
    assert method.count("<math") > 15
    assert "$$" not in method
    assert "\\" not in "".join(re.findall(r"<math.*?</math>", method, re.DOTALL))  # no command unread
    for page in site.rglob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert not re.search(r":(func|mod|class|meth):|FORMULA\d", text), page.name


@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium to read it in: apt-get install chromium"
)
def test_it_is_read_and_searched_from_a_disk(site) -> None:
    browser = Browser()
    try:
        for page in sorted(site.rglob("*.html")):
            if page.name == "404.html":  # its links are those of a server
                continue
            for width in (1280, 390):
                browser.open(page, width)
                assert browser.run("document.documentElement.scrollWidth") <= width, page.name
        browser.open(site / "how-to" / "steer.html")
        browser.run("document.querySelector('.md-search__input').focus()")
        browser.call("Input.insertText", text="Newcombe")
        found = browser.wait("document.querySelector('.md-search-result__link')?.href")
        assert found.startswith("file:")
        assert browser.complaints == []
        assert browser.sent_out == []
    finally:
        browser.close()
