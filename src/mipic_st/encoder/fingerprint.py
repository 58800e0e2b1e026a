"""What a model is called and which state of it is meant: the identity of every score."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dis import get_instructions
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import nn

# Keys of a transformers config that say nothing about vectors, or that saving and loading changes.
_NOT_ABOUT_VECTORS = (
    "architectures auto_map dtype torch_dtype transformers_version name_or_path is_matryoshka matryoshka_dimensions "
    "mipic_chain output_hidden_states output_attentions return_dict problem_type id2label label2id use_cache"
)
# Whose code a name and a version stand for; all other code counts.
_KNOWN_PACKAGES = {"torch", "transformers", "sentence_transformers", "mipic_st", "peft", "huggingface_hub"}
# Which adapter is on, and how strongly: peft keeps it next to the weights.
_ADAPTER_STATE = ("_disable_adapters", "_active_adapter", "scaling", "merged_adapters")
# What a module of a known package keeps beside its settings and counts, like all of its floats: a norm's eps, a scale.
_FLAGS = ("is_causal", "approximate")
_SCALARS = (str, bytes, int, float, type(None))


def model_name_of(model: SentenceTransformer, name: str | None = None) -> str:
    """A name of the form ``organisation/model`` for result folders; by default the hub name or ``local/<folder>``."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"model_name must be a text, got {name!r}.")
    if name is None:
        backbone = getattr(model[0], "auto_model", None)
        name = str(getattr(getattr(backbone, "config", None), "_name_or_path", "") or "model")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    is_hub_name = len(parts) == 2 and not Path(name).exists() and not name.startswith((".", "/", "~"))
    return "/".join(parts) if is_hub_name else f"local/{parts[-1] if parts else 'model'}"


