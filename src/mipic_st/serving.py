"""What serving engines need beyond a saved model, and a check that they give the model's vectors.

- :func:`save_for_tei` writes the folder in the older form that text-embeddings-inference reads, and others with it.
- :func:`export_onnx` writes an ONNX file whose ``last_hidden_state`` is behind the model's linear tail already, for
  runtimes that pool by themselves and know no Dense layers.
- :func:`check_endpoint` compares a running server with the model, where a missing Dense layer shows: full-width
  cosines of a rotated model are those of the model without its rotation.
"""

from __future__ import annotations

import copy
import http.client
import itertools
import json
import logging
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer, WordWeights
from torch import Tensor, nn

from mipic_st._checks import checked_dims, checked_number, checked_texts, missing_extra
from mipic_st.backbone import describe, evaluation_mode, full_width, is_linear
from mipic_st.embedding_store import unit_length
from mipic_st.export import merged_encoders
from mipic_st.layers import prompt_of
from mipic_st.tails import encode_texts

logger = logging.getLogger(__name__)

__all__ = ["EndpointCheck", "check_endpoint", "export_onnx", "save_for_tei"]

_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# The activations that text-embeddings-inference knows by their class.
_TEI_ACTIVATIONS = (nn.Identity, nn.Tanh)
_TEI_MODULES = (Transformer, Pooling, Dense, Normalize)

_TEXTS = ("A short text.", "Another one, with a few more words in it than the first.", "What is the third text about?")


# --- text-embeddings-inference ----------------------------------------------------------------------------------------


def save_for_tei(model: SentenceTransformer, folder: str | PathLike[str]) -> None:
    """Save a model in the form that text-embeddings-inference reads.

    What sentence-transformers 5.4 and newer save has other module paths and pooling keys: there the server leaves Dense
    layers out, and a rotated model would serve vectors that were not rotated. sentence-transformers itself reads this
    form too, with the same vectors. So do vLLM, whose releases before September 2026 know no other, and infinity, which
    runs sentence-transformers 3. Adapters are merged in the saved copy.

    Args:
        model: A model of Transformer, Pooling, and Dense and Normalize behind it.
        folder: A new or empty folder.

    Raises:
        ValueError: If the folder has content, or the server does not know one of the modules.

    Example:
        >>> save_for_tei(model, "for-the-server")  # doctest: +SKIP
    """
    modules = list(model.children())
    for place, module in enumerate(modules):
        if reason := _not_for_tei(module, place):
            hint = ""
            if any(isinstance(module, WordWeights) for module in modules):
                hint = " Fit the cut with word_weights=False, or serve the file of export_onnx."
            raise ValueError(f"{reason}, which text-embeddings-inference does not know.{hint}")
    if merged := merged_encoders(model):  # what is saved of adapters, no server reads
        model = copy.deepcopy(model, merged)
    with _new_folder(folder) as new, evaluation_mode(model):  # saving writes a card, for which it encodes
        _save_older_form(model, modules, new)


def _save_older_form(model: SentenceTransformer, modules: Sequence[nn.Module], folder: Path) -> None:
    model.save_pretrained(str(folder))
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for entry, module in zip(listed, modules, strict=True):
        entry["type"] = f"sentence_transformers.models.{type(module).__name__}"
        config = folder / entry["path"] / "config.json"
        if isinstance(module, Pooling):
            width = module.embedding_dimension
            keys = {key: mode == module.pooling_mode for mode, key in _POOLING_KEYS.items()}
            _write_json(config, {"word_embedding_dimension": width, **keys, "include_prompt": module.include_prompt})
        elif isinstance(module, Dense):
            kept = ("in_features", "out_features", "bias", "activation_function")
            stated = json.loads(config.read_text(encoding="utf-8"))
            _write_json(config, {key: stated[key] for key in kept})
        elif isinstance(module, Transformer):
            _write_json(folder / "sentence_bert_config.json", {"max_seq_length": _most_tokens(module)})
    _write_json(folder / "modules.json", listed)


def _most_tokens(transformer: Any) -> int:
    """The length at which texts are cut; a tokenizer without a limit says so by a number of thirty digits."""
    positions = getattr(transformer.auto_model.config.get_text_config(), "max_position_embeddings", None) or 512
    length = transformer.max_seq_length
    return length if length and length < 10**9 else positions


