"""Stored vectors to codes: equal to the whole array's, whole pieces, the same bytes however a run went."""

import json
import logging
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402
from safetensors.torch import save_file as save_tensors  # noqa: E402

from mipic_st import Rotation, rotate_files  # noqa: E402
from mipic_st.stored import formats, job  # noqa: E402
from mipic_st.stored.job import neighbors_kept  # noqa: E402
from stored_fixtures import WIDTH, random_rotation, random_vectors, reads_nulls, table_of  # noqa: E402

VECTORS = random_vectors(450)


@pytest.fixture(scope="module")
def rotation():
    return random_rotation()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces of 100 rows, batches of 32, row groups of 70."""
    monkeypatch.setattr(formats, "PIECE", 100)
    monkeypatch.setattr(formats, "BATCH", 32)
    monkeypatch.setattr(formats, "_GROUP_ROWS", 70)


def write(place, vectors=VECTORS, column="embedding"):
    """A file of the kind that the name says; Parquet in row groups of 60 rows."""
    if place.suffix == ".npy":
        np.save(place, vectors)
    elif place.suffix == ".safetensors":
        save_file({column: vectors, "other": np.zeros(3)}, place)
    elif place.suffix == ".lance":
        pytest.importorskip("lance", reason="needs the serve extra").write_dataset(table_of(vectors), str(place))
    else:
        pq.write_table(table_of(vectors), place, row_group_size=60)
    return place


def run(source, folder, rotation, **options):
    """Without a bar; the rotation by way of a file, which is copied."""
    if rotation is not None:
        path = source.parent / f"{rotation.fingerprint}.rotation"
        if not path.exists():
            rotation.save(path)
        rotation = path
    return rotate_files(source, folder, rotation, **{"dim": 8, "show_progress_bar": False, **options})


def read(folder, made):
    """Codes in the order of the manifest, as lists."""
    rows = []
    for piece in made["pieces"]:
        path = folder / piece["file"]
        if path.suffix == ".parquet":
            rows += pq.read_table(path)["embedding"].to_pylist()
        else:
            rows += (np.load(path) if path.suffix == ".npy" else load_file(path)["embedding"]).tolist()
    return rows


def content(folder):
    """Bytes of all files, by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("precision", ["int8", "float16", "int4"])
@pytest.mark.parametrize("name", ["in.parquet", "in.npy", "in.safetensors", "in.lance"])
def test_codes_are_those_of_the_whole_array(tmp_path, rotation, name, precision):
    """Row by row, in several pieces; other columns of tables come along."""
    source, out = write(tmp_path / name), tmp_path / "out"
    made = run(source, out, rotation, precision=precision)
    assert read(out, made) == rotation.encode(VECTORS, dim=8, precision=precision).tolist()
    suffix = ".parquet" if name == "in.lance" else source.suffix
    count = 4 if name == "in.parquet" else 5  # two row groups of 60 rows make a piece
    files = [f"in-{number:05d}-of-{count:05d}{suffix}" for number in range(count)]
    assert [piece["file"] for piece in made["pieces"]] == files
    assert sorted(content(out)) == sorted([*files, "_manifest.json", "_rotation.safetensors"])
    assert made["rows"] == 450
    assert made["failed"] == []
    assert made == json.loads((out / "_manifest.json").read_text())
    assert Rotation.load(out / "_rotation.safetensors").fingerprint == rotation.fingerprint
    if suffix == ".parquet":
        # as engines read it, which pass over names with _
        table = pq.read_table(out)
        assert table.drop(["embedding"]).equals(table_of(VECTORS).drop(["embedding"]))
        assert json.loads(table.schema.metadata[b"mipic_st"]) == made["note"]
    if suffix == ".safetensors":
        with formats.Safetensors(out / files[0], "embedding")._open() as file:
            assert json.loads(file.metadata()["mipic_st"]) == made["note"]


