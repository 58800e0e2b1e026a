"""Evaluation per dimension: one encoding, every dim, layer and precision, with sentence-transformers' own evaluators.

`MatryoshkaEvaluator` wraps an evaluator; `ClassificationProbeEvaluator` is one more evaluator that it can wrap.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import MSEEvaluator, MSEEvaluatorFromDataFrame

from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.encoder.structure import check_layers, full_width
from mipic_st.evaluation.precisions import bytes_per_vector, check_precisions
from mipic_st.evaluation.store import MEMORY_LIMIT, EmbeddingStore, check_place, checked_limit
from mipic_st.numerics import unit_length
from mipic_st.validation import (
    checked_dims,
    checked_flag,
    checked_layers,
    is_whole,
    plain,
)

if TYPE_CHECKING:
    from mipic_st.evaluation.report import EvaluationReport

logger = logging.getLogger(__name__)


class MatryoshkaEvaluator(BaseEvaluator):
    """Score a model at several dims (and layers, and precisions) with one pass over the texts.

    Wraps any sentence-transformers evaluator that calls ``model.encode``, ``encode_query`` or ``encode_document``.
    Every distinct text is encoded once at full width; each dim's vectors are cut from the store and renormalised (the
    uncut width stays as the model gives it). Metrics carry the dim in the data set's name, so they land in trainer logs
    and in the model card's tables: ``sts-dev-64_spearman_cosine``, with layers ``sts-dev-L4-64_spearman_cosine``, with
    precisions ``sts-dev-64-int8_spearman_cosine``. The mean and the worst dim of the wrapped evaluator's primary metric
    are added: ``sts-dev-mean_spearman_cosine``, ``sts-dev-worst_spearman_cosine``. An evaluator without a name
    counts as ``dim``: ``dim-64_spearman_cosine``. Metrics that are texts are handed on and stay out of the report.

    An evaluator that picks its primary metric by the scores (of several similarity functions, the best) picks it once,
    at the largest dim; all other dims count by the same one. Where the metric depends on the vectors' length (a dot
    product) and the model gives vectors of any length, the uncut width is also scored renormalised, as all other dims
    are (``sts-dev-384-unit_spearman_dot``); mean and worst take that score, with a warning. `MSEEvaluator` compares
    with the teacher's vectors, cut and renormalised alike.

    For a pre-norm backbone (Qwen3, ModernBERT, Gemma3) the states of an intermediate layer pass the model's final norm:
    a cell is the score of what `export_truncated` gives for it.

    Args:
        evaluator: The evaluator to run per dim, or a `SequentialEvaluator` of several, whose main score is that of its
            last one unless its ``main_score_function`` says otherwise: mean, worst and primary then follow that one
            alone. Its ``truncate_dim`` is unset.
        dims: Distinct dims, 1 to the model's width.
        layers: Layer numbers, 0 (embeddings) to L (last), for a (layer, dim) grid out of one forward pass; None scores
            the final vector.
        precisions: Columns, from ``"float32"`` (always there), ``"int8"``, ``"binary"``. int8 is calibrated at each dim
            on all texts that the evaluator encoded in float32.
        primary: Which score selects checkpoints: one of ``dims``, ``"mean"`` or ``"worst"``, over float32 vectors of
            the deepest layer.
        normalize: Renormalise after the cut. With False the vectors are those of ``encode(truncate_dim=...)``.
        memory_limit: Bytes of vectors that stay in memory, 512 MiB unless given; above it they go to a temporary file
            that is gone afterwards (see `EmbeddingStore`). None sets no limit.
        device: Where to encode, as in ``model.encode``: one device, or a list of devices for one process each. None
            takes the model's.

    Raises:
        TypeError: If ``evaluator`` is not an evaluator; on a call, if it does not use ``encode``.
        ValueError: If dims, precisions or primary are out of range, the evaluator truncates itself, two evaluators
            of a sequence share a name, or int8 or binary are asked of an evaluator that compares values with a
            teacher's; on a call, if a dim exceeds the model's width, embeddings hold NaN, a teacher has another width,
            or a dim lacks the primary metric.

    Example:
        >>> from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
        >>> sts = EmbeddingSimilarityEvaluator(["a", "b"], ["a", "c"], [1.0, 0.2], name="sts-dev")
        >>> evaluator = MatryoshkaEvaluator(sts, dims=[8, 16], primary=8)
        >>> evaluator.dims
        (8, 16)
    """

    def __init__(
        self,
        evaluator: BaseEvaluator,
        dims: Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        precisions: Sequence[str] = ("float32",),
        primary: int | str = "mean",
        normalize: bool = True,
        memory_limit: int | None = MEMORY_LIMIT,
        device: str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(evaluator, BaseEvaluator):
            raise TypeError(
                f"evaluator must be a sentence-transformers evaluator, got {type(evaluator).__name__}; "
                "put several into a SequentialEvaluator."
            )
        leaves = _leaves(evaluator, inner=True)
        if any(isinstance(leaf, MatryoshkaEvaluator) for leaf in leaves):
            raise TypeError("evaluator is, or holds, a MatryoshkaEvaluator already; give one all dims at once.")
        for leaf in leaves:
            if getattr(leaf, "truncate_dim", None) is not None:
                raise ValueError(
                    f"evaluator {leaf.__class__.__name__} has truncate_dim={leaf.truncate_dim}; leave it unset, "
                    "dims says where to cut."
                )
        repeated = [name for name, count in Counter(_name(leaf) for leaf in leaves).items() if count > 1]
        if repeated:
            raise ValueError(
                f"evaluators share the name {repeated[0]!r}, their scores would overwrite each other; name each one."
            )
        self.dims = tuple(sorted(checked_dims("dims", dims)))
        self.precisions = check_precisions(precisions)
        self.layers: tuple[int, ...] | None = None
        if layers is not None:
            fix = ", or None for the final vector"
            self.layers = checked_layers("layers", layers, None, least=0, otherwise=fix)
        primary = plain(primary)
        if primary not in ("mean", "worst") and not (is_whole(primary) and primary in self.dims):
            raise ValueError(f"primary must be 'mean', 'worst' or one of dims {list(self.dims)}, got {primary!r}.")
        self.primary = primary
        if self.precisions != ("float32",) and any(isinstance(leaf, _WITH_TEACHER) for leaf in leaves):
            raise ValueError(
                "precisions: an MSEEvaluator compares values with its teacher's, which int8 and binary codes have not; "
                "leave them out."
            )
        self.normalize = checked_flag("normalize", normalize)
        self.memory_limit = checked_limit(memory_limit)
        self.device = check_place(device, self.layers)
        self.evaluator = evaluator
        self.name = _name(evaluator)
        self.greater_is_better = _greater_is_better(evaluator)
        self.records: list[dict[str, Any]] = []
        self._revision: str | None = None
        self.peak_store_bytes = 0
        self._copies: dict[tuple[int | None, int, str], BaseEvaluator] = {}
        self._warned: set[str] = set()

    def __call__(  # type: ignore[override]
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Evaluate all cells.

        Args:
            model: The model to evaluate.
            output_path: Folder for the evaluators' CSV files, one per cell; None writes nothing.
            epoch: Current epoch, -1 outside training.
            steps: Current step, -1 outside training.

        Returns:
            All metrics of all cells, plus mean and worst of the primary metric.
        """
        checked_dims("dims", self.dims, full_width(model))
        layers: Sequence[int | None] = (None,) if self.layers is None else check_layers(self.layers, model)
        metrics: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        main: dict[int, tuple[str, float]] = {}
        with EmbeddingStore(model, self.layers, memory_limit=self.memory_limit, device=self.device) as store:
            cells = self._score_cells(store, layers, output_path, epoch, steps)
            alike = self._score_uncut_alike(
                store, cells[layers[-1], self.dims[-1], "float32"], layers[-1], epoch, steps
            )
            self.peak_store_bytes = store.nbytes
        for layer in layers:
            for precision in self.precisions:
                for dim in self.dims:
                    cell = cells[layer, dim, precision]
                    metrics.update(cell.texts)
                    metrics.update(cell.scores)
                    records.extend(self._cell_records(cell, layer, dim, precision))
                    if layer == layers[-1] and precision == "float32":
                        main[dim] = (cell.primary_key, cell.scores[cell.primary_key])
        if alike is not None:
            metrics.update(alike.scores)
            main[self.dims[-1]] = (main[self.dims[-1]][0], alike.scores[alike.primary_key])
        self.records = records
        self._revision = fingerprint(model)
        summary = self._summary(main, cells[layers[-1], self.dims[-1], "float32"])
        metrics.update(summary)
        if getattr(model, "model_card_data", None) is not None:
            self.store_metrics_in_model_card_data(model, summary, epoch, steps)
        return metrics

    def _score_cells(
        self, store: EmbeddingStore, layers: Sequence[int | None], output_path: str | None, epoch: int, steps: int
    ) -> dict[tuple[int | None, int, str], _Cell]:
        """Run the evaluator's copies, float32 first; the deepest layer's largest dim, which sets the metric, leads."""
        cells: dict[tuple[int | None, int, str], _Cell] = {}
        first: _Cell | None = None
        for precision in self.precisions:
            if precision == "int8":
                store.calibrate()
            for layer in reversed(layers):
                for dim in reversed(self.dims):
                    cell = self._score(store, (layer, dim, precision), first, output_path, epoch, steps)
                    first = first or cell
                    cells[layer, dim, precision] = cell
        return cells

    def _score(
        self,
        store: EmbeddingStore,
        place: tuple[int | None, int, str],
        first: _Cell | None,
        output_path: str | None,
        epoch: int,
        steps: int,
    ) -> _Cell:
        layer, dim, precision = place
        alike = precision == _ALIKE
        view = store.view(
            dim,
            layer=layer,
            precision="float32" if alike else precision,
            normalize=self.normalize,
            normalize_uncut=alike,
        )
        evaluator, label = self._copy(*place), _cell_label(*place)
        _cut_teachers(evaluator, self.evaluator, dim, store.width, alike or (self.normalize and dim < store.width))
        if first is not None:
            _set_primary_metrics(evaluator, first.evaluator)
        scores = evaluator(view, output_path, epoch, steps)  # type: ignore[arg-type]
        if not view.encode_calls:
            raise TypeError(
                f"{type(self.evaluator).__name__} never called model.encode, so its scores say nothing about dims; use "
                "an evaluator that encodes."
            )
        named, texts, primary_key = _named_scores(evaluator, scores, label)
        cell = _Cell(evaluator, label, named, texts, primary_key)
        return cell if first is None else self._with_metric_of(first, cell)

    def _with_metric_of(self, first: _Cell, cell: _Cell) -> _Cell:
        """The cell, counted by the metric that the first one was counted by."""
        wanted = self._unlabelled(first, first.primary_key)
        same = [key for key in cell.scores if self._unlabelled(cell, key) == wanted]
        if not same:
            raise ValueError(
                f"{type(self.evaluator).__name__} gives no {first.primary_key!r} at {cell.label}, only "
                f"{list(cell.scores)}; dims can be compared by a metric that all have: set its primary_metric."
            )
        if isinstance(self.evaluator, SequentialEvaluator) and _metrics_of(cell) != _metrics_of(first):
            self._warn(
                f"the evaluators of the sequence choose other primary metrics at {cell.label} ({_metrics_of(cell)}) "
                f"than at {first.label} ({_metrics_of(first)}), so its score mixes metrics; fix them."
            )
        _set_primary_metrics(cell.evaluator, first.evaluator)
        return replace(cell, primary_key=same[0])

    def _unlabelled(self, cell: _Cell, key: str) -> str:
        """A score's name without its dim."""
        task, metric = self._task_and_metric(cell, key)
        return key if metric == key else f"{task}_{metric}"

    def _task_and_metric(self, cell: _Cell, key: str) -> tuple[str, str]:
        """Whose score it is and which; the whole name as the metric, if the cell is not in it."""
        names = sorted((_name(leaf) for leaf in _leaves(self.evaluator, inner=True)), key=len, reverse=True)
        for name in (*names, self.name, "dim"):
            if key.startswith(start := f"{name}-{cell.label}_"):
                return name, key.removeprefix(start)
        return self.name, key

    def _score_uncut_alike(
        self, store: EmbeddingStore, uncut: _Cell, layer: int | None, epoch: int, steps: int
    ) -> _Cell | None:
        """The uncut width, renormalised like all other dims; None where that changes nothing.

        The uncut vectors are otherwise the model's own. For a score that depends on their length this would compare
        two things.
        """
        dim = self.dims[-1]
        if not self.normalize or dim < store.width or len(self.dims) == 1:
            return None
        if store.has_unit_length and _teachers_have_unit_length(self.evaluator):
            return None
        if all("cosine" in metric for metric in _metrics_of(uncut)):
            return None
        alike = self._score(store, (layer, dim, _ALIKE), uncut, None, epoch, steps)
        key_of = {self._unlabelled(alike, key): key for key in alike.scores}
        twin = {key: key_of.get(self._unlabelled(uncut, key)) for key in uncut.scores}
        changed = sorted(
            key
            for key, other in twin.items()
            if other is not None
            and key in {uncut.primary_key, *_primary_keys(uncut)}
            and abs(uncut.scores[key] - alike.scores[other]) > 1e-5
        )
        if not changed:
            return None
        self._warn(
            f"{', '.join(changed)}: depends on the length of the vectors, and the model's or the teacher's are not of "
            "length 1. The score is that of these vectors as they are, those of smaller dims are of renormalised ones; "
            f"that of renormalised ones stands beside it ({twin[uncut.primary_key]}), and mean and worst use it. "
            "With normalize=False all dims keep the vectors of encode(truncate_dim=...)."
        )
        return alike

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _summary(self, main: dict[int, tuple[str, float]], widest: _Cell) -> dict[str, float]:
        values = [value for _, value in main.values()]
        metric = self._unlabelled(widest, widest.primary_key)
        suffix = metric[len(self.name) :] if metric.startswith(f"{self.name}_") else f"_{metric}"
        # NumPy's: a score that is not a number must not hide behind the others
        worst = float(np.min(values) if self.greater_is_better else np.max(values))
        summary = {
            f"{self.name}-mean{suffix}": float(np.mean(values)),
            f"{self.name}-worst{suffix}": float(worst),
        }
        if isinstance(self.primary, int):
            self.primary_metric = main[self.primary][0]
        else:
            self.primary_metric = f"{self.name}-{self.primary}{suffix}"
        return summary

    def _copy(self, layer: int | None, dim: int, precision: str) -> BaseEvaluator:
        # Kept over calls: the model card files results under the evaluator object.
        cell = (layer, dim, precision)
        if cell not in self._copies:
            self._copies[cell] = _renamed_copy(self.evaluator, _cell_label(*cell))
        return self._copies[cell]

    def _cell_records(self, cell: _Cell, layer: int | None, dim: int, precision: str) -> list[dict[str, Any]]:
        primaries = _main_keys(cell.evaluator, cell.scores, cell.primary_key, cell.label)
        records = []
        for key, value in cell.scores.items():
            task, metric = self._task_and_metric(cell, key)
            records.append(
                {
                    "task": task,
                    "metric": metric,
                    "primary": key in primaries,
                    "layer": layer,
                    "dim": dim,
                    "precision": precision,
                    "bytes": bytes_per_vector(dim, precision),
                    "score": float(value),
                }
            )
        return records

    def report(self, model: str = "model", seed: int | None = None) -> EvaluationReport:
        """The last call's scores as a report (table, Markdown, plots).

        Args:
            model: Name of the model in tables. Its state (a hash, see `identity.fingerprint`) is kept beside it, so
                that reports of different models under one name stay apart.
            seed: Training seed, if several runs of one model are to be averaged in tables and drawn as a band.

        Returns:
            The report.

        Raises:
            RuntimeError: If nothing was evaluated yet.
        """
        from mipic_st.evaluation.report import EvaluationReport

        if not self.records:
            raise RuntimeError("nothing evaluated yet; call the evaluator with a model first.")
        identity = {"model": model, "revision": self._revision, "seed": seed}
        return EvaluationReport([{**identity, **record} for record in self.records])

    @property
    def description(self) -> str:
        """Heading in the model card."""
        return f"Matryoshka {self.evaluator.description}"

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        config: dict[str, Any] = {"dims": list(self.dims), "primary": self.primary}
        if self.layers is not None:
            config["layers"] = list(self.layers)
        if self.precisions != ("float32",):
            config["precisions"] = list(self.precisions)
        if not self.normalize:
            config["normalize"] = False
        return config


