"""Evaluation per dimension: one encoding, every dim, layer and precision, with sentence-transformers' own evaluators.

`MatryoshkaEvaluator` wraps an evaluator; `ClassificationProbeEvaluator` is one more evaluator that it can wrap.
"""

from __future__ import annotations

import copy
import csv
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator

from mipic_st._checks import as_list, checked_count, checked_dims, checked_flag, checked_layers, is_whole, plain
from mipic_st.embedding_store import (
    EmbeddingStore,
    bytes_per_vector,
    check_layers,
    check_precisions,
    full_width,
)

if TYPE_CHECKING:
    from mipic_st.report import EvaluationReport

logger = logging.getLogger(__name__)

__all__ = ["ClassificationProbeEvaluator", "MatryoshkaEvaluator"]


class MatryoshkaEvaluator(BaseEvaluator):
    """Score a model at several dims (and layers, and precisions) with one pass over the texts.

    Wraps any sentence-transformers evaluator that calls ``model.encode``, ``encode_query`` or ``encode_document``.
    Every distinct text is encoded once at full width; each dim's vectors are cut from the store and renormalised (the
    uncut width stays as the model gives it). Metrics carry the dim in the data set's name, so they land in trainer logs
    and in the model card's tables: ``sts-dev-64_spearman_cosine``, with layers ``sts-dev-L4-64_spearman_cosine``, with
    precisions ``sts-dev-64-int8_spearman_cosine``. The mean and the worst dim of the wrapped evaluator's primary metric
    are added: ``sts-dev-mean_spearman_cosine``, ``sts-dev-worst_spearman_cosine``. An evaluator without a name
    counts as ``dim``: ``dim-64_spearman_cosine``.

    For a pre-norm backbone (Qwen3, ModernBERT, Gemma3) the states of an intermediate layer pass the model's final norm:
    a cell is the score of what `export_truncated` gives for it.

    Args:
        evaluator: The evaluator to run per dim, or a `SequentialEvaluator` of several. Its ``truncate_dim`` is unset.
        dims: Distinct dims, 1 to the model's width.
        layers: Layer numbers, 0 (embeddings) to L (last), for a (layer, dim) grid out of one forward pass; None scores
            the final vector.
        precisions: Columns, from ``"float32"`` (always there), ``"int8"``, ``"binary"``. int8 is calibrated at each dim
            on all texts of the evaluation.
        primary: Which score selects checkpoints: one of ``dims``, ``"mean"`` or ``"worst"``, over float32 vectors of
            the deepest layer.
        normalize: Renormalise after the cut. With False the vectors are those of ``encode(truncate_dim=...)``.

    Raises:
        TypeError: If ``evaluator`` is not an evaluator; on a call, if it does not use ``encode``.
        ValueError: If dims, precisions or primary are out of range, the evaluator truncates itself, or two evaluators
            of a sequence share a name; on a call, if a dim exceeds the model's width or embeddings hold NaN.

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
    ) -> None:
        super().__init__()
        if not isinstance(evaluator, BaseEvaluator):
            raise TypeError(
                f"evaluator must be a sentence-transformers evaluator, got {type(evaluator).__name__}; "
                "put several into a SequentialEvaluator."
            )
        if isinstance(evaluator, MatryoshkaEvaluator):
            raise TypeError("evaluator is a MatryoshkaEvaluator already; give it all dims at once.")
        leaves = _leaves(evaluator)
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
        self.normalize = checked_flag("normalize", normalize)
        self.evaluator = evaluator
        self.name = _name(evaluator)
        self.greater_is_better = evaluator.greater_is_better
        self.records: list[dict[str, Any]] = []
        self.peak_store_bytes = 0
        self._copies: dict[tuple[int | None, int, str], BaseEvaluator] = {}

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
        store = EmbeddingStore(model, self.layers)
        metrics: dict[str, float] = {}
        records: list[dict[str, Any]] = []
        main: dict[int, tuple[str, float]] = {}
        try:
            for layer in layers:
                # float32 first: it fills the store on which int8 is calibrated
                for precision in self.precisions:
                    for dim in self.dims:
                        view = store.view(dim, layer=layer, precision=precision, normalize=self.normalize)
                        evaluator = self._copy(layer, dim, precision)
                        scores = evaluator(view, output_path, epoch, steps)  # type: ignore[arg-type]
                        if not view.encode_calls:
                            raise TypeError(
                                f"{type(self.evaluator).__name__} never called model.encode, so its scores say nothing "
                                "about dims; use an evaluator that encodes."
                            )
                        cell = _cell_label(layer, dim, precision)
                        named, primary_key = _named_scores(evaluator, scores, cell)
                        metrics.update(named)
                        records.extend(self._cell_records(evaluator, named, primary_key, layer, dim, precision))
                        if layer == layers[-1] and precision == "float32":
                            main[dim] = (primary_key, named[primary_key])
            self.peak_store_bytes = store.nbytes
        finally:
            store.clear()
        self.records = records
        summary = self._summary(main)
        metrics.update(summary)
        store_card = getattr(model, "model_card_data", None)
        if store_card is not None:
            self.store_metrics_in_model_card_data(model, summary, epoch, steps)
        return metrics

    def _summary(self, main: dict[int, tuple[str, float]]) -> dict[str, float]:
        values = [value for _, value in main.values()]
        some_dim = self.dims[-1]
        some_key = main[some_dim][0]
        own = f"{self.name}-{_cell_label(None if self.layers is None else max(self.layers), some_dim, 'float32')}"
        suffix = some_key[len(own) :] if some_key.startswith(own) else "_" + some_key
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

    def _cell_records(
        self,
        evaluator: BaseEvaluator,
        scores: dict[str, float],
        primary_key: str,
        layer: int | None,
        dim: int,
        precision: str,
    ) -> list[dict[str, Any]]:
        label = _cell_label(layer, dim, precision)
        names = sorted((_name(leaf) for leaf in _leaves(self.evaluator, inner=True)), key=len, reverse=True)
        primaries = {str(leaf.primary_metric) for leaf in _leaves(evaluator, inner=True)} | {primary_key}
        records = []
        for key, value in scores.items():
            task = next((name for name in names if key.startswith(f"{name}-{label}_")), self.name)
            records.append(
                {
                    "task": task,
                    "metric": key.removeprefix(f"{task}-{label}_"),
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
            model: Name of the model in tables.
            seed: Training seed, if several runs of one model are to be drawn as a band.

        Returns:
            The report.

        Raises:
            RuntimeError: If nothing was evaluated yet.
        """
        from mipic_st.report import EvaluationReport

        if not self.records:
            raise RuntimeError("nothing evaluated yet; call the evaluator with a model first.")
        return EvaluationReport([{"model": model, "seed": seed, **record} for record in self.records])

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


