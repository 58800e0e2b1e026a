"""MTEB tasks at several dims: every text of a task is encoded once, every dim has its own result files.

mteb's own task classes, prompts and result format are used; only the vectors come from an `EmbeddingStore`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
import logging
import os
import random
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import CodeType, FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.encoder.fingerprint import fingerprint, model_name_of
from mipic_st.encoder.structure import full_width
from mipic_st.evaluation.mteb_data import KNOWN_SETS, data_digests, is_known_set, short_hash, with_local_data
from mipic_st.evaluation.precisions import bytes_per_vector, check_precisions
from mipic_st.evaluation.store import MEMORY_LIMIT, EmbeddingStore, check_place, checked_limit
from mipic_st.validation import checked_count, checked_dims, checked_flag, missing_extra

if TYPE_CHECKING:
    from mipic_st.evaluation.report import EvaluationReport

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class TaskGroup:
    """A named set of MTEB tasks.

    Attributes:
        tasks: MTEB task names.
        texts: Texts to encode, before repeats are dropped; pairs count two, classification its test part and the drawn
            training texts.
        minutes: Expected minutes for all dims together with a 22-million-parameter model of 6 layers on two CPU cores:
            an estimate from 300 sentences or 50 documents a second, not a timing; a GPU takes a fraction.
    """

    tasks: tuple[str, ...]
    texts: int
    minutes: float


TASK_GROUPS: dict[str, TaskGroup] = {
    "sts": TaskGroup(("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark"), 27_846, 2.0),
    # what three small files give without a network
    "sts-local": TaskGroup(("STS13", "STS14", "STS15"), 16_500, 1.0),
    "classification": TaskGroup(
        ("Banking77Classification", "EmotionClassification", "TweetSentimentExtractionClassification"), 16_500, 2.0
    ),
    "pair": TaskGroup(("TwitterSemEval2015", "SprintDuplicateQuestions", "TwitterURLCorpus"), 338_622, 20.0),
    "nano-retrieval": TaskGroup(
        (
            "NanoArguAnaRetrieval",
            "NanoClimateFeverRetrieval",
            "NanoDBPediaRetrieval",
            "NanoFEVERRetrieval",
            "NanoFiQA2018Retrieval",
            "NanoHotpotQARetrieval",
            "NanoMSMARCORetrieval",
            "NanoNFCorpusRetrieval",
            "NanoNQRetrieval",
            "NanoQuoraRetrieval",
            "NanoSCIDOCSRetrieval",
            "NanoSciFactRetrieval",
            "NanoTouche2020Retrieval",
        ),
        57_372,
        20.0,
    ),
}
"""Groups of tasks by name, as ``mipic-st tasks`` lists them."""

# Where a result file keeps what a score depends on besides model, dim and task: nothing, for the published task.
_CONDITIONS = "mipic_st"
# Attributes of a task object that are its data or its selection, which jobs know by other means.
_NO_SETTINGS = ("data_loaded", "dataset", "hf_subsets", "metadata", "_eval_splits", "tasks", "taskname_to_task")


def _import_mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ImportError(missing_extra("MTEB tasks need mteb", "eval")) from error
    return mteb


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Keep the caller's random state: mteb reseeds random, numpy and torch on import, per task, per run."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


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
    batch_size: int = 32,
    normalize: bool = True,
    overwrite: bool = False,
    skip_missing: bool = False,
    show_progress_bar: bool = True,
    memory_limit: int | None = MEMORY_LIMIT,
    device: str | Sequence[str] | None = None,
) -> EvaluationReport:
    """Run MTEB tasks at several dims with one encoding of each task's texts.

    Results are mteb's own files under ``output/results``, one folder per model and revision: the full width in the
    folder itself, every other dim and precision as one of mteb's experiments
    (``.../experiments/truncate_dim_64/STS13.json``). So ``mteb.ResultCache(output).load_results()`` gives the full
    width, ``load_results(experiment_kwargs={"truncate_dim": 64})`` one dim, and
    ``load_results(load_experiments="match_name")`` all (load one at a time for mteb's ``to_dataframe``, which averages
    over experiments). The revision is the model's `fingerprint`, so neither two models nor two states of one model
    share a file. What is there already is not run again. Files are written whole or not at all, so several runs may
    share an output folder.

    Prompts are chosen by mteb from ``model.prompts``. The vectors of a task are freed after it, and the caller's random
    state is left as it was. A score is the mean over the task's own splits and subsets, whatever else is in the file.
    A task that was narrowed to some languages or splits says so in its name: ``STS22 (en, fr)``.

    Args:
        model: The model.
        tasks: A group (see `TASK_GROUPS`), the name of a task or of an mteb benchmark, or a list of task names and
            mteb task objects. An object that holds data already is scored on that data, under its own name; its results
            count for this data only.
        dims: Distinct dims, 1 to the model's width.
        output: Folder of the results.
        model_name: Name in results and tables; None takes the hub name or ``local/<folder>``.
        data_dir: Folder with local data, looked at before the hub: ``<task>_<split>.csv`` in small letters without
            "Classification" (``sts13_test.csv``, ``banking77_train.csv``), or ``<Task>/<split>.csv`` (or ``.parquet``,
            ``.jsonl``). Columns: STS ``sentence1, sentence2, score``; classification ``text, label``; pairs
            ``sentence1, sentence2, labels``. A file must hold as many rows as MTEB's set. Where the set's digest is
            known (STS13, STS14, STS15, Banking77Classification) and the file has it, the task keeps its name; else it
            is reported as local data, ``STS16-local-`` and a digest of the file's rows.
        precisions: ``"float32"`` and, if wanted, ``"int8"``, ``"binary"``.
        batch_size: Texts per forward pass.
        normalize: Renormalise after the cut; the full width stays as the model gives it.
        overwrite: Run again what is there; a damaged result file is replaced.
        skip_missing: Leave out tasks whose data is missing, with a warning, instead of raising.
        show_progress_bar: Show a bar over cells.
        memory_limit: Bytes of a task's vectors that stay in memory, 512 MiB unless given; above it they go to a
            temporary file that is gone afterwards (see `EmbeddingStore`). None sets no limit.
        device: Where to encode, as in ``model.encode``: one device, or a list of devices for one process each. None
            takes the model's.

    Returns:
        A report with one row per (task, dim, precision).

    Raises:
        ImportError: If mteb is missing.
        ValueError: If a task is unknown or given twice with different data, dims do not fit, a local file has other
            columns or another number of rows than MTEB's set, or a result file in ``output`` is damaged.
        FileNotFoundError: If a task's data is neither in ``data_dir`` nor can be loaded by the task itself, before
            anything is encoded.

    Example:
        >>> report = evaluate_mteb(model, "sts", [32, 64, 384], output="results")   # doctest: +SKIP
        >>> print(report.to_markdown())                                             # doctest: +SKIP
    """
    dims = tuple(sorted(checked_dims("dims", dims, full_width(model))))
    precisions = check_precisions(precisions)
    normalize, overwrite = checked_flag("normalize", normalize), checked_flag("overwrite", overwrite)
    skip_missing, batch_size = checked_flag("skip_missing", skip_missing), checked_count("batch_size", batch_size)
    kept: dict[str, Any] = {"memory_limit": checked_limit(memory_limit), "device": check_place(device, None)}
    data_dir = None if data_dir is None else Path(data_dir)
    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a folder.")
    from tqdm.auto import tqdm

    from mipic_st.evaluation.report import EvaluationReport

    results = _Results(Path(output), {"batch_size": batch_size, "show_progress_bar": False})
    runner = _Runner(model, model_name_of(model, model_name), normalize, results.encode_kwargs)
    cells = [(dim, precision) for precision in precisions for dim in dims]

    def stored(job: _Job, cell: tuple[int, str]) -> Any:
        return None if overwrite else results.load(job, runner.meta(*cell), cell[1])

    def why_absent(job: _Job) -> list[str]:
        """Why there are neither results nor data, one reason for each task; empty if there are."""
        if all(not job.missing(stored(job, cell)) for cell in cells):
            return []
        return [reason for part in job.parts for reason in why_absent(part)] if job.parts else _why_not_loaded(job.task)

    jobs, absent = [], {}
    for job in _distinct([_job(task, data_dir) for task in resolve_tasks(tasks)]):
        if reasons := why_absent(job):
            absent[job.label] = reasons
        else:
            jobs.append(job)
    if absent:
        where = "no data_dir was given" if data_dir is None else f"not in {str(data_dir)!r}"
        message = (
            f"no data for {', '.join(absent)}: {where}, and loading it failed: "
            f"{'; '.join(reason for reasons in absent.values() for reason in reasons)}. "
            "Put files into data_dir (--data-dir), or leave these tasks out; skip_missing (--skip-missing) does."
        )
        if not skip_missing:
            raise FileNotFoundError(message)
        logger.warning(message)
    progress = tqdm(
        total=sum(len(job.leaves()) for job in jobs) * len(cells), desc="MTEB", disable=not show_progress_bar
    )

    def scored(job: _Job) -> dict[tuple[int, str], Any]:
        """The job's results by cell, from the files or run now."""
        found = {cell: stored(job, cell) for cell in cells}
        if all(not job.missing(result) for result in found.values()):
            progress.update(len(cells) * len(job.leaves()))
            return found
        if job.parts:
            parts = [scored(part) for part in job.parts]
            combined = {cell: job.task.combine_task_results([part[cell] for part in parts]) for cell in cells}
            return {cell: results.save(job, result, runner.meta(*cell), cell[1]) for cell, result in combined.items()}
        with job.data(), EmbeddingStore(model, **kept) as store:
            complete = False
            for cell in cells:
                progress.set_postfix_str(f"{job.label} {cell[0]} {cell[1]}")
                missing = job.missing(found[cell])
                if missing and cell[1] == "int8" and not store.calibrated:
                    # float32 results of an earlier run are not run again, so the store may hold a part of the texts
                    if not complete:
                        for _ in runner.run(job, store, (cell[0], "float32"), job.missing(None)):
                            pass
                    store.calibrate()
                complete |= missing == job.missing(None)
                for result in runner.run(job, store, cell, missing):
                    found[cell] = results.save(job, result, runner.meta(*cell), cell[1])
                progress.update()
        return found

    records: list[dict[str, Any]] = []
    with progress:
        for job in jobs:
            try:
                found = scored(job)
            except _NotLoadedError as error:
                if not skip_missing:
                    raise
                logger.warning(str(error))
                continue
            records.extend(
                {
                    "model": runner.name,
                    "revision": runner.revision,
                    "seed": None,
                    "task": job.label,
                    "metric": str(job.task.metadata.main_score),
                    "primary": True,
                    "layer": None,
                    "dim": cell[0],
                    "precision": cell[1],
                    "bytes": bytes_per_vector(*cell),
                    "score": job.main_score(result),
                }
                for cell, result in found.items()
            )
    return EvaluationReport(records)


