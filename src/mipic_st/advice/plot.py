"""The plot of an `Advice`."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from mipic_st.plotting import COLOURS, MARKERS, by_size, pyplot, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mipic_st.advice.advice import Advice


def quality_by_bytes(advice: Advice, path: str | PathLike[str] | None = None) -> Figure:
    """Quality over bytes: every cell with its interval, the Pareto front, the full width as a line.

    Args:
        advice: What has the cells.
        path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.

    Returns:
        The figure.
    """
    figure, axes = pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    precisions = list(dict.fromkeys(cell.precision for cell in advice.cells))
    for way, face in (("rotated", None), ("truncated", "white")):
        for number, precision in enumerate(precisions):
            cells = [cell for cell in advice.cells if (cell.way, cell.precision) == (way, precision)]
            means = [100 * cell.scores[advice.measure] for cell in cells]
            errors = [
                [100 * (cell.change - cell.low) for cell in cells],
                [100 * (cell.high - cell.change) for cell in cells],
            ]
            axes.errorbar(
                [cell.bytes for cell in cells],
                means,
                yerr=errors,
                fmt=MARKERS[number],
                color=COLOURS[number],
                markerfacecolor=face,
                markersize=5,
                elinewidth=0.8,
                label=f"{precision}, {way}" if cells else None,
            )
    front = sorted((cell for cell in advice.cells if cell.front), key=lambda cell: cell.bytes)
    axes.plot(
        [cell.bytes for cell in front],
        [100 * cell.scores[advice.measure] for cell in front],
        color="0.4",
        linewidth=1.2,
        zorder=0,
        label="Pareto front",
    )
    axes.axhline(100 * advice.full, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    sizes = sorted({cell.bytes for cell in advice.cells if cell.bytes & (cell.bytes - 1) == 0})
    by_size(axes, sizes, xlabel="bytes per vector", ylabel=f"{advice.measure} (x 100)")
    return saved(figure, path)
