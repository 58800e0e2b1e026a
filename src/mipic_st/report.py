"""One object for all scores: a table, Markdown, CSV, JSON, LaTeX and four plots."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipic_st._checks import plain

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EvaluationReport"]

COLUMNS = ("model", "seed", "task", "metric", "primary", "layer", "dim", "precision", "bytes", "score")
_REQUIRED = ("model", "task", "metric", "dim", "score")
_DEFAULTS = {"seed": None, "primary": True, "layer": None, "precision": "float32", "bytes": None}
# Okabe and Ito's colours: told apart by readers with colour blindness and in grey
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def _pandas() -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError('tables need pandas: pip install "mipic-st[eval]"') from error
    return pandas


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "mipic-st[plot]"') from error
    return matplotlib.pyplot


class EvaluationReport:
    """Scores of models by task, metric, dim, layer and precision.

    Args:
        records: One dict per score with ``model``, ``task``, ``metric``, ``dim``, ``score`` and, if they apply,
            ``seed``, ``layer``, ``precision``, ``bytes``, ``primary`` (whether it is the task's main metric).
        info: Anything to keep with the scores (peak memory, revision); written to JSON.

    Raises:
        ValueError: If a record lacks a key or has an unknown one.

    Example:
        >>> report = EvaluationReport([{"model": "m", "task": "sts", "metric": "spearman", "dim": 8, "score": 0.5}])
        >>> len(report)
        1
    """

    def __init__(self, records: Iterable[dict[str, Any]], info: dict[str, Any] | None = None) -> None:
        self.records: list[dict[str, Any]] = []
        self.info = dict(info or {})
        for record in records:
            missing = [key for key in _REQUIRED if key not in record]
            unknown = sorted(set(record) - set(COLUMNS))
            if missing or unknown:
                raise ValueError(f"a record lacks {missing} or has unknown keys {unknown}; keys are {list(COLUMNS)}.")
            self.records.append({key: record.get(key, _DEFAULTS.get(key)) for key in COLUMNS})

    def __len__(self) -> int:
        return len(self.records)

    def __add__(self, other: EvaluationReport) -> EvaluationReport:
        """Both reports' scores in one."""
        return EvaluationReport(self.records + other.records, {**self.info, **other.info})

    def frame(self, primary_only: bool = False) -> pd.DataFrame:
        """A pandas frame, one row per score.

        Args:
            primary_only: Leave out all but each task's main metric.

        Returns:
            Columns model, seed, task, metric, primary, layer, dim, precision, bytes, score (0 to 1).
        """
        pandas = _pandas()
        frame = pandas.DataFrame(self.records, columns=list(COLUMNS))
        frame["layer"] = frame["layer"].astype("Int64")
        frame["seed"] = frame["seed"].astype("Int64")
        return frame[frame["primary"]] if primary_only else frame

    def table(self, average: bool = True) -> pd.DataFrame:
        """Main metrics x 100: one row per (model, layer, precision, dim), one column per task; seeds are averaged.

        Args:
            average: Add the mean over tasks as the last column, if there are several tasks.

        Returns:
            The wide frame; what all rows share (one precision, no layers) is left out of its index.
        """
        frame = self.frame(primary_only=True).copy()
        if frame.empty:
            raise ValueError("the report holds no main scores.")
        frame["score"] *= 100
        frame["layer"] = frame["layer"].astype(object).where(frame["layer"].notna(), "")
        keys = ["model", *(["layer"] if (frame["layer"] != "").any() else [])]
        keys += ["precision"] if frame["precision"].nunique() > 1 else []
        keys += ["dim"]
        if frame["precision"].nunique() > 1:
            keys += ["bytes"]
        wide = frame.pivot_table(index=keys, columns="task", values="score", aggfunc="mean", sort=False)
        if average and wide.shape[1] > 1:
            # a mean over fewer tasks would not compare, so a gap stays a gap
            wide["mean"] = wide.mean(axis=1, skipna=False)
        wide.columns.name = None
        return wide

    def _marked(self, mark_best: bool, bold: str) -> pd.DataFrame:
        """The table as text; with several models the best one per task and dim is marked."""
        wide = self.table()
        models = wide.index.get_level_values("model")
        text = wide.map(lambda value: "" if value != value else f"{value:.2f}")
        if mark_best and models.nunique() > 1:
            others = [name for name in wide.index.names if name != "model"]
            best = wide.round(2).groupby(level=others).transform("max")
            text = text.where(~(wide.round(2) == best), text.map(lambda value: bold % value if value else value))
        return text.reset_index()

    def to_markdown(self, path: str | Path | None = None, *, mark_best: bool = True) -> str:
        """The table as Markdown; with several models the best per column and dim is bold.

        Args:
            path: File to write to, if any.
            mark_best: Mark the best.

        Returns:
            The table as text.
        """
        frame = self._marked(mark_best, "**%s**")
        rows = [[str(name) for name in frame.columns], *([str(cell) for cell in row] for row in frame.to_numpy())]
        keys = sum(1 for name in frame.columns if name in ("model", "layer", "precision", "dim", "bytes"))
        widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
        rule = ["-" * width if i < keys else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
        lines = [
            "| "
            + " | ".join(
                cell.replace("|", "\\|").ljust(width) if i < keys else cell.rjust(width)
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
        """All scores and ``info``; `from_json` reads them back. NaN becomes null, NumPy values plain ones."""
        records = [{**record, "score": _none_if_nan(record["score"])} for record in self.records]
        return _written(json.dumps({"info": self.info, "records": records}, indent=1, default=_jsonable) + "\n", path)

    @classmethod
    def from_json(cls, path: str | Path) -> EvaluationReport:
        """Read what `to_json` wrote.

        Args:
            path: The file.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it holds something else; the message names it.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            records = [
                {**record, "score": float("nan") if record["score"] is None else record["score"]}
                for record in content["records"]
            ]
            return cls(records, content["info"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is no report, that is, JSON with info and records as to_json writes it: {error!r}."
            ) from error

    def to_latex(self, path: str | Path | None = None, *, mark_best: bool = True) -> str:
        """The table as a LaTeX ``tabular`` with booktabs rules.

        Args:
            path: File to write to, if any.
            mark_best: With several models, set the best per column and dim in bold.

        Returns:
            The LaTeX text.
        """
        frame = self._marked(mark_best, "\\textbf{%s}")
        escaped = {character: "\\" + character for character in "_&%#${}"}
        escaped |= {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}

        def clean(value: Any) -> str:
            return "".join(escaped.get(character, character) for character in str(value))

        keys = sum(1 for name in frame.columns if name in ("model", "layer", "precision", "dim", "bytes"))
        lines = [
            "\\begin{tabular}{" + "l" * keys + "r" * (len(frame.columns) - keys) + "}",
            "\\toprule",
            " & ".join(clean(name) for name in frame.columns) + " \\\\",
            "\\midrule",
            *(" & ".join([*map(clean, row[:keys]), *row[keys:]]) + " \\\\" for row in frame.to_numpy()),
            "\\bottomrule",
            "\\end{tabular}",
        ]
        return _written("\n".join(lines) + "\n", path)

    # Plots ----------------------------------------------------------------------------------------------------------

    def _curves(self, task: str | None, precisions: Sequence[str] = ("float32",)) -> pd.DataFrame:
        """Score x 100 per (model, seed, precision, dim), averaged over tasks or of one task, deepest layer."""
        frame = self.frame(primary_only=True)
        frame = frame[frame["precision"].isin(precisions)]
        if frame["layer"].notna().any():
            deepest = frame.groupby("model")["layer"].transform("max")
            frame = frame[frame["layer"].isna() | (frame["layer"] == deepest)]
        if task is not None:
            tasks = sorted(frame["task"].unique())
            frame = frame[frame["task"] == task]
            if frame.empty:
                raise ValueError(f"task {task!r} is not in the report, which has {tasks}.")
        keys = ["model", "seed", "precision", "dim", "bytes"]
        curves = frame.groupby(keys, dropna=False, sort=False)["score"].mean().mul(100).reset_index()
        if curves.empty:
            raise ValueError(f"the report holds no scores at precisions {list(precisions)}.")
        return curves

    def _title(self, task: str | None) -> str:
        tasks = sorted({record["task"] for record in self.records if record["primary"]})
        if task is not None or len(tasks) == 1:
            return task or str(tasks[0])
        return f"mean of {len(tasks)} tasks"

    def plot_score_by_dim(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Score against dim, one line per model, a band from the lowest to the highest seed.

        Args:
            path: File without ending (PNG and SVG are written), or with ``.png`` or ``.svg``; None writes nothing.
            task: One task; None draws the mean over tasks.

        Returns:
            The figure.
        """
        return self._line_plot(self._curves(task), "score (x 100)", self._title(task), path)

    def plot_retained(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Share of the largest dim's score that each dim keeps, in percent.

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.

        Returns:
            The figure.
        """
        curves = self._curves(task)
        widest = curves.loc[curves.groupby(["model", "seed"], dropna=False)["dim"].idxmax()]
        curves = curves.merge(widest[["model", "seed", "score"]], on=["model", "seed"], suffixes=("", "_full"))
        curves["score"] = 100 * curves["score"] / curves["score_full"]
        figure = self._line_plot(curves, "share of full width kept (%)", self._title(task), None)
        figure.axes[0].axhline(100, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        return _saved(figure, path)

    def plot_quality_by_bytes(self, path: str | Path | None = None, task: str | None = None) -> Figure:
        """Score against bytes per vector, one line per model and precision.

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.

        Returns:
            The figure.
        """
        curves = self._curves(task, ("float32", "int8", "binary"))
        several = curves["model"].nunique() > 1
        curves["model"] = curves["model"].map(_short) + ", " + curves["precision"] if several else curves["precision"]
        return self._line_plot(curves, "score (x 100)", self._title(task), path, x="bytes")

    def plot_layer_dim(
        self, path: str | Path | None = None, task: str | None = None, model: str | None = None
    ) -> Figure:
        """Heatmap of the score by layer (rows, deepest on top) and dim (columns).

        Args:
            path: See `plot_score_by_dim`.
            task: One task; None takes the mean over tasks.
            model: Which model, if the report holds several.

        Returns:
            The figure.
        """
        pyplot = _pyplot()
        frame = self.frame(primary_only=True)
        frame = frame[frame["layer"].notna() & (frame["precision"] == "float32")]
        if frame.empty:
            raise ValueError("the report holds no layers; evaluate with layers=[...].")
        models = list(frame["model"].unique())
        if model is None and len(models) > 1:
            raise ValueError(f"model must be one of {models}, got None.")
        frame = frame[frame["model"] == (model or models[0])]
        if task is not None:
            frame = frame[frame["task"] == task]
        if frame.empty:
            raise ValueError(f"no scores for model {model!r}, task {task!r}.")
        grid = frame.pivot_table(index="layer", columns="dim", values="score", aggfunc="mean").mul(100)
        grid = grid.sort_index(ascending=False)
        values = grid.to_numpy(dtype=float)
        figure, axes = pyplot.subplots(
            figsize=(1.6 + 0.75 * grid.shape[1], 1.4 + 0.45 * grid.shape[0]), layout="constrained"
        )
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        middle = (values.min() + values.max()) / 2
        for row in range(grid.shape[0]):
            for column in range(grid.shape[1]):
                value = values[row, column]
                colour = "white" if value < middle else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour, fontsize=9)
        axes.set_xticks(range(grid.shape[1]), [str(dim) for dim in grid.columns])
        axes.set_yticks(range(grid.shape[0]), [str(layer) for layer in grid.index])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel("dimensions")
        axes.set_ylabel("layer")
        axes.set_title(f"{_short(model or models[0])}: {self._title(task)}", loc="left", fontsize=11)
        bar = figure.colorbar(image, ax=axes, label="score (x 100)", pad=0.02)
        bar.outline.set_visible(False)
        return _saved(figure, path)

    def _line_plot(
        self, curves: pd.DataFrame, y_label: str, title: str, path: str | Path | None, x: str = "dim"
    ) -> Figure:
        pyplot = _pyplot()
        figure, axes = pyplot.subplots(figsize=(7.2, 4.2), layout="constrained")
        names = list(dict.fromkeys(curves["model"]))
        ends = []
        for number, name in enumerate(names):
            rows = curves[curves["model"] == name].groupby(x)["score"].agg(["mean", "min", "max"]).sort_index()
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(
                rows.index,
                rows["mean"],
                color=colour,
                marker=_MARKERS[number % len(_MARKERS)],
                markersize=5,
                linewidth=1.8,
            )
            if (rows["max"] > rows["min"]).any():
                axes.fill_between(rows.index, rows["min"], rows["max"], color=colour, alpha=0.18, linewidth=0)
            ends.append((float(rows.index[-1]), float(rows["mean"].iloc[-1]), _short(name), colour))
        ticks = sorted({int(value) for value in curves[x]})
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


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _jsonable(value: Any) -> Any:
    """What JSON does not know: NumPy and tensor values as plain ones, anything else as text."""
    return plain(value) if hasattr(value, "tolist") else str(value)


def _written(text: str, path: str | Path | None) -> str:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    return text


def _saved(figure: Figure, path: str | Path | None) -> Figure:
    """Write PNG (200 dpi) and SVG, or the one that the path's ending names."""
    if path is None:
        return figure
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".svg"):
        targets = [path]
    else:
        targets = [path.with_name(path.name + ending) for ending in (".png", ".svg")]
    for target in targets:
        figure.savefig(target, dpi=200, bbox_inches="tight")
    _pyplot().close(figure)
    return figure