def _not_for_tei(module: nn.Module, place: int) -> str:
    """Why the server cannot run a module at this place, or nothing."""
    name = type(module).__name__
    if (place == 0) != isinstance(module, Transformer) or (place == 1) != isinstance(module, Pooling):
        return f"module {place} is {name}"
    if isinstance(module, _TEI_MODULES) and type(module) not in _TEI_MODULES:
        return f"module {place} is a {name} with code of its own"
    if isinstance(module, Transformer):
        for key in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
            if given := getattr(module, key, None):
                return f"the tokenizer is called with {key} {given}"
    if isinstance(module, Pooling) and module.pooling_mode not in ("cls", "mean", "lasttoken"):
        return f"the pooling mode is {module.pooling_mode!r}"
    if isinstance(module, Dense):
        if not isinstance(module.activation_function, _TEI_ACTIVATIONS):
            return f"a Dense has the activation {type(module.activation_function).__name__}"
        if getattr(module, "use_residual", False):
            return "a Dense has use_residual"
        if {module.module_input_name, module.module_output_name} != {"sentence_embedding"}:
            return f"a Dense makes {module.module_output_name!r} of {module.module_input_name!r}"
    elif place > 1 and not isinstance(module, Normalize):
        return f"behind the pooling the model has {name}"
    return ""


@contextmanager
def _new_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """A new or empty folder, which is written as a whole or left as it was, so that another attempt finds it empty."""
    folder = Path(folder)
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file; name a new one.")
    if existed and any(folder.iterdir()):
        raise ValueError(f"folder {str(folder)!r} exists and is not empty; name a new one.")
    try:
        yield folder
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # what was there stays itself: a link, a mounted place, a folder with rights of its own
        for content in folder.iterdir():
            shutil.rmtree(content, ignore_errors=True) if content.is_dir() else content.unlink()
        raise


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# --- ONNX -------------------------------------------------------------------------------------------------------------


def linear_tail(model: SentenceTransformer) -> Tensor | None:
    """The map of rows that the tail is, if it is linear, so that it commutes with pooling.

    Args:
        model: The model.

    Returns:
        (H, D), or None if there is no Dense.

    Raises:
        ValueError: If the tail does more than bias-free Dense layers and a Normalize at the end, or there is one and
            the pooling is ``max`` or several in one.
    """
    description = describe(model)
    if description.pooling is None or description.routes:
        raise ValueError("the model must be Transformer, Pooling and a linear tail, without a Router.")
    product: Tensor | None = None
    module: Any
    for module in description.steps:
        if not is_linear(module) or module.linear.bias is not None:
            raise ValueError(
                f"behind its pooling the model has a {type(module).__name__} that is no bias-free linear map, so it "
                "cannot go before the pooling."
            )
        weight = module.linear.weight.detach().T.double().cpu()
        product = weight if product is None else product @ weight
    mode = description.pooling.pooling_mode
    if product is not None and (mode == "max" or not isinstance(mode, str)):
        raise ValueError(f"{mode} pooling does not commute with a linear map, so that cannot go before it.")
    return product


