"""The first columns of an orthogonal matrix, fitted to pairs of vectors, completed, and judged on held-out pairs.

A *frame* is (D, m): the first m columns of a rotation R, for the largest dim m. Only these matter to an objective. A
:class:`Candidate` says where the search for one starts and what is minimised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from mipic_st.numerics import masked, prefix_cosines, spearman
from mipic_st.transforms.fitting import BLOCK, minimise, row_orders
from mipic_st.transforms.objectives import RotationObjective
from mipic_st.transforms.pairs import Pairs
from mipic_st.validation import checked_count, checked_number

# Rows whose cosines with each other are ranked for the report.
_RANKED = 512
# Wider vectors than this are kept orthonormal by a QR decomposition: Cayley's map solves a D x D system in every step,
# and the backward pass of torch's Householder map takes 20 s at 4,096 values.
_CAYLEY_UP_TO = 1024


class _Orthonormal(nn.Module):
    """Any D x m matrix to the orthonormal frame of its QR decomposition; a frame to itself."""

    def forward(self, free: Tensor) -> Tensor:
        frame, triangle = torch.linalg.qr(free)
        # QR may change a column's sign
        return frame * torch.where(triangle.diagonal() < 0, -1.0, 1.0)


class _Frame(nn.Module):
    """The first columns of an orthogonal matrix, started at the identity."""

    def __init__(self, width: int, columns: int, device: torch.device) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.eye(width, columns, device=device))
        # torch completes the start to a square matrix with random columns
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed all GPUs, too
            if width <= _CAYLEY_UP_TO:
                # Cayley's map has no inverse in torch, so the start goes in as a constant factor
                parametrizations.orthogonal(self, "columns", orthogonal_map="cayley", use_trivialization=True)
            else:
                parametrize.register_parametrization(self, "columns", _Orthonormal())


def checked_settings(
    width: int,
    *,
    dims: Sequence[int],
    contrastive_dims: Sequence[int] | None,
    batch_size: int,
    negatives: int,
    max_steps: int,
    learning_rate: float,
    held_out: float,
    seed: int,
    show_progress_bar: bool | None,
    **terms: float,
) -> tuple[RotationObjective, dict[str, Any], float]:
    """Arguments of ``fit_rotation``: the objective, the options of a candidate's fit, the held-out share."""
    options = {
        "batch_size": checked_count("batch_size", batch_size, least=2),
        "negatives": checked_count("negatives", negatives),
        "max_steps": checked_count("max_steps", max_steps),
        "learning_rate": checked_number("learning_rate", learning_rate, 0, exclusive=True),
        "generator": torch.Generator().manual_seed(checked_count("seed", seed, least=0)),
        "show_progress_bar": show_progress_bar,
    }
    held_out = checked_number("held_out", held_out, 0, 0.5, exclusive=True)
    return RotationObjective.below(width, dims, contrastive_dims, **terms), options, held_out


@dataclass(frozen=True, eq=False)
class Candidate:
    """One way to a frame.

    Attributes:
        name: For the report.
        objective: What is minimised.
        start: Where the search starts, orthogonal, (D, D); None is the identity, which is plain truncation.
    """

    name: str
    objective: RotationObjective
    start: Tensor | None = None

    def fit(
        self,
        training: Pairs,
        test: Pairs,
        *,
        batch_size: int,
        negatives: int,
        generator: torch.Generator,
        **schedule: Any,
    ) -> Tensor:
        """Minimise the objective over frames, (D, m); the one that the held-out part likes best is returned."""
        count, width = len(training), training.anchors.shape[1]
        batch_size = min(batch_size, count)
        module = _Frame(width, max(self.objective.dims), training.anchors.device)

        def frame() -> Tensor:
            return module.columns if self.start is None else self.start @ module.columns

        def loss(pairs: Pairs, rows: Tensor) -> Tensor:
            anchors, positives, others, same = pairs.batch(rows, batch_size)
            return self.objective(anchors, positives, frame(), negatives=others, same=same)

        return minimise(
            module.parameters(),
            lambda order: loss(training, order[: max(batch_size, negatives)]),
            lambda: loss(test, torch.arange(len(test))),
            frame,
            row_orders(count, batch_size, generator),
            description="Rotation",
            **schedule,
        )


def completed(frame: Tensor, training: Pairs) -> Tensor:
    """The orthogonal matrix that begins with the frame; the other columns follow by the variance they hold."""
    width, columns = frame.shape
    leading = _Orthonormal()(frame.double())
    rest = torch.linalg.qr(leading, mode="complete").Q[:, columns:]
    second = torch.zeros(width - columns, width - columns, dtype=torch.double, device=rest.device)
    for block in training.rows[:, 0].to(rest.device).split(BLOCK):
        part = F.normalize(training.anchors[block].double(), dim=1) @ rest
        second += part.T @ part
    order = torch.linalg.eigh(second).eigenvectors.flip(1)
    return torch.cat([leading, rest @ order], dim=1).float()


def off_orthogonal(matrix: Tensor) -> float:
    """How far a matrix is from orthogonal: the largest value of R^T R - I."""
    matrix = matrix.double()
    return float((matrix.T @ matrix - torch.eye(len(matrix), dtype=torch.double)).abs().max())


def held_out_report(test: Pairs, matrix: Tensor, dims: Sequence[int]) -> list[dict[str, float]]:
    """Truncation before and after the rotation, on rows that no step has seen."""
    anchors, positives, _, same = test.batch(torch.arange(len(test)), len(test))
    wanted = torch.arange(len(anchors), device=anchors.device)
    # ranks of all pairs of 2,048 rows would take more memory than the fit
    some = slice(_RANKED)
    reference = (anchors[some] @ positives[some].T).flatten().cpu().numpy()
    found: dict[str, list[Tensor]] = {"before": [], "after": []}
    kept: dict[str, list[float]] = {"before": [], "after": []}
    for when, rotated in (("before", (anchors, positives)), ("after", (anchors @ matrix, positives @ matrix))):
        for dim in dims:
            cosines = prefix_cosines(*rotated, dim)
            kept[when].append(spearman(cosines[some, some].flatten().cpu().numpy(), reference))
            found[when].append((masked(cosines, same).argmax(dim=1) == wanted).double())
    report = []
    for index, dim in enumerate(dims):
        change = found["after"][index] - found["before"][index]
        report.append(
            {
                "dim": dim,
                "accuracy_before": float(found["before"][index].mean()),
                "accuracy_after": float(found["after"][index].mean()),
                "similarity_before": kept["before"][index],
                "similarity_after": kept["after"][index],
                "change": float(change.mean()),
                "error": float(change.std() / len(change) ** 0.5),
            }
        )
    return report
