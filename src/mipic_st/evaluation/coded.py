"""Codes in an evaluation: which vectors their ranges come from, and which numbers stand for them in a comparison.

Documents are always coded. Under ``"symmetric"`` scoring queries are, too, and code is compared with code; under
``"asymmetric"`` scoring queries stay floats and are compared with decoded documents, as search engines do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from math import isqrt
from typing import Any

import numpy as np

from mipic_st.codes import PRECISIONS, Ranges, bits_of, decode, encode, needs_ranges
from mipic_st.evaluation.mteb_data import short_hash
from mipic_st.validation import as_list, checked_choice, checked_texts

SCORINGS = ("symmetric", "asymmetric")
# The default calibration, by its name in results: the texts that are scored.
SCORED_TEXTS = "scored texts"
_CALIBRATIONS = "a list of texts like those that will be coded, or a dict of a Ranges for each dim"
# The tables and plots of a report know a precision by its own name under these.
_USUAL = {"scoring": SCORINGS[0], "calibration": SCORED_TEXTS}


def check_precisions(precisions: Sequence[str]) -> tuple[str, ...]:
    """Known precisions, each once, float32 among them: it fills the store that others may be calibrated on."""
    precisions = as_list("precisions", precisions, "('float32', 'int8')")
    for precision in precisions:
        checked_choice("precisions", precision, PRECISIONS)
    if "float32" not in precisions:
        raise ValueError(f"precisions must include 'float32', the column others are compared with; got {precisions!r}.")
    return tuple(precision for precision in PRECISIONS if precision in precisions)


def check_calibration(calibration: Any, dims: Sequence[int], layers: Sequence[int] | None = None) -> Any:
    """The name of the scored texts, a list of texts, or Ranges by dim that fit the evaluation."""
    if isinstance(calibration, str):
        if calibration != SCORED_TEXTS:
            raise ValueError(f"calibration must be {SCORED_TEXTS!r}, {_CALIBRATIONS}; got {calibration!r}.")
        return calibration
    if not isinstance(calibration, Mapping):
        texts = checked_texts("calibration", calibration, f"{SCORED_TEXTS!r}, {_CALIBRATIONS}")
        if len(set(texts)) < 2:
            raise ValueError(f"calibration needs two different texts or more, got {len(set(texts))}.")
        return texts
    if layers is not None:
        raise ValueError("calibration: Ranges are those of one layer; give texts instead, or leave layers out.")
    for dim, ranges in calibration.items():
        if not isinstance(ranges, Ranges) or len(ranges) != dim:
            found = f"Ranges of {len(ranges)} dims" if isinstance(ranges, Ranges) else repr(ranges)
            raise ValueError(f"calibration must have a Ranges of its own width at each dim, got {found} at {dim!r}.")
    if missing := [dim for dim in dims if dim not in calibration]:
        raise ValueError(f"calibration has no Ranges for dims {missing}; calibrate at these dims too.")
    return dict(calibration)


def name_of_calibration(calibration: Any) -> str:
    """What results call it; other texts or ranges have another name."""
    if isinstance(calibration, str):
        return calibration
    if isinstance(calibration, list):
        return f"texts-{short_hash(calibration)}"
    return f"ranges-{short_hash([[dim, *np.asarray(of).tolist()] for dim, of in calibration.items()])}"


def how_coded(precision: str, scoring: str, calibration: Any) -> dict[str, str | None]:
    """What a record says of its codes; None where it makes no difference."""
    return {
        "scoring": None if precision == "float32" else scoring,
        "calibration": name_of_calibration(calibration) if needs_ranges(precision) else None,
    }


def label_of_codes(record: Mapping[str, Any]) -> str:
    """The precision in tables and plots, with what is not usual about its codes: ``int8 (asymmetric)``."""
    unusual = [record[key] for key, usual in _USUAL.items() if record[key] not in (None, usual)]
    return f"{record['precision']} ({', '.join(unusual)})" if unusual else str(record["precision"])


def coded(vectors: np.ndarray, precision: str, ranges: Ranges | None, scoring: str) -> np.ndarray:
    """Float32 vectors that stand for the codes of these when an evaluator compares them.

    Under asymmetric scoring they are the decoded ones. Code against code, int8 and uint8 are compared as integers, as
    sentence-transformers' evaluators do, float16 and int4 decoded, bits by their Hamming distance.
    """
    codes = encode(vectors, precision, ranges)
    if scoring == "asymmetric" or precision in ("float32", "float16", "int4"):
        return decode(codes, precision, ranges)
    if precision in ("int8", "uint8"):
        return codes.astype(np.float32)
    return _signs(bits_of(codes, precision, vectors.shape[1]))


def _signs(bits: np.ndarray) -> np.ndarray:
    """Bits as vectors whose cosines, dot products and distances order pairs exactly as Hamming distances do.

    Of plain signs rounding would break ties at random. So up to four equal columns are added that make the squared
    length a power of four, and every product and sum of an evaluator exact. The cosine of h different bits is 1 - 2h /
    that length.
    """
    dim = bits.shape[1]
    filling = _filling(dim)
    length = np.float32(isqrt(dim + sum(value * value for value in filling)))
    signs = np.empty((len(bits), dim + len(filling)), dtype=np.float32)
    signs[:, :dim] = bits
    signs[:, :dim] = signs[:, :dim] * 2 - 1
    signs[:, dim:] = filling
    return signs / length


@cache
def _filling(dim: int) -> tuple[int, ...]:
    """Up to four whole numbers whose squares fill dim up to a power of four."""
    total = 1
    while total < dim:
        total *= 4
    filling = _squares(total - dim, 4)
    assert filling is not None  # Lagrange: every number is a sum of four squares
    return filling


def _squares(total: int, most: int) -> tuple[int, ...] | None:
    """At most so many positive numbers whose squares add up to the total; None if there are none."""
    if total == 0 or most == 0:
        return None if total else ()
    for first in range(isqrt(total), 0, -1):
        if (rest := _squares(total - first * first, most - 1)) is not None:
            return (first, *rest)
    return None
