"""What mkdocs is missing: formulae as MathML, docstring roles as links, and no request to a network."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.utils import get_relative_url

CODE = re.compile(r"(^```.*?^```|``[^`].*?``|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\w$\\])\$(?! )([^$\n]+?)(?<! )\$(?![\w$])", re.DOTALL)
SHIM = "https://unpkg.com/iframe-worker/shim"
formulae: dict[str, list[str]] = {}


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Set formulae aside: Markdown must not read them."""
    kept = formulae.setdefault(page.file.src_uri, [])
    kept.clear()

    def keep(match: re.Match[str]) -> str:
        block = match[1] is not None
        kept.append(convert((match[1] or match[2]).strip(), display="block" if block else "inline"))
        mark = f"FORMULA{len(kept) - 1}X"
        return f"\n\n{mark}\n\n" if block else mark

    pieces = CODE.split(markdown)
    return "".join(p if i % 2 else FORMULA.sub(keep, p) for i, p in enumerate(pieces))


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """Put them back, and write the docstrings' roles as code."""
    kept = formulae.get(page.file.src_uri, [])
    html = re.sub(r"FORMULA(\d+)X", lambda m: kept[int(m[1])], html)
    return re.sub(r":(?:func|mod|class|meth|data):<code>~?([\w.]+)</code>", r"<code>\1</code>", html)


def on_post_page(output: str, *, page: Any, **_: Any) -> str:
    """The theme fetches a script for search in pages from a disk; give it ours."""
    return output.replace(SHIM, get_relative_url("worker.js", page.url))
