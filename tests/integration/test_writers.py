"""Whatever happens while something is written: the whole result or none, and the next attempt works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def trials(folder, kills, limits, *names):
    """What the worker found, by writer."""
    paths = [str(HERE.parent / "src"), str(HERE), os.environ.get("PYTHONPATH", "")]
    run = subprocess.run(
        [sys.executable, str(HERE / "writers_worker.py"), str(folder), str(kills), str(limits), *names],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return json.loads((folder / "trials.json").read_text())


@pytest.fixture
def open_folder():
    """A folder that another user may enter; pytest's own is closed."""
    folder = Path(tempfile.mkdtemp(prefix="mipic-st-test-"))
    yield folder
    shutil.rmtree(folder)


def test_some_writers(open_folder):
    """Killed twice, a full disk once, no rights, a place that is taken: files, a checkpoint, a folder."""
    found = trials(open_folder, 2, 1, "Rotation.save", "MIPICCallback.save", "save_for_tei")
    assert {name: result["wrong"] for name, result in found.items()} == {name: [] for name in found}
    assert len(found) == 3
    assert all(result["touched"] >= 3 for result in found.values())


@pytest.mark.slow
def test_every_writer(open_folder):
    """The same with twenty moments and five sizes, for all of them."""
    pytest.importorskip("mteb")
    found = trials(open_folder, 20, 5)
    assert {name: result["wrong"] for name, result in found.items()} == {name: [] for name in found}
    assert len(found) == 17
