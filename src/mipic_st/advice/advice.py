"""What `advise` found: the cells, which of them to take for how many bytes, and how they are made, in engines too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from html import escape
from os import PathLike
from typing import TYPE_CHECKING, Any

from mipic_st.advice.cells import MEASURES, Cell
from mipic_st.advice.plot import quality_by_bytes
from mipic_st.files import write_json, write_whole
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.verdict import NDCG
from mipic_st.validation import require

if TYPE_CHECKING:
    import pandas as pd

LOSSES = (0.01, 0.02, 0.05)


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """Which dim and precision to store.

    Attributes:
        measure: What decides: ``nDCG@10`` of the answers where pairs were given, else ``3-recall@10``, how many of the
            full width's first three are among the ten that are found, or ``recall@10``, how many of its first ten.
        full: Mean of the measure at full width in float32.
        cells: All :class:`~mipic_st.advice.cells.Cell` that were measured.
        budgets: For each number of bytes the best cell that takes no more.
        within: For losses of 0.01, 0.02 and 0.05, the cell with the fewest bytes that loses no more of the measure.
        gained: Whether a rotation helps on documents that its fit has not seen; if not, no rotated cell is recommended.
        gain: How much more of the full width's neighbours it keeps there than truncation.
        chance: How far random rotations are from each other there, at most (three standard deviations).
        rotation: The map that rotated cells need, fitted on everything that was given.
        settings: What the figures depend on: model, fingerprint, numbers of documents and queries, seed, versions.

    Example:
        >>> advice = advise(model, documents, pairs=pairs)   # doctest: +SKIP
        >>> print(advice)                                    # doctest: +SKIP
        >>> advice.rotation.save("rotation.safetensors")     # doctest: +SKIP
    """

    measure: str
    full: float
    cells: list[Cell]
    budgets: dict[int, Cell]
    within: dict[float, Cell]
    gained: bool
    gain: float
    chance: float
    rotation: Rotation
    settings: dict[str, Any]

    @property
    def cell(self) -> Cell:
        """The cell to take: the smallest that loses at most 5%, or the best within the largest budget."""
        enough, best = self.within[max(LOSSES)], self.budgets[max(self.budgets)]
        return enough if enough.bytes <= max(self.budgets) else best

    @property
    def verdict(self) -> str:
        """The advice in words."""
        where = (
            f"{100 * self.gain:+.1f} points of the neighbours among documents that the fit has not seen, where random "
            f"rotations differ by {100 * self.chance:.1f}"
        )
        nothing = f"A rotation gains nothing: {where}; none is recommended"
        rotated = f"The {self.rotation.chosen} gains: {where}" if self.gained else nothing
        cell = self.cell
        lost = f"{100 * (1 - cell.kept):.1f}% of {self.measure} ({100 * self.full:.1f} at full width)"
        text = f"{rotated}.\nStore {cell}: it loses {lost}."
        if cell is not self.within[max(LOSSES)]:
            text += f" No budget reaches a loss of {100 * max(LOSSES):.0f}%: that takes {self.within[max(LOSSES)]}."
        if NDCG not in cell.scores:
            text += "\nNo answers were given, and neighbours alone can promise too much: give pairs if you have them."
        return text

    @property
    def snippet(self) -> str:
        """Python and engines' settings that make the cell."""
        cell, model = self.cell, self.settings["model"] is not None
        documents, queries = (
            ("model.encode_document(texts)", "model.encode_query(questions)") if model else ("vectors", "query_vectors")
        )
        coded = cell.precision != "float32"
        options = f'dim={cell.dim}, precision="{cell.precision}"'
        if cell.way == "rotated":
            lines = ["from mipic_st import Rotation", ""]
            lines += [
                'rotation = Rotation.load("rotation.safetensors")  # advice.rotation.save("rotation.safetensors")'
            ]
            lines += [f"codes = rotation.encode({documents}, {options})"]
            lines += [f"scores = rotation.scores({queries}, codes, {options})"]
            if model:
                lines += ['rotation.put_in(model)  # or in the model; then model.save_pretrained("rotated")']
        else:
            lines = ["from mipic_st.codes import Ranges, encode"] if coded else []
            lines += ["from mipic_st.numerics import unit_length", ""]
            lines += [f"vectors = unit_length({documents}[:, :{cell.dim}])"]
            lines += [f'codes = encode(vectors, "{cell.precision}", Ranges.of(vectors))'] if coded else []
        head = f"# {cell.dim} dims in {cell.precision}, as engines have it:"
        return "\n".join([*lines, head, *(f"# {line}" for line in engine_lines(cell.dim, cell.precision))])

    def to_frame(self) -> pd.DataFrame:
        """All cells as a table of pandas, the fewest bytes first: the fields of `Cell`, and one column per measure."""
        pandas = require("pandas", "the table needs pandas", "eval")
        rows = [{**(row := asdict(cell)).pop("scores"), **row} for cell in sorted(self.cells, key=_order)]
        measures = [name for name in MEASURES if name in rows[0]]
        return pandas.DataFrame(rows)[["bytes", "precision", "dim", "way", *measures, *_REST]]

    def save(self, path: str | PathLike[str]) -> None:
        """Write everything but the rotation as JSON.

        The keys are those of this class; cells are objects with the fields of `Cell`, keys of ``budgets`` and
        ``within`` texts, and ``format`` is 1. ``cell``, ``verdict`` and ``snippet`` are there as well.

        Args:
            path: The file.
        """
        plain = ("measure", "full", "gained", "gain", "chance", "settings", "verdict", "snippet")
        content: dict[str, Any] = {"format": 1} | {name: getattr(self, name) for name in plain}
        content |= {"cell": asdict(self.cell)}
        for name in ("budgets", "within"):
            content[name] = {str(key): asdict(cell) for key, cell in getattr(self, name).items()}
        content["cells"] = [asdict(cell) for cell in self.cells]
        write_whole(path, partial(write_json, content=content))

    plot = quality_by_bytes
    """Draw quality over bytes: :func:`mipic_st.advice.plot.quality_by_bytes`."""

    def __repr__(self) -> str:
        return f"Advice({self.measure} of {self.settings['queries']} queries, {len(self.cells)} cells: {self.cell})"

    def __str__(self) -> str:
        budgets = [(f"up to {size} bytes", cell) for size, cell in self.budgets.items()]
        losses = [(f"loses up to {100 * loss:.0f}%", cell) for loss, cell in self.within.items()]
        rows = [["", "bytes", "precision", "dim", "", self.measure, "kept", "change", "95% interval"]]
        for name, cell in [*budgets, *losses]:
            figures = [f"{100 * cell.scores[self.measure]:.1f}", f"{100 * cell.kept:.1f}%", f"{100 * cell.change:+.1f}"]
            interval = f"{100 * cell.low:+.1f} to {100 * cell.high:+.1f}"
            rows.append([name, str(cell.bytes), cell.precision, str(cell.dim), cell.way, *figures, interval])
        settings = self.settings
        caption = f"{self.measure} x100 of {settings['queries']} held-out queries in {settings['documents']} documents"
        return "\n".join([caption, *_aligned(rows), "", self.verdict, "", self.snippet])

    def _repr_html_(self) -> str | None:
        """The Pareto front in a notebook; None, which stands for the plain text, where pandas is missing."""
        try:
            table = self.to_frame()
        except ImportError:
            return None
        shown = table[table.front].drop(columns="front").to_html(index=False, float_format="{:.3f}".format)
        return f"{shown}<p>{escape(self.verdict)}</p><pre>{escape(self.snippet)}</pre>"