# Jobs: tasks with what their scores are called and depend on ------------------------------------------------------


class _NotLoadedError(FileNotFoundError):
    """A task's data is on the hub, and cannot be loaded all the same."""


@dataclass
class _Job:
    """A task to run, with the identity of its scores.

    Attributes:
        task: mteb's task object, the caller's own or a copy with local data.
        stored: The task's name in result files: mteb's, or one that says local data.
        data_digest: Digest of data that is not known to be the published one, by subset; empty for published data.
        parts: The jobs of an aggregate task, which has no data of its own.
    """

    task: Any
    stored: str
    data_digest: dict[str, str] = field(default_factory=dict)
    parts: list[_Job] = field(default_factory=list)

    @property
    def subsets(self) -> list[str]:
        return ["default"] if self.parts else list(self.task.hf_subsets)

    @property
    def splits(self) -> list[str]:
        return list(self.task.eval_splits)

    @property
    def label(self) -> str:
        """The name in reports: with the subsets and splits if these are not all that the task has."""
        metadata = self.task.metadata
        narrowed = []
        if not self.parts and set(self.subsets) != set(metadata.hf_subsets):
            narrowed.append(_enumerated(self.subsets, "subsets"))
        if set(self.splits) != set(metadata.eval_splits):
            narrowed.append(_enumerated(self.splits, "splits"))
        return f"{self.stored} ({'; '.join(narrowed)})" if narrowed else self.stored

    def leaves(self) -> list[_Job]:
        """The jobs that encode."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def conditions(self, subset: str, precision: str) -> str | None:
        """What a score depends on besides model, dim and published task; None for nothing."""
        found = []
        if subset in self.data_digest:
            found.append(f"data {self.data_digest[subset]}")
        if settings := _changed_settings(self.task):
            found.append(f"settings {json.dumps(settings, sort_keys=True, default=str)}")
        parts = [
            f"{part.stored}: {condition}"
            for part in self.parts
            for name in part.subsets
            if (condition := part.conditions(name, precision)) is not None
        ]
        # int8 is calibrated on all texts of a run, so a score in a run of fewer subsets is another one
        if precision == "int8" and not self.parts and self.label != self.stored:
            found.append(f"calibrated on {sorted(self.subsets)}, {sorted(self.splits)}")
        found += parts
        return "; ".join(found) or None

    def missing(self, result: Any) -> dict[str, list[str]]:
        """Subsets by split that a result of `_Results.load` lacks; all for None."""
        there = {} if result is None else result.scores
        lacking = {
            split: [
                name for name in self.subsets if name not in {scores["hf_subset"] for scores in there.get(split, [])}
            ]
            for split in self.splits
        }
        return {split: names for split, names in lacking.items() if names}

    def main_score(self, result: Any) -> float:
        """Mean over splits and subsets of a result of `_Results`."""
        values = [entry["main_score"] for entries in result.scores.values() for entry in entries]
        return float(np.mean([float("nan") if value is None else float(value) for value in values]))

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Load the task's data if it is not loaded, and then free it again."""
        if self.task.data_loaded:
            yield
            return
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_loaded(self.task))
            except Exception as error:
                raise _NotLoadedError(
                    f"no data for {self.label}: the hub has it, but {_reason(self.task, error)}."
                ) from error
            yield


