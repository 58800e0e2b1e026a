"""Docstrings as the site's Markdown: sentence-transformers' house style has a few reStructuredText habits."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|meth|mod|data):`~?([\w.]+)`")
_MATH = re.compile(r":math:`([^`]+)`")
_MATH_BLOCK = re.compile(r"^( *)\.\. math:: (.+(?:\n\1 +.+)*)", re.MULTILINE)
_TABLE_RULE = re.compile(r"^ *\+[-+]+\+ *\n", re.MULTILINE)
_TABLE_HEAD_RULE = re.compile(r"\+(=+)(?=\+)")


def to_markdown(text: str) -> str:
    """Roles become cross references, ``.. math::`` and ``:math:`` formulas, grid tables pipe tables."""
    text = _ROLE.sub(lambda match: f"[`{match[1].rsplit('.', 1)[-1]}`][{match[1]}]", text)
    text = _MATH.sub(r"$\1$", text)
    text = _MATH_BLOCK.sub(lambda m: f"{m[1]}$${' '.join(m[2].split())}$$", text)
    text = _TABLE_RULE.sub("", text)
    if _TABLE_HEAD_RULE.search(text):
        text = re.sub(
            r"^( *)\+=[=+]+\+$",
            lambda m: re.sub(r"\+", "|", m[0].replace("=", "-")),
            text,
            flags=re.M,
        )
    # the name under which griffe draws doctests as code
    return re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)


class HouseDocstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)