def fingerprint(model: SentenceTransformer) -> str:
    """Sixteen hex digits that change with whatever changes the model's vectors; nothing is encoded.

    They are a hash of weights and buffers, the settings of all modules, the backbone's config, the tokenizer, prompts,
    maximal length, similarity, active adapters, hooks, methods set on an instance and all code of other packages with
    the values that it reads.
    """
    digest = hashlib.blake2b(digest_size=8)
    for name, value in model.state_dict().items():
        digest.update(f"{name} {_digest_of(value) if isinstance(value, torch.Tensor) else value!r}".encode())
    tokenizers = {id(tokenizer): tokenizer for tokenizer in (getattr(m, "tokenizer", None) for m in model.modules())}
    state = {
        "prompts": model.prompts,
        "default": model.default_prompt_name,
        # asked by its public name, None becomes cosine in the model
        "similarity": str(getattr(model, "_similarity_fn_name", None) or "cosine"),
        "length": model.max_seq_length,
        "modules": [(name, _module_state(module)) for name, module in model.named_modules()],
        "tokenizers": [_tokenizer_state(tokenizer) for tokenizer in tokenizers.values() if tokenizer is not None],
    }
    digest.update(json.dumps(state, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _module_state(module: nn.Module) -> dict[str, Any]:
    """What a module is and how it is set, besides its weights."""
    kind, own = type(module), vars(module)
    state: dict[str, Any] = {"kind": kind.__name__}
    if hasattr(module, "get_config_dict") and not isinstance(module, SentenceTransformer):
        state["settings"] = module.get_config_dict()  # type: ignore[operator]
    config: Any = getattr(getattr(module, "auto_model", None), "config", None)
    if hasattr(config, "to_dict"):
        state["config"] = _about_vectors(config.to_dict())
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    if own_hooks := [_code(hook) for hook in hooks if _is_own(getattr(hook, "func", hook))]:
        state["hooks"] = own_hooks
    for name, value in own.items():
        if name in _FLAGS or (isinstance(value, float) and name != "p" and "dropout" not in name):
            state[name] = value
    return state | {name: own[name] for name in _ADAPTER_STATE if name in own} | _own_code(module)


def _own_code(thing: Any) -> dict[str, Any]:
    """Methods set on an instance, and what classes of no known package hold, with the attributes that they read."""
    kind, found = type(thing), {}
    # transformers up to 5.1 leaves a class's own forward on the instance after recording
    own = {
        name: value
        for name, value in vars(thing).items()
        if getattr(value, "__func__", None) is not getattr(kind, name, 0)
    }
    if methods := {name: _code(value) for name, value in own.items() if callable(getattr(kind, name, None))}:
        found["set on the instance"] = methods
    held = [pair for each in reversed(kind.__mro__) if _is_own(each) for pair in vars(each).items()]
    held = [(name, getattr(value, "__func__", getattr(value, "fget", value))) for name, value in held]
    if functions := {name: value for name, value in held if isinstance(value, FunctionType)}:
        found["code"] = {name: _code(value) for name, value in functions.items()}
        values = dict(held) | vars(thing)
        # what a method other than __init__ sets is no setting: a counter, a cache
        later = [function.__code__ for name, function in functions.items() if name != "__init__"]
        changed = {step.argval for code in later for step in get_instructions(code) if step.opname == "STORE_ATTR"}
        read = {name for function in functions.values() for name in _names_in(function.__code__)} - changed
        settings = {name: values[name] for name in read & values.keys() - {"training", "truncate_dim"}}
        found["values"] = {name: _code(value) for name, value in settings.items() if _is_plain(value)}
    return found


def _is_plain(value: Any) -> bool:
    """A number, a text, an array, or a collection of numbers and texts."""
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return all(isinstance(item, _SCALARS) for item in (value.values() if isinstance(value, dict) else value))
    return isinstance(value, (*_SCALARS, np.ndarray, torch.Tensor))


def _is_own(code: Any) -> bool:
    package = str(getattr(code, "__module__", "")).partition(".")[0]
    return package not in _KNOWN_PACKAGES and package not in sys.stdlib_module_names


def _about_vectors(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    return {
        str(key): _about_vectors(value)
        for key, value in config.items()
        if value is not None and not str(key).startswith("_") and key not in _NOT_ABOUT_VECTORS.split()
    }


def _code(value: Any, depth: int = 0) -> Any:
    """What a function does, without addresses: byte code, constants, defaults and what it holds from outside."""
    if depth > 8:  # a function that holds itself
        return None
    again = partial(_code, depth=depth + 1)
    if isinstance(value, MethodType):
        return [again(value.__func__), again(value.__self__)]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_names, again(value.co_consts)]
    if isinstance(value, FunctionType):
        held = [_contents(cell) for cell in value.__closure__ or ()]
        # of its module, constants and, not without end, functions
        kinds = (str, bytes, int, float, tuple, list, FunctionType)[: 7 if depth < 4 else 6]
        beside = [value.__globals__.get(name) for name in _names_in(value.__code__) if _is_own(value)]
        held += [part for part in beside if isinstance(part, kinds)]
        return [again(part) for part in (value.__code__, value.__defaults__, value.__kwdefaults__, held)]
    if isinstance(value, partial):
        return [again(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, dict):
        return {repr(key): again(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [again(item) for item in value]
        return sorted(items, key=repr) if isinstance(value, (set, frozenset)) else items
    if value is None or isinstance(value, (str, bytes, int, float, complex, type(...))):
        return repr(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return _digest_of(torch.as_tensor(value)) if value.dtype != object else repr(value)
    if isinstance(value, nn.Module):
        return type(value).__qualname__ if isinstance(value, SentenceTransformer) else again(value.state_dict())
    if hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)):
        call = getattr(type(value), "__call__", None)  # noqa: B004 - what it does, not whether it can
        return [type(value).__qualname__, again(call), again(vars(value))]
    return getattr(value, "__qualname__", type(value).__qualname__)


def _names_in(code: CodeType) -> Iterator[str]:
    """The names that code uses, that of comprehensions in it too."""
    yield from code.co_names
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield from _names_in(part)


def _digest_of(value: torch.Tensor) -> str:
    raw: Any = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{tuple(value.shape)} {value.dtype} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """Words, rules and sides. Padding and truncation of a fast tokenizer are left out: each call sets them."""
    names = ("padding_side", "truncation_side", "special_tokens_map", "chat_template", "do_lower_case")
    state: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in names} | _own_code(tokenizer)
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(fast, "to_str"):
        rules = json.loads(fast.to_str())
        state["rules"] = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    elif hasattr(tokenizer, "get_vocab"):
        vocabulary = tokenizer.get_vocab()
        state["rules"] = sorted(vocabulary.items()) if isinstance(vocabulary, dict) else list(vocabulary)
    return state
