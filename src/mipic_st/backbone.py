"""What a model is made of, found once: depth, widths, final norm, pooling, tail, routes.

The loss, the recording, evaluation, tails and export ask here, so that all of them see the same model. Nothing here
changes a model. :func:`describe` reads a model off as far as that goes, and says why the loss cannot align the layers
of some. Words used throughout:

- *hidden width*: of the token states of the encoder; *width*, D: of the embedding that is served.
- *tail*: the modules behind the pooling, e.g. Dense, Normalize. They may change the width.
- *final norm*: what a pre-norm encoder does between its last layer and ``last_hidden_state``. A model that is cut after
  an earlier layer still runs it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Router,
    Transformer,
)
from torch import Tensor, nn

from mipic_st._checks import checked_layers

# encode(truncate_dim=None) falls back to the model's own truncate_dim; a slice this wide never cuts.
NO_CUT = 2**31 - 1
_TAIL_KINDS = (Dense, Normalize, LayerNorm, Dropout)
_TAIL_NAMES = ", ".join(kind.__name__ for kind in _TAIL_KINDS)
_HINT = f"Use a model of Transformer + Pooling (+ any of {_TAIL_NAMES}), or alpha=1 for plain Matryoshka training."


@dataclass(frozen=True)
class Description:
    """What a model, or one route of a Router, is made of, as far as that can be said.

    Attributes:
        depth: Number of encoder layers, or None if there are none or the config does not say.
        hidden_width: Width of the token states, or None.
        width: Width D of the untruncated embedding, behind the tail, or None if no module says.
        pooling: The model's own pooling module, or None.
        tail: The modules behind the pooling, in order; without a pooling, those behind the first module.
        routes: The routes of a Router by name; each has the modules behind the Router at the end of its tail.
        obstacle: Why the loss cannot align the layers with the embedding; empty if it can.
    """

    depth: int | None = None
    hidden_width: int | None = None
    width: int | None = None
    pooling: Pooling | None = None
    tail: tuple[nn.Module, ...] = ()
    routes: dict[str, Description] = field(default_factory=dict)
    obstacle: str = ""

    @property
    def steps(self) -> tuple[nn.Module, ...]:
        """What of the tail the loss's terms push states through: no Dropout, and no Normalize at the end.

        Dropout would blur teacher and student each in its own way. Length is nothing that the terms look at: PIC
        normalises by itself, SIA compares the tokens of one sentence, which a Normalize of the sentence leaves alone.
        """
        steps = [module for module in self.tail if not isinstance(module, Dropout)]
        while steps and isinstance(steps[-1], Normalize):
            steps.pop()
        return tuple(steps)


class Backbone(NamedTuple):
    """What the loss must know about a model whose layers it aligns.

    Attributes:
        depth: Number of encoder layers.
        width: Width D of the untruncated embedding, behind the tail.
        pooling: The model's own pooling module.
        steps: The modules of the tail that states are pushed through, see :attr:`Description.steps`.
        normalize: Whether the tail ends with a Normalize, of some route at least.
        dropout: Whether the tail has a Dropout.
    """

    depth: int
    width: int
    pooling: Pooling
    steps: tuple[nn.Module, ...] = ()
    normalize: bool = False
    dropout: bool = False


def unwrap(model: nn.Module) -> SentenceTransformer:
    """Return the sentence-transformers model inside DistributedDataParallel and torch.compile wrappers.

    Args:
        model: The model as the trainer hands it to a loss.

    Returns:
        The model itself.

    Raises:
        TypeError: If there is none inside.
    """
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
    """Whether a part of the model computes in float16 or bfloat16.

    Args:
        model: The model, or one wrapped for training.

    Returns:
        True if any parameter is of such a type.
    """
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


# --- widths and depth -------------------------------------------------------------------------------------------------


def embedding_width(model: nn.Module) -> int | None:
    """Width of the embeddings that the model is trained on, whatever ``truncate_dim`` it was loaded with.

    ``truncate_dim`` cuts in ``encode`` only; the forward passes of a training step have the full width.

    Args:
        model: The model.

    Returns:
        The width that the last module which knows one reports, or None.
    """
    return _width_of(list(unwrap(model).children()))


def _width_of(modules: Sequence[nn.Module]) -> int | None:
    for module in reversed(modules):
        get_dimension = getattr(module, "get_embedding_dimension", None)
        if get_dimension is not None and (width := get_dimension()) is not None:
            return width
    return None


def full_width(model: SentenceTransformer) -> int:
    """The width D of the model's vectors, whatever ``truncate_dim`` it was loaded with.

    Args:
        model: The model. If its modules do not say their width, it encodes a text.

    Returns:
        D.
    """
    width = embedding_width(model)
    return width or int(model.encode(["a"], truncate_dim=NO_CUT, show_progress_bar=False).shape[-1])


def layer_count(transformer: Transformer) -> int | None:
    """Number of encoder layers, the embedding layer not counted.

    Args:
        transformer: The module of the model.

    Returns:
        What the config says, or None.
    """
    return depth_of(transformer.auto_model)


def depth_of(auto_model: Any) -> int | None:
    """The same of an encoder of transformers."""
    return getattr(auto_model.config.get_text_config(), "num_hidden_layers", None)


def transformer_of(model: SentenceTransformer) -> Any:
    """The model's first module, if it is a Transformer that knows layers.

    Args:
        model: The model.

    Returns:
        The module.

    Raises:
        TypeError: If the model starts with something else (StaticEmbedding, Router, WordEmbeddings).
    """
    if not isinstance(model[0], Transformer):
        raise TypeError(
            f"layers need a model whose first module is a Transformer, got {type(model[0]).__name__}; leave layers out."
        )
    return model[0]


def model_depth(model: SentenceTransformer) -> int:
    """How many encoder layers the model has (layer 0 is the embedding layer).

    Args:
        model: A model whose first module is a Transformer.

    Returns:
        What its config says.

    Raises:
        TypeError: If it has none, or its config does not say.
    """
    transformer = transformer_of(model)
    depth = layer_count(transformer)
    if depth is None:
        raise TypeError(
            f"layers need a depth, but the config of {type(transformer.auto_model).__name__} does not say "
            "num_hidden_layers; leave layers out."
        )
    return depth


def check_layers(layers: Sequence[int], model: SentenceTransformer) -> tuple[int, ...]:
    """Validate layer numbers against the model and sort them upwards.

    Args:
        layers: Distinct layer numbers, 0 to L.
        model: The model.

    Returns:
        The layers, ascending.

    Raises:
        TypeError: If ``layers`` is no sequence, or the model has none.
        ValueError: If one is outside 0..L or given twice.
    """
    return checked_layers("layers", layers, model_depth(model), least=0, otherwise=", or None for the final vector")


# --- the description --------------------------------------------------------------------------------------------------


def describe(model: nn.Module) -> Description:
    """Read a model off: depth, widths, pooling, tail, routes, and what keeps the loss from aligning its layers.

    Args:
        model: A SentenceTransformer of any modules, or one wrapped for training.

    Returns:
        :class:`Description`. What cannot be said is None; for a Router, what all its routes have in common.

    Raises:
        TypeError: If there is no SentenceTransformer inside.

    Example:
        >>> describe(model).width, describe(model).depth  # doctest: +SKIP
        (384, 6)
    """
    modules = list(unwrap(model).children())
    if not modules or not isinstance(modules[0], Router):
        return _describe_route(modules)
    behind = tuple(modules[1:])
    routes = {name: _describe_route([*route.children(), *behind]) for name, route in modules[0].sub_modules.items()}
    first, *others = routes.values()
    if any(_shape(route) != _shape(first) for route in others):
        found = sorted({_shape(route)[:5] for route in routes.values()}, key=str)
        obstacle = (
            "The routes of the model's Router differ in (depth, hidden width, width, pooling mode, include_prompt): "
            f"{found}. MIPIC needs routes of one shape; use alpha=1 for plain Matryoshka training."
        )
        if len(found) == 1:
            obstacle = (
                f"The routes of the model's Router have tails of their own: "
                f"{[_names(route.steps) for route in routes.values()]}. MIPIC needs one tail for all routes: put it "
                "behind the Router, or use alpha=1 for plain Matryoshka training."
            )
    else:
        obstacle = ""
    obstacle = next((route.obstacle for route in routes.values() if route.obstacle), obstacle)
    same = {
        name: getattr(first, name) if all(getattr(route, name) == getattr(first, name) for route in others) else None
        for name in ("depth", "hidden_width", "width")
    }
    pooling = None if obstacle else first.pooling
    common = first.tail if not obstacle and first.steps else behind
    return Description(**same, pooling=pooling, tail=common, routes=routes, obstacle=obstacle)


def _shape(route: Description) -> tuple[Any, ...]:
    """What must be equal for one lift, one head and one tail to fit several routes."""
    pooling = route.pooling
    mode, include_prompt = (None, None) if pooling is None else (pooling.pooling_mode, pooling.include_prompt)
    return route.depth, route.hidden_width, route.width, mode, include_prompt, tuple(map(id, route.steps))


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
        description = replace(description, depth=layer_count(modules[0]), hidden_width=hidden_width)
    return replace(description, obstacle=_obstacle(modules, description))


def _obstacle(modules: list[nn.Module], description: Description) -> str:
    """Why the loss cannot align the layers of these modules, or nothing."""
    names = _names(modules)
    if not modules or not isinstance(modules[0], Transformer):
        first = names[0] if names else "nothing"
        return f"MIPIC aligns the layers of a Transformer, but the model begins with {first}. {_HINT}"
    if len(modules) < 2 or not isinstance(modules[1], Pooling) or description.pooling is not modules[1]:
        return f"MIPIC needs a Pooling module right after the Transformer, and only one, the model has {names}. {_HINT}"
    for module in description.tail:
        if reason := _not_a_step(module):
            return f"{reason}, so what it does to the states of the layers is not known. {_HINT}"
    if not description.depth:
        return f"The config of {type(modules[0].auto_model).__name__} does not say num_hidden_layers. {_HINT}"
    pooled = description.pooling.get_embedding_dimension()
    if pooled != description.hidden_width:
        return (
            f"Pooling mode {description.pooling.pooling_mode!r} gives {pooled} values from hidden states of "
            f"{description.hidden_width}. MIPIC needs one pooling mode. {_HINT}"
        )
    return ""


def _not_a_step(module: nn.Module) -> str:
    """Why states cannot be pushed through a module of the tail one by one, or nothing."""
    name = type(module).__name__
    kind = next((kind for kind in _TAIL_KINDS if isinstance(module, kind)), None)
    if kind is None:
        return f"Behind its pooling the model has {name}, which is none of {_TAIL_NAMES}"
    if type(module).forward is not kind.forward:
        return f"Behind its pooling the model has {name}, a {kind.__name__} with a forward of its own"
    read, written = _keys(module)
    if (read, written) != ("sentence_embedding", "sentence_embedding"):
        return f"Behind its pooling the model has a {name} that reads {read!r} and writes {written!r}"
    return ""


def _keys(module: nn.Module) -> tuple[str, str]:
    """Which features a module of the tail reads and writes."""
    read = getattr(module, "module_input_name", "sentence_embedding")
    return read, getattr(module, "module_output_name", read)


def backbone_of(model: nn.Module) -> Backbone:
    """What the loss must know, or the reason why there is no such thing.

    Args:
        model: A SentenceTransformer of Transformer, Pooling and a tail, or a Router between several such routes of one
            shape.

    Returns:
        :class:`Backbone`.

    Raises:
        ValueError: If the model is built otherwise, with the module that is in the way.
    """
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


# --- the tail ---------------------------------------------------------------------------------------------------------


def tail_of(model: nn.Module) -> list[nn.Module]:
    """The modules behind the model's pooling, in order.

    Args:
        model: Any SentenceTransformer. Without a pooling (StaticEmbedding), or with a Router in front, the modules
            behind the first one.

    Returns:
        The modules themselves; empty if there are none.
    """
    modules = list(unwrap(model).children())
    if modules and isinstance(modules[0], Router):
        return modules[1:]
    return list(_describe_route(modules).tail)


def is_linear(module: nn.Module, features: str = "sentence_embedding") -> bool:
    """Whether a linear map behind a module can be multiplied into its weight (and bias).

    Args:
        module: Any module.
        features: What it must read and write.

    Returns:
        True for a Dense on these features without activation, residual and forward of its own.
    """
    return (
        isinstance(module, Dense)
        and type(module).forward is Dense.forward
        and _keys(module) == (features, features)
        and isinstance(module.activation_function, nn.Identity)
        and not getattr(module, "use_residual", False)
    )


def push_vectors(modules: Sequence[nn.Module], vectors: Tensor) -> Tensor:
    """Run vectors through modules of a tail, as if they came from the pooling.

    Args:
        modules: Modules that change ``sentence_embedding`` only, e.g. :func:`tail_of` or a part of it.
        vectors: (..., W), on the modules' device; token states (R, L, W) go through one by one.

    Returns:
        (..., W').
    """
    features = {"sentence_embedding": vectors}
    for module in modules:
        features = module(features)
    return features["sentence_embedding"]


def require_same_vectors(own: Tensor, pooled: Tensor, model: nn.Module, fix: str, half: bool | None = None) -> None:
    """Refuse a model whose embedding is not its pooled last hidden state, pushed through its tail.

    Args:
        own: (R, D), what the model gave.
        pooled: (R, D), made of the last hidden state that it showed.
        model: The model, for its module's name.
        fix: What to do instead.
        half: Whether one of the two was computed in half precision; None looks at the model's parameters.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    own, pooled = own.detach().float(), pooled.detach().to(own.device).float()
    if half is None:
        half = in_half_precision(model)
    if own.shape == pooled.shape:
        # NaN is somebody else's fault, and is reported as such.
        both = own.isfinite().all(dim=-1) & pooled.isfinite().all(dim=-1)
        worst = torch.where(both, (own - pooled).abs().amax(dim=-1), 0.0).max()
        scale = torch.where(both, own.abs().amax(dim=-1), 0.0).max()
        if bool(worst <= (3e-2 if half else 1e-3) * scale):
            return
        difference = f"by {float(worst):.1e} at values up to {float(scale):.1e}"
    else:
        difference = f"in shape, {tuple(own.shape)} and {tuple(pooled.shape)}"
    names = " + ".join(_names(list(unwrap(model).children())))
    raise ValueError(
        f"The model's embedding is not its last hidden state, pooled: the two differ {difference}. Something in "
        f"{names} pools other token states than those of the last layer (a Transformer subclass or modality_config "
        f"with another output, a module that mixes layers), so its layers are not what is served. {fix}"
    )


# --- the final norm ---------------------------------------------------------------------------------------------------


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards every module has the mode that it had, also where they differ.

    Args:
        model: The model.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Call(NamedTuple):
    """One module's part in a forward pass."""

    name: str
    inputs: list[Tensor]
    output: Tensor | None


def module_identity(model: nn.Module) -> tuple[int, ...]:
    """Changes when a module is put in, taken out or replaced: what was found out about the others may then be wrong."""
    return tuple(id(module) for module in model.modules())


class _Ending(NamedTuple):
    """What was found out about an encoder.

    Attributes:
        modules: Names of the modules between the last layer and the last hidden state, in order.
        first: The layer after which the first of the hidden states is: 0, the embeddings; Mamba leaves these out.
    """

    modules: list[str]
    first: int


# By encoder. Weak, so that no model is kept alive; names instead of modules, so that no cycle arises.
_endings: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], _Ending]] = weakref.WeakKeyDictionary()


