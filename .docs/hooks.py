"""What the site needs beyond its plugins: MathML, API pages by room, the notebooks, and pictures for dark pages."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "mipic_st"
PAGES = ROOT / ".docs" / "pages"
NOTEBOOKS = ROOT / "examples" / "notebooks"
# modules that are of no use to a reader of the API
OWN_USE = {"__main__", "files", "plotting", "processes", "validation"}
ROOMS = ("losses", "transforms", "evaluation", "advice", "stored", "deploy", "encoder")

_FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)
# ![what it shows](path){ attributes }
_PICTURE = re.compile(r"!\[([^]]*)\]\((?!https?:)([^)#]+)\)(\{[^}]*\})?")
_NOTEBOOK = re.compile(r"\(\.\./\.\./examples/notebooks/(\w+)\.ipynb\)")
# code in a cell of a table, and where a long name may break on a telephone
_CELL = re.compile(r"<t[dh].*?</t[dh]>", re.DOTALL)
_CODE = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
_BREAK = re.compile(r"(?<=\w[_/(=])(?=\w)|(?<=\w\.)(?=\w{6})|(?<=[a-z])(?=[A-Z])")
# an option, which does not break behind its hyphens
_OPTION = re.compile(r"<code>(?=--?[\w-]+(?: \w+)?</code>)")
# what pandas says of the looks of its tables
_PANDAS = re.compile(
    r'<style scoped>.*?</style>\s*| border="1" class="dataframe"', re.DOTALL
)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Browsers draw MathML by themselves: no script, no font from elsewhere. Names break where a reader would."""

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    def breakable(cell: re.Match[str]) -> str:
        return _CODE.sub(lambda code: _BREAK.sub("<wbr>", code[0]), cell[0])

    content = _CELL.sub(breakable, _FORMULA.sub(mathml, content))
    return _OPTION.sub('<code class="option">', content)


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Pictures and notebooks are named from where they are published; NAME-dark beside a picture is for dark pages."""

    def both(match: re.Match[str]) -> str:
        text, path, attributes = match[1], match[2], match[3] or ""
        place = Path(_published(path))
        dark = place.with_stem(f"{place.stem}-dark")
        if not _dark(PAGES / path).exists():
            return f"![{text}]({place.as_posix()}){attributes}"
        return "".join(
            f"![{text}]({each.as_posix()}#only-{scheme}){attributes}"
            for each, scheme in ((place, "light"), (dark, "dark"))
        )

    return _NOTEBOOK.sub(r"(notebooks/\1.md)", _PICTURE.sub(both, markdown))


def api_page(room: str) -> str:
    """All modules of a folder on one page, those with public names first; of the top level, all that is no folder."""
    public = re.findall(
        r"^from \.(\S+) import", (PACKAGE / "__init__.pyi").read_text(), re.MULTILINE
    )
    folder = PACKAGE if room == "more" else PACKAGE / room
    dotted = "mipic_st" if room == "more" else f"mipic_st.{room}"
    names = sorted(
        {path.stem for path in folder.glob("*.py")} - OWN_USE - {"__init__"},
        key=lambda name: (f"{room}.{name}" not in public, name),
    )
    parts = [
        f"::: {dotted}.{name}\n    options:\n      heading_level: 2" for name in names
    ]
    return "\n\n".join([f"# {dotted}", *parts])


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, as it was run, and its pictures by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            source = source.replace("../../.docs/pages/", "../")
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source))
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above]({name})")
            elif "text/html" in data:
                parts.append(_PANDAS.sub("", "".join(data["text/html"])))
            else:
                text = output.get("text") or data.get("text/plain") or ""
                parts.append(f"```text\n{''.join(text).rstrip()}\n```")
    return "\n\n".join(parts), pictures


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """One API page for each folder of the package, the notebooks, and pictures that lie outside of the pages."""
    for room in (*ROOMS, "more"):
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room)))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, pictures = notebook_page(path)
        found = {f"{path.stem}.md": page, **pictures}
        for name, content in found.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    shown = {
        match[2]
        for page in PAGES.glob("*.md")
        for match in _PICTURE.finditer(page.read_text(encoding="utf-8"))
    }
    for path in sorted(path for path in shown if path.startswith("../../")):
        for source in (PAGES / path, _dark(PAGES / path)):
            if source.exists():
                published = Path(_published(path)).with_name(source.name).as_posix()
                files.append(File.generated(config, published, abs_src_path=str(source)))
    return files


def _dark(path: Path) -> Path:
    return path.with_stem(f"{path.stem}-dark")


def _published(path: str) -> str:
    # a leading dot would hide the file from the site
    return path.removeprefix("../../").lstrip("./")
