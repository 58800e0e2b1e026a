"""Kinds of modules: what others ask and build, and which of those behind a pooling are linear or pass vectors on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
    WordWeights,
)
from torch import Tensor, nn

_KINDS = (Transformer, Pooling, Dense, Normalize, WordWeights)


def kind_of(module: nn.Module) -> str:
    """The name of a module's kind; nothing for a kind that is not known, or one with code of its own."""
    return type(module).__name__ if type(module) in _KINDS else ""


def pooling_place(model: SentenceTransformer) -> int:
    """Which of the model's modules is its pooling; -1 if none is."""
    return next((place for place, module in enumerate(model.children()) if isinstance(module, Pooling)), -1)


def pooling_like(pooling: Any, *, mode: Any = None, width: int | None = None) -> Any:
    """The pooling in another mode or for token states of another width."""
    return Pooling(
        width or pooling.embedding_dimension, mode or pooling.pooling_mode, include_prompt=pooling.include_prompt
    )


def load_pooling(folder: Path) -> Any:
    """A pooling that was saved."""
    return Pooling.load(str(folder))


def leaves_prompts_out(model: SentenceTransformer) -> bool:
    """Whether the model has prompts, whose tokens its pooling leaves out."""
    poolings = [module for module in model.children() if isinstance(module, Pooling)]
    return any(model.prompts.values()) and not all(pooling.include_prompt for pooling in poolings)


def with_normalize(modules: Sequence[Any]) -> list[Any]:
    """The modules and a Normalize at the end."""
    return [*without_normalize(modules), Normalize()]


def without_normalize(modules: Sequence[Any]) -> list[Any]:
    """The modules without a Normalize at the end."""
    kept = list(modules)
    while kept and isinstance(kept[-1], Normalize):
        kept.pop()
    return kept


# --- behind the pooling -----------------------------------------------------------------------------------------------

TAIL_KINDS = (Dense, Normalize, LayerNorm, Dropout)
TAIL_NAMES = ", ".join(kind.__name__ for kind in TAIL_KINDS)


def features_of(module: nn.Module) -> tuple[str, str]:
    """Which features a module of the tail reads and writes."""
    read = getattr(module, "module_input_name", "sentence_embedding")
    return read, getattr(module, "module_output_name", read)


def not_a_step(module: nn.Module) -> str:
    """Why states cannot be pushed through a module of the tail one by one, or nothing."""
    name = type(module).__name__
    kind = next((kind for kind in TAIL_KINDS if isinstance(module, kind)), None)
    if kind is None:
        return f"Behind its pooling the model has {name}, which is none of {TAIL_NAMES}"
    if type(module).forward is not kind.forward:
        return f"Behind its pooling the model has {name}, a {kind.__name__} with a forward of its own"
    read, written = features_of(module)
    if (read, written) != ("sentence_embedding", "sentence_embedding"):
        return f"Behind its pooling the model has a {name} that reads {read!r} and writes {written!r}"
    return ""


def is_linear(module: nn.Module, features: str = "sentence_embedding") -> bool:
    """Whether a linear map behind a module can be multiplied into its weight (and bias)."""
    return (
        isinstance(module, Dense)
        and type(module).forward is Dense.forward
        and features_of(module) == (features, features)
        and isinstance(module.activation_function, nn.Identity)
        and not getattr(module, "use_residual", False)
        and type(module.linear) is nn.Linear  # not one that an adapter or a parametrization stands around
    )


def push_vectors(modules: Sequence[nn.Module], vectors: Tensor) -> Tensor:
    """Run vectors through modules of a tail, as if they came from the pooling."""
    features = {"sentence_embedding": vectors}
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]
