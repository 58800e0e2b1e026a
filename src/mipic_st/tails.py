"""What the fits of linear tails have in common: vectors that are checked, cosines of prefixes, steps on held-out rows.

A tail is a linear map behind the pooling, fitted on vectors that are encoded once, without a gradient through the
encoder: the rotation (:mod:`mipic_st.rotation`) or the tail of a layer cut (:mod:`mipic_st.layer_cuts`). Both end up as
an ordinary ``Dense(bias=False, Identity)`` of sentence-transformers, so a saved model loads without this package.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, WordWeights
from torch import Tensor, nn
from torch.nn import functional as F

from mipic_st._checks import missing_extra
from mipic_st.backbone import NO_CUT, is_linear

if TYPE_CHECKING:
    import pandas as pd
    from sentence_transformers import SentenceTransformer

# Rows that are held out at most, and rows per block of long sums.
BLOCK = 2048
# Steps between two looks at the held-out part.
_CHECK_EVERY = 10
_MASKED = -1e4


def as_tensor(name: str, vectors: Any) -> Tensor:
    """Floating numbers in a tensor, without a copy where torch can do without one."""
    if not isinstance(vectors, (np.ndarray, Tensor)):
        raise TypeError(f"{name} must be a NumPy array or a tensor of vectors, got {type(vectors).__name__}.")
    if isinstance(vectors, Tensor) and vectors.is_floating_point():
        return vectors
    if isinstance(vectors, np.ndarray) and np.issubdtype(vectors.dtype, np.floating):
        # torch takes no reversed rows and no foreign byte order, and warns of a file that is mapped for reading
        return torch.as_tensor(np.require(vectors, vectors.dtype.newbyteorder("="), ["C", "W"]))
    raise TypeError(f"{name} must hold floating numbers, got {vectors.dtype}; quantised vectors cannot be turned.")


def checked_vectors(name: str, vectors: Any) -> Tensor:
    """(N, D), finite, no zeros; float32 on the device they are on."""
    tensor = as_tensor(name, vectors)
    if tensor.ndim != 2 or not len(tensor) or tensor.shape[1] < 2:
        raise ValueError(f"{name} must have the shape (N, D) with D of 2 or more, got {tuple(tensor.shape)}.")
    tensor = tensor.detach().float()
    lengths = torch.cat([block.square().sum(dim=1) for block in tensor.split(BLOCK)])
    if bad := (~lengths.isfinite()).nonzero().flatten().tolist():
        raise ValueError(f"{name} holds NaN or infinite values in {len(bad)} of {len(tensor)} rows, first in {bad[0]}.")
    if bad := (lengths == 0).nonzero().flatten().tolist():
        raise ValueError(
            f"{name} holds {len(bad)} zero vectors, the first in row {bad[0]}: they have no direction, leave them out."
        )
    return tensor


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    prompt: str | None = "",
    route: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = False,
) -> np.ndarray:
    """Full-width vectors, float32, each distinct text encoded once.

    Args:
        model: The model.
        texts: Texts, any of them more than once.
        prompt: Stands before each; "" is none, None what ``encode`` does by default.
        route: Of a Router; None is its own default route.
        batch_size: Texts per forward pass.
        show_progress_bar: None is as the log level says, like ``encode``.

    Returns:
        (len(texts), D).
    """
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    task: dict[str, Any] = {} if route is None else {"task": route}
    vectors = model.encode(
        list(distinct),
        prompt=prompt,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        truncate_dim=NO_CUT,
        convert_to_numpy=True,
        **task,
    )
    return np.asarray(vectors, dtype=np.float32)[[distinct[text] for text in texts]]


def encode_columns(
    model: SentenceTransformer,
    columns: Mapping[str, Sequence[str]],
    *,
    prompts: Mapping[str, str | None],
    routes: Mapping[str, str | None],
    batch_size: int,
    show_progress_bar: bool | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of some columns, where a text that is in several of them has the same vector to the last bit.

    Encoded apart, it would stand in batches of other lengths, and rounding would make two texts of it.

    Args:
        model: The model.
        columns: Texts by name.
        prompts: By column, see :func:`encode_texts`.
        routes: By column, see there.
        batch_size: See there.
        show_progress_bar: See there.

    Yields:
        Name and vectors of each column; those of one prompt and one route come together.
    """
    alike: dict[tuple[str | None, str | None], list[str]] = {}
    for name in columns:
        alike.setdefault((prompts[name], routes[name]), []).append(name)
    for (prompt, route), names in alike.items():
        joined = [text for name in names for text in columns[name]]
        vectors = encode_texts(
            model, joined, prompt=prompt, route=route, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        ends = np.cumsum([len(columns[name]) for name in names])[:-1]
        yield from zip(names, np.split(vectors, ends), strict=True)


def prefix_cosines(anchors: Tensor, positives: Tensor, dim: int) -> Tensor:
    """Cosine of every anchor with every positive after the cut to ``dim``.

    Args:
        anchors: (B, m).
        positives: (M, m).
        dim: At most m.

    Returns:
        (B, M).

    Example:
        >>> prefix_cosines(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), dim=2)
        tensor([[0.6000]])
    """
    left, right = (F.normalize(part[:, :dim], dim=1, eps=1e-6) for part in (anchors, positives))
    return left @ right.T


def masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Cosines with those under the mask out of the running."""
    return values if mask is None else values.masked_fill(mask, _MASKED)


def similarity_kl(cosines: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """KL of a batch's similarities to those that a teacher sees, the mean over rows.

    Args:
        cosines: The student's, (B, M).
        wanted: Logarithms of the teacher's softmax at the same temperature, (B, M); one serves all dims.
        temperature: tau of the student's softmax.

    Returns:
        Scalar.
    """
    return F.kl_div((cosines / temperature).log_softmax(dim=1), wanted, reduction="batchmean", log_target=True)


def row_orders(count: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Rows for one step after the other: the step's batch first, then the others; each row once an epoch."""
    while True:
        order = torch.randperm(count, generator=generator)
        for position in range(0, count - batch_size + 1, batch_size):
            yield order.roll(-position)


def minimise(
    parameters: Iterable[nn.Parameter | Tensor],
    objective: Callable[[Tensor], Tensor],
    held_out: Callable[[], Tensor],
    current: Callable[[], Tensor],
    orders: Iterator[Tensor],
    *,
    max_steps: int,
    learning_rate: float,
    description: str,
    show_progress_bar: bool | None,
) -> Tensor:
    """Adam along a cosine, with the best step on held-out rows kept, the start among them.

    Args:
        parameters: What is learnt.
        objective: Rows of a step to the scalar that is minimised.
        held_out: The same on rows that no step sees.
        current: The map as it stands.
        orders: Rows for one step after the other, see :func:`row_orders`.
        max_steps: Steps.
        learning_rate: The first one.
        description: Title of the progress bar.
        show_progress_bar: Show it. Default: as the log level says.

    Returns:
        The best map of those that were looked at: every tenth one, and the last.
    """
    from tqdm.auto import trange

    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max_steps)
    best, best_value = current().detach().clone(), float("inf")

    def look() -> None:
        nonlocal best, best_value
        with torch.no_grad():
            value = float(held_out())
            if value < best_value:
                best, best_value = current().clone(), value

    for step in trange(max_steps, desc=description, disable=not wants_bar(show_progress_bar)):
        if step % _CHECK_EVERY == 0:
            look()
        optimizer.zero_grad()
        objective(next(orders)).backward()
        optimizer.step()
        schedule.step()
    look()
    return best


