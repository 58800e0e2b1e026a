"""Encode every distinct text once; answer ``encode`` calls at any dimension, layer and precision from the store.

New texts are encoded by the very method that was called, with the very arguments that were given, so prompts, tasks and
routes are the model's own business. No model object is patched. n texts, S states (1, or one per layer), D full width.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

from mipic_st.codes import Ranges, evenly
from mipic_st.encoder.encoding import encode_layers
from mipic_st.encoder.modules import with_normalize
from mipic_st.encoder.structure import NO_CUT, check_layers, evaluation_mode, full_width, in_half_precision, model_depth
from mipic_st.encoder.surgery import behind_encoder
from mipic_st.evaluation.vectors import Vectors
from mipic_st.evaluation.view import DimView
from mipic_st.numerics import compare_vectors, unit_length
from mipic_st.validation import checked_count, checked_number

# Bytes of vectors that stay in memory by default: 350,000 vectors of 384 values.
MEMORY_LIMIT = 2**29
# Bytes of vectors that one call of the model gives: what an evaluation holds besides the store does not grow with it.
_PORTION_BYTES = 2**26
# Vectors that quantiles are taken of, evenly spaced: 150 of these lie beyond each end.
_MOST_CALIBRATED = 50_000
# Arguments of encode that say how to compute, and so change no vector.
_HOW = ("batch_size", "show_progress_bar", "device", "pool", "chunk_size")
# The prompts that the methods look for where none is named, in sentence-transformers' order.
_PROMPT_NAMES = {"encode": (), "encode_query": ("query",), "encode_document": ("document", "passage", "corpus")}
_ROUNDING = 2e-6
_UNIT_TOLERANCE = 1e-2  # bfloat16 is exact to 4e-3
_ONE_PROCESS = (
    "layers are encoded in this process: give one device, no list and no pool, or leave layers out to use several."
)


@runtime_checkable
class FittedCuts(Protocol):
    """What an evaluation needs of `LayerCuts`, which it does not know."""

    @property
    def maps(self) -> Mapping[int, Any]:
        """A map for each layer that has one."""

    def to_modules(self, model: SentenceTransformer, layer: int) -> Sequence[nn.Module]:
        """What takes the place of the model's tail behind that layer."""

    def require_fitted_on(self, model: SentenceTransformer) -> None:
        """Refuse another model."""


