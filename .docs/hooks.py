"""What the site needs beyond its plugins: formulas as MathML, API pages by room, and the pictures of the checkout."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

README = Path(__file__).parents[1] / "README.md"
PACKAGE = README.parent / "src" / "mipic_st"
ROOMS = ("losses", "transforms", "evaluation", "advice", "stored", "deploy", "encoder")

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


def api_page(room: str) -> str:
    """All modules of a folder on one page; of the top level, the modules that are no folder."""
    folder = PACKAGE if room == "more" else PACKAGE / room
    dotted = "mipic_st" if room == "more" else f"mipic_st.{room}"
    names = sorted(
        path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")
    )
    parts = [
        f"::: {dotted}.{name}\n    options:\n      heading_level: 2" for name in names
    ]
    return "\n\n".join([f"# {dotted}", *parts])


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """One API page for each folder of the package, and the README's pictures."""
    for room in (*ROOMS, "more"):
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room)))
    pictures = {path for _, path in _IMAGE.findall(README.read_text(encoding="utf-8"))}
    for path in sorted(pictures):
        source = str(README.parent / path)
        files.append(File.generated(config, _published(path), abs_src_path=source))
    return files


def _published(path: str) -> str:
    # a leading dot would hide the file from the site
    return path.removeprefix("./").lstrip(".")
