"""Precisions of stored vectors, and the bytes they take."""

from __future__ import annotations

from collections.abc import Sequence

from mipic_st.validation import as_list, checked_choice, checked_count

PRECISIONS = ("float32", "int8", "binary")


def bytes_per_vector(dim: int, precision: str = "float32") -> int:
    """Storage of one vector: 4 bytes per value, 1 per value, or 1 per started group of 8 values.

    Example:
        >>> bytes_per_vector(64), bytes_per_vector(64, "int8"), bytes_per_vector(64, "binary")
        (256, 64, 8)
    """
    dim = checked_count("dim", dim)
    return {"float32": 4 * dim, "int8": dim, "binary": (dim + 7) // 8}[
        checked_choice("precision", precision, PRECISIONS)
    ]


def check_precisions(precisions: Sequence[str]) -> tuple[str, ...]:
    """Known precisions, each once, float32 among them: it fills the store that int8 is calibrated on."""
    precisions = as_list("precisions", precisions, "('float32', 'int8')")
    for precision in precisions:
        checked_choice("precisions", precision, PRECISIONS)
    if "float32" not in precisions:
        raise ValueError(f"precisions must include 'float32', the column others are compared with; got {precisions!r}.")
    return tuple(precision for precision in PRECISIONS if precision in precisions)