def _name(evaluator: BaseEvaluator) -> str:
    return getattr(evaluator, "name", "") or "dim"


def _leaves(evaluator: BaseEvaluator, inner: bool = False) -> list[Any]:
    """The evaluators inside a sequence; with ``inner`` those inside collections such as NanoBEIR too."""
    children = getattr(evaluator, "evaluators", None)
    if isinstance(evaluator, SequentialEvaluator):
        return [leaf for child in evaluator.evaluators for leaf in _leaves(child, inner)]
    if inner and isinstance(children, list):
        return [evaluator, *(leaf for child in children for leaf in _leaves(child, inner))]
    return [evaluator]


def _cell_label(layer: int | None, dim: int, precision: str) -> str:
    label = str(dim) if layer is None else f"L{layer}-{dim}"
    return label if precision == "float32" else f"{label}-{precision}"


def _renamed_copy(evaluator: BaseEvaluator, label: str) -> BaseEvaluator:
    """A copy that shares texts with the original but has its own name, CSV file and primary metric."""
    twin = copy.copy(evaluator)
    for name in ("csv_headers", "similarity_fn_names", "score_function_names"):
        if isinstance(getattr(twin, name, None), list):
            setattr(twin, name, list(getattr(twin, name)))
    children = getattr(evaluator, "evaluators", None)
    if isinstance(children, list):
        twin.evaluators = [_renamed_copy(child, label) for child in children]  # type: ignore[attr-defined]
    old = getattr(evaluator, "name", "") or ""
    if hasattr(evaluator, "name"):
        twin.name = f"{_name(evaluator)}-{label}"  # type: ignore[attr-defined]
    primary = evaluator.primary_metric
    # an evaluator that ran before carries its old name in the primary metric
    if primary and old and primary.startswith(f"{old}_"):
        twin.primary_metric = primary[len(old) + 1 :]
    csv_file = getattr(evaluator, "csv_file", None)
    if isinstance(csv_file, str):
        if old and old in csv_file:
            head, _, tail = csv_file.rpartition(old)
            twin.csv_file = f"{head}{old}-{label}{tail}"  # type: ignore[attr-defined]
        else:
            stem = csv_file.removesuffix(".csv")
            head, results, _ = stem.partition("_results")
            twin.csv_file = f"{head}_{label}{results}.csv"  # type: ignore[attr-defined]
    return twin


