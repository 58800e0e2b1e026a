"""Cut a model to its first layers and first dimensions; the result is a plain SentenceTransformer."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.deploy.written import difference, require_same_when_loaded
from mipic_st.encoder.card import restate_config
from mipic_st.encoder.encoding import PROBE_TEXTS, encode_layers, encode_texts
from mipic_st.encoder.modules import with_normalize, without_normalize
from mipic_st.encoder.structure import (
    evaluation_mode,
    full_width,
    in_half_precision,
    model_depth,
    tail_of,
    transformer_of,
    unwrap,
)
from mipic_st.encoder.surgery import cut_layers, identity_dense, merged_encoders, with_map, word_weights_module
from mipic_st.numerics import unit_length
from mipic_st.transforms.layer_cut import LayerCuts, fit_layer_cuts
from mipic_st.validation import checked_count, checked_dims, checked_flag, checked_layers, checked_texts

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # the copy's weights must be trainable, wherever the call stands
def export_truncated(
    model: SentenceTransformer,
    layer: int | None = None,
    dim: int | None = None,
    *,
    texts: Sequence[str] | None = None,
    cuts: LayerCuts | None = None,
    normalize: bool = True,
) -> SentenceTransformer:
    """A copy of the model that stops after ``layer`` and gives ``dim`` values, checked before it is returned.

    With ``texts`` or ``cuts``, a fitted bias-free Dense maps the early states to the full-depth vectors, truncated to
    ``dim``, and ``WordWeights`` say how much each token counts: at half depth this is worth many points. Without, the
    early states go through the model's own final norm and tail. Adapters are merged, and all modules are
    sentence-transformers' own, so the saved folder loads without this package. The model itself is left alone.

    Args:
        model: The model to cut.
        layer: Last layer to keep, 1 to L; None keeps all.
        dim: Dims to keep, 1 to D; None keeps the model's ``truncate_dim`` if it has one, else all.
        texts: Texts to fit the tail of a layer cut on, a few thousand, without labels. What is lost on held-out ones is
            logged.
        cuts: What :func:`mipic_st.transforms.layer_cut.fit_layer_cuts` has fitted, instead of ``texts``.
        normalize: Put Normalize at the end. Without, a Normalize of the model stays in front of the truncation.

    Returns:
        A SentenceTransformer on the same device, in evaluation mode. `measure_speedup` says how much faster it is.

    Raises:
        TypeError: If the model has no layers or weights, or its code does not allow fewer layers, or a saved cut.
        ValueError: If layer or dim is out of range, neither is given, or ``texts`` or ``cuts`` are given without a
            layer below the depth, both, or for another layer.
        RuntimeError: If the cut model does not reproduce what it should, in memory or saved and loaded again.

    Example:
        >>> small = export_truncated(model, layer=3, dim=64, texts=texts)           # doctest: +SKIP
        >>> small.save_pretrained("small")                                          # doctest: +SKIP
    """
    model = unwrap(model)
    width = full_width(model)
    if dim is None and model.truncate_dim is not None:
        dim = min(model.truncate_dim, width)
    if layer is None and dim is None:
        raise ValueError("layer and dim are both None, so there is nothing to cut; give at least one.")
    if dim is not None:
        (dim,) = checked_dims("dim", [dim], width)
    normalize = checked_flag("normalize", normalize)
    if next(model.parameters(), None) is None:
        raise TypeError(f"the model's {type(model[0]).__name__} has no weights, so there is nothing to cut.")
    memo = merged_encoders(model)
    if layer is not None:
        (layer,) = checked_layers("layer", [layer], model_depth(model))
        auto_model = transformer_of(model).auto_model
        memo[id(auto_model)] = cut_layers(memo.get(id(auto_model), auto_model), layer)
    cuts = _fitted(model, layer, dim, texts, cuts)
    # deepcopy finds the cut backbone in the memo and so never copies the full one
    modules: list[Any] = [copy.deepcopy(module, memo) for module in model.children()]
    if cuts is not None and layer is not None:
        modules = with_map(modules[: len(modules) - len(tail_of(model))], cuts.to_modules(model, layer, dim))
    elif dim is not None:
        if normalize:
            modules = without_normalize(modules)
        if dim < width:
            modules = with_map(modules, [identity_dense(torch.eye(width, dim))])
    if normalize and (cuts is not None or dim is not None):
        modules = with_normalize(modules)
    exported = SentenceTransformer(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),  # type: ignore[arg-type]
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    exported.eval()
    exported.module_kwargs = _module_kwargs(model, modules)
    with evaluation_mode(model):
        _check(model, exported, layer, dim, cuts, normalize)
    restate_config(exported, layer, dim)
    _require_saved(exported, layer)
    return exported


def _require_saved(exported: SentenceTransformer, layer: int | None) -> None:
    """Save the cut model once and load it again: what cannot be written as it is, is noticed here."""
    with TemporaryDirectory() as folder:
        try:
            exported.save_pretrained(folder, create_model_card=False)
        except Exception as error:  # the architecture's own code may raise anything
            name = type(getattr(exported[0], "auto_model", exported[0])).__name__
            words, fix = " ".join(str(error).split()), "" if layer is None else "; leave layer out"
            raise TypeError(f"the cut {name} cannot be saved ({type(error).__name__}: {words}){fix}.") from error
        require_same_when_loaded(exported, folder)


def _module_kwargs(model: SentenceTransformer, modules: Sequence[Any]) -> dict[str, list[str]] | None:
    """Which keywords of ``encode`` go to which of the modules that stayed, under the names that these have now."""
    known = model.module_kwargs or {}
    pairs = enumerate(zip(model.named_children(), modules, strict=False))
    stayed = {str(place): name for place, ((name, old), new) in pairs if type(old) is type(new)}
    return {place: list(known[name]) for place, name in stayed.items() if name in known} or None


def _fitted(
    model: SentenceTransformer, layer: int | None, dim: int | None, texts: Sequence[str] | None, cuts: LayerCuts | None
) -> LayerCuts | None:
    """The cuts that have the tail for the layer, if there is to be a fitted one."""
    if texts is None and cuts is None:
        if layer is not None and layer < model_depth(model):
            logger.info("Nothing was fitted to replace the layers, and what the cut lost was not measured: give texts.")
        return None
    if texts is not None and cuts is not None:
        raise ValueError("texts and cuts are both given; cuts are fitted already, leave texts out.")
    given = "texts" if cuts is None else "cuts"
    if layer is None or layer == model_depth(model):
        raise ValueError(f"{given} are for the tail behind an early layer; give a layer below {model_depth(model)}.")
    if cuts is None:
        assert texts is not None
        cuts = fit_layer_cuts(model, texts, layers=[layer], dims=[dim or full_width(model)])
        (cell,) = cuts.report
        logger.info(
            "Layer %d at %d dims, correlation of cosines with the full model: cut as it is %.3f, fitted %.3f, full "
            "depth %.3f.",
            *(cell[key] for key in ("layer", "dim", "similarity_plain", "similarity_fitted", "similarity_full")),
        )
    if not isinstance(cuts, LayerCuts):
        raise TypeError(f"cuts must be LayerCuts, got {type(cuts).__name__}: LayerCuts.load reads a file.")
    cuts.require_fitted_on(model)
    return cuts


def _check(
    model: SentenceTransformer,
    exported: SentenceTransformer,
    layer: int | None,
    dim: int | None,
    cuts: LayerCuts | None,
    normalize: bool,
) -> None:
    """The cut model must give what the (layer, dim) cell of the grid gives, or the fitted map of its states."""
    texts, amplified = list(PROBE_TEXTS), 1.0
    if cuts is not None:
        assert layer is not None
        before = {place: word_weights_module(model, weights) for place, weights in cuts.word_weights.items()}
        states = encode_layers(model, texts, [layer], tail=False, before=before)[:, 0]
        columns = cuts.maps[layer][:, :dim].numpy()
        expected = states @ columns
        # what rounding in the states can become in the vectors
        amplified = float((np.abs(states) @ np.abs(columns)).max() / np.linalg.norm(expected, axis=1).min()) / 100
    else:
        full = encode_texts(model, texts, prompt=None) if layer is None else encode_layers(model, texts, [layer])[:, 0]
        expected = full[:, :dim]
    got = np.asarray(exported.encode(texts, show_progress_bar=False), dtype=np.float32)
    if normalize and (dim is not None or cuts is not None):
        expected = unit_length(expected)
    if found := difference(expected, got, half=in_half_precision(model), allowed=1e-3 * max(1.0, amplified)):
        more, fix = ("behind the encoder", "") if layer is None else ("between layers", " Leave layer out.")
        raise RuntimeError(
            f"the model cut at layer {layer}, dim {dim} differs from the grid cell by {found}; it does more {more} "
            f"than this export knows.{fix}"
        )


def measure_speedup(
    model: SentenceTransformer,
    exported: SentenceTransformer,
    texts: Sequence[str] | None = None,
    *,
    batch_size: int = 32,
    repeats: int = 3,
) -> dict[str, float]:
    """Encode the same texts with both models in turn.

    Args:
        model: The full model.
        exported: The cut one.
        texts: Texts to encode; None takes 128 made-up sentences of 5 to 33 words.
        batch_size: Texts per forward pass.
        repeats: Rounds; the fastest of each model counts.

    Returns:
        ``speedup`` (full seconds over cut seconds), ``seconds_full``, ``seconds_cut``,
        ``parameters_full``, ``parameters_cut``.

    Raises:
        TypeError: If ``texts`` is no list of texts.
        ValueError: If ``repeats`` or ``batch_size`` is below 1 or ``texts`` is empty.

    Example:
        >>> measure_speedup(model, export_truncated(model, layer=3))["speedup"]  # doctest: +SKIP
        1.9
    """
    repeats, batch_size = checked_count("repeats", repeats), checked_count("batch_size", batch_size)
    if texts is not None:
        texts = checked_texts("texts", texts)
    else:
        texts = ["measure this sentence again " * (1 + i % 8) + str(i) for i in range(128)]
    models = {"full": unwrap(model), "cut": unwrap(exported)}
    best = dict.fromkeys(models, float("inf"))
    for candidate in models.values():
        candidate.encode(texts[:batch_size], batch_size=batch_size, show_progress_bar=False)
    for _ in range(repeats):
        # in turn, so that a busy machine slows both down
        for name, candidate in models.items():
            start = time.perf_counter()
            candidate.encode(texts, batch_size=batch_size, show_progress_bar=False)
            best[name] = min(best[name], time.perf_counter() - start)
    figures = {"speedup": best["full"] / best["cut"]} | {f"seconds_{name}": value for name, value in best.items()}
    for name, candidate in models.items():
        figures[f"parameters_{name}"] = float(sum(parameter.numel() for parameter in candidate.parameters()))
    logger.info("The cut model is %.2f times as fast.", figures["speedup"])
    return figures
