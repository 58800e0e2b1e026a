"""The modules behind a pooling: which of them vectors can be pushed through, and which are linear."""

from __future__ import annotations

from collections.abc import Sequence

from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Normalize
from torch import Tensor, nn

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
