"""What every fitted map has: dims, a report, a call on arrays, modules for a model, a file.

A new map is one frozen dataclass in one file, with a function that fits it. Its fields are what is saved, so it adds
``__call__`` and ``to_modules`` and nothing else; ``tests/transforms/test_base.py`` has one. Fields are tensors, dicts
of numbers to tensors, and what JSON knows.
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
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.encoder.structure import unwrap
from mipic_st.encoder.surgery import put_in
from mipic_st.files import write_whole
from mipic_st.numerics import no_autocast
from mipic_st.transforms.fitting import as_tensor, powers_of_rows
from mipic_st.validation import checked_dims, require

if TYPE_CHECKING:
    import pandas as pd

Vectors = TypeVar("Vectors", np.ndarray, Tensor)

_FORMAT = 1


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
        inner = unwrap(model)
        return put_in(inner, self.to_modules(inner, *args, **kwargs))

    def check(self) -> None:
        """Look at what was read from a file; subclasses look at more.

        Raises:
            TypeError: If a field is of the wrong kind.
            ValueError: If a value makes no sense.
        """
        checked_dims("dims", self.dims)
        for name, tensor in _tensors_of(self).items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(f"{name} holds values that are not finite")

    def save(self, path: str | PathLike[str]) -> None:
        """Write the map into one safetensors file, whole or not at all.

        Args:
            path: The file.
        """
        from safetensors.torch import save_file

        tensors = _tensors_of(self)
        plain = {name: value for name, value in _fields_of(self).items() if not _is_tensors(value)}
        notes = {"kind": self.kind, "format": str(_FORMAT), "fields": json.dumps(plain)}
        notes["checksum"] = _checksum(tensors, notes["fields"])
        write_whole(path, lambda place: save_file(tensors, place, metadata=notes))

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
            with safe_open(path, framework="pt") as file:
                notes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found = cls(**cls._read(tensors, notes))
            found.check()
        except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is no {cls.kind} that {cls.__name__}.save wrote, or is damaged: {error}."
            ) from error
        return found

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], notes: dict[str, str]) -> dict[str, Any]:
        """The fields of the map in a file."""
        if notes.get("kind") != cls.kind:
            raise ValueError(f"it holds {notes.get('kind', 'nothing of this package')!r}")
        if notes["format"] != str(_FORMAT):
            raise ValueError(f"its format is {notes['format']}, this version of mipic-st reads {_FORMAT}; update it")
        if notes["checksum"] != _checksum(tensors, notes["fields"]):
            raise ValueError("its checksum does not fit its content")
        found = json.loads(notes["fields"])
        found["dims"] = tuple(found["dims"])
        for name, tensor in tensors.items():
            field, _, key = name.partition("/")
            if key:
                found.setdefault(field, {})[int(key)] = tensor
            else:
                found[field] = tensor
        return found

    def to_frame(self) -> pd.DataFrame:
        """The report as a table.

        Returns:
            One row per entry.

        Raises:
            ImportError: If pandas is missing.
        """
        return require("pandas", "the table needs pandas", "eval").DataFrame(self.report)

    def __str__(self) -> str:
        keys = [key for key in self.headings if all(key in row for row in self.report)]
        rows = [[self.headings[key] for key in keys]]
        for row in self.report:
            values = (row[key] for key in keys)
            rows.append([str(value) if isinstance(value, int) else f"{100 * value:.1f}" for value in values])
        lines = ("  ".join(cell.rjust(len(head)) for cell, head in zip(row, rows[0], strict=True)) for row in rows)
        return "\n".join([self.caption, *lines]) if self.headings else repr(self)

    def _repr_html_(self) -> str | None:
        """The report in a notebook; None, which stands for the plain text, where pandas is missing."""
        try:
            table = self.to_frame()
        except ImportError:
            return None
        return f"{table.to_html(index=False, float_format='{:.3f}'.format)}<p>{escape(repr(self))}</p>"

    def __repr__(self) -> str:
        parts = {
            name: tuple(value.shape) if isinstance(value, Tensor) else sorted(value)
            for name, value in _fields_of(self).items()
            if _is_tensors(value)
        }
        listed = "".join(f"{name} {part}, " for name, part in parts.items())
        return f"{type(self).__name__}({listed}dims {list(self.dims)})"


def apply_matrix(name: str, vectors: Vectors, matrix: Tensor, dim: int | None, owner: str) -> Vectors:
    """Vectors as rows times a matrix; with a dim, its first columns only, and the result at unit length."""
    given = as_tensor(name, vectors)
    if vectors.shape[-1] != len(matrix):
        raise ValueError(f"{name} have width {vectors.shape[-1]}, {owner} is for {len(matrix)}.")
    if dim is not None:
        (dim,) = checked_dims("dim", [dim], matrix.shape[1])
    matrix = matrix[:, :dim].to(given.device)
    # whatever the lengths, nothing overflows or vanishes: rows are brought near 1, which rounds nothing
    wide = given.to(torch.promote_types(given.dtype, torch.float32))
    powers = powers_of_rows(wide)
    with no_autocast(given):
        mapped = (wide * powers).to(matrix.dtype) @ matrix
    mapped = mapped.to(wide.dtype) / powers if dim is None else F.normalize(mapped, dim=-1)
    mapped = mapped.to(given.dtype)
    return mapped if isinstance(vectors, Tensor) else mapped.numpy()


def _fields_of(transform: Transform) -> dict[str, Any]:
    return {field.name: getattr(transform, field.name) for field in fields(transform)}  # type: ignore[arg-type]


def _is_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, dict) and all(isinstance(v, Tensor) for v in value.values()))


def _tensors_of(transform: Transform) -> dict[str, Tensor]:
    """The fields that are tensors, and ``field/number`` for each tensor of a dict."""
    found = {}
    for name, value in _fields_of(transform).items():
        if isinstance(value, Tensor):
            found[name] = value
        elif _is_tensors(value):
            found |= {f"{name}/{key}": tensor for key, tensor in value.items()}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _checksum(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
