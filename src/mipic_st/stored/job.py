"""Code the vectors of files: piece by piece, each whole or not there, so that a run that was ended can go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import PathLike, cpu_count
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from mipic_st import codes
from mipic_st.files import only_writer, require_writable, write_json, write_whole
from mipic_st.stored.arrow import rows_of, width_of
from mipic_st.stored.formats import FORMATS
from mipic_st.stored.plan import Piece, Plan, plan
from mipic_st.stored.rotate import RotateVectors
from mipic_st.transforms.arrays import of_usual_length
from mipic_st.transforms.rotation import Rotation
from mipic_st.validation import checked_count, checked_dims, default_dims

MANIFEST, ROTATION, _STATE = "_manifest.json", "_rotation.safetensors", "_unfinished"
"""Next to the codes; readers of Parquet folders pass over names that begin with _."""

# Faulty rows of a piece that the manifest names; rows of the check, queries among them, neighbours of each.
_NAMED, _CHECKED, _QUERIES, _NEIGHBORS = 100, 10_000, 500, 10


def rotate_files(
    source: str | PathLike[str],
    folder: str | PathLike[str],
    rotation: Rotation | str | PathLike[str] | None,
    *,
    column: str = "embedding",
    dim: int,
    precision: str = "int8",
    model: str = "",
    fit_rows: int = 20_000,
    seed: int = 0,
    resume: bool = False,
    workers: int | None = None,
    show_progress_bar: bool = True,
) -> dict[str, Any]:
    """Rotate, truncate and code stored vectors into a new folder, in constant memory.

    The folder gets a file for each piece of about 260,000 rows, ``_rotation.safetensors`` and ``_manifest.json``. A
    piece is written next to its place and moved there, so each is whole. The same call gives the same bytes, whatever
    ``workers`` is and however often it was ended and resumed.

    Args:
        source: A file .parquet, .npy (N, D) or .safetensors, a Lance data set .lance, or a folder with files of one
            kind. Lance is written as Parquet.
        folder: A new or empty folder; one of an earlier run with ``resume``.
        rotation: The rotation, or its file; None fits one on ``fit_rows`` rows, which are read first.
        column: Of the vectors, or the name of the tensor.
        dim: Values to keep.
        precision: One of ``mipic_st.codes.PRECISIONS``.
        model: Name of the model that made the vectors, for the metadata.
        fit_rows: Rows that a rotation is fitted on, chosen at random.
        seed: Of the choice of rows, for the fit and for the check.
        resume: Keep the pieces that are there.
        workers: Pieces that are worked on at once. Default: the processor's cores, 8 at most.
        show_progress_bar: Show rows per second and the time left.

    Returns:
        What the manifest says: ``note`` (rotation, model, dim, precision, ranges), ``rows``, ``pieces`` with ``faults``
        (rows without a code, which are null, or zeros in .npy and .safetensors), ``failed`` (pieces and files that
        could not be coded, and why), ``check`` (how many neighbours of the full width the codes find in a sample).

    Raises:
        FileNotFoundError: If there is no such source.
        ValueError: If an argument is out of its range, the folder has content, or was made with other settings, or no
            file can be read.

    Example:
        >>> made = rotate_files("vectors.parquet", "codes", "r.safetensors", dim=64)  # doctest: +SKIP
        >>> made["check"]["rotated"]                                                  # doctest: +SKIP
        0.74
    """
    workers = min(8, cpu_count() or 1) if workers is None else checked_count("workers", workers)
    seed, folder, source = checked_count("seed", seed, least=0), Path(folder), Path(source)
    work = plan(source, column)
    if not work.pieces:
        name, error = next(iter(work.failed.items()))
        raise ValueError(f"no file can be read; {name}: {error}") from error
    made = _earlier(folder, source, resume)
    if rotation is None and (folder / ROTATION).exists():
        rotation = folder / ROTATION
    if rotation is None:
        rotation = _fitted(
            work, column, dim, checked_count("fit_rows", fit_rows, least=12), seed, workers, show_progress_bar
        )
    rotate = RotateVectors(rotation, column, dim=dim, precision=precision, model=model)
    settings = {"format": 1, "source": source.name, "seed": seed, "note": rotate.note}
    if made is not None and (other := [name for name in settings if made.get(name) != settings[name]]):
        raise ValueError(f"{folder} was made with {_differences(made, settings, other)}: name a new folder.")
    with only_writer(folder):
        if made is None:
            if any(folder.iterdir()):
                raise ValueError(f"another run has written into {folder} meanwhile: name a new folder.")
            given = None if isinstance(rotation, Rotation) else rotation
            save = rotate.rotation.save if given is None else partial(shutil.copyfile, given)
            write_whole(folder / ROTATION, save)
            write_whole(folder / MANIFEST, lambda path: write_json(path, settings))
        return _convert(work, folder, rotate, settings, workers, show_progress_bar)


def _earlier(folder: Path, source: Path, resume: bool) -> dict[str, Any] | None:
    """The manifest of an earlier run, if there was one; a folder that cannot be used is refused."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file; name a new one.")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"folder {str(folder)!r} is in {str(source)!r}, which is read: name another.")
    for place in (source, source.parent):
        if (place / MANIFEST).is_file():
            raise ValueError(f"{place} was coded before, see {MANIFEST} there: give the vectors that the model made.")
    manifest = folder / MANIFEST
    if resume and manifest.is_file():
        return json.loads(manifest.read_text(encoding="utf-8"))
    require_writable(folder)
    if folder.is_dir() and any(folder.iterdir()):
        hint = f" has no {MANIFEST} of an earlier run" if resume else " is not empty; go on with resume=True (--resume)"
        raise ValueError(f"folder {str(folder)!r}{hint}, or name a new one.")
    return None


