"""Invariants of the command: readable help, exit codes, files written, models side by side."""

import json
import re

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW
from transformers import RwkvConfig

from conftest import assemble, save_encoder, sentences
from evaluation_fixtures import tiny_model
from mipic_st import EvaluationReport, cli
from mipic_st.cli import main
from mipic_st.transforms.rotation import Rotation
from mipic_st.validation import powers_of_two


def test_help_lists_the_commands(capsys):
    """--help exits with 0 and names its commands."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("eval", "export", "rotate", "tasks"))


def test_wrong_arguments_exit_with_2(capsys):
    """argparse's code for wrong usage."""
    assert main(["eval"]) == 2
    assert "MODEL" in capsys.readouterr().err


@pytest.fixture
def files(tmp_path):
    """A tiny model in a folder, and texts and pairs in files."""
    texts = list(dict.fromkeys(sentences(300, seed=3, shortest=3)))
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("\n".join([*texts, "", texts[0]]) + "\n")
    rows = zip(texts[:140], texts[140:280], strict=True)
    (tmp_path / "pairs.csv").write_text("anchor,positive\n" + "".join(f"{a},{b}\n" for a, b in rows))
    return tmp_path


def test_rotate_saves_a_rotated_model(files, capsys):
    """On texts: full-width cosines stay, the matrix lies beside the model, the table has a row per dim."""
    arguments = [
        "rotate",
        str(files / "model"),
        "--texts",
        str(files / "texts.txt"),
        "--dims",
        "4",
        "8",
    ]
    assert main([*arguments, "--output", str(files / "out")]) == 0, capsys.readouterr().err
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["held-out", "dim", "4", "8"]
    models = [SentenceTransformer(str(files / name), device="cpu") for name in ("model", "out")]
    texts = sentences(10, seed=4)
    plain, turned = (model.encode(texts) for model in models)
    np.testing.assert_allclose(turned @ turned.T, plain @ plain.T, atol=1e-5)
    assert np.abs(turned - plain).max() > 0.01
    np.testing.assert_allclose(Rotation.load(files / "out" / "rotation.safetensors")(plain), turned, atol=1e-5)
    assert main([*arguments, "--output", str(files / "out")]) == 1, "the folder is not empty any more"


def test_rotate_without_gain_saves_nothing(files, capsys):
    """Pairs of texts that have nothing to do with each other teach nothing; --quiet prints no table."""
    arguments = [
        "rotate",
        str(files / "model"),
        "--pairs",
        str(files / "pairs.csv"),
        "--dims",
        "31",
        "--quiet",
    ]
    assert main([*arguments, "--output", str(files / "out")]) == 1
    streams = capsys.readouterr()
    assert "no dim gained, nothing was saved" in streams.err
    assert streams.out == ""
    assert not (files / "out").exists()


def test_export_with_texts_fits_the_tail(files, capsys):
    """The exported Dense maps to the full model's vectors; the cell's figures are printed and written."""
    arguments = [
        "export",
        str(files / "model"),
        "--layer",
        "2",
        "--dim",
        "8",
        "--texts",
        str(files / "texts.txt"),
    ]
    assert main([*arguments, "--output", str(files / "out")]) == 0, capsys.readouterr().err
    assert "fitted with full depth" in capsys.readouterr().out
    statement = json.loads((files / "out" / "export.json").read_text())
    kinds = ("plain", "fitted", "mixed", "full")
    assert {*(f"similarity_{kind}" for kind in kinds), "speedup"} <= set(statement)
    small = SentenceTransformer(str(files / "out"), device="cpu")
    full = SentenceTransformer(str(files / "model"), device="cpu")
    texts = sentences(20, seed=5, shortest=4)
    wanted = full.encode(texts, truncate_dim=8, normalize_embeddings=True)
    assert (small.encode(texts) * wanted).sum(axis=1).mean() > 0.7