def wants_bar(show_progress_bar: bool | None) -> bool:
    """Whether to show a progress bar: as asked, else where the log says what goes on, like ``encode``."""
    if show_progress_bar is None:
        return logging.getLogger("mipic_st").getEffectiveLevel() in (logging.INFO, logging.DEBUG)
    return show_progress_bar


def identity_dense(weight: Tensor, like: nn.Module) -> Dense:
    """A bias-free identity Dense for a map of rows.

    Args:
        weight: (H, d).
        like: What it will stand behind: device and precision are those of its last weight.

    Returns:
        The module.
    """
    *_, reference = like.parameters()
    # a clone: files hold whole storages only, and a slice has a larger one
    return _linear(weight.T.clone(memory_format=torch.contiguous_format).to(reference.device, reference.dtype))


def _linear(weight: Tensor, bias: Tensor | None = None, **names: Any) -> Dense:
    """A Dense without activation, of given values; torch would draw random ones first."""
    with torch.random.fork_rng(devices=[]):
        return Dense(
            in_features=weight.shape[1],
            out_features=weight.shape[0],
            bias=bias is not None,
            activation_function=nn.Identity(),
            init_weight=weight,
            init_bias=bias,
            **names,
        )


def linear_end(modules: Sequence[nn.Module]) -> Dense | None:
    """The Dense into whose weight a further linear map of the vectors can be multiplied.

    Args:
        modules: A model's modules, without Normalize at the end.

    Returns:
        The last module if it is a linear Dense; in a layer cut with word weights the one in front of the mean, which
        commutes with it; else None.
    """
    if is_linear(modules[-1]):
        return modules[-1]  # type: ignore[return-value]
    if [type(module) for module in modules[-3:]] == [Dense, WordWeights, Pooling]:
        dense: Any = modules[-3]
        if modules[-1].pooling_mode == "mean" and is_linear(dense, "token_embeddings"):
            return dense
    return None


def with_map(modules: Sequence[nn.Module], weight: Tensor) -> list[nn.Module]:
    """A model's modules and a linear map of its vectors: multiplied into a Dense where there is one, or behind them.

    Args:
        modules: Without Normalize at the end; they stay as they are.
        weight: The map, (D, d), of rows.

    Returns:
        The modules of a model that gives d values.
    """
    dense: Any = linear_end(modules)
    if dense is None:
        like = next(module for module in reversed(modules) if next(module.parameters(), None) is not None)
        return [*modules, identity_dense(weight, like)]

    def times(values: Tensor) -> Tensor:
        return (weight.T.double() @ values.detach().cpu().double()).to(values)

    old = dense.linear
    merged = _linear(
        times(old.weight),
        None if old.bias is None else times(old.bias),
        module_input_name=dense.module_input_name,
        module_output_name=dense.module_output_name,
    )
    result = [merged if module is dense else module for module in modules]
    if isinstance(result[-1], Pooling):
        result[-1] = Pooling(weight.shape[1], "mean")
    return result


def spearman(values: Any, others: Any) -> float:
    """Rank correlation."""
    from scipy.stats import spearmanr

    return float(spearmanr(values, others).statistic)


def table_of(rows: list[dict[str, float]]) -> pd.DataFrame:
    """A report as a table, one row per dict."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(missing_extra("the table needs pandas", "eval")) from error
    return pd.DataFrame(rows)
