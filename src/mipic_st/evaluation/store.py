"""Encode every distinct text once; answer `encode` calls at any dimension, layer and precision from the store.

`EmbeddingStore` holds full-width vectors, `DimView` stands in for the model: it answers ``encode``,
``encode_query`` and ``encode_document`` from the store. New texts are encoded by the very method that was called, with
the very arguments that were given, so prompts, tasks and routes are the model's own business. No model object is
patched. Symbols: n texts, S stored states (1, or one per requested layer), D full width, d the cut width.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.encoder.encoding import encode_layers
from mipic_st.encoder.structure import NO_CUT, check_layers, evaluation_mode, full_width, in_half_precision, model_depth
from mipic_st.evaluation.calls import as_preprocess_sees_it, frozen, reads_task
from mipic_st.evaluation.vectors import Vectors
from mipic_st.evaluation.view import DimView
from mipic_st.numerics import unit_length
from mipic_st.validation import checked_count, checked_number

MEMORY_LIMIT = 2**29
"""Bytes of vectors that stay in memory unless told otherwise: 350,000 vectors of 384 values."""

# Bytes of vectors that one call of the model gives: what an evaluation holds besides the store does not grow with it.
_PORTION_BYTES = 2**26
# Arguments of encode that say how to compute; all others but those on the result may change the vectors.
_HOW = ("batch_size", "show_progress_bar", "device", "pool", "chunk_size")


class EmbeddingStore:
    """Full-width vectors of every distinct text, encoded once per prompt, task and further argument.

    Args:
        model: The SentenceTransformer that encodes.
        layers: Keep the vectors of these layers (0..L) instead of the final one; None keeps the final vector only.
        memory_limit: Bytes of vectors that stay in memory. Above it they go to a temporary file (in the folder that
            ``TMPDIR`` names), which is gone when the store is, even if the process is killed. So do results of one
            ``encode`` call that are larger. None sets no limit.
        device: Where to encode, as in ``model.encode``: one device, or a list of devices for one process each. The
            processes are started once and run until :meth:`clear`. Not with ``layers`` if it is a list. A pool that is
            running already is given to :meth:`DimView.encode`, and stays the caller's.

    Raises:
        ValueError: If ``memory_limit`` is negative, or processes are asked for together with layers.

    Example:
        >>> store = EmbeddingStore(model)                                            # doctest: +SKIP
        >>> store.view(64).encode(["a text", "another"]).shape                       # doctest: +SKIP
        (2, 64)
    """

    def __init__(
        self,
        model: SentenceTransformer,
        layers: Sequence[int] | None = None,
        *,
        memory_limit: int | None = MEMORY_LIMIT,
        device: Any = None,
    ) -> None:
        self.model = model
        self.layers = None if layers is None else check_layers(layers, model)
        self.width = full_width(model)
        self.memory_limit = checked_limit(memory_limit)
        self._where = {"device": check_place(device, self.layers)}
        self._vectors = Vectors(1 if self.layers is None else len(self.layers), self.width, self.memory_limit)
        self._spaces: dict[Any, dict[str, int]] = {}
        self._calibration: int | None = None
        self._ranges: dict[tuple[int, int, bool], np.ndarray] = {}
        self._pools: dict[tuple[str, ...], Any] = {}
        self._unit_length = True
        self._stop_pools: Any = None

    def __enter__(self) -> EmbeddingStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of the stored vectors, in memory or in the file."""
        return self._vectors.nbytes

    @property
    def in_file(self) -> bool:
        """Whether the vectors have outgrown the memory limit."""
        return self._vectors.in_file

    @property
    def has_unit_length(self) -> bool:
        """Whether all stored vectors of the deepest state have length 1 at full width."""
        return self._unit_length

    @property
    def calibrated(self) -> bool:
        """Whether :meth:`calibrate` was called."""
        return self._calibration is not None

    def __len__(self) -> int:
        return len(self._vectors)

    def clear(self) -> None:
        """Forget all vectors, free memory and file, and stop processes that the store has started."""
        self._vectors.close()
        self._spaces.clear()
        self._ranges.clear()
        self._calibration = None
        self._unit_length = True
        if self._stop_pools is not None:
            self._stop_pools()
            self._stop_pools = None

    def view(
        self,
        dim: int,
        *,
        layer: int | None = None,
        precision: str = "float32",
        normalize: bool = True,
        normalize_uncut: bool = False,
    ) -> DimView:
        """A stand-in for the model at one dimension.

        Args:
            dim: Width of the vectors, 1 to D.
            layer: One of the store's layers; None for the final vector.
            precision: ``"float32"``, ``"int8"`` or ``"binary"``. int8 needs :meth:`calibrate` first.
            normalize: Renormalise after the cut. Uncut float32 vectors stay as the model gives them.
            normalize_uncut: Renormalise those too.

        Returns:
            An object with the model's ``encode`` methods.

        Raises:
            ValueError: If the dim exceeds the width or the layer is not stored.
        """
        dim = checked_count("dim", dim)
        if dim > self.width:
            raise ValueError(f"dim must be from 1 to the model's width {self.width}, got {dim}.")
        if (layer is None) != (self.layers is None) or (self.layers is not None and layer not in self.layers):
            raise ValueError(f"layer {layer!r} is not in this store, which holds layers {self.layers}.")
        return DimView(self, dim, layer, precision, normalize, normalize_uncut)

    def rows_of(self, texts: Sequence[str], method: str = "encode", **given: Any) -> np.ndarray:
        """Where the vectors of ``texts`` are, after encoding those that are new.

        Args:
            texts: The texts, n of them.
            method: ``"encode"``, ``"encode_query"`` or ``"encode_document"``: the model's method that encodes.
            **given: What that method takes and that says what or how to encode (``prompt``, ``prompt_name``, ``task``,
                ``batch_size``, ``device``, ``pool`` and so on). It gets exactly these.

        Returns:
            Row numbers for :meth:`vectors`, shape (n,).

        Raises:
            TypeError: If an input is not a text, or an argument is of a kind that cannot be told from another one.
            ValueError: If the model gives NaN or infinite values, or the grid cannot do what the method does.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a list of texts, got one text.")
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"per-dimension evaluation encodes texts only, got an input of {type(text).__name__}.")
        row_of = self._spaces.setdefault(self._key(method, given), {})
        portion = max(1, _PORTION_BYTES // (4 * self.width * (1 if self.layers is None else len(self.layers))))
        encode: Callable[[list[str]], np.ndarray] | None = None
        for start in range(0, len(texts), portion):
            new = [text for text in dict.fromkeys(texts[start : start + portion]) if text not in row_of]
            if not new:
                continue
            if encode is None:
                encode = self._encoder(method, given, new, fresh=not row_of)
            vectors = encode(new)
            finite = np.isfinite(vectors).all(axis=(1, 2))
            if not finite.all():
                first = int(np.flatnonzero(~finite)[0])
                raise ValueError(
                    f"embeddings hold NaN or infinite values for {int((~finite).sum())} of {len(new)} texts, "
                    f"the first is {new[first][:80]!r}; check the model's weights and its precision (fp16?)."
                )
            lengths = np.linalg.norm(vectors[:, -1], axis=1)
            self._unit_length = self._unit_length and bool(np.abs(lengths - 1).max() < _UNIT_TOLERANCE)
            first_row = len(self._vectors)
            self._vectors.append(vectors)
            row_of.update(zip(new, range(first_row, first_row + len(new)), strict=True))
        return np.fromiter((row_of[text] for text in texts), dtype=np.int64, count=len(texts))

    def vectors(self, rows: np.ndarray, dim: int, layer: int | None = None) -> np.ndarray:
        """Vectors cut to ``dim``, not renormalised.

        Args:
            rows: What :meth:`rows_of` gave, n row numbers.
            dim: Width of the vectors.
            layer: One of the store's layers; None for the final vector.

        Returns:
            float32 array of shape (n, dim).
        """
        return self._vectors.gather(rows, self._state(layer), dim)

    def portions(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """The row numbers in parts, each of which takes one block of memory at full width."""
        for start in range(0, len(rows), self._vectors.block_rows):
            yield rows[start : start + self._vectors.block_rows]

    def calibrate(self) -> None:
        """Declare the texts that are stored now the ones on which int8 is calibrated, at every dim and layer.

        Call it when all texts of an evaluation are stored. Values of texts that come later are clipped to the range.
        """
        self._calibration = len(self._vectors)
        self._ranges.clear()

    def int8_ranges(self, dim: int, layer: int | None, normalize: bool) -> np.ndarray:
        """Smallest and largest value per position over the calibration texts: one calibration for all.

        Args:
            dim: Width of the vectors.
            layer: One of the store's layers; None for the final vector.
            normalize: Whether vectors are renormalised after the cut.

        Returns:
            Array of shape (2, dim).

        Raises:
            ValueError: If :meth:`calibrate` was not called, or nothing was stored then.
        """
        if not self._calibration:
            raise ValueError(
                "int8 has no calibration texts, and must not depend on what happens to be stored: encode all texts "
                "of the evaluation through a float32 view, then call calibrate() on the store."
            )
        key = (dim, self._state(layer), normalize)
        if key not in self._ranges:
            low, high = np.full(dim, np.inf, dtype=np.float32), np.full(dim, -np.inf, dtype=np.float32)
            for block in self._vectors.leading(self._calibration, self._state(layer), dim):
                vectors = unit_length(block) if normalize else block
                low, high = np.minimum(low, vectors.min(axis=0)), np.maximum(high, vectors.max(axis=0))
            self._ranges[key] = np.stack([low, high])
        return self._ranges[key]

    def _state(self, layer: int | None) -> int:
        return 0 if self.layers is None else self.layers.index(layer if layer is not None else self.layers[-1])

    def _key(self, method: str, given: dict[str, Any]) -> Any:
        """Two calls with the same key give a text the same vector."""
        model = self.model
        prompt, prompt_name = given.get("prompt"), given.get("prompt_name")
        others = {name: value for name, value in given.items() if name not in (*_HOW, "prompt", "prompt_name")}
        named: Any = (method, prompt_name, prompt)
        if not reads_task(model):
            # The three methods then differ by the prompt alone, so that a text counts once if there is none.
            others.pop("task", None)
            if prompt is not None:
                named = prompt
            elif not any(model.prompts.values()) and (prompt_name is None or prompt_name in model.prompts):
                named = ""
        prompts = (tuple(model.prompts.items()), model.default_prompt_name)
        return named, prompts, tuple(sorted((name, frozen(name, value)) for name, value in others.items()))

    def _encoder(
        self, method: str, given: dict[str, Any], texts: list[str], fresh: bool
    ) -> Callable[[list[str]], np.ndarray]:
        """What encodes new texts, at full width: the model's own method, or the layers behind it."""
        given = {name: value for name, value in given.items() if not (name in _HOW and value is None)}
        where: dict[str, Any] = {name: given.pop(name) for name in ("device", "pool") if name in given}
        where = where or {name: value for name, value in self._where.items() if value is not None}
        direct = getattr(self.model, method)
        if self.layers is None:
            if "pool" not in where and _is_several(where.get("device")):
                where = {"pool": self._own_pool(where["device"])}

            def final(new: list[str]) -> np.ndarray:
                vectors = direct(new, truncate_dim=NO_CUT, convert_to_numpy=True, **where, **given)
                return np.asarray(vectors, dtype=np.float32)[:, None, :]

            return final

        if "pool" in where or _is_several(where.get("device")):
            raise ValueError(_NO_PROCESSES)
        if where:
            # as encode does with one device
            self.model.to(where["device"])
        how = {"batch_size": given.get("batch_size", 32), "show_progress_bar": bool(given.get("show_progress_bar"))}
        asked = {name: value for name, value in given.items() if name not in _HOW}
        prompt, options = as_preprocess_sees_it(self.model, method, asked)
        if unused := sorted(set(options) & set(self.model.get_model_kwargs())):
            raise ValueError(
                f"layers: {method} hands {', '.join(unused)} to the forward pass of the model's modules, which the "
                "layers cannot reproduce; leave layers out for this model."
            )
        if fresh:
            self._check_layers_follow(method, asked, max(texts, key=len), prompt, options)

        def layered(new: list[str]) -> np.ndarray:
            assert self.layers is not None
            return encode_layers(self.model, new, self.layers, prompt=prompt, **how, **options)

        return layered

    def _check_layers_follow(
        self, method: str, asked: dict[str, Any], text: str, prompt: str | None, options: dict[str, Any]
    ) -> None:
        """The last layer must give what the method gives: a module in between may do more than the layers see."""
        last = encode_layers(self.model, [text], [model_depth(self.model)], prompt=prompt, **options)[0, 0]
        with evaluation_mode(self.model):
            expected = getattr(self.model, method)(
                [text], truncate_dim=NO_CUT, convert_to_numpy=True, show_progress_bar=False, **asked
            )
        expected = np.asarray(expected, dtype=np.float32)[0]
        half = in_half_precision(self.model)
        scale = max(float(np.abs(expected).max()), 1e-6)
        worst = float(np.abs(last - expected).max()) if last.shape == expected.shape else float("inf")
        if np.isfinite(expected).all() and worst > (5e-2 if half else 1e-3) * scale:
            raise ValueError(
                f"layers: the last layer's vector of {text[:80]!r} differs by {worst:.1e} from what {method} gives for "
                "it, so the layers would score another model; leave layers out for this one."
            )

    def _own_pool(self, devices: Sequence[Any]) -> Any:
        """Processes for these devices: started once, since a start costs seconds."""
        key = tuple(str(device) for device in devices)
        if key not in self._pools:
            if self._stop_pools is None:
                # starting moves the model to the CPU for good
                self._stop_pools = weakref.finalize(self, _stop_pools, self.model, self._pools, self.model.device)
            self._pools[key] = self.model.start_multi_process_pool(list(devices))
        return self._pools[key]