def _differences(made: dict[str, Any], settings: dict[str, Any], names: Sequence[str]) -> str:
    if names != ["note"]:
        return ", ".join(f"{name} {made.get(name)!r} and not {settings[name]!r}" for name in names if name != "note")
    old, new = made["note"], settings["note"]
    differing = [name for name in new if name != "ranges" and old.get(name) != new[name]]
    return ", ".join(f"{name} {old.get(name)!r} and not {new[name]!r}" for name in differing) or "other ranges"


# --- pieces in several threads ----------------------------------------------------------------------------------------


def _each(
    work: Callable[[Piece, np.ndarray, Callable[[int], None]], Any],
    items: Sequence[tuple[Piece, np.ndarray]],
    workers: int,
    title: str | None,
) -> list[Any]:
    """Results of the work on each piece, or what went wrong; without a title no bar is shown."""
    from threadpoolctl import threadpool_limits
    from tqdm.auto import tqdm

    stop, lock = threading.Event(), threading.Lock()
    total = sum(len(piece) for piece, _ in items)

    def one(item: tuple[Piece, np.ndarray]) -> Any:
        try:
            return work(*item, tick)
        except Exception as error:  # of a damaged file it may be of any kind
            return error

    def tick(rows: int) -> None:
        if stop.is_set():
            raise InterruptedError
        with lock:
            progress.update(rows)

    # threads of the pieces and of each product of matrices would wait for each other
    with (
        threadpool_limits(1, "blas"),
        tqdm(total=total, desc=title, unit=" rows", unit_scale=True, disable=title is None) as progress,
    ):
        pool = ThreadPoolExecutor(workers)
        try:
            return list(pool.map(one, items))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fitted(work: Plan, column: str, dim: int, count: int, seed: int, workers: int, show: bool) -> Rotation:
    """A rotation of some of the rows, of the width that most of them have."""
    from mipic_st.transforms.rotation_fit import fit_rotation

    items = list(zip(work.pieces, work.choose(count, seed), strict=True))
    found = _each(partial(_sample, column), items, workers, "Sample" if show else None)
    parts = [part for part in found if not isinstance(part, Exception) and len(part)]
    if not parts:
        raise next((error for error in found if isinstance(error, Exception)), ValueError("there are no vectors."))
    width = Counter(part.shape[1] for part in parts for _ in part).most_common(1)[0][0]
    (dim,) = checked_dims("dim", [dim], width)
    dims = sorted({*default_dims(width), dim} - {width})
    sample = np.concatenate([part for part in parts if part.shape[1] == width])
    return fit_rotation(sample, dims=dims, seed=seed, show_progress_bar=show)


def _sample(column: str, piece: Piece, own: np.ndarray, tick: Callable[[int], None]) -> np.ndarray:
    """Vectors of the chosen rows of a piece, without those that are no directions."""
    found = []
    for batch, chosen in piece.chosen(own):
        vectors = batch.column(column).take(chosen)
        rows = rows_of(column, vectors, width_of(vectors)).vectors
        found.append(of_usual_length(rows[np.isfinite(rows).all(axis=1) & rows.any(axis=1)]))
        tick(batch.num_rows)
    widths = Counter(part.shape[1] for part in found for _ in part)
    width = widths.most_common(1)[0][0] if widths else 0
    return np.concatenate([part for part in found if part.shape[1] == width] or [np.empty((0, 0), np.float32)])


# --- codes ------------------------------------------------------------------------------------------------------------


def _convert(
    work: Plan, folder: Path, rotate: RotateVectors, settings: dict[str, Any], workers: int, show: bool
) -> Any:
    """All pieces that are not there yet, the check, and the manifest."""
    _remove_strangers(work, folder)
    chosen = dict(zip((piece.target for piece in work.pieces), work.choose(_CHECKED, settings["seed"]), strict=True))
    todo = [(piece, chosen[piece.target]) for piece in work.pieces if _finished(piece, folder) is None]
    code = partial(_code, folder, rotate)
    errors = zip((piece for piece, _ in todo), _each(code, todo, workers, "Codes" if show else None), strict=True)
    failed: list[dict[str, Any]] = [{"source": name, "error": str(error)} for name, error in work.failed.items()]
    failed += [
        {"source": piece.source, "first_row": piece.start, "rows": len(piece), "error": str(error)}
        for piece, error in errors
        if error is not None
    ]
    there = [part for piece in work.pieces if (part := _finished(piece, folder)) is not None]
    if not there:
        for name in (MANIFEST, ROTATION):
            (folder / name).unlink()
        raise ValueError(f"no vector could be coded; {failed[0]['source']}: {failed[0]['error']}")
    sample = np.concatenate([vectors for _, vectors in there])
    made = settings | {
        "rows": sum(entry["rows"] for entry, _ in there),
        "pieces": [entry for entry, _ in there],
        "failed": failed,
        "check": neighbors_kept(sample, rotate.rotation, rotate.dim, rotate.precision),
    }
    write_whole(folder / MANIFEST, lambda path: write_json(path, made))
    if not failed:
        shutil.rmtree(folder / _STATE)
    return made


