"""The settings of MIPICLoss, each checked once. Their defaults are those of its signature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from torch import Tensor

from mipic_st.losses import sia
from mipic_st.validation import (
    as_list,
    checked_choice,
    checked_count,
    checked_dims,
    checked_flag,
    checked_number,
    is_number,
    is_whole,
    plain,
)

logger = logging.getLogger(__name__)

Aggregation = Literal["sum", "mean"]
TokenImportance = Literal["similarity", "attention"]


def _by(check: Callable[..., Any], *arguments: Any, **options: Any) -> dict[str, Any]:
    """Metadata of a field: how its value is checked."""
    return {"check": lambda name, value: check(name, value, *arguments, **options)}


_WEIGHT = _by(checked_number, 0)
_TEMPERATURE = _by(checked_number, 0, exclusive=True)
_LIFTS = ("identity", "orthogonal", "random", "frozen")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What MIPICLoss was given; the terms check ``sia_layers``, ``pic_chain`` and ``gammas`` against a model."""

    matryoshka_dims: tuple[int, ...]
    matryoshka_weights: tuple[float, ...]
    n_dims_per_step: int
    alpha: float = field(metadata=_by(checked_number, 0, 1))
    attention_weight: float = field(metadata=_WEIGHT)
    cka_weight: float = field(metadata=_WEIGHT)
    pic_weight: float = field(metadata=_WEIGHT)
    distill_weight: float = field(metadata=_WEIGHT)
    sia_layers: Sequence[int] | None
    pic_chain: Sequence[tuple[int, int]] | None
    gammas: Sequence[float] | None
    min_k: int = field(metadata=_by(checked_count))
    attention_temperature: float = field(metadata=_TEMPERATURE)
    chain_temperature: float = field(metadata=_TEMPERATURE)
    distill_temperature: float = field(metadata=_TEMPERATURE)
    aggregation: Aggregation = field(metadata=_by(checked_choice, ("sum", "mean")))
    kl_direction: sia.KLDirection = field(metadata=_by(checked_choice, ("prefix_full", "full_prefix")))
    detach_full_width: bool = field(metadata=_by(checked_flag))
    lift_init: sia.LiftInit | Literal["frozen"] = field(metadata=_by(checked_choice, _LIFTS))
    token_importance: TokenImportance = field(metadata=_by(checked_choice, ("similarity", "attention")))
    gather_across_devices: bool = field(metadata=_by(checked_flag))
    seed: int = field(metadata=_by(checked_count, least=0))

    def __post_init__(self) -> None:
        """Check every field that says how."""
        for each in fields(self):
            if check := each.metadata.get("check"):
                object.__setattr__(self, each.name, check(each.name, getattr(self, each.name)))

    @classmethod
    def checked(
        cls, width: int | None, *, matryoshka_dims: Any, matryoshka_weights: Any, n_dims_per_step: Any, **others: Any
    ) -> Self:
        """Settings for a model of this width, largest dim first."""
        dims = checked_dims("matryoshka_dims", matryoshka_dims, width)
        if width is not None and width not in dims:
            logger.warning(
                f"The model's full width {width} is not among matryoshka_dims {dims}, so the base loss will not train "
                "it. Add it unless that is meant."
            )
        pairs = sorted(zip(dims, _checked_weights(dims, matryoshka_weights), strict=True), reverse=True)
        return cls(
            matryoshka_dims=tuple(dim for dim, _ in pairs),
            matryoshka_weights=tuple(weight for _, weight in pairs),
            n_dims_per_step=_checked_dims_per_step(n_dims_per_step, len(dims)),
            **others,
        )

    @property
    def aligns(self) -> bool:
        """Whether SIA or PIC is switched on."""
        return self.alpha < 1 and bool(self.attention_weight or self.cka_weight or self.pic_weight)

    @property
    def distils(self) -> bool:
        """Whether a larger model is followed."""
        return self.alpha < 1 and bool(self.distill_weight)

    @property
    def draws_dims(self) -> bool:
        """Whether the base loss is applied to some dims in each training step, not to all."""
        return 0 < self.n_dims_per_step < len(self.matryoshka_dims)

    def aggregate(self, values: Tensor) -> Tensor:
        """Add or average over layers, prefixes, links and dims (Eq. 13, 14 and 17)."""
        return values.sum() if self.aggregation == "sum" else values.mean()


def _checked_weights(dims: list[int], weights: Any) -> list[float]:
    weights = [1] * len(dims) if weights is None else as_list("matryoshka_weights", weights, "[1, 1, 2]")
    if len(weights) != len(dims):
        raise ValueError(
            f"matryoshka_weights must have one weight per dimension: {len(dims)} dims, {len(weights)} weights."
        )
    if wrong := [weight for weight in weights if not is_number(weight) or not 0 <= weight < float("inf")]:
        raise ValueError(f"matryoshka_weights must be finite and >= 0, got {wrong}.")
    return weights


def _checked_dims_per_step(count: Any, dims: int) -> int:
    count = plain(count)
    if not is_whole(count) or (count != -1 and count < 1):
        raise ValueError(f"n_dims_per_step must be -1 (all dims) or at least 1, got {count!r}.")
    if count > dims:
        raise ValueError(f"n_dims_per_step={count} exceeds the number of matryoshka_dims, {dims}. Use -1 for all.")
    return int(count)