@contextlib.contextmanager
def _loaded(task: Any) -> Iterator[None]:
    """Load a task's data and free it again; metadata set on the object stay, which mteb would forget."""
    own = vars(task).get("metadata")
    task.load_data()
    try:
        yield
    finally:
        task.unload_data()
        if own is not None:
            vars(task)["metadata"] = own


def _job(task: Any, data_dir: Path | None) -> _Job:
    """The task with its local data, if it has any, and the identity of its scores."""
    name = task.metadata.name
    if task.is_aggregate:
        parts = [_job(part, data_dir) for part in task.metadata.tasks]
        if all(part.stored == part.task.metadata.name for part in parts):
            return _Job(task, name, parts=parts)
        return _Job(task, f"{name}-local-{short_hash([part.stored for part in parts])}", parts=parts)
    if getattr(task, "data_loaded", False):
        return _Job(task, name, {} if is_known_set(task) else data_digests(task))
    local = with_local_data(task, data_dir)
    if local is None:
        return _Job(task, name, _digests_of_folder(task))
    if is_known_set(local):
        return _Job(local, name)
    job = _Job(local, f"{name}-local-{short_hash(data_digests(local))}")
    why = "differs from" if name in KNOWN_SETS else "cannot be compared with"
    logger.warning("the local data of %s %s MTEB's set, so its scores are called %s", name, why, job.label)
    return job


