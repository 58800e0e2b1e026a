"""The terms of Eq. 18 other than the base loss: what each needs of a sentence, and how a batch is reduced.

A term watches the base loss's own forward passes. What mixes no sentences it computes while the states are there
(``observe``); what mixes them, when all sentences of the batch have been seen (``reduce``). A gradient-cached base loss
keeps no states, so whatever ``reduce`` needs has to be among the columns that ``observe`` gives.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Protocol

import torch
from sentence_transformers.util import all_gather
from torch import Tensor, distributed, nn

from mipic_st.encoder.hidden_states import RecordedPass, require_eager_attention
from mipic_st.encoder.structure import Backbone
from mipic_st.losses import pic, presets, sia
from mipic_st.losses.distillation import similarity_divergence
from mipic_st.losses.settings import Settings
from mipic_st.processes import processes
from mipic_st.validation import as_list, checked_chain, checked_layers, checked_pairs, is_number, is_whole, plain

logger = logging.getLogger(__name__)


class Term(Protocol):
    """One term of Eq. 18; a ``torch.nn.Module`` if it is added to a loss.

    Example:
        >>> class Spread(nn.Module):
        ...     name = "spread"
        ...
        ...     def observe(self, recorded):
        ...         return recorded.vectors(layer=2)
        ...
        ...     def reduce(self, columns):
        ...         return {"spread": -torch.cat(columns).var(dim=0).mean()}
        >>> loss.add_term(Spread())  # doctest: +SKIP
    """

    @property
    def name(self) -> str:
        """Its name in the loss, and the prefix of its parameters behind ``mipic_projections``."""

    def observe(self, recorded: RecordedPass) -> Tensor:
        """All it needs of the R sentences of one forward pass, (R, X), each sentence by itself."""

    def reduce(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """What :meth:`observe` gave, (B, X) for each input column, as weighted scalars, but for ``1 - alpha``."""


def make_terms(settings: Settings, model: nn.Module, backbone: Backbone) -> list[nn.Module]:
    """SIA and PIC for a model, as far as they are switched on and there is something to align."""
    prefixes = tuple(sorted(dim for dim in settings.matryoshka_dims if dim < backbone.width))
    terms: list[nn.Module] = []
    # Seeded on the side: the same projections on every rank, and the caller's random stream stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # torch.manual_seed would seed all GPUs, too
        # PIC first, so that options of SIA do not change its heads.
        if settings.pic_weight and len(chain := _checked_chain(settings, backbone)) > 1:
            terms.append(PICTerm(settings, chain))
        if (settings.attention_weight or settings.cka_weight) and prefixes:
            terms.insert(0, SIATerm(settings, backbone, prefixes))
            if settings.token_importance == "attention":
                require_eager_attention(model)
    if not terms:
        logger.warning(
            f"matryoshka_dims={list(settings.matryoshka_dims)} has no prefix below the width of {backbone.width} to "
            "align, so SIA and PIC are off."
        )
    return terms


class SIATerm(nn.Module):
    """L_SIA in its two parts (Eq. 4-14), with the lifts P as parameters unless they are frozen."""

    name = "sia"

    def __init__(self, settings: Settings, backbone: Backbone, prefixes: tuple[int, ...]) -> None:
        super().__init__()
        self.settings, self.prefixes, self.width = settings, prefixes, backbone.width
        given: Any = backbone.depth if settings.sia_layers is None else settings.sia_layers
        given = [given] if is_whole(plain(given)) else given
        fix = ", or switch SIA off with attention_weight=cka_weight=0"
        self.layers = checked_layers("sia_layers", given, backbone.depth, otherwise=fix)
        self.gammas = _checked_gammas(settings.gammas, len(prefixes))
        self.attentions = "no"
        if settings.token_importance == "attention":
            self.attentions = "detached" if settings.detach_full_width else "with_gradient"
        if settings.attention_weight and settings.lift_init != "frozen":
            for layer in self.layers:
                lifts = {str(dim): sia.initial_lift(dim, self.width, settings.lift_init) for dim in prefixes}
                self.add_module(str(layer), nn.ParameterDict(lifts))

    def lifts(self, layer: int) -> list[Tensor] | None:
        """The lifts P of one layer, ascending, or None if the attention term is off."""
        if not self.settings.attention_weight:
            return None
        if self.settings.lift_init == "frozen":
            return [sia.initial_lift(dim, self.width) for dim in self.prefixes]
        return [self.get_parameter(f"{layer}.{dim}") for dim in self.prefixes]

    def per_sentence(self, recorded: RecordedPass, layer: int) -> sia.SIATerms:
        """SIA of one layer, per sentence and prefix (Eq. 4-12)."""
        settings = self.settings
        return sia.sia_terms(
            recorded.tokens(layer),
            recorded.vectors(layer),
            recorded.mask & recorded.has_text[:, None],
            self.prefixes,
            self.lifts(layer),
            self.gammas,
            min_k=settings.min_k,
            temperature=settings.attention_temperature,
            kl_direction=settings.kl_direction,
            detach_full_width=settings.detach_full_width,
            full_attention=recorded.attention(layer),
            with_cka=bool(settings.cka_weight),
        )

    def observe(self, recorded: RecordedPass) -> Tensor:
        """Per layer the values of Eq. 6 and 11 for each prefix, and whether CKA is defined."""
        return _side_by_side(part for layer in self.layers for part in self.per_sentence(recorded, layer))

    def reduce(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """Means over sentences, added over layers and prefixes (Eq. 13 and 14)."""
        parts = [part.flatten(0, 1) for part in _split(columns, [len(self.prefixes)] * (3 * len(self.layers)))]
        attention, cka, valid = parts[0::3], parts[1::3], parts[2::3]
        terms = {}
        if weight := self.settings.attention_weight:
            values = torch.stack([part.mean(dim=0) for part in attention])
            terms["sia_attention"] = weight * self.settings.aggregate(values)
        if weight := self.settings.cka_weight:
            counts = [part.detach().sum(dim=0).clamp(min=1) for part in valid]
            values = torch.stack([part.sum(dim=0) / count for part, count in zip(cka, counts, strict=True)])
            terms["sia_cka"] = weight * self.settings.aggregate(values)
        return terms


class PICTerm(nn.Module):
    """L_PIC (Eq. 15-17) along (dim, layer) pairs, with the heads phi as parameters."""

    name = "pic"

    def __init__(self, settings: Settings, chain: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        self.settings, self.chain = settings, chain
        for index, ((dim, _), (next_dim, _)) in enumerate(pairwise(chain)):
            self.add_module(str(index), pic.chain_head(dim, next_dim))

    def links(self, recorded: RecordedPass) -> list[tuple[Tensor, Tensor]]:
        """(phi_c(z_c), z_{c+1}) of each link, (R, dim) each; the second is a constant."""
        vectors = [recorded.vectors(layer)[:, :dim] for dim, layer in self.chain]
        return [
            (pic.predict_next(head, vector), target.detach())
            for head, (vector, target) in zip(self.children(), pairwise(vectors), strict=True)
        ]

    def observe(self, recorded: RecordedPass) -> Tensor:
        """The two sides of each link, and whether the sentence has a token."""
        return _side_by_side([*(side for link in self.links(recorded) for side in link), recorded.has_text[:, None]])

    def reduce(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """InfoNCE of each link, added. Negatives come from the same column, however columns were batched."""
        *sides, has_text = _split(columns, [dim for dim, _ in self.chain[1:] for _ in range(2)] + [1])
        offset, targets, valid = 0, [side.detach() for side in sides[1::2]], has_text[..., 0].detach()
        if self.settings.gather_across_devices and processes() > 1:
            # No gradient flows into targets, so plain gathering is exact.
            *targets, valid = (all_gather(t.transpose(0, 1).contiguous()).transpose(0, 1) for t in (*targets, valid))
            offset = distributed.get_rank() * len(columns[0])
        values = [
            pic.chain_info_nce(predicted, target, self.settings.chain_temperature, offset, valid > 0)
            for predicted, target in zip(sides[0::2], targets, strict=True)
        ]
        return {"pic": self.settings.pic_weight * self.settings.aggregate(torch.stack(values))}


@dataclass(frozen=True)
class DistillationTerm:
    """The similarities that a larger model sees in one batch; ``base`` is the base loss's name, for messages."""

    settings: Settings
    base: str
    larger: Tensor  # its vectors, (B, columns, T)
    name = "distillation"

    @classmethod
    def of(cls, settings: Settings, base: str, features: list[dict[str, Tensor]], labels: Any) -> DistillationTerm:
        """The term for a batch, whose labels are the larger model's vectors."""
        if len(features) < 2:
            raise ValueError("distill_weight compares two columns of texts or more, and there is one. Give pairs.")
        if not isinstance(labels, Tensor) or labels.ndim != 3 or labels.shape[1] != len(features):
            got = f"a tensor of shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"distill_weight={settings.distill_weight:g} needs the larger model's vectors of these {len(features)} "
                f"columns as labels, (B, {len(features)}, T), got {got}. mipic_st.add_teacher_vectors puts them into a "
                "dataset; an evaluation dataset needs them too."
            )
        return cls(settings, base, labels)

    def observe(self, recorded: RecordedPass) -> Tensor:
        """The sentence vectors."""
        return recorded.sentence_embedding

    def reduce(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """The divergences, added over dims; all of them take part, however many the base loss is applied to."""
        count, expected = self.larger.shape[:2]
        if (len(columns), len(columns[0])) != (expected, count):
            raise RuntimeError(
                f"{self.base} ran the model on {sum(map(len, columns))} sentences, and labels are the larger model's "
                f"vectors of {expected} columns of {count}. Give labels of the same rows; with a loss that runs the "
                "model on other texts than those of its columns set distill_weight=0."
            )
        larger = self.larger.to(columns[0].device, torch.float32).transpose(0, 1)
        divergences = similarity_divergence(
            torch.stack(columns), larger, self.settings.matryoshka_dims, self.settings.distill_temperature
        )
        return {"distillation": self.settings.distill_weight * self.settings.aggregate(divergences)}


class Observers:
    """The terms of one batch, side by side in one tensor per forward pass, and apart again; each times the weight."""

    def __init__(
        self, terms: Sequence[Term], weight: float, record: Callable[[], AbstractContextManager[list[RecordedPass]]]
    ) -> None:
        self.terms, self.weight, self.record = terms, weight, record
        self._sizes: list[int] = []

    def recording(self) -> AbstractContextManager[list[RecordedPass]]:
        """Where the base loss runs the model; without a term nothing is recorded."""
        return self.record() if self.terms else nullcontext([])

    def observe(self, recorded: RecordedPass) -> Tensor:
        """(R, X): all that the terms need of R sentences."""
        parts = [term.observe(recorded) for term in self.terms]
        self._sizes = [part.shape[1] for part in parts]
        return _side_by_side(parts)

    def reduce(self, columns: list[Tensor]) -> dict[str, Tensor]:
        """One (B, X) per input column to weighted scalars."""
        parts = zip(*(column.split(self._sizes, dim=1) for column in columns), strict=True)
        reduced = [term.reduce(list(part)) for term, part in zip(self.terms, parts, strict=True)]
        return {name: self.weight * value for scalars in reduced for name, value in scalars.items()}


def _side_by_side(parts: Sequence[Tensor] | Iterator[Tensor]) -> Tensor:
    """Join tensors of as many rows, in float32 at least."""
    parts = list(parts)
    kind = reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)
    return torch.cat([part.to(kind) for part in parts], dim=1)


