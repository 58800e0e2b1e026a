"""A logistic regression on frozen vectors, as MTEB's classification does it."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator

from mipic_st.validation import as_list, checked_count, checked_flag, require


class ClassificationProbeEvaluator(BaseEvaluator):
    """Accuracy and macro-F1 of a logistic regression on frozen embeddings.

    Without ``n_experiments``, one classifier is fitted on all training texts. With it, each experiment draws
    ``samples_per_label`` texts of each label, as in MTEB, and scores are averaged. Wrap it into `MatryoshkaEvaluator`
    for scores per dim.

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
        TypeError: If texts are no strings, or labels neither all strings nor all whole numbers.
        ValueError: If lengths differ, texts or classes are missing, or a number is out of range.

    Example:
        >>> ClassificationProbeEvaluator(["a", "b"], [0, 1], ["c", "d"], [0, 1], name="tiny").primary_metric
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
        rows = np.arange(len(self.train_texts))
        draws = []
        for _ in range(self.n_experiments):
            np.random.RandomState(self.seed).shuffle(rows)
            labels = self.train_labels[rows]
            first = [np.flatnonzero(labels == label)[: self.samples_per_label] for label in np.unique(labels)]
            draws.append(rows[np.sort(np.concatenate(first))])
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
        needs = "the classification probe needs scikit-learn", "eval"
        linear_model, scores = require("sklearn.linear_model", *needs), require("sklearn.metrics", *needs)
        draws = self._draws()
        used = np.unique(np.concatenate(draws))
        options: dict[str, Any] = {"batch_size": self.batch_size, "show_progress_bar": self.show_progress_bar}
        train = model.encode([self.train_texts[row] for row in used], **options)
        test = model.encode(self.test_texts, **options)
        accuracies, f1s = [], []
        for draw in draws:
            classifier = linear_model.LogisticRegression(max_iter=self.max_iter, random_state=self.seed)
            classifier.fit(train[np.searchsorted(used, draw)], self.train_labels[draw])
            predicted = classifier.predict(test)
            accuracies.append(scores.accuracy_score(self.test_labels, predicted))
            f1s.append(scores.f1_score(self.test_labels, predicted, average="macro"))
        metrics = {"accuracy": float(np.mean(accuracies)), "macro_f1": float(np.mean(f1s))}
        if output_path is not None and self.write_csv:
            path = Path(output_path, self.csv_file)
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [(epoch, steps, *metrics.values())]
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(rows if file.tell() else [("epoch", "steps", *metrics), *rows])
        metrics = self.prefix_name_to_metrics(metrics, self.name)
        self.store_metrics_in_model_card_data(model, metrics, epoch, steps)
        return metrics

    @property
    def description(self) -> str:
        """Heading in the model card."""
        return "Classification Probe"

    def get_config_dict(self) -> dict[str, Any]:
        """Settings for the model card."""
        drawn = {"n_experiments": self.n_experiments, "samples_per_label": self.samples_per_label}
        return {**({} if self.n_experiments is None else drawn), "seed": self.seed}


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
