"""Invariants of the report: nothing lost on the way out, best marked, pictures written."""

import io
import logging
import multiprocessing
import os
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, NanoBEIREvaluator

from conftest import sentences
from evaluation_fixtures import tiny_model
from mipic_st.evaluation.matryoshka import MatryoshkaEvaluator
from mipic_st.evaluation.report import EvaluationReport

DIMS = (8, 64, 384)


@pytest.fixture(autouse=True)
def figures_closed():
    yield
    plt.close("all")


def rows(model="a", offset=0.0, seed=None, layer=None, **extra):
    return [
        {
            "model": model,
            "task": task,
            "metric": "s",
            "dim": dim,
            "score": 0.5 + dim / 1000 + offset,
            "seed": seed,
            "layer": layer,
            **extra,
        }
        for task in ("T_1", "T2")
        for dim in DIMS
    ]


def test_json_and_csv_keep_all_scores(tmp_path):
    """JSON reads back to the same records, NaN included; CSV holds full precision."""
    report = EvaluationReport(
        [*rows(offset=1 / 3), {"model": "a", "task": "x", "metric": "s", "dim": 8, "score": float("nan")}]
    )
    report.to_json(tmp_path / "r.json")
    back = EvaluationReport.from_json(tmp_path / "r.json")
    pd.testing.assert_frame_equal(back.to_frame(), report.to_frame())
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert pd.read_csv(io.StringIO(report.to_csv()))["score"][0] == report.records[0]["score"]


def test_json_keeps_numpy_values_as_numbers(tmp_path):
    """Dims, scores and info out of arrays come back as what they are, not as text."""
    row = {"model": "a", "task": "t", "metric": "s", "dim": np.int64(8), "seed": np.int32(3), "score": np.float32(0.5)}
    report = EvaluationReport([row], {"peak": np.int64(7), "curve": np.array([1.5, 2.0]), "path": tmp_path})
    report.to_json(tmp_path / "r.json")
    back = EvaluationReport.from_json(tmp_path / "r.json")
    assert (back.records[0]["dim"], back.records[0]["seed"], back.records[0]["score"]) == (8, 3, 0.5)
    assert back.info == {"peak": 7, "curve": [1.5, 2.0], "path": str(tmp_path)}
    pd.testing.assert_frame_equal(back.to_frame(), report.to_frame(), check_dtype=False)


@pytest.mark.parametrize(
    "content",
    ["[]", "[1, 2]", "[" * 100_000, "{}", '{"records": [3], "info": {}}', '{"records": [{}], "info": {}}', "x", "null"],
)
def test_other_json_is_refused(tmp_path, content):
    """Whatever else is in the file, the error names it."""
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"r\.json is no report"):
        EvaluationReport.from_json(tmp_path / "r.json")


def test_best_model_per_column_and_dim_is_marked():
    """With two models exactly the better one's cells are bold; with one model none."""
    both = (EvaluationReport(rows("a")) + EvaluationReport(rows("b", 0.01))).to_markdown()
    for line in both.splitlines()[2:]:
        assert line.count("**") == (6 if line.startswith("| b") else 0)
    assert "**" not in EvaluationReport(rows("a")).to_markdown()


def test_latex_is_what_pandas_writes(tmp_path):
    """Names with characters that mean something to TeX are escaped, rules come from booktabs."""
    text = EvaluationReport(rows("a_b&c%d")).to_latex(tmp_path / "r.tex")
    assert text == (tmp_path / "r.tex").read_text()
    assert "T\\_1 & T2 & mean" in text
    assert "a\\_b\\&c\\%d" in text
    assert "\\toprule" in text


def test_seeds_are_averaged_in_the_table():
    """Two seeds give one row: their mean."""
    table = EvaluationReport([*rows(seed=1), *rows(offset=0.1, seed=2)]).table()
    assert len(table) == len(DIMS)
    assert table["T2"].iloc[0] == pytest.approx(100 * (0.508 + 0.05))


