"""One object for all scores: a table, Markdown, CSV, JSON, LaTeX and four plots."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mipic_st.files import write_whole
from mipic_st.validation import is_number, is_whole, missing_extra, plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

COLUMNS = ("model", "revision", "seed", "task", "metric", "primary", "layer", "dim", "precision", "bytes", "score")
_REQUIRED = ("model", "task", "metric", "dim", "score")
_DEFAULTS = {"revision": None, "seed": None, "primary": True, "layer": None, "precision": "float32", "bytes": None}
_MAY_BE_NONE = ("revision", "seed", "layer", "bytes")
# Scores of one identity that differ by less are one score: below the last digit that tables show.
_SAME_SCORE = 5e-5
_NOT_A_NUMBER = "n/a"
# Okabe and Ito's colours: told apart by readers with colour blindness and in grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(missing_extra("tables need pandas", "eval")) from error
    return pandas


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(missing_extra("plots need matplotlib", "plot")) from error
    return matplotlib.pyplot


@dataclass
class _Cell:
    """The main score of one row in one column, for each (revision, seed) that was declared."""

    bytes: int | None
    scores: dict[tuple[Any, Any], float] = field(default_factory=dict)

    def mean(self) -> float:
        return float(np.mean(list(self.scores.values())))


class _Point(NamedTuple):
    """A point of a plot."""

    row: str
    run: tuple[Any, ...]
    precision: str
    dim: int
    bytes: int | None
    score: float


def _or_none(value: Any) -> Any:
    """What frames and CSV files write for "none" (NaN, NA) as None."""
    value = plain(value)
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value


def _checked_record(given: Any) -> dict[str, Any]:
    """A record with all keys and values of their kind, as a table or a plot takes them."""
    if not isinstance(given, Mapping):
        raise TypeError(f"records must be dicts, got {given!r}.")
    missing = [key for key in _REQUIRED if key not in given]
    unknown = sorted(set(given) - set(COLUMNS))
    if missing or unknown:
        raise ValueError(f"a record lacks {missing} or has unknown keys {unknown}; keys are {list(COLUMNS)}.")
    record = {key: given.get(key, _DEFAULTS.get(key)) for key in COLUMNS}
    for key in _MAY_BE_NONE:
        record[key] = _or_none(record[key])
    for key in ("dim", "layer", "bytes", "seed"):
        value = plain(record[key])
        if isinstance(value, float) and value.is_integer():  # a frame's column with gaps
            value = record[key] = int(value)
        if not (is_whole(value) or (value is None and key in _MAY_BE_NONE)):
            raise ValueError(f"{key} of a record must be a whole number, got {value!r} in {dict(given)}.")
    if record["score"] is None:  # what JSON has for nan
        record["score"] = float("nan")
    if not is_number(plain(record["score"])):
        raise ValueError(
            f"score of a record must be a number, nan or None for none, got {record['score']!r} in {dict(given)}."
        )
    if not isinstance(plain(record["primary"]), bool):
        raise ValueError(f"primary of a record must be True or False, got {record['primary']!r} in {dict(given)}.")
    return record


def _run(record: dict[str, Any]) -> tuple[str, Any, Any]:
    """(model, revision, seed) of a record: what has one score per cell."""
    return str(record["model"]), record["revision"], record["seed"]


def _row_names(records: Iterable[dict[str, Any]]) -> dict[tuple[str, Any, Any], str]:
    """The row of each run. One row for all seeds of a model if each seed is one revision; else revisions part."""
    revisions_of: dict[str, dict[Any, list[Any]]] = {}
    for model, revision, seed in dict.fromkeys(_run(record) for record in records):
        revisions_of.setdefault(model, {}).setdefault(seed, []).append(revision)
    names: dict[tuple[str, Any, Any], str] = {}
    for model, by_seed in revisions_of.items():
        runs = [(revision, seed) for seed, revisions in by_seed.items() for revision in revisions]
        seeds = [seed for seed in by_seed if seed is not None]
        joined = all(len(by_seed[seed]) == 1 for seed in seeds)
        known = {str(revision) for revision, _ in runs if revision is not None}
        short = 8 if len({revision[:8] for revision in known}) == len(known) else None
        rows = {}
        for revision, seed in runs:
            at = "" if revision is None else f"@{str(revision)[:short]}"
            if seed is None:
                rows[revision, seed] = model + at
            elif joined:
                rows[revision, seed] = f"{model} (seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))})"
            else:
                rows[revision, seed] = f"{model}{at} (seed {seed})"
        alone = len(set(rows.values())) == 1
        names |= {(model, *run): model if alone else row for run, row in rows.items()}
    models_of: dict[str, set[str]] = {}
    for (model, *_), row in names.items():
        models_of.setdefault(row, set()).add(model)
    if same := {row: sorted(models) for row, models in models_of.items() if len(models) > 1}:
        raise ValueError(f"models share a row of the table, {same}: give them other names.")
    return names


def _warn_of_missing_seeds(cells: dict[tuple[Any, ...], _Cell]) -> None:
    """A mean over fewer seeds than the row has elsewhere is shown, but not in silence."""
    runs_of: dict[str, set[Any]] = {}
    for (row, *_), cell in cells.items():
        runs_of.setdefault(row, set()).update(cell.scores)
    fewer = sorted(
        {f"{row}, {task}" for (row, _, _, _, task, _), cell in cells.items() if set(cell.scores) != runs_of[row]}
    )
    if fewer:
        logger.warning("means over fewer seeds than the model has elsewhere: %s", "; ".join(fewer))


def _column_names(columns: Sequence[tuple[Any, Any]]) -> list[str]:
    """A task's name, with its metric where its scores are of several."""
    tasks = [task for task, _ in columns]
    return [str(task) if tasks.count(task) == 1 else f"{task} {metric}" for task, metric in columns]


