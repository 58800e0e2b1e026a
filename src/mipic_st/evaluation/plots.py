"""The plots of `EvaluationReport`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mipic_st.plotting import COLOURS, MARKERS, by_size, heatmap, pyplot, saved

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mipic_st.evaluation.report import Cell, EvaluationReport

logger = logging.getLogger(__name__)

_SCORE = "score (x 100)"


class _Point(NamedTuple):
    """A point of a plot; a run is (revision, seed)."""

    row: str
    run: tuple[Any, ...]
    precision: str
    dim: int
    bytes: int | None
    score: float


def score_by_dim(report: EvaluationReport, path: str | Path | None = None, task: str | None = None) -> Figure:
    """Score against dim, one line per model, a band from the lowest to the highest seed.

    Args:
        report: Of which the scores are. Layers only are drawn at the deepest one.
        path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.
        task: One task; None draws the mean over tasks.

    Returns:
        The figure.
    """
    points = [(point.row, (point.dim,), point.score) for point in _curves(report, task)]
    return saved(_line_plot(points, _SCORE, _title(report, task)), path)


def retained(report: EvaluationReport, path: str | Path | None = None, task: str | None = None) -> Figure:
    """Percent of its model's largest dim's score that each dim keeps; arguments as for `score_by_dim`."""
    curves, title = _curves(report, task), _title(report, task)
    largest = {point.row: point.dim for point in sorted(curves, key=lambda point: point.dim)}
    widest = {(point.row, point.run): point for point in curves if point.dim == largest[point.row]}
    if without := sorted({(point.row, *map(str, point.run)) for point in curves if point[:2] not in widest}):
        named = (f"{row} at {largest[row]} (revision {revision}, seed {seed})" for row, revision, seed in without)
        logger.warning("runs without a score at the largest dim are left out: %s", "; ".join(named))
    if below := sorted({str(row) for (row, _), point in widest.items() if point.score < 0}):
        raise ValueError(
            f"the scores of {title} are below 0 at the largest dim ({', '.join(below)}), so a share of them says "
            "nothing; name another task, or use plot_score_by_dim."
        )
    points = [
        # a share of zero is none
        (point.row, (point.dim,), 100 * point.score / (widest[point.row, point.run].score or float("nan")))
        for point in curves
        if point[:2] in widest
    ]
    figure = _line_plot(points, "share of the largest dim kept (%)", title)
    figure.axes[0].axhline(100, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
    return saved(figure, path)


def quality_by_bytes(report: EvaluationReport, path: str | Path | None = None, task: str | None = None) -> Figure:
    """Score against bytes per vector, one line per model and precision; arguments as for `score_by_dim`."""
    curves = _curves(report, task, codes=True)
    if any(point.bytes is None for point in curves):
        raise ValueError("bytes are missing from some records; give each its bytes per vector.")
    several = len({point.row for point in curves}) > 1
    points = [
        # binary codes of several dims may have as many bytes: a point each
        (f"{point.row}, {point.precision}" if several else point.precision, (point.bytes, point.dim), point.score)
        for point in curves
    ]
    return saved(_line_plot(points, _SCORE, _title(report, task), x="bytes per vector"), path)


def layer_dim(
    report: EvaluationReport, path: str | Path | None = None, task: str | None = None, model: str | None = None
) -> Figure:
    """Heatmap of the score by layer (rows, deepest on top) and dim; arguments as for `score_by_dim`.

    ``model`` says which, if the report holds several: the name that the table has.
    """
    cells = {key: cell for key, cell in report.cells().items() if key[1] is not None and key[2] == "float32"}
    if not cells:
        raise ValueError("the report holds no layers; evaluate with layers=[...].")
    models = list(dict.fromkeys(key[0] for key in cells))
    shown = models[0] if model is None and len(models) == 1 else model
    if shown not in models:
        raise ValueError(f"model must be one of {models}, got {model!r}.")
    cells = _of_task({key: cell for key, cell in cells.items() if key[0] == shown}, task)
    layers, dims = sorted({key[1] for key in cells}, reverse=True), sorted({key[3] for key in cells})
    columns = {key[4:] for key in cells}
    figure, axes = pyplot().subplots(figsize=(1.6 + 0.75 * len(dims), 1.4 + 0.45 * len(layers)), layout="constrained")
    places = [(shown, layer, "float32", dim) for layer in layers for dim in dims]
    scores = [
        [cells[*place, *key].mean() if (*place, *key) in cells else np.nan for key in columns] for place in places
    ]
    values = 100 * np.mean(scores, axis=1).reshape(len(layers), len(dims))
    image = heatmap(axes, values, layers, dims)
    axes.set(ylabel="layer")
    axes.set_title(f"{str(shown).rsplit('/', 1)[-1]}: {_title(report, task)}", loc="left", fontsize=11)
    figure.colorbar(image, ax=axes, label=_SCORE)
    return saved(figure, path)


def _of_task(cells: dict[tuple[Any, ...], Cell], task: str | None) -> dict[tuple[Any, ...], Cell]:
    """The cells of one task, or of all. Scores of several metrics are not drawn as one."""
    tasks = sorted({str(key[4]) for key in cells})
    if task is not None:
        cells = {key: cell for key, cell in cells.items() if key[4] == task}
        if not cells:
            raise ValueError(f"task {task!r} is not in the report, which has {tasks}.")
    metrics: dict[Any, set[str]] = {}
    for *_, name, metric in cells:
        metrics.setdefault(name, set()).add(str(metric))
    if mixed := {name: sorted(kinds) for name, kinds in metrics.items() if len(kinds) > 1}:
        raise ValueError(
            f"one line cannot show several metrics, and these tasks have {mixed}; draw them separately with task=...."
        )
    return cells


def _curves(report: EvaluationReport, task: str | None, codes: bool = False) -> list[_Point]:
    """Score x 100 per (row, run, precision, dim), of the final vector or the deepest layer; NaN if a task lacks."""
    cells = {key: cell for key, cell in report.cells().items() if codes or key[2] == "float32"}
    if not cells:
        raise ValueError("the report holds no float32 scores.")
    cells = _of_task(cells, task)
    final: dict[tuple[Any, ...], int | None] = {}
    for row, layer, _, _, *column in cells:
        known = final.setdefault((row, *column), layer)
        final[row, *column] = None if layer is None or known is None else max(known, layer)
    columns = {place[1:] for place in final}
    points: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
    sizes: dict[tuple[Any, ...], int | None] = {}
    for (row, layer, precision, dim, *column), cell in cells.items():
        if layer == final[row, *column]:
            sizes[precision, dim] = cell.bytes
            name = row if layer is None else f"{row} (layer {layer})"
            for run, score in cell.scores.items():
                points.setdefault((name, run, precision, dim), {})[tuple(column)] = score
    curves, gaps = [], []
    for (row, run, precision, dim), scores in points.items():
        lacking = sorted({str(column[0]) for column in columns - set(scores)})
        score = float("nan") if lacking else 100 * float(np.mean(list(scores.values())))
        curves.append(_Point(row, run, precision, dim, sizes[precision, dim], score))
        if score != score:
            gaps.append(f"{row} at {dim} ({'lacks ' + ', '.join(lacking) if lacking else 'not a number'})")
    if len(gaps) == len(curves):
        raise ValueError(f"nothing to draw, no point has a score for every task: {'; '.join(gaps[:5])}.")
    if gaps:
        logger.warning("gaps in the plot, for these have no score for every task: %s", "; ".join(gaps))
    return curves


def _title(report: EvaluationReport, task: str | None) -> str:
    tasks = sorted({str(record["task"]) for record in report.records if record["primary"]})
    if task is not None or len(tasks) == 1:
        return task or tasks[0]
    return f"mean of {len(tasks)} tasks"


def _line_plot(
    points: Sequence[tuple[str, tuple[Any, ...], float]], y_label: str, title: str, x: str = "dimensions"
) -> Figure:
    """One line per name through the means of each place (drawn at its first number), a band from lowest to highest."""
    if not any(y == y for *_, y in points):
        raise ValueError(f"nothing to draw: {y_label} is not a number at any point.")
    figure, axes = pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    lines: dict[str, dict[tuple[int, ...], list[float]]] = {}
    for name, place, y in points:
        lines.setdefault(name, {}).setdefault(tuple(map(int, place)), []).append(y)
    shorts = [name.rsplit("/", 1)[-1] for name in lines]
    for number, (name, line) in enumerate(lines.items()):
        places = sorted(line)
        across = [place[0] for place in places]
        # NumPy's mean of a NaN is NaN: a gap in the line, not a mean over fewer seeds
        means, lows, highs = ([float(f(line[place])) for place in places] for f in (np.mean, np.min, np.max))
        label = shorts[number] if shorts.count(shorts[number]) == 1 else name
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(across, means, color=colour, marker=marker, markersize=5, linewidth=1.8, label=label)
        if lows != highs:
            axes.fill_between(across, lows, highs, color=colour, alpha=0.18, linewidth=0)
    ticks = sorted({place[0] for line in lines.values() for place in line})
    if len(ticks) > 10:  # no room for the labels of 1024 and 1536
        ticks = [tick for tick in ticks if not any(tick < other < 2 * tick for other in ticks)]
    by_size(axes, ticks, xlabel=x, ylabel=y_label)
    axes.set_title(title, loc="left", fontsize=11)
    return figure
