"""Evaluators of sentence-transformers in cells: copies, names and main scores for each layer, dim and precision."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from inspect import signature
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import MSEEvaluator, MSEEvaluatorFromDataFrame

from mipic_st.numerics import unit_length
from mipic_st.validation import plain

# Evaluators that compare the model's vectors with those of a teacher, which they hold.
WITH_TEACHER = (MSEEvaluator, MSEEvaluatorFromDataFrame)


@dataclass(frozen=True)
class Cell:
    """One run of the evaluator: its copy, the cell's label, all scores by full name, texts, the main score's name."""

    evaluator: BaseEvaluator
    label: str
    scores: dict[str, float]
    texts: dict[str, Any]
    primary_key: str

    @property
    def main(self) -> float:
        """The main score."""
        return self.scores[self.primary_key]


def name_of(evaluator: BaseEvaluator) -> str:
    """The evaluator's name; one without a name counts as ``dim``."""
    return getattr(evaluator, "name", "") or "dim"


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else [value]


def _held(evaluator: BaseEvaluator) -> dict[str, Any]:
    """Attributes that are evaluators, or lists, tuples or dicts of nothing but evaluators."""
    return {
        name: value
        for name, value in vars(evaluator).items()
        if len(_listed(value)) and all(isinstance(item, BaseEvaluator) for item in _listed(value))
    }


def _children(evaluator: BaseEvaluator) -> list[Any]:
    return [child for value in _held(evaluator).values() for child in _listed(value)]


def leaves_of(evaluator: BaseEvaluator) -> list[Any]:
    """The evaluator and those inside it; of a sequence, those inside only."""
    own = [] if isinstance(evaluator, SequentialEvaluator) else [evaluator]
    return own + [leaf for child in _children(evaluator) for leaf in leaves_of(child)]


def metrics_of(cell: Cell) -> list[str]:
    """The main metric of each evaluator inside, without its name."""
    return [str(leaf.primary_metric).removeprefix(f"{name_of(leaf)}_") for leaf in leaves_of(cell.evaluator)]


def set_primary_metrics(evaluator: BaseEvaluator, like: BaseEvaluator) -> None:
    """Give a copy the primary metrics of another one, under its own names."""
    for leaf, other in zip(leaves_of(evaluator), leaves_of(like), strict=True):
        if (metric := other.primary_metric) is not None:
            if metric.startswith(f"{name_of(other)}_"):
                metric = name_of(leaf) + metric[len(name_of(other)) :]
            with contextlib.suppress(AttributeError):  # a property of an evaluator of somebody's own
                leaf.primary_metric = metric


def is_greater_better(evaluator: BaseEvaluator) -> bool:
    """Of a sequence that counts as its last one does, which is the default, that one's; it says True of itself."""
    if isinstance(evaluator, SequentialEvaluator):
        default = signature(SequentialEvaluator).parameters["main_score_function"].default
        if evaluator.main_score_function is default:
            return is_greater_better(list(evaluator.evaluators)[-1])
    return evaluator.greater_is_better


def _teacher_vectors(leaf: Any) -> np.ndarray:
    """The vectors that an evaluator compares the model's with, value by value; none for most."""
    if isinstance(leaf, MSEEvaluatorFromDataFrame):
        return np.asarray(list(leaf.teacher_embeddings.values()))
    return np.asarray(leaf.source_embeddings if isinstance(leaf, MSEEvaluator) else [])


def teachers_have_unit_length(evaluator: BaseEvaluator) -> bool:
    """Whether all vectors of teachers have length 1."""
    found = [vectors for leaf in leaves_of(evaluator) if len(vectors := _teacher_vectors(leaf))]
    return all(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3) for vectors in found)


def cut_teachers(evaluator: BaseEvaluator, original: BaseEvaluator, dim: int, width: int, unit: bool) -> None:
    """Cut, and with ``unit`` renormalise, the teacher's vectors of a copy as those of the model are."""
    for leaf, source in zip(leaves_of(evaluator), leaves_of(original), strict=True):
        vectors = _teacher_vectors(source)
        if not len(vectors):
            continue
        if vectors.shape[1] != width:
            raise ValueError(
                f"the teacher of {type(original).__name__} gives {vectors.shape[1]} values and the model {width}, so "
                "no cut of one can be compared with that of the other; use a teacher of the model's width."
            )
        vectors = unit_length(vectors[:, :dim]) if unit else vectors[:, :dim]
        if isinstance(leaf, MSEEvaluator):
            leaf.source_embeddings = vectors
        else:
            leaf.teacher_embeddings = dict(zip(source.teacher_embeddings, vectors, strict=True))