def test_folders_keep_their_layout(tmp_path, rotation):
    """Files of a folder and below; hidden ones and those with _ do not count; a small file keeps its name."""
    (tmp_path / "in" / "day=1").mkdir(parents=True)
    (tmp_path / "in" / "_old").mkdir()
    write(tmp_path / "in" / "b.parquet", VECTORS[:50])
    write(tmp_path / "in" / "day=1" / "a.parquet", VECTORS[50:80])
    for name in ("_old/c.parquet", ".d.parquet", "_e.parquet"):
        (tmp_path / "in" / name).write_text("x")
    (tmp_path / "in" / "readme.txt").write_text("x")
    made = run(tmp_path / "in", tmp_path / "out", rotation)
    assert [piece["file"] for piece in made["pieces"]] == ["b.parquet", "day=1/a.parquet"]
    assert read(tmp_path / "out", made) == rotation.encode(VECTORS[:80], dim=8).tolist()


@pytest.mark.parametrize("batch", [7, 450])
def test_workers_and_batches_change_no_byte(tmp_path, rotation, monkeypatch, batch):
    """Two threads, and other batches."""
    source = write(tmp_path / "in.npy")
    run(source, tmp_path / "one", rotation, workers=1)
    monkeypatch.setattr(formats, "BATCH", batch)
    run(source, tmp_path / "two", rotation, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_large_row_group_is_not_held_in_memory(tmp_path):
    """Read page by page: Arrow's own peak stays below half of the 51 MB of the one row group."""
    pq.write_table(table_of(random_vectors(200_000, 64)), tmp_path / "in.parquet")
    script = (
        "import pathlib, pyarrow as pa; from mipic_st.stored.formats import Parquet\n"
        "rows = sum(len(batch) for batch in Parquet(pathlib.Path('in.parquet'), 'embedding').batches(0, 200_000))\n"
        "print(rows, pa.default_memory_pool().max_memory())"
    )
    path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, env=path, capture_output=True)
    rows, peak = map(int, done.stdout.split())
    assert rows == 200_000
    assert peak < 25e6


# --- ended and resumed ------------------------------------------------------------------------------------------------


class Ended(BaseException):
    """What a killed process looks like from within."""


