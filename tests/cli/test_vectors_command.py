"""The command for stored vectors: what it prints, what it leaves, and its exit codes."""

import json

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")
import pyarrow.parquet as pq  # noqa: E402

from mipic_st import Rotation, rotate_files  # noqa: E402
from mipic_st.cli import main  # noqa: E402
from stored_fixtures import random_rotation, random_vectors, reads_nulls, table_of  # noqa: E402

VECTORS = random_vectors(300)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a file of vectors and a rotation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    pq.write_table(table_of(VECTORS), "in/a.parquet")
    random_rotation().save("r.safetensors")
    return tmp_path


def run(vectors, output, *words):
    return main(["vectors", vectors, "--output", output, *words])


def test_it_writes_what_the_function_writes(here, capsys):
    """Every option reaches it; the report says rows, bytes and what is found; a bar shows rows per second."""
    words = ["--rotation", "r.safetensors", "--dim", "16", "--precision", "int4", "--model", "my/model", "--seed", "3"]
    assert run("in/a.parquet", "out", "--workers", "1", *words) == 0
    made = rotate_files(
        "in/a.parquet",
        "same",
        "r.safetensors",
        dim=16,
        precision="int4",
        model="my/model",
        seed=3,
        show_progress_bar=False,
    )
    assert json.loads((here / "out" / "_manifest.json").read_text()) == made
    printed = capsys.readouterr()
    assert "300 rows of 24 values as 16 x int4: 8 bytes each" in printed.out
    assert (
        f"of the 10 nearest at full width the codes find {100 * made['check']['rotated']:.1f}% (not rotated "
        in printed.out
    )
    assert "written to out" in printed.err
    assert "next, for queries: mipic_st.Rotation.load('out/_rotation.safetensors')(vectors, dim=16)" in printed.err
    assert "rows/s" in printed.err
    assert run("in/a.parquet", "out", "--resume", "--quiet", *words) == 0
    assert capsys.readouterr() == ("", "")
    assert run("in/a.parquet", "out", *words) == 1
    assert "go on with resume=True (--resume)" in capsys.readouterr().err


def test_a_fit_first(here, capsys):
    """On so many rows; the rotation lies with the codes."""
    assert run("in", "out", "--fit", "200", "--columns", "embedding", "--dim", "8", "--quiet") == 0
    rotation = Rotation.load("out/_rotation.safetensors")
    assert rotation.dims == (8, 16)
    assert pq.read_table("out")["embedding"].to_pylist() == rotation.encode(VECTORS, dim=8).tolist()
    made = rotate_files("in", "same", None, dim=8, fit_rows=200, show_progress_bar=False)
    assert made["note"]["rotation"] == rotation.fingerprint
    capsys.readouterr()


@reads_nulls
def test_what_is_wrong_is_named_and_the_rest_written(here, capsys):
    """A damaged file gives the exit code 1, a row without a code does not."""
    vectors = VECTORS.copy()
    vectors[7, 2] = np.nan
    pq.write_table(table_of(vectors), "in/b.parquet")
    words = ["--rotation", "r.safetensors", "--dim", "8"]
    assert run("in", "out", *words) == 0
    out = capsys.readouterr().out
    assert "no code: b.parquet row 7 holds NaN or infinite values" in out
    assert "1 rows have no code: nulls, or zeros in .npy and .safetensors; the manifest names them" in out
    (here / "in" / "c.parquet").write_text("damaged")
    assert run("in", "other", "--quiet", *words) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("mipic-st: c.parquet: ")
    assert len(pq.read_table("other")) == 600


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--dim", "8"], 2, "one of the arguments --rotation --fit is required"),
        (["--rotation", "r.safetensors", "--fit", "--dim", "8"], 2, "not allowed with"),
        (["--rotation", "r.safetensors"], 2, "required: --dim"),
        (["--rotation", "none.safetensors", "--dim", "8"], 1, "There is no file none.safetensors"),
        (["--rotation", "in/a.parquet", "--dim", "8"], 1, "in/a.parquet is no rotation that Rotation.save wrote"),
        (["--rotation", "r.safetensors", "--dim", "9"], 1, "9"),
        (["--rotation", "r.safetensors", "--dim", "8", "--precision", "int3"], 1, "precision must be one of"),
    ],
)
def test_wrong_arguments(here, capsys, words, code, message):
    """Named on one line, and nothing is written."""
    assert run("in", "out", *words) == code
    assert message in capsys.readouterr().err
    assert not (here / "out").exists()