def test_texts_need_a_layer(files, capsys):
    """There is nothing to fit behind the last layer."""
    arguments = ["export", str(files / "model"), "--dim", "8", "--texts", str(files / "texts.txt")]
    assert main([*arguments, "--output", str(files / "out")]) == 1
    assert "give --layer too" in capsys.readouterr().err


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
        # an unset variable of a shell
        (["export", "m", "--dim", "8", "--output", ""], "--output: is empty"),
        (["export", "m", "--layer", "2", "--texts", ""], "--texts: is empty"),
        (["rotate", "m", "--pairs", " "], "--pairs: is empty"),
        (["rotate", "m", "--texts", ""], "--texts: is empty"),
        (["rotate", "m", "--dataset", ""], "--dataset: is empty"),
        (["eval", "m", "--data-dir", ""], "--data-dir: is empty"),
        (["check", "m", "--url", ""], "--url: is empty"),
    ],
)
def test_bad_values_exit_with_2_before_loading(tmp_path, capsys, arguments, message):
    """Numbers out of range, and files for folders, are wrong usage."""
    (tmp_path / "file").write_text("x")
    places = {"FILE": tmp_path / "file", "FILE/deeper": tmp_path / "file" / "deeper", "NONE": tmp_path / "none"}
    needed = [] if arguments[0] == "check" else ["--output", str(tmp_path / "out")]
    needed += ["--tasks", "STS13"] if arguments[0] == "eval" else []
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


def failure(arguments, capsys):
    """The one line that a failing command leaves on stderr, progress bars and library warnings apart."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith("mipic-st: ")
    assert printed.count("mipic-st: ") == 1
    return last


@pytest.fixture
def saved(tmp_path):
    """A folder with a tiny model, and the command that would cut it."""
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "model"))
    return tmp_path / "model", ["export", tmp_path / "model", "--dim", "8", "--output", tmp_path / "cut"]


DAMAGE = {
    "weights": ("model.safetensors", b"x" * 100, "SafetensorError: Error while deserializing header"),
    "half of the weights": ("model.safetensors", None, "SafetensorError"),
    "config": ("config.json", b"{", "not a valid JSON file"),
    "architecture": ("config.json", b'{"model_type": "nonsense"}', "model type `nonsense`"),
    "module class": ("modules.json", b'[{"idx": 0, "name": "0", "path": "", "type": "no.Such"}]', "'no.Such'"),
    "no modules": ("modules.json", b"{}", "empty modules list"),
    "pooling": ("1_Pooling/config.json", b'{"nonsense": 1}', "unexpected keyword argument 'nonsense'"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_models_are_named_in_one_line(saved, capsys, kind):
    """Whatever a broken file makes the libraries raise: which model, and what they said."""
    folder, command = saved
    name, content, message = DAMAGE[kind]
    content = (folder / name).read_bytes()[:2000] if content is None else content
    (folder / name).write_bytes(content)
    line = failure(command, capsys)
    assert f"model '{folder}' cannot be loaded as a folder: " in line
    assert message in line


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta", ""])
@pytest.mark.parametrize("command", ["export", "eval"])
@pytest.mark.usefixtures("no_model")
def test_devices_that_are_not_there_are_refused_before_loading(tmp_path, capsys, command, device):
    """With the option's name and what torch says about it."""
    needed = ["--tasks", "STS13"] if command == "eval" else ["--dim", "8"]
    line = failure([command, "org/m", *needed, "--output", tmp_path / "out", "--device", device], capsys)
    assert f"--device {device!r} cannot be used here: " in line


@pytest.mark.parametrize("name", ["", "  "])
@pytest.mark.usefixtures("no_model")
def test_empty_model_names_are_refused(tmp_path, capsys, name):
    """An empty name is not the present folder."""
    for command in (["export", name, "--dim", "8"], ["eval", "org/m", name, "--tasks", "STS13"]):
        assert "the name is empty" in failure([*command, "--output", tmp_path / "out"], capsys)


def test_architectures_that_cannot_be_built_smaller_are_named(tmp_path, capsys):
    """What their own code raises, in one line."""
    sizes = {"hidden_size": 32, "attention_hidden_size": 32}
    folder = save_encoder(tmp_path / "encoder", lambda layers: RwkvConfig(num_hidden_layers=layers, **sizes))
    assemble(folder).save_pretrained(str(tmp_path / "model"))
    line = failure(["export", tmp_path / "model", "--layer", "1", "--output", tmp_path / "cut"], capsys)
    assert "RwkvModel cannot be built with 1 of its 3 layers" in line


