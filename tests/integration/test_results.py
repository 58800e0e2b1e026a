"""Every figure of README and of the pages with results is the committed report's, digit for digit."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import bytes_picture
import pytest
from tables import DOCUMENTS, FILES, LATER_ROWS, MARKED, MORE_ROWS, TABLES, TAUGHT_ROWS, WEAK_ROWS, filled, load

RESULTS = Path(__file__).parents[2] / "examples" / "benchmarks" / "results"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_the_reports(document):
    """Each table under a marker is what the committed report gives; the README has its headline."""
    text = document.read_text(encoding="utf-8")
    assert MARKED.search(text)
    assert filled(text) == text


def test_every_table_is_shown():
    """No table is made for nothing, and the check above has something to check."""
    shown = {name for path in DOCUMENTS for _, name, _ in MARKED.findall(path.read_text(encoding="utf-8"))}
    assert shown == set(TABLES)
    assert "| wrong |" not in filled("<!-- results: budgets -->\n\n| wrong |\n\nNext")


@pytest.mark.parametrize("name", FILES)
def test_reports_name_files_and_no_places(name):
    """What a report was made from is named as others have it, too."""
    assert "/" not in json.dumps(load(name).get("settings", {}))


@pytest.mark.parametrize("document", [DOCUMENTS[0], DOCUMENTS[1].with_name("index.md")], ids=lambda path: path.name)
def test_the_headline_is_true(document):
    """The sentence of README and start page about 32 bytes quotes the report, and so does the picture."""
    said = re.search(r"\*\*32 bytes .*?\n\n", document.read_text(encoding="utf-8"), re.DOTALL)[0]
    found = load("retrieval")["sets"]["cranfield"]
    best = {way: best_code(found, way, "32") for way in ("rotation", "truncation", "PCA")}
    assert best["rotation"][0] == "int4 x 64"
    assert re.findall(r"(\d+)%", said) == [f"{share:.0f}" for _, share in best.values()]
    assert "64 dims in int4" in " ".join(said.split())
    assert len(load("retrieval")["settings"]["seeds"]) == 3
    assert bytes_picture.shares(found, "rotation", "int4")[32] == pytest.approx(best["rotation"][1])
    assert bytes_picture.shares(found, "truncation", "binary")[48] > 0, "384 bits are 48 bytes"


def best_code(found, way, size, codes=("int4", "int8", "binary")):
    """(cell, percent of full width) of the code that keeps most of nDCG@10 in so many bytes."""
    cells = [found["bytes"][f"{way}, {code}"] for code in codes]
    best = max((cell[size] for cell in cells if size in cell), key=lambda cell: cell["ndcg@10"]["mean"])
    return best["cell"], 100 * best["ndcg@10"]["mean"] / found["full width"]["ndcg@10"]["mean"]


def test_what_the_readme_says_of_faiss_and_training_is_true():
    """Shares of full width by product quantization of rotated vectors, of OPQ, and what training adds at 16 dims."""
    text = " ".join(DOCUMENTS[0].read_text(encoding="utf-8").split())
    sets = load("retrieval")["sets"]
    said = re.search(r"In FAISS, PQ of rotated .*?\)\.", text)[0]
    expected = []
    for name in ("cranfield", "docstrings"):
        for row in ("rotation, PQ, interleaved", "OPQ + PQ (faiss)"):
            full = sets[name]["full width"]["ndcg@10"]["mean"]
            cells = sets[name]["bytes"][row]
            expected += [f"{100 * cells[size]['ndcg@10']['mean'] / full:.0f}" for size in ("8", "16", "32")]
    assert re.findall(r"\d+(?=[,%]| and)", said.replace("8, 16 and 32 bytes", "")) == expected
    trained = load("trained on pairs")["corpora"]["docstrings"]["matryoshka, rotated again"]
    gain = re.search(r"adds (\d+) points of nDCG@10 to the rotation alone at 16 dims on docstrings", text)[1]
    assert gain == f"{trained['over the rotation']['16']['difference']:.0f}"


def test_pictures_are_drawn_from_the_report(tmp_path):
    """The script draws the pictures that the pages have, each for light and for dark pages, and no other."""
    pytest.importorskip("matplotlib", reason="needs the eval extra")
    from pages import PICTURES, PLOTS, draw, reports

    draw(reports(), tmp_path)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.glob("*.svg")}
    assert set(drawn) == {path.name for path in PICTURES.iterdir() if not path.name.startswith("badge-")}
    assert set(drawn) == {f"{name}{ending}.svg" for name in PLOTS for ending in ("", "-dark")}
    assert all(drawn[f"{name}.svg"] != drawn[f"{name}-dark.svg"] for name in PLOTS)


def test_badges_say_what_pyproject_says():
    """The committed badges are those of the script, and the versions and the licence are those of the package."""
    pytest.importorskip("matplotlib", reason="needs the eval extra")
    from pages import PICTURES, badge, badges

    shown = badges()
    assert {path.name for path in PICTURES.glob("badge-*")} == {f"badge-{name}.svg" for name in shown}
    pyproject = (PICTURES.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for name, (label, text) in shown.items():
        drawn = (PICTURES / f"badge-{name}.svg").read_text(encoding="utf-8")
        assert drawn == badge(label, text)
        assert html.unescape(re.search("<title>(.*)</title>", drawn)[1]) == f"{label}: {text}"
    assert f'requires-python = "{shown["python"][1]}"' in pyproject
    assert f'"sentence-transformers{shown["sentence-transformers"][1].replace(" ", "")}"' in pyproject
    assert f'license = "{shown["licence"][1]}"' in pyproject


def test_the_comparison_is_over_seeds():
    """What was trained was trained with three seeds at its own rate, and one folder of settings made all of it."""
    report = load("rotated")
    trained = {name: about for name, about in report["good"].items() if about["learning_rate"]}
    trained |= {f"weak {name}": about for name, about in load("weak")["weak"].items()}
    assert {"matryoshka", "rotation+matryoshka", "rotation+mipic"} <= set(trained)
    for name, start, labels in (
        ("more", "good", MORE_ROWS),
        ("later", "good", LATER_ROWS),
        ("weak rotated", "weak", WEAK_ROWS),
        ("weak taught", "weak", TAUGHT_ROWS),
    ):
        entry = load(name)[start]
        trained |= {f"{name} {row}": entry[row] for row in labels if entry[row]["learning_rate"]}
    assert {about["seeds"] for about in trained.values()} == {3}
    assert report["settings"]["steps"] >= 150
