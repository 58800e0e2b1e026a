"""What stops a batch before it harms the parameters: empty texts, terms and gradients that are not finite."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from torch import Tensor, nn

from mipic_st.encoder.hidden_states import pooled_tokens
from mipic_st.processes import processes

logger = logging.getLogger(__name__)


def require_base_loss(loss: Any, *wrappers: type) -> None:
    """Refuse what is no loss, and losses that run their own base loss several times."""
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss must be a sentence-transformers loss (a torch.nn.Module), got {loss!r}.")
    repeating = (*wrappers, MatryoshkaLoss, AdaptiveLayerLoss)
    if inner := next((module for module in loss.modules() if isinstance(module, repeating)), None):
        raise TypeError(
            f"loss holds a {type(inner).__name__}, which runs its own base loss several times. MIPICLoss takes its "
            "place: give MIPICLoss the base loss itself."
        )


def checked_features(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """One dict of model inputs per column; a single dict would be taken for a list of its keys."""
    features = list(sentence_features)
    if not all(isinstance(column, Mapping) for column in features):
        raise TypeError(
            "sentence_features must be a list with one dict of model inputs per column, e.g. "
            f"[model.preprocess(anchors), model.preprocess(positives)], got {type(sentence_features).__name__} of "
            f"{type(features[0]).__name__}."
        )
    return features


def require_managed(projections: nn.Module, first_batch: bool) -> None:
    """Say that nobody looks after a loss's projections; where several processes would drift apart, refuse it."""
    if next(projections.parameters(), None) is None:
        return
    fix = (
        "SentenceTransformerTrainer(..., callbacks=[MIPICCallback(loss)]) does; in a loop of your own do it, and set "
        "loss.managed = True."
    )
    if processes() > 1:
        raise RuntimeError(
            "MIPICLoss has projections, and in training by several processes nobody averages their gradients. "
            f"{fix} The defaults have no projections: lift_init='frozen' and pic_weight=0."
        )
    if first_batch:
        logger.warning(
            "MIPICLoss has projections, which nobody clips, saves with checkpoints or restores from them: a run that "
            f"is resumed goes on with others. {fix}"
        )


@contextmanager
def labels_are_taken(base: nn.Module, taken: bool) -> Iterator[None]:
    """Say in the base loss's own error, if it lacks labels, why it got none."""
    try:
        yield
    except (AttributeError, TypeError, ValueError) as error:
        if taken:
            error.add_note(
                f"With distill_weight, labels are the larger model's vectors, and {type(base).__name__} gets none. If "
                "it needs labels, nothing can be distilled with it: set distill_weight=0."
            )
        raise


@dataclass(frozen=True)
class Watch:
    """Looks after one batch; ``place`` says where in the training it is, ``pooling`` is the model's own, if known."""

    features: list[dict[str, Tensor]]
    place: str
    pooling: Any
    skips_nonfinite: bool  # a gradient scaler leaves out steps whose gradients are not finite

    def check_lengths(self) -> None:
        """Refuse a column of length 0, on which encoders fail, each in its own words."""
        masks = [column.get("attention_mask") for column in self.features]
        if any(isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == 0 for mask in masks):
            raise ValueError(f"MIPICLoss: a column has no token at all at {self.place}. {self.empty_texts()}")

    def check_finite(self, terms: dict[str, Tensor], embeddings: Sequence[Tensor] = ()) -> None:
        """Stop at a term that is nan or inf, before it reaches the parameters; where a scaler skips it, log it.

        The device is waited for once per batch. A zero vector has no direction, so the gradient of its normalisation
        can overflow while all values are finite: it is watched.
        """
        if not torch.is_grad_enabled():
            return
        finite = torch.stack([term.detach().float() for term in terms.values()]).isfinite().all()
        all_finite, *zero = torch.stack([finite, *map(_has_zero_vector, embeddings)]).tolist()
        if any(zero):
            self._watch_gradients([e for e, is_zero in zip(embeddings, zero, strict=True) if is_zero])
        if all_finite:
            return
        bad = ", ".join(f"{name} = {term.item()}" for name, term in terms.items() if not term.isfinite())
        if self._scaler_skips(next(iter(terms.values()))):
            logger.warning("MIPICLoss: %s at %s. The gradient scaler will skip this step.", bad, self.place)
            return
        advice = self.empty_texts() or (
            "Look for nan in the labels, for a learning rate that is too high, or, in fp16, for overflow: bf16 avoids "
            "it, and MIPICCallback lets fp16's gradient scaler skip such batches."
        )
        raise FloatingPointError(f"MIPICLoss: {bad} at {self.place}. No parameter was changed by this batch. {advice}")

    def guard(self, embeddings: list[Tensor], leaves: list[Tensor]) -> None:
        """Watch the gradients that arrive at the leaves if one of the embeddings has no direction."""
        if any(torch.stack([_has_zero_vector(embedding) for embedding in embeddings]).tolist()):
            self._watch_gradients(leaves)

    def empty_texts(self) -> str:
        """Which texts have no token, with the fix, or nothing."""
        found = []
        for number, column in enumerate(self.features, start=1):
            mask, offsets = column.get("attention_mask"), column.get("offsets")
            if isinstance(mask, Tensor) and mask.ndim == 2:
                lengths = pooled_tokens(mask, self.pooling, column.get("prompt_length"))
            elif isinstance(offsets, Tensor):  # StaticEmbedding: tokens of all texts in one row
                lengths = torch.cat([offsets, offsets.new_tensor([len(column["input_ids"])])]).diff()
            else:
                continue
            found += [f"text {row + 1} of input column {number}" for row in (lengths <= 0).nonzero()[:, 0].tolist()]
        if not found:
            return ""
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        return (
            f"There is no token in {', '.join(found[:3])}{more}: of an empty text the model pools nothing, and a "
            "vector of nothing has no direction. Leave empty texts out of the data, or use a tokenizer that adds "
            "special tokens."
        )

    def _scaler_skips(self, tensor: Tensor) -> bool:
        """Whether fp16's gradient scaler is at work: as it is known, or as autocast around the loss shows."""
        kind = tensor.device.type
        return self.skips_nonfinite or (
            torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        )

    def _watch_gradients(self, tensors: Sequence[Tensor]) -> None:
        """Stop in the backward pass, before any parameter changes, where a zero vector makes gradients overflow."""
        if self._scaler_skips(tensors[0]):
            return
        zeros = "The model gave a sentence vector of zeros, which has no direction: look for empty texts, zero weights."
        message = (
            f"MIPICLoss: the gradient of the base loss is not finite at {self.place}. No parameter was changed by "
            f"this batch. {self.empty_texts() or zeros}"
        )
        # Pooling divides by at least 1e-9: a gradient beyond this overflows there, if it has not before.
        limit = torch.finfo(torch.float32).max * 1e-9

        def check(gradient: Tensor) -> None:
            if not bool(gradient.detach().float().abs().max() < limit):
                raise FloatingPointError(message)

        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(check)


def _has_zero_vector(embeddings: Tensor) -> Tensor:
    """Whether any row is all zeros, as a boolean scalar on its device."""
    return (embeddings.detach() == 0).all(dim=-1).any()