# In place of a precision: float32 vectors of the uncut width, renormalised like all others.
_ALIKE = "unit"
# Evaluators that compare the model's vectors with those of a teacher, which they hold.
_WITH_TEACHER = (MSEEvaluator, MSEEvaluatorFromDataFrame)


@dataclass(frozen=True)
class _Cell:
    """One run of the evaluator: its copy, the cell's label, all scores by full name, texts, the main score's name."""

    evaluator: BaseEvaluator
    label: str
    scores: dict[str, float]
    texts: dict[str, Any]
    primary_key: str


def _name(evaluator: BaseEvaluator) -> str:
    return getattr(evaluator, "name", "") or "dim"


def _held(evaluator: BaseEvaluator) -> dict[str, Any]:
    """Attributes that are evaluators, or lists, tuples or dicts of nothing but evaluators."""
    return {
        name: value
        for name, value in vars(evaluator).items()
        if len(_listed(value)) and all(isinstance(item, BaseEvaluator) for item in _listed(value))
    }


def _listed(value: Any) -> Any:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, (list, tuple)) else [value]


def _children(evaluator: BaseEvaluator) -> list[Any]:
    """The evaluators that an evaluator holds."""
    return [child for value in _held(evaluator).values() for child in _listed(value)]


def _leaves(evaluator: BaseEvaluator, inner: bool = False) -> list[Any]:
    """The evaluators inside a sequence; with ``inner`` those inside collections such as NanoBEIR too."""
    if isinstance(evaluator, SequentialEvaluator):
        return [leaf for child in evaluator.evaluators for leaf in _leaves(child, inner)]
    return [evaluator, *(leaf for child in _children(evaluator) if inner for leaf in _leaves(child, inner))]


