"""The command rotate: the model is saved with its rotation, or nothing is."""

import datasets
import numpy as np
import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from command_files import write_files
from conftest import sentences
from mipic_st.cli import main
from mipic_st.transforms.rotation import Rotation


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def test_rotate_saves_a_rotated_model(files, capsys):
    """On texts: full-width cosines stay, the matrix lies in its folder, the table has a row per dim."""
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
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()][:4] == ["recall@10", "dim", "4", "8"]
    assert f"next: mipic-st eval {files / 'model'} {files / 'out'} " in printed.err
    models = [SentenceTransformer(str(files / name), device="cpu") for name in ("model", "out")]
    texts = sentences(10, seed=4)
    plain, rotated = (model.encode(texts) for model in models)
    np.testing.assert_allclose(rotated @ rotated.T, plain @ plain.T, atol=1e-5)
    assert np.abs(rotated - plain).max() > 0.01
    np.testing.assert_allclose(Rotation.load(files / "out" / "rotation.safetensors")(plain), rotated, atol=1e-5)
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


def test_rotate_checks_other_texts(files, capsys):
    """Texts of another kind get a report of their own; documents and queries are taken."""
    (files / "other.txt").write_text("\n".join(sentences(80, seed=11)), encoding="utf-8")
    call = ["rotate", str(files / "model"), "--texts", str(files / "texts.txt"), "--dims", "4"]
    call += ["--documents", str(files / "other.txt"), "--queries", str(files / "other.txt")]
    assert main([*call, "--check", str(files / "other.txt"), "--output", str(files / "out")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("recall@10 of queries") == 2
    assert f"{files / 'other.txt'}: recall@10" in printed
    assert main([*call, "--check", str(files / "none.txt"), "--output", str(files / "second")]) == 1
    assert "none.txt" in capsys.readouterr().err
    assert not (files / "second").exists()


def test_rotate_takes_prompts(files, monkeypatch):
    """Queries and documents have their own, in pairs and next to texts; without the options, the model's own."""
    import mipic_st.transforms.model_rotation as room

    seen = []
    fit = room.encode_columns

    def noted(model, columns, **options):
        seen.append(options["prompts"])
        return fit(model, columns, **options)

    monkeypatch.setattr(room, "encode_columns", noted)
    further = ["--documents", str(files / "texts.txt"), "--queries", str(files / "texts.txt")]
    prompts = ["--query-prompt", "q: ", "--document-prompt", "d: "]
    for number, (data, given, found) in enumerate(
        [
            (["--pairs", "pairs.csv"], prompts, {"anchor": "q: ", "positive": "d: "}),
            (["--texts", "texts.txt"], prompts[2:], {"": "d: "}),
            (["--texts", "texts.txt"], [*prompts, *further], {"": "d: ", "documents": "d: ", "queries": "q: "}),
            (["--texts", "texts.txt"], [*prompts[:2], *further], {"": None, "documents": None, "queries": "q: "}),
            (["--texts", "texts.txt"], [], {"": None}),
        ]
    ):
        option, name = data
        call = ["rotate", str(files / "model"), option, str(files / name), "--dims", "4", *given, "--quiet"]
        main([*call, "--output", str(files / f"out{number}")])
        assert seen[-1] == found


def test_rotating_a_narrow_model_needs_dims(files, capsys, monkeypatch):
    """Below 8 values the default is the width, which needs no rotation; the option that is needed is named."""
    monkeypatch.setattr("mipic_st.encoder.structure.full_width", lambda model: 8)
    monkeypatch.setattr("mipic_st.transforms.model_rotation.full_width", lambda model: 8)
    call = ["rotate", str(files / "model"), "--texts", str(files / "texts.txt"), "--output", str(files / "out")]
    assert main(call) == 1
    assert "dims must hold a dimension below the vectors' width of 8" in capsys.readouterr().err


def test_rotate_takes_columns(files, capsys, monkeypatch):
    """Of pairs, of texts, and of data of the hub; a column that is not there is named."""
    lines = (files / "pairs.csv").read_text().replace("anchor,positive", "Frage,Antwort", 1)
    (files / "qa.csv").write_text(lines)
    rows, seen = pd.read_csv(files / "qa.csv"), []
    loaded = datasets.Dataset.from_pandas(rows.assign(label=range(len(rows))))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
    monkeypatch.setattr(
        "mipic_st.transforms.model_rotation.rotate_model", lambda _, data, *__, **___: seen.append(data) or 1 / 0
    )
    for option, place, columns in (
        ("--pairs", str(files / "qa.csv"), "Frage,Antwort"),
        ("--texts", str(files / "qa.csv"), "Antwort"),
        ("--dataset", "some/set", "Frage,Antwort"),
    ):
        call = ["rotate", str(files / "model"), option, place, "--output", str(files / "out"), "--dims", "4"]
        assert main([*call, "--columns", columns]) == 1
        assert main([*call, "--columns", "Frage,nothing"]) == 1
        assert "but not ['nothing'] of columns=['Frage', 'nothing']" in capsys.readouterr().err
    assert [data if isinstance(data, list) else data.to_dict() for data in seen] == [
        {"anchor": rows.Frage.tolist(), "positive": rows.Antwort.tolist()},
        rows.Antwort.tolist(),
        {"anchor": rows.Frage.tolist(), "positive": rows.Antwort.tolist()},
    ]
