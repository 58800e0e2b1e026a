"""Invariants of the command: readable help, exit codes, files written, models side by side."""

import json
import re

import pytest
from sentence_transformers import SentenceTransformer

from conftest import sentences
from evaluation_fixtures import tiny_model
from mipic_st import cli
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


@pytest.fixture
def no_model(monkeypatch):
    """A command that loads a model fails the test."""

    def load(*_):
        raise AssertionError("loaded a model")

    monkeypatch.setattr(cli, "_load", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "m", "--dims", "0"], "--dims: must be a whole number from 1 on, got '0'"),
        (["eval", "m", "--dims", "8", "x"], "--dims: must be a whole number from 1 on, got 'x'"),
        (["eval", "m", "--batch-size", "0"], "--batch-size: must be a whole number from 1 on, got '0'"),
        (["eval", "m", "--data-dir", "FILE"], "--data-dir: .* is a file; name a folder"),
        (["eval", "m", "--data-dir", "NONE"], "--data-dir: .* is not there; name a folder"),
        (["eval", "m", "--output", "FILE"], "--output: .* is a file; name a folder"),
        (["eval", "m", "--output", "FILE/deeper"], "--output: .*file' is a file; name a folder"),
        (["export", "m", "--dim", "-1"], "--dim: must be a whole number from 1 on, got '-1'"),
        (["export", "m", "--layer", "0"], "--layer: must be a whole number from 1 on, got '0'"),
        (["export", "m", "--dim", "8", "--output", "FILE"], "--output: .* is a file; name a folder"),
    ],
)
def test_bad_values_exit_with_2_before_loading(tmp_path, capsys, arguments, message):
    """Numbers out of range, and files for folders, are wrong usage."""
    (tmp_path / "file").write_text("x")
    places = {"FILE": tmp_path / "file", "FILE/deeper": tmp_path / "file" / "deeper", "NONE": tmp_path / "none"}
    needed = ["--output", str(tmp_path / "out")] + (["--tasks", "STS13"] if arguments[0] == "eval" else [])
    command, model, *options = arguments
    assert main([command, model, *needed, *(str(places.get(option, option)) for option in options)]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["./no-such", "--tasks", "STS13"], "model './no-such' cannot be loaded: there is no such folder"),
        (["org/model", "a/b/c", "--tasks", "STS13"], "model 'a/b/c' cannot be loaded: there is no such folder"),
        (["FILE", "--tasks", "STS13"], "file' cannot be loaded: it is a file"),
        (["org/model", "--tasks", "NoSuchTask"], "'NoSuchTask' is neither"),
        (["org/model", "--tasks", "STS13", "--dims", "8", "8"], "--dims has duplicates"),
    ],
)
def test_what_cannot_work_is_said_before_loading(tmp_path, capsys, arguments, message):
    """Also of the second model, before hours went into the first."""
    (tmp_path / "file").write_text("x")
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    assert main(["eval", *arguments, "--output", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err


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
