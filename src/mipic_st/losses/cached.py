"""MIPIC on losses with gradient caching, exactly and in the memory of one mini-batch.

Such a loss works in three stages: it embeds every mini-batch without gradients (1), computes the loss and its
gradients at the embeddings (2), and embeds again with gradients, in a hook of the backward pass, to carry them on (3).
Hidden states exist in stages 1 and 3 and are gone in between, so whatever the alignment terms need of a sentence
travels as further columns of its "embedding":

    packed = [ sentence embedding | SIA values per layer and prefix | phi_c(z_c) and z_{c+1} per PIC link | has text ]

Stage 2 splits them again; the gradient at the packed vector then runs, in stage 3, through the model and through the
projections. Projections are used in stages 1 and 3 only: a parameter used in stage 2 would miss the scale that the
outer backward pass applies (gradient accumulation, fp16).

The base loss is never touched: all this happens on a stand-in that shares its parameters and dies with the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any

import torch
from sentence_transformers.base.losses import uses_gradient_cache
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st.encoder.hidden_states import RecordedPass, Recorder

Minibatches = list[list[Tensor]]


def require_supported(loss: nn.Module) -> bool:
    """Tell whether a base loss caches gradients, and refuse one that does it in a way that cannot be served.

    Args:
        loss: The base loss.

    Returns:
        Whether :func:`cached_terms` has to be used.

    Raises:
        ValueError: If the loss wraps a cached loss, was changed by another wrapper, or has not the two methods that
            the cached losses of sentence-transformers have.
    """
    name = type(loss).__name__
    if not uses_gradient_cache(loss):
        inner = [type(child).__name__ for child in loss.modules() if child is not loss and uses_gradient_cache(child)]
        if inner:
            raise ValueError(
                f"loss={name} holds {inner[0]}, which embeds in its backward pass (gradient caching), where MIPICLoss "
                f"cannot follow through {name}. Give {inner[0]} itself to MIPICLoss, or a loss without caching."
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


def cached_terms(
    base: nn.Module,
    features: list[dict[str, Any]],
    labels: Tensor | None,
    dims: Sequence[tuple[int, float]],
    record: Callable[[], AbstractContextManager[Recorder]] | None = None,
    observe: Callable[[RecordedPass], Tensor] | None = None,
    align: Callable[[list[Tensor]], dict[str, Tensor]] | None = None,
    guard: Callable[[list[Tensor], list[Tensor]], None] | None = None,
    teach: Callable[[list[Tensor]], dict[str, Tensor]] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run a cached base loss at every dim, and the alignment terms beside it.

    Args:
        base: The base loss.
        features: One dict of model inputs per column.
        labels: Whatever the base loss takes.
        dims: (dim, weight) pairs for the base loss.
        record: Context in which the model's forward passes are recorded; None without alignment terms.
        observe: Turns one recorded pass of R sentences into (R, X): all that the alignment terms need of them.
        align: Turns these, one (B, X) tensor per column, into the weighted alignment terms.
        guard: Gets, before any gradient is computed, the embeddings of all mini-batches and the tensors that their
            gradients will arrive at.
        teach: Turns the embeddings, one (B, D) tensor per column, into the weighted term of a teacher.

    Returns:
        The terms, without gradient, and their sum, which has the gradient of all.
    """
    terms: dict[str, Tensor] = {}
    width, dtype = 0, torch.float32

    def embed_minibatch(
        sentence_feature: dict[str, Any],
        begin: int,
        end: int,
        with_grad: bool,
        copy_random_state: bool,
        random_state: Any = None,
    ) -> tuple[Any, ...]:
        nonlocal width, dtype
        assert record is not None
        assert observe is not None
        # Pooling without the prompt clears mask entries in place, which stage 3 must not find.
        feature = {key: value.clone() if key == "attention_mask" else value for key, value in sentence_feature.items()}
        with record() as recorder:
            embeddings, *rest = type(base).embed_minibatch(  # type: ignore[attr-defined]
                twin,
                sentence_feature=feature,
                begin=begin,
                end=end,
                with_grad=with_grad,
                copy_random_state=copy_random_state,
                random_state=random_state,
            )
        if len(recorder.passes) != 1:
            raise RuntimeError(
                f"MIPICLoss recorded {len(recorder.passes)} forward passes for one mini-batch of "
                f"{type(base).__name__}, expected one. Give the base loss and MIPICLoss the same model."
            )
        width, dtype = embeddings.shape[-1], embeddings.dtype
        with torch.set_grad_enabled(with_grad):
            packed = torch.cat([embeddings, observe(recorder.passes[0])], dim=-1)
        return packed, *rest

    def calculate_loss(reps: Minibatches, *args: Any, **kwargs: Any) -> Tensor:
        with_backward = kwargs.get("with_backward", False)
        total: Any = 0.0
        if with_backward and guard is not None:
            leaves = list(_flat(reps))
            guard([rep if width < 0 else rep[..., :width] for rep in leaves], leaves)
        for dim, weight in dims:
            cut = [[_cut(rep, width, dtype, dim) for rep in column] for column in reps]
            if not with_backward:
                value = type(base).calculate_loss(twin, cut, *args, **kwargs)  # type: ignore[attr-defined]
            else:
                # Leaves of their own: the base loss runs backward by itself, in chunks.
                parts = [[rep.detach().requires_grad_() for rep in column] for column in cut]
                value = type(base).calculate_loss(twin, parts, *args, **kwargs)  # type: ignore[attr-defined]
                for rep, leaf in zip(_flat(cut), _flat(parts), strict=True):
                    if leaf.grad is not None:
                        rep.backward(weight * leaf.grad)
            total = total + weight * value
        further: dict[str, Tensor] = {}
        if align is not None:
            further |= align([torch.cat([rep[..., width:] for rep in column]) for column in reps])
        if teach is not None:
            further |= teach([torch.cat([_embedding(rep, width, dtype) for rep in column]) for column in reps])
        terms["matryoshka"] = total.float() if further else total
        if further and with_backward:
            torch.stack(list(further.values())).sum().backward()
        terms.update({name: term.detach() for name, term in further.items()})
        return torch.stack([term.detach() for term in terms.values()]).sum()

    methods: dict[str, Callable[..., Any]] = {"calculate_loss": calculate_loss}
    if align is not None:
        methods["embed_minibatch"] = embed_minibatch
    else:
        width = -1
    twin = stand_in(base, **methods)
    loss = twin(features, labels)
    if not terms:
        raise RuntimeError(f"{type(base).__name__} did not call its calculate_loss: MIPICLoss cannot work on it.")
    return terms, loss


