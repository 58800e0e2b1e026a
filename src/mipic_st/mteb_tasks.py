"""MTEB tasks at several dims: every text of a task is encoded once, every dim has its own result files.

mteb's own task classes, prompts and result format are used; only the vectors come from an `EmbeddingStore`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st._checks import checked_count, checked_dims, checked_flag
from mipic_st.embedding_store import (
    EmbeddingStore,
    bytes_per_vector,
    check_precisions,
    full_width,
)

if TYPE_CHECKING:
    from mipic_st.report import EvaluationReport

logger = logging.getLogger(__name__)

__all__ = ["PRESETS", "TaskPreset", "evaluate_mteb"]

_HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class TaskPreset:
    """A named set of MTEB tasks.

    Attributes:
        tasks: MTEB task names.
        texts: Texts to encode, before repeats are dropped; pairs count two, classification its test part and the drawn
            training texts.
        minutes: Expected minutes for all dims together with a 22-million-parameter model of 6 layers on two CPU cores:
            an estimate from 300 texts a second, not a timing; a GPU takes a fraction.
    """

    tasks: tuple[str, ...]
    texts: int
    minutes: float


PRESETS: dict[str, TaskPreset] = {
    "sts": TaskPreset(("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark"), 27_846, 2.0),
    "sts-local": TaskPreset(("STS13", "STS14", "STS15"), 16_500, 1.0),
    "classification": TaskPreset(
        ("Banking77Classification", "EmotionClassification", "TweetSentimentExtractionClassification"), 16_500, 2.0
    ),
    "pair": TaskPreset(("TwitterSemEval2015", "SprintDuplicateQuestions", "TwitterURLCorpus"), 338_622, 20.0),
}
"""Task presets by name, as ``mipic-st tasks`` lists them."""


def _import_mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ImportError('MTEB tasks need mteb: pip install "mipic-st[eval]"') from error
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
) -> EvaluationReport:
    """Run MTEB tasks at several dims with one encoding of each task's texts.

    Results are mteb's own files under ``output/results``, one folder per model, revision and dim
    (``.../experiments/truncate_dim_64/STS13.json``), and load with ``mteb.ResultCache(output)``. The revision is a hash
    of the weights and settings, so neither two models nor two states of one model share a file. What is there already
    is not run again. Prompts are chosen by mteb from ``model.prompts``. The vectors of a task are freed after it, and
    the caller's random state is left as it was.

    Args:
        model: The model.
        tasks: A preset (see `PRESETS`), the name of a task or of an mteb benchmark, or a list of task names and mteb
            task objects.
        dims: Distinct dims, 1 to the model's width.
        output: Folder of the results.
        model_name: Name in results and tables; None takes the hub name or ``local/<folder>``.
        data_dir: Folder with local data, looked at before the hub: ``<task>_<split>.csv`` in small letters without
            "Classification" (``sts13_test.csv``, ``banking77_train.csv``), or ``<Task>/<split>.csv`` (or ``.parquet``,
            ``.jsonl``). Columns: STS ``sentence1, sentence2, score``; classification ``text, label``; pairs
            ``sentence1, sentence2, labels``. A file must hold as many rows as MTEB's set.
        precisions: ``"float32"`` and, if wanted, ``"int8"``, ``"binary"``.
        batch_size: Texts per forward pass.
        normalize: Renormalise after the cut; the full width stays as the model gives it.
        overwrite: Run again what is there.
        skip_missing: Leave out tasks whose data is missing, with a warning, instead of raising.
        show_progress_bar: Show a bar over cells.

    Returns:
        A report with one row per (task, dim, precision); ``report.info`` holds the peak size of the vectors in bytes.

    Raises:
        ImportError: If mteb is missing.
        ValueError: If a task is unknown, dims do not fit, or a local file has other rows or columns than MTEB's set.
        FileNotFoundError: If a task's data is neither in ``data_dir`` nor on the hub, before anything is encoded.

    Example:
        >>> report = evaluate_mteb(model, "sts", [32, 64, 384], output="results")   # doctest: +SKIP
        >>> print(report.to_markdown())                                             # doctest: +SKIP
    """
    dims = tuple(sorted(checked_dims("dims", dims, full_width(model))))
    precisions = check_precisions(precisions)
    normalize, overwrite = checked_flag("normalize", normalize), checked_flag("overwrite", overwrite)
    skip_missing, batch_size = checked_flag("skip_missing", skip_missing), checked_count("batch_size", batch_size)
    with _random_state_kept():
        return _evaluate(
            model,
            tasks,
            dims,
            precisions,
            Path(output),
            model_name,
            None if data_dir is None else Path(data_dir),
            batch_size,
            normalize,
            overwrite,
            skip_missing,
            show_progress_bar,
        )


def _evaluate(
    model: SentenceTransformer,
    tasks: str | Sequence[Any],
    dims: tuple[int, ...],
    precisions: tuple[str, ...],
    output: Path,
    model_name: str | None,
    data_dir: Path | None,
    batch_size: int,
    normalize: bool,
    overwrite: bool,
    skip_missing: bool,
    show_progress_bar: bool,
) -> EvaluationReport:
    from tqdm.auto import tqdm

    from mipic_st.report import EvaluationReport

    mteb = _import_mteb()
    from mteb.models import SentenceTransformerEncoderWrapper

    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"data_dir {str(data_dir)!r} is not a folder.")
    cache = mteb.ResultCache(output)
    wrapper = SentenceTransformerEncoderWrapper(model)
    base_meta = wrapper.mteb_model_meta.model_copy(
        update={"name": model_name_of(model, model_name), "revision": fingerprint(model)}
    )
    cells = [(dim, precision) for precision in precisions for dim in dims]
    metas = {cell: _meta(base_meta, *cell, normalize) for cell in cells}

    def is_there(task: Any, cell: tuple[int, str]) -> bool:
        found = None if overwrite else cache.load_task_result(task.metadata.name, metas[cell])
        return found is not None and not found.get_missing_evaluations(task)

    def run(task: Any, store: EmbeddingStore, cell: tuple[int, str], keep_in: Any) -> Any:
        encoder = copy.copy(wrapper)
        encoder.model = store.view(cell[0], precision=cell[1], normalize=normalize)
        encoder.mteb_model_meta = metas[cell]
        with _labels_read_once(task):
            return mteb.evaluate(
                encoder,
                task,
                co2_tracker=False,
                encode_kwargs={"batch_size": batch_size, "show_progress_bar": False},
                cache=keep_in,
                overwrite_strategy="always" if overwrite or keep_in is None else "only-missing",
                show_progress_bar=False,
            ).task_results[0]

    ready, absent = [], []
    for task in resolve_tasks(tasks):
        complete = all(is_there(task, cell) for cell in cells)
        if complete or getattr(task, "data_loaded", False) or _attach_local(task, data_dir) or _on_hub(task):
            ready.append(task)
        else:
            absent.append(task.metadata.name)
    if absent:
        where = "no data_dir was given" if data_dir is None else f"not in {str(data_dir)!r}"
        message = (
            f"no data for {', '.join(absent)}: {where}, and the hub does not answer. "
            "Put files there (see data_dir), or leave these tasks out."
        )
        if not skip_missing:
            raise FileNotFoundError(message)
        logger.warning(message)
    records: list[dict[str, Any]] = []
    peak = 0
    progress = tqdm(total=len(ready) * len(cells), desc="MTEB", disable=not show_progress_bar)
    with progress:
        for task in ready:
            store = EmbeddingStore(model)
            loaded_here = False
            try:
                for cell in cells:
                    dim, precision = cell
                    progress.set_postfix_str(f"{task.metadata.name} {dim} {precision}")
                    there = is_there(task, cell)
                    if not there and not task.data_loaded:
                        task.load_data()
                        loaded_here = True
                    if not there and precision == "int8" and not len(store):
                        # float32 came from an earlier run: fill the store, so that int8 is calibrated on all texts
                        run(task, store, (dim, "float32"), None)
                    if not there:
                        run(task, store, cell, cache)
                    # read back also when fresh: mteb rounds to 6 digits in its files, and a resumed run must not differ
                    result = cache.load_task_result(task.metadata.name, metas[cell])
                    peak = max(peak, store.nbytes)
                    records.append(
                        {
                            "model": base_meta.name,
                            "seed": None,
                            "task": task.metadata.name,
                            "metric": str(task.metadata.main_score),
                            "primary": True,
                            "layer": None,
                            "dim": dim,
                            "precision": precision,
                            "bytes": bytes_per_vector(dim, precision),
                            "score": _main_score(task, result),
                        }
                    )
                    progress.update()
            finally:
                store.clear()
                if loaded_here:
                    task.unload_data()
    return EvaluationReport(records, info={"peak_vector_bytes": peak, "revision": base_meta.revision})


def _main_score(task: Any, result: Any) -> float:
    splits = ["test"] if "test" in task.eval_splits else list(task.eval_splits)
    return float(result.get_score(splits=splits))


def _meta(base: Any, dim: int, precision: str, normalize: bool) -> Any:
    experiment: dict[str, Any] = {"truncate_dim": dim}
    if precision != "float32":
        experiment["precision"] = precision
    if not normalize:
        experiment["normalize"] = False
    return base.model_copy(update={"embed_dim": dim, "experiment_kwargs": experiment})


def model_name_of(model: SentenceTransformer, name: str | None = None) -> str:
    """A name of the form ``organisation/model`` for result folders.

    Args:
        model: The model.
        name: The name wanted; None takes the one that the model was loaded by.

    Returns:
        The hub name, or ``local/<folder>``.
    """
    if name is None:
        backbone = getattr(model[0], "auto_model", None)
        name = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "model")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    is_hub_name = len(parts) == 2 and not Path(name).exists() and not name.startswith((".", "/", "~"))
    return "/".join(parts) if is_hub_name else f"local/{parts[-1] if parts else 'model'}"


def fingerprint(model: SentenceTransformer) -> str:
    """Sixteen hex digits that change with the weights, the prompts, the modules or the maximal length.

    Args:
        model: The model.

    Returns:
        The digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    settings = {
        "prompts": model.prompts,
        "default": model.default_prompt_name,
        "similarity": str(model.similarity_fn_name),
        "length": model.max_seq_length,
        "modules": [
            (type(module).__name__, module.get_config_dict() if hasattr(module, "get_config_dict") else "")  # type: ignore[operator]
            for module in model.children()
        ],
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def resolve_tasks(tasks: str | Sequence[Any]) -> list[Any]:
    """Task objects for a preset, a task, a benchmark, or a list of names and objects.

    Args:
        tasks: As for :func:`evaluate_mteb`.

    Returns:
        mteb's task objects, each once.

    Raises:
        ValueError: If a name is none of these, or the list is empty.
    """
    mteb = _import_mteb()
    if isinstance(tasks, str):
        if tasks in PRESETS:
            names: Sequence[Any] = PRESETS[tasks].tasks
        else:
            try:
                return list(mteb.get_benchmark(tasks).tasks)
            except KeyError:
                names = [tasks]
    else:
        names = list(tasks)
    if not names:
        raise ValueError(f"tasks is empty; give task names or a preset: {', '.join(PRESETS)}.")
    resolved: list[Any] = []
    for name in names:
        if not isinstance(name, str):
            resolved.append(name)
        elif name in PRESETS:
            resolved.extend(resolve_tasks(name))
        else:
            try:
                resolved.append(mteb.get_task(name))
            except KeyError as error:
                raise ValueError(
                    f"tasks: {name!r} is neither a preset ({', '.join(PRESETS)}) nor a task or benchmark of mteb."
                ) from error
    by_name = {task.metadata.name: task for task in resolved}
    return list(by_name.values())


def _local_file(task_name: str, split: str, data_dir: Path) -> Path | None:
    short = task_name.removesuffix("Classification").lower()
    candidates = [data_dir / task_name / f"{split}{ending}" for ending in (".csv", ".parquet", ".jsonl")]
    candidates += [data_dir / f"{stem}_{split}.csv" for stem in (task_name, short)]
    return next((path for path in candidates if path.is_file()), None)


def _attach_local(task: Any, data_dir: Path | None) -> bool:
    """Give the task its data from local files; False if a split has no file."""
    if data_dir is None:
        return False
    import pandas as pd
    from datasets import Dataset, DatasetDict

    name, kind = task.metadata.name, task.metadata.type
    columns = {
        "STS": ["sentence1", "sentence2", "score"],
        "Classification": ["text", "label"],
        "PairClassification": ["sentence1", "sentence2", "labels"],
    }.get(kind)
    if columns is None or list(task.hf_subsets) != ["default"]:
        return False
    splits = list(task.eval_splits)
    if kind == "Classification":
        splits = list(dict.fromkeys([task.train_split, *splits]))
    files = {split: _local_file(name, split, data_dir) for split in splits}
    if any(path is None for path in files.values()):
        return False
    stats = task.metadata.descriptive_stats or {}
    texts = dict.fromkeys((column for column in columns if column.startswith(("sentence", "text"))), str)
    parts = {}
    for split, path in files.items():
        assert path is not None
        try:
            if path.suffix == ".parquet":
                frame = pd.read_parquet(path)
            elif path.suffix == ".jsonl":
                frame = pd.read_json(path, lines=True, dtype=texts, encoding="utf-8-sig")
            else:
                # "NA" and empty cells are texts here, not missing values
                frame = pd.read_csv(path, dtype=texts, keep_default_na=False)
        except (ValueError, OSError) as error:  # those of pandas and pyarrow are ValueErrors
            raise ValueError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {error}") from error
        lacking = [column for column in columns if column not in frame.columns]
        if lacking:
            raise ValueError(f"{str(path)!r} has no column {', '.join(lacking)}; {name} needs {', '.join(columns)}.")
        if "score" in columns:
            scores = pd.to_numeric(frame["score"], errors="coerce")
            if (wrong := scores.isna()).any():
                raise ValueError(
                    f"{str(path)!r} has {int(wrong.sum())} scores that are no numbers, the first is "
                    f"{frame['score'][wrong].iloc[0]!r}."
                )
            frame["score"] = scores
        expected = stats.get(split, {}).get("num_samples")
        if expected is not None and expected != len(frame):
            raise ValueError(
                f"{str(path)!r} has {len(frame)} rows, {name}'s {split} part has {expected}: scores of partial data "
                f"must not carry the task's name. Use the whole set."
            )
        parts[split] = Dataset.from_pandas(frame[columns], preserve_index=False)
    task.dataset = DatasetDict(parts)
    task.data_loaded = True
    return True


def _on_hub(task: Any) -> bool:
    """Whether the hub has the task's data; answers within seconds, for mteb itself would retry for half a minute."""
    import huggingface_hub

    path = task.metadata.dataset.get("path", "")
    try:
        huggingface_hub.HfApi().dataset_info(path, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:  # no network, offline mode, gated or unknown set: all mean "cannot be loaded"
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
    """Speed only, the numbers stay: two private methods of mteb's get the same data with columns as lists."""
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