def _named_scores(
    evaluator: BaseEvaluator, scores: float | dict[str, float], label: str
) -> tuple[dict[str, float], str]:
    """All scores under names that hold the cell, and the key of the primary one."""
    names = [leaf.name for leaf in _leaves(evaluator, inner=True) if getattr(leaf, "name", "")]
    if not isinstance(scores, dict):
        key = f"dim-{label}_score"
        return {key: float(scores)}, key

    def full(key: str) -> str:
        return key if any(key.startswith(f"{name}_") for name in names) else f"dim-{label}_{key}"

    if not scores:
        raise ValueError(f"{type(evaluator).__name__} returned no scores.")
    primary = evaluator.primary_metric or next(iter(scores))
    if primary not in scores:
        # a primary metric without the evaluator's name, beside scores that have it
        primary = next((f"{name}_{primary}" for name in names if f"{name}_{primary}" in scores), primary)
    if primary not in scores:
        raise ValueError(
            f"{type(evaluator).__name__} says primary_metric={evaluator.primary_metric!r}, which is none of its scores "
            f"{list(scores)}; set it to one of them."
        )
    return {full(key): float(value) for key, value in scores.items()}, full(primary)


class ClassificationProbeEvaluator(BaseEvaluator):
    """Accuracy and macro-F1 of a logistic regression on frozen embeddings.

    With ``n_experiments`` unset, one classifier is fitted on all training texts. With it set, the protocol is MTEB's:
    in each experiment ``samples_per_label`` texts of each label are drawn with the seed, a classifier is fitted on them
    and scored on all test texts; scores are averaged. Wrap it into `MatryoshkaEvaluator` for scores per dim.

    Args:
        train_texts: Training texts.
        train_labels: Their labels, strings or whole numbers, at least two different ones.
        test_texts: Test texts.
        test_labels: Their labels, each of which occurs in ``train_labels``.
        name: Data set's name, put before metrics.
        n_experiments: Experiments of MTEB's protocol (MTEB: 10); None fits once on everything.
        samples_per_label: Texts per label in each experiment (MTEB: 8 to 32, by task).
        seed: Seed of the draws and of the solver.
        max_iter: Iterations of the solver (MTEB: 100).
        batch_size: Texts per forward pass.
        show_progress_bar: Show bars while encoding.
        write_csv: Write a CSV file when an output path is given.

    Raises:
        TypeError: If texts are no list of strings, or labels neither all strings nor all whole numbers.
        ValueError: If lengths differ, texts are missing, there is one class only, a test label was never trained, or a
            number is out of range.

    Example:
        >>> probe = ClassificationProbeEvaluator(["a", "b"], [0, 1], ["c", "d"], [0, 1], name="tiny")
        >>> probe.primary_metric
        'accuracy'
    """

    def __init__(
        self,
        train_texts: Sequence[str],
        train_labels: Sequence[Any],
        test_texts: Sequence[str],
        test_labels: Sequence[Any],
        name: str = "",
        *,
        n_experiments: int | None = None,
        samples_per_label: int = 8,
        seed: int = 42,
        max_iter: int = 100,
        batch_size: int = 32,
        show_progress_bar: bool = False,
        write_csv: bool = True,
    ) -> None:
        super().__init__()
        self.train_texts, self.train_labels = _checked_part("train", train_texts, train_labels)
        self.test_texts, self.test_labels = _checked_part("test", test_texts, test_labels)
        classes = set(self.train_labels.tolist())
        if len(classes) < 2:
            raise ValueError(f"train_labels holds one class only, {classes.pop()!r}; a classifier needs at least two.")
        unknown = set(self.test_labels.tolist()) - classes
        if unknown:
            raise ValueError(f"test_labels holds {sorted(map(str, unknown))[:5]}, which train_labels does not.")
        self.name = name
        self.n_experiments = None if n_experiments is None else checked_count("n_experiments", n_experiments)
        self.samples_per_label = checked_count("samples_per_label", samples_per_label)
        self.seed = checked_count("seed", seed, least=0)
        self.max_iter = checked_count("max_iter", max_iter)
        self.batch_size = checked_count("batch_size", batch_size)
        self.show_progress_bar = checked_flag("show_progress_bar", show_progress_bar)
        self.write_csv = checked_flag("write_csv", write_csv)
        self.primary_metric = "accuracy"
        self.csv_file = "classification_probe" + (f"_{name}" if name else "") + "_results.csv"

    def _draws(self) -> list[np.ndarray]:
        """Training rows of each experiment; the shuffles build on each other, as in MTEB."""
        if self.n_experiments is None:
            return [np.arange(len(self.train_texts))]
        rows = list(range(len(self.train_texts)))
        draws = []
        for _ in range(self.n_experiments):
            np.random.RandomState(self.seed).shuffle(rows)
            taken: Counter[Any] = Counter()
            chosen = []
            for row in rows:
                label = self.train_labels[row]
                if taken[label] < self.samples_per_label:
                    taken[label] += 1
                    chosen.append(row)
            draws.append(np.array(chosen))
        return draws

    def __call__(  # type: ignore[override]
        self, model: SentenceTransformer, output_path: str | None = None, epoch: int = -1, steps: int = -1
    ) -> dict[str, float]:
        """Encode, fit, score.

        Args:
            model: The model to evaluate; it stays as it is.
            output_path: Folder of the CSV file; None writes nothing.
            epoch: Current epoch, -1 outside training.
            steps: Current step, -1 outside training.

        Returns:
            ``accuracy`` and ``macro_f1``, 0 to 1, under the evaluator's name.

        Raises:
            ImportError: If scikit-learn is missing.
        """
        try:
            from sklearn.linear_model import LogisticRegression
            from sklearn.metrics import accuracy_score, f1_score
        except ImportError as error:
            raise ImportError('the classification probe needs scikit-learn: pip install "mipic-st[eval]"') from error

        draws = self._draws()
        used = np.unique(np.concatenate(draws))
        position = {row: i for i, row in enumerate(used.tolist())}
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "show_progress_bar": self.show_progress_bar,
            "convert_to_numpy": True,
        }
        train = model.encode([self.train_texts[row] for row in used], **options)
        test = model.encode(self.test_texts, **options)
        accuracies, f1s = [], []
        for draw in draws:
            classifier = LogisticRegression(max_iter=self.max_iter, random_state=self.seed)
            classifier.fit(train[[position[row] for row in draw.tolist()]], self.train_labels[draw])
            predicted = classifier.predict(test)
            accuracies.append(accuracy_score(self.test_labels, predicted))
            f1s.append(f1_score(self.test_labels, predicted, average="macro"))
        metrics = {"accuracy": float(np.mean(accuracies)), "macro_f1": float(np.mean(f1s))}
        if output_path is not None and self.write_csv:
            _append_csv(Path(output_path) / self.csv_file, {"epoch": epoch, "steps": steps, **metrics})
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    @property
    def description(self) -> str:
        """Heading in the model card."""
        return "Classification Probe"

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        if self.n_experiments is None:
            return {"seed": self.seed}
        return {
            "n_experiments": self.n_experiments,
            "samples_per_label": self.samples_per_label,
            "seed": self.seed,
        }


def _checked_part(part: str, texts: Any, labels: Any) -> tuple[list[str], np.ndarray]:
    """Texts and labels of the training or test part, one each."""
    texts = as_list(f"{part}_texts", texts, '["a text", "another"]')
    labels = as_list(f"{part}_labels", labels, "[0, 1]")
    if len(texts) != len(labels):
        raise ValueError(f"{part}_texts has {len(texts)} entries and {part}_labels {len(labels)}; give one each.")
    if not texts:
        raise ValueError(f"{part}_texts is empty.")
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{part}_texts must be strings, got {text!r} at index {row}.")
    for row, label in enumerate(labels):
        if type(label) is not type(labels[0]) or not isinstance(label, (str, int)):
            raise TypeError(
                f"{part}_labels must be all strings or all whole numbers, got {label!r} at index {row}; leave out "
                "texts without a label and turn floats into integers."
            )
    return texts, np.asarray(labels)


def _append_csv(path: Path, row: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)