def _of_task(cells: dict[tuple[Any, ...], _Cell], task: str | None) -> dict[tuple[Any, ...], _Cell]:
    """The cells of one task, or of all. Scores of several metrics are not drawn as one."""
    tasks = sorted({str(key[4]) for key in cells})
    if task is not None:
        cells = {key: cell for key, cell in cells.items() if key[4] == task}
        if not cells:
            raise ValueError(f"task {task!r} is not in the report, which has {tasks}.")
    metrics: dict[Any, set[str]] = {}
    for *_, name, metric in cells:
        metrics.setdefault(name, set()).add(str(metric))
    mixed = {name: sorted(kinds) for name, kinds in metrics.items() if len(kinds) > 1}
    if mixed:
        raise ValueError(
            f"one line cannot show several metrics, and these tasks have {mixed}; draw their reports apart."
        )
    return cells


class _Several(list[Any]):
    """Different values of reports that were added, no list that one of them had."""


class EvaluationReport:
    """Scores of models by task, metric, dim, layer and precision.

    A row is a model with its name and its revision. Tables and plots average declared seeds and nothing else: two
    revisions under one name become two rows, ``name@revision``, and two different scores of one and the same row are an
    error. A score that is not a number stays one in every mean (``n/a`` in text, a gap in plots).

    Args:
        records: One dict per score with ``model``, ``task``, ``metric``, ``dim``, ``score`` and, if they apply,
            ``revision`` (which state of the model), ``seed`` (of the training run; runs of one model that differ in it
            are averaged), ``layer``, ``precision``, ``bytes``, ``primary`` (whether it is the task's main metric).
        info: Anything to keep with the scores (peak memory, revision); written to JSON.

    Raises:
        TypeError: If a record is no dict.
        ValueError: If it lacks a key, has an unknown one, or a value of another kind than the table needs.

    Example:
        >>> report = EvaluationReport([{"model": "m", "task": "sts", "metric": "spearman", "dim": 8, "score": 0.5}])
        >>> len(report)
        1
    """

    def __init__(self, records: Iterable[dict[str, Any]], info: dict[str, Any] | None = None) -> None:
        self.records: list[dict[str, Any]] = [_checked_record(record) for record in records]
        self.info = dict(info or {})

    def __len__(self) -> int:
        return len(self.records)

    def __add__(self, other: EvaluationReport) -> EvaluationReport:
        """Both reports' scores in one; of ``info``, values that differ become a list.

        A list that was read back from a file counts as one value.
        """
        info: dict[str, Any] = {}
        for key in {**self.info, **other.info}:
            values: dict[str, Any] = {}
            for value in (report.info[key] for report in (self, other) if key in report.info):
                for each in value if isinstance(value, _Several) else [value]:
                    values.setdefault(_content(each), each)
            info[key] = _Several(values.values()) if len(values) > 1 else next(iter(values.values()))
        return EvaluationReport(self.records + other.records, info)

    def frame(self) -> pd.DataFrame:
        """A pandas frame, one row per score.

        Returns:
            Columns model, revision, seed, task, metric, primary, layer, dim, precision, bytes, score (0 to 1).
        """
        pandas = _pandas()
        frame = pandas.DataFrame(self.records, columns=list(COLUMNS))
        frame["layer"] = frame["layer"].astype("Int64")
        frame["seed"] = frame["seed"].astype("Int64")
        return frame

    def _cells(self) -> dict[tuple[Any, ...], _Cell]:
        """Main scores by (row's name, layer, precision, dim, task, metric), in the order of the records.

        Raises:
            ValueError: If there are none, or two different ones of one model, revision and seed.
        """
        main = [record for record in self.records if record["primary"]]
        if not main:
            raise ValueError("the report holds no main scores.")
        row_of = _row_names(main)
        cells: dict[tuple[Any, ...], _Cell] = {}
        for record in main:
            run = _run(record)
            row = row_of[run]
            layer, dim = record["layer"], plain(record["dim"])
            key = (row, layer, record["precision"], dim, record["task"], record["metric"])
            cell = cells.setdefault(key, _Cell(record["bytes"]))
            score = float(record["score"])
            known = cell.scores.setdefault(run[1:], score)
            if not (math.isclose(known, score, rel_tol=0, abs_tol=_SAME_SCORE) or (known != known and score != score)):
                raise ValueError(
                    f"two scores, {known:.4f} and {score:.4f}, for model {record['model']!r}, revision "
                    f"{record['revision']!r}, seed {record['seed']!r}, task {record['task']!r}, dim {dim}"
                    f"{'' if layer is None else f', layer {layer}'}: only runs of different seeds are averaged. Give "
                    "models different names, runs their seed, or evaluators different names."
                )
        _warn_of_missing_seeds(cells)
        return cells

    def table(self, average: bool = True) -> pd.DataFrame:
        """Main metrics x 100: one row per (model, layer, precision, dim), one column per task; seeds are averaged.

        Revisions of one name have rows of their own, ``name@revision``. A task whose scores are of several metrics has
        a column for each. A mean over seeds or tasks of which one is not a number is none either.

        Args:
            average: Add the mean over tasks as the last column, if there are several tasks.

        Returns:
            The wide frame; what all rows share (one precision, no layers) is left out of its index.

        Raises:
            ValueError: If the report holds no main scores, or two different ones of one model, revision and seed.
        """
        pandas = _pandas()
        keys, columns, rows, values, _ = self._wide(average)
        index = pandas.MultiIndex.from_tuples(rows, names=keys)
        return pandas.DataFrame(values, index=index, columns=columns)

    def _wide(self, average: bool) -> tuple[list[str], list[str], list[tuple[Any, ...]], np.ndarray, np.ndarray]:
        """The table's parts: names of its keys, its columns and rows, values x 100, and where there is a score."""
        cells = self._cells()
        layers = any(layer is not None for _, layer, *_ in cells)
        precisions = len({key[2] for key in cells}) > 1
        keys = ["model", *(["layer"] if layers else []), *(["precision"] if precisions else []), "dim"]
        keys += ["bytes"] if precisions else []
        columns = list(dict.fromkeys(key[4:] for key in cells))
        rows = {key[:4]: cell.bytes for key, cell in cells.items()}
        values = np.full((len(rows), len(columns)), np.nan)
        there = np.zeros(values.shape, dtype=bool)
        row_number, column_number = {key: i for i, key in enumerate(rows)}, {key: i for i, key in enumerate(columns)}
        for key, cell in cells.items():
            place = row_number[key[:4]], column_number[key[4:]]
            values[place] = 100 * cell.mean()
            there[place] = True
        names = _column_names(columns)
        if average and len(columns) > 1:
            # a mean over fewer tasks would not compare, so a gap stays a gap
            values = np.column_stack([values, values.mean(axis=1)])
            there = np.column_stack([there, there.all(axis=1)])
            names.append("mean" if "mean" not in names else "mean of tasks")
        index = [
            (
                model,
                *(["" if layer is None else layer] if layers else []),
                *([precision] if precisions else []),
                dim,
                *(["" if size is None else size] if precisions else []),
            )
            for (model, layer, precision, dim), size in rows.items()
        ]
        return keys, names, index, values, there

    def _text(self, bold: Callable[[str], str]) -> tuple[list[str], list[str], list[tuple[list[str], list[str]]]]:
        """Key names, column names and rows (keys, cells) as text; with several models the best cells are marked.

        Built by hand: a task may be called like a key.
        """
        keys, columns, index, values, there = self._wide(average=True)
        shown = np.round(values, 2)
        best: dict[tuple[Any, ...], float] = {}
        several = len({row[0] for row in index}) > 1
        for number, row in enumerate(index):
            for column in range(len(columns)):
                if (value := shown[number, column]) == value:
                    place = (column, *row[1:])
                    best[place] = max(best.get(place, value), value)
        rows = []
        for number, row in enumerate(index):
            cells = []
            for column in range(len(columns)):
                value = shown[number, column]
                if value != value:
                    cells.append(_NOT_A_NUMBER if there[number, column] else "")
                    continue
                text = f"{value:.2f}"
                cells.append(bold(text) if several and value == best[(column, *row[1:])] else text)
            rows.append(([str(part) for part in row], cells))
        return keys, columns, rows

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table as Markdown; with several models the highest per column and dim is bold.

        Args:
            path: File to write to, if any.

        Returns:
            The table as text; ``n/a`` is a score that is not a number, an empty cell one that is not there.
        """
        keys, columns, body = self._text("**{}**".format)
        rows = [[*keys, *columns], *([*row, *cells] for row, cells in body)]
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
        rule = ["-" * width if i < len(keys) else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [
            "| "
            + " | ".join(
                cell.ljust(width) if i < len(keys) else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            + " |"
            for row in [rows[0], rule, *rows[1:]]
        ]
        return _written("\n".join(lines) + "\n", path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """All scores, one per line, full precision.

        Args:
            path: File to write to, if any.

        Returns:
            The CSV text.
        """
        return _written(self.frame().to_csv(index=False), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All scores and ``info``; `from_json` reads them back. NaN becomes null, NumPy values plain ones.

        Args:
            path: File to write to, if any.

        Returns:
            The JSON text.
        """
        records = [{**record, "score": _none_if_nan(record["score"])} for record in self.records]
        return _written(json.dumps({"info": self.info, "records": records}, indent=1, default=_jsonable) + "\n", path)

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationReport:
        """Read what `to_json` wrote.

        Args:
            path: The file.

        Returns:
            A report of the same scores.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it holds something else; the message names it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["records"], content["info"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no report, that is, JSON with info and records as to_json writes it: {error!r}."
            ) from error

    def to_latex(self, path: str | Path | None = None) -> str:
        """The table as a LaTeX ``tabular`` with booktabs rules; with several models the highest per column is bold.

        Args:
            path: File to write to, if any.

        Returns:
            The LaTeX text.
        """
        keys, columns, rows = self._text("\\textbf{{{}}}".format)
        escaped = {character: "\\" + character for character in "_&%#${}"}
        escaped |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}

        def clean(value: str) -> str:
            return "".join(escaped.get(character, character) for character in value)

        lines = [
            "\\begin{tabular}{" + "l" * len(keys) + "r" * len(columns) + "}",
            "\\toprule",
            " & ".join(clean(name) for name in [*keys, *columns]) + " \\\\",
            "\\midrule",
            *(" & ".join([*map(clean, row), *cells]) + " \\\\" for row, cells in rows),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return _written("\n".join(lines) + "\n", path)

    # Plots ----------------------------------------------------------------------------------------------------------

    def _curves(self, task: str | None, precisions: Sequence[str] = ("float32",)) -> list[_Point]:
        """Score x 100 per (row, run, precision, dim), of one task or the mean over all, of the final vector.

        A mean that lacks a task, or holds a score that is not a number, is NaN: drawn as a gap.
        """
        cells = {key: cell for key, cell in self._cells().items() if key[2] in precisions}
        if not cells:
            raise ValueError(f"the report holds no scores at precisions {list(precisions)}.")
        cells = _of_task(cells, task)
        # the final vector is the one without a layer, or else the deepest
        final: dict[tuple[Any, ...], int | None] = {}
        for row, layer, _, _, *column in cells:
            place = (row, *column)
            known = final.setdefault(place, layer)
            final[place] = None if layer is None or known is None else max(known, layer)
        columns = {place[1:] for place in final}
        points: dict[tuple[Any, ...], dict[tuple[Any, ...], float]] = {}
        sizes: dict[tuple[Any, ...], int | None] = {}
        for (row, layer, precision, dim, *column), cell in cells.items():
            if layer == final[row, *column]:
                sizes[precision, dim] = cell.bytes
                for run, score in cell.scores.items():
                    points.setdefault((row, run, precision, dim), {})[tuple(column)] = score
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

    def _title(self, task: str | None) -> str:
        tasks = sorted({str(record["task"]) for record in self.records if record["primary"]})
        if task is not None or len(tasks) == 1:
            return task or tasks[0]
        return f"mean of {len(tasks)} tasks"

    def plot_score_by_dim(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Score against dim, one line per model, a band from the lowest to the highest seed.

        Args:
            path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.
            task: One task; None draws the mean over tasks.

        Returns:
            The figure.
        """
        points = [(point.row, (point.dim,), point.score) for point in self._curves(task)]
        return self._line_plot(points, "score (x 100)", self._title(task), path)

    def plot_retained(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Share of the largest dim's score that each dim keeps, in percent; each model has a largest dim of its own.

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.

        Returns:
            The figure.

        Raises:
            ValueError: If a largest dim's score is below 0, as those of MSEEvaluator are: a share of it says nothing.
        """
        curves = self._curves(task)
        largest: dict[str, int] = {}
        for point in curves:
            largest[point.row] = max(point.dim, largest.get(point.row, 0))
        widest = {(point.row, point.run): point for point in curves if point.dim == largest[point.row]}
        if without := sorted({(point.row, *map(str, point.run)) for point in curves if point[:2] not in widest}):
            told = (f"{row} at {largest[row]} (revision {revision}, seed {seed})" for row, revision, seed in without)
            logger.warning("runs without a score at the largest dim are left out: %s", "; ".join(told))
        if below := sorted({str(name) for (name, _), point in widest.items() if point.score < 0}):
            raise ValueError(
                f"the scores of {self._title(task)} are below 0 at the largest dim ({', '.join(below)}), so a share of "
                "them says nothing; name another task, or use plot_score_by_dim."
            )
        points = [
            # a share of zero is none
            (point.row, (point.dim,), 100 * point.score / (widest[point.row, point.run].score or float("nan")))
            for point in curves
            if point[:2] in widest
        ]
        figure = self._line_plot(points, "share of the largest dim kept (%)", self._title(task), None)
        figure.axes[0].axhline(100, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        return _saved(figure, path)

    def plot_quality_by_bytes(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Score against bytes per vector, one line per model and precision.

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.

        Returns:
            The figure.

        Raises:
            ValueError: If the records do not say their bytes.
        """
        curves = self._curves(task, ("float32", "int8", "binary"))
        if any(point.bytes is None for point in curves):
            raise ValueError("bytes are missing from some records; give each its bytes per vector.")
        several = len({point.row for point in curves}) > 1
        points = [
            # binary codes of several dims may have as many bytes: a point each
            (f"{point.row}, {point.precision}" if several else point.precision, (point.bytes, point.dim), point.score)
            for point in curves
        ]
        return self._line_plot(points, "score (x 100)", self._title(task), path, x="bytes")

    def plot_layer_dim(
        self, path: str | Path | None = None, task: str | None = None, model: str | None = None
    ) -> Figure:
        """Heatmap of the score by layer (rows, deepest on top) and dim (columns).

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.
            model: Which model, if the report holds several: the name that the table has.

        Returns:
            The figure.

        Raises:
            ValueError: If there are no layers, or it has to be said which of several models is meant.
        """
        pyplot = _pyplot()
        cells = {key: cell for key, cell in self._cells().items() if key[1] is not None and key[2] == "float32"}
        if not cells:
            raise ValueError("the report holds no layers; evaluate with layers=[...].")
        models = list(dict.fromkeys(key[0] for key in cells))
        if model is None and len(models) > 1:
            raise ValueError(f"model must be one of {models}, got None.")
        if model is not None and model not in models:
            raise ValueError(f"no scores for model {model!r}; model must be one of {models}.")
        shown = model or models[0]
        cells = _of_task({key: cell for key, cell in cells.items() if key[0] == shown}, task)
        layers, dims = sorted({key[1] for key in cells}, reverse=True), sorted({key[3] for key in cells})
        columns = {key[4:] for key in cells}
        values = np.full((len(layers), len(dims)), np.nan)
        for row, layer in enumerate(layers):
            for column, dim in enumerate(dims):
                scores = [cells.get((shown, layer, "float32", dim, *task_metric)) for task_metric in columns]
                if all(cell is not None for cell in scores):
                    values[row, column] = 100 * np.mean([cell.mean() for cell in scores if cell is not None])
        figure, axes = pyplot.subplots(figsize=(1.6 + 0.75 * len(dims), 1.4 + 0.45 * len(layers)), layout="constrained")
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        finite = values[np.isfinite(values)]
        middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
        for row in range(len(layers)):
            for column in range(len(dims)):
                value = values[row, column]
                colour = "white" if value < middle else "black"
                text = f"{value:.1f}" if value == value else _NOT_A_NUMBER
                axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(len(dims)), [str(dim) for dim in dims])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("dimensions")
        axes.set_ylabel("layer")
        axes.set_title(f"{_short(shown)}: {self._title(task)}", loc="left", fontsize=11)
        bar = figure.colorbar(image, ax=axes, label="score (x 100)", pad=0.02)
        bar.outline.set_visible(False)
        return _saved(figure, path)

    def _line_plot(
        self,
        points: Sequence[tuple[str, tuple[Any, ...], float]],
        y_label: str,
        title: str,
        path: str | Path | None,
        x: str = "dim",
    ) -> Figure:
        """One line per name through the means of its (name, place, y), a band from the lowest to the highest.

        What has one place is one point, drawn at the first number of it.
        """
        pyplot = _pyplot()
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        lines: dict[str, dict[tuple[int, ...], list[float]]] = {}
        for name, place, y in points:
            lines.setdefault(name, {}).setdefault(tuple(map(int, place)), []).append(y)
        shorts = _short_names(lines)
        ends = []
        for number, (name, line) in enumerate(lines.items()):
            places = sorted(line)
            # NumPy's mean of a NaN is NaN: a gap in the line, not a mean over fewer seeds
            means, lows, highs = ([float(f(line[place])) for place in places] for f in (np.mean, np.min, np.max))
            colour = _COLOURS[number % len(_COLOURS)]
            across = [place[0] for place in places]
            axes.plot(
                across,
                means,
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.8,
            )
            if any(high > low for low, high in zip(lows, highs, strict=True)):
                axes.fill_between(across, lows, highs, color=colour, alpha=0.18, linewidth=0)
            drawn = [(place, mean) for place, mean in zip(across, means, strict=True) if mean == mean]
            if drawn:
                ends.append((float(drawn[-1][0]), drawn[-1][1], shorts[name], colour))
        if not ends:
            pyplot.close(figure)
            raise ValueError(f"nothing to draw: {y_label} is not a number at any point.")
        ticks = sorted({place[0] for line in lines.values() for place in line})
        axes.set_xscale("log", base=2)
        if x == "bytes":
            ticks = [2**power for power in range(min(ticks).bit_length() - 1, max(ticks).bit_length() + 1)]
        else:
            ticks = _apart(ticks)
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("dimensions" if x == "dim" else "bytes per vector")
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(axis="y", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.03, y=0.08)
        _label_ends(axes, ends)
        return _saved(figure, path)


