"""Evaluation per dimension: one encoding, every dim, layer and precision, with any sentence-transformers evaluator."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator

from mipic_st.codes import bytes_per_vector, needs_ranges
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.encoder.structure import check_layers, full_width, unwrap
from mipic_st.evaluation.cells import (
    WITH_TEACHER,
    Cell,
    cell_label,
    cut_teachers,
    is_greater_better,
    leaves_of,
    main_keys,
    metrics_of,
    name_of,
    named_scores,
    renamed_copy,
    set_primary_metrics,
    teachers_have_unit_length,
)
from mipic_st.evaluation.coded import (
    SCORED_TEXTS,
    SCORINGS,
    check_calibration,
    check_precisions,
    how_coded,
    name_of_calibration,
)
from mipic_st.evaluation.store import MEMORY_LIMIT, EmbeddingStore, FittedCuts, check_place, checked_limit
from mipic_st.validation import checked_choice, checked_dims, checked_flag, checked_layers, is_whole, plain

if TYPE_CHECKING:
    from mipic_st.codes import Ranges
    from mipic_st.evaluation.report import EvaluationReport

logger = logging.getLogger(__name__)

# Instead of a precision: float32 vectors of the uncut width, renormalised as those of all other dims are.
UNIT = "unit"
_Place = tuple[int | None, str, int]
_When = tuple[str | None, int, int]


class MatryoshkaEvaluator(BaseEvaluator):
    """Score a model at several dims (and layers, and precisions) with one pass over the texts.

    Wraps any sentence-transformers evaluator that calls ``encode``, ``encode_query`` or ``encode_document``. Every
    distinct text is encoded once; each dim's vectors are cut and renormalised (the uncut width stays as the model gives
    it). Metrics carry the dim in the data set's name: ``sts-dev-64_spearman_cosine``, with layers
    ``sts-dev-L4-64_...``, with precisions ``sts-dev-64-int8_...``, without a name ``dim-64_...``. The mean and the
    worst dim of the primary metric are added: ``sts-dev-mean_...``, ``sts-dev-worst_...``.

    All dims are compared by the metric that the evaluator picks at the largest one. If it depends on the length of
    vectors (a dot product), the uncut width is also scored renormalised (``sts-dev-384-unit_...``), and mean and worst
    take that.
    The teacher's vectors of an `MSEEvaluator` are cut and renormalised in the same way. States of an intermediate layer
    go through the model's final norm, so each score is that of the model which `export_truncated` gives for it.

    Args:
        evaluator: The evaluator, or a `SequentialEvaluator` of several: its main score, the last one's by default,
            makes mean, worst and primary. Its ``truncate_dim`` is unset.
        dims: Distinct dims, 1 to the model's width.
        layers: Layers, 0 (embeddings) to L (last), for a (layer, dim) grid; None scores the final vector.
        layer_cuts: What `fit_layer_cuts` has fitted on the model: those of ``layers`` that have a map are scored with
            it, as ``export_truncated(model, layer, dim, cuts=...)`` gives them, and all others as they are. Scores are
            called ``sts-dev-L3-fitted-64_...``.
        precisions: Columns, from ``"float32"`` (always there), ``"float16"``, ``"int8"``, ``"uint8"``, ``"int4"``,
            ``"binary"``, ``"ubinary"``, as `mipic_st.codes` makes them.
        scoring: ``"symmetric"`` compares code with code: int8 and uint8 as sentence-transformers' evaluators do,
            float16 and int4 decoded, bits exactly by their Hamming distance (the vectors that the evaluator gets have
            up to four columns more for it). ``"asymmetric"`` keeps queries floats and decodes documents, as search
            engines do; scores are called ``ir-64-int8-asymmetric_...``. A query is what ``encode_query`` encodes, or
            ``encode`` with the task or prompt ``"query"``; where nothing tells queries from documents (pairs of texts,
            classification), all texts are coded and decoded, with a warning.
        calibration: What the ranges of codes and the mean of bits come from: texts like those that will be stored, or a
            dict of `Ranges` by dim, such as a rotation keeps. The default, ``"scored texts"``, takes the texts of the
            evaluator itself, since there are no others; int8 and uint8 then have their extremes as ranges, as in
            sentence-transformers. That may overrate codes: an index is calibrated before it sees a query. Records and
            model card say which it was.
        primary: Which score selects checkpoints: one of ``dims``, ``"mean"`` or ``"worst"``, over float32 vectors of
            the deepest layer.
        normalize: Renormalise after the cut. With False the vectors are those of ``encode(truncate_dim=...)``.
        memory_limit: Bytes of vectors that stay in memory, 512 MiB by default; above it they go to a temporary file.
            None sets no limit.
        device: One device, or a list of devices for one process each; None takes the model's.

    Raises:
        TypeError: If ``evaluator`` is not an evaluator; on a call, if it does not use ``encode``.
        ValueError: If an argument is out of range, the evaluator truncates itself, two evaluators share a name, or
            precisions are asked of an evaluator with a teacher, or Ranges do not fit; on a call, if a dim exceeds the
            model's width, embeddings hold NaN, a teacher has another width, or a dim lacks the primary metric.

    Example:
        >>> from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
        >>> sts = EmbeddingSimilarityEvaluator(["a", "b"], ["a", "c"], [1.0, 0.2], name="sts-dev")
        >>> MatryoshkaEvaluator(sts, dims=[8, 16], primary=8).dims
        (8, 16)
    """

    def __init__(
        self,
        evaluator: BaseEvaluator,
        dims: Sequence[int],
        *,
        layers: Sequence[int] | None = None,
        layer_cuts: FittedCuts | None = None,
        precisions: Sequence[str] = ("float32",),
        scoring: str = "symmetric",
        calibration: str | Sequence[str] | Mapping[int, Ranges] = SCORED_TEXTS,
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
        leaves = leaves_of(evaluator)
        for leaf in leaves:
            if isinstance(leaf, MatryoshkaEvaluator):
                raise TypeError("evaluator is, or holds, a MatryoshkaEvaluator already; give one all dims at once.")
            if getattr(leaf, "truncate_dim", None) is not None:
                raise ValueError(
                    f"evaluator {leaf.__class__.__name__} has truncate_dim={leaf.truncate_dim}; leave it unset, "
                    "dims says where to cut."
                )
        if repeated := [name for name, count in Counter(map(name_of, leaves)).items() if count > 1]:
            raise ValueError(
                f"evaluators share the name {repeated[0]!r}, their scores would overwrite each other; name each one."
            )
        self.dims = tuple(sorted(checked_dims("dims", dims)))
        self.precisions = check_precisions(precisions)
        self.layers: tuple[int, ...] | None = None
        if layers is not None:
            fix = ", or None for the final vector"
            self.layers = checked_layers("layers", layers, None, least=0, otherwise=fix)
        if layer_cuts is not None and not isinstance(layer_cuts, FittedCuts):
            raise TypeError(f"layer_cuts must be LayerCuts of fit_layer_cuts, got {type(layer_cuts).__name__}.")
        if layer_cuts is not None and not set(self.layers or ()) & set(layer_cuts.maps):
            raise ValueError(f"layer_cuts have maps for layers {sorted(layer_cuts.maps)}, so name some in layers=.")
        self.layer_cuts = layer_cuts
        self.primary = primary = plain(primary)
        if primary not in ("mean", "worst") and not (is_whole(primary) and primary in self.dims):
            raise ValueError(f"primary must be 'mean', 'worst' or one of dims {list(self.dims)}, got {primary!r}.")
        if self.precisions != ("float32",) and any(isinstance(leaf, WITH_TEACHER) for leaf in leaves):
            raise ValueError(
                "precisions: an MSEEvaluator compares values with its teacher's, which codes lack; leave them out."
            )
        self.scoring = checked_choice("scoring", scoring, SCORINGS)
        self.calibration = check_calibration(calibration, self.dims, self.layers)
        self.normalize = checked_flag("normalize", normalize)
        self.memory_limit = checked_limit(memory_limit)
        self.device = check_place(device, self.layers)
        self.evaluator = evaluator
        self.name = name_of(evaluator)
        self.greater_is_better = is_greater_better(evaluator)
        self.records: list[dict[str, Any]] = []
        self._revision: str | None = None
        self.peak_store_bytes = 0
        # kept over calls: the model card files results under the evaluator object
        self._copies: dict[_Place, BaseEvaluator] = {}
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
        model = unwrap(model)
        checked_dims("dims", self.dims, full_width(model))
        layers: Sequence[int | None] = (None,) if self.layers is None else check_layers(self.layers, model)
        if self.layer_cuts is not None:
            self.layer_cuts.require_fitted_on(model)
        options: dict[str, Any] = {"memory_limit": self.memory_limit, "device": self.device}
        with EmbeddingStore(model, self.layers, cuts=self.layer_cuts, **options) as store:
            cells = self._score_cells(store, layers, (output_path, epoch, steps))
            main = [cells[layers[-1], "float32", dim] for dim in self.dims]
            as_unit = self._score_uncut_as_unit(store, main[-1], layers[-1], (None, epoch, steps))
            self.peak_store_bytes = store.nbytes
        metrics: dict[str, Any] = {}
        self.records = []
        for place in product(layers, self.precisions, self.dims):
            metrics |= {**cells[place].texts, **cells[place].scores}
            self.records += self._cell_records(cells[place], *place)
        scores = [cell.main for cell in main]
        if as_unit is not None:
            metrics |= as_unit.scores
            scores[-1] = as_unit.main
        self._revision = fingerprint(model)
        metric = self._unlabelled(main[-1], main[-1].primary_key)
        suffix = metric[len(self.name) :] if metric.startswith(f"{self.name}_") else f"_{metric}"
        # NumPy's: a score that is not a number must not hide behind the others
        worst = np.min(scores) if self.greater_is_better else np.max(scores)
        summary = {f"{self.name}-mean{suffix}": float(np.mean(scores)), f"{self.name}-worst{suffix}": float(worst)}
        if isinstance(self.primary, int):
            self.primary_metric = main[self.dims.index(self.primary)].primary_key
        else:
            self.primary_metric = f"{self.name}-{self.primary}{suffix}"
        if getattr(model, "model_card_data", None) is not None:
            self.store_metrics_in_model_card_data(model, summary, epoch, steps)
        return metrics | summary

    def _score_cells(self, store: EmbeddingStore, layers: Sequence[int | None], when: _When) -> dict[_Place, Cell]:
        """Run the evaluator's copies, float32 first; the deepest layer's largest dim, which sets the metric, leads."""
        cells: dict[_Place, Cell] = {}
        first: Cell | None = None
        for precision, layer, dim in product(self.precisions, reversed(layers), reversed(self.dims)):
            if needs_ranges(precision) and not store.calibrated:
                store.calibrate(None if self.calibration == SCORED_TEXTS else self.calibration)
            cell = cells[layer, precision, dim] = self._score(store, (layer, precision, dim), first, when)
            first = first or cell
        return cells

    def _score(self, store: EmbeddingStore, place: _Place, first: Cell | None, when: _When) -> Cell:
        layer, precision, dim = place
        as_unit, code = precision == UNIT, precision not in (UNIT, "float32")
        asymmetric = code and self.scoring == "asymmetric"
        fitted = self.layer_cuts is not None and layer in self.layer_cuts.maps
        label = cell_label(layer, dim, f"{precision}-asymmetric" if asymmetric else precision, fitted)
        view = store.view(
            dim,
            layer=layer,
            precision="float32" if as_unit else precision,
            scoring=self.scoring,
            normalize=self.normalize,
            normalize_uncut=as_unit,
        )
        if place not in self._copies:
            self._copies[place] = renamed_copy(self.evaluator, label)
        evaluator = self._copies[place]
        cut_teachers(evaluator, self.evaluator, dim, store.width, as_unit or (self.normalize and dim < store.width))
        if first is not None:
            set_primary_metrics(evaluator, first.evaluator)
        scores = evaluator(view, *when)  # type: ignore[arg-type]
        if not view.encode_calls:
            raise TypeError(
                f"{type(self.evaluator).__name__} never called model.encode, so its scores say nothing about dims; use "
                "an evaluator that encodes."
            )
        if asymmetric and not view.query_calls:
            self._warn(
                f"scoring='asymmetric': {type(self.evaluator).__name__} does not say which texts are queries (it never "
                "calls encode_query), so all are coded and decoded."
            )
        cell = Cell(evaluator, label, *named_scores(evaluator, scores, label))
        return cell if first is None else self._with_metric_of(first, cell)

    def _with_metric_of(self, first: Cell, cell: Cell) -> Cell:
        """The cell, counted by the metric that the first one was counted by."""
        wanted = self._unlabelled(first, first.primary_key)
        same = [key for key in cell.scores if self._unlabelled(cell, key) == wanted]
        if not same:
            raise ValueError(
                f"{type(self.evaluator).__name__} gives no {first.primary_key!r} at {cell.label}, only "
                f"{list(cell.scores)}; dims can be compared by a metric that all have: set its primary_metric."
            )
        if isinstance(self.evaluator, SequentialEvaluator) and metrics_of(cell) != metrics_of(first):
            self._warn(
                f"the evaluators of the sequence choose other primary metrics at {cell.label} ({metrics_of(cell)}) "
                f"than at {first.label} ({metrics_of(first)}), so its score mixes metrics; fix them."
            )
        set_primary_metrics(cell.evaluator, first.evaluator)
        return replace(cell, primary_key=same[0])

    def _unlabelled(self, cell: Cell, key: str) -> str:
        """A score's name without its dim."""
        task, metric = self._task_and_metric(cell, key)
        return key if metric == key else f"{task}_{metric}"

    def _task_and_metric(self, cell: Cell, key: str) -> tuple[str, str]:
        """Whose score it is and which; the whole name as the metric, if the cell is not in it."""
        names = sorted((name_of(leaf) for leaf in leaves_of(self.evaluator)), key=len, reverse=True)
        for name in (*names, self.name, "dim"):
            if key.startswith(start := f"{name}-{cell.label}_"):
                return name, key.removeprefix(start)
        return self.name, key

    def _score_uncut_as_unit(self, store: EmbeddingStore, uncut: Cell, layer: int | None, when: _When) -> Cell | None:
        """The uncut width, renormalised as all other dims are, where a score depends on the vectors' length."""
        dim = self.dims[-1]
        if (
            not self.normalize
            or dim < store.width
            or len(self.dims) == 1
            or (store.has_unit_length and teachers_have_unit_length(self.evaluator))
            or all("cosine" in metric for metric in metrics_of(uncut))
        ):
            return None
        as_unit = self._score(store, (layer, UNIT, dim), uncut, when)
        key_of = {self._unlabelled(as_unit, key): key for key in as_unit.scores}
        twin = {key: key_of.get(self._unlabelled(uncut, key)) for key in uncut.scores}
        main = {uncut.primary_key, *(leaf.primary_metric for leaf in leaves_of(uncut.evaluator))}
        changed = sorted(
            key
            for key, other in twin.items()
            if other is not None and key in main and abs(uncut.scores[key] - as_unit.scores[other]) > 1e-5
        )
        if not changed:
            return None
        self._warn(
            f"{', '.join(changed)}: depends on the length of the vectors, and the model's or the teacher's are not of "
            "length 1. The score is that of these vectors as they are, those of smaller dims are of renormalised ones; "
            f"that of renormalised ones is {twin[uncut.primary_key]}, and mean and worst use it. "
            "With normalize=False all dims keep the vectors of encode(truncate_dim=...)."
        )
        return as_unit

    def _warn(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _cell_records(self, cell: Cell, layer: int | None, precision: str, dim: int) -> list[dict[str, Any]]:
        primaries = main_keys(cell.evaluator, cell.scores, cell.primary_key, cell.label)
        place = {"layer": layer, "dim": dim, "precision": precision, "bytes": bytes_per_vector(dim, precision)}
        place |= how_coded(precision, self.scoring, self.calibration)
        records = []
        for key, score in cell.scores.items():
            task, metric = self._task_and_metric(cell, key)
            records.append({**place, "task": task, "metric": metric, "primary": key in primaries, "score": score})
        return records

    def report(self, model: str = "model", seed: int | None = None) -> EvaluationReport:
        """The last call's scores as a report.

        Args:
            model: Name of the model in tables.
            seed: Training seed, if several runs of one model are to be averaged in tables and drawn as a band.

        Returns:
            The report (table, Markdown, plots).

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
        if self.layer_cuts is not None:
            config["layer_cuts"] = sorted(self.layer_cuts.maps)
        if self.precisions != ("float32",):
            config["precisions"] = list(self.precisions)
            config["scoring"] = self.scoring
        if any(map(needs_ranges, self.precisions)):
            config["calibration"] = name_of_calibration(self.calibration)
        return config if self.normalize else {**config, "normalize": False}
