"""Layer cuts: what a model needs behind an early layer to give the vectors of its full depth.

Weights for the tokens in the mean of the layer's states (:mod:`mipic_st.transforms.word_weights`), and a linear W, (H,
D), from these means to the full-depth vectors (:mod:`mipic_st.transforms.cut_fits`). :func:`fit_layer_cuts` fits both
for a whole (layer, dim) grid, out of one set of texts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import WordWeights
from torch import Tensor

from mipic_st.encoder.encoding import TokenStates, encode_layers, encode_texts, encode_tokens, prompt_of
from mipic_st.encoder.structure import check_layers, evaluation_mode, full_width, model_depth, tail_of, transformer_of
from mipic_st.encoder.tail import push_vectors
from mipic_st.numerics import spearman, unit_length
from mipic_st.transforms.cut_fits import fit_cut, refine_cut
from mipic_st.transforms.fitting import BLOCK, table_of, wants_bar
from mipic_st.transforms.word_weights import fit_word_weights, input_embeddings, no_word_weights, word_weights_module
from mipic_st.validation import checked_count, checked_dims, checked_flag, checked_number, checked_texts, powers_of_two

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Word weights are learned on so many texts at most, and on so many values of token states, half a gigabyte.
_WEIGHED_TEXTS = 4000
_WEIGHED_VALUES = 2**28
_PROBES = ("A dog runs after a ball.", "How do I reset my password?", "The harbour was silent in the morning.")


@dataclass(frozen=True, eq=False)
class LayerCuts:
    """Fitted tails for a whole (layer, dim) grid, out of one encoding.

    Attributes:
        maps: One W, (H, D), per layer: pooled states of that layer to full-depth vectors. Its first d columns are the
            tail of the cell (layer, d).
        dims: The dims of the grid, ascending.
        word_weights: By layer, how much each token of the tokenizer counts in the mean of the states, (V,); none where
            the plain mean is taken.
        report: One dict per cell, measured on texts that were held out: ``layer``, ``dim``, and ``similarity_plain``,
            ``similarity_fitted``, ``similarity_full``: Spearman correlation with the full model's full-width cosines,
            for the layer cut as it is, with its fitted tail, and for the full depth at that dim; and
            ``similarity_mixed``, the same for cosines of the fitted cut's vectors with the full depth's, which is what
            counts if queries and documents are encoded by different ones of the two. With STS data also
            ``sts_plain``, ``sts_fitted``, ``sts_full``, Spearman correlation with the scores.
        probes: The full model's vectors of a few fixed texts when the cuts were fitted, so that an export from a model
            that was rotated or trained since is refused; None for cuts that were put together by hand.
    """

    maps: dict[int, Tensor]
    dims: tuple[int, ...]
    report: list[dict[str, float]]
    word_weights: dict[int, Tensor] = field(default_factory=dict)
    probes: np.ndarray | None = None

    def to_frame(self) -> pd.DataFrame:
        """The report as a table.

        Returns:
            One row per cell.

        Raises:
            ImportError: If pandas is missing.
        """
        return table_of(self.report)


@torch.inference_mode(False)  # maps and weights are fitted by gradients, wherever the call stands
def fit_layer_cuts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
    sts: Dataset | tuple[Sequence[str], Sequence[str], Sequence[float]] | None = None,
    ridge: float = 1e-3,
    vector_weight: float = 1.0,
    max_steps: int = 400,
    word_weights: bool | None = None,
    held_out: float = 0.1,
    prompt: str | None = None,
    batch_size: int = 32,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> LayerCuts:
    """Fit what a model needs behind an early layer to give the vectors of its full depth, and say what is lost.

    All layers and dims are served from one encoding; with word weights, up to 4,000 of the texts are encoded before,
    and the held-out ones once more. The targets are the model's own vectors at unit length, rotated ones if it has a
    rotation. ``export_truncated(model, layer, dim, cuts=...)`` makes the model of a cell.

    Args:
        model: A SentenceTransformer of Transformer, Pooling and any tail.
        texts: Texts like those that will be encoded, without labels; a few thousand.
        layers: Layers to cut after, 1 to the depth - 1. Default: all of them.
        dims: Truncation dimensions of the grid. Default: powers of two from 16, and the full width. One map serves all
            dims of a layer; a single dim gets a little more at that dim.
        sts: Scored pairs for the report: a Dataset with ``sentence1``, ``sentence2``, ``score``, or three lists.
        ridge: Ridge of the maps' least squares, see :func:`mipic_st.transforms.cut_fits.fit_cut`; word weights have
            their own.
        vector_weight: What the steps after least squares weigh the distance to the full-depth vectors with, >= 0,
            beside the similarities among the cut's own. A high one keeps the vectors of the cut comparable with those
            of the full model at small dims (queries by the one, documents by the other); with 0 the cut is best by
            itself, and not comparable.
        max_steps: Steps per layer in which the map then learns to keep the similarities at ``dims``, see
            :func:`mipic_st.transforms.cut_fits.refine_cut`; 0 leaves it at least squares, which takes no time.
        word_weights: Learn for each layer how much every token counts in the mean of its states, in as many steps and
            on up to 4,000 of the texts, see
            :func:`mipic_st.transforms.word_weights.fit_word_weights`. The cut model has them as a ``WordWeights``
            module. Default: where the model pools by the mean and ``max_steps`` is not 0. A grid of many layers learns
            them on fewer texts if these are long, so that no more than half a gigabyte of token states is held.
        held_out: Share of the texts that no step sees, in (0, 0.5]; at most 2,048 of them. The best step on them is
            kept, and the report is made on them.
        prompt: Put before every text. Default: what ``encode`` does by default, so the model's default prompt, if it
            has one.
        batch_size: Texts per forward pass.
        seed: Seeds the choice of the held-out texts and the batches.
        show_progress_bar: Show bars while encoding and fitting. Default: as the log level says.

    Returns:
        :class:`LayerCuts`.

    Raises:
        TypeError: If the model has no layers, or texts are no list of strings.
        ValueError: If there are fewer texts than hidden values, ``word_weights`` is asked for where the model has no
            plain mean, or another argument is out of its range.

    Example:
        >>> cuts = fit_layer_cuts(model, texts, layers=[3, 4], dims=[64, 16])  # doctest: +SKIP
        >>> cuts.to_frame()  # doctest: +SKIP
    """
    depth, width = model_depth(model), full_width(model)
    hidden_width = transformer_of(model).get_embedding_dimension()
    if layers is None:
        if depth < 2:
            raise ValueError("the model has one layer, below which nothing can be cut.")
        layers = range(1, depth)
    layers = check_layers(layers, model)
    if wrong := [layer for layer in layers if not 1 <= layer < depth]:
        raise ValueError(f"layers must be from 1 to {depth - 1}, below the model's depth of {depth}, got {wrong}.")
    if dims is None:
        dims = [*powers_of_two(16, width), width]
    dims = sorted(checked_dims("dims", dims, width))
    held_out = checked_number("held_out", held_out, 0, 0.5, exclusive=True)
    seed = checked_count("seed", seed, least=0)
    vector_weight = checked_number("vector_weight", vector_weight, 0)
    max_steps = checked_count("max_steps", max_steps, least=0)
    batch_size = checked_count("batch_size", batch_size)
    texts = list(dict.fromkeys(checked_texts("texts", texts)))
    if word_weights is None:
        word_weights = max_steps > 0 and not no_word_weights(model)
    elif checked_flag("word_weights", word_weights) and (reason := no_word_weights(model)):
        raise ValueError(f"word_weights is True, but {reason}; leave it out.")
    elif word_weights and not max_steps:
        raise ValueError("word_weights is True, but max_steps is 0, so there are no steps to learn them in.")
    show_progress_bar = wants_bar(show_progress_bar)
    prompt = prompt_of(model, prompt)
    encode = _Encoding(model, layers, depth, {"prompt": prompt, "batch_size": batch_size}, show_progress_bar)
    scored = None if sts is None else _scored_pairs(sts)

    order = np.random.default_rng(seed).permutation(len(texts))
    count = min(BLOCK, max(2, round(held_out * len(texts))))
    test, training = [texts[i] for i in order[:count]], [texts[i] for i in order[count:]]
    if len(training) < hidden_width:
        raise ValueError(
            f"{len(texts)} texts are too few for a map from {hidden_width} values: give "
            f"{int(hidden_width / (1 - held_out)) + 3} or more, since some are held out."
        )
    steps: dict[str, Any] = {
        "vector_weight": vector_weight,
        "max_steps": max_steps,
        "seed": seed,
        "show_progress_bar": show_progress_bar,
    }
    weights = _learn_word_weights(encode, training[:_WEIGHED_TEXTS], dims, steps) if word_weights else {}
    weighers = {layer: word_weights_module(model, learned) for layer, learned in weights.items()}
    states, known = encode(training, weighers)
    if float(np.abs(known - known[0]).max()) < 1e-5:
        raise ValueError("all texts have the same vector, so there are no similarities to keep: give other texts.")
    held_plain = encode(test)
    held = encode(test, weighers) if weighers else held_plain
    for part, found in ((training, states), (test, held.states)):
        if len(empty := np.flatnonzero(~found.any(axis=(1, 2)))):
            raise ValueError(f"texts holds {part[empty[0]]!r}, of which the tokenizer leaves nothing: leave it out.")
    maps = {}
    for column, layer in enumerate(layers):
        maps[layer] = fit_cut(states[:, column], known, ridge=ridge)
        if max_steps:
            seen_by_none = (held.states[:, column], held.full)
            maps[layer] = refine_cut(maps[layer], states[:, column], known, dims, held_out=seen_by_none, **steps)
    first_and_second = () if scored is None else scored[:2]
    plain_ends = [encode(part) for part in first_and_second]
    ends = [encode(part, weighers) for part in first_and_second] if weighers else plain_ends
    upper = np.triu_indices(len(test), k=1)
    reference = (held.full @ held.full.T)[upper]
    report = []
    for column, layer in enumerate(layers):
        # how a cell's vectors are made: the layer as it is, with the fitted tail, and the full depth
        weight = maps[layer].numpy()
        vectors = {
            "plain": [encode.push(part.states[:, column]) for part in (held_plain, *plain_ends)],
            "fitted": [part.states[:, column] @ weight for part in (held, *ends)],
            "full": [part.full for part in (held, *ends)],
        }
        for dim in dims:
            report.append({"layer": layer, "dim": dim} | _cell(vectors, dim, upper, reference, scored and scored[2]))
    return LayerCuts(maps, tuple(dims), report, weights, probe_vectors(model))


def probe_vectors(model: SentenceTransformer) -> np.ndarray:
    """What a model makes of a few fixed texts at full width, at unit length."""
    with evaluation_mode(model):
        return unit_length(encode_texts(model, _PROBES))


def same_vectors(vectors: np.ndarray, others: np.ndarray) -> bool:
    """Whether two states of a model are the same but for rounding, that of half precision too."""
    return vectors.shape == others.shape and float(np.linalg.norm(vectors - others, axis=1).max()) < 0.1


class _Encoded(NamedTuple):
    """Pooled states of the layers, (n, layers, H), and full-depth vectors at unit length, (n, D)."""

    states: np.ndarray
    full: np.ndarray


@dataclass(frozen=True, eq=False)
class _Encoding:
    """How texts are encoded for one fit."""

    model: SentenceTransformer
    layers: Sequence[int]
    depth: int
    options: dict[str, Any]
    show_progress_bar: bool

    def __call__(self, texts: Sequence[str], weighers: Mapping[int, WordWeights] | None = None) -> _Encoded:
        """Of texts, with the tokens of some layers weighed."""
        states = encode_layers(
            self.model,
            texts,
            [*self.layers, self.depth],
            tail=False,
            before=weighers,
            show_progress_bar=self.show_progress_bar,
            **self.options,
        )
        return _Encoded(states[:, :-1], unit_length(self.push(states[:, -1])))

    def tokens(self, texts: Sequence[str]) -> tuple[TokenStates, Tensor]:
        """Token states of as many texts as memory allows, and their full-depth vectors at unit length."""
        found = encode_tokens(
            self.model,
            texts,
            self.layers,
            most_values=_WEIGHED_VALUES,
            show_progress_bar=self.show_progress_bar,
            **self.options,
        )
        return found, torch.from_numpy(unit_length(self.push(found.pooled.numpy())))

    def push(self, states: np.ndarray) -> np.ndarray:
        """Pooled states through the model's own tail."""
        with evaluation_mode(self.model), torch.inference_mode():
            vectors = torch.as_tensor(states, device=self.model.device)
            for module in tail_of(self.model):
                kind = next((parameter.dtype for parameter in module.parameters()), vectors.dtype)
                vectors = push_vectors([module], vectors.to(kind))
            return vectors.float().cpu().numpy()