def _primary_keys(cell: _Cell) -> set[str]:
    """Names of the main scores of the evaluators inside."""
    return {str(leaf.primary_metric) for leaf in _leaves(cell.evaluator, inner=True)}


def _metrics_of(cell: _Cell) -> list[str]:
    """The main metric of each evaluator inside, without its name."""
    return [str(leaf.primary_metric).removeprefix(f"{_name(leaf)}_") for leaf in _leaves(cell.evaluator, inner=True)]


def _set_primary_metrics(evaluator: BaseEvaluator, like: BaseEvaluator) -> None:
    """Give a copy the primary metrics of another one, under its own names."""
    for leaf, other in zip(_leaves(evaluator, inner=True), _leaves(like, inner=True), strict=True):
        metric = other.primary_metric
        if metric is not None:
            if metric.startswith(f"{_name(other)}_"):
                metric = _name(leaf) + metric[len(_name(other)) :]
            with contextlib.suppress(AttributeError):  # a property of an evaluator of somebody's own
                leaf.primary_metric = metric


def _greater_is_better(evaluator: BaseEvaluator) -> bool:
    """Of a sequence that counts as its last one does, which is the default, that one's; it says True of itself."""
    if isinstance(evaluator, SequentialEvaluator):
        default = signature(SequentialEvaluator).parameters["main_score_function"].default
        if evaluator.main_score_function is default:
            return _greater_is_better(list(evaluator.evaluators)[-1])
    return evaluator.greater_is_better


