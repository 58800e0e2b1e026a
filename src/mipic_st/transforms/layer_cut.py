"""Layer cuts: what a model needs behind an early layer to give the vectors of its full depth.

Weights for the tokens in the mean of the layer's states, and a linear W, (H, D), from these means to the full-depth
vectors. :func:`fit_layer_cuts` fits both for a whole (layer, dim) grid, out of one set of texts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from mipic_st.encoder.encoding import TokenStates, encode_layers, encode_tokens, prompt_of
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.encoder.modules import push_vectors
from mipic_st.encoder.structure import (
    check_layers,
    evaluation_mode,
    full_width,
    model_depth,
    tail_of,
    transformer_of,
    unwrap,
)
from mipic_st.encoder.surgery import identity_dense, input_embeddings, no_word_weights, word_weights_module
from mipic_st.numerics import spearman, unit_length
from mipic_st.transforms.base import Transform
from mipic_st.transforms.columns import scored_pairs
from mipic_st.transforms.cut_fits import fit_cut, refine_cut
from mipic_st.transforms.fitting import Vectors, apply_matrix, split_rows, wants_bar
from mipic_st.transforms.report_plots import by_layer_and_dim
from mipic_st.transforms.word_weights import fit_word_weights
from mipic_st.validation import checked_count, checked_dims, checked_flag, checked_number, checked_texts, default_dims

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

# Word weights are learned on so many texts at most, and on so many values of token states, half a gigabyte.
_WEIGHED_TEXTS = 4000
_WEIGHED_VALUES = 2**28


@dataclass(frozen=True, eq=False, repr=False)
class LayerCuts(Transform):
    """Fitted tails for a whole (layer, dim) grid, out of one encoding.

    Attributes:
        maps: One W, (H, D), per layer: pooled states of that layer to full-depth vectors. Its first d columns are the
            tail of the cell (layer, d).
        dims: The dims of the grid, ascending.
        report: One dict per cell, measured on texts that were held out: ``layer``, ``dim``, and ``similarity_plain``,
            ``similarity_fitted``, ``similarity_full``: Spearman correlation with the full model's full-width cosines,
            for the layer cut as it is, with its fitted tail, and for the full depth at that dim; and
            ``similarity_mixed``, the same for cosines of the fitted cut's vectors with the full depth's. With STS data
            also ``sts_plain``, ``sts_fitted``, ``sts_full``, Spearman correlation with the scores.
        word_weights: By layer, how much each token of the tokenizer counts in the mean of the states, (V,); none where
            the plain mean is taken.
        fingerprint: Of the model that the cuts were fitted on; None for cuts that were put together by hand.
    """

    kind: ClassVar[str] = "layer cuts"
    caption = "held-out texts, x100: correlation of cosines with those of the full model"
    headings: ClassVar[dict[str, str]] = {
        "layer": "layer",
        "dim": " dim",
        "similarity_plain": "cut as it is",
        "similarity_fitted": "fitted",
        "similarity_mixed": "fitted with full depth",
        "similarity_full": "full depth",
    }
    maps: dict[int, Tensor]
    dims: tuple[int, ...]
    report: list[dict[str, float]]
    word_weights: dict[int, Tensor] = field(default_factory=dict)
    fingerprint: str | None = None

    def __call__(self, states: Vectors, layer: int, dim: int | None = None) -> Vectors:
        """Map pooled states of a layer to full-depth vectors; with ``dim``, to its values at unit length.

        Args:
            states: (N, H) or (H,), NumPy or torch; with word weights, their weighted means.
            layer: One of the layers of ``maps``.
            dim: Values to keep, 1 to D. None keeps all, and the length as it is.

        Returns:
            The same kind, type and device, (N, D) or (N, dim).

        Raises:
            TypeError: If the states are no array of floating numbers.
            ValueError: If there is no map for the layer, or width or ``dim`` do not fit.
        """
        return apply_matrix("states", states, self._map(layer), dim, f"the map of layer {layer}")

    def to_modules(self, model: SentenceTransformer, layer: int, dim: int | None = None) -> Sequence[nn.Module]:
        """The tail of a cell: a bias-free identity ``Dense``, or Dense and ``WordWeights`` where the layer has these.

        Args:
            model: A model that ends after the layer and its pooling, or that is yet to be cut there.
            layer: One of the layers of ``maps``.
            dim: Values to keep, 1 to D. None keeps all.

        Returns:
            The Dense for the pooled states, or both for the token states in front of the pooling.

        Raises:
            ValueError: If there is no map for the layer, or tokens cannot be weighed in the model's pooling.
        """
        matrix = self._map(layer)[:, :dim]
        if layer not in self.word_weights:
            return [identity_dense(matrix)]
        if reason := no_word_weights(model):
            raise ValueError(
                f"cuts have word weights for layer {layer}, but {reason}; fit them on this model, or with "
                "word_weights=False."
            )
        # The map goes before the mean, with which it commutes: WordWeights gives float32, which a Dense behind it would
        # not take once the model is in half precision.
        dense = identity_dense(matrix, features="token_embeddings")
        return [dense, word_weights_module(model, self.word_weights[layer])]

    plot = by_layer_and_dim
    """Draw the report: :func:`mipic_st.transforms.report_plots.by_layer_and_dim`."""

    def _map(self, layer: int) -> Tensor:
        if layer not in self.maps:
            raise ValueError(
                f"cuts hold layers {sorted(self.maps)}, not {layer}; fit_layer_cuts(model, texts, layers=...)."
            )
        return self.maps[layer]

    def check(self) -> None:
        """Shapes, too."""
        super().check()
        shapes = {tuple(weight.shape) for weight in self.maps.values()}
        if len(shapes) != 1 or len(*shapes) != 2 or max(self.dims) > next(iter(shapes))[-1]:
            raise ValueError(f"maps of shapes {sorted(shapes)} do not serve the dims {list(self.dims)}")
        if wrong := sorted(set(self.word_weights) - set(self.maps)):
            raise ValueError(f"it has word weights for layers {wrong} without a map")

    def require_fitted_on(self, model: SentenceTransformer) -> None:
        """Refuse a model other than that of the fit, or one that has changed since."""
        if self.fingerprint is not None and self.fingerprint != fingerprint(model):
            raise ValueError(
                "cuts were fitted when the model gave other vectors: it was rotated, trained or converted since, its "
                "prompts changed, or it is a different model; call fit_layer_cuts again."
            )


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

    The targets are the model's own vectors at unit length, rotated ones if it has a rotation.
    ``export_truncated(model, layer, dim, cuts=...)`` makes the model of a cell.

    Args:
        model: A SentenceTransformer of Transformer, Pooling and any tail.
        texts: Texts like those that will be encoded, without labels; a few thousand.
        layers: Layers to cut after, 1 to the depth - 1. Default: all of them.
        dims: Truncation dimensions of the grid. Default: powers of two from 16, and the full width. One map serves all
            dims of a layer; a single dim gets a little more at that dim.
        sts: Scored pairs for the report: a Dataset with ``sentence1``, ``sentence2``, ``score``, or three lists.
        ridge: Ridge of the maps' least squares, see :func:`mipic_st.transforms.cut_fits.fit_cut`; word weights have
            their own.
        vector_weight: How much the distance to the full-depth vectors counts in the steps after least squares, >= 0;
            the similarities among the cut's own count 1. A high one keeps the cut's vectors comparable with the full
            model's at small dims (queries by the one, documents by the other); with 0 they are not.
        max_steps: Steps per layer in which the map then learns to keep the similarities at ``dims``, see
            :func:`mipic_st.transforms.cut_fits.refine_cut`; 0 leaves it at least squares, which takes no time.
        word_weights: Learn for each layer how much every token counts in the mean of its states, in as many steps and
            on up to 4,000 of the texts (fewer, if their token states fill half a gigabyte), see
            :func:`mipic_st.transforms.word_weights.fit_word_weights`. Default: where the model pools by the mean and
            ``max_steps`` is not 0.
        held_out: Share of the texts, in (0, 0.5], at most 2,048, that choose the best step and make the report.
        prompt: Put before every text. Default: the model's default prompt, if it has one.
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
    model = unwrap(model)
    depth, width = model_depth(model), full_width(model)
    layers = _checked_layers(model, layers, depth)
    dims = sorted(checked_dims("dims", default_dims(width) if dims is None else dims, width))
    held_out = checked_number("held_out", held_out, 0, 0.5, exclusive=True)
    ridge = checked_number("ridge", ridge, 0)
    show_progress_bar = wants_bar(show_progress_bar)
    steps: dict[str, Any] = {
        "vector_weight": checked_number("vector_weight", vector_weight, 0),
        "max_steps": checked_count("max_steps", max_steps, least=0),
        "seed": checked_count("seed", seed, least=0),
        "show_progress_bar": show_progress_bar,
    }
    batch_size = checked_count("batch_size", batch_size)
    texts = list(dict.fromkeys(checked_texts("texts", texts)))
    if word_weights is None:
        word_weights = max_steps > 0 and not no_word_weights(model)
    elif checked_flag("word_weights", word_weights) and (reason := no_word_weights(model)):
        raise ValueError(f"word_weights is True, but {reason}; leave it out.")
    elif word_weights and not max_steps:
        raise ValueError("word_weights is True, but max_steps is 0, so there are no steps to learn them in.")
    scored = None if sts is None else scored_pairs(sts)
    rows, others = split_rows(np.random.default_rng(seed).permutation(len(texts)), held_out)
    test, training = [texts[row] for row in rows], [texts[row] for row in others]
    hidden_width = transformer_of(model).get_embedding_dimension()
    if len(training) < hidden_width:
        raise ValueError(
            f"{len(texts)} texts are too few for a map from {hidden_width} values: give "
            f"{int(hidden_width / (1 - held_out)) + 3} or more, since some are held out."
        )
    options = {"prompt": prompt_of(model, prompt), "batch_size": batch_size, "show_progress_bar": show_progress_bar}
    encode = _Encoding(model, layers, depth, options)
    weights = _learn_word_weights(encode, training[:_WEIGHED_TEXTS], dims, steps) if word_weights else {}
    weighers = {layer: word_weights_module(model, learned) for layer, learned in weights.items()}
    states, known = encode(training, weighers)
    if float(np.abs(known - known[0]).max()) < 1e-5:
        raise ValueError("all texts have the same vector, so there are no similarities to keep: give other texts.")
    held = encode(test, weighers)
    for part, found in ((training, states), (test, held.states)):
        if len(empty := np.flatnonzero(~found.any(axis=(1, 2)))):
            raise ValueError(f"texts holds {part[empty[0]]!r}, of which the tokenizer leaves nothing: leave it out.")
    maps = {}
    for column, layer in enumerate(layers):
        maps[layer] = fit_cut(states[:, column], known, ridge=ridge)
        if max_steps:
            seen_by_none = (held.states[:, column], held.full)
            maps[layer] = refine_cut(maps[layer], states[:, column], known, dims, held_out=seen_by_none, **steps)
    report = _report(encode, maps, dims, weighers, [test, *(scored or ())[:2]], held, scored and scored[2])
    return LayerCuts(maps, tuple(dims), report, weights, fingerprint(model))


def _checked_layers(model: SentenceTransformer, layers: Sequence[int] | None, depth: int) -> Sequence[int]:
    """Layers that can be cut after; all of them for None."""
    if layers is None:
        if depth < 2:
            raise ValueError("the model has one layer, below which nothing can be cut.")
        layers = range(1, depth)
    layers = check_layers(layers, model)
    if wrong := [layer for layer in layers if not 1 <= layer < depth]:
        raise ValueError(f"layers must be from 1 to {depth - 1}, below the model's depth of {depth}, got {wrong}.")
    return layers


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

    def __call__(self, texts: Sequence[str], weighers: Mapping[int, nn.Module] | None = None) -> _Encoded:
        """Of texts, with the tokens of some layers weighed."""
        layers = [*self.layers, self.depth]
        states = encode_layers(self.model, texts, layers, tail=False, before=weighers, **self.options)
        return _Encoded(states[:, :-1], unit_length(self.push(states[:, -1])))

    def tokens(self, texts: Sequence[str]) -> tuple[TokenStates, Tensor]:
        """Token states of as many texts as memory allows, and their full-depth vectors at unit length."""
        found = encode_tokens(self.model, texts, self.layers, most_values=_WEIGHED_VALUES, **self.options)
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
            f"No word weights: the token states of {len(found.lengths)} texts fill the memory that is set aside for "
            f"{len(encode.layers)} layers. Fit fewer layers at once, or on shorter texts."
        )
        return {}
    weights = {}
    for layer in encode.layers:
        states = found.states.pop(layer)
        learned = fit_word_weights(states, found.tokens, found.lengths, embeddings, targets, dims, **steps)
        if learned.gained:
            weights[layer] = learned.weights
    return weights


def _report(
    encode: _Encoding,
    maps: Mapping[int, Tensor],
    dims: Sequence[int],
    weighers: Mapping[int, nn.Module],
    parts: Sequence[Sequence[str]],
    held: _Encoded,
    scores: Sequence[float] | None,
) -> list[dict[str, float]]:
    """One dict per cell; the parts are the held-out texts, which are encoded already, and both ends of scored pairs."""
    fitted = [held, *(encode(part, weighers) for part in parts[1:])]
    plain = [encode(part) for part in parts] if weighers else fitted
    upper = np.triu_indices(len(held.full), k=1)
    reference = (held.full @ held.full.T)[upper]
    report = []
    for column, (layer, weight) in enumerate(maps.items()):
        # how a cell's vectors are made: the layer as it is, with the fitted tail, and the full depth
        vectors = {
            "plain": [encode.push(part.states[:, column]) for part in plain],
            "fitted": [part.states[:, column] @ weight.numpy() for part in fitted],
            "full": [part.full for part in fitted],
        }
        for dim in dims:
            report.append({"layer": layer, "dim": dim} | _cell(vectors, dim, upper, reference, scores))
    return report


def _cell(
    vectors: Mapping[str, Sequence[np.ndarray]],
    dim: int,
    upper: tuple[np.ndarray, np.ndarray],
    reference: np.ndarray,
    scores: Sequence[float] | None,
) -> dict[str, float]:
    """What the report says of one dim of a layer; ``reference`` has the full cosines of the pairs in ``upper``."""
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
