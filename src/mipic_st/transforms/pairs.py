"""Vectors that belong together: which of them are the same text, rows held out, neighbours, batches."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mipic_st.transforms.fitting import BLOCK, split_rows

logger = logging.getLogger(__name__)

# Texts whose nearest neighbours are looked for: all pairs of them are compared.
_NEIGHBOURHOOD = 20_000


def _digest(row: np.ndarray) -> bytes:
    """A short name for a vector; the rows' own bytes would hold all vectors once more."""
    return hashlib.blake2b(row.tobytes(), digest_size=16).digest()


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which vectors belong together, and which of them are the same text. The vectors stay where they came in.

    Attributes:
        anchors: (A, D).
        positives: (P, D), or None where there are texts only.
        rows: (N, 2), of anchors and positives, or (N, 1) where there are texts only, each once.
        ids: As rows: one number per distinct vector, of anchors and positives.
        texts: Number of distinct vectors.
    """

    anchors: Tensor
    positives: Tensor | None
    rows: Tensor
    ids: Tensor
    texts: int

    @classmethod
    def of(cls, anchors: Tensor, positives: Tensor | None) -> Pairs:
        """Number the texts; repeated texts, and pairs of equal ones, are left out."""
        known: dict[bytes, int] = {}
        columns = [anchors] if positives is None else [anchors, positives]
        ids = torch.tensor(
            [[known.setdefault(_digest(row), len(known)) for row in column.cpu().numpy()] for column in columns]
        ).T
        if positives is None:
            rows = torch.as_tensor(np.sort(np.unique(ids[:, 0].numpy(), return_index=True)[1]))
        else:
            rows = (ids[:, 0] != ids[:, 1]).nonzero().flatten()
            if not len(rows):
                raise ValueError("anchors and positives are the same vectors: give anchors only.")
        if len(rows) < len(anchors):
            logger.info("%d of %d rows repeat a text and are left out.", len(anchors) - len(rows), len(anchors))
        return cls(anchors, positives, rows[:, None].expand(-1, len(columns)), ids[rows], len(known))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Tensor) -> Pairs:
        """Some of the rows."""
        return Pairs(self.anchors, self.positives, self.rows[chosen], self.ids[chosen], self.texts)

    def split(self, share: float, generator: torch.Generator) -> tuple[Pairs, Pairs]:
        """Rows to fit on and rows held out, none of whose texts is in the others."""
        order = torch.randperm(len(self), generator=generator)
        if self.positives is None:
            order = order[:_NEIGHBOURHOOD]
        test, rest = split_rows(order, share)
        inside = torch.zeros(self.texts, dtype=torch.bool)
        inside[self.ids[test].flatten()] = True
        training = rest[~inside[self.ids[rest]].any(dim=1)]
        if len(training) < 2:
            raise ValueError(
                f"the {len(order)} rows share so few texts that none is left next to the held-out ones: give more "
                "distinct texts, or texts only."
            )
        return self.take(training), self.take(test)

    def with_positives(self) -> Pairs:
        """Pairs as they are; texts with their nearest neighbours at full width."""
        if self.positives is not None:
            return self
        vectors = F.normalize(self.anchors[self.rows[:, 0].to(self.anchors.device)], dim=1)
        found = []
        for start in range(0, len(vectors), BLOCK):
            cosines = vectors[start : start + BLOCK] @ vectors.T
            cosines.diagonal(start).fill_(-2.0)
            found.append(cosines.argmax(dim=1))
        nearest = torch.cat(found).cpu()
        rows, ids = (torch.cat([part, part[nearest]], dim=1) for part in (self.rows, self.ids))
        return Pairs(self.anchors, self.anchors, rows, ids, self.texts)

    def batch(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Anchors and positives of the first ``size`` pairs, positives of the others, and which are no negatives."""
        assert self.positives is not None
        rows = self.rows[chosen].to(self.anchors.device)
        anchor, positive = self.ids[chosen[:size], :1], self.ids[chosen, 1]
        same = (positive == positive[:size, None]) | (positive == anchor)
        same.fill_diagonal_(False)
        positives = F.normalize(self.positives[rows[:, 1]], dim=1)
        mask = same.to(self.anchors.device) if bool(same.any()) else None
        return F.normalize(self.anchors[rows[:size, 0]], dim=1), positives[:size], positives[size:], mask
