"""The plot of `LayerCuts`."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import numpy as np

from mipic_st.plotting import heatmap, pyplot, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mipic_st.transforms.layer_cut import LayerCuts

_FULL = "similarity_full"
_WAYS = ("similarity_plain", "similarity_fitted", "similarity_mixed")


def by_layer_and_dim(cuts: LayerCuts, path: str | PathLike[str] | None) -> Figure:
    """A heatmap for each way, under a row of the full depth, all in the same colours."""
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