def _in_folder(metadata: Any) -> bool:
    """Whether a task's data lie in a local folder, of whose content no revision tells."""
    path = metadata.dataset.get("path", "")
    return bool(path) and Path(path).exists()


def _digests_of_folder(task: Any) -> dict[str, str]:
    """Digests of data in a local folder; none for data on the hub, and for MTEB's own sets."""
    if not _in_folder(task.metadata):
        return {}
    try:
        with _loaded(task):
            return {} if is_known_set(task) else data_digests(task)
    except Exception as error:  # what is wrong is said when the task is run
        logger.debug("no digest of %s", _reason(task, error))
        return {}


def _enumerated(names: Sequence[str], what: str) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} {what} {short_hash(sorted(names))}"


def _changed_settings(task: Any) -> dict[str, Any]:
    """What was set on the task object, or in its metadata, and changes scores, such as ``n_experiments``."""
    changed = {
        name: _shown(value)
        for name, value in vars(task).items()
        if name not in _NO_SETTINGS and hasattr(type(task), name) and repr(getattr(type(task), name)) != repr(value)
    }
    name = task.metadata.name
    there, published = (_scored_by(metadata) for metadata in (task.metadata, _published(name) or type(task).metadata))
    changed |= {name: str(value) for name, value in there.items() if value != published.get(name)}
    if getattr(task, "seed", 42) != 42:  # mteb's default
        changed["seed"] = task.seed
    return changed


