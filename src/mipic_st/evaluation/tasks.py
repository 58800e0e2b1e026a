"""Which MTEB tasks to run: groups by name, what a name stands for, and what scores are called."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mipic_st.evaluation.mteb_data import is_known_set, short_hash, with_local_data
from mipic_st.validation import as_list, require

logger = logging.getLogger(__name__)

_HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class TaskGroup:
    """A named set of MTEB tasks, how many texts it encodes, and about how long that takes.

    The minutes are for 22 million parameters on two CPU cores: an estimate of 300 sentences or 50 documents a second.
    """

    tasks: tuple[str, ...]
    texts: int
    minutes: float


_NANO = "ArguAna ClimateFever DBPedia FEVER FiQA2018 HotpotQA MSMARCO NFCorpus NQ Quora SCIDOCS SciFact Touche2020"
# Groups of tasks by name, as ``mipic-st tasks`` lists them.
TASK_GROUPS: dict[str, TaskGroup] = {
    "sts": TaskGroup(("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark"), 27_846, 2.0),
    # what three small files give without a network
    "sts-local": TaskGroup(("STS13", "STS14", "STS15"), 16_500, 1.0),
    "classification": TaskGroup(
        ("Banking77Classification", "EmotionClassification", "TweetSentimentExtractionClassification"), 16_500, 2.0
    ),
    "pair": TaskGroup(("TwitterSemEval2015", "SprintDuplicateQuestions", "TwitterURLCorpus"), 338_622, 20.0),
    "nano-retrieval": TaskGroup(tuple(f"Nano{name}Retrieval" for name in _NANO.split()), 57_372, 20.0),
}


class NotLoadedError(FileNotFoundError):
    """A task's data is on the hub, and cannot be loaded all the same."""


@dataclass
class Job:
    """A task to run (mteb's, the caller's or a copy with local data), with what its scores are called."""

    task: Any
    name: str
    by_name: bool  # a result file of this name is this task's; an object of the caller's may be anything
    parts: list[Job] = field(default_factory=list)  # of an aggregate task, which has no data of its own

    @property
    def subsets(self) -> list[str]:
        """Names of the subsets to run."""
        return ["default"] if self.parts else list(self.task.hf_subsets)

    @property
    def splits(self) -> list[str]:
        """Names of the splits to run."""
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
        return f"{self.name} ({'; '.join(narrowed)})" if narrowed else self.name

    def leaves(self) -> list[Job]:
        """The jobs that encode."""
        return [leaf for part in self.parts for leaf in part.leaves()] if self.parts else [self]

    def missing(self, result: Any) -> dict[str, list[str]]:
        """Subsets by split that a result lacks; all for None."""
        scores = {} if result is None else result.scores
        there = {(split, entry["hf_subset"]) for split, entries in scores.items() for entry in entries}
        lacking = {split: [name for name in self.subsets if (split, name) not in there] for split in self.splits}
        return {split: names for split, names in lacking.items() if names}

    @contextlib.contextmanager
    def data(self) -> Iterator[None]:
        """Load the task's data if it is not loaded, and then free it again."""
        with contextlib.ExitStack() as stack:
            try:
                if not self.task.data_loaded:
                    stack.enter_context(_loaded(self.task))
            except Exception as error:
                reason = _reason(self.task, error)
                raise NotLoadedError(f"no data for {self.label}: the hub has it, but {reason}.") from error
            yield

    def why_not_loaded(self) -> list[str]:
        """Why the task, or each of its parts, cannot have its data; empty if it can."""
        if self.parts:
            return [reason for part in self.parts for reason in part.why_not_loaded()]
        if self.task.data_loaded or _on_hub(self.task):
            return []
        # offline, the set may be in a cache, and a task may have a way of its own: the task knows best
        try:
            with _loaded(self.task):
                return []
        except Exception as error:
            return [_reason(self.task, error)]


def resolve_jobs(tasks: str | Sequence[Any], data_dir: Path | None) -> list[Job]:
    """The jobs that were asked for, each once; two tasks of one label would have two scores for one row."""
    jobs: dict[str, tuple[Any, Job]] = {}
    for task, named in resolve_tasks(tasks):
        job = _job(task, named, data_dir)
        other, known = jobs.setdefault(job.label, (task, job))
        if other is not task and not (known.by_name and job.by_name):
            raise ValueError(
                f"tasks: {job.label} is given twice, and an object of yours may have other data or settings; evaluate "
                "them apart, for their scores would share one name."
            )
    return [job for _, job in jobs.values()]


def resolve_tasks(tasks: str | Sequence[Any]) -> list[tuple[Any, bool]]:
    """Task objects of mteb for a group, a task, a benchmark or a list, and whether each was given by name."""
    mteb = require("mteb", "MTEB tasks need mteb", "eval")
    if isinstance(tasks, str) and tasks not in TASK_GROUPS:
        with contextlib.suppress(KeyError):
            return [(task, True) for task in mteb.get_benchmark(tasks).tasks]
    groups = ", ".join(TASK_GROUPS)
    given = [tasks] if isinstance(tasks, (str, mteb.AbsTask)) else as_list("tasks", tasks, '["STS13"]')
    if not given:
        raise ValueError(f"tasks is empty; give task names or a group: {groups}.")
    resolved: list[tuple[Any, bool]] = []
    for task in given:
        if isinstance(task, mteb.AbsTask):
            resolved.append((task, False))
            continue
        if not isinstance(task, str):
            raise TypeError(f"tasks: {task!r} is neither a name nor a task object of mteb.")
        for name in TASK_GROUPS[task].tasks if task in TASK_GROUPS else (task,):
            try:
                resolved.append((mteb.get_task(name), True))
            except KeyError as error:
                what = f"neither a group ({groups}) nor a task or benchmark of mteb"
                raise ValueError(f"tasks: {name!r} is {what}.") from error
    return resolved


def _job(task: Any, named: bool, data_dir: Path | None) -> Job:
    """The task with its local data, if it has any."""
    name = task.metadata.name
    if task.is_aggregate:
        parts = [_job(part, named, data_dir) for part in task.metadata.tasks]
        if any(part.name != part.task.metadata.name for part in parts):
            name = f"{name}-local-{short_hash([part.name for part in parts])}"
        return Job(task, name, all(part.by_name for part in parts), parts)
    # of what lies in a folder of the same name as the hub's set, no revision tells
    path = task.metadata.dataset.get("path", "")
    own = named and type(task).__module__.startswith("mteb.") and not (path and Path(path).exists())
    own = own and not any(map(callable, vars(task).values()))  # a load_data of its own
    local = None if task.data_loaded else with_local_data(task, data_dir)
    if local is None or is_known_set(local):
        return Job(local or task, name, own and not task.data_loaded)
    content = {split: part.to_dict() for split, part in local.dataset.items()}
    job = Job(local, f"{name}-local-{short_hash(content)}", named)
    logger.warning("the local data of %s is not known to be MTEB's set, so its scores are called %s", name, job.label)
    return job


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


def _enumerated(names: Sequence[str], what: str) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} {what} {short_hash(sorted(names))}"


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