def test_unknown_keys_are_named():
    """A record with a misspelt key raises."""
    with pytest.raises(ValueError, match="unknown keys \\['dimm'\\]"):
        EvaluationReport([{"model": "a", "task": "t", "metric": "s", "dim": 8, "score": 1.0, "dimm": 8}])


@pytest.mark.parametrize("plot", ["plot_score_by_dim", "plot_retained", "plot_quality_by_bytes", "plot_layer_dim"])
def test_plots_are_written_as_png_and_svg(tmp_path, plot):
    """Each plot gives both files; the dim axis is logarithmic and its ticks are the dims."""
    report = EvaluationReport([*rows(layer=1, bytes=8, offset=-0.1), *rows(layer=2, bytes=16)])
    figure = getattr(report, plot)(tmp_path / "p")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert (tmp_path / "p.svg").read_text().lstrip().startswith("<?xml")
    if plot == "plot_score_by_dim":
        assert figure.axes[0].get_xscale() == "log"
        assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["8", "64", "384"]


def test_retained_share_is_relative_to_the_widest():
    """By hand: the drawn line is 100 x score / score at the largest dim."""
    line = EvaluationReport(rows()).plot_retained().axes[0].lines[0]
    assert line.get_ydata() == pytest.approx([100 * (0.5 + dim / 1000) / 0.884 for dim in DIMS])


def test_retained_share_leaves_out_a_seed_without_the_largest_dim(caplog):
    """It has no share of it; 100 % of its own largest dim would be one of another vector."""
    whole = [one(score, dim=dim, seed=1) for dim, score in ((8, 0.4), (384, 0.8))]
    report = EvaluationReport([*whole, one(0.4, dim=8, seed=2)])
    axes = report.plot_retained().axes[0]
    assert axes.lines[0].get_ydata() == pytest.approx([50, 100])
    assert axes.get_ylabel() == "share of the largest dim kept (%)"
    assert "runs without a score at the largest dim are left out: m at 384 (revision None, seed 2)" in caplog.text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dim", "8"), ("dim", None), ("dim", 8.5), ("layer", "x"), ("seed", "a"), ("bytes", True), ("primary", "no")),
        *(("score", "high"), ("score", True)),
    ],
)
def test_records_of_other_kinds_are_refused(key, value):
    """A dim that is text would be sorted as text, "False" be a main score, and no score a zero somewhere."""
    with pytest.raises(ValueError, match=f"{key} of a record must be .*got {value!r}"):
        EvaluationReport([one(0.5) | {key: value}])
    with pytest.raises(TypeError, match="records must be dicts, got 3"):
        EvaluationReport([3])


def test_a_frame_comes_back_as_records():
    """Columns with gaps hold floats and NaN."""
    records = [one(0.5, layer=None), one(0.6, dim=16, layer=2, seed=1)]
    assert np.isnan(EvaluationReport([one(None)]).records[0]["score"]), "null in JSON"
    frame = pd.DataFrame(EvaluationReport(records).records)
    again = EvaluationReport(frame.to_dict("records"))
    assert again.records == EvaluationReport(records).records


@pytest.mark.parametrize("plot", ["plot_score_by_dim", "plot_retained", "plot_quality_by_bytes", "plot_layer_dim"])
def test_plots_of_one_task_and_one_model(plot):
    """Each draws what the report of that task, or that model, alone would show; others are named."""
    cells = [
        (task, dim, layer) for task in "tu" for dim in (8, 16) for layer in ((1, 2) if "layer" in plot else (None,))
    ]
    every = [
        one((index + 3 * number + 1) / 40, f"m{number}", dim=dim, task=task, layer=layer, bytes=4 * dim)
        for number in range(2)
        for index, (task, dim, layer) in enumerate(cells)
    ]
    chosen = {"model": "m1"} if "layer" in plot else {}
    alone = [record for record in every if record["task"] == "u" and record["model"] in chosen.get("model", "m0 m1")]

    def drawn(records, **which):
        axes = getattr(EvaluationReport(records), plot)(**which).axes[0]
        return [list(line.get_ydata()) for line in axes.lines], [text.get_text() for text in axes.texts]

    assert drawn(every, task="u", **chosen) == drawn(alone)
    with pytest.raises(ValueError, match="task 'v' is not in the report, which has"):
        drawn(every, task="v", **chosen)
    if chosen:
        with pytest.raises(ValueError, match=r"model must be one of \['m0', 'm1'\], got None"):
            drawn(every)
        with pytest.raises(ValueError, match="got 'm2'"):
            drawn(every, model="m2")


