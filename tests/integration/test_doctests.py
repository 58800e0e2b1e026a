"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil

import pytest

import mipic_st

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(mipic_st.__path__, "mipic_st.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    """Every example of the module; those that need a model from the hub are marked ``# doctest: +SKIP``."""
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize("name", ["mipic_st.losses.sia", "mipic_st.losses.pic", "mipic_st.losses.presets"])
def test_there_are_examples(name):
    """The formula modules have examples, so that the test above checks something."""
    tests = doctest.DocTestFinder().find(importlib.import_module(name))
    assert sum(len(test.examples) for test in tests) >= 3
