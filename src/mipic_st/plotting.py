"""What all plots have in common: colours and markers, matplotlib where it is installed, heatmaps, files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mipic_st.files import write_whole
from mipic_st.validation import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which differ for colour-blind readers and in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def pyplot() -> Any:
    """Matplotlib, where it is installed."""
    return require("matplotlib.pyplot", "plots need matplotlib", "eval")


def heatmap(axes: Any, values: np.ndarray, layers: Sequence[Any], dims: Sequence[Any], **limits: float) -> Any:
    """Draw values by layer (rows, the first on top) and dim, each with its number; the image, for a colour bar."""
    image = axes.imshow(values, aspect="auto", cmap="viridis", **limits)
    middle = image.norm.vmin + (image.norm.vmax - image.norm.vmin) / 2
    for (row, column), value in np.ndenumerate(values):
        text = f"{value:.1f}" if value == value else "n/a"
        axes.text(column, row, text, ha="center", va="center", color="white" if value < middle else "black", fontsize=9)
    axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    axes.set(xlabel="dimensions")
    return image


def by_size(axes: Any, sizes: Sequence[int], legend: dict[str, Any] | None = None, **labels: Any) -> None:
    """Lay out curves over sizes: these in powers of two, a light grid, labels, and the legend at the right."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes], rotation=45 if len(sizes) > 10 else 0)
    axes.set_xticks([], minor=True)
    axes.set(**labels)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, **legend or {"fontsize": 9, "loc": "center left", "bbox_to_anchor": (1, 0.5)})


def saved(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write PNG (200 dpi) and SVG, or the one that the path's ending names."""
    if path is None:
        return figure
    path = Path(path)
    endings = [""] if path.suffix in (".png", ".svg") else [".png", ".svg"]
    for target in (path.with_name(path.name + ending) for ending in endings):
        write_whole(target, partial(figure.savefig, format=target.suffix[1:], dpi=200, bbox_inches="tight"))
    pyplot().close(figure)
    return figure