def test_codes_are_drawn_over_bytes_only():
    """A line over dims is float32's alone; over bytes each code has its own, asymmetric ones apart."""
    codes = [("float32", None, 0.5), ("int8", "symmetric", 0.3), ("int8", "asymmetric", 0.4)]
    records = [
        one(score + dim / 1000, dim=dim, precision=precision, scoring=scoring, bytes=dim * (4 if score == 0.5 else 1))
        for precision, scoring, score in codes
        for dim in (8, 16)
    ]
    report = EvaluationReport(records)
    assert report.plot_score_by_dim().axes[0].lines[0].get_ydata() == pytest.approx([50.8, 51.6])
    lines = report.plot_quality_by_bytes().axes[0].lines
    assert [line.get_label() for line in lines] == ["float32", "int8", "int8 (asymmetric)"]
    assert lines[2].get_ydata() == pytest.approx([40.8, 41.6])
    with pytest.raises(ValueError, match="the report holds no float32 scores"):
        EvaluationReport(records[2:]).plot_score_by_dim()


def test_models_that_would_share_a_row_are_refused():
    """A model's name that looks like another one's revision: their mean would be of two models."""
    records = [one(0.2, revision="a"), one(0.4, revision="b"), one(0.9, "m@a")]
    with pytest.raises(ValueError, match=r"models share a row of the table, \{'m@a': \['m', 'm@a'\]\}"):
        EvaluationReport(records).table()


def test_a_share_of_a_score_below_zero_is_refused():
    """The scores of MSEEvaluator are: half of the error would be drawn as a share of 50 %."""
    report = EvaluationReport(rows(offset=-1.0))
    with pytest.raises(ValueError, match=r"below 0 at the largest dim \(a\).*plot_score_by_dim"):
        report.plot_retained()


def test_dims_of_as_many_bytes_are_points_of_their_own():
    """Binary codes of 4 and 8 dims are both a byte: no mean over dims, and no band of seeds that were not."""
    records = [one(score, dim=dim, precision="binary", bytes=1) for dim, score in ((4, 0.1), (8, 0.7))]
    axes = EvaluationReport(records).plot_quality_by_bytes().axes[0]
    assert list(axes.lines[0].get_xdata()) == [1, 1]
    assert axes.lines[0].get_ydata() == pytest.approx([10, 70])
    assert not axes.collections


def test_info_of_two_reports_is_kept():
    """Of one name the second's; neither report changes."""
    one_of, other = (EvaluationReport([], {"revision": name, name: np.arange(3)}) for name in "ab")
    both = one_of + other
    assert both.info["revision"] == "b"
    assert set(both.info) == {"revision", "a", "b"}
    assert one_of.info["revision"] == "a"
    assert '"b": [' in both.to_json()


def legend(axes):
    """What the legend says."""
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_a_report_of_layers_only_says_which_is_drawn():
    """The deepest evaluated layer is not the model; the final vector is, where there is one."""
    grid = [*rows(layer=1, offset=-0.1), *rows(layer=3)]
    axes = EvaluationReport(grid).plot_score_by_dim().axes[0]
    assert legend(axes) == ["a (layer 3)"]
    assert axes.lines[0].get_ydata() == pytest.approx([100 * (0.5 + dim / 1000) for dim in DIMS])
    assert legend(EvaluationReport([*grid, *rows(offset=0.1)]).plot_score_by_dim().axes[0]) == ["a"]


# --- what a row is ----------------------------------------------------------------------------------------------------


