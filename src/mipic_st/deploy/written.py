"""What was written, loaded in a fresh object and compared with the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.encoder.encoding import PROBE_TEXTS, encode_texts
from mipic_st.encoder.structure import evaluation_mode, in_half_precision
from mipic_st.encoder.surgery import merged_encoders
from mipic_st.numerics import compare_vectors

# The older names of modules, which servers read.
OLDER_NAMES = "sentence_transformers.models."
# What servers with a pooling of their own do not do, and the way out.
PROMPTS_LEFT_OUT = "the model's pooling leaves out the tokens of its prompts (include_prompt=False), which"
WITHOUT_PROMPTS = "for texts without prompts, set model.prompts = {} and save again."


def difference(own: Any, other: Any, *, half: bool = False, allowed: float = 1e-3) -> str:
    """How two sets of vectors differ by more than rounding, in words; empty if they do not."""
    own, other = np.asarray(own), np.asarray(other)
    if own.shape != other.shape:
        return f"their shape, {own.shape} and {other.shape}"
    if (np.isfinite(own) != np.isfinite(other)).any():
        return "values that are not finite"
    found = compare_vectors(own, other, half=half, allowed=allowed)
    return "" if found.same else f"{found.worst:.1e} at values up to {found.scale:.1e}"


def without_adapters(model: SentenceTransformer) -> SentenceTransformer:
    """The model, or a copy with its adapters merged: what is saved of adapters, no server reads."""
    return copy.deepcopy(model, merged) if (merged := merged_encoders(model)) else model


def require_same_when_loaded(model: SentenceTransformer, folder: str | PathLike[str]) -> None:
    """Refuse a saved folder that gives other vectors than the model, for instance for weights under unknown names."""
    # code that came with the model, or that made it, has run already; other code is not run
    trust = any(type(module).__module__.startswith("transformers_modules.") for module in model.modules())
    trust |= any(not type(module).__module__.startswith("sentence_transformers.") for module in model.children())
    try:
        with torch.random.fork_rng(devices=[]):  # random weights, which the saved ones replace
            loaded = SentenceTransformer(str(folder), device="cpu", trust_remote_code=trust)
    except Exception as error:  # of a module's own code it may be of any kind
        raise RuntimeError(f"the model cannot be loaded again once it is saved: {error}") from error
    with evaluation_mode(model):
        vectors = [encode_texts(each, PROBE_TEXTS, prompt=None) for each in (model, loaded)]
    half = in_half_precision(model) or in_half_precision(loaded)
    if found := difference(*vectors, half=half):
        kinds = ", ".join(type(module).__name__ for module in model.children())
        raise RuntimeError(
            f"the model gives other vectors once it is saved and loaded again: they differ by {found}. One of its "
            f"modules ({kinds}) is not saved as it is, or holds adapters of a kind that is not known: merge them first."
        )


def vectors_with(model: SentenceTransformer, modules: list[Any], texts: Sequence[str]) -> np.ndarray:
    """What the model would give with other modules behind its encoder."""
    other = SentenceTransformer(modules=modules, device=str(model.device))
    with evaluation_mode(model):
        return encode_texts(other, texts)
