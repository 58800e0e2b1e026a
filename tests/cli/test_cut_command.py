"""The command cut: a folder that loads, with what it costs and brings."""

import json
from dataclasses import replace

import pytest
import torch
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


@pytest.mark.parametrize(
    ("option", "pooling", "weights", "note"),
    [
        (["--no-word-weights"], "mean", {}, "with them the cut is closer to the full model"),
        ([], "cls", {}, "The tokens have no word weights, since the model pools by 'cls', not by the mean."),
        ([], "mean", {}, "the fit found none that bring the cut closer to the full model"),
        ([], "mean", {2: 1}, None),
    ],
)
def test_a_cut_without_word_weights_says_why(files, capsys, monkeypatch, option, pooling, weights, note):
    """By the option, because of the model, or since nothing was gained; nothing where there are some."""
    import mipic_st.transforms.layer_cut as room

    plain = room.fit_layer_cuts

    def fit(model, texts, **given):
        assert given.pop("word_weights") is (False if option else None)
        given |= {"max_steps": 1, "word_weights": False}
        return replace(plain(model, texts, **given), word_weights={2: torch.ones(weights_of(model))} if weights else {})

    def weights_of(model):
        return len(model.tokenizer.get_vocab())

    monkeypatch.setattr(room, "fit_layer_cuts", fit)
    settings = json.loads((files / "model" / "1_Pooling" / "config.json").read_text())
    settings["pooling_mode"] = pooling
    (files / "model" / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    call = ["cut", str(files / "model"), "--layer", "2", "--dim", "8", "--texts", str(files / "texts.txt"), *option]
    assert main([*call, "--output", str(files / "out")]) == 0
    printed = capsys.readouterr().out
    assert ("word weights" in printed) == (note is not None)
    assert (note or "") in printed


def test_cut_passes_its_options_on(files, capsys, monkeypatch):
    """Columns, prompt and seed reach the fit; without texts they are refused."""
    seen = []
    monkeypatch.setattr(
        "mipic_st.transforms.layer_cut.fit_layer_cuts", lambda _, texts, **given: seen.append((texts, given)) or 1 / 0
    )
    options = ["--columns", "anchor", "--document-prompt", "d: "]
    call = ["cut", str(files / "model"), "--layer", "2", "--output", str(files / "out")]
    assert main([*call, "--texts", str(files / "pairs.csv"), *options, "--seed", "3"]) == 1
    ((texts, given),) = seen
    lines = (files / "pairs.csv").read_text().splitlines()[1:]
    assert texts == list(dict.fromkeys(line.split(",")[0] for line in lines))
    assert (given["prompt"], given["seed"]) == ("d: ", 3)
    capsys.readouterr()
    for option in (options[:2], options[2:], ["--no-word-weights"]):
        assert main([*call, *option]) == 1
        assert f"{option[0]} is for the fit on --texts" in capsys.readouterr().err