def one(score, model="m", dim=8, task="t", **extra):
    """A record."""
    return {"model": model, "task": task, "metric": "s", "dim": dim, "score": score, **extra}


def cells_of(report):
    """{first cell: the other cells} of the Markdown table's body."""
    lines = report.to_markdown().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_revisions_of_one_name_are_rows_of_their_own():
    """Before and after training under one name: two rows and two lines, each with its own score, never their mean."""
    before, after = (EvaluationReport([one(s, revision=r)]) for s, r in ((0.2, "a" * 16), (0.8, "b" * 16)))
    rows = cells_of(before + after)
    assert rows == {"m@aaaaaaaa": ["8", "20.00"], "m@bbbbbbbb": ["8", "**80.00**"]}
    assert list((before + after).table().index.get_level_values("model")) == list(rows)
    lines = (before + after).plot_score_by_dim().axes[0].lines
    assert [float(line.get_ydata()[0]) for line in lines] == pytest.approx([20, 80])
    assert cells_of(before) == {"m": ["8", "20.00"]}


def test_revisions_that_begin_alike_are_told_apart():
    """The short form is used only where it is unique."""
    report = EvaluationReport([one(0.1, revision="a" * 16), one(0.2, revision="a" * 15 + "b")])
    assert set(cells_of(report)) == {"m@" + "a" * 16, "m@" + "a" * 15 + "b"}


def test_declared_seeds_are_averaged_over_their_revisions():
    """Each seed trains another state: declared seeds give one row, their mean, next to the undeclared base model."""
    seeds = [one(s, revision=f"r{i}", seed=i) for i, s in enumerate((0.1, 0.3))]
    assert cells_of(EvaluationReport(seeds)) == {"m": ["8", "20.00"]}
    rows = cells_of(EvaluationReport([one(0.9, revision="base"), *seeds]))
    assert rows == {"m@base": ["8", "**90.00**"], "m (seeds 0, 1)": ["8", "20.00"]}


def test_a_seed_of_two_revisions_is_not_averaged():
    """Seeds before and after training: nothing says which belong together, so every state has its row."""
    states = [one(s, revision=r, seed=i) for s, r, i in ((0.1, "a", 0), (0.2, "b", 0), (0.3, "c", 1), (0.4, "d", 1))]
    assert [row[1].strip("*") for row in cells_of(EvaluationReport(states)).values()] == [
        "10.00",
        "20.00",
        "30.00",
        "40.00",
    ]


@pytest.mark.parametrize("use", ["table", "to_markdown", "to_latex", "plot_score_by_dim", "plot_layer_dim"])
def test_two_scores_of_one_identity_are_refused(use):
    """Neither is the row's score, nor is their mean; equal ones are one."""
    first, other = (one(score, layer=1) for score in (0.2, 0.8))
    with pytest.raises(ValueError, match=r"two scores, 0\.2000 and 0\.8000, for model 'm'"):
        getattr(EvaluationReport([first, other]), use)()
    getattr(EvaluationReport([first, first]), use)()


def test_json_and_frame_keep_the_revision(tmp_path):
    """Identity survives the file; a file of before has none, and records may come out of a frame."""
    report = EvaluationReport([one(0.2, revision="x"), one(0.4, revision="y")])
    report.to_json(tmp_path / "r.json")
    assert EvaluationReport.from_json(tmp_path / "r.json").records == report.records
    assert list(report.to_frame()["revision"]) == ["x", "y"]
    old = '{"info": {}, "records": [{"model": "m", "task": "t", "metric": "s", "dim": 8, "score": 0.5}]}'
    (tmp_path / "old.json").write_text(old)
    assert EvaluationReport.from_json(tmp_path / "old.json").records[0]["revision"] is None
    again = EvaluationReport(EvaluationReport([one(0.5)]).to_frame().to_dict("records"))
    assert cells_of(again) == {"m": ["8", "50.00"]}


