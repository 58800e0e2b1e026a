"""Encode every distinct text once; answer `encode` calls at any dimension, layer and precision from the store.

`EmbeddingStore` holds full-width vectors, `DimView` stands in for the model: it answers ``encode``,
``encode_query`` and ``encode_document`` from the store and passes everything else on to the model. No model object is
patched. Symbols: n texts, S stored states (1, or one per requested layer), D full width, d the cut width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device, quantize_embeddings

from mipic_st._checks import as_list, checked_count, checked_layers
from mipic_st.recording import embedding_width, hidden_states_requested, layer_count

logger = logging.getLogger(__name__)

PRECISIONS = ("float32", "int8", "binary")
# encode(truncate_dim=None) falls back to the model's own truncate_dim; a slice this wide never cuts.
_NO_CUT = 2**31 - 1
_MERGE_BLOCKS_ABOVE = 32
# Where the pre-norm architectures of transformers keep the norm that follows the last layer. Post-norm models
# (BERT, MPNet, DistilBERT, XLM-R, ELECTRA, DeBERTa, ALBERT) have none of these on the base model.
_FINAL_NORM_NAMES = ("norm", "final_norm", "final_layer_norm", "ln_f")


def bytes_per_vector(dim: int, precision: str = "float32") -> int:
    """Storage of one vector.

    Args:
        dim: Number of values, at least 1.
        precision: ``"float32"``, ``"int8"`` or ``"binary"``.

    Returns:
        Number of bytes, 4 per value, 1 per value, or 1 per started group of 8 values.

    Raises:
        ValueError: If ``dim`` is below 1 or ``precision`` is not one of the three.

    Example:
        >>> bytes_per_vector(64), bytes_per_vector(64, "int8"), bytes_per_vector(64, "binary")
        (256, 64, 8)
    """
    dim = checked_count("dim", dim)
    if precision == "float32":
        return 4 * dim
    if precision == "int8":
        return dim
    if precision == "binary":
        return (dim + 7) // 8
    raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")


def check_precisions(precisions: Sequence[str]) -> tuple[str, ...]:
    """Validate precisions: known ones, float32 among them (it fills the store that the others are calibrated on).

    Args:
        precisions: Some of ``"float32"``, ``"int8"``, ``"binary"``.

    Returns:
        The precisions in that order, each once.

    Raises:
        TypeError: If ``precisions`` is no sequence.
        ValueError: If one is unknown or float32 is missing.
    """
    precisions = as_list("precisions", precisions, "('float32', 'int8')")
    for precision in precisions:
        if precision not in PRECISIONS:
            raise ValueError(f"precisions must be among {PRECISIONS}, got {precision!r}.")
    if "float32" not in precisions:
        raise ValueError(f"precisions must include 'float32', the column others are compared with; got {precisions!r}.")
    return tuple(precision for precision in PRECISIONS if precision in precisions)


def full_width(model: SentenceTransformer) -> int:
    """The width D of the model's vectors, whatever ``truncate_dim`` it was loaded with."""
    width = embedding_width(model)
    return width or int(model.encode(["a"], truncate_dim=_NO_CUT, show_progress_bar=False).shape[-1])


def transformer_of(model: SentenceTransformer) -> Any:
    """The model's first module, if it is a Transformer that knows layers.

    Args:
        model: The model.

    Returns:
        The module.

    Raises:
        TypeError: If the model starts with something else (StaticEmbedding, Router, WordEmbeddings).
    """
    from sentence_transformers.sentence_transformer.modules import Transformer

    if not isinstance(model[0], Transformer):
        raise TypeError(
            f"layers need a model whose first module is a Transformer, got {type(model[0]).__name__}; leave layers out."
        )
    return model[0]


def model_depth(model: SentenceTransformer) -> int:
    """How many encoder layers the model has (layer 0 is the embedding layer).

    Raises:
        TypeError: If it has none, or its config does not say.
    """
    transformer = transformer_of(model)
    depth = layer_count(transformer)
    if depth is None:
        raise TypeError(
            f"layers need a depth, but the config of {type(transformer.auto_model).__name__} does not say "
            "num_hidden_layers; leave layers out."
        )
    return depth


def check_layers(layers: Sequence[int], model: SentenceTransformer) -> tuple[int, ...]:
    """Validate layer numbers against the model and sort them upwards.

    Args:
        layers: Distinct layer numbers, 0 to L.
        model: The model.

    Returns:
        The layers, ascending.

    Raises:
        TypeError: If ``layers`` is no sequence, or the model has none.
        ValueError: If one is outside 0..L or given twice.
    """
    return checked_layers("layers", layers, model_depth(model), least=0, otherwise=", or None for the final vector")


