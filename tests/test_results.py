"""The README quotes the committed results, digit for digit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = {
    "untrained, truncated": "untrained",
    "base loss only": "base",
    "base loss only, then PCA": "base-pca",
    "MatryoshkaLoss": "matryoshka",
    "MatryoshkaLoss, small dims weighted": "matryoshka-weighted",
    "MatryoshkaLoss, 16 dims only": "specialist-16",
    "MatryoshkaLoss, 8 dims only": "specialist-8",
    "Matryoshka2dLoss": "matryoshka-2d",
    "MIPICLoss, paper preset": "mipic-paper",
    "MIPICLoss": "mipic",
    "+ attention": "mipic-attention",
    "+ CKA": "mipic-cka",
    "+ PIC": "mipic-pic",
}
ABLATION = ["mipic-attention", "mipic-cka", "mipic-pic"]
RIVALS = {
    "MatryoshkaLoss": "matryoshka",
    "small dims weighted": "matryoshka-weighted",
    "that dim only": "specialist",
}


@pytest.fixture(scope="module")
def report():
    return json.loads((ROOT / "examples" / "results" / "compare_losses.json").read_text(encoding="utf-8"))


def quoted(name):
    """The table after ``<!-- results: name -->``: (row label, {column: cell}) per row."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.search(rf"<!-- results: {re.escape(name)} -->\n\n((?:\|.*\n)+)", readme)
    assert found, f"README.md has no table {name!r}"
    head, _, *rows = [
        [cell.strip().replace("`", "").replace("**", "") for cell in line.strip("|\n").split("|")]
        for line in found[1].splitlines()
    ]
    return [(row[0], dict(zip(head[1:], row[1:], strict=True))) for row in rows]


def rate(entry):
    return f"{entry['learning_rate']:.0e}".replace("e-0", "e-") if entry["learning_rate"] else ""


def score(entry, column):
    """A cell as the README writes it: mean ± standard deviation over seeds, x100."""
    measure = "probe" if column.startswith("topic ") else "sts"
    cell = entry[measure][column.removeprefix("topic ")]
    return f"{cell['mean']:.1f}" + (f" ±{cell['std']:.1f}" if entry["seeds"] > 1 else "")


@pytest.mark.parametrize("start", ["good", "weak"])
def test_readme_scores(report, start):
    """Every cell of the README's score tables is the committed report's."""
    rows = quoted(start)
    assert len(rows) == 10
    for label, cells in rows:
        entry = report[start][METHODS[label]]
        for column, cell in cells.items():
            assert cell == (rate(entry) if column == "rate" else score(entry, column)), f"{label}, {column}"


def test_readme_ablation(report):
    """Every figure of the README's ablation is the committed report's."""
    rows = quoted("ablation")
    assert [METHODS[label] for label, _ in rows] == ["matryoshka", *ABLATION, "mipic"]
    for label, cells in rows:
        for column, cell in cells.items():
            start, dim = column.split()
            mean = report["ablation"][start][METHODS[label]]["sts"][dim]["mean"]
            assert cell == f"{mean:.2f}", f"{label}, {column}"


def test_readme_differences(report):
    """Every difference and interval in the README is the committed report's."""
    rows = quoted("differences")
    assert len(rows) == 7
    for label, cells in rows:
        start, rival = label.split(": ")
        for column, cell in cells.items():
            measure = "probe" if column.startswith("topic ") else "sts"
            by_dim = report[start]["mipic"][f"{measure} differences"][RIVALS[rival]]
            found = by_dim.get(column.removeprefix("topic "))
            shown = f"{found['difference']:+.2f} [{found['low']:+.2f}, {found['high']:+.2f}]" if found else ""
            assert cell == shown, f"{label}, {column}"


def test_results_have_every_method_and_three_seeds(report):
    """What the issue of a fair comparison asks for: every control, three seeds each, at its own best rate."""
    for start in ("good", "weak"):
        assert set(METHODS.values()) - set(ABLATION) <= set(report[start])
        seeds = {name: entry["seeds"] for name, entry in report[start].items()}
        if start == "good":
            assert seeds.pop("untrained") == 1  # nothing is drawn
        assert set(seeds.values()) == {3}
        assert all(entry["seeds"] == 3 for entry in report["ablation"][start].values())
