"""Invariants of the report: nothing lost on the way out, best marked, pictures written."""

import io
import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from mipic_st.report import EvaluationReport

DIMS = (8, 64, 384)


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
    pd.testing.assert_frame_equal(back.frame(), report.frame())
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
    pd.testing.assert_frame_equal(back.frame(), report.frame(), check_dtype=False)


@pytest.mark.parametrize(
    "content", ["[]", "[1, 2]", "{}", '{"records": [3], "info": {}}', '{"records": [{}], "info": {}}', "x", "null"]
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


def test_latex_escapes():
    """Underscores of task names are escaped, rules come from booktabs."""
    text = EvaluationReport(rows()).to_latex()
    assert "T\\_1" in text
    assert "\\toprule" in text


def test_latex_escapes_all_that_means_something():
    """Names with TeX's ten special characters come out as these characters; marks of the best stay commands."""
    both = EvaluationReport(rows("a\\b{c}~d^e_f&g%h#i$")) + EvaluationReport(rows("b", 0.01))
    text = both.to_latex()
    expected = r"a\textbackslash{}b\{c\}\textasciitilde{}d\textasciicircum{}e\_f\&g\%h\#i\$"
    assert text.count(expected) == len(DIMS)
    assert text.count(r"\textbf{") == 3 * len(DIMS)


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


def test_names_at_line_ends_do_not_overlap():
    """Seven models with nearly equal scores: the drawn boxes of their names do not touch."""
    report = EvaluationReport([row for i in range(7) for row in rows(f"model-{i}", i * 1e-4)])
    figure = report.plot_score_by_dim()
    figure.canvas.draw()
    # an annotation's own extent would include its leader line
    boxes = sorted((Text.get_window_extent(t) for t in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 7
    assert all(below.y1 <= above.y0 for below, above in itertools.pairwise(boxes))