def test_models_of_one_short_name_are_told_apart_in_plots():
    """org-a/m and org-b/m are drawn under their full names."""
    figure = EvaluationReport([one(0.2, "org-a/m"), one(0.4, "org-b/m")]).plot_score_by_dim()
    assert legend(figure.axes[0]) == ["org-a/m", "org-b/m"]
    figure = EvaluationReport([one(0.2, "org-a/m"), one(0.4, "org-b/n")]).plot_score_by_dim()
    assert legend(figure.axes[0]) == ["m", "n"]


# --- scores that are no numbers, or not there -------------------------------------------------------------------------


def test_a_seed_that_is_not_a_number_spoils_the_mean():
    """0.5 and NaN is not 50.00, in no table and no plot."""
    report = EvaluationReport([one(0.5, seed=0), one(float("nan"), seed=1), one(0.4, seed=0, dim=16)])
    report += EvaluationReport([one(0.6, seed=1, dim=16)])
    assert report.to_markdown().splitlines()[2].split("|")[3].strip() == "n/a"
    assert "n/a" in report.to_latex()
    assert np.isnan(report.table()["t"].iloc[0])
    line = report.plot_score_by_dim().axes[0].lines[0]
    assert np.isnan(line.get_ydata()[0])
    assert line.get_ydata()[1] == pytest.approx(50)


def test_a_dim_without_any_number_stays_visible(caplog):
    """Row, tick and warning."""
    report = EvaluationReport([one(float("nan")), one(0.5, dim=64)])
    assert [row.split("|")[2].strip() for row in report.to_markdown().splitlines()[2:]] == ["8", "64"]
    with caplog.at_level(logging.WARNING):
        axes = report.plot_score_by_dim().axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["8", "64"]
    assert "m at 8 (not a number)" in caplog.text


def test_a_task_of_no_numbers_keeps_its_column():
    """All NaN: the column is there, and so is the mean, which is none."""
    report = EvaluationReport([one(float("nan")), one(0.5, task="u")])
    assert list(report.table().columns) == ["t", "u", "mean"]
    assert cells_of(report) == {"m": ["8", "n/a", "50.00", "n/a"]}


def test_a_missing_task_is_a_gap_in_plots_too(caplog):
    """A mean over fewer tasks is not drawn next to one over all; the table has an empty cell."""
    report = EvaluationReport([one(0.2, "a"), one(0.4, "a", task="u"), one(0.9, "b")])
    with caplog.at_level(logging.WARNING):
        lines = report.plot_score_by_dim().axes[0].lines
    assert lines[0].get_ydata()[0] == pytest.approx(30)
    assert np.isnan(lines[1].get_ydata()[0])
    assert "b at 8 (lacks u)" in caplog.text
    assert cells_of(report)["b"] == ["8", "**90.00**", "", ""]


def test_a_missing_seed_is_said(caplog):
    """A mean over fewer seeds is shown, with a warning that names row and task."""
    with caplog.at_level(logging.WARNING):
        EvaluationReport([one(0.1, seed=0), one(0.2, seed=1), one(0.1, seed=0, task="u")]).table()
    assert "fewer seeds" in caplog.text
    assert "m, u" in caplog.text


def test_heatmap_shows_what_is_not_a_number():
    """n/a in the cell, and the colours of the others stay."""
    report = EvaluationReport([one(float("nan"), layer=1), one(0.5, layer=2), one(0.7, layer=2, dim=16)])
    axes = report.plot_layer_dim().axes[0]
    assert sorted(text.get_text() for text in axes.texts) == ["50.0", "70.0", "n/a", "n/a"]


def test_scores_of_different_metrics_have_columns_of_their_own():
    """Cosine and dot are no comparison: no bold, no mean, and no common line."""
    report = EvaluationReport([one(0.2, "a"), {**one(0.4, "b"), "metric": "dot"}])
    assert list(report.table(average=False).columns) == ["t s", "t dot"]
    with pytest.raises(ValueError, match="several metrics"):
        report.plot_score_by_dim()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "dim", "layer", "precision", "bytes", "mean", "seed", "revision", "score"])