@pytest.mark.parametrize("name", ["in.parquet", "in.npy", "in.safetensors"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_resumed_run_has_the_bytes_of_an_undisturbed_one(tmp_path, rotation, monkeypatch, name, workers):
    """Ended in the third piece: the first two stay as they are, the rest is written, nothing else is left."""
    source = write(tmp_path / name)
    run(source, tmp_path / "whole", rotation)
    coded, seen = job.RotateVectors.coded, []

    def ending(rotate, batch):
        seen.append(batch)
        if len(seen) == 11:
            raise Ended
        return coded(rotate, batch)

    out = tmp_path / "out"
    with monkeypatch.context() as patched, pytest.raises(Ended):
        patched.setattr(job.RotateVectors, "coded", ending)
        run(source, out, rotation, workers=workers)
    there = {path: path.stat().st_mtime_ns for path in out.glob("in-*")}
    assert 0 < len(there) < len(list((tmp_path / "whole").glob("in-*")))
    # as a process that was killed leaves it
    (out / f".in-00003-of-00004-123-aabbccdd{source.suffix}").write_text("half")
    run(source, out, rotation, resume=True)
    assert content(out) == content(tmp_path / "whole")
    for path, time_written in there.items():
        assert path.stat().st_mtime_ns == time_written
    # once more: all is there
    run(source, out, rotation, resume=True)
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.rglob(".*"))


@pytest.mark.slow
def test_a_killed_process_is_resumed_by_the_command(tmp_path, rotation):
    """SIGKILL in the middle, then --resume: the same bytes as an undisturbed run."""
    source = tmp_path / "in.parquet"
    pq.write_table(table_of(np.tile(random_vectors(20_000), (60, 1))), source, row_group_size=2**18)
    rotation.save(tmp_path / "r.safetensors")
    words = ["vectors", str(source), "--rotation", str(tmp_path / "r.safetensors"), "--dim", "8", "--workers", "1"]

    def command(out, *more):
        return [sys.executable, "-m", "mipic_st", *words, "--output", str(tmp_path / out), *more]

    process = subprocess.Popen(command("out"), env={"PYTHONPATH": ":".join(sys.path)}, stderr=subprocess.PIPE)
    while not list((tmp_path / "out").glob("_unfinished/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out" / "in-00004-of-00005.parquet").exists()
    for out, more in (("out", ["--resume"]), ("whole", [])):
        subprocess.run(command(out, *more), check=True, env={"PYTHONPATH": ":".join(sys.path)})
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.mark.parametrize(
    "change",
    [
        lambda source: write(source, VECTORS[:130]),
        lambda source: write(source, np.concatenate([VECTORS, VECTORS])),
        lambda source: write(source, VECTORS[::-1].copy()),
    ],
    ids=["shorter", "longer", "as long"],
)
@pytest.mark.parametrize("name", ["in.npy", "in.parquet"])
def test_a_source_that_changes_meanwhile_is_no_result(tmp_path, rotation, monkeypatch, name, change):
    """Rewritten between the plan and the work: said, and a run that goes on codes what is there now."""
    source, convert = write(tmp_path / name), job._convert
    monkeypatch.setattr(job, "_convert", lambda *given: (change(source), convert(*given))[1])
    with pytest.raises(ValueError, match="the source was changed meanwhile"):
        run(source, tmp_path / "out", rotation)
    monkeypatch.undo()
    made = run(source, tmp_path / "out", rotation)
    stored = np.load(source) if name == "in.npy" else np.stack(pq.read_table(source)["embedding"].to_numpy())
    assert read(tmp_path / "out", made) == rotation.encode(stored, dim=8).tolist()


def test_two_runs_into_one_folder(tmp_path, rotation, monkeypatch):
    """The second is refused while the first one works, and after it; what the first one writes is whole."""
    source, out, convert = write(tmp_path / "in.npy"), tmp_path / "out", job._convert
    refused = []

    def second(*given):
        for options in ({}, {"resume": True}):
            with pytest.raises(ValueError, match=r"another process is writing there|is not empty") as error:
                run(source, out, rotation, **options)
            refused.append(str(error.value))
        return convert(*given)

    monkeypatch.setattr(job, "_convert", second)
    made = run(source, out, rotation)
    assert [("another process" in message) for message in refused] == [False, True]
    assert read(out, made) == rotation.encode(VECTORS, dim=8).tolist()
    before = content(out)
    monkeypatch.setattr(job, "_earlier", lambda *given: None)  # as it was before the first one began
    with pytest.raises(ValueError, match=r"another run has written into .* meanwhile"):
        run(source, out, rotation)
    assert content(out) == before


def test_a_changed_source_is_read_again(tmp_path, rotation, monkeypatch):
    """A file that has other content now is coded again on --resume; one that is new is coded too."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        write(tmp_path / "in" / f"{name}.npy", VECTORS[:50])
    (tmp_path / "in" / "c.npy").write_text("damaged")
    run(tmp_path / "in", tmp_path / "out", rotation)
    write(tmp_path / "in" / "b.npy", VECTORS[50:110])
    write(tmp_path / "in" / "c.npy", VECTORS[110:120])
    made = run(tmp_path / "in", tmp_path / "out", rotation, resume=True)
    wanted = np.concatenate([VECTORS[:50], VECTORS[50:120]])
    assert read(tmp_path / "out", made) == rotation.encode(wanted, dim=8).tolist()
    assert made["failed"] == []


# --- refused ----------------------------------------------------------------------------------------------------------


def test_folders_with_content_are_refused(tmp_path, rotation):
    """Whatever is in it; with resume, if it is not of an earlier run."""
    source, out = write(tmp_path / "in.npy"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty; go on with resume=True \(--resume\), or name a new one"):
        run(source, out, rotation)
    with pytest.raises(ValueError, match=r"has no _manifest.json of an earlier run, or name a new one"):
        run(source, out, rotation, resume=True)
    assert content(out) == {"mine.txt": b"x"}
    with pytest.raises(ValueError, match="is a file; name a new one"):
        run(source, source, rotation)
    with pytest.raises(ValueError, match=r"is in .*, which is read: name another"):
        run(tmp_path, tmp_path / "new", rotation)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rotation": random_rotation(1)}, r"was made with rotation '\w+' and not '\w+'"),
        ({"dim": 16}, "was made with dim 8 and not 16"),
        ({"precision": "int4"}, "was made with precision 'int8' and not 'int4'"),
        ({"model": "other"}, "was made with model '' and not 'other'"),
        ({"seed": 1}, "was made with seed 0 and not 1"),
    ],
)
def test_a_folder_of_other_settings_is_not_gone_on_with(tmp_path, rotation, changed, message):
    """Nor is one of another source."""
    source, out = write(tmp_path / "in.npy"), tmp_path / "out"
    run(source, out, rotation)
    before = content(out)
    with pytest.raises(ValueError, match=f"{message}.*: name a new folder"):
        run(source, out, changed.pop("rotation", rotation), resume=True, **changed)
    with pytest.raises(ValueError, match=r"source 'in\.npy' and not 'b\.npy'"):
        run(write(tmp_path / "b.npy"), out, rotation, resume=True)
    assert content(out) == before


@pytest.mark.parametrize("name", ["in.parquet", "in.npy", "in.safetensors"])
def test_codes_are_not_coded_again(tmp_path, rotation, name):
    """A folder that was coded, a file of it, and, where the file itself says so, one that was moved away."""
    source, out = write(tmp_path / name, VECTORS[:50]), tmp_path / "out"
    run(source, out, rotation, dim=WIDTH, precision="float32")
    for again in (out, out / name):
        with pytest.raises(ValueError, match=r"was coded before, see _manifest\.json there"):
            run(again, tmp_path / "again", rotation)
    if name != "in.npy":
        (tmp_path / "moved").mkdir()
        shutil.copy(out / name, tmp_path / "moved" / name)
        with pytest.raises(ValueError, match=r"was coded by this rotation before \(24 dims, float32"):
            run(tmp_path / "moved" / name, tmp_path / "again", rotation)
    run(source, tmp_path / "codes", rotation)
    shutil.copy(tmp_path / "codes" / name, tmp_path / name)
    with pytest.raises((ValueError, TypeError), match=r"coded by|are these codes already\?"):
        run(tmp_path / name, tmp_path / "again", rotation)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 25}, "dim"),
        ({"precision": "int3"}, "precision must be one of"),
        ({"workers": 0}, "workers must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"column": "vectors"}, r"no one column 'vectors'; the columns are \['id', 'embedding', 'text'\]"),
        ({"rotation": None, "fit_rows": 3}, "fit_rows must be an integer >= 12"),
    ],
)
def test_wrong_arguments_leave_nothing(tmp_path, rotation, options, message):
    """They are named; codes are not begun."""
    source = write(tmp_path / "in.parquet")
    with pytest.raises(ValueError, match=message):
        run(source, tmp_path / "out", options.pop("rotation", rotation), **options)
    assert not list(tmp_path.glob("out/in*"))


@pytest.mark.parametrize(
    ("lengths", "kind"),
    [(1e-25, np.float32), (1e250, np.float64)],
)
def test_vectors_of_any_length(tmp_path, rotation, lengths, kind):
    """Codes, fit and check of directions, also in floats whose squares are no float32."""
    lengths = np.where(np.arange(len(VECTORS)) % 3, lengths, 1)[:, None]
    made = {}
    for name, vectors in (("usual", VECTORS), ("odd", (VECTORS * lengths).astype(kind))):
        source = write(tmp_path / "in.npy", vectors)
        made[name] = run(source, tmp_path / name, rotation), run(source, tmp_path / f"{name}-fit", None)
    for usual, odd in zip(*made.values(), strict=True):
        assert usual["failed"] == odd["failed"] == []
        assert usual["check"] == pytest.approx(odd["check"], abs=1e-3)
    codes = [np.array(read(tmp_path / name, made[name][0])) for name in made]
    assert (codes[0] != codes[1]).mean() < 1e-3
    matrices = [abs(Rotation.load(tmp_path / f"{name}-fit" / "_rotation.safetensors").matrix) for name in made]
    np.testing.assert_allclose(*matrices, atol=2e-2)


@pytest.mark.parametrize("change", [np.asfortranarray, lambda vectors: vectors.astype(">f4")])
def test_arrays_of_other_layouts(tmp_path, rotation, change):
    """Columns first, and the bytes of another machine."""
    made = run(write(tmp_path / "in.npy", change(VECTORS)), tmp_path / "out", rotation)
    assert read(tmp_path / "out", made) == rotation.encode(VECTORS, dim=8).tolist()


def test_folders_that_are_called_files(tmp_path, rotation):
    """As Spark writes them, on their own and among others."""
    place = tmp_path / "in" / "day.parquet"
    place.mkdir(parents=True)
    for number in range(2):
        write(place / f"part-{number}.parquet", VECTORS[:70])
    for source, folder in ((place, ""), (place.parent, "day.parquet/")):
        out = tmp_path / f"out-{source.name}"
        made = run(source, out, rotation)
        assert [piece["file"] for piece in made["pieces"]] == [f"{folder}part-{number}.parquet" for number in range(2)]
        assert run(source, out, rotation, resume=True) == made


def test_names_as_long_as_the_file_system_takes(tmp_path, rotation):
    """In bytes, and of other letters than ours; what an ended run left of them goes."""
    (tmp_path / "in").mkdir()
    for name in ("n" * 247, "ü" * 123, "a\nb"):
        write(tmp_path / "in" / f"{name}.parquet", VECTORS[:50])
    made = run(tmp_path / "in", tmp_path / "out", rotation)
    assert (made["rows"], made["failed"]) == (150, [])


def test_places_without_vectors(tmp_path, rotation):
    """Nothing there, another kind of file, no file, two kinds."""
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*none\.npy"):
        run(tmp_path / "none.npy", tmp_path / "out", rotation)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(ValueError, match=r"a\.csv must end with \.parquet, \.npy, \.safetensors, \.lance"):
        run(tmp_path / "a.csv", tmp_path / "out", rotation)
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=r"in has no files of \.parquet, \.npy, "):
        run(tmp_path / "in", tmp_path / "out", rotation)
    for name in ("a.npy", "b.parquet"):
        write(tmp_path / "in" / name)
    with pytest.raises(ValueError, match=r"has files of \.npy, \.parquet: name one of them"):
        run(tmp_path / "in", tmp_path / "out", rotation)
    assert not (tmp_path / "out").exists()


# --- faults -----------------------------------------------------------------------------------------------------------


def test_one_bad_file_among_many_is_named_and_the_rest_is_coded(tmp_path, rotation):
    """Damaged, empty, cut off in the middle, of another width, without the column; repaired, it goes on."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "cut", "none", "other", "width", "z"):
        write(folder / f"{name}.parquet", VECTORS[:90])
    good = (folder / "a.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(good[: len(good) // 2])
    (folder / "none.parquet").write_bytes(b"")
    write(folder / "width.parquet", random_vectors(30, 12))
    pq.write_table(pa.table({"vectors": [[1.0]]}), folder / "other.parquet")
    # a page of the second row group: only this piece is lost
    write(folder / "page.parquet", VECTORS[:200])
    bytes_of_page = bytearray((folder / "page.parquet").read_bytes())
    place = pq.ParquetFile(folder / "page.parquet").metadata.row_group(2).column(1).dictionary_page_offset
    bytes_of_page[place : place + 40] = b"\xff" * 40
    (folder / "page.parquet").write_bytes(bytes_of_page)
    made = run(folder, out, rotation)
    assert {part["source"] for part in made["failed"]} == {
        f"{name}.parquet" for name in ("cut", "none", "other", "page", "width")
    }
    errors = {part["source"]: part["error"] for part in made["failed"]}
    assert "width 12, this rotation is for 24" in errors["width.parquet"]
    assert "no one column 'embedding'; the columns are ['vectors']" in errors["other.parquet"]
    lost = next(part for part in made["failed"] if part["source"] == "page.parquet")
    assert (lost["first_row"], lost["rows"]) == (120, 80)
    assert [piece["file"] for piece in made["pieces"]] == ["a.parquet", "page-00000-of-00002.parquet", "z.parquet"]
    wanted = rotation.encode(np.concatenate([VECTORS[:90], VECTORS[:120], VECTORS[:90]]), dim=8)
    assert read(out, made) == wanted.tolist()
    for name in ("cut", "none", "other", "width"):
        (folder / f"{name}.parquet").write_bytes(good)
    write(folder / "page.parquet", VECTORS[:200])
    repaired = run(folder, out, rotation, resume=True)
    assert repaired["failed"] == []
    run(folder, tmp_path / "whole", rotation)
    assert {name: data for name, data in content(out).items() if name[0] != "_"} == {
        name: data for name, data in content(tmp_path / "whole").items() if name[0] != "_"
    }


def test_nothing_but_bad_files(tmp_path, rotation):
    """An error that names one and its fault."""
    (tmp_path / "a.npy").write_text("x")
    with pytest.raises(ValueError, match=r"no file can be read; a\.npy: "):
        run(tmp_path / "a.npy", tmp_path / "out", rotation)
    save_tensors({"embedding": torch.ones(3, WIDTH, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"is of bfloat16, which NumPy does not have: save it in float32"):
        run(tmp_path / "a.safetensors", tmp_path / "out", rotation)
    write(tmp_path / "b.npy", random_vectors(20, 12))
    with pytest.raises(ValueError, match=r"no vector could be coded; b\.npy: .*width 12"):
        run(tmp_path / "b.npy", tmp_path / "out", rotation)


@reads_nulls
@pytest.mark.parametrize("name", ["in.parquet", "in.npy", "in.safetensors"])
def test_rows_without_a_code_are_named_by_file_and_row(tmp_path, rotation, name):
    """They are null, or zeros where a format has no nulls; every other row is what it would be without them."""
    vectors = VECTORS.copy()
    vectors[[5, 130], 3] = np.nan
    vectors[449] = 0
    made = run(write(tmp_path / name, vectors), tmp_path / "out", rotation)
    faulty = {int(row): fault for piece in made["pieces"] for row, fault in piece["faulty_rows"].items()}
    assert faulty == {5: "holds NaN or infinite values", 130: "holds NaN or infinite values", 449: "holds zeros only"}
    assert sum(piece["faults"] for piece in made["pieces"]) == 3
    wanted = rotation.encode(VECTORS, dim=8).tolist()
    for row in (5, 130, 449):
        wanted[row] = None if name == "in.parquet" else [0] * 8
    assert read(tmp_path / "out", made) == wanted
    assert made["check"]["rows"] == 447


@pytest.mark.parametrize("name", ["in.parquet", "in.npy", "in.safetensors", "in.lance"])
def test_a_file_without_rows_gives_one_without_rows(tmp_path, rotation, name):
    """Of the same columns as any other."""
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name, VECTORS[:0])
    write(tmp_path / "in" / f"b{name}", VECTORS[:5])
    made = run(tmp_path / "in", tmp_path / "out", rotation)
    assert made["failed"] == []
    assert [piece["rows"] for piece in made["pieces"]] == [5, 0]
    assert read(tmp_path / "out", made) == rotation.encode(VECTORS[:5], dim=8).tolist()


# --- fit and check ----------------------------------------------------------------------------------------------------


@reads_nulls
def test_a_fit_on_a_sample_is_saved_and_used(tmp_path):
    """Of all rows here, so it is the fit on the whole array in its order; resumed, it is not fitted again."""
    from mipic_st import fit_rotation

    vectors = VECTORS.copy()
    vectors[7] = np.nan
    source, out = write(tmp_path / "in.parquet", vectors), tmp_path / "out"
    made = run(source, out, None)
    fitted = fit_rotation(np.delete(vectors, 7, axis=0), dims=[8, 16], show_progress_bar=False)
    saved = Rotation.load(out / "_rotation.safetensors")
    assert saved.fingerprint == fitted.fingerprint == made["note"]["rotation"]
    assert read(out, made)[8:] == fitted.encode(vectors[8:], dim=8).tolist()
    before = content(out)
    assert run(source, out, None, resume=True) == made
    assert content(out) == before
    other = run(source, tmp_path / "other", None, fit_rows=100)
    assert other["note"]["rotation"] != made["note"]["rotation"]


def test_rows_are_chosen_evenly_and_by_seed(tmp_path):
    """Each row as often as any other, over all pieces; the same for the same seed."""
    (tmp_path / "in").mkdir()
    for name, count in (("a", 30), ("b", 250), ("c", 20)):
        write(tmp_path / "in" / f"{name}.npy", VECTORS[:count])
    work = job.plan(tmp_path / "in", "embedding")
    starts = np.cumsum([0, *map(len, work.pieces)])
    times = np.zeros(300)
    for seed in range(300):
        own = work.choose(60, seed)
        assert all(
            (rows >= 0).all() and (rows < len(piece)).all() for rows, piece in zip(own, work.pieces, strict=True)
        )
        times[np.concatenate([rows + start for rows, start in zip(own, starts, strict=False)])] += 1
    assert times.sum() == 300 * 60
    assert abs(times - 60).max() < 5 * np.sqrt(300 * 0.2 * 0.8)
    again = job.plan(tmp_path / "in", "embedding").choose(60, 299)
    assert all((a == b).all() for a, b in zip(own, again, strict=True))


def test_the_check_is_what_a_slow_search_finds(rotation):
    """Recall of the ten nearest, by loops, of codes as they are and of rotated ones."""
    from mipic_st import codes

    vectors = VECTORS[:120] * np.linspace(0.5, 2, 120, dtype=np.float32)[:, None]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    prefix = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    ranges = codes.Ranges.of(prefix)
    stored = codes.decode(codes.encode(prefix, "int4", ranges), "int4", ranges)
    rotated = rotation.decode(rotation.encode(vectors, dim=8, precision="int4"), dim=8, precision="int4")
    turned = rotation(vectors, 8)
    found = {"truncated": [], "rotated": []}
    for query in range(120):
        others = [row for row in range(120) if row != query]
        wanted = sorted(others, key=lambda row: -(unit[query] @ unit[row]))[:10]
        for name, asked, codes_of in (("truncated", prefix, stored), ("rotated", turned, rotated)):
            best = sorted(others, key=lambda row: -(asked[query] @ codes_of[row]))[:10]
            found[name].append(len({*best} & {*wanted}) / 10)
    checked = neighbors_kept(vectors, rotation, 8, "int4")
    assert (checked["rows"], checked["queries"], checked["neighbors"]) == (120, 120, 10)
    for name in found:
        assert checked[name] == pytest.approx(np.mean(found[name]), abs=0.005)
    assert checked["rotated"] > 0.2
    assert neighbors_kept(vectors[:1], rotation, 8, "int4") is None


def test_nothing_of_the_process_is_changed(tmp_path, rotation, caplog):
    """Threads of NumPy's products are what they were, and nothing is logged."""
    from threadpoolctl import threadpool_info, threadpool_limits

    with threadpool_limits(2, "blas"), caplog.at_level(logging.INFO):
        before = threadpool_info()
        run(write(tmp_path / "in.npy"), tmp_path / "out", rotation)
        assert threadpool_info() == before
    assert not caplog.records
