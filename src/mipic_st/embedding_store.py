"""Encode every distinct text once; answer `encode` calls at any dimension, layer and precision from the store.

`EmbeddingStore` holds full-width vectors, `DimView` stands in for the model: it answers ``encode``,
``encode_query`` and ``encode_document`` from the store. New texts are encoded by the very method that was called, with
the very arguments that were given, so prompts, tasks and routes are the model's own business. No model object is
patched. Symbols: n texts, S stored states (1, or one per requested layer), D full width, d the cut width.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings

from mipic_st._calls import as_preprocess_sees_it, frozen, given_arguments, reads_task
from mipic_st._checks import as_list, checked_count, checked_number
from mipic_st._vectors import Vectors, write_array
from mipic_st.backbone import NO_CUT, check_layers, evaluation_mode, full_width, in_half_precision, model_depth
from mipic_st.layers import encode_layers

PRECISIONS = ("float32", "int8", "binary")
MEMORY_LIMIT = 2**29
"""Bytes of vectors that stay in memory unless told otherwise: 350,000 vectors of 384 values."""

# Bytes of vectors that one call of the model gives: what an evaluation holds besides the store does not grow with it.
_PORTION_BYTES = 2**26
# Arguments of encode that say how to compute; all others but those on the result may change the vectors.
_HOW = ("batch_size", "show_progress_bar", "device", "pool", "chunk_size")


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


def unit_length(vectors: np.ndarray) -> np.ndarray:
    """Scale rows to length 1; rows of zeros stay zero.

    Args:
        vectors: (n, d).

    Returns:
        (n, d).
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(norms, 1e-12)


# What would give the model's vectors at another width than the view's, or change what the store holds.
_NOT_PER_DIM = ("forward", "truncate_embeddings", "truncate_sentence_embeddings")


class DimView:
    """What an evaluator gets in place of the model: vectors of one dim, layer and precision, read from the store.

    Attributes that are not about encoding (``similarity``, ``similarity_fn_name``, ``model_card_data``, ``device``,
    ``prompts`` ...) are the model's; none can be set. What would give vectors of another width is refused.
    """

    def __init__(
        self,
        store: EmbeddingStore,
        dim: int,
        layer: int | None,
        precision: str,
        normalize: bool,
        normalize_uncut: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}.")
        self._store = store
        self._dim = dim
        self._layer = layer
        self._precision = precision
        self._normalize = normalize
        self._unit = normalize_uncut or (normalize and (dim < store.width or precision != "float32"))
        self.encode_calls = 0

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_store":
            raise AttributeError(name)
        if name in _NOT_PER_DIM or name.startswith(("encode", "_inference", "_multi_process")):
            self._refuse(name)
        return getattr(self._store.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in ("encode_calls", "training"):
            object.__setattr__(self, name, value)
            return
        raise AttributeError(
            f"{name} cannot be set during a per-dimension evaluation: vectors come from a store that other dims share. "
            "Set it on the model before."
        )

    def _refuse(self, name: str) -> None:
        if hasattr(self._store.model, name):
            raise TypeError(
                f"the evaluator uses model.{name}, whose vectors do not come per dimension; it must call encode, "
                "encode_query or encode_document."
            )
        raise AttributeError(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse the forward pass: its output has no dim.

        Raises:
            TypeError: Always.
        """
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

    def get_sentence_embedding_dimension(self) -> int:
        """The dim."""
        return self._dim

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """``SentenceTransformer.evaluate`` at this dim."""
        return evaluator(self, output_path)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode`` at this dim; its arguments, in its order."""
        return self._encode("encode", args, kwargs)

    def encode_query(self, *args: Any, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode_query`` at this dim; its arguments, in its order."""
        return self._encode("encode_query", args, kwargs)

    def encode_document(self, *args: Any, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode_document`` at this dim; its arguments, in its order."""
        return self._encode("encode_document", args, kwargs)

    def encode_multi_process(self, *args: Any, **kwargs: Any) -> Any:
        """``SentenceTransformer.encode_multi_process`` at this dim; its arguments, in its order."""
        inputs, given = given_arguments(self._store.model, "encode_multi_process", args, kwargs)
        return self._encode("encode", (inputs,), given)

    def _encode(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.encode_calls += 1
        model = self._store.model
        inputs, given = given_arguments(model, method, args, kwargs)
        output_value = given.pop("output_value", "sentence_embedding")
        precision = given.pop("precision", None)
        convert_to_numpy = given.pop("convert_to_numpy", True)
        convert_to_tensor = given.pop("convert_to_tensor", False)
        normalize_embeddings = given.pop("normalize_embeddings", False)
        truncate_dim = given.pop("truncate_dim", None)
        if output_value != "sentence_embedding":
            raise TypeError(
                f"per-dimension evaluation gives sentence embeddings only, not output_value={output_value!r}."
            )
        if truncate_dim is not None and truncate_dim != self._dim:
            raise ValueError(f"the evaluator asks for truncate_dim={truncate_dim} at dim {self._dim}; leave it unset.")
        if precision not in (None, "float32") and self._precision != "float32":
            raise ValueError(f"the evaluator quantises to {precision} itself; leave its precision unset.")
        single = model.is_singular_input(inputs)
        texts = [inputs] if single else list(inputs)
        rows = self._store.rows_of(texts, method, **given)
        result: Any = self._collect(rows, self._unit or normalize_embeddings)
        if precision not in (None, "float32") and len(result):
            result = quantize_embeddings(result, precision=precision)
        if convert_to_tensor:
            result = torch.as_tensor(result, device=model.device)
        elif not convert_to_numpy:
            result = list(torch.as_tensor(result))
        return result[0] if single else result

    def _collect(self, rows: np.ndarray, unit: bool) -> np.ndarray:
        """(n, d), in memory, or mapped from a temporary file if it is larger than the store's limit."""
        shape = (len(rows), self._dim)
        limit = self._store.memory_limit
        if len(rows) == 0 or limit is None or 4 * len(rows) * self._dim <= limit:
            out = np.empty(shape, dtype=np.float32)
            done = 0
            for part in self._store.portions(rows):
                out[done : done + len(part)] = self._finished(part, unit)
                done += len(part)
            return out
        with tempfile.TemporaryFile(prefix="mipic-st-") as file:
            for part in self._store.portions(rows):
                write_array(file, self._finished(part, unit))
            # copy-on-write: the evaluator may change its vectors, as it may change those of the model
            return np.memmap(file, dtype=np.float32, mode="c", shape=shape)

    def _finished(self, rows: np.ndarray, unit: bool) -> np.ndarray:
        """Cut, renormalised and quantised; codes are widened to float32 as sentence-transformers' evaluators do."""
        vectors = self._store.vectors(rows, self._dim, self._layer)
        if unit:
            vectors = unit_length(vectors)
        if self._precision == "int8":
            ranges = self._store.int8_ranges(self._dim, self._layer, unit)
            return np.asarray(quantize_embeddings(vectors, "int8", ranges=ranges)).astype(np.float32)
        if self._precision == "binary":
            packed = quantize_embeddings(vectors, "ubinary")
            return np.unpackbits(packed, axis=1, count=self._dim).astype(np.float32)
        return vectors
