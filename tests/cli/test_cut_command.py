"""The command cut: a folder that loads, with what it costs and brings."""

import json

import pytest
from sentence_transformers import SentenceTransformer

from command_files import write_files
from conftest import sentences
from evaluation_fixtures import tiny_model
from mipic_st.cli import main


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def test_cut_with_texts_fits_the_tail(files, capsys):
    """The exported Dense maps to the full model's vectors; the cell's figures are printed and written."""
    arguments = [
        "cut",
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
    statement = json.loads((files / "out" / "cut.json").read_text())
    kinds = ("plain", "fitted", "mixed", "full")
    assert {*(f"similarity_{kind}" for kind in kinds), "speedup"} <= set(statement)
    small = SentenceTransformer(str(files / "out"), device="cpu")
    full = SentenceTransformer(str(files / "model"), device="cpu")
    texts = sentences(20, seed=5, shortest=4)
    wanted = full.encode(texts, truncate_dim=8, normalize_embeddings=True)
    assert (small.encode(texts) * wanted).sum(axis=1).mean() > 0.7


def test_texts_need_a_layer(files, capsys):
    """There is nothing to fit behind the last layer."""
    arguments = ["cut", str(files / "model"), "--dim", "8", "--texts", str(files / "texts.txt")]
    assert main([*arguments, "--output", str(files / "out")]) == 1
    assert "give --layer too" in capsys.readouterr().err


def test_cut_writes_a_loadable_model(tmp_path, capsys):
    """The folder loads, has the asked layers and dim, and the speed-up is stated."""
    tiny_model(tmp_path).save_pretrained(str(tmp_path / "full"))
    assert main(["cut", str(tmp_path / "full"), "--layer", "2", "--dim", "8", "--output", str(tmp_path / "cut")]) == 0
    printed = capsys.readouterr()
    assert "times as fast" in printed.out
    assert "was not measured" in printed.out, "speed is one half of what a cut layer means"
    assert "--texts FILE" in printed.out
    assert f"next: mipic-st eval {tmp_path / 'full'} {tmp_path / 'cut'} " in printed.err
    small = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert small.encode(["the cat"]).shape == (1, 8)
    assert json.loads((tmp_path / "cut" / "cut.json").read_text())["layer"] == 2


def test_a_cut_of_dims_is_not_timed(files, capsys):
    """It is as fast as before; --quiet prints nothing."""
    assert main(["cut", str(files / "model"), "--dim", "8", "--output", str(files / "out"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads((files / "out" / "cut.json").read_text()) == {"layer": None, "dim": 8}


def test_a_cut_that_fails_leaves_nothing(files, monkeypatch):
    """Neither a folder, nor a hidden one."""

    def stop(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr("mipic_st.files.json.dumps", stop)
    assert main(["cut", str(files / "model"), "--dim", "8", "--output", str(files / "out")]) == 1
    assert not list(files.glob("*out*"))
