"""What a call of ``model.encode``, ``encode_query`` or ``encode_document`` asks for, found out from the model."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from mipic_st.encoder.encoding import without_own_methods
from mipic_st.encoder.structure import evaluation_mode


def reads_task(model: SentenceTransformer) -> bool:
    """Whether a model may answer ``encode``, ``encode_query`` and ``encode_document`` differently under one prompt.

    Only sentence-transformers' own code is known not to look at the task; anything else counts as doing so, which
    costs a second encoding of a text that is query and document at once, and is never wrong.

    Args:
        model: The model.

    Returns:
        False if nothing in the model looks at the task.
    """
    own = vars(model)
    if type(model) is not SentenceTransformer or {"encode_query", "encode_document", "preprocess"} & own.keys():
        return True
    # an encode put on the instance (a counter, a logger) hands on what it does not name
    if "encode" in own and "task" in inspect.signature(own["encode"]).parameters:
        return True
    first = model[0]
    if "task" in model.get_model_kwargs() or not type(first).__module__.startswith("sentence_transformers."):
        return True
    if {"preprocess", "tokenize"} & vars(first).keys():
        return True
    if not isinstance(first, Transformer):
        return False
    lengths = ("query_length", "document_length", "query_expansion")
    if any(getattr(first, name, None) is not None for name in lengths):
        return True
    holders = (getattr(first, "processor", None), getattr(first, "tokenizer", None))
    return any("task" in str(getattr(holder, "chat_template", None)) for holder in holders)


class _Seen(Exception):
    """Carries what reached ``preprocess`` out of ``encode``."""


def as_preprocess_sees_it(
    model: SentenceTransformer, method: str, given: dict[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """The prompt and the further arguments that ``model.<method>(texts, **given)`` hands to ``preprocess``.

    The method itself is asked, on a shallow copy of the model whose ``preprocess`` stops it: no rule about prompts or
    tasks is repeated here.

    Args:
        model: The model; it stays as it is.
        method: ``"encode"``, ``"encode_query"`` or ``"encode_document"``.
        given: Its arguments besides the texts.

    Returns:
        The prompt's text or None, and the other arguments.

    Raises:
        ValueError: If the method does not call ``preprocess``.
    """

    def stop(inputs: Any, prompt: str | None = None, **options: Any) -> Any:
        raise _Seen(prompt, options)

    twin = without_own_methods(model)
    vars(twin)["preprocess"] = stop
    try:
        with evaluation_mode(model):
            getattr(twin, method)(["a"], show_progress_bar=False, **given)
    except _Seen as seen:
        return seen.args
    raise ValueError(
        f"layers: the model's {method} never calls preprocess, so the prompt of its texts cannot be found out; "
        "leave layers out for this model."
    )


def frozen(name: str, value: Any) -> Any:
    """A value as a key: by content, never by a shortened text of it."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return kind, tuple(sorted((repr(key), frozen(name, item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return kind, tuple(frozen(name, item) for item in value)
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(frozen(name, item) for item in value)
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return kind, tuple(value.shape), str(value.dtype), raw.tobytes()
    if isinstance(value, np.ndarray) and value.dtype.kind != "O":
        return kind, value.shape, str(value.dtype), value.tobytes()
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{name}: a {kind} cannot be told from another one, so its vectors cannot be kept per dimension; "
            "give plain values."
        ) from None
    return kind, value


def given_arguments(
    model: SentenceTransformer, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """The inputs of a call, and by name whatever else it gives, in the order of the model's own method."""
    signature = inspect.signature(getattr(model, method))
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
        # a wrapper that hands everything on
        signature = inspect.signature(getattr(SentenceTransformer, method).__get__(model))
    first = next(iter(signature.parameters))
    kwargs = dict(kwargs)
    for alias in ("inputs", "sentences"):
        if not args and first not in kwargs and alias in kwargs:
            kwargs[first] = kwargs.pop(alias)
    given: dict[str, Any] = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[name] = value
    return given.pop(first), given
