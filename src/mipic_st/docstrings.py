"""Real texts that everyone has: the docstrings of installed libraries, a summary line that asks for its body.

Nothing is imported or downloaded: the libraries' source files are read. What comes out depends on their versions, so
a result made of it names them (:func:`versions`). Not part of the stable API.
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

# Words and letters below which a summary or a body says too little to be found, or to be told from others.
_SUMMARY_LETTERS, _BODY_LETTERS = 25, 120
_LEFT_OUT = {"tests", "testing", "_vendored", "externals", "__pycache__"}


def docstring_pairs(
    packages: Sequence[str] = PACKAGES, *, size: int | None = None, letters: int = 800, seed: int = 0
) -> list[dict[str, str]]:
    """Summary and body of the docstrings of public functions and classes: queries and the documents that answer them.

    Args:
        packages: Names of libraries, as they are imported; those that are not installed are left out.
        size: How many pairs, drawn without repetition. None is all, some 9,000.
        letters: Length at which bodies are cut.
        seed: Seeds the order.

    Returns:
        One dict per pair: ``query`` and ``document``; no text occurs twice.

    Raises:
        ValueError: If none of the libraries is installed, or there are fewer pairs than ``size``.

    Example:
        >>> sorted(docstring_pairs(["numpy"], size=1)[0])
        ['document', 'query']
    """
    size = None if size is None else checked_count("size", size)
    letters = checked_count("letters", letters)
    names = as_list("packages", packages, '["numpy", "scipy"]')
    folders = {name: spec for name in names if (spec := util.find_spec(name)) is not None and spec.origin}
    if not folders:
        raise ValueError(f"packages: none of {names} is installed; name libraries that are.")
    pairs: list[dict[str, str]] = []
    seen: set[str] = set()
    for spec in folders.values():
        for summary, body in _docstrings(Path(str(spec.origin)).parent):
            body = body[:letters]
            if seen.isdisjoint((summary, body)):
                seen.update((summary, body))
                pairs.append({"query": summary, "document": body})
    random.Random(checked_count("seed", seed, least=0)).shuffle(pairs)
    if size is not None and len(pairs) < size:
        given = ", ".join(sorted(folders))
        raise ValueError(f"size={size}, but the docstrings of {given} give {len(pairs)} pairs; ask for fewer.")
    return pairs[:size]


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The installed versions that the texts come from.

    Args:
        packages: As for :func:`docstring_pairs`.

    Returns:
        Version by name, of those that are installed.
    """
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
