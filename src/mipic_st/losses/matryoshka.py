"""The base loss at every truncation dimension, on one set of forward passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.encoder.hidden_states import Features, replaced_forward


class TruncatedPasses:
    """A forward that runs the model once per call of the first dim, and hands later dims the same output, cut.

    Each output is cut and normalised from the one before, as ``MatryoshkaLoss`` does, so that values and gradients
    are the same to the last bit.

    Attributes:
        embeddings: What the model gave, uncut, one tensor per forward pass.
    """

    def __init__(self, forward: Callable[..., Features]) -> None:
        self.forward = forward
        self.outputs: list[Features] = []
        self.embeddings: list[Tensor] = []
        self.dim = 0
        self.position = 0
        self.growing = True

    def __call__(self, features: Features, *args: Any, **kwargs: Any) -> Features:
        """The model's output, or that of the first dim's call at the same place, cut to the present dim."""
        if self.growing:
            self.outputs.append(self.forward(features, *args, **kwargs))
            self.embeddings.append(self.outputs[-1]["sentence_embedding"])
        if self.position >= len(self.outputs):
            raise RuntimeError("The base loss ran the model more often for a later dim than for the first one.")
        output = self.outputs[self.position]
        output["sentence_embedding"] = F.normalize(output["sentence_embedding"][..., : self.dim], p=2, dim=-1)
        self.position += 1
        return output

    def start_dim(self, dim: int) -> None:
        """Begin the pass for one truncation dimension; dims must descend."""
        self.growing = not self.outputs
        self.dim, self.position = dim, 0


@contextmanager
def truncated_passes(model: nn.Module) -> Iterator[TruncatedPasses]:
    """Let a base loss be called once per truncation dimension with a single set of forward passes.

    Args:
        model: The outermost model.

    Yields:
        Its ``start_dim`` is to be called with each dim, in descending order, before the base loss is run for it.
    """
    passes = TruncatedPasses(model.forward)
    with replaced_forward(model, lambda _: passes):
        yield passes