def main_keys(evaluator: BaseEvaluator, scores: dict[str, float], primary_key: str, label: str) -> set[str]:
    """The scores that stand for a task each: those of the single evaluators, not what sums several of them up."""
    keys: set[str] = set()
    for number, child in enumerate(_children(evaluator)):
        name, metric = getattr(child, "name", "") or f"dim-{label}", str(child.primary_metric)
        # the last is SequentialEvaluator's name for the score of an evaluator that returns a number
        wanted = [metric, f"{name}_{metric}", f"dim-{label}_{metric}", f"dim-{label}_evaluator_{number}"]
        named = [key for key in wanted if key in scores] + [key for key in scores if key.startswith(name)]
        keys |= main_keys(child, scores, named[0] if named else "", label)
    return keys & set(scores) or {primary_key}


def cell_label(layer: int | None, dim: int, precision: str, fitted: bool = False) -> str:
    """What names of scores and files say of a cell."""
    label = str(dim) if layer is None else f"L{layer}-{'fitted-' if fitted else ''}{dim}"
    return label if precision == "float32" else f"{label}-{precision}"


def renamed_copy(evaluator: BaseEvaluator, label: str, made: dict[int, Any] | None = None) -> BaseEvaluator:
    """A copy that shares texts with the original but has its own name, files and primary metric."""
    made = {} if made is None else made
    if id(evaluator) in made:
        return made[id(evaluator)]
    twin: Any = copy.copy(evaluator)
    made[id(evaluator)] = twin
    for name in ("csv_headers", "similarity_fn_names", "score_function_names"):
        if isinstance(value := getattr(twin, name, None), list):
            setattr(twin, name, list(value))
    for name, value in _held(evaluator).items():
        copies = [renamed_copy(child, label, made) for child in _listed(value)]
        if isinstance(value, dict):
            setattr(twin, name, dict(zip(value, copies, strict=True)))
        else:
            setattr(twin, name, type(value)(copies) if isinstance(value, (list, tuple)) else copies[0])
    old = getattr(evaluator, "name", "") or ""
    if hasattr(evaluator, "name"):
        twin.name = f"{name_of(evaluator)}-{label}"
    primary = evaluator.primary_metric
    # an evaluator that ran before carries its old name in the primary metric
    if primary and old and primary.startswith(f"{old}_"):
        twin.primary_metric = twin.name + primary[len(old) :]
    for name in ("csv_file", "predictions_file"):
        if isinstance(file := getattr(evaluator, name, None), str):
            setattr(twin, name, _labelled_file(file, old, label))
    return twin


def _labelled_file(file: str, name: str, label: str) -> str:
    """The file's name with the label behind the evaluator's name, or before what the file holds."""
    path = Path(file)
    stem = f"{path.stem}_"
    if name and f"_{name}_" in stem:
        head, _, tail = stem.rpartition(f"_{name}_")
        stem = f"{head}_{name}-{label}_{tail}"
    else:
        kind = next((kind for kind in ("_results_", "_predictions_") if kind in stem), "_")
        head, _, tail = stem.partition(kind) if kind != "_" else (path.stem, "", "")
        stem = f"{head}_{label}{kind}{tail}"
    return str(path.with_name(stem.removesuffix("_") + path.suffix))


def named_scores(
    evaluator: BaseEvaluator, scores: float | dict[str, Any], label: str
) -> tuple[dict[str, float], dict[str, Any], str]:
    """All scores under names that hold the cell, the metrics that are no numbers, and the primary score's name."""
    if not isinstance(scores, dict):
        key = f"dim-{label}_score"
        return {key: float(scores)}, {}, key
    if not scores:
        raise ValueError(f"{type(evaluator).__name__} returned no scores.")
    names = [leaf.name for leaf in leaves_of(evaluator) if getattr(leaf, "name", "")]

    def full(key: str) -> str:
        return key if any(key.startswith(f"{name}_") for name in names) else f"dim-{label}_{key}"

    numbers = {key: float(value) for key, value in scores.items() if isinstance(plain(value), Real)}
    primary = evaluator.primary_metric or next(iter(numbers or scores))
    if primary not in scores:
        # a primary metric without the evaluator's name, where the scores have it
        primary = next((f"{name}_{primary}" for name in names if f"{name}_{primary}" in scores), primary)
    if primary not in numbers:
        found = f"no number but {scores[primary]!r}" if primary in scores else f"none of its scores {list(scores)}"
        raise ValueError(
            f"{type(evaluator).__name__} says primary_metric={primary!r}, which is {found}; set it to a score."
        )
    texts = {full(key): value for key, value in scores.items() if key not in numbers}
    return {full(key): value for key, value in numbers.items()}, texts, full(primary)
