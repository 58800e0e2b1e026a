"""The plots of what transforms report."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from mipic_st.plotting import COLOURS, by_size, heatmap, pyplot, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mipic_st.transforms.layer_cut import LayerCuts
    from mipic_st.transforms.verdict import Judged

_SEARCHED = {"truncated": (COLOURS[1], "o--"), "pca": (COLOURS[5], "s-."), "rotated": (COLOURS[0], "^-")}
_FULL = "similarity_full"
_WAYS = ("similarity_plain", "similarity_fitted", "similarity_mixed")


def by_dim(judged: Judged, path: str | PathLike[str] | None = None) -> Figure:
    """The report as curves by dim: truncated, after the PCA of the searched documents, rotated.

    Args:
        judged: What has the report.
        path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no report.
    """
    if not judged.report:
        raise ValueError("the rotation has no report, so there is nothing to draw: evaluate(vectors) makes one.")
    rows = sorted(judged.report, key=lambda row: row["dim"])
    dims = [int(row["dim"]) for row in rows]
    figure, axes = pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    for way, (colour, line) in _SEARCHED.items():
        if way in rows[0]:
            values = [100 * row[way] for row in rows]
            axes.plot(dims, values, line, color=colour, linewidth=1.8, label=judged.headings[way])
    by_size(axes, dims, {"loc": "best"}, xlabel="dims", ylabel=f"{judged.measure} (x 100)", ylim=(0, 100))
    return saved(figure, path)


def by_layer_and_dim(cuts: LayerCuts, path: str | PathLike[str] | None = None) -> Figure:
    """The report as heatmaps by layer and dim under a row of the full depth: cut as it is, fitted, fitted with that.

    Args:
        cuts: What has the report.
        path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.

    Returns:
        The figure.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no report.
    """
    if not cuts.report:
        raise ValueError("the cuts have no report, so there is nothing to draw: fit_layer_cuts makes one.")
    found = {(row["layer"], row["dim"]): row for row in cuts.report}
    layers, dims = (sorted({cell[place] for cell in found}, reverse=not place) for place in (0, 1))
    panels = [
        100
        * np.array(
            [
                [found[layers[0], dim][_FULL] for dim in dims],
                *([found[layer, dim][way] for dim in dims] for layer in layers),
            ]
        )
        for way in _WAYS
    ]
    figure, all_axes = pyplot().subplots(
        1, len(panels), figsize=(2.2 + 2 * len(dims), 1.8 + 0.45 * len(layers)), layout="constrained", sharey=True
    )
    limits = {"vmin": float(np.nanmin(panels)), "vmax": float(np.nanmax(panels))}
    for axes, way, values in zip(all_axes, _WAYS, panels, strict=True):
        image = heatmap(axes, values, ["full", *layers], dims, **limits)
        axes.set_title(cuts.headings[way], loc="left", fontsize=10)
    all_axes[0].set(ylabel="layer")
    figure.suptitle(cuts.caption, x=0.01, ha="left", fontsize=11)
    figure.colorbar(image, ax=all_axes)
    return saved(figure, path)
