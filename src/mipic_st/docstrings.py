"""Real texts that everyone has: the docstrings of installed libraries, a summary line that asks for its body.

The libraries' source files are read, nothing is imported or downloaded. The texts depend on the libraries' versions, so
name these with a result (:func:`versions`). Not part of the stable API.
"""

from __future__ import annotations

import ast
import random
from collections.abc import Sequence
from functools import cache
from importlib import metadata, util
from pathlib import Path

from mipic_st.validation import as_list, checked_count

PACKAGES = ("numpy", "scipy", "sklearn", "pandas", "torch")
"""Libraries that are there wherever this package is installed with its extras."""

# Words and letters below which a summary or a body says too little to be found, or to be distinguished from others.
_SUMMARY_LETTERS, _BODY_LETTERS = 25, 120
_LEFT_OUT = {"tests", "testing", "_vendored", "externals", "__pycache__"}


def docstring_pairs(
    packages: Sequence[str] = PACKAGES, *, size: int | None = None, letters: int = 800, seed: int = 0
) -> list[dict[str, str]]:
    """Summary and body of the docstrings of public functions and classes: queries and the documents that answer them.

    ``packages`` that are not installed are left out; ``size`` pairs are drawn, or all (9,000) if it is None; bodies end
    at so many ``letters``. No text occurs twice.

    Example:
        >>> sorted(docstring_pairs(["numpy"], size=1)[0])
        ['document', 'query']
    """
    size = None if size is None else checked_count("size", size)
    letters = checked_count("letters", letters)
    names = as_list("packages", packages, '["numpy", "scipy"]')
    folders = {name: spec.origin for name in names if (spec := util.find_spec(name)) is not None and spec.origin}
    if not folders:
        raise ValueError(f"packages: none of {names} is installed; name libraries that are.")
    pairs: list[dict[str, str]] = []
    seen: set[str] = set()
    for origin in folders.values():
        for summary, whole in _docstrings(Path(origin).parent):
            body = whole[:letters]
            if seen.isdisjoint((summary, body)):
                seen.update((summary, body))
                pairs.append({"query": summary, "document": body})
    random.Random(checked_count("seed", seed, least=0)).shuffle(pairs)
    if size is not None and len(pairs) < size:
        raise ValueError(
            f"size={size}, but the docstrings of {', '.join(sorted(folders))} give {len(pairs)} pairs; ask for fewer."
        )
    return pairs[:size]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The version of each library that is installed."""
    distributions = metadata.packages_distributions()
    return {name: metadata.version(distributions[name][0]) for name in packages if name in distributions}


@cache
def _docstrings(folder: Path) -> list[tuple[str, str]]:
    """Summary and body of each long enough docstring below a folder, in the order of the files' names."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        if _LEFT_OUT & set(path.relative_to(folder).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # templates and samples of broken code
            continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
                continue
            head, _, body = (ast.get_docstring(node) or "").partition("\n\n")
            summary, body = " ".join(head.split()), " ".join(body.split())
            if len(summary) >= _SUMMARY_LETTERS and len(body) >= _BODY_LETTERS and summary[0].isalpha():
                found.append((summary, body))
    return found
