"""The paper's settings as data, and the rules that extend them to any depth and any dims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipic_st.validation import checked_choice

PAPER_GAMMAS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Shares of tokens for the top-k sets of six prefixes (App. A.5)."""

CITATION = """
@misc{huy2026mipic,
    title={MIPIC: Matryoshka Representation Learning via Self-Distilled Intra-Relational and Progressive
           Information Chaining},
    author={Phung Gia Huy and Hai An Vu and Minh-Phuc Truong and Thang Duc Tran and Linh Ngo Van and
            Thanh Nguyen Hong and Trung Le},
    year={2026},
    eprint={2604.24374},
    archivePrefix={arXiv}
}
"""
"""BibTeX of the method."""


@dataclass(frozen=True)
class Recipe:
    """What the paper used for one backbone (Table 7, App. A.5): its shape, alpha of Eq. 18, and PIC's chain."""

    name: str
    depth: int
    width: int
    alpha: float
    pic_chain: tuple[tuple[int, int], ...]

    @property
    def sia_layers(self) -> tuple[int, ...]:
        """Layers that carry SIA: those of the chain."""
        return tuple(layer for _, layer in self.pic_chain)

    @property
    def dims(self) -> tuple[int, ...]:
        """The matryoshka dims, ascending."""
        return paper_dims(self.width)


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("tinybert-6l", 6, 768, 0.4, ((16, 1), (32, 2), (64, 3), (256, 4), (512, 5), (768, 6))),
        Recipe("bert-base", 12, 768, 0.4, ((16, 2), (32, 4), (64, 6), (128, 8), (256, 9), (512, 10), (768, 12))),
        Recipe("bge-m3", 24, 1024, 0.5, ((16, 1), (32, 4), (64, 7), (128, 11), (256, 15), (512, 19), (1024, 24))),
        Recipe("qwen3-0.6b", 28, 1024, 0.5, ((16, 2), (32, 6), (64, 12), (128, 16), (256, 20), (512, 24), (1024, 28))),
    )
}
"""The four published backbones by name (Table 7)."""

# Everything of the published formulation that does not depend on the backbone: Eq. 5, 6, 13, 14, 17 and Table 7.
# The random lift is an inference: the paper calls P a trainable linear map and names no initialisation.
# Gradients on both sides of SIA are those of the released notebooks; the paper's "teacher" could mean either.
PAPER_SETTINGS: dict[str, Any] = {
    "attention_weight": 1.0,
    "cka_weight": 1.0,
    "pic_weight": 1.0,
    "min_k": 8,
    "attention_temperature": 0.05,
    "chain_temperature": 0.05,
    "aggregation": "sum",
    "kl_direction": "prefix_full",
    "detach_full_width": False,
    "lift_init": "random",
    "token_importance": "similarity",
}
"""Arguments of MIPICLoss that make the published formulation, but for those that depend on the backbone."""

# As found in the first commit of the authors' repository; its other settings are the paper's.
RELEASED_SETTINGS: dict[str, Any] = PAPER_SETTINGS | {"alpha": 0.6, "attention_weight": 0.0, "chain_temperature": 0.07}
"""Arguments of MIPICLoss that make the authors' own BERT run, but for those that depend on the backbone."""


def find_recipe(depth: int, width: int) -> Recipe | None:
    """The published recipe for a backbone of this shape, if there is one."""
    return next((recipe for recipe in RECIPES.values() if (recipe.depth, recipe.width) == (depth, width)), None)


def spread(count: int, last: int) -> tuple[int, ...]:
    """``count`` different integers from 1 to ``last``, evenly spaced and ending at ``last``.

    Example:
        >>> spread(3, 12)
        (4, 8, 12)
    """
    return tuple(round((index + 1) * last / count) for index in range(count))


def default_gammas(count: int) -> tuple[float, ...]:
    """Ascending top-k shares for ``count`` prefixes: the published six, or 0.2 to 0.7 interpolated linearly.

    Example:
        >>> default_gammas(6)
        (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    """
    last, gammas = len(PAPER_GAMMAS) - 1, []
    for index in range(count):
        position = index * last / max(1, count - 1)
        lower = min(int(position), last - 1)
        share = position - lower
        gammas.append(round(PAPER_GAMMAS[lower] * (1 - share) + PAPER_GAMMAS[lower + 1] * share, 4))
    return tuple(gammas)


