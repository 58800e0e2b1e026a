"""The older folder form that text-embeddings-inference and other servers read."""

from __future__ import annotations

import json
import logging
from os import PathLike
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from mipic_st.deploy.written import (
    OLDER_NAMES,
    PROMPTS_LEFT_OUT,
    WITHOUT_PROMPTS,
    difference,
    require_same_when_loaded,
    vectors_with,
    without_adapters,
)
from mipic_st.encoder.encoding import PROBE_TEXTS, encode_texts, prompt_of
from mipic_st.encoder.modules import kind_of, leaves_prompts_out
from mipic_st.encoder.structure import evaluation_mode, in_half_precision, unwrap
from mipic_st.encoder.surgery import require_one_place_each
from mipic_st.files import new_folder, write_json
from mipic_st.numerics import unit_length

logger = logging.getLogger(__name__)

# Keys of the pooling modes that the server knows, and those of the others, which must be there too.
_POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "lasttoken": "lasttoken"}
_NO_POOLINGS = ("max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens")
_DENSE_KEYS = ("in_features", "out_features", "bias", "activation_function")


def save_for_tei(model: SentenceTransformer, folder: str | PathLike[str]) -> None:
    """Save a model in the form that text-embeddings-inference reads.

    Of the form that sentence-transformers 5.4 and newer save, the server leaves Dense layers out, so a rotated model
    would serve vectors that were not rotated. sentence-transformers, vLLM and infinity read this older form too, with
    the same vectors. Adapters are merged in the saved copy.

    Args:
        model: A model of Transformer, Pooling, and Dense and Normalize behind it.
        folder: A new or empty folder.

    Raises:
        ValueError: If the folder has content, or the server does not know one of the modules or would give other
            vectors.
        RuntimeError: If the folder, loaded again, gives other vectors than the model.

    Example:
        >>> save_for_tei(model, "for-the-server")  # doctest: +SKIP
    """
    model = unwrap(model)
    require_one_place_each(model)
    modules = list(model.children())
    for place, module in enumerate(modules):
        if reason := _not_for_tei(module, place):
            weighed = any(kind_of(module) == "WordWeights" for module in modules)
            hint = " Fit the cut with word_weights=False, or serve the file of export_onnx." if weighed else ""
            raise ValueError(f"{reason}, which text-embeddings-inference does not know.{hint}")
    if leaves_prompts_out(model):
        raise ValueError(f"{PROMPTS_LEFT_OUT} text-embeddings-inference does not; {WITHOUT_PROMPTS}")
    if found := _difference_of_server(model):
        raise ValueError(
            "text-embeddings-inference runs Transformer, Pooling and Dense, no other code, and normalises at the end "
            "only, not in front of a Dense with a bias or an activation: its vectors would differ from the model's by "
            f"{found}. Serve it by sentence-transformers."
        )
    if prompt := prompt_of(model, None):
        logger.warning(
            "The server does not put the model's default prompt %r before texts by itself: start "
            "text-embeddings-inference with --default-prompt-name %s.",
            prompt,
            model.default_prompt_name,
        )
    plain = without_adapters(model)
    with new_folder(folder) as new, evaluation_mode(plain):  # saving writes a card, for which it encodes
        plain.save_pretrained(str(new))
        _write_older_form(modules, new)
        require_same_when_loaded(model, new)


def _difference_of_server(model: SentenceTransformer) -> str:
    """How the server's vectors would differ, at unit length: of what is behind the pooling, it runs the Dense alone."""
    served = [module for module in model.children() if kind_of(module) != "Normalize"]
    with evaluation_mode(model):
        own = unit_length(encode_texts(model, PROBE_TEXTS))
    return difference(own, unit_length(vectors_with(model, served, PROBE_TEXTS)), half=in_half_precision(model))


def _write_older_form(modules: list[nn.Module], folder: Path) -> None:
    listed = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    module: Any
    for entry, module in zip(listed, modules, strict=True):
        kind = kind_of(module)
        entry["type"] = OLDER_NAMES + kind
        config = folder / entry["path"] / "config.json"
        if kind == "Pooling":
            mode = _POOLINGS[module.pooling_mode]
            keys = {f"pooling_mode_{key}": key == mode for key in (*_POOLINGS.values(), *_NO_POOLINGS)}
            stated = {"word_embedding_dimension": module.embedding_dimension, "include_prompt": module.include_prompt}
            write_json(config, stated | keys)
        elif kind == "Dense":
            stated = json.loads(config.read_text(encoding="utf-8"))
            write_json(config, {key: stated[key] for key in _DENSE_KEYS})
        elif kind == "Transformer":
            write_json(folder / "sentence_bert_config.json", {"max_seq_length": _most_tokens(module)})
    write_json(folder / "modules.json", listed)


def _most_tokens(transformer: Any) -> int:
    """The length at which texts are cut; a tokenizer without a limit says so by a number of thirty digits."""
    positions = getattr(transformer.auto_model.config.get_text_config(), "max_position_embeddings", None) or 512
    length = transformer.max_seq_length
    return length if length and length < 10**9 else positions


def _not_for_tei(module: Any, place: int) -> str:
    """Why the server cannot run a module at this place, or nothing."""
    kind, name = kind_of(module), type(module).__name__
    wanted = [("Transformer",), ("Pooling",)][place] if place < 2 else ("Dense", "Normalize")
    if kind not in wanted:
        return f"module {place} is {name}" + (" with code of its own" if not kind else "")
    if kind == "Transformer":
        for key in ("processing_kwargs", "query_length", "document_length", "query_expansion"):
            if given := getattr(module, key, None):
                return f"the tokenizer is called with {key} {given}"
    if kind == "Pooling" and module.pooling_mode not in _POOLINGS:
        return f"the pooling mode is {module.pooling_mode!r}"
    if kind == "Dense":
        if not isinstance(module.activation_function, (nn.Identity, nn.Tanh)):  # which it knows by their class
            return f"a Dense has the activation {type(module.activation_function).__name__}"
        if getattr(module, "use_residual", False):
            return "a Dense has use_residual"
        if {module.module_input_name, module.module_output_name} != {"sentence_embedding"}:
            return f"a Dense makes {module.module_output_name!r} of {module.module_input_name!r}"
    return ""
