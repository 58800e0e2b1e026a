"""Word weights: how much each token counts in the mean of an early layer's token states.

:func:`fit_word_weights` learns them on arrays; a model has them as a module of sentence-transformers.
:mod:`mipic_st.transforms.layer_cut` does both for a layer cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from mipic_st.encoder.surgery import word_weights_module
from mipic_st.numerics import no_autocast
from mipic_st.transforms.base import Transform
from mipic_st.transforms.cut_fits import ridge_map
from mipic_st.transforms.fitting import BATCH, BLOCK, minimise, row_orders, split_rows
from mipic_st.transforms.objectives import CutObjective
from mipic_st.validation import checked_count, checked_dims, checked_number

# Share of all tokens above which a token counts as frequent.
_RARE = 0.01


def weighted_means(states: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """Mean token states, (N, H), of texts that stand one after another: (T, H), with weights (T,) and lengths (N,).

    Example:
        >>> weighted_means(torch.tensor([[1.0], [5.0], [7.0]]), torch.tensor([3.0, 1.0, 1.0]), torch.tensor([2, 1]))
        tensor([[2.],
                [7.]])
    """
    texts = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    sums = states.new_zeros(len(lengths), states.shape[1]).index_add(0, texts, states * weights[:, None])
    return sums / weights.new_zeros(len(lengths)).index_add(0, texts, weights)[:, None]


@dataclass(frozen=True, eq=False, repr=False)
class WordWeights(Transform):
    """How much each token counts in the mean of a text's token states; the report has one row, the objective."""

    kind: ClassVar[str] = "word weights"
    weights: Tensor  # by token number, (V,), float32; their mean over the tokens of the fit is 1
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)  # on held-out texts, of plain and of weighted means

    def __call__(self, states: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Weighted means, (N, H), of token states, see :func:`weighted_means`; tokens are their numbers, (T,)."""
        return weighted_means(states, self.weights[tokens], lengths)

    def to_modules(self, model: SentenceTransformer) -> Sequence[nn.Module]:
        """The weights as sentence-transformers' own ``WordWeights`` with the model's tokenizer, before the pooling."""
        return [word_weights_module(model, self.weights)]

    @property
    def gained(self) -> bool:
        """Whether they are better than the plain mean on held-out texts."""
        return any(row["weighted"] < row["plain"] for row in self.report)


def fit_word_weights(
    states: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    features: Tensor,
    targets: Tensor,
    dims: Sequence[int],
    *,
    vector_weight: float = 1.0,
    max_steps: int = 400,
    learning_rate: float = 1e-3,
    seed: int = 0,
    show_progress_bar: bool | None = None,
) -> WordWeights:
    r"""How much each token of the vocabulary counts in the mean of an early layer.

    At full depth "the" and a full stop move the mean little, at an early layer they still do:

    .. math:: w_t = \frac{a}{a + p_t} \exp(u \cdot e_t), \quad z = \sum_t w_t h_t \Big/ \sum_t w_t

    with the states h (T, H) of all texts, one after another, the share p of the token among all, a = 0.01, and its
    static embedding e, a row of ``features`` (V, E). So only the few numbers of u are learned, with a map W to
    ``targets``, the texts' full-depth vectors (N, D), on :class:`mipic_st.transforms.objectives.CutObjective`; W is
    better fitted to all texts afterwards. A tenth of the texts, one batch at most, is held out.

    Source:
        The first factor: Arora et al., A Simple but Tough-to-Beat Baseline for Sentence Embeddings, ICLR 2017. Its a
        was chosen on STS13 and SICK validation with layer 3 of all-MiniLM-L6-v2.
    """
    vector_weight = checked_number("vector_weight", vector_weight, 0)
    objective = CutObjective(checked_dims("dims", dims, targets.shape[1]), vector_weight)
    max_steps = checked_count("max_steps", max_steps, least=0)
    learning_rate = checked_number("learning_rate", learning_rate, 0, exclusive=True)
    if not int(lengths.sum()) == len(tokens) == len(states) or len(lengths) != len(targets):
        raise ValueError(
            f"lengths must say how the tokens are shared out among the texts, got {len(lengths)} lengths with a sum of "
            f"{int(lengths.sum())} for {len(tokens)} tokens, {len(states)} states and {len(targets)} texts."
        )
    if len(lengths) < 4:
        raise ValueError(f"{len(lengths)} texts are too few for word weights: give a few thousand.")
    if int(lengths.min()) < 1:
        raise ValueError(f"lengths holds {int(lengths.min())} in row {int(lengths.argmin())}: leave out empty texts.")
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < len(features):
        raise ValueError(
            f"tokens must be from 0 to {len(features) - 1}, the rows of features, got {int(tokens.min())} to "
            f"{int(tokens.max())}."
        )
    # in parts, for the token states fill the memory that is set aside for them
    if not all(bool(part.isfinite().all()) for whole in (states, targets) for part in whole.split(BLOCK)):
        raise ValueError("states and targets must be finite, they hold nan or inf.")
    generator = torch.Generator().manual_seed(seed)
    test, seen = split_rows(torch.randperm(len(lengths), generator=generator), 0.1, most=BATCH)
    starts = lengths.cumsum(0) - lengths
    known, places, counts = tokens.unique(return_inverse=True, return_counts=True)
    rare = (_RARE / (_RARE + counts / counts.sum())).log()
    embeddings = features[known].float()
    usable = embeddings[embeddings.isfinite().all(dim=1)]
    center = usable.mean(dim=0) if len(usable) else torch.zeros(features.shape[1])
    # so that u learns ten times as fast as W, whatever the embeddings' size
    spread = ((usable - center).std() * features.shape[1] ** 0.5 / 10) if len(usable) else 1.0

    def placed(embeddings: Tensor) -> Tensor:
        # a token whose embedding is no vector is weighed by how often it occurs, alone
        centred = (embeddings.float() - center) / spread
        return centred.masked_fill(~centred.isfinite().all(dim=1, keepdim=True), 0.0)

    embeddings = placed(embeddings)

    def means(rows: Tensor, logs: Tensor) -> Tensor:
        """Of some texts, with the logarithm of a weight for each known token."""
        shift = starts[rows] - (lengths[rows].cumsum(0) - lengths[rows])
        at = torch.arange(int(lengths[rows].sum())) + torch.repeat_interleave(shift, lengths[rows])
        return weighted_means(states[at].float(), logs[places[at]].exp(), lengths[rows])

    def seen_means(logs: Tensor) -> Tensor:
        # few texts at once: their token states are copied, in float32
        return torch.cat([means(rows, logs) for rows in seen.split(BATCH)])

    def loss(rows: Tensor, logs: Tensor, weight: Tensor) -> Tensor:
        return objective(means(rows, logs), targets[rows], weight)

    with no_autocast(targets), torch.inference_mode(False), torch.enable_grad():
        start = seen_means(rare)
        scale = start.square().mean().sqrt()
        free = (ridge_map(start, targets[seen]) * scale).requires_grad_()
        direction = torch.zeros(features.shape[1], requires_grad=True)
        best = minimise(
            [free, direction],
            lambda rows: loss(seen[rows[:BATCH]], rare + embeddings @ direction, free / scale),
            lambda: loss(test, rare + embeddings @ direction, free / scale),
            lambda: direction,
            row_orders(len(seen), min(BATCH, len(seen)), generator),
            max_steps=max_steps,
            learning_rate=learning_rate,
            description="Word weights",
            show_progress_bar=show_progress_bar,
        )
    with torch.no_grad():
        logs, plain = rare + embeddings @ best, torch.zeros_like(rare)
        report = {
            name: float(loss(test, values, ridge_map(seen_means(values), targets[seen])))
            for name, values in (("plain", plain), ("weighted", logs))
        }
        # a token that no text holds gets no weight outside of those that were seen
        weights = torch.cat([placed(part) @ best for part in features.split(BLOCK)])
        weights[known] = logs
        weights = weights.clamp(logs.min(), logs.max()).exp()
        weights = weights / (weights[known] * counts).sum() * counts.sum()
    return WordWeights(weights, tuple(objective.dims), [report])
