"""The base loss at every truncation dimension, on one set of forward passes that the terms watch."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.encoder.hidden_states import Features, replaced_forward
from mipic_st.encoder.structure import embedding_width
from mipic_st.losses.terms import Observers

Dims = Sequence[tuple[int, float]]


class Outcome(NamedTuple):
    """What a base loss and the terms that watched it gave: weighted scalars by name."""

    terms: dict[str, Tensor]
    embeddings: Sequence[Tensor] = ()  # of each forward pass, where they are at hand
    total: Tensor | None = None  # the sum of the terms, if it has the gradient in their place

    def with_gradient(self) -> dict[str, Tensor]:
        """The terms, whose sum has the gradient: one of them carries that of all, and the difference is zero."""
        if self.total is None or not self.total.requires_grad:
            return self.terms
        carrier = self.terms["matryoshka"] + (self.total - self.total.detach())
        return self.terms | {"matryoshka": carrier}


class TruncatedPasses:
    """Runs the model once per call of the first dim, and hands later dims the same output, cut.

    Each output is cut and normalised from the one before, as ``MatryoshkaLoss`` does, to the last bit.
    """

    def __init__(self) -> None:
        self.outputs: list[Features] = []
        self.embeddings: list[Tensor] = []

    def start_dim(self, dim: int) -> None:
        """Begin the pass for one truncation dimension; dims must descend."""
        self.growing = not self.outputs
        self.dim, self.position = dim, 0

    def __call__(self, forward: Callable[..., Features], features: Features, *args: Any, **kwargs: Any) -> Features:
        """The model's output, or that of the first dim's call at the same place, cut to the present dim."""
        if self.growing:
            self.outputs.append(forward(features, *args, **kwargs))
            self.embeddings.append(self.outputs[-1]["sentence_embedding"])
        if self.position >= len(self.outputs):
            raise RuntimeError("The base loss ran the model more often for a later dim than for the first one.")
        output = self.outputs[self.position]
        output["sentence_embedding"] = F.normalize(output["sentence_embedding"][..., : self.dim], p=2, dim=-1)
        self.position += 1
        return output


@contextmanager
def truncated_passes(model: nn.Module) -> Iterator[TruncatedPasses]:
    """One set of forward passes for a base loss that is called once per dim; ``start_dim`` announces each."""
    passes = TruncatedPasses()
    with replaced_forward(model, passes):
        yield passes


def run_plain(
    base: nn.Module,
    model: nn.Module,
    features: list[dict[str, Tensor]],
    labels: Tensor | None,
    dims: Dims,
    scale: float,
    observers: Observers,
) -> Outcome:
    """``scale`` times a base loss without gradient caching, at every dim, and the terms on its forward passes."""
    with observers.recording() as passes:
        terms, embeddings = _at_every_dim(base, model, features, labels, dims)
    if not embeddings:
        raise RuntimeError(
            f"MIPICLoss recorded no forward pass: {type(base).__name__} did not call the model that MIPICLoss "
            "holds. Give both the same model. A loss that keeps it under a name other than `model` cannot be used "
            "in distributed or compiled training."
        )
    if observers.terms:
        terms = {name: scale * term.float() for name, term in terms.items()}
        size = _sentences_per_column(embeddings, features)
        observed = [observers.observe(recorded) for recorded in passes]
        terms |= observers.reduce([column for rows in observed for column in rows.split(size)])
    return Outcome(terms, embeddings)


def drawn(dims: Dims, count: int, key: str) -> Dims:
    """Some of the dims, in their order, by a generator of its own that begins with the key."""
    chosen = sorted(random.Random(key).sample(range(len(dims)), count))
    return [dims[index] for index in chosen]


def _at_every_dim(
    base: nn.Module, model: nn.Module, features: list[dict[str, Tensor]], labels: Tensor | None, dims: Dims
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """L_MRL, with one entry per key of a dict-valued base loss; and what the model gave in each forward pass."""
    totals: dict[str, Tensor] = {}
    width = embedding_width(model)
    with truncated_passes(model) as passes:
        for dim, weight in dims:
            passes.start_dim(dim)
            # labels of the full width are embeddings to be learned, and are cut like the outputs
            are_vectors = isinstance(labels, Tensor) and labels.ndim in (2, 3) and labels.shape[-1] == width
            value = base(features, labels[..., :dim] if are_vectors else labels)  # type: ignore[index]
            parts = value if isinstance(value, Mapping) else {None: value}
            for key, part in parts.items():
                name = "matryoshka" if key is None else f"matryoshka_{key}"
                totals[name] = totals.get(name, 0.0) + weight * part
    return totals, passes.embeddings


def _sentences_per_column(embeddings: list[Tensor], features: list[dict[str, Tensor]]) -> int:
    """B. A base loss may run k columns in one forward pass, one after the other, which then has k * B rows."""
    rows = [len(embedding) for embedding in embeddings]
    # offsets: StaticEmbedding has the tokens of all texts in one row
    counted = next((features[0][name] for name in ("offsets", "attention_mask") if name in features[0]), None)
    size = min(rows) if counted is None else len(counted)
    if any(count % size for count in rows):
        raise RuntimeError(f"Forward passes of {rows} rows cannot be split into columns of {size} sentences.")
    return size
