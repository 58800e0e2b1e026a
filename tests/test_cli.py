"""Invariants of the command: readable help, exit codes, files written, models side by side."""

import json

import pytest
from sentence_transformers import SentenceTransformer

from evaluation_fixtures import data_dir, minilm, sentences, tiny_model
from mipic_st.cli import main


def test_help_lists_the_commands(capsys):
    """--help exits with 0 and names eval, export and tasks."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("eval", "export", "tasks"))


def test_wrong_arguments_exit_with_2(capsys):
    """argparse's code for wrong usage."""
    assert main(["eval"]) == 2
    assert "MODEL" in capsys.readouterr().err


def test_unknown_model_exits_with_1(tmp_path, capsys):
    """A model that does not load gives one line on stderr."""
    assert main(["export", str(tmp_path / "none"), "--dim", "8", "--output", str(tmp_path / "o")]) == 1
    assert "cannot be loaded" in capsys.readouterr().err


def test_export_writes_a_loadable_model(tmp_path, capsys):
    """The folder loads, has the asked layers and dim, and the speed-up is stated."""
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "full"))
    assert (
        main(["export", str(tmp_path / "full"), "--layer", "2", "--dim", "8", "--output", str(tmp_path / "cut")]) == 0
    )
    assert "times as fast" in capsys.readouterr().out
    small = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert small.encode(["the cat"]).shape == (1, 8)
    assert json.loads((tmp_path / "cut" / "export.json").read_text())["layer"] == 2


def test_export_refuses_a_used_folder(tmp_path, capsys):
    """Nothing is overwritten."""
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "file").write_text("mine")
    assert main(["export", "x", "--dim", "8", "--output", str(tmp_path / "cut")]) == 1
    assert "not an empty folder" in capsys.readouterr().err


def test_eval_compares_models_side_by_side(tmp_path, capsys, monkeypatch):
    """Two local folders, a local task: tables, plots, best marked, exit code 0."""
    import pandas as pd

    from mipic_st import mteb_tasks

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
    assert mteb_tasks.PRESETS
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
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("**") == 2 * 4
    for file in ("report.md", "report.csv", "report.json", "report.tex", "score_by_dim.png", "quality_by_bytes.svg"):
        assert (tmp_path / "out" / file).is_file()


@pytest.mark.slow
def test_eval_on_the_real_model(tmp_path, capsys):
    """all-MiniLM-L6-v2 on STS13 from local files."""
    minilm().save_pretrained(str(tmp_path / "minilm"))
    code = main(
        [
            "eval",
            str(tmp_path / "minilm"),
            "--tasks",
            "STS13",
            "--dims",
            "384",
            "--data-dir",
            str(data_dir()),
            "--output",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0
    assert "80.60" in capsys.readouterr().out