def final_norm(auto_model: torch.nn.Module) -> torch.nn.Module | None:
    """The norm after the last layer of a pre-norm encoder (Qwen3, ModernBERT, Gemma3, T5), or None.

    A model cut after layer l still runs this norm, so a grid cell must too: the grid scores what can be exported.

    Args:
        auto_model: The encoder of transformers.

    Returns:
        The module.
    """
    for holder in (auto_model, getattr(auto_model, "encoder", None)):
        for name in _FINAL_NORM_NAMES:
            module = getattr(holder, name, None)
            if isinstance(module, torch.nn.Module):
                return module
    return None


def encode_layers(
    model: SentenceTransformer,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    **kwargs: Any,
) -> np.ndarray:
    """Sentence vectors of several layers from one forward pass per batch.

    The token states of each layer go through the model's own final norm (pre-norm backbones only), Pooling and all
    remaining modules, so that the last layer gives what ``model.encode`` gives.

    Args:
        model: A SentenceTransformer whose first module is a Transformer.
        texts: The texts, n of them.
        layers: Layer numbers, 0 (embedding layer) to L (last).
        prompt: Put before every text.
        batch_size: Texts per forward pass.
        show_progress_bar: Show a bar over batches.
        **kwargs: Passed on to ``model.preprocess``.

    Returns:
        float32 array of shape (n, len(layers), D).

    Raises:
        TypeError: If the model has no layers.
        ValueError: If a layer number does not exist.
    """
    from tqdm.auto import trange

    transformer = transformer_of(model)
    last = model_depth(model)
    check_layers(layers, model)
    norm = final_norm(transformer.auto_model)
    tail = [module for _, module in list(model.named_children())[1:]]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    result: np.ndarray | None = None
    was_training = model.training
    model.eval()
    try:
        with hidden_states_requested(model), torch.inference_mode():
            for start in trange(0, len(order), batch_size, desc="Batches", disable=not show_progress_bar):
                rows = order[start : start + batch_size]
                features = batch_to_device(
                    model.preprocess([texts[i] for i in rows], prompt=prompt, **kwargs), model.device
                )
                out = transformer(features)
                states = out.get("all_layer_embeddings")
                if states is None or len(states) != last + 1:
                    raise TypeError(
                        f"{type(transformer.auto_model).__name__} gave no hidden states for its {last} layers; "
                        "leave layers out for this model."
                    )
                for column, layer in enumerate(layers):
                    tokens = states[layer]
                    if norm is not None and layer < last:
                        tokens = norm(tokens)
                    # Pooling with include_prompt=False writes into the mask, so every layer gets its own.
                    cell = {**out, "token_embeddings": tokens}
                    if isinstance(out.get("attention_mask"), torch.Tensor):
                        cell["attention_mask"] = out["attention_mask"].clone()
                    for module in tail:
                        cell = module(cell)
                    vectors = cell["sentence_embedding"].float().cpu().numpy()
                    if result is None:
                        result = np.empty((len(texts), len(layers), vectors.shape[1]), dtype=np.float32)
                    result[rows, column] = vectors
    finally:
        model.train(was_training)
    if result is None:
        return np.empty((0, len(layers), full_width(model)), dtype=np.float32)
    return result


class _Space:
    """Vectors of all texts that were encoded under one prompt and task."""

    def __init__(self) -> None:
        self.row_of: dict[str, int] = {}
        self.blocks: list[np.ndarray] = []

    def add(self, texts: Sequence[str], vectors: np.ndarray) -> None:
        for text in texts:
            self.row_of[text] = len(self.row_of)
        self.blocks.append(vectors)
        if len(self.blocks) > _MERGE_BLOCKS_ABOVE:
            self.blocks = [np.concatenate(self.blocks)]

    def gather(self, texts: Sequence[str], state: int, dim: int) -> np.ndarray:
        rows = np.fromiter((self.row_of[text] for text in texts), dtype=np.int64, count=len(texts))
        out = np.empty((len(rows), dim), dtype=np.float32)
        start = 0
        for block in self.blocks:
            inside = (rows >= start) & (rows < start + len(block))
            out[inside] = block[rows[inside] - start, state, :dim]
            start += len(block)
        return out


