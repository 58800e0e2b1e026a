"""Columns of vectors as Arrow keeps them: NumPy rows out of them, codes into them, and a note of what was done.

Codes are a ``FixedSizeList`` of float32, float16, int8 or uint8, those of int4 and bits too, with the packed bytes of a
vector in it: NumPy, Lance and Parquet readers get numbers of the right sign and width without unpacking.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

KEY = b"mipic_st"
"""Where the metadata of a schema say how a column was coded, as JSON."""


class Rows(NamedTuple):
    """Vectors of one Arrow array."""

    vectors: np.ndarray  # (n, D), those that are usable; a view of Arrow's own memory where all are
    usable: np.ndarray  # which rows of the array these are, (N,)
    faults: dict[int, str]  # what is wrong with the others, by row; nulls have no fault


def rows_of(name: str, array: pa.Array, width: int) -> Rows:
    """The vectors of a list or fixed-size list of floats, or an extension type of these; some must have the width."""
    import pyarrow as pa

    array = getattr(array, "storage", array)
    usable = ~array.is_null().to_numpy(zero_copy_only=False)
    starts, ends, leaf = _spans(array)
    if leaf is array or leaf.type not in (pa.float16(), pa.float32(), pa.float64()):
        raise TypeError(
            f"column {name!r} must hold a list of float16, float32 or float64 per row, got {array.type}"
            f"{': are these codes already?' if leaf is not array and pa.types.is_integer(leaf.type) else '.'}"
        )
    lengths = ends - starts
    faults = {int(row): f"has {lengths[row]} values" for row in np.flatnonzero(usable & (lengths != width))}
    if faults and len(faults) == usable.sum():
        raise ValueError(f"column {name!r} has vectors of width {lengths[usable][0]}, this rotation is for {width}.")
    usable[list(faults)] = False
    # only what belongs to these rows: an array may be a slice of a large one
    first, last = (starts[0], ends[-1]) if len(array) else (0, 0)
    values = leaf.slice(first, last - first).to_numpy(zero_copy_only=False)
    if usable.all():
        return Rows(values.reshape(len(array), width), usable, faults)
    return Rows(values[(starts[usable] - first)[:, None] + np.arange(width)], usable, faults)


def width_of(array: pa.Array) -> int:
    """The width that most of the vectors have; 0 where there are none."""
    array = getattr(array, "storage", array)
    starts, ends, _ = _spans(array)
    lengths = (ends - starts)[~array.is_null().to_numpy(zero_copy_only=False)]
    return int(np.bincount(lengths).argmax()) if len(lengths) else 0


def _spans(array: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.Array]:
    """Where each row starts and ends in the innermost values of nested lists, and these values."""
    import pyarrow as pa

    starts = np.arange(len(array))
    ends = starts + 1
    while True:
        if pa.types.is_fixed_size_list(array.type):
            size = array.type.list_size
            starts, ends = (starts + array.offset) * size, (ends + array.offset) * size
        elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            offsets = array.offsets.to_numpy()
            starts, ends = offsets[starts], offsets[ends]
        else:
            return starts, ends, array
        array = getattr(array.values, "storage", array.values)


def codes_array(codes: np.ndarray, usable: np.ndarray) -> pa.Array:
    """Codes, (n, w), as a fixed-size list with a null for each of the (N,) rows that is not usable."""
    import pyarrow as pa

    mask = None
    if not usable.all():
        present, codes = codes, np.zeros((len(usable), codes.shape[1]), codes.dtype)
        codes[usable], mask = present, pa.array(~usable)
    return pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), codes.shape[1], mask=mask)


def replaced(schema: pa.Schema, column: str, kind: pa.DataType, note: dict[str, Any]) -> pa.Schema:
    """The schema with another type of a column and the note of it; what ``datasets`` noted is brought into line."""
    import pyarrow as pa

    metadata = dict(schema.metadata or {})
    if b"huggingface" in metadata:
        features = json.loads(metadata[b"huggingface"])
        value = {"dtype": {"halffloat": "float16", "float": "float32"}.get(str(kind.value_type), str(kind.value_type))}
        if column in features.get("info", {}).get("features", {}):
            new = {"feature": {**value, "_type": "Value"}, "length": kind.list_size, "_type": "Sequence"}
            features["info"]["features"][column] = new
        metadata[b"huggingface"] = json.dumps(features).encode()
    metadata[KEY] = json.dumps(note).encode()
    return schema.set(schema.get_field_index(column), pa.field(column, kind)).with_metadata(metadata)


def note_of(schema: pa.Schema) -> dict[str, Any] | None:
    """How a column of this schema was coded, if one was."""
    metadata = schema.metadata or {}
    return json.loads(metadata[KEY]) if KEY in metadata else None
