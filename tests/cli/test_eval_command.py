"""The command eval: models side by side, tables and plots."""

import pytest

from conftest import sentences
from evaluation_fixtures import tiny_model
from mipic_st import EvaluationReport
from mipic_st.cli import main, options


def test_eval_compares_models_side_by_side(tmp_path, capsys, monkeypatch):
    """Two local folders, a local task: tables, plots, best marked, exit code 0."""
    import pandas as pd

    from mipic_st.evaluation import tasks as mteb_tasks

    for name, layers in (("one", 1), ("four", 4)):
        tiny_model(tmp_path, layers=layers).save_pretrained(str(tmp_path / name))
    frame = {
        "sentence1": sentences(30, 1),
        "sentence2": sentences(30, 2),
        "score": [float(7 * i % 5) for i in range(30)],
    }
    pd.DataFrame(frame).to_csv(tmp_path / "sts13_test.csv", index=False)
    from mteb.abstasks.task_metadata import TaskMetadata

    monkeypatch.setattr(TaskMetadata, "descriptive_stats", None)
    assert mteb_tasks.TASK_GROUPS
    code = main(
        [
            "eval",
            str(tmp_path / "one"),
            str(tmp_path / "four"),
            "--tasks",
            "STS13",
            "--dims",
            "8",
            "32",
            "--data-dir",
            str(tmp_path),
            "--output",
            str(tmp_path / "out"),
            "--precisions",
            "int8",
            "int4",
            "--scoring",
            "asymmetric",
            "--calibration",
            str(tmp_path / "sts13_test.csv"),
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("**") == 2 * 6
    assert "int4 (asymmetric, texts-" in printed.out
    for file in ("report.md", "report.csv", "report.json", "report.tex", "score_by_dim.png", "quality_by_bytes.svg"):
        assert (tmp_path / "out" / file).is_file()
    # random models: what cannot be drawn is said, and costs nothing else
    assert "no plot retained: the scores of STS13" in printed.err
    assert not (tmp_path / "out" / "retained.png").exists()


def test_eval_that_fails_writes_what_it_has(tmp_path, capsys, monkeypatch):
    """Of the models before; the error and its exit code stay."""

    def evaluate(model, *_, **__):
        if model == "org/second":
            raise ValueError("dims exceed")
        score = {"task": "STS13", "metric": "s", "dim": 8, "score": 0.5}
        return EvaluationReport([{"model": model, **score}])

    monkeypatch.setattr(options, "load_model", lambda place, *_: place)
    monkeypatch.setattr("mipic_st.encoder.structure.full_width", lambda model: 32)
    monkeypatch.setattr("mipic_st.evaluation.mteb.evaluate_mteb", evaluate)
    call = ["eval", "org/first", "org/second", "--tasks", "STS13", "--output", str(tmp_path), "--no-plots"]
    assert main(call) == 1
    said = capsys.readouterr().err
    assert "dims exceed" in said
    assert "incomplete: 2 models were given" in said
    assert [record["model"] for record in EvaluationReport.from_json(tmp_path / "report.json").records] == ["org/first"]
    call[1:3] = ["org/second", "org/first"]
    call[call.index(str(tmp_path))] = str(tmp_path / "none")
    assert main(call) == 1
    assert not (tmp_path / "none").exists(), "there is nothing to write"


@pytest.mark.slow
def test_eval_on_the_real_model(minilm_path, data_folder, tmp_path, capsys):
    """all-MiniLM-L6-v2 on STS13 from local files."""
    code = main(
        [
            "eval",
            minilm_path,
            "--tasks",
            "STS13",
            "--dims",
            "384",
            "--data-dir",
            str(data_folder),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    assert "80.60" in capsys.readouterr().out
