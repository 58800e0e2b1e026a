"""MTEB tasks at several dims: every text of a task is encoded once, every dim has its own result files.

mteb's own task classes, prompts, result format and folders are used; only the vectors come from an `EmbeddingStore`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.codes import bytes_per_vector, needs_ranges
from mipic_st.encoder.fingerprint import fingerprint, model_name_of
from mipic_st.encoder.structure import unwrap
from mipic_st.evaluation.coded import (
    SCORED_TEXTS,
    SCORINGS,
    check_calibration,
    check_precisions,
    how_coded,
)
from mipic_st.evaluation.mteb_data import with_listed_columns
from mipic_st.evaluation.store import MEMORY_LIMIT, EmbeddingStore
from mipic_st.evaluation.tasks import Job, NotLoadedError, resolve_jobs
from mipic_st.files import require_writable, write_whole
from mipic_st.validation import checked_choice, checked_count, checked_dims, checked_flag, require

if TYPE_CHECKING:
    from mipic_st.codes import Ranges
    from mipic_st.evaluation.report import EvaluationReport

logger = logging.getLogger(__name__)

_Cell = tuple[int, str]


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Keep the caller's random state: mteb reseeds random, numpy and torch on import, per task, per run."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@_random_state_kept()
def evaluate_mteb(
    model: SentenceTransformer,
    tasks: str | Sequence[Any],
    dims: Sequence[int],
    *,
    output: str | Path,
    model_name: str | None = None,
    data_dir: str | Path | None = None,
    precisions: Sequence[str] = ("float32",),
    scoring: str = "symmetric",
    calibration: str | Sequence[str] | Mapping[int, Ranges] = SCORED_TEXTS,
    batch_size: int = 32,
    normalize: bool = True,
    overwrite: bool = False,
    skip_missing: bool = False,
    show_progress_bar: bool = True,
    memory_limit: int | None = MEMORY_LIMIT,
    device: str | Sequence[str] | None = None,
) -> EvaluationReport:
    """Run MTEB tasks at several dims with one encoding of each task's texts.

    Results are mteb's own files under ``output/results``, one folder per model and revision (its `fingerprint`): the
    full width in the folder itself, every other dim and precision as one of mteb's experiments
    (``.../experiments/embed_dim_64__output_dtypes_int8/STS13.json``). ``mteb.ResultCache(output).load_results()`` gives
    the full width, ``load_results(experiment_kwargs={"embed_dim": 64})`` one dim. Codes that mteb would not make in the
    same way (asymmetric, calibrated on other texts, int4, bits) have ``scoring`` and ``calibration`` as further keys. A
    task given by name is not run again where its file is there; a task object is run each time, and its scores are in
    the report only. Several runs may share a folder. The caller's random state is left as it was.

    A score is the mean over the task's own splits and subsets. A task that was narrowed to some of them says so in its
    name: ``STS22 (en, fr)``.

    Args:
        model: The model.
        tasks: A group (see `TASK_GROUPS`), the name of a task or of an mteb benchmark, a task object, or a list of
            these. An object that holds data already is scored on that data, under its own name.
        dims: Distinct dims, 1 to the model's width.
        output: Folder of the results.
        model_name: Name in results and tables; None takes the hub name or ``local/<folder>``.
        data_dir: Folder with local data, looked at before the hub: ``<task>_<split>.csv`` in small letters without
            "Classification" (``sts13_test.csv``, ``banking77_train.csv``), or ``<Task>/<split>.csv`` (or ``.parquet``,
            ``.jsonl``). Columns: STS ``sentence1, sentence2, score``; classification ``text, label``; pairs
            ``sentence1, sentence2, labels``. A file must hold as many rows as MTEB's set. Data that is not known to be
            MTEB's own (STS13, STS14, STS15, Banking77Classification) is reported as local, ``STS16-local-`` and a
            digest.
        precisions: As in `MatryoshkaEvaluator`, like ``scoring`` and ``calibration``. Tasks of retrieval and reranking
            tell queries from documents; of all others, all texts are coded.
        scoring: ``"symmetric"`` or ``"asymmetric"``.
        calibration: By default the scored texts of the task, since mteb has no others.
        batch_size: Texts per forward pass.
        normalize: Renormalise after the cut; the full width stays as the model gives it.
        overwrite: Run again what is there; a damaged result file is replaced.
        skip_missing: Leave out tasks whose data is missing, with a warning, instead of raising.
        show_progress_bar: Show a bar over cells.
        memory_limit: Bytes of a task's vectors that stay in memory, 512 MiB by default; above it they go to a temporary
            file. None sets no limit.
        device: One device, or a list of devices for one process each; None takes the model's.

    Returns:
        A report with one row per (task, dim, precision).

    Raises:
        ImportError: If mteb is missing.
        ValueError: If a task is unknown, or given twice and once as an object, dims do not fit, a local file has other
            columns or rows than MTEB's set, or a result file is damaged.
        FileNotFoundError: If a task's data cannot be had, before anything is encoded.

    Example:
        >>> print(evaluate_mteb(model, "sts", [32, 384], output="results").to_markdown())  # doctest: +SKIP
    """
    precisions = check_precisions(precisions)
    normalize, overwrite = checked_flag("normalize", normalize), checked_flag("overwrite", overwrite)
    skip_missing, batch_size = checked_flag("skip_missing", skip_missing), checked_count("batch_size", batch_size)
    model, data_dir = unwrap(model), None if data_dir is None else Path(data_dir)
    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a folder.")
    require_writable(output)
    with EmbeddingStore(model, memory_limit=memory_limit, device=device) as store:
        dims = sorted(checked_dims("dims", dims, store.width))
        cells = [(dim, precision) for precision in precisions for dim in dims]
        calibration = check_calibration(calibration, dims)
        checked_choice("scoring", scoring, SCORINGS)
        run = _Run(
            model, store, cells, Path(output), model_name, scoring, calibration, normalize, overwrite, batch_size
        )
        jobs = _with_data(resolve_jobs(tasks, data_dir), run, data_dir, skip_missing)
        return run.report(jobs, skip_missing, show_progress_bar)


def _with_data(jobs: list[Job], run: _Run, data_dir: Path | None, skip_missing: bool) -> list[Job]:
    """The jobs that have results or data; the others raise, or with ``skip_missing`` are named in a warning."""
    reasons = {job.label: [] if run.is_complete(job) else job.why_not_loaded() for job in jobs}
    if absent := [label for label, found in reasons.items() if found]:
        where = "no data_dir was given" if data_dir is None else f"not in {str(data_dir)!r}"
        why = "; ".join(reason for found in reasons.values() for reason in found)
        message = (
            f"no data for {', '.join(absent)}: {where}, and loading it failed: {why}. "
            "Put files into data_dir (--data-dir), or leave these tasks out; skip_missing (--skip-missing) does."
        )
        if not skip_missing:
            raise FileNotFoundError(message)
        logger.warning(message)
    return [job for job in jobs if job.label not in absent]


class _Run:
    """Jobs on views of a store under mteb's own protocol, with their result files."""

    def __init__(
        self,
        model: SentenceTransformer,
        store: EmbeddingStore,
        cells: list[_Cell],
        output: Path,
        model_name: str | None,
        scoring: str,
        calibration: Any,
        normalize: bool,
        overwrite: bool,
        batch_size: int,
    ) -> None:
        self.mteb = require("mteb", "MTEB tasks need mteb", "eval")
        self.name, self.revision = model_name_of(model, model_name), fingerprint(model)
        self.store, self.cells, self.normalize, self.overwrite = store, cells, normalize, overwrite
        self.scoring, self.calibration = scoring, calibration
        self.ranges = calibration if isinstance(calibration, dict) else None
        self.files = self.mteb.ResultCache(output)
        self.encode_kwargs = {"batch_size": batch_size, "show_progress_bar": False}
        self.encoder = self.mteb.models.SentenceTransformerEncoderWrapper(model)

    def report(self, jobs: list[Job], skip_missing: bool, show_progress_bar: bool) -> EvaluationReport:
        """Main scores of all cells of the jobs, from the files or run now."""
        from tqdm.auto import tqdm

        from mipic_st.evaluation.report import EvaluationReport

        records: list[dict[str, Any]] = []
        model_row = {"model": self.name, "revision": self.revision}
        total = len(self.cells) * sum(len(job.leaves()) for job in jobs)
        with tqdm(total=total, desc="MTEB", disable=not show_progress_bar) as progress:
            for job in jobs:
                try:
                    found = self.scored(job, progress)
                except NotLoadedError as error:
                    if not skip_missing:
                        raise
                    logger.warning(str(error))
                    continue
                job_row = {"task": job.label, "metric": str(job.task.metadata.main_score)}
                for (dim, precision), result in found.items():
                    cell = {"dim": dim, "precision": precision, "bytes": bytes_per_vector(dim, precision)}
                    cell |= how_coded(precision, self.scoring, self.calibration)
                    records.append({**model_row, **job_row, **cell, "score": _main_score(result)})
        return EvaluationReport(records)

    def scored(self, job: Job, progress: Any) -> dict[_Cell, Any]:
        """Results of a job by cell; what the files lack is run and written."""
        found = {cell: self.load(job, cell) for cell in self.cells}
        if not any(job.missing(result) for result in found.values()):
            progress.update(len(self.cells) * len(job.leaves()))
        elif job.parts:
            parts = [self.scored(part, progress) for part in job.parts]
            for cell in self.cells:
                found[cell] = job.task.combine_task_results([part[cell] for part in parts])
                self.save(job, cell, found[cell])
        else:
            with job.data(), self.store:
                self._run_cells(job, found, progress)
        return found

    def _run_cells(self, job: Job, found: dict[_Cell, Any], progress: Any) -> None:
        everything, complete = job.missing(None), False
        for cell in self.cells:
            progress.set_postfix_str(f"{job.label} {cell[0]} {cell[1]}")
            missing = job.missing(found[cell])
            if missing and needs_ranges(cell[1]) and not self.store.calibrated:
                # float32 results of an earlier run are not run again, so the store may hold a part of the texts
                if self.calibration == SCORED_TEXTS and not complete:
                    list(self._evaluated(job, (cell[0], "float32"), everything))
                self._calibrate()
            complete |= missing == everything
            for result in self._evaluated(job, cell, missing):
                found[cell] = result if found[cell] is None else found[cell].merge(result)
                self.save(job, cell, found[cell])
            progress.update()

    def _calibrate(self) -> None:
        """Set the ranges of codes; texts of the caller's are encoded for the first job only."""
        if isinstance(self.calibration, list) and not self.ranges:
            self.store.calibrate(self.calibration)
            dims = {dim for dim, _ in self.cells}
            self.ranges = {dim: self.store.ranges(dim, None, self.normalize, "int8") for dim in dims}
        self.store.calibrate(self.ranges)

    def _evaluated(self, job: Job, cell: _Cell, missing: Mapping[str, Sequence[str]]) -> Iterator[Any]:
        """Results of mteb for the missing subsets, one after the other, in mteb's order."""
        encoder = copy.copy(self.encoder)
        dim, precision = cell
        encoder.model = self.store.view(dim, precision=precision, scoring=self.scoring, normalize=self.normalize)
        encoder.mteb_model_meta = self.meta(*cell)
        kind = job.task.metadata.type
        task = with_listed_columns(job.task) if kind == "Classification" else job.task
        # Clustering draws from the task's own generators, so each cell starts where the task started.
        names = ("rng_state", "np_rng")
        generators = {name: copy.deepcopy(getattr(task, name)) for name in names if hasattr(task, name)}
        for split, subsets in missing.items():
            # mteb encodes the subsets of bitext mining in one go
            for together in [list(subsets)] if kind == "BitextMining" else [[name] for name in subsets]:
                part = copy.copy(task)
                vars(part).update(generators, hf_subsets=together)
                part.filter_eval_splits([split])
                kwargs = {"encode_kwargs": dict(self.encode_kwargs), "cache": None, "show_progress_bar": False}
                yield self.mteb.evaluate(encoder, part, co2_tracker=False, **kwargs).task_results[0]

    # Files ------------------------------------------------------------------------------------------------------------

    def _keys(self, precision: str) -> dict[str, str]:
        """What tells result files of these codes from those that mteb itself might have written."""
        usual = {"scoring": SCORINGS[0]} | ({"calibration": SCORED_TEXTS} if precision in ("int8", "uint8") else {})
        said = how_coded(precision, self.scoring, self.calibration)
        return {key: text for key, text in said.items() if text not in (None, usual.get(key))}

    def _in_files(self, job: Job, cell: _Cell) -> bool:
        """Whether files may hold the scores: codes that depend on all texts of a task are those of all its subsets."""
        of_task = needs_ranges(cell[1]) and self.calibration == SCORED_TEXTS
        return job.by_name and (job.label == job.name or not of_task)

    def meta(self, dim: int, precision: str) -> Any:
        """What mteb calls the model at one dim and precision; the full width is the model itself."""
        experiment: dict[str, Any] = {} if dim == self.store.width else {"embed_dim": dim}
        update: dict[str, Any] = {"name": self.name, "revision": self.revision, "embed_dim": dim}
        if precision != "float32":
            experiment |= {"output_dtypes": precision, **self._keys(precision)}
            # mteb knows bits by one name
            update["output_dtypes"] = [self.mteb.types.OutputDType("binary" if precision == "ubinary" else precision)]
        if experiment and not self.normalize:
            experiment["normalize"] = False
        update["experiment_kwargs"] = experiment or None
        return self.encoder.mteb_model_meta.model_copy(update=update)

    def _paths(self, job: Job, cell: _Cell) -> list[Path]:
        """Where a result file may be: under the keys of mteb, or under those that this package had before."""
        dim, precision = cell
        path = self.files.get_task_result_path(job.name, self.meta(*cell))
        if precision not in ("float32", "int8") or self._keys(precision):
            return [path]
        parts = [] if self.normalize else ["normalize_False"]
        parts += [] if precision == "float32" else [f"precision_{precision}"]
        before = {"experiment_name": "__".join([*parts, f"truncate_dim_{dim}"])}
        return [path, self.files.get_task_result_path(job.name, self.name, self.revision, **before)]

    def is_complete(self, job: Job) -> bool:
        """Whether the files hold all cells of a job."""
        return not any(job.missing(self.load(job, cell)) for cell in self.cells)

    def load(self, job: Job, cell: _Cell) -> Any:
        """What is there of the job's scores, as mteb's result under the task's own name; None for nothing."""
        if self.overwrite or not self._in_files(job, cell):
            return None
        path = next((path for path in self._paths(job, cell) if path.is_file()), None)
        if path is None:
            return None
        result = self._read(path, job.name)
        if result.dataset_revision != job.task.metadata.revision:
            logger.info("%s is of another revision of the data and is run again", path)
            return None
        scores = {
            # an entry with conditions was written for data or settings of somebody's own
            split: [e for e in entries if e["hf_subset"] in job.subsets and "mipic_st" not in e]
            for split, entries in result.scores.items()
            if split in job.splits
        }
        return result.model_copy(update={"task_name": job.task.metadata.name, "scores": scores})

    def save(self, job: Job, cell: _Cell, result: Any) -> None:
        """Write a job's result with mteb's own cache, aside, and then put each file into its place as a whole."""
        if not self._in_files(job, cell):
            return
        result, meta = result.model_copy(update={"task_name": job.name}), self.meta(*cell)
        path = self.files.get_task_result_path(job.name, meta)
        if path.is_file():
            # other subsets, perhaps of a run that shares the folder; a damaged file, or one of other data, is replaced
            with contextlib.suppress(ValueError):
                result = self._read(path, job.name).merge(result)
        with tempfile.TemporaryDirectory(prefix="mipic-st-") as aside:
            cache = self.mteb.ResultCache(aside)
            staged = cache.get_task_result_path(job.name, meta).parent
            staged.mkdir(parents=True)
            settings = path.parent / "run_settings.jsonl"
            if settings.is_file():  # mteb adds to it
                (staged / settings.name).write_bytes(settings.read_bytes())
            cache.save_to_cache(result, meta, encode_kwargs=self.encode_kwargs)
            for file in sorted(staged.iterdir(), key=lambda file: file.name == path.name):
                write_whole(path.parent / file.name, methodcaller("write_bytes", file.read_bytes()))

    def _read(self, path: Path, name: str) -> Any:
        try:
            result = self.mteb.TaskResult.from_disk(path)
            entries = [(split, entry) for split, entries in result.scores.items() for entry in entries]
            if result.task_name != name or not all({"hf_subset", "main_score"} <= set(entry) for _, entry in entries):
                raise ValueError(f"it holds no scores of {name}")
            if len({(split, entry["hf_subset"]) for split, entry in entries}) < len(entries):
                raise ValueError("it holds two scores of one subset")
            for _, entry in entries:
                if entry["main_score"] is not None:
                    float(entry["main_score"])
        except Exception as error:
            raise ValueError(
                f"{str(path)!r} is no result file of mteb for {name}, perhaps it was cut off while it was written "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Delete it, or run "
                "again with overwrite=True (--overwrite)."
            ) from error
        return result


def _main_score(result: Any) -> float:
    """Mean over splits and subsets, each rounded as mteb's files are."""
    values = [entry["main_score"] for entries in result.scores.values() for entry in entries]
    return float(np.mean([float("nan") if value is None else round(float(value), 6) for value in values]))
