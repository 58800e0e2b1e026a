"""Vectors that belong together: which of them are the same text, queries held out, batches."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mipic_st.transforms.fitting import split_rows

logger = logging.getLogger(__name__)


def numbered(*columns: Tensor) -> list[Tensor]:
    """One number per distinct vector, over all columns, in the order in which they come first."""
    known: dict[bytes, int] = {}
    ids = []
    for column in columns:
        # short names: the rows' own bytes would hold all vectors once more
        names = (hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in column.cpu().numpy())
        ids.append(torch.tensor([known.setdefault(name, len(known)) for name in names], dtype=torch.long))
    return ids


def first_rows(ids: Tensor) -> Tensor:
    """The row in which each number comes first, in this order."""
    return torch.as_tensor(np.sort(np.unique(ids.numpy(), return_index=True)[1]))


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which vectors belong together, and which of them are the same text. The vectors stay where they came in."""

    anchors: Tensor  # queries, (A, D)
    positives: Tensor  # what belongs to them, (P, D)
    rows: Tensor  # of anchors and positives, (N,)
    ids: Tensor  # one number per distinct vector, of anchors and positives, (N, 2)
    # all pairs of ids that belong together, also of other parts, (K, 2), sorted; None if no anchor has several
    known: Tensor | None

    @classmethod
    def of(cls, anchors: Tensor, positives: Tensor, ids: Tensor | None = None) -> Pairs:
        """Number the texts, unless ``ids`` does; pairs of equal texts are left out."""
        ids = torch.stack(numbered(anchors, positives), dim=1) if ids is None else ids
        rows = (ids[:, 0] != ids[:, 1]).nonzero().flatten()
        if not len(rows):
            raise ValueError("anchors and positives are the same vectors: give anchors only.")
        if len(rows) < len(anchors):
            logger.info("%d of %d pairs hold the same text twice and are left out.", len(ids) - len(rows), len(ids))
        known = ids[rows].unique(dim=0)
        several = len(known) > len(known[:, 0].unique())
        return cls(anchors, positives, rows, ids[rows], known if several else None)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: Tensor) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.anchors, self.positives, self.rows[chosen], self.ids[chosen], self.known)

    def split(self, share: float, generator: torch.Generator) -> tuple[Pairs, Pairs]:
        """Pairs to fit on and pairs held out: whole queries, whose texts are in no other pair.

        A positive of a held-out query may be one of another query too: it is a document that both find.
        """
        queries, group = self.ids[:, 0].unique(return_inverse=True)
        drawn = torch.randperm(len(queries), generator=generator)
        held, _ = split_rows(drawn, share)
        turn = drawn.argsort()[group]
        order = turn.argsort(stable=True)
        test, rest = order.tensor_split([int((turn < len(held)).sum())])
        asked, answers = self.ids[test, 0], self.ids[test, 1]
        shared = torch.isin(self.ids[rest, 1], asked) | torch.isin(self.ids[rest, 0], answers)
        training = rest[~shared]
        if len(training) < 2:
            raise ValueError(
                f"the {len(self)} pairs share so few texts that none is left next to the held-out ones: give pairs of "
                "more queries, or texts only."
            )
        if len(training) < len(rest):
            logger.info(
                "%d of %d pairs share a text with held-out queries and are left out.", int(shared.sum()), len(self)
            )
        return self.take(training), self.take(test)

    def batch(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Anchors and positives of the first ``size`` pairs, positives of the others, and which are no negatives."""
        device = self.anchors.device
        rows = self.rows[chosen].to(device)
        anchor, positive = self.ids[chosen[:size], 0], self.ids[chosen, 1]
        same = (positive == positive[:size, None]) | (positive == anchor[:, None])
        if self.known is not None:
            same |= self._answers(anchor, positive)
        same.fill_diagonal_(False)
        anchors, positives = self.anchors[rows[:size]], self.positives[rows]
        for own in (anchors, positives):  # copies of the rows
            own /= own.norm(dim=1, keepdim=True).clamp_min(1e-12)
        mask = same.to(device) if bool(same.any()) else None
        return anchors, positives[:size], positives[size:], mask

    def _answers(self, anchor: Tensor, positive: Tensor) -> Tensor:
        """Where a positive is known to belong to an anchor, (B, M)."""
        assert self.known is not None
        # pairs of the batch's anchors, then a table of anchors and distinct positives
        left, right = (torch.searchsorted(self.known[:, 0].contiguous(), anchor, right=side) for side in (False, True))
        counts = right - left
        row = torch.repeat_interleave(torch.arange(len(anchor)), counts)
        of_row = torch.arange(len(row)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        answer = self.known[left[row] + of_row, 1]
        distinct, column = positive.unique(return_inverse=True)
        at = torch.searchsorted(distinct, answer).clamp(max=len(distinct) - 1)
        there = distinct[at] == answer
        table = torch.zeros(len(anchor), len(distinct), dtype=torch.bool)
        table[row[there], at[there]] = True
        return table[:, column]