def _ending(auto_model: nn.Module) -> _Ending:
    identity = module_identity(auto_model)
    known = _endings.get(auto_model)
    if known is None or known[0] != identity:
        known = (identity, _find_ending(auto_model))
        _endings[auto_model] = known
    return known[1]


def final_norm(auto_model: nn.Module) -> nn.Module | None:
    """What a pre-norm encoder does between its last layer and ``last_hidden_state``, or None for the others.

    A model cut after layer l still runs this norm (Qwen3, ModernBERT, Gemma3, T5, OPT ...), so a grid cell must too:
    the grid scores what can be exported. There is no list of names: a handful of tokens is run through the encoder
    once, and the modules that turn the last layer's own output into the last hidden state are those that were seen to
    do it. Mode and random state of the model are left alone.

    Args:
        auto_model: The encoder of transformers.

    Returns:
        The module, one that runs several in order, or None if the last layer's output is the last hidden state.

    Raises:
        TypeError: If the encoder shows no hidden states, or nothing explains the last one: then no earlier layer can
            be made into what a cut model would give.
    """
    modules = [auto_model.get_submodule(name) for name in _ending(auto_model).modules]
    if len(modules) > 1:
        return nn.Sequential(*modules)
    return modules[0] if modules else None


def first_shown(model: nn.Module) -> int:
    """The layer after which the first of the encoder's hidden states is.

    Args:
        model: The model; a handful of tokens is run through each of its encoders, as :func:`final_norm` does.

    Returns:
        0, the embeddings, for nearly all, also where nothing can be found out; 1 for those that leave them out and show
        the last layer's state twice, before and after the final norm (Mamba).

    Raises:
        ValueError: If the routes of a Router differ in this.
    """
    found = set()
    for module in unwrap(model).modules():
        if isinstance(module, Transformer):
            try:
                found.add(_ending(module.auto_model).first)
            except TypeError:
                found.add(0)
    if len(found) > 1:
        raise ValueError(f"The routes of the model's Router show the states of different layers. {_HINT}")
    return found.pop() if found else 0


