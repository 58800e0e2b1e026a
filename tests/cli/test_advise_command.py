"""The command advise: texts, pairs and vectors from files; everything is written, or nothing."""

import json
import sys

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from command_files import write_files
from conftest import WIDTH, sentences
from mipic_st.cli import main
from mipic_st.transforms.rotation import Rotation
from transforms_fixtures import hidden_signal


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def vectors():
    """What counts lies in the last values."""
    return hidden_signal(300, WIDTH, 8)[0] * np.repeat([0.2, 1], [WIDTH - 8, 8]).astype(np.float32)


SMALL = ["--dims", "8", "--bytes", "4,8", "--precisions", "int4", "int8"]


def test_vectors_of_files(files, capsys):
    """npy and Parquet hold the same; advice, map and plot are in the folder, the text on the terminal."""
    np.save(files / "v.npy", vectors())
    pd.DataFrame({"id": range(300), "embedding": list(vectors())}).to_parquet(files / "v.parquet")
    printed = []
    for name in ("v.npy", "v.parquet"):
        assert main(["advise", "--vectors", str(files / name), *SMALL, "--output", str(files / name[2:])]) == 0
        said = capsys.readouterr()
        printed.append(said.out)
        made = f"--rotation {files / name[2:] / 'rotation.safetensors'} --dim 8 --precision int4"
        assert f"next: mipic-st vectors {files / name} {made} --output DIR\n" in said.err
    assert printed[0] == printed[1]
    assert "Store int4 x 8, rotated (4 bytes)" in printed[0]
    folder = files / "npy"
    written = {"advice.json", "rotation.safetensors", "quality_by_bytes.png", "quality_by_bytes.svg"}
    assert {path.name for path in folder.iterdir()} == written
    content = json.loads((folder / "advice.json").read_text())
    assert content["cell"]["bytes"] == 4
    assert content["snippet"] in printed[0]
    rotation = Rotation.load(folder / "rotation.safetensors")
    assert rotation.encode(vectors(), dim=8, precision="int4").shape == (300, 4)
    assert main(["advise", "--vectors", str(files / "v.npy"), *SMALL, "--output", str(folder)]) == 1
    assert "is not empty" in capsys.readouterr().err


def test_vectors_are_read_as_for_the_command_vectors(files, capsys):
    """A folder of pieces and a tensor: what can be coded can be advised on."""
    save_file({"embedding": vectors()}, files / "v.safetensors")
    (files / "parts").mkdir()
    for number, part in enumerate(np.split(vectors(), 3)):
        np.save(files / "parts" / f"{number}.npy", part)
    printed = []
    for name in ("v.safetensors", "parts"):
        assert main(["advise", "--vectors", str(files / name), *SMALL]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    (files / "parts" / "3.npy").write_bytes(b"no array")
    assert main(["advise", "--vectors", str(files / "parts"), *SMALL]) == 1
    assert "Cannot read 3.npy" in capsys.readouterr().err


def test_an_array_needs_no_pyarrow(files, capsys, monkeypatch):
    """What NumPy wrote is advised on after the plain installation; a tensor's file says what it needs."""
    np.save(files / "v.npy", vectors())
    save_file({"embedding": vectors()}, files / "v.safetensors")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert main(["advise", "--vectors", str(files / "v.npy"), *SMALL]) == 0
    assert main(["advise", "--vectors", str(files / "v.safetensors"), *SMALL]) == 1
    assert "pyarrow" in capsys.readouterr().err


def test_random_vectors_get_no_map(files, capsys):
    """Nothing is gained, so there is nothing to load; --quiet prints nothing."""
    np.save(files / "v.npy", np.random.default_rng(0).normal(size=(200, 16)))
    assert main(["advise", "--vectors", str(files / "v.npy"), *SMALL, "--output", str(files / "o"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert not (files / "o" / "rotation.safetensors").exists()
    assert json.loads((files / "o" / "advice.json").read_text())["gained"] is False


def test_texts_and_pairs_of_files(files, capsys):
    """The model encodes texts; pairs under other names and further documents and queries are taken."""
    model = str(files / "model")
    assert main(["advise", model, "--texts", str(files / "texts.txt"), *SMALL, "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("3-recall@10 x100 of ")
    texts = f"--texts {files / 'texts.txt'} "
    assert f"next: mipic-st rotate {model} {texts}" in said.err or f"next: mipic-st cut {model} --dim " in said.err
    pairs = pd.read_csv(files / "pairs.csv").set_axis(["Frage", "Antwort"], axis=1)
    pairs.assign(label=1).to_csv(files / "qa.csv", index=False)
    (files / "more.txt").write_text("\n".join(sentences(50, seed=12)), encoding="utf-8")
    call = ["advise", model, "--pairs", str(files / "qa.csv"), *SMALL, "--documents", str(files / "more.txt")]
    call += ["--queries", str(files / "more.txt"), "--measure", "recall@10", "--query-prompt", "the "]
    assert main([*call, "--columns", "Frage,Antwort"]) == 0
    assert capsys.readouterr().out.startswith("recall@10 x100 of 70 held-out queries in ")
    assert main(call) == 1
    assert "has the columns ['Frage', 'Antwort', 'label'], expected" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--texts", "texts.txt"], "name a MODEL for texts, or --vectors without one"),
        (["model", "--vectors", "v.npy"], "name a MODEL for texts, or --vectors without one"),
        (["model", "--texts", "texts.txt", "--documents", "texts.txt"], "--documents goes with --pairs"),
        (["--vectors", "none.npy"], "There is no file"),
        (["--vectors", "texts.txt"], "texts.txt must end with .parquet, .npy, .safetensors, .lance"),
        (["--vectors", "broken.npy"], "Cannot read broken.npy"),
        (["--vectors", "v.parquet"], r"has the columns ['other'], but not 'embedding': give --columns NAME"),
        (["--vectors", "v.parquet", "--columns", "a,b"], "--columns names one column of vectors, got ['a', 'b']"),
        (["--vectors", "v.parquet", "--columns", "other"], "vectors"),
        (["--vectors", "v.npy", "--bytes", "1", "--precisions", "int8"], "no cell is so small"),
        (["--vectors", "v.npy", "--dims", "64"], "exceed"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_written(files, capsys, arguments, message, monkeypatch):
    """Files, columns, options that do not go together."""
    monkeypatch.chdir(files)
    np.save("v.npy", vectors())
    (files / "broken.npy").write_bytes(b"no array")
    pd.DataFrame({"other": [[1.0, 2.0], [1.0]]}).to_parquet("v.parquet")
    assert main(["advise", *arguments, "--output", "out"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "unexpected" not in error
    assert not (files / "out").exists()