def _shown(value: Any) -> str:
    """A value as a result file names it: a class or function by its name and code, without addresses."""
    name = getattr(value, "__qualname__", "")
    shown = f"{value.__module__}.{name}" if name else repr(value)
    if code := _code_of(value):
        shown += f" {short_hash(code)}"
    return _without_addresses(shown)


def _code_of(value: Any) -> list[Any]:
    """What functions and classes do: their source, a class's with its bases', and the values that functions hold."""
    if isinstance(value, partial):
        return [*_code_of(value.func), _without_addresses(repr((value.args, sorted(value.keywords.items()))))]
    value = inspect.unwrap(getattr(value, "__func__", value))
    if isinstance(value, type):  # mteb's own are those of its version
        return [
            _source(kind) for kind in value.__mro__ if kind.__module__.partition(".")[0] not in ("mteb", "builtins")
        ]
    if not isinstance(value, FunctionType):
        return []
    held: list[Any] = [value.__defaults__, value.__kwdefaults__]
    for cell in value.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    return [_source(value), *(_without_addresses(repr(each)) for each in held)]


def _source(value: Any) -> Any:
    """The text of a function or class; the byte code where there is none, as of what is typed at a prompt."""
    try:
        return inspect.getsource(value)
    except (OSError, TypeError):
        return _byte_code(value.__code__) if isinstance(value, FunctionType) else ""


