"""Kinds of modules: what others ask and build, who import nothing of sentence-transformers' modules themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer, WordWeights
from torch import nn

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
