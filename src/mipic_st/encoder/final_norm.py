"""What an encoder does behind its last layer, found by running it; and which layer each hidden state comes from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mipic_st.encoder.capturing import no_hooks_left
from mipic_st.encoder.structure import HINT, depth_of, encoders_in, evaluation_mode, module_identity, unwrap


class _Call(NamedTuple):
    """One module's part in a forward pass."""

    name: str
    inputs: list[Tensor]
    output: Tensor | None


class _Ending(NamedTuple):
    """What was found out about an encoder."""

    modules: list[str]  # names of those between the last layer and the last hidden state, in order
    first: int  # the layer after which the first of the hidden states is: 0, the embeddings; Mamba leaves these out


# By encoder. Weak, so that no model is kept alive; names instead of modules, so that no cycle arises.
_endings: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], _Ending]] = weakref.WeakKeyDictionary()


def _ending(auto_model: nn.Module) -> _Ending:
    identity = module_identity(auto_model)
    if auto_model not in _endings or _endings[auto_model][0] != identity:
        _endings[auto_model] = identity, _find_ending(auto_model)
    return _endings[auto_model][1]


def final_norm(auto_model: nn.Module) -> nn.Module | None:
    """What a pre-norm encoder does between its last layer and ``last_hidden_state``, or None for the others.

    A model cut after layer l still runs it: the modules that were seen to do it when some tokens ran through the
    encoder.
    """
    modules = [auto_model.get_submodule(name) for name in _ending(auto_model).modules]
    if len(modules) > 1:
        return nn.Sequential(*modules)
    return modules[0] if modules else None


def first_shown(model: nn.Module) -> int:
    """The layer after which the first of the encoder's hidden states is."""
    found = set()
    for encoder in encoders_in(unwrap(model)):
        try:
            found.add(_ending(encoder).first)
        except TypeError:
            found.add(0)
    if len(found) > 1:
        raise ValueError(f"The routes of the model's Router show the states of different layers. {HINT}")
    return found.pop() if found else 0


def layer_states(auto_model: nn.Module, hidden_states: Sequence[Tensor]) -> dict[int, Tensor]:
    """The hidden states of a forward pass by the layer that they come from; the last one is final."""
    return states_by_layer(hidden_states, _ending(auto_model).first)


def states_by_layer(hidden_states: Sequence[Tensor], first: int) -> dict[int, Tensor]:
    """Number hidden states; the last one is always the last layer's, as it is pooled."""
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
    layers = [call for call in calls if call.name.rpartition(".")[0] in stacks and call.output is not None]
    # The last layer: the outermost module of a stack that was given the last but one state. Or gave it, where the
    # states begin after the first layer.
    found = [call for call in layers if any(_equal(states[-2], tensor) for tensor in call.inputs)]
    first = 0 if found else 1
    found = found or [call for call in layers if _equal(states[-2], call.output)]
    if not found:
        raise TypeError(
            f"layers need to know what {encoder} does behind its last layer, but no layer was seen to take the hidden "
            "state before the last; leave layers out for this model."
        )
    block = min(found, key=lambda call: call.name.count("."))
    current: Any = block.output
    names: list[str] = []
    position = next(index for index, call in enumerate(calls) if call is block)
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
        stack.enter_context(no_hooks_left(auto_model))
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
        raise TypeError(
            f"layers need the hidden states of all {depth} layers and of the embeddings, but {encoder} shows "
            f"{'none' if states is None else len(states)}; leave layers out for this model."
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