def _byte_code(code: CodeType) -> list[Any]:
    constants = [_byte_code(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return [code.co_code.hex(), *code.co_names, *constants]


def _without_addresses(text: str) -> str:
    return re.sub(r" at 0x\w+", "", text)


@cache
def _published(name: str) -> Any:
    """The metadata of mteb's own task of this name; None if it has none."""
    try:
        return _import_mteb().get_task(name).metadata
    except KeyError:
        return None


def _scored_by(metadata: Any) -> dict[str, Any]:
    """What a task's metadata say of its scores, but for the revision, which result files have by themselves."""
    found = {"main_score": metadata.main_score}
    if not _in_folder(metadata):  # there its data are known by their digest
        found["dataset"] = {key: value for key, value in sorted(metadata.dataset.items()) if key != "revision"}
    return found


def _distinct(jobs: Sequence[_Job]) -> list[_Job]:
    """Each job once.

    Raises:
        ValueError: If two have one name but other data or settings: two scores for one row.
    """
    by_label: dict[str, _Job] = {}
    for job in jobs:
        known = by_label.setdefault(job.label, job)
        if any(known.conditions(subset, "float32") != job.conditions(subset, "float32") for subset in job.subsets):
            raise ValueError(
                f"tasks: {job.label} is given twice with different data or settings, whose scores would share one "
                "name; evaluate them apart."
            )
    return list(by_label.values())


# Runs and files ---------------------------------------------------------------------------------------------------


class _Runner:
    """Runs tasks on views of a store under mteb's own protocol."""

    def __init__(self, model: SentenceTransformer, name: str, normalize: bool, encode_kwargs: dict[str, Any]) -> None:
        _import_mteb()
        from mteb.models import SentenceTransformerEncoderWrapper

        self.name, self.revision = name, fingerprint(model)
        self._wrapper = SentenceTransformerEncoderWrapper(model)
        self._width, self._normalize, self._encode_kwargs = full_width(model), normalize, encode_kwargs

    def meta(self, dim: int, precision: str) -> Any:
        """What mteb calls the model at one dim and precision; the full width is the model itself."""
        experiment: dict[str, Any] = {}
        if dim != self._width or precision != "float32":
            experiment["truncate_dim"] = dim
            if precision != "float32":
                experiment["precision"] = precision
            if not self._normalize:
                experiment["normalize"] = False
        update = {
            "name": self.name,
            "revision": self.revision,
            "embed_dim": dim,
            "experiment_kwargs": experiment or None,
        }
        return self._wrapper.mteb_model_meta.model_copy(update=update)

    def run(
        self, job: _Job, store: EmbeddingStore, cell: tuple[int, str], missing: Mapping[str, Sequence[str]]
    ) -> Iterator[Any]:
        """Results of mteb for the missing subsets, one after the other, in mteb's order."""
        mteb = _import_mteb()
        encoder = copy.copy(self._wrapper)
        encoder.model = store.view(cell[0], precision=cell[1], normalize=self._normalize)
        encoder.mteb_model_meta = self.meta(*cell)
        # Clustering draws from the task's own generators, so each cell starts where the task started.
        generators = {
            name: copy.deepcopy(getattr(job.task, name)) for name in ("rng_state", "np_rng") if hasattr(job.task, name)
        }
        for split, subsets in missing.items():
            together = job.task.metadata.type == "BitextMining"  # mteb encodes their subsets in one go
            for names in [list(subsets)] if together else [[name] for name in subsets]:
                part = copy.copy(job.task)
                vars(part).update(generators, hf_subsets=names)
                part.filter_eval_splits([split])
                with _labels_read_once(part):
                    yield mteb.evaluate(
                        encoder,
                        part,
                        co2_tracker=False,
                        encode_kwargs=dict(self._encode_kwargs),
                        cache=None,
                        show_progress_bar=False,
                    ).task_results[0]


class _Results:
    """The result files of an output folder: mteb's own, each written whole or not at all."""

    def __init__(self, folder: Path, encode_kwargs: dict[str, Any]) -> None:
        self._cache, self.encode_kwargs = _import_mteb().ResultCache(folder), encode_kwargs

    def load(self, job: _Job, meta: Any, precision: str) -> Any:
        """What is there of the job's scores: those of this data and these settings.

        Returns:
            mteb's result, or None.

        Raises:
            ValueError: If the file is damaged; the message names it.
        """
        path = self._cache.get_task_result_path(job.stored, meta)
        if not path.is_file():
            return None
        result = self._read(path, job.stored)
        if result.dataset_revision != job.task.metadata.revision:
            logger.info("%s is of another revision of the data and is run again", path)
            return None
        return _of_job(result, job, precision)

    def save(self, job: _Job, result: Any, meta: Any, precision: str) -> Any:
        """Add a result to its file.

        Args:
            job: The job.
            result: mteb's result of some subsets.
            meta: mteb's description of the model.
            precision: The cell's precision.

        Returns:
            What `load` would give, as written: mteb rounds to 6 digits.
        """
        from filelock import FileLock

        tagged = result.model_copy(deep=True, update={"task_name": job.stored})
        for entries in tagged.scores.values():
            for entry in entries:
                if (conditions := job.conditions(entry["hf_subset"], precision)) is not None:
                    entry[_CONDITIONS] = conditions
        path = self._cache.get_task_result_path(job.stored, meta)
        path.parent.mkdir(parents=True, exist_ok=True)
        root = self._cache.cache_path
        # two runs that add to one file must not lose each other's scores
        with FileLock(root / "results" / ".lock"), tempfile.TemporaryDirectory(prefix=".writing-", dir=root) as beside:
            if path.is_file():
                with contextlib.suppress(ValueError):  # a damaged file, or one of other data, is replaced
                    tagged = self._read(path, job.stored).merge(tagged)
            stage = _import_mteb().ResultCache(beside)
            whole = stage.get_task_result_path(job.stored, meta)
            whole.parent.mkdir(parents=True)
            settings = path.parent / "run_settings.jsonl"
            if settings.is_file():  # mteb adds to it
                (whole.parent / settings.name).write_bytes(settings.read_bytes())
            stage.save_to_cache(tagged, meta, encode_kwargs=self.encode_kwargs)
            written = self._read(whole, job.stored)
            for file in sorted(whole.parent.iterdir(), key=lambda file: file == whole):
                os.replace(file, path.parent / file.name)
        return _of_job(written, job, precision)

    def _read(self, path: Path, name: str) -> Any:
        try:
            result = _import_mteb().TaskResult.from_disk(path)
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


def _of_job(result: Any, job: _Job, precision: str) -> Any:
    """What a file holds of the job's splits and subsets under its conditions, under the task's own name."""
    scores = {
        split: [
            entry
            for entry in result.scores.get(split, [])
            if entry["hf_subset"] in job.subsets
            and entry.get(_CONDITIONS) == job.conditions(entry["hf_subset"], precision)
        ]
        for split in job.splits
    }
    return result.model_copy(update={"task_name": job.task.metadata.name, "scores": scores})


def resolve_tasks(tasks: str | Sequence[Any]) -> list[Any]:
    """Task objects for a group, a task, a benchmark, or a list of names and objects.

    Args:
        tasks: As for :func:`evaluate_mteb`.

    Returns:
        mteb's task objects, each once. Objects of one task that differ in subsets, splits, settings or data are
        different ones.

    Raises:
        ValueError: If a name is none of these, or the list is empty.
    """
    mteb = _import_mteb()
    if isinstance(tasks, str):
        if tasks in TASK_GROUPS:
            names: Sequence[Any] = TASK_GROUPS[tasks].tasks
        else:
            try:
                names = list(mteb.get_benchmark(tasks).tasks)
            except KeyError:
                names = [tasks]
    else:
        names = list(tasks)
    if not names:
        raise ValueError(f"tasks is empty; give task names or a group: {', '.join(TASK_GROUPS)}.")
    resolved: list[Any] = []
    for name in names:
        if not isinstance(name, str):
            resolved.append(name)
        elif name in TASK_GROUPS:
            resolved.extend(resolve_tasks(name))
        else:
            try:
                resolved.append(mteb.get_task(name))
            except KeyError as error:
                raise ValueError(
                    f"tasks: {name!r} is neither a group ({', '.join(TASK_GROUPS)}) nor a task or benchmark of mteb."
                ) from error
    if wrong := [task for task in resolved if not isinstance(task, mteb.AbsTask)]:
        raise TypeError(f"tasks: {wrong[0]!r} is neither a name nor a task object of mteb.")
    kinds: dict[tuple[Any, ...], Any] = {}
    for task in resolved:
        holders = task.metadata.tasks if task.is_aggregate else [task]
        key = (
            task.metadata.name,
            tuple(sorted(task.hf_subsets)),
            tuple(sorted(task.eval_splits)),
            repr(sorted(_changed_settings(task).items())),
            tuple(id(holder.dataset) if holder.data_loaded else None for holder in holders),
        )
        kinds.setdefault(key, task)
    return list(kinds.values())


def _why_not_loaded(task: Any) -> list[str]:
    """Why a task cannot have its data; empty if it can."""
    if task.data_loaded or _on_hub(task):
        return []
    # offline, the set may be in a cache, and a task may have a way of its own: the task knows best
    try:
        with _loaded(task):
            return []
    except Exception as error:
        return [_reason(task, error)]


def _reason(task: Any, error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{task.metadata.name}: {type(error).__name__}: {first[0] if first else ''}"


def _on_hub(task: Any) -> bool:
    """Whether the hub has the task's data; answers within seconds, and saves loading it only to see that."""
    import huggingface_hub

    path = task.metadata.dataset.get("path", "")
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # no network, offline mode, gated or unknown set
        logger.debug("%s is not on the hub: %s", path, error)
        return False
    return True


class _PlainColumns:
    """A data set whose columns are read once into lists: mteb asks for labels one by one, ten times per dim."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._columns: dict[str, list[Any]] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._columns:
            self._columns[name] = list(self._dataset[name])
        return self._columns[name]

    def select(self, rows: Any) -> _PlainColumns:
        return _PlainColumns(self._dataset.select(rows))


@contextlib.contextmanager
def _labels_read_once(task: Any) -> Iterator[None]:
    """Speed only, the numbers stay: two private methods of mteb's get the same data with columns as lists.

    With mteb 2.26, Banking77Classification takes 12 s of CPU less for each dim. Without these methods nothing is done.
    """
    undersample = getattr(task, "_undersample_data", None)
    experiment = getattr(task, "_run_experiment", None)
    if undersample is None or experiment is None or task.metadata.type != "Classification":
        yield
        return
    plain: dict[int, _PlainColumns] = {}

    def columns(dataset: Any) -> Any:
        # the wrapper keeps the data set alive, so its id stays its own
        return plain.setdefault(id(dataset), _PlainColumns(dataset))

    task._undersample_data = lambda dataset, *args, **kwargs: undersample(columns(dataset), *args, **kwargs)
    task._run_experiment = lambda train, test, *args, **kwargs: experiment(
        _PlainColumns(train), columns(test), *args, **kwargs
    )
    try:
        yield
    finally:
        task.__dict__.pop("_undersample_data", None)
        task.__dict__.pop("_run_experiment", None)
