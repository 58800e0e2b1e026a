"""Docstrings of installed libraries as queries and documents."""

from __future__ import annotations

import numpy
import pytest

from mipic_st.docstrings import docstring_pairs, versions


def test_pairs_are_distinct_long_enough_and_drawn_by_seed():
    """No text twice; the same seed gives the same pairs, another one others."""
    pairs = docstring_pairs(["numpy"], size=60)
    texts = [text for pair in pairs for text in (pair["query"], pair["document"])]
    assert len(set(texts)) == 120
    assert all(len(pair["query"]) >= 25 and 120 <= len(pair["document"]) <= 800 for pair in pairs)
    assert docstring_pairs(["numpy"], size=60) == pairs
    assert docstring_pairs(["numpy"], size=60, seed=1) != pairs
    assert max(len(pair["document"]) for pair in docstring_pairs(["numpy"], letters=130)) == 130


def test_a_summary_belongs_to_its_body(tmp_path, monkeypatch):
    """Public names only; short ones, tests and broken files are left out."""
    package = tmp_path / "some_package"
    (package / "tests").mkdir(parents=True)
    body = "It says more about this in words. " * 5
    text = f'def {{}}():\n    """{{}} what the function of this name does.\n\n    {body}\n    """\n'
    (package / "__init__.py").write_text(text.format("shown", "Shows"))
    (package / "hidden.py").write_text(text.format("_hidden", "Hides"))
    (package / "short.py").write_text('def short():\n    """Short.\n\n    Also short."""\n')
    (package / "broken.py").write_text("def broken(:\n")
    (package / "tests" / "test_it.py").write_text(text.format("tested", "Tests"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert docstring_pairs(["some_package"]) == [
        {"query": "Shows what the function of this name does.", "document": body.strip()}
    ]


def test_what_is_missing_is_named():
    """Packages that are not there are left out; if none is, or too few texts, an error says so."""
    assert docstring_pairs(["numpy", "no_such_package"], size=5) == docstring_pairs(["numpy"], size=5)
    assert versions(["numpy", "no_such_package"]) == {"numpy": numpy.__version__}
    with pytest.raises(ValueError, match=r"none of \['no_such_package'\] is installed"):
        docstring_pairs(["no_such_package"])
    with pytest.raises(ValueError, match=r"size=1000000, but the docstrings of numpy give \d+ pairs"):
        docstring_pairs(["numpy"], size=1_000_000)