class EmbeddingStore:
    """Full-width vectors of every distinct text, encoded once per method and prompt.

    A call with further arguments (a task, processing options) is encoded with exactly these each time. Several threads
    may use a store, and several stores a model. ``layers`` keeps the vectors of these layers instead of the final one,
    those in ``cuts`` with their fitted maps, at unit length.
    Vectors above ``memory_limit`` bytes, and larger results of one ``encode`` call, go to temporary files (in
    ``TMPDIR``), which are gone afterwards, even if the process is killed. ``device`` is one device, or a list of
    devices for one process each, which run until :meth:`clear`.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        layers: Sequence[int] | None = None,
        *,
        cuts: FittedCuts | None = None,
        memory_limit: int | None = MEMORY_LIMIT,
        device: Any = None,
    ) -> None:
        self.model = model
        self.layers = None if layers is None else check_layers(layers, model)
        self._behind: dict[int, list[nn.Module]] = {}
        if cuts is not None:
            for layer in set(self.layers or ()) & set(cuts.maps):
                self._behind[layer] = with_normalize(behind_encoder(model, cuts.to_modules(model, layer)))
        self.width = full_width(model)
        self.memory_limit = checked_limit(memory_limit)
        self._device = check_place(device, self.layers)
        self._states = 1 if self.layers is None else len(self.layers)
        self._vectors = Vectors(self._states, self.width, self.memory_limit)
        self._rows: dict[Any, dict[str, int]] = {}
        # rows to read ranges off, or ranges by dim
        self._calibration: np.ndarray | Mapping[int, Ranges] | None = None
        self._scored = False  # whether the rows are those of the scored texts
        self._ranges: dict[tuple[Any, ...], Ranges] = {}
        self._pools: dict[tuple[str, ...], Any] = {}
        self._stop_pools: Any = None
        self.has_unit_length = True  # all stored vectors of the deepest state, at full width
        self.lock = threading.RLock()

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors."""
        return self._vectors.nbytes

    @property
    def in_file(self) -> bool:
        """Whether the vectors have outgrown the memory limit."""
        return self._vectors.in_file

    @property
    def calibrated(self) -> bool:
        """Whether :meth:`calibrate` was called."""
        return self._calibration is not None

    def __len__(self) -> int:
        return len(self._vectors)

    def clear(self) -> None:
        """Forget all vectors, free memory and file, and stop processes that the store has started."""
        with self.lock:
            self._vectors.close()
            self._rows.clear()
            self._ranges.clear()
            self._calibration, self.has_unit_length = None, True
            if self._stop_pools is not None:
                self._stop_pools()
                self._stop_pools = None

    def view(
        self,
        dim: int,
        *,
        layer: int | None = None,
        precision: str = "float32",
        scoring: str = "symmetric",
        normalize: bool = True,
        normalize_uncut: bool = False,
    ) -> DimView:
        """A stand-in for the model; ``normalize`` renormalises after a cut, ``normalize_uncut`` also without one.

        With ``scoring="asymmetric"`` queries stay floats, and documents are coded and decoded.
        """
        dim = checked_count("dim", dim)
        if dim > self.width:
            raise ValueError(f"dim must be from 1 to the model's width {self.width}, got {dim}.")
        if (layer is None) != (self.layers is None) or (self.layers is not None and layer not in self.layers):
            raise ValueError(f"layer {layer!r} is not in this store, which holds layers {self.layers}.")
        return DimView(self, dim, layer, precision, scoring, normalize, normalize_uncut)

    def rows_of(self, texts: Sequence[str], method: str = "encode", **given: Any) -> np.ndarray:
        """Row numbers for :meth:`vectors`, (n,), after encoding new texts by the model's method with what is given."""
        if isinstance(texts, str):
            raise TypeError("texts must be a list of texts, got one text.")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"per-dimension evaluation encodes texts only, got an input of {type(text).__name__}.")
        portion = max(1, _PORTION_BYTES // (4 * self.width * self._states))
        with self.lock:
            row_of = self._rows_for(method, given)
            checked = bool(row_of)
            for start in range(0, len(texts), portion):
                new = [text for text in dict.fromkeys(texts[start : start + portion]) if text not in row_of]
                if not new:
                    continue
                with evaluation_mode(self.model):
                    vectors = self._encode(new, method, given, checked)
                checked = True
                self._note_lengths(new, vectors)
                row_of.update(zip(new, self._append(new, vectors), strict=True))
            return np.fromiter((row_of[text] for text in texts), dtype=np.int64, count=len(texts))

    def _append(self, texts: list[str], vectors: np.ndarray) -> list[int]:
        """Store vectors and give their rows. A text with the same vector by another method keeps that row.

        Up to rounding, that is: int8 is calibrated on the extremes, where a last bit would be another code.
        """
        rows = np.full(len(texts), -1)
        for row_of in self._rows.values():
            known = np.array([i for i, text in enumerate(texts) if rows[i] < 0 and text in row_of], dtype=int)
            if len(known):
                there = np.array([row_of[texts[i]] for i in known])
                states = [self._vectors.gather(there, state, self.width) for state in range(self._states)]
                distances = np.abs(np.stack(states, axis=1) - vectors[known]).max(axis=(1, 2))
                same = distances <= _ROUNDING * np.abs(vectors[known]).max(axis=(1, 2))
                rows[known[same]] = there[same]
        new = np.flatnonzero(rows < 0)
        rows[new] = len(self._vectors) + np.arange(len(new))
        self._vectors.append(vectors if len(new) == len(texts) else vectors[new])
        return rows.tolist()

    def _rows_for(self, method: str, given: dict[str, Any]) -> dict[str, int]:
        """Rows of the texts that this call has in common with earlier ones; none, if anything but a prompt is given."""
        if given.keys() - {*_HOW, "prompt", "prompt_name"}:
            return {}
        prompts = (tuple(self.model.prompts.items()), self.model.default_prompt_name)
        return self._rows.setdefault((method, given.get("prompt"), given.get("prompt_name"), prompts), {})

    def _note_lengths(self, texts: list[str], vectors: np.ndarray) -> None:
        finite = np.isfinite(vectors).all(axis=(1, 2))
        if not finite.all():
            first = int(np.flatnonzero(~finite)[0])
            raise ValueError(
                f"embeddings hold NaN or infinite values for {int((~finite).sum())} of {len(texts)} texts, "
                f"the first is {texts[first][:80]!r}; check the model's weights and its precision (fp16?)."
            )
        lengths = np.linalg.norm(vectors[:, -1], axis=1)
        self.has_unit_length = self.has_unit_length and bool(np.abs(lengths - 1).max() < _UNIT_TOLERANCE)

    def vectors(self, rows: np.ndarray, dim: int, layer: int | None = None) -> np.ndarray:
        """Vectors of what :meth:`rows_of` gave, cut to ``dim`` and not renormalised, (n, dim)."""
        with self.lock:
            return self._vectors.gather(rows, self._state(layer), dim)

    def portions(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The row numbers in parts, each of which takes one block of memory at full width."""
        for start in range(0, len(rows), self._vectors.block_rows):
            yield rows[start : start + self._vectors.block_rows]

    def calibrate(self, calibration: Sequence[str] | Mapping[int, Ranges] | None = None) -> None:
        """Set what the ranges of codes come from; values outside of a range get its nearest code.

        Args:
            calibration: Texts, which are encoded as documents; or ready Ranges by dim, of vectors as a view has them
                (unit length, but for ``normalize=False``). None takes the texts that are stored now.
        """
        with self.lock:
            self._ranges.clear()
            self._scored = calibration is None
            if isinstance(calibration, Mapping):
                self._calibration = calibration
            elif calibration is None:
                self._calibration = np.arange(len(self._vectors))
            else:
                self._calibration = self.rows_of(calibration, "encode_document")

    def ranges(self, dim: int, layer: int | None, normalize: bool, precision: str) -> Ranges:
        """Ranges of this precision's codes.

        int8 and uint8 of the scored texts take the extremes, as in sentence-transformers; else the quantiles of
        `Ranges.of`.
        """
        if self._calibration is None or (isinstance(self._calibration, np.ndarray) and not len(self._calibration)):
            raise ValueError(
                f"{precision} has no calibration texts, and must not depend on what happens to be stored: encode all "
                "texts of the evaluation through a float32 view, then call calibrate() on the store; or give texts or "
                "ranges to calibrate()."
            )
        if isinstance(self._calibration, Mapping):
            return self._calibration[dim]
        extremes = self._scored and precision in ("int8", "uint8")
        key = (dim, self._state(layer), normalize, extremes)
        with self.lock:
            if key not in self._ranges:
                rows = self._calibration
                found = Ranges.of(self._prepared(evenly(rows, _MOST_CALIBRATED), layer, dim, normalize))
                if extremes:
                    low, high = found.low, found.high
                    for part in self.portions(rows):
                        vectors = self._prepared(part, layer, dim, normalize)
                        low, high = np.minimum(low, vectors.min(axis=0)), np.maximum(high, vectors.max(axis=0))
                    found = replace(found, low=low, high=high)
                self._ranges[key] = found
            return self._ranges[key]

    def _prepared(self, rows: np.ndarray, layer: int | None, dim: int, normalize: bool) -> np.ndarray:
        vectors = self.vectors(rows, dim, layer)
        return unit_length(vectors) if normalize else vectors

    def _state(self, layer: int | None) -> int:
        return 0 if self.layers is None else self.layers.index(layer if layer is not None else self.layers[-1])

    def _encode(self, texts: list[str], method: str, given: dict[str, Any], checked: bool) -> np.ndarray:
        """(n, S, D) at full width, by the model's own method or the layers behind it."""
        given = {name: value for name, value in given.items() if not (name in _HOW and value is None)}
        if self._device is not None and not {"device", "pool"} & given.keys():
            given["device"] = self._device
        several = isinstance(given.get("device"), (list, tuple)) and len(given["device"]) > 0
        if self.layers is not None:
            if several or "pool" in given:
                raise ValueError(_ONE_PROCESS)
            return self._encode_layers(texts, method, given, checked)
        if several and "pool" not in given:
            given["pool"] = self._own_pool(given.pop("device"))
        vectors = getattr(self.model, method)(texts, truncate_dim=NO_CUT, convert_to_numpy=True, **given)
        return np.asarray(vectors, dtype=np.float32)[:, None, :]

    def _encode_layers(self, texts: list[str], method: str, given: dict[str, Any], checked: bool) -> np.ndarray:
        """The layers that the store keeps; their last must give what the method gives, or they are another model's."""
        model, layers = self.model, self.layers or ()
        if "device" in given:  # as encode does with one device
            for module in (model, *chain.from_iterable(self._behind.values())):
                module.to(given["device"])
        how = {name: given[name] for name in ("batch_size", "show_progress_bar") if name in given}
        asked = {name: value for name, value in given.items() if name not in _HOW}
        options = {name: value for name, value in asked.items() if name not in ("prompt", "prompt_name")}
        if method != "encode":
            options.setdefault("task", method.removeprefix("encode_"))
        if unused := sorted(set(options) & set(model.get_model_kwargs())):
            raise ValueError(
                f"layers: {method} hands {', '.join(unused)} to the forward pass of the model's modules, which the "
                "layers cannot reproduce; leave layers out for this model."
            )
        named = (asked.get("prompt_name"), *_PROMPT_NAMES.get(method, ()))
        name = next((name for name in named if name in model.prompts), None)
        prompt = asked["prompt"] if asked.get("prompt") is not None else model.prompts.get(str(name))
        if not checked:
            longest = [max(texts, key=len)]
            with evaluation_mode(model):
                own = getattr(model, method)(longest, truncate_dim=NO_CUT, show_progress_bar=False, **asked)
            last = encode_layers(model, longest, [model_depth(model)], prompt=prompt, **options)[:, 0]
            own = np.asarray(own, dtype=np.float32)
            if own.shape != last.shape or not compare_vectors(own, last, half=in_half_precision(model)).same:
                raise ValueError(
                    f"layers: the last layer's vector of {longest[0][:80]!r} is not what {method} gives for it, so the "
                    "layers would score another model; leave layers out for this one."
                )
        return encode_layers(model, texts, layers, prompt=prompt, behind=self._behind, **how, **options)

    def _own_pool(self, devices: Sequence[Any]) -> Any:
        """Processes for these devices: started once, since a start costs seconds."""
        key = tuple(str(device) for device in devices)
        if key not in self._pools:
            if self._stop_pools is None:
                # starting moves the model to the CPU for good
                self._stop_pools = weakref.finalize(self, _stop_pools, self.model, self._pools, self.model.device)
            self._pools[key] = self.model.start_multi_process_pool(list(devices))
        return self._pools[key]


def _stop_pools(model: SentenceTransformer, pools: dict[Any, Any], device: torch.device) -> None:
    try:
        for pool in pools.values():
            model.stop_multi_process_pool(pool)
    finally:
        pools.clear()
        model.to(device)


def check_place(device: Any, layers: Sequence[int] | None) -> Any:
    """Where to encode: a device, or several of them if no layers are asked for; None for the model's own."""
    if device is None or isinstance(device, (str, torch.device)):
        return device
    if not isinstance(device, (list, tuple)):
        raise TypeError(f"device must be a device such as 'cuda:0', or a list of them, got {device!r}.")
    if not device:
        raise ValueError("device is an empty list: name at least one device, or None for the model's.")
    if layers is not None:
        raise ValueError(_ONE_PROCESS)
    return list(device)


def checked_limit(memory_limit: Any) -> int | None:
    """Bytes, or None for no limit."""
    return None if memory_limit is None else int(checked_number("memory_limit", memory_limit, 0))