def _teachers_have_unit_length(evaluator: BaseEvaluator) -> bool:
    """Whether all vectors that the model's are compared with, value by value, have length 1."""
    for leaf in _leaves(evaluator, inner=True):
        vectors: Any = ()
        if isinstance(leaf, MSEEvaluator):
            vectors = leaf.source_embeddings
        elif isinstance(leaf, MSEEvaluatorFromDataFrame):
            vectors = list(leaf.teacher_embeddings.values())
        if len(vectors) and not np.allclose(np.linalg.norm(np.asarray(vectors), axis=1), 1, atol=1e-3):
            return False
    return True


def _cut_teachers(evaluator: BaseEvaluator, original: BaseEvaluator, dim: int, width: int, unit: bool) -> None:
    """Cut, and with ``unit`` renormalise, the teacher's vectors of a copy as those of the model are."""

    def cut(vectors: Any) -> np.ndarray:
        vectors = np.asarray(vectors)
        if vectors.ndim == 2 and vectors.shape[1] != width:
            raise ValueError(
                f"the teacher of {type(original).__name__} gives {vectors.shape[1]} values and the model {width}, so "
                "no cut of one can be compared with that of the other; use a teacher of the model's width."
            )
        return unit_length(vectors[:, :dim]) if unit else vectors[:, :dim]

    for leaf, source in zip(_leaves(evaluator, inner=True), _leaves(original, inner=True), strict=True):
        if isinstance(leaf, MSEEvaluator):
            leaf.source_embeddings = cut(source.source_embeddings)
        elif isinstance(leaf, MSEEvaluatorFromDataFrame) and source.teacher_embeddings:
            texts, vectors = zip(*source.teacher_embeddings.items(), strict=True)
            leaf.teacher_embeddings = dict(zip(texts, cut(vectors), strict=True))