def _apart(ticks: list[int]) -> list[int]:
    """Ticks at least a third of a doubling apart, the largest always among them."""
    kept: list[int] = []
    for tick in reversed(ticks):
        if not kept or kept[-1] / tick >= 2 ** (1 / 3):
            kept.append(tick)
    return kept[::-1]


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each line's name right of its end, moved apart so that names do not overlap."""
    low, high = axes.get_ylim()
    gap = 0.055 * (high - low)
    rightmost = max(x for x, _, _, _ in ends)
    # lines that stop early carry their names above their ends, where a leader would cross other lines
    for early in sorted({x for x, _, _, _ in ends if x < rightmost}):
        group = sorted((end for end in ends if end[0] == early), key=lambda end: end[1])
        for place, (x, _, name, colour) in enumerate(group):
            axes.annotate(
                name,
                (x, group[-1][1]),
                (0, 7 + 12 * place),
                textcoords="offset points",
                ha="center",
                va="bottom",
                color=colour,
                fontsize=9.5,
            )
    last = sorted((end for end in ends if end[0] == rightmost), key=lambda end: end[1])
    placed: list[float] = []
    for _, y, _, _ in last:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    # the pile only grew upwards: move it down by half of what it grew
    surplus = placed[-1] - last[-1][1]
    for (x, y, name, colour), at in zip(last, placed, strict=True):
        target = at - surplus / 2
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.02, target),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour,
            fontsize=9.5,
            annotation_clip=False,
            arrowprops=leader if abs(target - y) > gap / 4 else None,
        )


