"""The terms on base losses with gradient caching, exactly and in the memory of one mini-batch.

Such a loss embeds every mini-batch without gradients (1), computes the loss and its gradients at the embeddings (2),
and embeds again with gradients, in a hook of the backward pass, to carry them on (3). Hidden states exist in 1 and 3
only, so what the terms observe of a sentence travels as further columns of its "embedding", which stage 2 splits off.
Projections are used in stages 1 and 3 only: a parameter used in stage 2 would miss the scale that the outer backward
pass applies (gradient accumulation, fp16). All this happens on a stand-in for the base loss, which is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import chain
from types import MethodType
from typing import Any

import torch
from sentence_transformers.base.losses import uses_gradient_cache
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.losses.matryoshka import Dims, Outcome
from mipic_st.losses.terms import Observers

Minibatches = list[list[Tensor]]


def require_supported(loss: nn.Module) -> bool:
    """Whether a base loss caches gradients; one that does it in a way that cannot be served is refused."""
    name = type(loss).__name__
    if not uses_gradient_cache(loss):
        if inner := next((type(child).__name__ for child in loss.modules() if uses_gradient_cache(child)), None):
            raise ValueError(
                f"loss={name} holds {inner}, which embeds in its backward pass (gradient caching), where MIPICLoss "
                f"cannot follow through {name}. Give {inner} itself to MIPICLoss, or a loss without caching."
            )
        return False
    if missing := [method for method in ("embed_minibatch", "calculate_loss") if not hasattr(loss, method)]:
        raise ValueError(
            f"loss={name} caches gradients but has no {' and no '.join(missing)}, which MIPICLoss works on. Use "
            "CachedMultipleNegativesRankingLoss, CachedMultipleNegativesSymmetricRankingLoss, CachedGISTEmbedLoss or "
            "a loss without caching."
        )
    if "calculate_loss" in vars(loss):
        raise ValueError(
            f"This {name} was wrapped before: its calculate_loss was replaced by "
            f"{type(vars(loss)['calculate_loss']).__name__}, as MatryoshkaLoss does for good. Make a new {name} for "
            "MIPICLoss."
        )
    return True


def run_cached(
    base: nn.Module,
    features: list[dict[str, Any]],
    labels: Tensor | None,
    dims: Dims,
    scale: float,
    observers: Observers,
    guard: Callable[[list[Tensor], list[Tensor]], None],
) -> Outcome:
    """``scale`` times a cached base loss at every dim, and the terms, without the gradient that their total has.

    ``guard`` gets, before any gradient is computed, all embeddings and the tensors that their gradients will arrive at.
    """
    calls = _Calls(base, [(dim, scale * weight) for dim, weight in dims], observers, guard)
    methods: dict[str, Callable[..., Any]] = {"calculate_loss": calls.calculate_loss}
    if observers.terms:
        methods["embed_minibatch"] = calls.embed_minibatch
    calls.twin = stand_in(base, **methods)
    total = calls.twin(features, labels)
    if not calls.terms:
        raise RuntimeError(f"{type(base).__name__} did not call its calculate_loss: MIPICLoss cannot work on it.")
    return Outcome(calls.terms, total=total)


class _Calls:
    """The two methods that take the place of the base loss's own, and what they share for one batch."""

    def __init__(self, base: nn.Module, dims: Dims, observers: Observers, guard: Callable[..., None]) -> None:
        self.base: Any = base
        self.dims, self.observers, self.guard = dims, observers, guard
        self.twin: Any = None
        self.terms: dict[str, Tensor] = {}
        # of the embedding, once something is packed behind it
        self.width: int | None = None
        self.dtype = torch.float32

    def embed_minibatch(self, sentence_feature: dict[str, Any], **options: Any) -> tuple[Any, ...]:
        """Stages 1 and 3: the embeddings of some sentences, with what the terms observe of them."""
        # Pooling without the prompt clears mask entries in place, which stage 3 must not find.
        feature = {key: value.clone() if key == "attention_mask" else value for key, value in sentence_feature.items()}
        with self.observers.recording() as passes:
            embeddings, *rest = type(self.base).embed_minibatch(self.twin, sentence_feature=feature, **options)
        if len(passes) != 1:
            raise RuntimeError(
                f"MIPICLoss recorded {len(passes)} forward passes for one mini-batch of "
                f"{type(self.base).__name__}, expected one. Give the base loss and MIPICLoss the same model."
            )
        self.width, self.dtype = embeddings.shape[-1], embeddings.dtype
        with torch.set_grad_enabled(options["with_grad"]):
            return torch.cat([embeddings, self.observers.observe(passes[0])], dim=-1), *rest

    def calculate_loss(self, reps: Minibatches, *args: Any, **kwargs: Any) -> Tensor:
        """Stage 2: values of all terms, and with ``with_backward`` the gradients at the embeddings."""
        with_backward = kwargs.get("with_backward", False)
        if with_backward:
            leaves = list(chain.from_iterable(reps))
            self.guard([leaf[..., : self.width] for leaf in leaves], leaves)
        total: Any = 0.0
        for dim, weight in self.dims:
            cut = [[self._cut(rep, dim) for rep in column] for column in reps]
            # Leaves of their own: the base loss runs backward by itself, in chunks.
            parts = [[rep.detach().requires_grad_() for rep in column] for column in cut] if with_backward else cut
            value = type(self.base).calculate_loss(self.twin, parts, *args, **kwargs)
            for rep, leaf in (
                zip(chain.from_iterable(cut), chain.from_iterable(parts), strict=True) if with_backward else ()
            ):
                if leaf.grad is not None:
                    rep.backward(weight * leaf.grad)
            total = total + weight * value
        further: dict[str, Tensor] = {}
        if self.observers.terms:
            further = self.observers.reduce([torch.cat([rep[..., self.width :] for rep in column]) for column in reps])
            total = total.float()
        if further and with_backward:
            torch.stack(list(further.values())).sum().backward()
        self.terms = {"matryoshka": total} | {name: term.detach() for name, term in further.items()}
        return torch.stack([term.detach() for term in self.terms.values()]).sum()

    def _cut(self, rep: Tensor, dim: int) -> Tensor:
        """The sentence embedding truncated and normalised as MatryoshkaLoss does it."""
        embedding = rep if self.width is None else rep[..., : self.width].to(self.dtype)
        return F.normalize(embedding[..., :dim], p=2, dim=-1)


def stand_in(loss: nn.Module, **methods: Callable[..., Any]) -> nn.Module:
    """An object that is the given loss but for a few methods, also in the backward pass, when a patch would be gone."""
    twin = copy.copy(loss)
    for name, value in vars(loss).items():
        # e.g. MegaBatchMarginLoss, which chooses its forward once and keeps it as an attribute
        if isinstance(value, MethodType) and value.__self__ is loss:
            object.__setattr__(twin, name, MethodType(value.__func__, twin))
    for name, method in methods.items():
        object.__setattr__(twin, name, method)
    return twin
