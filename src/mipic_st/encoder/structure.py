"""What a model is made of: depth, widths, pooling, tail, routes, and why the loss cannot align the layers of some.

*Hidden width* is that of the encoder's token states; *width*, D, that of the embedding that is served; the *tail* are
the modules behind the pooling, e.g. Dense, Normalize, which may change the width. Nothing here changes a model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dropout, Normalize, Pooling, Router, Transformer
from torch import Tensor, nn

from mipic_st.encoder.modules import TAIL_NAMES, not_a_step, without_normalize
from mipic_st.numerics import compare_vectors
from mipic_st.validation import checked_layers

# encode(truncate_dim=None) falls back to the model's own truncate_dim; a slice this wide never cuts.
NO_CUT = 2**31 - 1
HINT = f"Use a model of Transformer + Pooling (+ any of {TAIL_NAMES}), or alpha=1 for plain Matryoshka training."


@dataclass(frozen=True)
class Description:
    """What a model, or one route of a Router, is made of, as far as that can be said."""

    depth: int | None = None
    hidden_width: int | None = None
    width: int | None = None
    pooling: Pooling | None = None
    # behind the first module, if there is no pooling; a route's ends with what is behind the Router
    tail: tuple[nn.Module, ...] = ()
    routes: dict[str, Description] = field(default_factory=dict)
    obstacle: str = ""  # why the loss cannot align the layers with the embedding

    @property
    def steps(self) -> tuple[nn.Module, ...]:
        """What of the tail the loss pushes states through: no Dropout and no Normalize at the end."""
        return tuple(without_normalize([module for module in self.tail if not isinstance(module, Dropout)]))


class Backbone(NamedTuple):
    """What the loss must know about a model; ``normalize`` and ``dropout``: whether a tail has one beyond the steps."""

    depth: int
    width: int
    pooling: Pooling
    steps: tuple[nn.Module, ...] = ()
    normalize: bool = False
    dropout: bool = False


def unwrap(model: nn.Module) -> SentenceTransformer:
    """Return the sentence-transformers model inside DistributedDataParallel and torch.compile wrappers."""
    inner: Any = model
    while not isinstance(inner, SentenceTransformer):
        wrapped = getattr(inner, "_orig_mod", None)
        inner = wrapped if wrapped is not None else getattr(inner, "module", None)
        if inner is None:
            raise TypeError(
                f"model must be a SentenceTransformer, or one wrapped for training, got {type(model).__name__}."
            )
    return inner


def in_half_precision(model: nn.Module) -> bool:
    """Whether a part of the model computes in float16 or bfloat16."""
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def embedding_width(model: nn.Module) -> int | None:
    """Width of the embeddings in training; ``truncate_dim`` cuts in ``encode`` only."""
    return _width_of(list(unwrap(model).children()))


def _width_of(modules: Sequence[nn.Module]) -> int | None:
    for module in reversed(modules):
        get_dimension = getattr(module, "get_embedding_dimension", None)
        if get_dimension is not None and (width := get_dimension()) is not None:
            return width
    return None


def full_width(model: SentenceTransformer) -> int:
    """The width D of the model's vectors, whatever ``truncate_dim`` it was loaded with."""
    return embedding_width(model) or int(model.encode(["a"], truncate_dim=NO_CUT, show_progress_bar=False).shape[-1])


def depth_of(auto_model: Any) -> int | None:
    """Number of layers of an encoder of transformers, the embedding layer not counted."""
    return getattr(auto_model.config.get_text_config(), "num_hidden_layers", None)


def encoders_in(model: nn.Module) -> list[Any]:
    """The encoders of transformers in a model, those of all routes."""
    return [module.auto_model for module in model.modules() if isinstance(module, Transformer)]


def transformer_of(model: SentenceTransformer) -> Any:
    """The model's first module, if it is a Transformer that knows layers."""
    if not isinstance(model[0], Transformer):
        raise TypeError(
            f"layers need a model whose first module is a Transformer, got {type(model[0]).__name__}; leave layers out."
        )
    return model[0]


def model_depth(model: SentenceTransformer) -> int:
    """How many encoder layers the model has (layer 0 is the embedding layer)."""
    auto_model = transformer_of(model).auto_model
    if (depth := depth_of(auto_model)) is None:
        raise TypeError(
            f"layers need a depth, but the config of {type(auto_model).__name__} does not say num_hidden_layers; leave "
            "layers out."
        )
    return depth


def check_layers(layers: Sequence[int], model: SentenceTransformer) -> tuple[int, ...]:
    """Validate layer numbers against the model and sort them upwards."""
    return checked_layers("layers", layers, model_depth(model), least=0, otherwise=", or None for the final vector")