def test_a_task_may_be_called_like_a_column(name):
    """Markdown, LaTeX, frame and plots of a task of that name hold its scores."""
    extra = [{"layer": 1, "precision": p, "bytes": 8} for p in ("float32", "int8")]
    report = EvaluationReport([one(s, task=t, **e) for s, t in ((0.25, name), (0.75, "u")) for e in extra])
    header, _, *rows = report.to_markdown().splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells[:7] == ["model", "layer", "precision", "dim", "bytes", name, "u"]
    assert all([cell.strip() for cell in row.strip("|").split("|")][5:] == ["25.00", "75.00", "50.00"] for row in rows)
    assert "25.00 & 75.00 & 50.00" in report.to_latex()
    assert list(report.table()[name]) == pytest.approx([25, 25])
    for plot in (report.plot_score_by_dim, report.plot_quality_by_bytes, report.plot_layer_dim):
        plot()


def test_bars_in_names_are_escaped():
    """A task or model with a bar does not add a column."""
    text = EvaluationReport([one(0.5, "a|b", task="t|u")]).to_markdown()
    assert {line.replace("\\|", "").count("|") for line in text.splitlines()} == {4}


# --- files ------------------------------------------------------------------------------------------------------------


def _write_again(path, letter, times):
    report = EvaluationReport([one(0.5, letter * 3000)])
    for _ in range(times):
        report.to_json(path)