class EmbeddingStore:
    """Full-width vectors of every distinct (prompt, task, text), encoded once each.

    Args:
        model: The SentenceTransformer that encodes.
        layers: Keep the vectors of these layers (0..L) instead of the final one; None keeps the final vector only.

    Example:
        >>> store = EmbeddingStore(model)                                            # doctest: +SKIP
        >>> store.view(64).encode(["a text", "another"]).shape                       # doctest: +SKIP
        (2, 64)
    """

    def __init__(self, model: SentenceTransformer, layers: Sequence[int] | None = None) -> None:
        self.model = model
        self.layers = None if layers is None else check_layers(layers, model)
        self.width = full_width(model)
        self._spaces: dict[tuple[Any, ...], _Space] = {}
        self._ranges: dict[tuple[int, int, int], np.ndarray] = {}
        # encode_query and encode_document differ from encode by the prompt, and by the route through a Router if any
        self._has_router = any(type(module).__name__ == "Router" for module in model.modules())

    @property
    def nbytes(self) -> int:
        """Bytes held by the stored vectors."""
        return sum(block.nbytes for space in self._spaces.values() for block in space.blocks)

    def __len__(self) -> int:
        return sum(len(space.row_of) for space in self._spaces.values())

    def clear(self) -> None:
        """Forget all vectors."""
        self._spaces.clear()
        self._ranges.clear()

    def view(
        self, dim: int, *, layer: int | None = None, precision: str = "float32", normalize: bool = True
    ) -> DimView:
        """A stand-in for the model at one dimension.

        Args:
            dim: Width of the vectors, 1 to D.
            layer: One of the store's layers; None for the final vector.
            precision: ``"float32"``, ``"int8"`` or ``"binary"``.
            normalize: Renormalise after the cut. Uncut float32 vectors stay as the model gives them.

        Returns:
            An object with the model's ``encode`` methods.

        Raises:
            ValueError: If the dim exceeds the width or the layer is not stored.
        """
        if not 1 <= dim <= self.width:
            raise ValueError(f"dim must be from 1 to the model's width {self.width}, got {dim}.")
        if (layer is None) != (self.layers is None) or (self.layers is not None and layer not in self.layers):
            raise ValueError(f"layer {layer!r} is not in this store, which holds layers {self.layers}.")
        return DimView(self, dim, layer, precision, normalize)

    def _prompt(self, method: str, prompt_name: str | None, prompt: str | None) -> str | None:
        """The text that ``model.<method>`` would put before each input."""
        model = self.model
        if prompt is not None:
            return prompt
        if prompt_name is None:
            candidates = {"encode_query": ("query",), "encode_document": ("document", "passage", "corpus")}
            prompt_name = next((name for name in candidates.get(method, ()) if name in model.prompts), None)
        if prompt_name is None:
            prompt_name = model.default_prompt_name
        if prompt_name is None:
            return None
        if prompt_name not in model.prompts:
            raise ValueError(f"prompt_name {prompt_name!r} is not among the model's prompts {list(model.prompts)}.")
        return model.prompts[prompt_name]

    def gather(
        self,
        texts: Sequence[str],
        method: str,
        *,
        dim: int,
        layer: int | None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Cut vectors of ``texts``, encoding those that are new.

        Args:
            texts: The texts, n of them.
            method: ``"encode"``, ``"encode_query"`` or ``"encode_document"``: whose prompt is meant.
            dim: Width of the vectors.
            layer: One of the store's layers; None for the final vector.
            prompt_name: Name of a prompt of the model.
            prompt: A prompt itself; wins over the name.
            batch_size: Texts per forward pass.
            show_progress_bar: Show a bar while encoding.
            **kwargs: Passed on to the model; other values make another entry of the store.

        Returns:
            float32 array of shape (n, dim), not renormalised.

        Raises:
            TypeError: If an input is not a text.
            ValueError: If the model gives NaN or infinite values.
        """
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"per-dimension evaluation encodes texts only, got an input of {type(text).__name__}.")
        prompt = self._prompt(method, prompt_name, prompt) or ""
        task = {"encode_query": "query", "encode_document": "document"}.get(method) if self._has_router else None
        device_options = {name: kwargs.pop(name) for name in ("device", "pool", "chunk_size") if name in kwargs}
        task = kwargs.pop("task", None) or task
        key = (prompt, task if self._has_router else None, repr(sorted(kwargs.items(), key=str)))
        space = self._spaces.setdefault(key, _Space())
        new = [text for text in dict.fromkeys(texts) if text not in space.row_of]
        if new:
            if self._has_router and task is not None:
                kwargs["task"] = task
            if self.layers is None:
                vectors = self.model.encode(
                    new,
                    prompt=prompt,
                    batch_size=batch_size,
                    show_progress_bar=show_progress_bar,
                    truncate_dim=_NO_CUT,
                    convert_to_numpy=True,
                    **device_options,
                    **kwargs,
                )
                vectors = np.asarray(vectors, dtype=np.float32)[:, None, :]
            else:
                vectors = encode_layers(
                    self.model,
                    new,
                    self.layers,
                    prompt=prompt,
                    batch_size=batch_size,
                    show_progress_bar=bool(show_progress_bar),
                    **kwargs,
                )
            finite = np.isfinite(vectors).all(axis=(1, 2))
            if not finite.all():
                first = int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"embeddings hold NaN or infinite values for {int((~finite).sum())} of {len(new)} texts, "
                    f"the first is {new[first][:80]!r}; check the model's weights and its precision (fp16?)."
                )
            space.add(new, vectors)
            self._ranges.clear()
        state = 0 if self.layers is None else self.layers.index(layer if layer is not None else self.layers[-1])
        return space.gather(texts, state, dim)

    def int8_ranges(self, dim: int, layer: int | None, normalize: bool) -> np.ndarray:
        """Smallest and largest value per position over all stored texts: one calibration for all.

        Args:
            dim: Width of the vectors.
            layer: One of the store's layers; None for the final vector.
            normalize: Whether vectors are renormalised after the cut.

        Returns:
            Array of shape (2, dim).
        """
        state = 0 if self.layers is None else self.layers.index(layer if layer is not None else self.layers[-1])
        key = (dim, state, int(normalize))
        if key not in self._ranges:
            lows, highs = [], []
            for space in self._spaces.values():
                for block in space.blocks:
                    vectors = block[:, state, :dim]
                    vectors = unit_length(vectors) if normalize else vectors
                    lows.append(vectors.min(axis=0))
                    highs.append(vectors.max(axis=0))
            self._ranges[key] = np.stack([np.min(lows, axis=0), np.max(highs, axis=0)])
        return self._ranges[key]


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; rows of zeros stay zero.

    Args:
        vectors: (n, d).

    Returns:
        (n, d).
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)


class DimView:
    """What an evaluator gets in place of the model: vectors of one dim, layer and precision, read from the store.

    Attributes that are not about encoding (``similarity``, ``similarity_fn_name``, ``model_card_data``, ``device``,
    ``prompts`` ...) are the model's.
    """

    def __init__(self, store: EmbeddingStore, dim: int, layer: int | None, precision: str, normalize: bool) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
        self._store = store
        self._dim = dim
        self._layer = layer
        self._precision = precision
        self._normalize = normalize
        self.encode_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_store":
            raise AttributeError(name)
        return getattr(self._store.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the forward pass: its output has no dim.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            "this evaluator runs the model's forward pass itself instead of model.encode, so it cannot be evaluated "
            "per dimension; use an evaluator that encodes, such as ClassificationProbeEvaluator for labels."
        )

    def encode(self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode`` at this dim."""
        return self._encode("encode", inputs, prompt_name, prompt, **kwargs)

    def encode_query(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **kwargs: Any
    ) -> Any:
        """``SentenceTransformer.encode_query`` at this dim."""
        return self._encode("encode_query", inputs, prompt_name, prompt, **kwargs)

    def encode_document(
        self, inputs: Any, prompt_name: str | None = None, prompt: str | None = None, **kwargs: Any
    ) -> Any:
        """``SentenceTransformer.encode_document`` at this dim."""
        return self._encode("encode_document", inputs, prompt_name, prompt, **kwargs)

    def _encode(
        self,
        method: str,
        inputs: Any,
        prompt_name: str | None,
        prompt: str | None,
        *,
        output_value: str | None = "sentence_embedding",
        precision: str | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = False,
        truncate_dim: int | None = None,
        **kwargs: Any,
    ) -> Any:
        self.encode_calls += 1
        if output_value != "sentence_embedding":
            raise TypeError(
                f"per-dimension evaluation gives sentence embeddings only, not output_value={output_value!r}."
            )
        if truncate_dim is not None and truncate_dim != self._dim:
            raise ValueError(f"the evaluator asks for truncate_dim={truncate_dim} at dim {self._dim}; leave it unset.")
        single = isinstance(inputs, str)
        texts = [inputs] if single else list(inputs)
        vectors = self._store.gather(
            texts, method, dim=self._dim, layer=self._layer, prompt_name=prompt_name, prompt=prompt, **kwargs
        )
        cut = self._dim < self._store.width
        if normalize_embeddings or (self._normalize and (cut or self._precision != "float32")):
            vectors = unit_length(vectors)
        if self._precision != "float32":
            if precision not in (None, "float32"):
                raise ValueError(f"the evaluator quantises to {precision} itself; leave its precision unset.")
            vectors = self._quantise(vectors)
        result: Any = vectors
        if precision not in (None, "float32"):
            result = quantize_embeddings(vectors, precision=precision)  # type: ignore[arg-type]
        if convert_to_tensor:
            result = torch.as_tensor(result, device=self._store.model.device)
        elif not convert_to_numpy:
            result = list(torch.as_tensor(result))
        return result[0] if single else result

    def _quantise(self, vectors: np.ndarray) -> np.ndarray:
        """Quantise with sentence-transformers, then widen the codes to float32 as its own evaluators do."""
        if self._precision == "int8":
            ranges = self._store.int8_ranges(self._dim, self._layer, self._normalize)
            return np.asarray(quantize_embeddings(vectors, "int8", ranges=ranges)).astype(np.float32)
        packed = quantize_embeddings(vectors, "ubinary")
        return np.unpackbits(packed, axis=1, count=self._dim).astype(np.float32)