def _split(columns: list[Tensor], sizes: list[int]) -> list[Tensor]:
    """What was joined, (columns, B, size) each."""
    return [torch.stack(part) for part in zip(*(column.split(sizes, dim=1) for column in columns), strict=True)]


def _checked_chain(settings: Settings, backbone: Backbone) -> tuple[tuple[int, int], ...]:
    if settings.pic_chain is None:
        return presets.default_chain(settings.matryoshka_dims, backbone.depth, backbone.width)
    return checked_chain("pic_chain", checked_pairs("pic_chain", settings.pic_chain, backbone.depth, backbone.width))


def _checked_gammas(gammas: Any, prefixes: int) -> tuple[float, ...]:
    if gammas is None:
        return presets.default_gammas(prefixes)
    gammas = tuple(as_list("gammas", gammas, "[0.2, 0.4, 0.7]"))
    if len(gammas) != prefixes:
        raise ValueError(
            f"gammas must have one share per prefix below the full width: {prefixes} prefixes, {len(gammas)} gammas."
        )
    if wrong := [gamma for gamma in gammas if not is_number(gamma) or not 0 < gamma <= 1]:
        raise ValueError(f"gammas must be shares of the tokens in (0, 1], got {wrong}.")
    if list(gammas) != sorted(gammas):
        raise ValueError(f"gammas must ascend with the prefix, so that the sets are nested, got {gammas}.")
    return tuple(float(gamma) for gamma in gammas)