def _short(name: str) -> str:
    """The part of a model's name that readers know it by."""
    return str(name).rsplit("/", 1)[-1]


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Short names where these tell the names apart, full ones where not."""
    names = list(names)
    shorts = [_short(name) for name in names]
    return {name: short if shorts.count(short) == 1 else name for name, short in zip(names, shorts, strict=True)}


def _content(value: Any) -> str:
    """What tells values apart: arrays have no single answer to ==."""
    try:
        return json.dumps(value, default=_jsonable)
    except TypeError:  # keys that JSON has not
        return repr(value)


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _jsonable(value: Any) -> Any:
    """What JSON does not know: NumPy and tensor values as plain ones, anything else as text."""
    return plain(value) if hasattr(value, "tolist") else str(value)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_whole(Path(path), lambda target: target.write_text(text, encoding="utf-8"))
    return text


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    """Write PNG (200 dpi) and SVG, or the one that the path's ending names."""
    if path is None:
        return figure
    path = Path(path)
    if path.suffix in (".png", ".svg"):
        targets = [path]
    else:
        targets = [path.with_name(path.name + ending) for ending in (".png", ".svg")]
    for target in targets:
        write_whole(target, lambda beside: figure.savefig(beside, dpi=200, bbox_inches="tight"))
    _pyplot().close(figure)
    return figure