def _main_keys(evaluator: BaseEvaluator, scores: dict[str, float], primary_key: str, label: str) -> set[str]:
    """The scores that stand for a task each: those of the single evaluators, not what sums several of them up.

    Args:
        evaluator: The evaluator after its call.
        scores: Its scores under their full names.
        primary_key: Its own primary metric, for an evaluator that holds no others.
        label: The cell.

    Returns:
        Keys of ``scores``.
    """
    keys: set[str] = set()
    for number, child in enumerate(_children(evaluator)):
        name, metric = getattr(child, "name", "") or f"dim-{label}", str(child.primary_metric)
        # the last is SequentialEvaluator's name for the score of an evaluator that returns a number
        wanted = [metric, f"{name}_{metric}", f"dim-{label}_{metric}", f"dim-{label}_evaluator_{number}"]
        found = next(
            (key for key in [*wanted, *scores] if key in scores and (key in wanted or key.startswith(name))), ""
        )
        keys |= _main_keys(child, scores, found, label)
    return keys & set(scores) or {primary_key}


def _cell_label(layer: int | None, dim: int, precision: str) -> str:
    label = str(dim) if layer is None else f"L{layer}-{dim}"
    return label if precision == "float32" else f"{label}-{precision}"


def _renamed_copy(evaluator: BaseEvaluator, label: str, made: dict[int, Any] | None = None) -> BaseEvaluator:
    """A copy that shares texts with the original but has its own name, files and primary metric."""
    made = {} if made is None else made
    if id(evaluator) in made:
        return made[id(evaluator)]
    twin: Any = copy.copy(evaluator)
    made[id(evaluator)] = twin
    for name in ("csv_headers", "similarity_fn_names", "score_function_names"):
        if isinstance(getattr(twin, name, None), list):
            setattr(twin, name, list(getattr(twin, name)))
    for name, value in _held(evaluator).items():
        if isinstance(value, dict):
            setattr(twin, name, {key: _renamed_copy(child, label, made) for key, child in value.items()})
        elif isinstance(value, (list, tuple)):
            setattr(twin, name, type(value)(_renamed_copy(child, label, made) for child in value))
        else:
            setattr(twin, name, _renamed_copy(value, label, made))
    old = getattr(evaluator, "name", "") or ""
    if hasattr(evaluator, "name"):
        twin.name = f"{_name(evaluator)}-{label}"
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
        kind = next((kind for kind in ("_results_", "_predictions_") if kind in stem), None)
        head, _, tail = stem.partition(kind) if kind else (stem.removesuffix("_"), "", "")
        stem = f"{head}_{label}{kind or '_'}{tail}"
    return str(path.with_name(stem.removesuffix("_") + path.suffix))