def _flat(columns: Minibatches) -> Iterator[Tensor]:
    return (rep for column in columns for rep in column)


def _embedding(rep: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The sentence embedding out of a packed one; nothing is packed where the width is negative."""
    return rep if width < 0 else rep[..., :width].to(dtype)


def _cut(rep: Tensor, width: int, dtype: torch.dtype, dim: int) -> Tensor:
    """The sentence embedding truncated and normalised as MatryoshkaLoss does it."""
    return F.normalize(_embedding(rep, width, dtype)[..., :dim], p=2, dim=-1)


def stand_in(loss: nn.Module, **methods: Callable[..., Any]) -> nn.Module:
    """Make an object that is the given loss in everything but a few methods. The loss itself is not touched.

    For losses that call their own methods again in the backward pass, long after any patch would have been taken off.

    Args:
        loss: The loss; parameters, submodules and hooks are shared.
        **methods: The methods to replace, as plain functions.

    Returns:
        The stand-in.
    """
    twin = copy.copy(loss)
    for name, value in vars(loss).items():
        # e.g. MegaBatchMarginLoss, which chooses its forward once and keeps it as an attribute
        if isinstance(value, MethodType) and value.__self__ is loss:
            object.__setattr__(twin, name, MethodType(value.__func__, twin))
    for name, method in methods.items():
        object.__setattr__(twin, name, method)
    return twin