_REST = ("kept", "change", "low", "high", "front")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Texts to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust, str.rjust, str.ljust, str.rjust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust]
    return [
        "  ".join(side(text, width) for side, text, width in zip(sides, row, widths, strict=True)).rstrip()
        for row in rows
    ]


def chosen(
    cells: Sequence[Cell], budgets: Sequence[int], rotated: bool
) -> tuple[list[Cell], dict[int, Cell], dict[float, Cell]]:
    """The cells with the front marked, the best one per budget, and the smallest one per loss.

    Of cells that are equal the one of fewer bytes counts, then the truncated one, which needs no map.
    """
    allowed = sorted((cell for cell in cells if rotated or cell.way == "truncated"), key=_order)
    front, best = set(), -1.0
    for cell in allowed:
        if cell.kept > best:
            front.add(id(cell))
            best = cell.kept
    by_budget = {}
    for size in sorted(budgets):
        by_budget[size] = max((cell for cell in allowed if cell.bytes <= size), key=lambda cell: cell.kept)
    by_loss = {loss: next(cell for cell in allowed if cell.kept >= 1 - loss) for loss in LOSSES}
    return [replace(cell, front=id(cell) in front) for cell in cells], by_budget, by_loss


def _order(cell: Cell) -> tuple[int, float, bool]:
    return cell.bytes, -cell.kept, cell.way == "rotated"


# By precision: engine and setting. Only what keeps float queries against the stored vectors, as they were measured.
_SETTINGS: dict[str, dict[str, str]] = {
    "float32": {
        "sentence-transformers": "SentenceTransformer(path, truncate_dim={dim})",
        "faiss": 'faiss.index_factory({dim}, "Flat", faiss.METRIC_INNER_PRODUCT)',
        "pgvector": "vector({dim})",
        "Qdrant": "VectorParams(size={dim}, distance=Distance.COSINE)",
    },
    "float16": {
        "sentence-transformers": 'model.encode_document(texts, truncate_dim={dim}).astype("float16")',
        "faiss": 'faiss.index_factory({dim}, "SQfp16", faiss.METRIC_INNER_PRODUCT)',
        "pgvector": "halfvec({dim})",
        "Qdrant": "VectorParams(size={dim}, distance=Distance.COSINE, datatype=Datatype.FLOAT16)",
    },
    "int8": {
        "sentence-transformers": 'quantize_embeddings(vectors, "int8", ranges=ranges)',
        "faiss": 'faiss.index_factory({dim}, "SQ8", faiss.METRIC_INNER_PRODUCT)',
        "Qdrant": "ScalarQuantization(scalar=ScalarQuantizationConfig(type=ScalarType.INT8, quantile=0.994))",
        "Elasticsearch": '"type": "dense_vector", "dims": {dim}, "index_options": {{"type": "int8_hnsw"}}',
    },
    "int4": {
        "faiss": 'faiss.index_factory({dim}, "SQ4", faiss.METRIC_INNER_PRODUCT)',
        "Elasticsearch": '"type": "dense_vector", "dims": {dim}, "index_options": {{"type": "int4_hnsw"}}',
    },
    "binary": {
        "faiss": 'faiss.index_factory({dim}, "RaBitQ", faiss.METRIC_INNER_PRODUCT)  # 8 bytes more each',
        "Qdrant": "BinaryQuantization(binary=BinaryQuantizationConfig(always_ram=True))",
        "pgvector": "bit({dim}) with <~> (bits against bits: finds less than was measured, so rescore)",
    },
}


def engine_lines(dim: int, precision: str) -> list[str]:
    """One line per engine that knows the precision."""
    settings = {name: text.format(dim=dim) for name, text in _SETTINGS[precision].items()}
    if precision == "int4" and dim % 2:  # it packs two values into a byte and takes even dims only
        del settings["Elasticsearch"]
    wide = max(map(len, settings))
    return [f"{name.ljust(wide)}  {text}" for name, text in settings.items()]