def describe(model: nn.Module) -> Description:
    """Read a model off."""
    modules = list(unwrap(model).children())
    if not modules or not isinstance(modules[0], Router):
        return _describe_route(modules)
    behind = tuple(modules[1:])
    routes = {name: _describe_route([*route.children(), *behind]) for name, route in modules[0].sub_modules.items()}
    first, *others = routes.values()
    found = sorted({_shape(route) for route in routes.values()}, key=str)
    obstacle = next((route.obstacle for route in routes.values() if route.obstacle), "")
    if not obstacle and len(found) > 1:
        obstacle = (
            "The routes of the model's Router differ in (depth, hidden width, width, pooling mode, include_prompt): "
            f"{found}. MIPIC needs routes of one shape; use alpha=1 for plain Matryoshka training."
        )
    elif not obstacle and any(tuple(map(id, route.steps)) != tuple(map(id, first.steps)) for route in others):
        obstacle = (
            f"The routes of the model's Router have tails of their own: "
            f"{[_names(route.steps) for route in routes.values()]}. MIPIC needs one tail for all routes: put it "
            "behind the Router, or use alpha=1 for plain Matryoshka training."
        )
    same = {
        name: getattr(first, name) if all(getattr(route, name) == getattr(first, name) for route in others) else None
        for name in ("depth", "hidden_width", "width")
    }
    pooling = None if obstacle else first.pooling
    common = first.tail if not obstacle and first.steps else behind
    return Description(**same, pooling=pooling, tail=common, routes=routes, obstacle=obstacle)


def _shape(route: Description) -> tuple[Any, ...]:
    """What must be equal for one lift and one head to fit several routes."""
    pooled = [getattr(route.pooling, name, None) for name in ("pooling_mode", "include_prompt")]
    return route.depth, route.hidden_width, route.width, *pooled


def _names(modules: Sequence[nn.Module]) -> list[str]:
    return [type(module).__name__ for module in modules]


def _describe_route(modules: list[nn.Module]) -> Description:
    poolings = [index for index, module in enumerate(modules) if isinstance(module, Pooling)]
    last = poolings[-1] if poolings else None
    description = Description(
        width=_width_of(modules),
        pooling=None if last is None else modules[last],  # type: ignore[arg-type]
        tail=tuple(modules[1 if last is None else last + 1 :]),
    )
    if modules and isinstance(modules[0], Transformer):
        try:
            hidden_width = _width_of(modules[:1])
        except ValueError:  # its config has none that sentence-transformers knows
            hidden_width = None
        description = replace(description, depth=depth_of(modules[0].auto_model), hidden_width=hidden_width)
    return replace(description, obstacle=_obstacle(modules, description))


def _obstacle(modules: list[nn.Module], description: Description) -> str:
    """Why the loss cannot align the layers of these modules, or nothing."""
    names = _names(modules)
    if not modules or not isinstance(modules[0], Transformer):
        first = names[0] if names else "nothing"
        return f"MIPIC aligns the layers of a Transformer, but the model begins with {first}. {HINT}"
    if len(modules) < 2 or not isinstance(modules[1], Pooling) or description.pooling is not modules[1]:
        return f"MIPIC needs a Pooling module right after the Transformer, and only one, the model has {names}. {HINT}"
    for module in description.tail:
        if reason := not_a_step(module):
            return f"{reason}, so what it does to the states of the layers is not known. {HINT}"
    if not description.depth:
        return f"The config of {type(modules[0].auto_model).__name__} does not say num_hidden_layers. {HINT}"
    pooled = description.pooling.get_embedding_dimension()
    if pooled != description.hidden_width:
        return (
            f"Pooling mode {description.pooling.pooling_mode!r} gives {pooled} values from hidden states of "
            f"{description.hidden_width}. MIPIC needs one pooling mode. {HINT}"
        )
    return ""


def backbone_of(model: nn.Module) -> Backbone:
    """What the loss must know, or the reason why there is no such thing."""
    description = describe(model)
    if description.obstacle:
        raise ValueError(description.obstacle)
    assert description.depth is not None
    assert description.width is not None
    assert description.pooling is not None
    routes = list(description.routes.values()) or [description]
    behind = [module for route in routes for module in route.tail if module not in description.steps]
    return Backbone(
        description.depth,
        description.width,
        description.pooling,
        description.steps,
        normalize=any(isinstance(module, Normalize) for module in behind),
        dropout=any(isinstance(module, Dropout) for module in behind),
    )


def tail_of(model: nn.Module) -> list[nn.Module]:
    """The modules behind the model's pooling, in order."""
    modules = list(unwrap(model).children())
    if modules and isinstance(modules[0], Router):
        return modules[1:]
    return list(_describe_route(modules).tail)


def require_same_vectors(own: Tensor, pooled: Tensor, model: nn.Module, fix: str, half: bool | None = None) -> None:
    """Refuse a model whose embedding is not its pooled last hidden state, pushed through its tail."""
    half = in_half_precision(model) if half is None else half
    if own.shape == pooled.shape:
        found = compare_vectors(own, pooled, half=half)
        if found.same:
            return
        difference = f"by {found.worst:.1e} at values up to {found.scale:.1e}"
    else:
        difference = f"in shape, {tuple(own.shape)} and {tuple(pooled.shape)}"
    names = " + ".join(_names(list(unwrap(model).children())))
    raise ValueError(
        f"The model's embedding is not its last hidden state, pooled: the two differ {difference}. Something in "
        f"{names} pools other token states than those of the last layer (a Transformer subclass or modality_config "
        f"with another output, a module that mixes layers), so its layers are not what is served. {fix}"
    )


def module_identity(model: nn.Module) -> tuple[int, ...]:
    """Changes when a module is put in, taken out or replaced: what was found out about the others may then be wrong."""
    return tuple(id(module) for module in model.modules())


# One thread works on a model at a time: modes, flags and hooks are set on it for as long as that takes.
_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, for one thread at a time; then every module has the mode that it had."""
    with _locks.setdefault(model, threading.RLock()):
        before = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            yield
        finally:
            for module, training in before:
                module.training = training
