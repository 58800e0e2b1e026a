"""Two gloo processes under the trainer: encode is shared over the ranks, and scores are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import assemble
from evaluation_worker import CASES

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def scores(tmp_path_factory, transformer_folder):
    """What the trainer logged on rank 0, and what the same evaluator gives there alone."""
    return two_processes(tmp_path_factory.mktemp("shared"), transformer_folder, 0)


def two_processes(folder, transformer_folder, draws):
    """What the worker found on rank 0."""
    assemble(transformer_folder("bert")).save(str(folder / "start"))
    paths = [str(TESTS.parent / "src"), str(TESTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(TESTS / "evaluation_worker.py"), str(folder / "start"), str(folder), str(draws)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300 + 20 * draws,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads((folder / "rank0.json").read_text())


@pytest.mark.parametrize("case", list(CASES))
def test_scores_of_two_processes_are_those_of_one(scores, case):
    """Every dim, layer and precision, with prompts."""
    shared, alone = scores[case]["shared"], scores[case]["alone"]
    assert len(alone) > 20
    for key, value in alone.items():
        assert shared[f"eval_{key}"] == pytest.approx(value, abs=1e-5), key


@pytest.mark.slow
def test_many_drawn_models_and_evaluators(tmp_path, transformer_folder):
    """More of the same."""
    assert len(two_processes(tmp_path, transformer_folder, 60)["draws"]) == 60