_UNIT_TOLERANCE = 1e-2  # bfloat16 is exact to 4e-3
_NO_PROCESSES = (
    "layers are encoded in this process: give one device, no list and no pool, or leave layers out to use several."
)


def _stop_pools(model: SentenceTransformer, pools: dict[Any, Any], device: torch.device) -> None:
    try:
        for pool in pools.values():
            model.stop_multi_process_pool(pool)
    finally:
        pools.clear()
        model.to(device)


def _is_several(device: Any) -> bool:
    return isinstance(device, (list, tuple)) and len(device) > 0


def check_place(device: Any, layers: Sequence[int] | None) -> Any:
    """Where to encode: a device, or several of them if no layers are asked for.

    Args:
        device: What the caller gave.
        layers: The layers, or None.

    Returns:
        None, one device, or a list.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is an empty list, or a list together with layers.
    """
    if device is None or isinstance(device, (str, torch.device)):
        return device
    if not isinstance(device, (list, tuple)):
        raise TypeError(f"device must be a device such as 'cuda:0', or a list of them, got {device!r}.")
    if not device:
        raise ValueError("device is an empty list: name at least one device, or None for the model's.")
    if layers is not None:
        raise ValueError(_NO_PROCESSES)
    return list(device)


def checked_limit(memory_limit: Any) -> int | None:
    """Bytes, or None for no limit.

    Args:
        memory_limit: What the caller gave.

    Returns:
        The bytes, or None.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative.
    """
    return None if memory_limit is None else int(checked_number("memory_limit", memory_limit, 0))
