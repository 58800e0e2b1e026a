"""The rotation: an orthogonal map of embeddings after which their first values are worth keeping.

Rotated vectors have the same full-width cosines; what changes is what is left when they are truncated.
:func:`mipic_st.transforms.rotation_fit.fit_rotation` finds it for vectors,
:func:`mipic_st.transforms.model_rotation.rotate_model` puts it into a model.

To load and apply one takes NumPy and safetensors alone: workers that code stored vectors need no torch.

Related work: AdaWidth (arXiv 2608.23862) learns a product of Householder reflections, Matryoshka-Adaptor (arXiv
2407.20243) a residual network that changes the full width too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

import mipic_st.codes as coding
from mipic_st.codes import Ranges
from mipic_st.transforms.arrays import WholeMatrix, as_array, as_matrix, as_rows, is_tensor, mapped, off_orthogonal
from mipic_st.transforms.hub import OnHub
from mipic_st.validation import checked_choice, checked_dims

if TYPE_CHECKING:
    import faiss
    from sentence_transformers import SentenceTransformer
    from torch import nn

# Vectors and values that ranges are taken from, at most.
CALIBRATED, _CALIBRATED_VALUES = 2**15, 2**22


def calibrating(rows: Any, dim: int) -> Any:
    """The rows of an array or tensor that ranges of so many dims are taken from."""
    return coding.evenly(rows, min(CALIBRATED, max(2, _CALIBRATED_VALUES // dim)))


@dataclass(frozen=True, eq=False, repr=False)
class Rotation(OnHub):
    """An orthogonal map of embeddings whose leading values are worth keeping.

    Attributes:
        matrix: R, (D, D), float32, NumPy. Vectors are rows: rotated vectors are ``vectors @ R``.
        dims: The truncation dimensions that it was fitted for, ascending.
        report: How queries that were held out search the given documents, one dict per dim. ``truncated``, ``pca`` and
            ``rotated`` are the values of ``measure`` for plain truncation, for the PCA of the documents and for this
            map; ``change`` is rotated minus truncated and ``error`` its standard error, ``pca_change`` and
            ``pca_error`` the same for the PCA; other measures stand as ``similarity_truncated`` and so on (Spearman
            correlation of cosines with those at full width), where pairs were given also recall@10 and MRR@10.
        chosen: Which way to a rotation was best on the held-out part.
        measure: ``nDCG@10`` of the positives where pairs were given, else ``recall@10`` of what the full width finds.
        ranges: By dim, what codes go by: :class:`mipic_st.codes.Ranges` of the fitted documents after rotation, cut
            and scaling to unit length. A fit keeps those of its dims and of the full width.

    Example:
        >>> rotation = Rotation(np.eye(4)[:, [2, 0, 1, 3]], (1, 2))
        >>> rotation(np.array([[1.0, 0.0, 3.0, 4.0]], dtype=np.float32)).tolist()
        [[3.0, 1.0, 0.0, 4.0]]
        >>> rotation([[4.0, 0.0, 3.0, 0.0]], dim=2).round(1).tolist()
        [[0.6, 0.8]]
    """

    kind: ClassVar[str] = "rotation"
    matrix: np.ndarray
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)
    chosen: str = ""
    measure: str = ""
    ranges: dict[int, Ranges] | None = None

    def __post_init__(self) -> None:
        # a copy: what is computed from it once must stay true
        object.__setattr__(self, "matrix", np.array(as_array("matrix", self.matrix), dtype=np.float32, order="C"))

    def __call__(self, vectors: Any, dim: int | None = None) -> Any:
        """Rotate vectors; with ``dim``, truncate them and scale them to unit length too.

        A row of an array has the same result, to the last bit, alone and among others, on any number of threads.

        Args:
            vectors: (N, D) or (D,), of any floating type and any lengths: an array, a torch tensor on any device, a
                list, a column of pandas or Arrow.
            dim: Values to keep, 1 to D. None keeps all, and the length as it is.

        Returns:
            (N, D) or (N, dim): a tensor for a tensor, else an array; of the same type. Zeros stay zeros.

        Raises:
            TypeError: If the vectors are no floating numbers.
            ValueError: If the vectors are not of width D, or ``dim`` is out of range.
        """
        if is_tensor(vectors):
            import torch

            from mipic_st.transforms.fitting import apply_matrix

            return apply_matrix("vectors", vectors, torch.from_numpy(self.matrix), dim, f"this {self.kind}")
        array = as_array("vectors", vectors)
        if array.ndim == 1:
            return self(array[None], dim)[0]
        array = as_matrix("vectors", array, self._width, f"this {self.kind}")
        out = np.empty((len(array), self._dim(dim)), dtype=array.dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            for part in mapped(array, self._whole, out.shape[1]):
                out[part.rows] = part.values * part.scales if dim is None else part.units()
        return out

    def encode(self, vectors: Any, dim: int | None = None, precision: str = "int8") -> np.ndarray:
        """Rotate vectors, truncate them, scale them to unit length, and code them.

        A row has the same code alone and among others, so that streams may come in any parts.

        Args:
            vectors: (N, D), as for a call.
            dim: Values to keep, one of those that :attr:`ranges` has, unless the precision needs none. Default: D.
            precision: ``float32``, ``float16``, ``int8``, ``uint8``, ``int4``, ``binary`` or ``ubinary``, see
                :mod:`mipic_st.codes`.

        Returns:
            The codes, (N, values or bytes).

        Raises:
            TypeError: If the vectors are no floating numbers.
            ValueError: If a vector has no direction (NaN, infinite or zero values, with its row in the message), the
                width is not D, or there are no ranges for ``dim``.

        Example:
            >>> axes = np.eye(4)[:, [2, 0, 1, 3]]
            >>> Rotation(axes, (2,)).calibrate(axes, [4]).encode(axes[:2], precision="ubinary").tolist()
            [[32], [128]]
        """
        ranges = self._ranges(dim, precision)
        array = as_matrix("vectors", vectors, self._width, f"this {self.kind}")
        like = coding.encode(np.empty((0, self._dim(dim)), dtype=np.float32), precision, ranges)
        codes = np.empty((len(array), like.shape[1]), dtype=like.dtype)
        for rows, units in self._units("vectors", array, dim):
            codes[rows] = coding.encode(units, precision, ranges)
        return codes

    def decode(self, codes: Any, dim: int | None = None, precision: str = "int8") -> np.ndarray:
        """The rotated, truncated vectors that codes stand for.

        Args:
            codes: What :meth:`encode` gave, with the same ``dim`` and ``precision``.
            dim: Values of a vector. Default: D.
            precision: What the codes are.

        Returns:
            (N, dim), float32, of about unit length.

        Raises:
            ValueError: If the codes are not of this dim and precision, or there are no ranges for ``dim``.
        """
        found = coding.decode(as_rows("codes", codes), precision, self._ranges(dim, precision))
        if found.shape[1:] != (self._dim(dim),):
            raise ValueError(f"codes must be of {self._dim(dim)} dims, got the shape {found.shape}: give their dim.")
        return found

    def scores(self, queries: Any, codes: Any, dim: int | None = None, precision: str = "int8") -> np.ndarray:
        """Score coded documents for queries that stay floats: 2 to 10 points of recall more than code against code.

        Args:
            queries: (Q, D), at full width and not rotated.
            codes: Of N documents, what :meth:`encode` gave.
            dim: Values of a document. Default: D.
            precision: What the codes are.

        Returns:
            (Q, N), float32: dot products of the queries, rotated, truncated and of unit length, with what the codes
            stand for.

        Raises:
            TypeError: If the queries are no floating numbers.
            ValueError: If a query has no direction, or the codes are not of this dim and precision.

        Example:
            >>> axes = np.eye(4)[:, [2, 0, 1, 3]]
            >>> rotation = Rotation(axes, (2,))
            >>> rotation.scores(axes[:2], rotation.encode(axes, 4, "float16"), 4, "float16").tolist()
            [[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
        """
        array = as_matrix("queries", queries, self._width, f"this {self.kind}")
        asked = self._all_units("queries", array, dim)
        return coding.scores(asked, as_rows("codes", codes), precision, self._ranges(dim, precision))

    def calibrate(self, vectors: Any, dims: Sequence[int] | None = None) -> Rotation:
        """Take ranges from vectors like those that will be coded, e.g. for further dims, or after a change of corpus.

        Args:
            vectors: (N, D), as for a call, two or more; at most 32,768 are looked at, at equal distances, and of more
                than 128 dims so many that they have 4 million values.
            dims: What is to be coded. Default: the rotation's own dims and D.

        Returns:
            The same rotation with ranges for these dims, and those that it had for others.

        Raises:
            TypeError: If the vectors are no floating numbers.
            ValueError: If a vector has no direction, there are fewer than two, or ``dims`` are out of range.
        """
        dims = checked_dims("dims", [*self.dims, self._width] if dims is None else dims, self._width)
        array = as_matrix("vectors", vectors, self._width, f"this {self.kind}")
        if len(array) < 2:
            raise ValueError(f"vectors must be two or more to take ranges from, got {len(array)}.")
        ranges = dict(self.ranges or {})
        for dim in dims:
            ranges[dim] = Ranges.of(self._all_units("vectors", calibrating(array, dim), dim))
        return replace(self, ranges=dict(sorted(ranges.items())))

    def to_faiss(self, dim: int | None = None) -> faiss.LinearTransform:
        """The rotation and cut as the first part of a ``faiss.IndexPreTransform``.

        Truncated vectors are not of unit length. For cosines put ``faiss.NormalizationTransform(dim)`` behind it, as
        :meth:`faiss_index` does.

        Args:
            dim: Values to keep. Default: D.

        Returns:
            A trained ``faiss.LinearTransform`` from D to ``dim`` values, for vectors as they are, not rotated ones.

        Raises:
            ImportError: If faiss is missing.
            ValueError: If ``dim`` is out of range.
        """
        from mipic_st.transforms.faiss_index import linear_transform

        return linear_transform(self.matrix[:, : self._dim(dim)])

    def faiss_index(self, dim: int | None = None, factory: str = "SQ8", vectors: Any = None) -> faiss.IndexPreTransform:
        """A faiss index that rotates, truncates, scales to unit length, and codes: by inner product, so by cosine.

        Queries and documents go in as they are, at full width.

        Args:
            dim: Values to keep. Default: D.
            factory: What faiss's ``index_factory`` makes of the ``dim`` values: ``Flat``, ``SQ8``, ``SQ4``, ``PQ16``,
                ``RaBitQ`` (faiss 1.11 or later), ``IVF256,SQ8`` and so on. Before PQ the values are reordered, so that
                each of its parts has an equal share of the leading ones.
            vectors: (N, D), the documents: the index is trained on them and holds them. None gives an empty index, to
                be trained and filled by the caller.

        Returns:
            The index.

        Raises:
            ImportError: If faiss is missing.
            TypeError: If the vectors are no floating numbers.
            ValueError: If faiss does not know ``factory`` or cannot train on so few vectors, or a vector has no
                direction.

        Example:
            >>> index = rotation.faiss_index(64, "SQ4", vectors)     # doctest: +SKIP
            >>> similarities, rows = index.search(queries, k=10)     # doctest: +SKIP
        """
        from mipic_st.transforms.faiss_index import filled, index_of

        index = index_of(self.matrix[:, : self._dim(dim)], factory)
        if vectors is None:
            return index
        array = as_matrix("vectors", vectors, self._width, f"this {self.kind}")
        for _ in self._units("vectors", array, dim):
            pass  # refuses what has no direction
        return filled(index, array, factory)

    def to_modules(self, model: SentenceTransformer | None = None) -> Sequence[nn.Module]:
        """The rotation as a bias-free identity ``Dense``, in float32; no model is needed."""
        import torch

        from mipic_st.encoder.surgery import identity_dense

        return [identity_dense(torch.from_numpy(self.matrix))]

    def evaluate(self, vectors: Any, queries: Any = None) -> Rotation:
        """Judge the rotation on any vectors, e.g. on documents of a different domain from the one it was fitted on.

        The PCA that it is compared with is fitted on these vectors: the least that a rotation of their own would give.

        Args:
            vectors: (N, D) documents to search.
            queries: (Q, D), what to search for. Default: up to 1,000 of the documents, which do not find themselves.

        Returns:
            The same rotation, with the report of these vectors. Warnings in the log name the dims that are worse than
            plain truncation, and those where their PCA alone keeps a tenth more, the sign of a different domain.

        Raises:
            TypeError: If the vectors are no arrays of floating numbers.
            ValueError: If they do not fit the rotation, are not finite, or are too few.

        Example:
            >>> print(rotation.evaluate(other_vectors).verdict)  # doctest: +SKIP
        """
        from mipic_st.transforms.rotation_fit import judged_on

        judged = judged_on(self, vectors, queries)
        judged.warn("these vectors")
        judged.warn_foreign()
        return judged

    def check(self) -> None:
        """Shape, orthogonality, dims and ranges, too."""
        super().check()
        if self.matrix.ndim != 2 or self.matrix.shape[0] != self.matrix.shape[1]:
            raise ValueError(f"its matrix of shape {self.matrix.shape} is not square")
        if (largest := off_orthogonal(self.matrix)) > 1e-4:
            raise ValueError(f"its matrix is not orthogonal, R^T R - I has values up to {largest:.1e}")
        checked_dims("dims", self.dims, self._width)
        for dim, ranges in (self.ranges or {}).items():
            if len(ranges) != dim or dim > self._width:
                raise ValueError(f"its ranges for {dim} of {self._width} dims are those of {len(ranges)}")
            if max(-ranges.low.min(), ranges.high.max(), np.abs(ranges.mean).max()) > 1 + 1e-5:
                raise ValueError(f"its ranges for {dim} dims are those of vectors that are not of unit length")

    @property
    def _width(self) -> int:
        return len(self.matrix)

    @cached_property
    def _whole(self) -> WholeMatrix:
        return WholeMatrix.of(self.matrix)

    def _dim(self, dim: int | None) -> int:
        return self._width if dim is None else checked_dims("dim", [dim], self._width)[0]

    def _ranges(self, dim: int | None, precision: str) -> Ranges | None:
        """What codes of a precision go by, at a dim."""
        dim = self._dim(dim)
        if not coding.needs_ranges(checked_choice("precision", precision, coding.PRECISIONS)):
            return None
        if dim not in (self.ranges or {}):
            raise ValueError(
                f"this {self.kind} has ranges for {sorted(self.ranges or {})}, and no ranges for {dim} dims, which "
                f"{precision} codes need: rotation = rotation.calibrate(vectors_like_those_to_code, [{dim}])."
            )
        return (self.ranges or {})[dim]

    def _units(self, name: str, array: np.ndarray, dim: int | None) -> Iterator[tuple[slice, np.ndarray]]:
        """Rows, and what they are rotated, truncated and of unit length; what has no direction is refused."""
        for part in mapped(array, self._whole, self._dim(dim)):
            wrong = np.flatnonzero(~np.isfinite(part.lengths) | (part.lengths == 0))
            if len(wrong):
                row = part.rows.start + int(wrong[0])
                if np.isfinite(array[row]).all():
                    where = "" if dim is None else f" at {dim} dims"
                    raise ValueError(f"{name} are zero{where} in row {row}: it has no direction, leave it out.")
                raise ValueError(f"{name} hold NaN or infinite values in row {row}: it has no code, leave it out.")
            yield part.rows, part.units()

    def _all_units(self, name: str, array: np.ndarray, dim: int | None) -> np.ndarray:
        found = np.empty((len(array), self._dim(dim)), dtype=np.float32)
        for rows, units in self._units(name, array, dim):
            found[rows] = units
        return found

    @staticmethod
    def _field(array: np.ndarray) -> np.ndarray:
        return array

    @classmethod
    def _read(cls, arrays: dict[str, np.ndarray], notes: dict[str, str]) -> dict[str, Any]:
        if "kind" not in notes and set(arrays) == {"rotation"}:  # a file of an earlier version
            dims, rows = (json.loads(notes[name]) for name in ("dims", "report"))
            names = {"accuracy_before": "truncated", "accuracy_after": "rotated"}
            names |= {"similarity_before": "similarity_truncated", "similarity_after": "similarity_rotated"}
            rows = [{names.get(name, name): value for name, value in row.items()} for row in rows]
            return {"matrix": arrays["rotation"], "dims": tuple(dims), "report": rows, "measure": "pairs found"}
        found = super()._read(arrays, notes)
        if found.get("ranges"):
            found["ranges"] = {dim: Ranges(*parts) for dim, parts in sorted(found["ranges"].items())}
        return found