def test_models_without_weights_are_refused(tmp_path, capsys):
    """A bag of words has nothing to cut."""
    SentenceTransformer(modules=[BoW(["cat", "dog"])], device="cpu").save_pretrained(str(tmp_path / "bow"))
    command = ["export", tmp_path / "bow", "--dim", "1", "--output", tmp_path / "cut"]
    assert "the model's BoW has no weights" in failure(command, capsys)


@pytest.mark.parametrize("error", [KeyError("x"), AssertionError(), StopIteration(), RuntimeError("two\n  lines")])
def test_errors_that_nobody_foresaw_are_one_line_and_debug_shows_more(tmp_path, capsys, monkeypatch, error):
    """With its kind and the way to see more; ``--debug`` before or after the command shows where it happened."""

    def load(*_):
        raise error

    monkeypatch.setattr(cli, "_load", load)
    command = ["export", "org/m", "--dim", "8", "--output", str(tmp_path / "out")]
    line = failure(command, capsys)
    if isinstance(error, RuntimeError):
        assert line == "mipic-st: two lines"
    else:
        assert line.startswith(f"mipic-st: {type(error).__name__}")
        assert "run again with --debug" in line
    for place in (0, 1, len(command)):
        assert main([*command[:place], "--debug", *command[place:]]) == 1
        assert "Traceback" in capsys.readouterr().err


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
        ]
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert printed.out.count("**") == 2 * 4
    for file in ("report.md", "report.csv", "report.json", "report.tex", "score_by_dim.png", "quality_by_bytes.svg"):
        assert (tmp_path / "out" / file).is_file()
    # random models: what cannot be drawn is told, and costs nothing else
    assert "no plot retained: the scores of STS13" in printed.err
    assert not (tmp_path / "out" / "retained.png").exists()


def test_eval_that_fails_writes_what_it_has(tmp_path, capsys, monkeypatch):
    """Of the models before; the error and its exit code stay."""

    def evaluate(model, *_, **__):
        if model == "org/second":
            raise ValueError("dims exceed")
        score = {"task": "STS13", "metric": "s", "dim": 8, "score": 0.5}
        return EvaluationReport([{"model": model, **score}])

    monkeypatch.setattr(cli, "_load", lambda place, *_: place)
    monkeypatch.setattr("mipic_st.encoder.structure.full_width", lambda model: 32)
    monkeypatch.setattr("mipic_st.evaluation.mteb.evaluate_mteb", evaluate)
    call = ["eval", "org/first", "org/second", "--tasks", "STS13", "--output", str(tmp_path), "--no-plots"]
    assert main(call) == 1
    told = capsys.readouterr().err
    assert "dims exceed" in told
    assert "incomplete, 2 models were asked for" in told
    assert [record["model"] for record in EvaluationReport.from_json(tmp_path / "report.json").records] == ["org/first"]
    call[1:3] = ["org/second", "org/first"]
    call[call.index(str(tmp_path))] = str(tmp_path / "none")
    assert main(call) == 1
    assert not (tmp_path / "none").exists(), "there is nothing to write"


def test_rotating_a_narrow_model_needs_dims(files, capsys, monkeypatch):
    """Below 8 values there is no default; the option that is needed is named."""
    monkeypatch.setattr("mipic_st.encoder.structure.full_width", lambda model: 8)
    call = ["rotate", str(files / "model"), "--texts", str(files / "texts.txt"), "--output", str(files / "out")]
    assert main(call) == 1
    assert "the model's 8 values leave no power of 2 from 8 on below them: give --dims" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("least", "below", "powers"), [(16, 384, [16, 32, 64, 128, 256]), (16, 256, [16, 32, 64, 128]), (8, 8, [])]
)
def test_powers_of_two_are_below_the_width(least, below, powers):
    """The default dims of models, however wide."""
    assert powers_of_two(least, below) == powers
    assert powers_of_two(16, 8192)[-1] == 4096


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
