"""A stand-in for the model at one dim, layer and precision, which answers ``encode`` calls from a store."""

from __future__ import annotations

import inspect
import tempfile
from functools import partialmethod
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from mipic_st.codes import PRECISIONS, needs_ranges
from mipic_st.evaluation.coded import SCORINGS, coded
from mipic_st.evaluation.vectors import write_array
from mipic_st.numerics import unit_length
from mipic_st.validation import checked_choice

if TYPE_CHECKING:
    from mipic_st.evaluation.store import EmbeddingStore


class DimView:
    """What an evaluator gets in place of the model: vectors of one dim, layer and precision, read from the store.

    Attributes that are not about encoding are the model's; none can be set, and what gives another width is refused.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        dim: int,
        layer: int | None,
        precision: str,
        scoring: str,
        normalize: bool,
        normalize_uncut: bool,
    ) -> None:
        checked_choice("precision", precision, PRECISIONS)
        checked_choice("scoring", scoring, SCORINGS)
        self._store, self._dim, self._layer, self._precision, self._scoring = store, dim, layer, precision, scoring
        self._unit = normalize_uncut or (normalize and (dim < store.width or precision != "float32"))
        self.encode_calls = self.query_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_store":
            raise AttributeError(name)
        found = getattr(self._store.model, name)
        if name in _NOT_PER_DIM or name.startswith(("encode", "_inference", "_multi_process")):
            raise TypeError(
                f"the evaluator uses model.{name}, whose vectors do not come per dimension; it must call encode, "
                "encode_query or encode_document."
            )
        return found

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in ("encode_calls", "query_calls", "training"):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(
            f"{name} cannot be set during a per-dimension evaluation: vectors come from a store that other dims share. "
            "Set it on the model before."
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the forward pass: its output has no dim."""
        raise TypeError(
            "this evaluator runs the model's forward pass itself instead of model.encode, so it cannot be evaluated "
            "per dimension; use an evaluator that encodes, such as ClassificationProbeEvaluator for labels."
        )

    @property
    def truncate_dim(self) -> int:
        """The dim."""
        return self._dim

    def get_embedding_dimension(self) -> int:
        """The dim."""
        return self._dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """``SentenceTransformer.evaluate`` at this dim."""
        return evaluator(self, output_path)

    def _arguments(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The inputs of a call, and by name whatever else it gives, as the method of the model's class reads them."""
        for alias in ("inputs", "sentences"):
            if not args and alias in kwargs:
                args = (kwargs.pop(alias),)
        signature = inspect.signature(getattr(type(self._store.model), method))
        if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in signature.parameters.values()):
            signature = inspect.signature(getattr(SentenceTransformer, method))  # hands everything on
        given = dict(signature.bind(self, *args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(name, {})
        own, first = list(given)[:2]
        del given[own]
        return given.pop(first), given

    def _encode(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """SentenceTransformer's method of this name at this dim; its arguments, in its order."""
        self.encode_calls += 1
        inputs, given = self._arguments(method, args, kwargs)
        output_value = given.pop("output_value", "sentence_embedding")
        precision, truncate_dim = given.pop("precision", None), given.pop("truncate_dim", None)
        as_numpy, as_tensor = given.pop("convert_to_numpy", True), given.pop("convert_to_tensor", False)
        unit = given.pop("normalize_embeddings", False) or self._unit
        if output_value != "sentence_embedding":
            raise TypeError(
                f"per-dimension evaluation gives sentence embeddings only, not output_value={output_value!r}."
            )
        if truncate_dim is not None and truncate_dim != self._dim:
            raise ValueError(f"the evaluator asks for truncate_dim={truncate_dim} at dim {self._dim}; leave it unset.")
        if precision not in (None, "float32") and self._precision != "float32":
            raise ValueError(f"the evaluator quantises to {precision} itself; leave its precision unset.")
        single = self._store.model.is_singular_input(inputs)
        texts = [inputs] if single else list(inputs)
        queries = method == "encode_query" or "query" in (given.get("task"), given.get("prompt_name"))
        self.query_calls += queries
        as_floats = queries and self._scoring == "asymmetric"
        with self._store.lock:  # rows are those of these texts until somebody clears the store
            rows = self._store.rows_of(texts, method, **given)
            result: Any = self._collect(rows, unit, "float32" if as_floats else self._precision)
        if precision not in (None, "float32") and len(result):
            result = quantize_embeddings(result, precision=precision)
        if as_tensor:
            result = torch.as_tensor(result, device=self._store.model.device)
        elif not as_numpy:
            result = list(torch.as_tensor(result))
        return result[0] if single else result

    encode = partialmethod(_encode, "encode")
    encode_query = partialmethod(_encode, "encode_query")
    encode_document = partialmethod(_encode, "encode_document")

    def encode_multi_process(self, *args: Any, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode_multi_process`` at this dim; its arguments, in its order."""
        inputs, given = self._arguments("encode_multi_process", args, kwargs)
        return self.encode(inputs, **given)

    def _collect(self, rows: np.ndarray, unit: bool, precision: str) -> np.ndarray:
        """(n, columns), in memory, or mapped from a temporary file if it is larger than the store's limit."""
        if len(rows) == 0:
            return np.empty((0, self._dim), dtype=np.float32)
        parts = (self._finished(part, unit, precision) for part in self._store.portions(rows))
        first = next(parts)
        shape, limit = (len(rows), first.shape[1]), self._store.memory_limit
        if limit is None or 4 * len(rows) * first.shape[1] <= limit:
            out, done = np.empty(shape, dtype=np.float32), 0
            for part in chain([first], parts):
                out[done : done + len(part)] = part
                done += len(part)
            return out
        with tempfile.TemporaryFile(prefix="mipic-st-") as file:
            for part in chain([first], parts):
                write_array(file, part)
            # copy-on-write: the evaluator may change its vectors, as it may change those of the model
            return np.memmap(file, dtype=np.float32, mode="c", shape=shape)

    def _finished(self, rows: np.ndarray, unit: bool, precision: str) -> np.ndarray:
        """Cut and renormalised, as float32 or as what stands for the codes; bits have up to four columns more."""
        vectors = self._store.vectors(rows, self._dim, self._layer)
        if unit:
            vectors = unit_length(vectors)
        if precision == "float32":
            return vectors
        ranges = self._store.ranges(self._dim, self._layer, unit, precision) if needs_ranges(precision) else None
        return coded(vectors, precision, ranges, self._scoring)


# What would give the model's vectors at another width than the view's, or change what the store holds.
_NOT_PER_DIM = ("forward", "truncate_embeddings", "truncate_sentence_embeddings")