def default_chain(dims: Sequence[int], depth: int, width: int) -> tuple[tuple[int, int], ...]:
    """PIC's chain for any dims, depth and full width: ordered (dim, layer) pairs, fewer than two if there are none.

    The published pairs, where the backbone has a published shape and all dims are the paper's, with the full width.
    Otherwise one layer per dim, evenly spaced up to the last one; with more dims than layers, the dims are thinned
    evenly and the smallest and the largest stay (the rule that gives the published TinyBERT table, which leaves out
    128).

    Example:
        >>> default_chain([384, 64, 16], depth=6, width=384)
        ((16, 2), (64, 4), (384, 6))
    """
    dims = sorted(dims)
    recipe = find_recipe(depth, width)
    if recipe is not None and set(dims) <= set(recipe.dims):
        published = tuple(pair for pair in recipe.pic_chain if pair[0] in dims)
        if len(published) > 1 and published[-1] == (width, depth):
            return published
    if len(dims) > depth:
        dims = [dims[round(index * (len(dims) - 1) / max(1, depth - 1))] for index in range(depth)]
    return tuple(zip(dims, spread(len(dims), depth), strict=True))


def released_chain(dims: Sequence[int], depth: int, width: int) -> tuple[tuple[int, int], ...]:
    """PIC's chain in the authors' own BERT run, (16, 3) (128, 7) (768, 11) counted from zero, for any dims and depth.

    Its layers are thirds of the depth, its dims the smallest, the middle and the full one; none below two dims or
    layers.

    Example:
        >>> released_chain([16, 32, 64, 128, 256, 512, 768], depth=12, width=768)
        ((16, 4), (128, 8), (768, 12))
    """
    dims = sorted({*dims, width})
    chosen = sorted({dims[0], dims[len(dims) // 2], width})
    count = min(len(chosen), depth)
    return tuple(zip(chosen[-count:], spread(count, depth), strict=True)) if count > 1 else ()


def paper_layers(depth: int, width: int) -> tuple[int, ...]:
    """Layers that carry SIA in the paper: the published ones, or seven evenly spaced (all of a shallower model).

    Example:
        >>> paper_layers(6, 384)
        (1, 2, 3, 4, 5, 6)
    """
    recipe = find_recipe(depth, width)
    return recipe.sia_layers if recipe else spread(min(depth, 7), depth)


def paper_dims(width: int) -> tuple[int, ...]:
    """The paper's matryoshka dims for a full width: 16 to 512 as far as they are below it, and the width itself.

    Example:
        >>> paper_dims(384)
        (16, 32, 64, 128, 256, 384)
    """
    return (*(dim for dim in (16, 32, 64, 128, 256, 512) if dim < width), width)


def paper_alpha(depth: int, width: int) -> float:
    """Alpha of Eq. 18 in the paper: the published one, else 0.4 below 24 layers and 0.5 from there on."""
    recipe = find_recipe(depth, width)
    return recipe.alpha if recipe else 0.4 if depth < 24 else 0.5


def preset_settings(preset: str, dims: Sequence[int], shape: tuple[int, int] | None) -> dict[str, Any]:
    """The arguments of MIPICLoss that a preset stands for, if they differ from the defaults.

    ``shape`` is depth and width of the model, or None if its layers cannot be aligned.

    Example:
        >>> preset_settings("released", [384, 64, 16], (6, 384))["pic_chain"]
        ((16, 2), (64, 4), (384, 6))
    """
    checked_choice("preset", preset, ("default", "paper", "released", *RECIPES))
    recipe = RECIPES.get(preset)
    if recipe is not None and shape is not None and (recipe.depth, recipe.width) != shape:
        raise ValueError(
            f"preset={preset!r} was published for {recipe.depth} layers of width {recipe.width}, the model has "
            f"{shape[0]} of width {shape[1]}. Use preset='paper', which fits any shape."
        )
    if preset == "default":
        return {}
    settings = dict(PAPER_SETTINGS)
    if shape is not None:
        settings |= {"alpha": paper_alpha(*shape), "sia_layers": paper_layers(*shape)}
    if preset == "released":
        settings |= RELEASED_SETTINGS
        if shape is not None:
            settings["pic_chain"] = released_chain(dims, *shape) or None
    return settings
