"""Checks of arguments, one for each kind that several modules take: numbers, flags, dims, layers, pairs.

NumPy and tensor values count as what they hold. An error names the argument, what is allowed and what was given. It is
a TypeError for what is no number, flag, text or sequence at all, else, and for any wrong count or choice, a ValueError.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any

_HALVES = re.compile("[\ud800-\udfff]")


def require(module: str, what: str, extra: str) -> ModuleType:
    """Import an optional package where it is used; the ImportError begins with ``what``: ``"MTEB tasks need mteb"``."""
    try:
        return import_module(module)
    except ImportError as error:
        install = f'pip install "mipic-st[{extra}]", or in a checkout pip install -e ".[{extra}]"'
        raise ImportError(f"{what}: {install}") from error


def plain(value: Any) -> Any:
    """NumPy and tensor values as Python's own: a number, or a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def is_whole(value: Any) -> bool:
    """Whether a plain value is an integer; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a plain value is a real number; True and False are none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def default_dims(width: int) -> list[int]:
    """The dims that are taken where none are named: powers of two from 8, and the width itself."""
    return [*(2**power for power in range(3, (width - 1).bit_length())), width]


def as_list(name: str, values: Any, example: str) -> list[Any]:
    """Any sequence, array or tensor as a list of plain values."""
    given, values = values, plain(values)
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence, e.g. {example}, got {given!r}.")
    return [plain(value) for value in values]


def checked_texts(name: str, texts: Any, wanted: str = "a list of texts") -> list[str]:
    """One text or more."""
    if isinstance(texts, str):
        raise TypeError(f"{name} must be {wanted}, got one text.")
    table = texts if isinstance(texts, Mapping) else getattr(texts, "column_names", getattr(texts, "columns", None))
    if table is not None:
        raise TypeError(f"{name} must be {wanted}, got a table with the columns {list(table)[:5]}: give one of them.")
    texts = as_list(name, texts, '["a text", "another"]')
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} must be {wanted}, it holds {wrong[0]!r}.")
    if not texts:
        raise ValueError(f"{name} has no texts.")
    if half := [row for row, text in enumerate(texts) if _HALVES.search(text)]:
        raise ValueError(f"{name} holds half a character in row {half[0]}, which no tokenizer takes: leave it out.")
    return texts


def checked_prompt(name: str, prompt: Any) -> str | None:
    """A text, or None."""
    if not isinstance(prompt, str | None):
        raise TypeError(f"{name} must be a text to put before others, or None, got {prompt!r}.")
    return prompt


def per_column(name: str, given: Any, columns: Sequence[str], present: Sequence[str]) -> dict[str, str | None]:
    """One text per column, from one for all or a mapping with gaps, as the trainer's arguments have it."""
    if given is None or isinstance(given, str):
        return dict.fromkeys(columns, given)
    if not isinstance(given, Mapping):
        raise TypeError(f"{name} must be a string or a dict of column names to strings, got {given!r}.")
    if wrong := sorted(map(str, set(given) - set(present))):
        raise ValueError(f"{name} names {wrong}, which data does not have; its columns are {list(present)}.")
    if bad := {column: text for column, text in given.items() if not isinstance(text, str | None)}:
        raise TypeError(f"{name} must map column names to strings, got {bad}.")
    return {column: given.get(column) for column in columns}


def checked_number(name: str, value: Any, least: float, most: float = math.inf, exclusive: bool = False) -> float:
    """A real number within bounds, as int or float."""
    value = plain(value)
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    value = value if isinstance(value, int) else float(value)
    if not (least < value if exclusive else least <= value) or value > most or value == math.inf:
        bounds = f"{'>' if exclusive else '>='} {least} and {'finite' if most == math.inf else f'<= {most}'}"
        raise ValueError(f"{name} must be {bounds}, got {value}.")
    return value


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """An integer from ``least`` on."""
    value = plain(value)
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}.")
    return int(value)


def checked_flag(name: str, value: Any) -> bool:
    """True or False; anything else would be taken for one of them without being meant so, e.g. ``"no"``."""
    if not isinstance(plain(value), bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def checked_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """One of some strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    return value


def checked_dims(name: str, dims: Any, width: int | None = None) -> list[int]:
    """Distinct dims from 1 to the width (if that is known), in the given order."""
    dims = as_list(name, dims, "[384, 64, 16]")
    if not dims:
        raise ValueError(f"{name} is empty: give at least one dimension, e.g. [384, 64, 16].")
    if wrong := [dim for dim in dims if not is_whole(dim)]:
        raise TypeError(f"{name} must be integers, e.g. [384, 64, 16], got {wrong}.")
    if wrong := [dim for dim in dims if dim < 1]:
        raise ValueError(f"{name} must be > 0, got {wrong}.")
    if len(set(dims)) < len(dims):
        raise ValueError(f"{name} has duplicates: {dims}. Give each dimension once.")
    if width is not None and (wrong := [dim for dim in dims if dim > width]):
        raise ValueError(f"{name} {wrong} exceed the model's width of {width}; leave them out.")
    return [int(dim) for dim in dims]


def checked_layers(
    name: str, layers: Any, depth: int | None, *, least: int = 1, otherwise: str = ""
) -> tuple[int, ...]:
    """Distinct layers up to the depth (if that is known), ascending; ``otherwise`` says what to do without any."""
    layers = as_list(name, layers, "[2, 4, 6]")
    if not layers:
        raise ValueError(f"{name} is empty: name at least one layer{otherwise}.")
    most = math.inf if depth is None else depth
    if wrong := [layer for layer in layers if not is_whole(layer) or not least <= layer <= most]:
        first = f"{least} (embeddings)" if least == 0 else str(least)
        last = "" if depth is None else f" to the model's depth of {depth}"
        raise ValueError(f"{name} must be from {first}{last}, got {wrong}.")
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} has duplicates: {layers}. Give each layer once.")
    return tuple(sorted(int(layer) for layer in layers))


def checked_pairs(name: str, pairs_given: Any, depth: int | None, width: int | None) -> tuple[tuple[int, int], ...]:
    """(dim, layer) pairs up to width and depth (if these are known), in the given order."""
    try:
        pairs = [tuple(plain(value) for value in pair) for pair in plain(pairs_given)]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be (dim, layer) pairs, e.g. [(16, 2), (64, 4)], got {pairs_given!r}.") from None
    for pair in pairs:
        for kind, value, most, limit in (("dim", pair[0], width, "width"), ("layer", pair[1], depth, "depth")):
            if not is_whole(value) or value < 1 or (most is not None and value > most):
                last = "" if most is None else f" to the model's {limit} of {most}"
                raise ValueError(f"{name}: {kind} {value!r} of {pair} must be from 1{last}.")
    return tuple((int(dim), int(layer)) for dim, layer in pairs)


def checked_chain(name: str, pairs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of :func:`checked_pairs` that can be chained: at least two, none narrower or lower than before."""
    if len(pairs) < 2:
        raise ValueError(
            f"{name} needs at least two (dim, layer) pairs, got {list(pairs)}. pic_weight=0 switches PIC off."
        )
    for before, after in pairwise(pairs):
        if after[0] < before[0] or after[1] < before[1] or before == after:
            raise ValueError(f"{name} must go from shallow and narrow to deep and wide, but {after} follows {before}.")
    return pairs
