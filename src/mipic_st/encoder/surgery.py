"""Changes of a model: a fitted linear map put in (and taken out again), layers cut off."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, WordWeights
from torch import Tensor, nn

from mipic_st.encoder.tail import is_linear


def _linear(weight: Tensor, bias: Tensor | None = None, **names: Any) -> Dense:
    """A Dense without activation, of given values; torch would draw random ones first."""
    with torch.random.fork_rng(devices=[]):
        return Dense(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            bias=bias is not None,
            activation_function=nn.Identity(),
            init_weight=weight,
            init_bias=bias,
            **names,
        )


def identity_dense(weight: Tensor, like: nn.Module) -> Dense:
    """A bias-free identity Dense for a map of rows."""
    *_, reference = like.parameters()
    # a clone: files hold whole storages only, and a slice has a larger one
    return _linear(weight.T.clone(memory_format=torch.contiguous_format).to(reference.device, reference.dtype))


def linear_end(modules: Sequence[nn.Module]) -> Dense | None:
    """The Dense into whose weight a further linear map of the vectors can be multiplied."""
    if is_linear(modules[-1]):
        return modules[-1]  # type: ignore[return-value]
    if [type(module) for module in modules[-3:]] == [Dense, WordWeights, Pooling]:
        dense: Any = modules[-3]
        if modules[-1].pooling_mode == "mean" and is_linear(dense, "token_embeddings"):
            return dense
    return None


def with_map(modules: Sequence[nn.Module], weight: Tensor) -> list[nn.Module]:
    """A model's modules and a linear map of its vectors: multiplied into a Dense where there is one, or behind them."""
    dense: Any = linear_end(modules)
    if dense is None:
        like = next(module for module in reversed(modules) if next(module.parameters(), None) is not None)
        return [*modules, identity_dense(weight, like)]

    def times(values: Tensor) -> Tensor:
        return (weight.T.double() @ values.detach().cpu().double()).to(values)

    old = dense.linear
    merged = _linear(
        times(old.weight),
        None if old.bias is None else times(old.bias),
        module_input_name=dense.module_input_name,
        module_output_name=dense.module_output_name,
    )
    result = [merged if module is dense else module for module in modules]
    if isinstance(result[-1], Pooling):
        result[-1] = Pooling(weight.shape[1], "mean")
    return result


def put_in_map(inner: SentenceTransformer, matrix: Tensor) -> Callable[[], None]:
    """Put the rotation behind everything but the trailing Normalize; the function that takes it out is returned."""
    children = list(inner.named_children())
    kept = children.copy()
    while kept and isinstance(kept[-1][1], Normalize):
        kept.pop()
    trailing = children[len(kept) :]
    dense: Any = linear_end([module for _, module in kept])
    if dense is not None:
        before = {name: value.detach().clone() for name, value in dense.linear.state_dict().items()}
        with torch.no_grad():
            for parameter in dense.linear.parameters():
                parameter.copy_(matrix.T.double() @ parameter.cpu().double())

        def restore() -> None:
            dense.linear.load_state_dict(before)

        return restore
    dense = identity_dense(matrix, inner)
    for name, _ in trailing:
        delattr(inner, name)
    # names may have gaps, and none may be taken twice
    first = max(len(kept), *(int(name) + 1 for name, _ in kept if name.isdecimal()), 0)
    for number, module in enumerate([dense, *(module for _, module in trailing)], first):
        inner.add_module(str(number), module)

    def undo() -> None:
        for name, _ in list(inner.named_children()):
            delattr(inner, name)
        for name, module in children:
            inner.add_module(name, module)

    return undo


def cut_layers(auto_model: Any, layer: int) -> Any:
    """A backbone of the same class with ``layer`` layers and the original's weights, each in its own precision."""
    config = copy.deepcopy(auto_model.config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    try:
        text_config.num_hidden_layers = layer
        # lists whose length is checked: attention kinds of Qwen3, Gemma3, ModernBERT, windows of Longformer
        for name in ("layer_types", "attention_window"):
            value = getattr(text_config, name, None)
            if isinstance(value, (list, tuple)) and len(value) == depth:
                setattr(text_config, name, list(value[:layer]))
        with torch.random.fork_rng(devices=[]):  # random weights, which the model's own replace
            cut = type(auto_model)(config)
    except Exception as error:  # the architecture's own code may raise anything
        raise TypeError(
            f"{type(auto_model).__name__} cannot be built with {layer} of its {depth} layers "
            f"({type(error).__name__}: {error}); leave layer out."
        ) from error
    weights = dict(auto_model.named_parameters())
    missing = [
        name for name, value in cut.named_parameters() if name not in weights or weights[name].shape != value.shape
    ]
    if missing:
        raise TypeError(
            f"{type(auto_model).__name__} cannot be cut at layer {layer}: no weights for {missing[:3]}. Leave it out."
        )
    # not .to(dtype): rotary frequencies, and what transformers keeps in float32, must stay so
    buffers = dict(auto_model.named_buffers())
    for name, parameter in cut.named_parameters():
        parameter.data = weights[name].detach().clone()
    for name, buffer in cut.named_buffers():
        source = buffers.get(name, buffer)
        buffer.data = (source if source.shape == buffer.shape else buffer).detach().clone().to(auto_model.device)
    return cut.eval()
