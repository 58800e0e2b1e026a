"""What the report of a rotation says, in words. No torch: a rotation prints wherever it loads."""

from __future__ import annotations

import logging
from html import escape
from typing import ClassVar

import numpy as np

from mipic_st.codes import Ranges
from mipic_st.transforms.base import Transform
from mipic_st.transforms.report_plots import by_dim

logger = logging.getLogger(__name__)

K = 10
RECALL, NDCG = f"recall@{K}", f"nDCG@{K}"


class Judged(Transform):
    """A map whose report compares its search of a corpus with plain truncation and with the corpus's PCA."""

    headings: ClassVar[dict[str, str]] = {
        "dim": "dim",
        "truncated": "truncated",
        "pca": "PCA",
        "rotated": "rotated",
        "change": "change",
        "error": "error",
        "similarity_truncated": "sim. truncated",
        "similarity_pca": "sim. PCA",
        "similarity_rotated": "sim. rotated",
    }
    matrix: np.ndarray
    ranges: dict[int, Ranges] | None
    chosen: str
    measure: str

    def warn(self, data: str) -> None:
        """Name in the log the dims at which truncation is better on this data."""
        if self.worse_dims:
            logger.warning(
                "On %s the rotation is worse than plain truncation at dims %s: fit it on the documents that will be "
                "searched.\n%s",
                data,
                list(self.worse_dims),
                self,
            )

    def warn_foreign(self) -> None:
        """Log the dims at which it looks fitted on a different domain from the vectors that judge it."""
        if self.foreign_dims:
            logger.warning(
                "On these vectors the rotation keeps far fewer neighbours than their own PCA at dims %s, as if it was "
                "fitted on a different domain: fit it on the documents that will be searched.\n%s",
                list(self.foreign_dims),
                self,
            )

    @property
    def caption(self) -> str:  # type: ignore[override]
        """First line of the report as a text."""
        return f"{self.measure} of queries that no step has seen, x100; sim.: similarity, correlation of cosines"

    @property
    def verdict(self) -> str:
        """The report in one line."""
        if not self.report:
            return "Not judged on any data."
        ways = (("", 1), ("", -1), ("pca_", 1), ("pca_", -1))
        better, worse, above, below = (", ".join(map(str, self._dims(key, sign))) for key, sign in ways)
        what = "keeps {} of the full width's neighbours"
        if self.measure == NDCG:
            what = "finds {} of what belongs together"
        found = [f"{what.format('more')} than truncation at {better}"] if better else []
        found += [f"LESS than truncation at {worse}: do not use it there"] if worse else []
        text = ", ".join(found) or f"{what.format('no more')} than truncation"
        text += f"; more than the PCA alone at {above}" if above else ""
        text += f"; the PCA alone has more at {below}" if below else ""
        return f"{self.chosen or 'rotation'}: {text}."

    def _dims(self, key: str, sign: int) -> tuple[int, ...]:
        """Dims that are better, or with -1 worse, than truncation or, with "pca_", PCA: by two standard errors."""
        there = [row for row in self.report if f"{key}change" in row]
        return tuple(int(row["dim"]) for row in there if sign * row[f"{key}change"] > 2 * row[f"{key}error"])

    @property
    def gained(self) -> bool:
        """Whether any dim is better than plain truncation, by two standard errors."""
        return bool(self._dims("", 1))

    @property
    def worse_dims(self) -> tuple[int, ...]:
        """Dims that are worse than plain truncation, by two standard errors or more."""
        return self._dims("", -1)

    @property
    def foreign_dims(self) -> tuple[int, ...]:
        """Dims at which the PCA of the searched documents has a tenth more, by two standard errors or more."""
        return tuple(
            int(row["dim"])
            for row in self.report
            if row.get("pca_change", 0) < min(-0.1 * row.get("pca", 0), -2 * row.get("pca_error", 0))
        )

    plot = by_dim
    """Draw the report: :func:`mipic_st.transforms.report_plots.by_dim`."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{self.verdict}"

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        return f"{super()._repr_html_()}<p>{escape(self.verdict)}</p>"