def test_readers_never_see_half_a_file(tmp_path):
    """While two processes write the same file over and over, every read finds one of the two reports."""
    path = tmp_path / "r.json"
    _write_again(path, "a", 1)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_again, args=(path, letter, 150)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        seen.add(EvaluationReport.from_json(path).records[0]["model"][0])
    assert seen <= {"a", "b"}
    assert seen
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_link_is_replaced(tmp_path):
    """A report goes to the given path, and what lies elsewhere stays."""
    (tmp_path / "other").write_text("mine")
    (tmp_path / "r.md").symlink_to(tmp_path / "other")
    text = EvaluationReport(rows()).to_markdown(tmp_path / "r.md")
    assert (tmp_path / "other").read_text() == "mine"
    assert (tmp_path / "r.md").read_text() == text


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    """The picture of before stays, and nothing half-written is next to it."""
    report = EvaluationReport(rows())
    report.plot_score_by_dim(tmp_path / "p.png")
    before = (tmp_path / "p.png").read_bytes()

    def fail(self, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        report.plot_score_by_dim(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == before
    assert os.listdir(tmp_path) == ["p.png"]


# --- reports of evaluators --------------------------------------------------------------------------------------------


def sts(name="", seed=1):
    """Twelve pairs."""
    scores = [(5 * i % 12) / 12 for i in range(12)]
    return EmbeddingSimilarityEvaluator(sentences(12, seed), sentences(12, seed + 1), scores, name=name)


class Number(BaseEvaluator):
    """Encodes, and returns one number instead of metrics."""

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return float(model.encode(["the cat"]).sum())


def test_reports_of_default_names_stay_apart(tmp_path):
    """Two models, report() without arguments: two rows with the scores of each, not one with the mean."""
    evaluator = MatryoshkaEvaluator(sts("s"), [4, 32])
    expected, both = [], EvaluationReport([])
    for layers in (1, 4):
        scores = evaluator(tiny_model(tmp_path / str(layers), layers=layers))
        expected += [100 * scores[f"s-{dim}_spearman_cosine"] for dim in (4, 32)]
        both += evaluator.report()
    assert list(both.table()["s"]) == pytest.approx(expected)
    assert both.table().index.get_level_values("model").nunique() == 2
    assert len(both.plot_score_by_dim().axes[0].lines) == 2


def test_reports_of_one_model_share_its_row(tmp_path):
    """Two evaluators of the same model: one row with two tasks, whatever was evaluated in between."""
    model = tiny_model(tmp_path)
    evaluators = [MatryoshkaEvaluator(sts(name, seed), [4]) for name, seed in (("a", 1), ("b", 5))]
    for evaluator in evaluators:
        evaluator(model)
    table = (evaluators[0].report() + evaluators[1].report()).table()
    assert len(table) == 1
    assert list(table.columns) == ["a", "b", "mean"]


@pytest.mark.parametrize(
    ("make", "tasks"),
    [
        (lambda: sts(), ["dim"]),
        (lambda: sts("dim"), ["dim"]),
        (lambda: sts("model"), ["model"]),
        (lambda: Number(), ["dim"]),
        (lambda: SequentialEvaluator([sts("a"), sts("b", 5)]), ["a", "b"]),
        (lambda: SequentialEvaluator([sts("a"), sts("", 5)]), ["a", "dim"]),
        (lambda: SequentialEvaluator([sts("a")]), ["a"]),
        (lambda: SequentialEvaluator([sts("a"), Number()]), ["a", "dim"]),
        (lambda: SequentialEvaluator([sts("a"), SequentialEvaluator([sts("b", 5), sts("c", 7)])]), ["a", "b", "c"]),
    ],
)
def test_tables_and_plots_of_any_evaluator(tmp_path, make, tasks):
    """Unnamed, named like a column, in sequence: one column per task, and what sums them up is none."""
    evaluator = MatryoshkaEvaluator(make(), [4, 32])
    evaluator(tiny_model(tmp_path))
    report = evaluator.report()
    means = ["mean"] if len(tasks) > 1 else []
    assert list(report.table().columns) == tasks + means
    header = report.to_markdown().splitlines()[0]
    assert [cell.strip() for cell in header.strip("|").split("|")] == ["model", "dim", *tasks, *means]
    axes = report.plot_score_by_dim().axes[0]
    assert axes.get_title(loc="left") == (tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks")
    means = report.table()[tasks].mean(axis=1)
    assert list(axes.lines[0].get_ydata()) == pytest.approx(list(means))


def test_the_mean_of_a_collection_is_no_task(tmp_path, monkeypatch):
    """NanoBEIR: a column per data set; its own mean would count each of them twice."""
    parts = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(sentences(12, 1))],
        "queries": [{"_id": f"q{i}", "text": text} for i, text in enumerate(sentences(4, 2))],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i}"} for i in range(4)],
    }
    monkeypatch.setattr(
        NanoBEIREvaluator, "_load_dataset_subset_split", lambda self, subset, split, required_columns: parts[subset]
    )
    evaluator = MatryoshkaEvaluator(NanoBEIREvaluator(["msmarco", "nq"]), [4])
    evaluator(tiny_model(tmp_path))
    assert list(evaluator.report().table().columns) == ["NanoMSMARCO", "NanoNQ", "mean"]


# --- what a reader sees -----------------------------------------------------------------------------------------------


def test_a_report_in_a_notebook():
    """One line for a prompt, the table in print and in a notebook, cut as pandas cuts long ones."""
    report = EvaluationReport([one(0.5), one(float("nan"), dim=16), one(0.25, task="<other>")])
    assert repr(report) == "EvaluationReport(scores: 3, models: 1, tasks: 2, dims: [8, 16])"
    assert str(report) == report.to_markdown()
    html = report._repr_html_()
    assert html.startswith(f"<p>{report!r}</p><table")
    assert "<td>50.00</td>" in html
    assert "<td>n/a</td>" in html
    assert "&lt;other&gt;" in html
    many = EvaluationReport([one(0.5, dim=dim) for dim in range(1, 200)])
    with pd.option_context("display.max_rows", 10):
        assert many._repr_html_().count("<tr") < 20


def test_a_report_without_a_table_is_still_shown(monkeypatch):
    """No main scores, two scores of one cell, or no pandas: the plain line."""
    for report in (
        EvaluationReport([]),
        EvaluationReport([one(0.5, primary=False)]),
        EvaluationReport([one(0.5), one(0.6)]),
    ):
        assert report._repr_html_() is None
        assert str(report) == repr(report)
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert EvaluationReport([one(0.5)])._repr_html_() is None
