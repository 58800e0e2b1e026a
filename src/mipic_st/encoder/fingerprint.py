"""What a model is called and which state of it is meant: the identity of every score."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from mipic_st.encoder.encoding import METHODS, without_own_methods
from mipic_st.encoder.structure import NO_CUT, evaluation_mode

logger = logging.getLogger(__name__)

# Of different lengths, so that some are padded; with capitals, digits, accents and brackets, for tokenizers.
_PROBES = (
    "a",
    "Berlin",
    "The old man plays the guitar.",
    "How do I reset my password? (It's the 3rd time.)",
    "naïve café, ÉTÉ 2024 & straße",
    "A dog runs after the red ball while two children watch from behind the house.",
    "to be, or not to be: that is the question",
    "In the morning the small boat left the harbour, and nobody on the quay noticed that it carried no light at all.",
)
# Numbers per probe text, and the step to which they are rounded. A vector is projected to these few numbers, for a
# rounded number changes with the last bits of a vector only if it lies at the edge of a step: with 10 texts and three
# methods about one time in a thousand at a difference of 1e-7, and surely at one of 1e-3.
_NUMBERS, _STEP = 10, 0.03
# Keys of a transformers config that say nothing about vectors, or that saving and loading changes.
_NOT_ABOUT_VECTORS = (
    "architectures",
    "auto_map",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "name_or_path",
    "is_matryoshka",
    "matryoshka_dimensions",
    "mipic_chain",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "problem_type",
    "id2label",
    "label2id",
    "use_cache",
)


def model_name_of(model: SentenceTransformer, name: str | None = None) -> str:
    """A name of the form ``organisation/model`` for result folders.

    Args:
        model: The model.
        name: The name wanted; None takes the one that the model was loaded by.

    Returns:
        The hub name, or ``local/<folder>``.

    Raises:
        TypeError: If the name is no text.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"model_name must be a text, got {name!r}.")
    if name is None:
        backbone = getattr(model[0], "auto_model", None)
        name = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "model")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    is_hub_name = len(parts) == 2 and not Path(name).exists() and not name.startswith((".", "/", "~"))
    return "/".join(parts) if is_hub_name else f"local/{parts[-1] if parts else 'model'}"


def fingerprint(model: SentenceTransformer) -> str:
    """Sixteen hex digits that change with whatever changes the model's vectors.

    They are a hash of the weights, the settings (prompts, modules, backbone's config, similarity, maximal length), the
    tokenizer's words and rules, and the vectors that ``encode``, ``encode_query`` and ``encode_document`` give for a
    few fixed texts: code, routes, attention and padding are seen there. Vectors are rounded coarsely, so that the
    digits stay when their last bits do not; a half-precision model on another device may still get other ones.

    Args:
        model: The model; it stays as it is.

    Returns:
        The digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        if not isinstance(value, torch.Tensor):
            digest.update(repr(value).encode())
            continue
        digest.update(str((tuple(value.shape), value.dtype)).encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    digest.update(json.dumps(_settings(model), sort_keys=True, default=str).encode())
    for tokenizer in _tokenizers(model):
        digest.update(json.dumps(_tokenizer_state(tokenizer), sort_keys=True, default=str).encode())
    for numbers in _probe_numbers(model):
        digest.update(numbers)
    return digest.hexdigest()


def _settings(model: SentenceTransformer) -> dict[str, Any]:
    modules, configs = [], []
    for name, module in model.named_modules():
        if name and hasattr(module, "get_config_dict"):
            modules.append((name, type(module).__name__, module.get_config_dict()))
        config: Any = getattr(getattr(module, "auto_model", None), "config", None)
        if hasattr(config, "to_dict"):
            configs.append((name, _about_vectors(config.to_dict())))
    return {
        "prompts": model.prompts,
        "default": model.default_prompt_name,
        "similarity": str(model.similarity_fn_name),
        "length": model.max_seq_length,
        "modules": modules,
        "configs": configs,
    }


def _about_vectors(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        str(key): _about_vectors(value)
        for key, value in config.items()
        if value is not None and not str(key).startswith("_") and key not in _NOT_ABOUT_VECTORS
    }


def _tokenizers(model: SentenceTransformer) -> Iterator[Any]:
    seen = set()
    for module in model.modules():
        tokenizer = getattr(module, "tokenizer", None)
        if tokenizer is not None and id(tokenizer) not in seen:
            seen.add(id(tokenizer))
            yield tokenizer


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Words, rules and sides. Padding and truncation inside a fast tokenizer are left out: each call sets them anew."""
    names = ("padding_side", "truncation_side", "special_tokens_map", "chat_template", "do_lower_case")
    state: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names}
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(fast, "to_str"):
        rules = json.loads(fast.to_str())
        state["rules"] = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        state["rules"] = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else list(vocabulary)
    return state


def _words(model: SentenceTransformer) -> list[str]:
    """Two texts of the tokenizer's own words, for one that knows none of the fixed texts' words."""
    for tokenizer in _tokenizers(model):
        vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else ()
        words = sorted(word for word in map(str, vocabulary) if word.isalpha())
        if words:
            chosen = words[:: max(1, len(words) // 16)][:16]
            return [" ".join(chosen), " ".join(chosen[5::-1])]
    return []


def _probe_numbers(model: SentenceTransformer) -> Iterator[bytes]:
    """Direction and length of the probe texts' vectors by each method, as a few rounded numbers."""
    twin = without_own_methods(model)
    texts = [*_PROBES, *_words(model)]
    with evaluation_mode(model):
        for method in METHODS:
            try:
                vectors = getattr(twin, method)(
                    texts, batch_size=len(texts), truncate_dim=NO_CUT, convert_to_numpy=True, show_progress_bar=False
                )
            except Exception as error:  # a Router without a default route, for one: that is a property, too
                logger.debug("%s fails on the fingerprint's texts: %s", method, error)
                yield f"{method}: {type(error).__name__}".encode()
                continue
            yield _rounded(np.asarray(vectors, dtype=np.float64)).tobytes()


def _rounded(vectors: np.ndarray) -> np.ndarray:
    """(n, D) to (n, _NUMBERS + 1) whole numbers."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    directions = vectors / np.maximum(lengths, 1e-12)
    signs = np.random.RandomState(0).choice([-1.0, 1.0], size=(vectors.shape[1], _NUMBERS))
    numbers = np.concatenate([directions @ signs, np.log(np.maximum(lengths, 1e-12))], axis=1)
    return np.round(np.nan_to_num(numbers, nan=1e6, posinf=1e6, neginf=-1e6) / _STEP).astype(np.int64)
