"""What the site needs beyond its plugins: formulas as MathML, and the pictures of the checkout."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
# ![...](path) and <img src="path">
_IMAGE = re.compile(r'(!\[[^]]*\]\(|\bsrc(?:set)?=")(?!https?:)([^)"]+)')


def on_page_content(content: str, **kwargs: Any) -> str:
    """Browsers draw MathML by themselves: no script, no font from elsewhere."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return _FORMULA.sub(mathml, content)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Pictures of the checkout, which pages name from where they lie, are named from where they are published."""
    return _IMAGE.sub(
        lambda match: match[1] + _published(match[2].removeprefix("../../")), markdown
    )


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Publish the README's pictures with it."""
    pictures = {path for _, path in _IMAGE.findall(README.read_text(encoding="utf-8"))}
    for path in sorted(pictures):
        source = str(README.parent / path)
        files.append(File.generated(config, _published(path), abs_src_path=source))
    return files


def _published(path: str) -> str:
    # a leading dot would hide the file from the site
    return path.removeprefix("./").lstrip(".")
