"""One object for all scores: a table, Markdown, CSV, JSON, LaTeX and plots."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mipic_st.evaluation import plots
from mipic_st.evaluation.coded import label_of_codes
from mipic_st.files import write_whole
from mipic_st.validation import is_number, is_whole, plain, require

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

COLUMNS = (
    *("model", "revision", "seed", "task", "metric", "primary", "layer", "dim"),
    *("precision", "scoring", "calibration", "bytes", "score"),
)
_REQUIRED = ("model", "task", "metric", "dim", "score")
_DEFAULTS = {"primary": True, "precision": "float32"}
# Scores of one identity that differ by less are one score: below the last digit that tables show.
_SAME_SCORE = 5e-5
NOT_A_NUMBER = "n/a"


@dataclass
class Cell:
    """The main score of one row in one column, for each (revision, seed) that was declared."""

    bytes: int | None
    scores: dict[tuple[Any, Any], float] = field(default_factory=dict)

    def mean(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.scores.values())))


def _or_none(value: Any) -> Any:
    """A plain value; what frames and CSV files write for "none" (NaN, NA) as None."""
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
    record = {key: _or_none(given.get(key, _DEFAULTS.get(key))) for key in COLUMNS}
    for key in ("dim", "layer", "bytes", "seed"):
        value = record[key]
        if isinstance(value, float) and value.is_integer():  # a frame's column with gaps
            value = record[key] = int(value)
        if not (is_whole(value) or (value is None and key != "dim")):
            raise ValueError(f"{key} of a record must be a whole number, got {value!r} in {dict(given)}.")
    if record["score"] is None:  # what JSON has for nan
        record["score"] = float("nan")
    if not is_number(record["score"]):
        raise ValueError(
            f"score of a record must be a number, nan or None for none, got {record['score']!r} in {dict(given)}."
        )
    if not isinstance(record["primary"], bool):
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
    models_of = {row: sorted({run[0] for run, name in names.items() if name == row}) for row in names.values()}
    if same := {row: models for row, models in models_of.items() if len(models) > 1}:
        raise ValueError(f"models share a row of the table, {same}: give them other names.")
    return names


class EvaluationReport:
    """Scores of models by task, metric, dim, layer and precision.

    Tables and plots average declared seeds and nothing else: two revisions under one name become two rows,
    ``name@revision``, and two different scores of one row are an error. A score that is not a number makes every mean
    none either (``n/a`` in text, a gap in plots).

    Args:
        records: One dict per score with ``model``, ``task``, ``metric``, ``dim``, ``score`` and, if they apply,
            ``revision`` (which state of the model), ``seed`` (of the training run), ``layer``, ``precision``,
            ``scoring`` and ``calibration`` of its codes, ``bytes``, ``primary`` (whether it is the task's main metric).
        info: Anything to keep with the scores; written to JSON.

    Raises:
        TypeError: If a record is no dict.
        ValueError: If it lacks a key, has an unknown one, or a value of the wrong kind.

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

    def __repr__(self) -> str:
        models, tasks = (len({record[key] for record in self.records}) for key in ("model", "task"))
        dims = sorted({record["dim"] for record in self.records})
        return f"EvaluationReport(scores: {len(self)}, models: {models}, tasks: {tasks}, dims: {dims})"

    def __str__(self) -> str:
        try:
            return self.to_markdown()
        except ValueError:  # no main scores, or two of one cell
            return repr(self)

    def _repr_html_(self) -> str | None:
        """The table in a notebook; None, which stands for the plain text, where there is none or pandas is missing."""
        try:
            most = require("pandas", "tables need pandas", "eval").get_option("display.max_rows")
            table = self.table()
        except (ImportError, ValueError):
            return None
        shown = table.to_html(float_format="{:.2f}".format, na_rep=NOT_A_NUMBER, max_rows=most)
        return f"<p>{escape(repr(self))}</p>{shown}"

    def __add__(self, other: EvaluationReport) -> EvaluationReport:
        """Both reports' scores in one; where both have an ``info`` of one name, the second's counts."""
        return EvaluationReport(self.records + other.records, {**self.info, **other.info})

    def to_frame(self) -> pd.DataFrame:
        """A pandas frame, one row per score (0 to 1), with the columns in `COLUMNS`."""
        pandas = require("pandas", "tables need pandas", "eval")
        frame = pandas.DataFrame(self.records, columns=list(COLUMNS))
        return frame.astype({"layer": "Int64", "seed": "Int64"})

    def cells(self) -> dict[tuple[Any, ...], Cell]:
        """Main scores by (row's name, layer, precision, dim, task, metric), in the order of the records.

        The precision says what is not usual about its codes: ``int8 (asymmetric)``.
        """
        main = [record for record in self.records if record["primary"]]
        if not main:
            raise ValueError("the report holds no main scores.")
        row_of = _row_names(main)
        cells: dict[tuple[Any, ...], Cell] = {}
        for record in main:
            run, layer, dim = _run(record), record["layer"], record["dim"]
            key = (row_of[run], layer, label_of_codes(record), dim, record["task"], record["metric"])
            cell = cells.setdefault(key, Cell(record["bytes"]))
            score = float(record["score"])
            known = cell.scores.setdefault(run[1:], score)
            if not (math.isclose(known, score, rel_tol=0, abs_tol=_SAME_SCORE) or (known != known and score != score)):
                raise ValueError(
                    f"two scores, {known:.4f} and {score:.4f}, for model {record['model']!r}, revision "
                    f"{record['revision']!r}, seed {record['seed']!r}, task {record['task']!r}, dim {dim}"
                    f"{'' if layer is None else f', layer {layer}'}: only runs of different seeds are averaged. Give "
                    "models different names, runs their seed, or evaluators different names."
                )
        runs_of: dict[str, set[Any]] = {}
        for (row, *_), cell in cells.items():
            runs_of.setdefault(row, set()).update(cell.scores)
        if fewer := {f"{key[0]}, {key[4]}" for key, cell in cells.items() if set(cell.scores) != runs_of[key[0]]}:
            logger.warning("means over fewer seeds than the model has elsewhere: %s", "; ".join(sorted(fewer)))
        return cells

    def table(self, average: bool = True) -> pd.DataFrame:
        """Main metrics x 100: one row per (model, layer, precision, dim), one column per task; seeds are averaged.

        Args:
            average: Add the mean over tasks as the last column, if there are several tasks.

        Returns:
            The wide frame; a precision or layer that all rows share is left out of its index.

        Raises:
            ValueError: If the report holds no main scores, or two different ones of one model, revision and seed.
        """
        pandas = require("pandas", "tables need pandas", "eval")
        keys, columns, rows, values, _ = self._wide(average)
        return pandas.DataFrame(values, index=pandas.MultiIndex.from_tuples(rows, names=keys), columns=columns)

    def _wide(self, average: bool = True) -> tuple[list[str], list[str], list[tuple[Any, ...]], np.ndarray, np.ndarray]:
        """The table's parts: names of its keys, its columns and rows, values x 100, and where there is a score."""
        cells = self.cells()
        tasks = list(dict.fromkeys(key[4:] for key in cells))
        rows = {key[:4]: cell.bytes for key, cell in cells.items()}
        values = np.full((len(rows), len(tasks)), np.nan)
        there = np.zeros(values.shape, dtype=bool)
        row_number, column_number = ({key: i for i, key in enumerate(keys)} for keys in (rows, tasks))
        for key, cell in cells.items():
            place = row_number[key[:4]], column_number[key[4:]]
            values[place], there[place] = 100 * cell.mean(), True
        repeated = [task for task, _ in tasks]
        columns = [str(task) if repeated.count(task) == 1 else f"{task} {metric}" for task, metric in tasks]
        if average and len(columns) > 1:
            # a mean over fewer tasks would not compare, so a gap stays a gap
            values = np.column_stack([values, values.mean(axis=1)])
            there = np.column_stack([there, there.all(axis=1)])
            columns.append("mean" if "mean" not in columns else "mean of tasks")
        layers, precisions = any(row[1] is not None for row in rows), len({row[2] for row in rows}) > 1
        shown = {"model": True, "layer": layers, "precision": precisions, "dim": True, "bytes": precisions}
        index = [
            tuple("" if part is None else part for part, show in zip((*row, size), shown.values(), strict=True) if show)
            for row, size in rows.items()
        ]
        return [name for name in shown if shown[name]], columns, index, values, there

    def to_markdown(self, path: str | Path | None = None) -> str:
        """The table as Markdown; with several models the highest per column and dim is bold.

        ``n/a`` is a score that is not a number, an empty cell one that is not there; ``path`` is a file to write to.
        """
        keys, columns, index, values, there = self._wide()
        shown = np.round(values, 2)
        best: dict[tuple[Any, ...], float] = {}
        for (_, *rest), row in zip(index, shown, strict=True):
            for column, value in enumerate(row):
                best[column, *rest] = np.fmax(value, best.get((column, *rest), np.nan))
        several = len({row[0] for row in index}) > 1
        lines = [[*keys, *columns]]
        for number, (model, *rest) in enumerate(index):
            cells = []
            for column, value in enumerate(shown[number]):
                mark = "**" if several and value == best[column, *rest] else ""
                gap = NOT_A_NUMBER if there[number, column] else ""
                cells.append(gap if value != value else f"{mark}{value:.2f}{mark}")
            lines.append([str(model), *map(str, rest), *cells])
        lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
        widths = [max(4, *map(len, column)) for column in zip(*lines, strict=True)]
        rules = ["-" * width if i < len(keys) else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        sides = [str.ljust if i < len(keys) else str.rjust for i in range(len(widths))]
        padded = [[side(cell, width) for side, cell, width in zip(sides, line, widths, strict=True)] for line in lines]
        padded.insert(1, rules)
        return _written("".join(f"| {' | '.join(line)} |\n" for line in padded), path)

    def to_latex(self, path: str | Path | None = None) -> str:
        """The table as a LaTeX ``tabular`` with booktabs rules, as pandas writes it; ``path`` is a file to write to."""
        return _written(self.table().to_latex(float_format="%.2f", na_rep=NOT_A_NUMBER, escape=True), path)

    def to_csv(self, path: str | Path | None = None) -> str:
        """All scores, one per line, full precision; ``path`` is a file to write to."""
        return _written(self.to_frame().to_csv(index=False), path)

    def to_json(self, path: str | Path | None = None) -> str:
        """All scores and ``info``, for `from_json`; ``path`` is a file to write to. NaN becomes null."""
        records = [{**record, "score": _or_none(record["score"])} for record in self.records]
        text = json.dumps(
            {"info": self.info, "records": records},
            indent=1,
            default=lambda value: plain(value) if hasattr(value, "tolist") else str(value),
        )
        return _written(text + "\n", path)

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationReport:
        """The report that `to_json` wrote; ValueError for a file that holds something else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(content["records"], content["info"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(
                f"{path} is no report, that is, JSON with info and records as to_json writes it: {error!r}."
            ) from error

    plot_score_by_dim = plots.score_by_dim
    """Draw :func:`mipic_st.evaluation.plots.score_by_dim` of this report."""
    plot_retained = plots.retained
    """Draw :func:`mipic_st.evaluation.plots.retained` of this report."""
    plot_quality_by_bytes = plots.quality_by_bytes
    """Draw :func:`mipic_st.evaluation.plots.quality_by_bytes` of this report."""
    plot_layer_dim = plots.layer_dim
    """Draw :func:`mipic_st.evaluation.plots.layer_dim` of this report."""


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        write_whole(path, methodcaller("write_text", text, encoding="utf-8"))
    return text