def _named_scores(
    evaluator: BaseEvaluator, scores: float | dict[str, Any], label: str
) -> tuple[dict[str, float], dict[str, Any], str]:
    """All scores under names that hold the cell, metrics that are no numbers likewise, and the primary score's name."""
    names = [leaf.name for leaf in _leaves(evaluator, inner=True) if getattr(leaf, "name", "")]
    if not isinstance(scores, dict):
        key = f"dim-{label}_score"
        return {key: float(scores)}, {}, key

    def full(key: str) -> str:
        return key if any(key.startswith(f"{name}_") for name in names) else f"dim-{label}_{key}"

    if not scores:
        raise ValueError(f"{type(evaluator).__name__} returned no scores.")
    numbers, texts = {}, {}
    for key, value in scores.items():
        try:
            numbers[key] = value if isinstance(value, float) else _as_number(value)
        except (TypeError, ValueError):
            texts[full(key)] = value
    primary = evaluator.primary_metric or next(iter(numbers or scores))
    if primary not in scores:
        # a primary metric without the evaluator's name, beside scores that have it
        primary = next((f"{name}_{primary}" for name in names if f"{name}_{primary}" in scores), primary)
    if primary not in scores:
        raise ValueError(
            f"{type(evaluator).__name__} says primary_metric={evaluator.primary_metric!r}, which is none of its scores "
            f"{list(scores)}; set it to one of them."
        )
    if primary not in numbers:
        raise ValueError(
            f"{type(evaluator).__name__} says primary_metric={primary!r}, which is no number but {scores[primary]!r}; "
            "set it to a score."
        )
    return {full(key): float(value) for key, value in numbers.items()}, texts, full(primary)


def _as_number(value: Any) -> float:
    if isinstance(value, (str, bytes)):
        raise TypeError
    return float(value)
