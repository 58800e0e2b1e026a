"""Cut a model to its first layers and first dimensions; the result is a plain SentenceTransformer."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize

from mipic_st._checks import checked_count, checked_dims, checked_flag, checked_layers
from mipic_st.embedding_store import (
    EmbeddingStore,
    full_width,
    model_depth,
    transformer_of,
)

logger = logging.getLogger(__name__)

__all__ = ["export_truncated", "measure_speedup"]

_PROBES = ("A short probe.", "A second probe sentence with a few more words in it, so that padding takes part.")


def export_truncated(
    model: SentenceTransformer, layer: int | None = None, dim: int | None = None, *, normalize: bool = True
) -> SentenceTransformer:
    """A copy of the model that stops after ``layer`` and gives ``dim`` values.

    The backbone is built anew with fewer layers (a pre-norm backbone keeps its final norm); a Dense module without bias
    whose weight selects the first ``dim`` values follows, then Normalize. All of it is sentence-transformers' own, so
    the saved folder loads where this package is not installed. The result is checked against the grid cell
    ``(layer, dim)`` of `MatryoshkaEvaluator` before it is returned. The model that was passed in is left alone.

    Args:
        model: The model to cut.
        layer: Last layer to keep, 1 to L; None keeps all.
        dim: Values to keep, 1 to D; None keeps what the model gives: its ``truncate_dim`` if it was loaded with one,
            else all, without a tail.
        normalize: Put Normalize after the cut.

    Returns:
        A SentenceTransformer on the same device, in evaluation mode. `measure_speedup` says how much faster it is.

    Raises:
        TypeError: If ``layer`` is given for a model without layers, or for one with an unmerged adapter.
        ValueError: If layer or dim is out of range, or neither is given.
        RuntimeError: If the cut model does not reproduce the grid cell.

    Example:
        >>> small = export_truncated(model, layer=4, dim=64)                        # doctest: +SKIP
        >>> small.save_pretrained("small")                                          # doctest: +SKIP
    """
    if dim is None and model.truncate_dim is not None:
        dim = min(model.truncate_dim, full_width(model))
    if layer is None and dim is None:
        raise ValueError("layer and dim are both None, so there is nothing to cut; give at least one.")
    if dim is not None:
        (dim,) = checked_dims("dim", [dim], full_width(model))
    normalize = checked_flag("normalize", normalize)
    memo: dict[int, Any] = {}
    if layer is not None:
        (layer,) = checked_layers("layer", [layer], model_depth(model))
        auto_model = transformer_of(model).auto_model
        memo[id(auto_model)] = _cut_backbone(auto_model, layer)
    # deepcopy finds the cut backbone in the memo and so never copies the full one
    modules: list[Any] = [copy.deepcopy(module, memo) for module in model.children()]
    if dim is not None:
        while isinstance(modules[-1], Normalize):
            modules.pop()
        width = EmbeddingStore(model).width
        if dim < width:
            modules.append(_first_values(width, dim, next(model.parameters()).dtype))
        if normalize:
            modules.append(Normalize())
    exported = SentenceTransformer(
        modules=modules,
        device=str(model.device),
        prompts=dict(model.prompts),  # type: ignore[arg-type]
        default_prompt_name=model.default_prompt_name,
        similarity_fn_name=model.similarity_fn_name,
    )
    exported.eval()
    _check(model, exported, layer, dim, normalize)
    return exported


def _cut_backbone(auto_model: Any, layer: int) -> Any:
    """A backbone of the same class with ``layer`` layers and the original's weights."""
    if hasattr(auto_model, "peft_config") or getattr(auto_model, "_hf_peft_config_loaded", False):
        raise TypeError("the model carries an unmerged adapter; merge it (merge_and_unload) before the export.")
    config = copy.deepcopy(auto_model.config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    text_config.num_hidden_layers = layer
    # per-layer lists (attention kinds of Qwen3, Gemma3, ModernBERT) follow the number of layers
    for name, value in list(vars(text_config).items()):
        if name == "layer_types" and isinstance(value, (list, tuple)) and len(value) == depth:
            setattr(text_config, name, list(value[:layer]))
    parameter = next(auto_model.parameters())
    cut = type(auto_model)(config).to(device=parameter.device, dtype=parameter.dtype)
    weights = auto_model.state_dict()
    wanted = cut.state_dict()
    missing = [name for name, value in wanted.items() if name not in weights or weights[name].shape != value.shape]
    if missing:
        raise TypeError(
            f"{type(auto_model).__name__} cannot be cut at layer {layer}: no weights for {missing[:3]}. Leave it out."
        )
    cut.load_state_dict({name: weights[name] for name in wanted})
    return cut.eval()


def _first_values(width: int, dim: int, dtype: torch.dtype) -> Dense:
    """A linear map that keeps the first ``dim`` values: sentence-transformers has no module that cuts."""
    return Dense(
        in_features=width,
        out_features=dim,
        bias=False,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(dim, width, dtype=dtype),
    )


def _check(
    model: SentenceTransformer, exported: SentenceTransformer, layer: int | None, dim: int | None, normalize: bool
) -> None:
    texts = list(_PROBES)
    store = EmbeddingStore(model, None if layer is None else [layer])
    expected = store.view(dim or store.width, layer=layer, normalize=normalize).encode(texts, show_progress_bar=False)
    got = np.asarray(exported.encode(texts, show_progress_bar=False), dtype=np.float32)
    if dim is not None and normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    scale = max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(got - expected).max())
    if got.shape != expected.shape or worst > (2e-2 if half else 1e-4) * scale:
        raise RuntimeError(
            f"the model cut at layer {layer}, dim {dim} differs from the grid cell by {worst:.1e}; "
            "its architecture does more between layers than this export knows. Leave layer out."
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
        texts: Texts to encode; None takes 128 made-up sentences of 5 to 36 words.
        batch_size: Texts per forward pass.
        repeats: Rounds; the fastest of each model counts.

    Returns:
        ``speedup`` (full seconds over cut seconds), ``seconds_full``, ``seconds_cut``, ``parameters_full``,
        ``parameters_cut``.

    Raises:
        ValueError: If ``repeats`` or ``batch_size`` is below 1 or ``texts`` is empty.
    """
    repeats, batch_size = checked_count("repeats", repeats), checked_count("batch_size", batch_size)
    if texts is None:
        texts = [" ".join(["measure", "this", "sentence", "again"] * (1 + i % 8)) + f" {i}" for i in range(128)]
    if not len(texts):
        raise ValueError("texts is empty; give some, or None for made-up ones.")
    best = {"full": float("inf"), "cut": float("inf")}
    pair = {"full": model, "cut": exported}
    for candidate in pair.values():
        candidate.encode(list(texts)[:batch_size], batch_size=batch_size, show_progress_bar=False)
    for _ in range(repeats):
        # in turn, so that a busy machine slows both alike
        for name, candidate in pair.items():
            start = time.perf_counter()
            candidate.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
            best[name] = min(best[name], time.perf_counter() - start)
    parameters = {name: float(sum(p.numel() for p in candidate.parameters())) for name, candidate in pair.items()}
    result = {
        "speedup": best["full"] / best["cut"],
        "seconds_full": best["full"],
        "seconds_cut": best["cut"],
        "parameters_full": parameters["full"],
        "parameters_cut": parameters["cut"],
    }
    logger.info("The cut model is %.2f times as fast.", result["speedup"])
    return result