def layer_states(auto_model: nn.Module, hidden_states: Sequence[Tensor]) -> dict[int, Tensor]:
    """The hidden states of a forward pass by the layer that they come from; the last one is final.

    Args:
        auto_model: The encoder of transformers.
        hidden_states: What it gave.

    Returns:
        One tensor per layer, 0 for the embeddings, which some encoders (Mamba) do not show.

    Raises:
        TypeError: As :func:`final_norm`.
    """
    return states_by_layer(hidden_states, _ending(auto_model).first)


def states_by_layer(hidden_states: Sequence[Tensor], first: int) -> dict[int, Tensor]:
    """Number hidden states; the last one is always the last layer's, as it is pooled.

    Args:
        hidden_states: What an encoder gave, depth + 1 tensors.
        first: The layer that they begin with.

    Returns:
        One tensor per layer.

    Example:
        >>> states_by_layer(["one", "two", "two, normed"], first=1)
        {1: 'one', 2: 'two, normed'}
    """
    states = dict(enumerate(hidden_states[: len(hidden_states) - first], start=first))
    states[len(hidden_states) - 1] = hidden_states[-1]
    return states


def _find_ending(auto_model: Any) -> _Ending:
    """Watch a few tokens go through, see :func:`final_norm`."""
    encoder = type(auto_model).__name__
    calls, states, last = _probe(auto_model)
    if not _equal(states[-1], last):
        raise TypeError(
            f"layers need the state that is pooled among the hidden states, but {encoder} shows another one as its "
            "last; leave layers out for this model."
        )
    stacks = {name for name, module in auto_model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    layers = [
        (index, call)
        for index, call in enumerate(calls)
        if call.name.rpartition(".")[0] in stacks and call.output is not None
    ]
    # The last layer: the outermost module of a stack that was given the last but one state. Or gave it, where the
    # states begin after the first layer.
    found = [(index, call) for index, call in layers if any(_equal(states[-2], tensor) for tensor in call.inputs)]
    first = 0 if found else 1
    found = found or [(index, call) for index, call in layers if _equal(states[-2], call.output)]
    if not found:
        raise TypeError(
            f"layers need to know what {encoder} does behind its last layer, but no layer was seen to take the hidden "
            "state before the last; leave layers out for this model."
        )
    position, block = min(found, key=lambda pair: pair[1].name.count("."))
    current = block.output
    assert current is not None
    names: list[str] = []
    after = [call for call in calls[position + 1 :] if not f"{call.name}.".startswith(f"{block.name}.")]
    while not _equal(current, last):
        steps = [
            call
            for call in after
            if call.inputs and _equal(current, call.inputs[0]) and not _equal(current, call.output)
            if call.output is not None and call.name not in names
        ]
        if not steps:
            seen = f" (seen: {', '.join(names)})" if names else ""
            raise TypeError(
                f"layers need the final norm of {encoder}, but no module was seen to turn its last layer's output into "
                f"its last hidden state{seen}; leave layers out for this model."
            )
        step = min(steps, key=lambda call: call.name.count("."))
        names.append(step.name)
        assert step.output is not None
        current = step.output
    return _Ending(names, first)


def _probe(auto_model: Any) -> tuple[list[_Call], Sequence[Tensor], Tensor]:
    """Run a few tokens through an encoder; what its modules did, its hidden states, and the last one."""
    encoder = type(auto_model).__name__
    config = auto_model.config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None) or 8
    ids = torch.arange(8, device=next(auto_model.parameters()).device)[None, :] * 3 % vocabulary
    calls: list[_Call] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            inputs = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            calls.append(_Call(name, inputs, first if isinstance(first, Tensor) else None))

        return hook

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(auto_model))
        stack.enter_context(torch.no_grad())
        if hasattr(torch.compiler, "set_stance"):  # compiled modules call no hooks that came later; torch >= 2.6
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in auto_model.named_modules():
            if name:
                stack.callback(module.register_forward_hook(watch(name), with_kwargs=True).remove)
        try:
            output = auto_model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, return_dict=True
            )
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            raise TypeError(
                f"layers need one pass of {ids.shape[1]} tokens through {encoder} alone, which failed: {error}. Leave "
                "layers out for this model."
            ) from error
    states, last = getattr(output, "hidden_states", None), getattr(output, "last_hidden_state", None)
    depth = depth_of(auto_model)
    if states is None or last is None or len(states) < 2 or len(states) - 1 != depth:
        shown = "none" if states is None else len(states)
        raise TypeError(
            f"layers need the hidden states of all {depth} layers and of the embeddings, but {encoder} shows {shown}; "
            "leave layers out for this model."
        )
    return calls, states, last


def _equal(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors hold the same token states, in any order of their axes (XLNet, SqueezeBERT)."""
    if one is other or other is None:
        return other is not None
    one, other = one.squeeze(), other.squeeze()
    if one.ndim != 2 or other.ndim != 2:
        return False
    return torch.equal(one, other) or torch.equal(one.T, other)