def _code(folder: Path, rotate: RotateVectors, piece: Piece, own: np.ndarray, tick: Callable[[int], None]) -> None:
    """Write one piece, then what is needed to go on behind it: its entry of the manifest and rows for the check."""
    sample = [np.empty((0, rotate.width), np.float32)]
    faults: dict[int, str] = {}

    def write(path: Path) -> None:
        writer, first = piece.data.writer(path, rotate.column), piece.start
        for batch, chosen in piece.chosen(own):
            coded, found = rotate.coded(batch)
            vectors = batch.column(rotate.column).take(chosen[~np.isin(chosen, list(found))])
            sample.append(of_usual_length(rows_of(rotate.column, vectors, rotate.width).vectors))
            faults.update((first + row, fault) for row, fault in found.items())
            writer.write(coded)
            first += batch.num_rows
            tick(batch.num_rows)
        writer.close()
        if first != piece.stop or piece.data.state() != piece.state:
            raise ValueError("the source was changed meanwhile; go on with resume=True (--resume)")

    write_whole(folder / piece.target, write)
    entry = {
        "file": piece.target,
        "source": piece.source,
        "first_row": piece.start,
        "rows": len(piece),
        "faults": len(faults),
        "faulty_rows": dict(list(faults.items())[:_NAMED]),
        "bytes": (folder / piece.target).stat().st_size,
    }
    notes = {"entry": json.dumps(entry), "key": json.dumps(piece.key)}
    write_whole(_state(piece, folder), lambda path: save_file({"sample": np.concatenate(sample)}, path, metadata=notes))


def _state(piece: Piece, folder: Path) -> Path:
    return folder / _STATE / f"{hashlib.sha256(piece.target.encode()).hexdigest()}.safetensors"


def _finished(piece: Piece, folder: Path) -> tuple[dict[str, Any], np.ndarray] | None:
    """The entry and the sample of a piece that is there as it should be."""
    state, target = _state(piece, folder), folder / piece.target
    if not (state.is_file() and target.is_file()):
        return None
    with safe_open(state, framework="numpy") as file:
        entry, key = (json.loads(file.metadata()[name]) for name in ("entry", "key"))
        same = key == piece.key and entry["bytes"] == target.stat().st_size
        return (entry, file.get_tensor("sample")) if same else None


def _remove_strangers(work: Plan, folder: Path) -> None:
    """What an ended run left half written is removed; files of other sources are refused."""
    targets = {folder / piece.target for piece in work.pieces}
    for path in folder.rglob("*"):
        if (
            path.is_dir()
            or path.suffix not in FORMATS
            or _STATE in path.relative_to(folder).parts
            or path.name == ROTATION
        ):
            continue
        if path.name.startswith("."):
            path.unlink()
        elif path not in targets:
            raise ValueError(f"{path} is of another source than this: name a new folder.")


# --- the check --------------------------------------------------------------------------------------------------------


def neighbors_kept(vectors: np.ndarray, rotation: Rotation, dim: int, precision: str) -> dict[str, Any] | None:
    """Recall of the full width's neighbours in a sample: of codes of the first values as they are, and of rotated ones.

    ``vectors``, (N, D), are finite and not zero; None for one row, which has no neighbour.
    """
    if len(vectors) < 2:
        return None
    queries, neighbors = vectors[:_QUERIES], min(_NEIGHBORS, len(vectors) - 1)
    full = _unit(vectors)
    wanted = _nearest(full[: len(queries)] @ full.T, neighbors)
    prefixes = _unit(vectors[:, :dim])
    ranges = codes.Ranges.of(prefixes)
    coded = codes.encode(prefixes, precision, ranges)
    before = codes.scores(prefixes[: len(queries)], coded, precision, ranges)
    coded = rotation.encode(vectors, dim=dim, precision=precision)
    after = rotation.scores(queries, coded, dim=dim, precision=precision)
    found = {"truncated": before, "rotated": after}
    return {"rows": len(vectors), "queries": len(queries), "neighbors": neighbors} | {
        name: float((_nearest(scores, neighbors)[:, :, None] == wanted[:, None, :]).any(axis=1).mean())
        for name, scores in found.items()
    }


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


def _nearest(scores: np.ndarray, count: int) -> np.ndarray:
    """The best rows for each query, in any order; the queries are the first rows and do not find themselves."""
    scores[np.arange(len(scores)), np.arange(len(scores))] = -np.inf
    return np.argpartition(-scores, count - 1, axis=1)[:, :count]
