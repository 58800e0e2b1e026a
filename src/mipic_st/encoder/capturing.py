"""transformers' hooks for hidden states, taken out again: left in, they keep a model from being pickled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

# What transformers sets on an encoder that has them, and where they come from; both are private.
_FLAG = "_output_capturing_hooks_installed"
_SOURCE = "transformers.utils.output_capturing"


@contextmanager
def no_hooks_left(model: nn.Module) -> Iterator[None]:
    """Take out, when the block ends, what transformers put into the model to capture hidden states.

    What was there before stays; a compiled model, which would be compiled again without them, keeps its hooks.
    """
    modules = list(model.modules())
    if any(hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) for module in modules):
        yield
        return
    flagged = {module for module in modules if _FLAG in vars(module)}
    hooks = {key for module in modules for key in module._forward_hooks}
    try:
        yield
    finally:
        if fresh := [module for module in modules if _FLAG in vars(module) and module not in flagged]:
            for encoder in fresh:
                delattr(encoder, _FLAG)
            for module in modules:
                for key, hook in list(module._forward_hooks.items()):
                    if key not in hooks and getattr(hook, "__module__", "") == _SOURCE:
                        del module._forward_hooks[key]
