"""Draw the README's picture: the share of full-width nDCG@10 that is left, by bytes per vector.

python examples/benchmarks/bytes_picture.py  # from results/retrieval.json, light and dark
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mipic_st.codes import bytes_per_vector

RESULTS = Path(__file__).parent / "results"
BYTES = (8, 16, 32, 64, 128)
PRECISIONS = ("int4", "int8", "binary", "float32")
COLOURS = {
    "light": ("#00796b", "#1565c0", "#ef6c00", "#6d6d6d"),
    "dark": ("#4db6ac", "#64b5f6", "#ffb74d", "#bdbdbd"),
}


def shares(found: dict[str, Any], way: str, precision: str, measure: str = "ndcg@10") -> dict[int, float]:
    """Percent of the full width that is left, by the bytes that a vector really takes."""
    full = found["full width"][measure]["mean"]
    if precision == "float32":
        cells = {int(dim): cell for dim, cell in found["dims"][way].items()}
    else:
        cells = {int(cell["cell"].split()[-1]): cell for cell in found["bytes"][f"{way}, {precision}"].values()}
    sizes = {bytes_per_vector(dim, precision): cell for dim, cell in cells.items()}
    return {size: 100 * sizes[size][measure]["mean"] / full for size in sorted(sizes) if size <= BYTES[-1]}


def draw(found: dict[str, Any], title: str, theme: str, file: Path) -> None:
    """One picture, readable at a width of 600 pixels."""
    with plt.style.context("dark_background" if theme == "dark" else "default"):
        plt.rcParams.update({"font.size": 11, "svg.hashsalt": "mipic-st"})
        figure, axes = plt.subplots(figsize=(6, 4.1), dpi=200)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        for precision, colour in zip(PRECISIONS, COLOURS[theme], strict=True):
            for way, style in (("rotation", "-"), ("truncation", ":")):
                line = shares(found, way, precision)
                mark, width = ("o", 2.2) if way == "rotation" else ("s", 1.5)
                axes.plot(line.keys(), line.values(), style, marker=mark, ms=4.5, lw=width, color=colour)
            axes.plot([], [], "-", color=colour, lw=2.2, label=precision)
        grey = "white" if theme == "dark" else "black"
        axes.plot([], [], "-o", color=grey, ms=4.5, lw=2.2, label="rotated")
        axes.plot([], [], ":s", color=grey, ms=4.5, lw=1.5, label="truncated")
        axes.set_xscale("log", base=2)
        axes.set_xticks(BYTES, map(str, BYTES))
        axes.set_ylim(0, 105)
        axes.set_yticks(range(0, 101, 20), [f"{share}%" for share in range(0, 101, 20)])
        axes.set_xlabel(f"bytes per vector (full width: {4 * 384:,})")
        axes.set_title(title, fontsize=11, loc="left")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(ncols=6, loc="lower center", frameon=False, fontsize=9, columnspacing=1.2, handlelength=1.8)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        figure.savefig(file, transparent=True, metadata={"Software": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "retrieval.json", help="report of the comparison")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for bytes.png and bytes-dark.png")
    args = parser.parse_args()
    found = json.loads(args.json.read_text(encoding="utf-8"))["sets"]["cranfield"]
    title = "Cranfield, all-MiniLM-L6-v2: share of full-width nDCG@10"
    for theme, name in (("light", "bytes.png"), ("dark", "bytes-dark.png")):
        draw(found, title, theme, args.output / name)


if __name__ == "__main__":
    main()