def _learn_word_weights(
    encode: _Encoding, texts: Sequence[str], dims: Sequence[int], steps: Mapping[str, Any]
) -> dict[int, Tensor]:
    """Word weights of the layers that are better for them."""
    found, targets = encode.tokens(texts)
    if bool((found.lengths == 0).any()):  # the fit of the map names the text
        return {}
    embeddings = input_embeddings(encode.model)
    if len(found.lengths) < found.pooled.shape[1]:
        logger.warning(
            "No word weights: the token states of %d texts fill the memory that is set aside for %d layers. Fit fewer "
            "layers at once, or on shorter texts.",
            len(found.lengths),
            len(encode.layers),
        )
        return {}
    weights = {}
    for layer in encode.layers:
        states = found.states.pop(layer)
        learned = fit_word_weights(states, found.tokens, found.lengths, embeddings, targets, dims, **steps)
        if bool((learned != 1).any()):
            weights[layer] = learned
    return weights


def _cell(
    vectors: Mapping[str, Sequence[np.ndarray]],
    dim: int,
    upper: tuple[np.ndarray, np.ndarray],
    reference: np.ndarray,
    scores: Sequence[float] | None,
) -> dict[str, float]:
    """What the report says of one (layer, dim).

    Args:
        vectors: For each way to make them, those of the held-out texts and, with STS data, of both ends of its pairs.
        dim: The dim.
        upper: Rows and columns of the pairs of held-out texts.
        reference: Cosines of these pairs in the full model, at full width.
        scores: Of the pairs with STS data.

    Returns:
        The cell without its name.
    """
    cell = {}
    for kind, (held, *ends) in vectors.items():
        cut = unit_length(held[:, :dim])
        cell[f"similarity_{kind}"] = spearman((cut @ cut.T)[upper], reference)
        if kind == "fitted":
            whole = unit_length(vectors["full"][0][:, :dim])
            cell["similarity_mixed"] = spearman((cut @ whole.T)[upper], reference)
        if scores is not None:
            left, right = (unit_length(end[:, :dim]) for end in ends)
            cell[f"sts_{kind}"] = spearman((left * right).sum(axis=1), scores)
    return cell


def _scored_pairs(sts: Any) -> tuple[list[str], list[str], list[float]]:
    """First texts, second texts and scores, one each."""
    if hasattr(sts, "column_names"):
        if missing := {"sentence1", "sentence2", "score"} - set(sts.column_names):
            raise ValueError(f"sts lacks the columns {sorted(missing)}; it has {sts.column_names}.")
        sts = (sts["sentence1"], sts["sentence2"], sts["score"])
    first, second, scores = (list(column) for column in sts)
    if not len(first) == len(second) == len(scores) or len(first) < 2:
        raise ValueError(
            f"sts must hold as many first texts as second texts and scores, 2 or more: got {len(first)}, {len(second)} "
            f"and {len(scores)}."
        )
    scores = [float(score) for score in scores]
    if not np.isfinite(scores).all():
        raise ValueError("sts holds scores that are no finite numbers; leave these rows out.")
    return first, second, scores
