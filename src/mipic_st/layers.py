"""Sentence vectors of a model's intermediate layers, as a model that was cut there would give them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device

from mipic_st.backbone import (
    check_layers,
    evaluation_mode,
    final_norm,
    full_width,
    layer_states,
    model_depth,
    module_identity,
    require_same_vectors,
    tail_of,
    transformer_of,
)
from mipic_st.recording import hidden_states_requested

# Models whose last layer was seen to give the model's own vectors, and of which modules they consisted then.
_checked: weakref.WeakKeyDictionary[SentenceTransformer, tuple[int, ...]] = weakref.WeakKeyDictionary()


def encode_layers(
    model: SentenceTransformer,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    tail: bool = True,
    **kwargs: Any,
) -> np.ndarray:
    """Sentence vectors of several layers from one forward pass per batch.

    The token states of each layer go through the model's own final norm (pre-norm backbones only), Pooling and all
    remaining modules, so that the last layer gives what ``model.encode`` gives. That it does is checked once per model.

    Args:
        model: A SentenceTransformer whose first module is a Transformer.
        texts: The texts, n of them.
        layers: Layer numbers, 0 (embedding layer) to L (last).
        prompt: Put before every text.
        batch_size: Texts per forward pass.
        show_progress_bar: Show a bar over batches.
        tail: Run the modules behind the pooling; without, the pooled states of each layer are given as they are.
        **kwargs: Passed on to ``model.preprocess``.

    Returns:
        float32 array of shape (n, len(layers), D); the hidden width without the tail.

    Raises:
        TypeError: If the model has no layers, does not show their states, or does something behind the last one that
            cannot be done behind the others.
        ValueError: If a layer number does not exist, or the model does not pool its last hidden state.
    """
    from tqdm.auto import trange

    check_layers(layers, model)
    walk = _LayerWalk(model)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    result: np.ndarray | None = None
    with evaluation_mode(model), torch.inference_mode():
        if order and _checked.get(model) != module_identity(model):
            some = [texts[order[0]], texts[order[-1]]]
            _require_own_vectors(model, walk, model.preprocess(some, prompt=prompt, **kwargs))
            _checked[model] = module_identity(model)
        for start in trange(0, len(order), batch_size, desc="Batches", disable=not show_progress_bar):
            rows = order[start : start + batch_size]
            features = model.preprocess([texts[i] for i in rows], prompt=prompt, **kwargs)
            for column, vectors in enumerate(walk(features, layers, tail)):
                if result is None:
                    result = np.empty((len(texts), len(layers), vectors.shape[1]), dtype=np.float32)
                result[rows, column] = vectors.float().cpu().numpy()
    if result is None:
        width = full_width(model) if tail else transformer_of(model).get_embedding_dimension()
        return np.empty((0, len(layers), width), dtype=np.float32)
    return result


class _LayerWalk:
    """One forward pass of the encoder, then its final norm and the other modules behind each layer."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self.transformer = transformer_of(model)
        self.depth = model_depth(model)
        self.norm = final_norm(self.transformer.auto_model)
        self.behind = list(model.children())[1:]
        self.pooled = self.behind[: len(self.behind) - len(tail_of(model))]

    def __call__(self, features: dict[str, Any], layers: Sequence[int], tail: bool = True) -> list[torch.Tensor]:
        """(R, D) of each layer."""
        inputs = dict(batch_to_device(features, self.model.device))
        with hidden_states_requested(self.model):
            states = self.transformer(dict(inputs)).get("all_layer_embeddings")
        if states is None or len(states) != self.depth + 1:
            raise TypeError(
                f"{type(self.transformer.auto_model).__name__} gave no hidden states for its {self.depth} layers; "
                "leave layers out for this model."
            )
        by_layer = layer_states(self.transformer.auto_model, states)
        if missing := [layer for layer in layers if layer not in by_layer]:
            raise TypeError(f"layers {missing} are not among what the encoder shows; leave them out for this model.")
        vectors = []
        for layer in layers:
            tokens = by_layer[layer]
            if self.norm is not None and layer < self.depth:
                tokens = self.norm(tokens)
            # The inputs and this layer's states, nothing else of what the Transformer gives: a module that reads the
            # last state under another name, or mixes layers, would give every cell the same.
            cell: dict[str, Any] = {**inputs, "token_embeddings": tokens}
            # Pooling with include_prompt=False writes into the mask, so every layer gets its own.
            if isinstance(inputs.get("attention_mask"), torch.Tensor):
                cell["attention_mask"] = inputs["attention_mask"].clone()
            try:
                for module in self.behind if tail else self.pooled:
                    cell = module(cell)
                vectors.append(cell["sentence_embedding"])
            except KeyError as error:
                names = [type(module).__name__ for module in self.model.children()]
                raise TypeError(
                    f"layers need a model that pools token states, but in {names} something else reads {error}; leave "
                    "layers out for this model."
                ) from error
        return vectors


def _require_own_vectors(model: SentenceTransformer, walk: _LayerWalk, features: dict[str, Any]) -> None:
    """Compare the last layer's vectors with what the model gives by itself, asked for nothing more."""
    copies = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in features.items()} for _ in range(2)]
    own = model(batch_to_device(copies[0], model.device))["sentence_embedding"]
    (last,) = walk(copies[1], [walk.depth])
    require_same_vectors(own, last, model, "Leave layers out for this model.")