class _Rotated(nn.Module):
    """The encoder, whose token states are pushed through what is in front of the pooling, and the tail by a product."""

    def __init__(
        self, auto_model: Any, between: Sequence[nn.Module], product: Tensor | None, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.auto_model, self.between, self.names = auto_model, nn.ModuleList(between), names
        self.register_buffer("product", None if product is None else product.float())

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        features = {**given, "token_embeddings": self.auto_model(**given).last_hidden_state}
        for module in self.between:
            features = module(features)
        states = features["token_embeddings"]
        return states if self.product is None else states.to(self.product.dtype) @ self.product


def export_onnx(model: SentenceTransformer, folder: str | PathLike[str]) -> Path:
    """Write ``onnx/model.onnx``, whose ``last_hidden_state`` has the model's width and space, and the tokenizer.

    A runtime that tokenizes, pools (``mean``, ``cls`` or last token), cuts and normalizes by itself then gives the
    model's vectors; it needs to know nothing of Dense layers, since a bias-free one commutes with pooling, nor of the
    word weights of a layer cut, whose means it gets in the right direction, if not length. The pooling is written
    beside it as sentence-transformers writes it, and ``modules.json`` lists nothing else. A default prompt, which
    ``model.encode`` puts before texts, is not in the files: whoever asks the runtime has to put it there.

    Args:
        model: A model of Transformer, Pooling and a bias-free linear tail.
        folder: A new or empty folder.

    Returns:
        Path of the ONNX file. It is run once, and compared with the model, before the function returns.

    Raises:
        ImportError: If the ``onnx`` extra is missing.
        ValueError: If the folder has content, the tail is not linear, or the model is in bfloat16.
        RuntimeError: If the file does not give what the model gives.

    Example:
        >>> export_onnx(model, "for-onnxruntime")  # doctest: +SKIP
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(missing_extra("the ONNX export needs onnx, onnxscript and onnxruntime", "onnx")) from error
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("the model is in bfloat16, which ONNX Runtime does not compute in on a CPU: model.float() it.")
    product = linear_tail(model)
    if prompt := prompt_of(model, None):
        logger.warning(
            "The model's default prompt %r is not in the exported files: put it before the texts that the runtime "
            "embeds, as model.encode does.",
            prompt,
        )
    with _new_folder(folder) as new, evaluation_mode(model):
        return _write_onnx(model, product, new, onnxruntime)


def _write_onnx(model: SentenceTransformer, product: Tensor | None, folder: Path, onnxruntime: Any) -> Path:
    transformer: Any = model[0]
    place = next(place for place, module in enumerate(model.children()) if isinstance(module, Pooling))
    own_pooling: Any = model[place]
    file = folder / "onnx" / "model.onnx"
    file.parent.mkdir(parents=True)
    encoder = transformer.auto_model
    features = transformer.tokenizer(list(_TEXTS), padding=True, return_tensors="pt")
    names = list(features)
    wrapped = _Rotated(encoder, list(model.children())[1:place], product, names).to(model.device).eval()
    inputs = tuple(features[name].to(model.device) for name in names)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    torch.onnx.export(
        wrapped,
        inputs,
        str(file),
        input_names=names,
        output_names=["last_hidden_state"],
        # one entry for the parameter that takes all inputs
        dynamic_shapes=(tuple({0: batch, 1: length} for _ in inputs),),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    texts = list(_TEXTS[:2])  # another shape than the one that was traced
    given = model.preprocess(texts)  # with the model's own limit of tokens
    (states,) = session.run(None, {name: given[name].cpu().numpy().astype(np.int64) for name in names})
    pooled = own_pooling({"token_embeddings": torch.as_tensor(states), "attention_mask": given["attention_mask"].cpu()})
    got = unit_length(pooled["sentence_embedding"].numpy())
    own = unit_length(encode_texts(model, texts))
    if not np.abs(got - own).max() < 1e-3:
        raise RuntimeError(f"the ONNX file gives other vectors than the model, by {np.abs(got - own).max():.1e}.")
    width = own_pooling.embedding_dimension if product is None else full_width(model)
    transformer.tokenizer.save_pretrained(str(folder))
    encoder.config.save_pretrained(str(folder))
    pooling = Pooling(width, own_pooling.pooling_mode, include_prompt=own_pooling.include_prompt)
    (folder / "1_Pooling").mkdir()
    pooling.save(str(folder / "1_Pooling"))
    kinds = [("", transformer), ("1_Pooling", pooling)]
    listed = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{type(module).__name__}",
        }
        for index, (path, module) in enumerate(kinds)
    ]
    _write_json(folder / "modules.json", listed)
    return file


# --- a running server -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EndpointCheck:
    """What a server's vectors are, compared with the model's.

    Attributes:
        agrees: Whether they are the model's vectors at this dim, at unit length.
        worst: Largest distance between a vector of the server, at unit length, and the model's.
        findings: What is wrong, in words; empty if nothing is.
    """

    agrees: bool
    worst: float
    findings: tuple[str, ...]


def check_endpoint(
    model: SentenceTransformer,
    url: str,
    dim: int | None = None,
    *,
    name: str = "model",
    texts: Sequence[str] = _TEXTS,
    api_key: str | None = None,
    tolerance: float = 0.02,
    timeout: float = 30.0,
) -> EndpointCheck:
    """Compare the vectors of an OpenAI-compatible endpoint with the model's own.

    Vectors are compared, not cosines: a server that leaves a rotation out gives the same cosines at full width, and
    other vectors at every dim.

    Args:
        model: The model that the server is meant to serve.
        url: Address of the server, e.g. ``http://localhost:8000``, which gets ``/v1/embeddings``, or of its route if
            that ends with ``/embeddings``, as infinity's does without ``/v1``.
        dim: Asks the server for so many dims (``dimensions`` in the request). None asks for the full width.
        name: The model's name in the request.
        texts: What is embedded; no prompt is put before it.
        api_key: Sent as a bearer token.
        tolerance: Largest distance that counts as equal; servers compute in half precision.
        timeout: Seconds to wait for an answer.

    Returns:
        :class:`EndpointCheck`.

    Raises:
        TypeError: If ``texts`` is no list of texts.
        ValueError: If the address is none, ``dim`` is out of range, or the answer is no list of vectors.
        ConnectionError: If the server cannot be reached or refuses the request.

    Example:
        >>> check_endpoint(model, "http://localhost:8000", dim=64).findings  # doctest: +SKIP
        ()
    """
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"url must begin with http:// or https://, got {url!r}.")
    width = full_width(model)
    if dim is not None:
        (dim,) = checked_dims("dim", [dim], width)
    tolerance = checked_number("tolerance", tolerance, 0, exclusive=True)
    timeout = checked_number("timeout", timeout, 0, exclusive=True)
    if api_key is not None and not (isinstance(api_key, str) and api_key.isascii() and api_key.isprintable()):
        raise ValueError("api_key must be a text of ASCII characters without line ends, as a header of HTTP is.")
    texts = checked_texts("texts", texts)
    served = _ask(url, texts, dim, name, api_key, timeout)
    with evaluation_mode(model):
        own = encode_texts(model, texts)
    wanted = dim or width
    findings = []
    if served.shape[1] != wanted:
        findings.append(f"it gives {served.shape[1]} values where {wanted} were asked for: cut and normalise them")
    lengths = np.linalg.norm(served, axis=1)
    if np.abs(lengths - 1).max() > 0.01:
        findings.append(f"its vectors have lengths from {lengths.min():.3f} to {lengths.max():.3f}: normalise them")
    common = min(served.shape[1], width)
    worst = _distance(served[:, :common], own[:, :common])
    if not worst <= tolerance:
        for finding, vectors in _misread(model, texts):
            given = served.shape[1]
            if vectors.shape[1] >= given and _distance(served, vectors[:, :given]) <= tolerance:
                findings.append(finding)
                break
        else:
            findings.append(f"its vectors are others than the model's, by {worst:.2f}")
    return EndpointCheck(not findings, worst, tuple(findings))


def _distance(vectors: np.ndarray, others: np.ndarray) -> float:
    return float(np.linalg.norm(unit_length(vectors) - unit_length(others), axis=1).max())


def _misread(model: SentenceTransformer, texts: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """What a server gives that skips modules or pools as it likes, fewest mistakes first, and how to say so."""
    modules = list(model.children())
    pooling: Any = next((module for module in modules if isinstance(module, Pooling)), None)
    modes = [] if pooling is None else [mode for mode in ("mean", "cls", "lasttoken") if mode != pooling.pooling_mode]
    skips = [kind for kind in (WordWeights, Dense) if any(isinstance(module, kind) for module in modules)]
    mistakes = [
        (mode, skipped)
        for mode in (None, *modes)
        for count in range(len(skips) + 1)
        for skipped in itertools.combinations(skips, count)
    ]
    for mode, skipped in sorted(mistakes[1:], key=lambda mistake: (mistake[0] is not None) + len(mistake[1])):
        said = []
        if mode is not None:
            said.append(
                f"its vectors are pooled by {mode!r} where the model has {pooling.pooling_mode!r}: the server does not "
                "read the pooling"
            )
        if WordWeights in skipped:
            said.append(
                "its vectors have no word weights: the server leaves WordWeights out, fit the cut with "
                "word_weights=False"
            )
        if Dense in skipped:
            said.append("its vectors are those in front of the Dense layers: the server leaves them out")
        kept = [module for module in modules if not isinstance(module, skipped)]
        if mode is not None:
            other = Pooling(pooling.embedding_dimension, mode)
            kept = [other if module is pooling else module for module in kept]
        yield "; ".join(said), _encoded(model, kept, texts)


def _encoded(model: SentenceTransformer, modules: list[nn.Module], texts: list[str]) -> np.ndarray:
    """Vectors of the model with other modules behind its encoder."""
    other = SentenceTransformer(modules=modules, device=str(model.device))
    with evaluation_mode(model):
        return encode_texts(other, texts)


def _ask(url: str, texts: list[str], dim: int | None, name: str, api_key: str | None, timeout: float) -> np.ndarray:
    """The server's vectors, in the order of the texts."""
    url = url.rstrip("/")
    route = url if url.endswith("/embeddings") else f"{url}{'' if url.endswith('/v1') else '/v1'}/embeddings"
    body: dict[str, Any] = {"model": name, "input": texts, "encoding_format": "float"}
    if dim is not None:
        body["dimensions"] = dim
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    request = urllib.request.Request(route, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            given = answer.read()
    except urllib.error.HTTPError as error:
        told = error.read(500).decode(errors="replace")
        hint = "; if its route is another one, give it whole, as in http://host:port/embeddings"
        raise ConnectionError(
            f"{route} refuses the request with status {error.code}: {told}{hint if error.code == 404 else ''}"
        ) from error
    except (OSError, http.client.HTTPException) as error:  # the second is what no HTTP server, or no address, gives
        raise ConnectionError(f"{route} cannot be reached: {error}; is the server running?") from error
    try:
        rows = sorted(json.loads(given)["data"], key=lambda row: row["index"])
        vectors = np.asarray([row["embedding"] for row in rows], dtype=np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{route} answers with something else than OpenAI's embeddings: {given[:200]!r}.") from error
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise ValueError(f"{route} answers {len(texts)} texts with an array of shape {vectors.shape}.")
    return vectors
