"""What every fitted map has: dims, a report, a call on arrays, modules for a model, a file.

A new map is one frozen dataclass in one file, with a function that fits it. Its fields are what is saved, so it adds
``__call__`` and ``to_modules`` and nothing else; ``tests/transforms/test_base.py`` has one. Fields are tensors, dicts
of numbers to tensors, and what JSON knows. Files are written and read by NumPy: a map whose fields are arrays, such as
the rotation, loads without torch.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from html import escape
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from mipic_st.files import write_whole
from mipic_st.transforms.arrays import as_rows
from mipic_st.validation import checked_dims, require

if TYPE_CHECKING:
    import pandas as pd
    from sentence_transformers import SentenceTransformer
    from torch import nn

_FORMAT = 1
_NOTES = "transform"


class Transform(ABC):
    """A fitted map of vectors: subclasses are frozen dataclasses that say what it does to them, and by which modules.

    Attributes:
        kind: What the map is called in its file and in messages.
        caption: First line of the report as a text.
        headings: Columns of that text: keys of the report and what stands above them. Whole numbers are printed as they
            are, all others times 100.
        dims: The truncation dimensions that it was fitted for, ascending.
        report: What a held-out part of the data says, one dict per row of the table.
    """

    kind: ClassVar[str]
    caption: ClassVar[str] = ""
    headings: ClassVar[dict[str, str]] = {}
    dims: tuple[int, ...]
    report: list[dict[str, float]]

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply the map to arrays or tensors."""

    @abstractmethod
    def to_modules(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> Sequence[nn.Module]:
        """The map as modules of sentence-transformers' own, so that a saved model loads without this package.

        Args:
            model: The model that they are for; it stays as it is.
            *args: Which part of the map, where it has several.
            **kwargs: The same by name.

        Returns:
            The modules, in order, in full precision.
        """

    def put_in(self, model: SentenceTransformer, *args: Any, **kwargs: Any) -> Callable[[], None]:
        """Put the map into a model, in place.

        Args:
            model: The model, or one that is wrapped for training.
            *args: Which part of the map, as in :meth:`to_modules`.
            **kwargs: The same by name.

        Returns:
            A function that takes it out again: the model is then what it was.
        """
        from mipic_st.encoder.structure import unwrap
        from mipic_st.encoder.surgery import put_in

        inner = unwrap(model)
        return put_in(inner, self.to_modules(inner, *args, **kwargs))

    def check(self) -> None:
        """Refuse what was read from a file and makes no sense: TypeError or ValueError; subclasses look at more."""
        checked_dims("dims", self.dims)
        for name, array in _arrays_of(self).items():
            if not np.isfinite(array).all():
                raise ValueError(f"{name} holds values that are not finite")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the map into one safetensors file, whole or not at all; equal maps give equal bytes.

        Args:
            path: The file.
        """
        from safetensors.numpy import save_file

        arrays = _arrays_of(self)
        plain = {name: value for name, value in _fields_of(self).items() if not _holds_arrays(value)}
        notes = {"kind": self.kind, "format": str(_FORMAT), "fields": json.dumps(plain)}
        notes["checksum"] = _checksum(arrays, notes["fields"])
        # one key: safetensors writes several in an order that differs from call to call
        write_whole(path, lambda place: save_file(arrays, place, metadata={_NOTES: json.dumps(notes)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.

        Returns:
            The map.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged or holds something else.
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no file {path}.")
        try:
            with safe_open(path, framework="np") as file:
                notes = file.metadata() or {}
                notes = json.loads(notes[_NOTES]) if _NOTES in notes else notes  # an earlier version had four keys
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(**cls._read(arrays, notes))
            found.check()
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no {cls.kind} that {cls.__name__}.save wrote, or is damaged: {error}."
            ) from error
        return found

    @classmethod
    def _read(cls, arrays: dict[str, np.ndarray], notes: dict[str, str]) -> dict[str, Any]:
        """The fields of the map in a file."""
        if notes.get("kind") != cls.kind:
            raise ValueError(f"it holds {notes.get('kind', 'nothing of this package')!r}")
        if notes["format"] != str(_FORMAT):
            raise ValueError(f"its format is {notes['format']}, this version of mipic-st reads {_FORMAT}; update it")
        if notes["checksum"] != _checksum(arrays, notes["fields"]):
            raise ValueError("its checksum does not fit its content")
        found = json.loads(notes["fields"])
        found["dims"] = tuple(found["dims"])
        for name, array in arrays.items():
            field, _, key = name.partition("/")
            if key:
                found.setdefault(field, {})[int(key)] = cls._field(array)
            else:
                found[field] = cls._field(array)
        return found

    @staticmethod
    def _field(array: np.ndarray) -> Any:
        """What a field holds for an array in the file."""
        import torch

        return torch.from_numpy(array)

    def to_frame(self) -> pd.DataFrame:
        """The report as a table of pandas, one row per entry."""
        return require("pandas", "the table needs pandas", "eval").DataFrame(self.report)

    def _rows(self) -> list[list[str]]:
        """The report as texts: what stands above the columns, then the rows."""
        keys = [key for key in self.headings if all(key in row for row in self.report)]
        rows = [[self.headings[key] for key in keys]]
        for row in self.report:
            values = (row[key] for key in keys)
            rows.append([str(value) if isinstance(value, int) else f"{100 * value:.1f}" for value in values])
        return rows

    def __str__(self) -> str:
        rows = self._rows()
        lines = ("  ".join(cell.rjust(len(head)) for cell, head in zip(row, rows[0], strict=True)) for row in rows)
        return "\n".join([self.caption, *lines]) if self.headings else repr(self)

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        name = f"<p>{escape(repr(self))}</p>"
        if not (self.headings and self.report):
            return name
        head, *rows = (
            "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)
            for kind, row in zip(["th", *["td"] * len(self.report)], self._rows(), strict=True)
        )
        lines = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"{name}<p>{escape(self.caption)}</p><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"

    def __repr__(self) -> str:
        parts = {
            name: sorted(value) if isinstance(value, dict) else tuple(value.shape)
            for name, value in _fields_of(self).items()
            if _holds_arrays(value)
        }
        listed = "".join(f"{name} {part}, " for name, part in parts.items())
        return f"{type(self).__name__}({listed}dims {list(self.dims)})"


def _fields_of(transform: Transform) -> dict[str, Any]:
    return {field.name: getattr(transform, field.name) for field in fields(transform)}  # type: ignore[arg-type]


def _holds_arrays(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else [value]
    return all(hasattr(part, "__array__") and not isinstance(part, np.generic) for part in parts)


def _arrays_of(transform: Transform) -> dict[str, np.ndarray]:
    """The fields that are arrays, and ``field/number`` for each array of a dict."""
    found: dict[str, Any] = {}
    for name, value in _fields_of(transform).items():
        if isinstance(value, dict) and _holds_arrays(value):
            found |= {f"{name}/{key}": part for key, part in value.items()}
        elif _holds_arrays(value):
            found[name] = value
    return {name: np.ascontiguousarray(as_rows(name, array)) for name, array in found.items()}


def _checksum(arrays: dict[str, np.ndarray], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, array in sorted(arrays.items()):
        # the name that torch has for the type: files were written by it once
        digest.update(f"{name} torch.{array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
