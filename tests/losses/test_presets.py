"""The published tables, literally, and the rules that extend them to any depth and dims."""

import numpy as np
import pytest

from mipic_st.losses import presets

# Table 7 and App. A.5, as printed in the paper: name, depth, width, dims, alpha, layers, chain (dim@layer)
TABLE = [
    ("tinybert-6l", 6, 768, "16 32 64 128 256 512 768", 0.4, "1 2 3 4 5 6", "16@1 32@2 64@3 256@4 512@5 768@6"),
    (
        "bert-base",
        12,
        768,
        "16 32 64 128 256 512 768",
        0.4,
        "2 4 6 8 9 10 12",
        "16@2 32@4 64@6 128@8 256@9 512@10 768@12",
    ),
    (
        "bge-m3",
        24,
        1024,
        "16 32 64 128 256 512 1024",
        0.5,
        "1 4 7 11 15 19 24",
        "16@1 32@4 64@7 128@11 256@15 512@19 1024@24",
    ),
    (
        "qwen3-0.6b",
        28,
        1024,
        "16 32 64 128 256 512 1024",
        0.5,
        "2 6 12 16 20 24 28",
        "16@2 32@6 64@12 128@16 256@20 512@24 1024@28",
    ),
]

DIMS = [
    (16, 32, 64, 128, 256, 384),
    (8, 384),
    (384,),
    (5, 6, 7, 8, 9, 10, 11, 12, 13),
    (16, 32, 64, 128, 256, 512, 768),
    tuple(range(8, 385, 8)),
]


def numbers(text):
    return tuple(int(word) for word in text.split())


def pairs(text):
    return tuple(tuple(int(part) for part in word.split("@")) for word in text.split())


def test_recipes_are_the_four_published():
    """Nothing is called published that is not, and each recipe knows its name."""
    assert set(presets.RECIPES) == {row[0] for row in TABLE}
    assert all(recipe.name == name for name, recipe in presets.RECIPES.items())


@pytest.mark.parametrize(("name", "depth", "width", "dims", "alpha", "layers", "chain"), TABLE)
def test_published_tables_by_name(name, depth, width, dims, alpha, layers, chain):
    """Every number of the table."""
    recipe = presets.RECIPES[name]
    assert (recipe.depth, recipe.width, recipe.alpha) == (depth, width, alpha)
    assert presets.paper_dims(recipe.width) == numbers(dims)
    assert recipe.sia_layers == numbers(layers)
    assert recipe.pic_chain == pairs(chain)


@pytest.mark.parametrize(("name", "depth", "width", "dims", "alpha", "layers", "chain"), TABLE)
def test_published_tables_by_shape(name, depth, width, dims, alpha, layers, chain):
    """Depth and width alone lead to the same table, for dims in any order."""
    assert presets.find_recipe(depth, width).name == name
    assert presets.paper_dims(width) == numbers(dims)
    assert presets.paper_alpha(depth, width) == alpha
    assert presets.paper_layers(depth, width) == numbers(layers)
    assert presets.default_chain(numbers(dims), depth, width) == pairs(chain)
    assert presets.default_chain(numbers(dims)[::-1], depth, width) == pairs(chain)


def test_published_gammas():
    """App. A.5: .2 to .7 over six prefixes; a single one takes the smallest share."""
    assert presets.PAPER_GAMMAS == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert presets.default_gammas(6) == (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert presets.default_gammas(1) == (0.2,)


def test_published_settings():
    """Temperatures of Table 7, plain sums (Eq. 13, 14, 17), KL(prefix || full) of Eq. 6, smallest set 8."""
    settings = presets.PAPER_SETTINGS
    assert settings["attention_temperature"] == settings["chain_temperature"] == 0.05
    assert settings["aggregation"] == "sum"
    assert settings["kl_direction"] == "prefix_full"
    assert settings["min_k"] == 8
    assert settings["attention_weight"] == settings["cka_weight"] == settings["pic_weight"] == 1
    assert settings["token_importance"] == "similarity"


@pytest.mark.parametrize(("depth", "width"), [(6, 384), (12, 384), (12, 1024), (24, 768), (1, 16)])
def test_other_shapes_have_no_recipe(depth, width):
    """A shape that the paper does not have finds none."""
    assert presets.find_recipe(depth, width) is None


@pytest.mark.parametrize("depth", range(2, 41))
@pytest.mark.parametrize("dims", DIMS)
def test_chain_of_any_shape(dims, depth):
    """Dims and layers rise strictly, within bounds; the last pair is the largest dim at the last layer."""
    chain = presets.default_chain(dims, depth, width=max(dims))
    chosen, layers = zip(*chain, strict=True)
    assert list(chosen) == sorted(set(chosen))
    assert list(layers) == sorted(set(layers))
    assert set(chosen) <= set(dims)
    assert layers[0] >= 1
    assert chain[-1] == (max(dims), depth)
    assert chosen[0] == min(dims)
    assert len(chain) == min(len(dims), depth)


@pytest.mark.parametrize("depth", [5, 6, 12, 23])
@pytest.mark.parametrize("dims", DIMS)
def test_chain_are_evenly_spaced(dims, depth):
    """Outside the published shapes, gaps between layers, and between thinned dims, differ by one at the most."""
    chain = presets.default_chain(dims, depth, width=4096)
    layers = [0, *(layer for _, layer in chain)]
    gaps = np.diff(layers)
    assert gaps.max() - gaps.min() <= 1
    ranks = np.diff([sorted(dims).index(dim) for dim, _ in chain])
    assert len(ranks) == 0 or ranks.max() - ranks.min() <= 1


def test_thinning_gives_the_published_tinybert_dims():
    """Seven dims on six layers leave out the same dim as the published table, by rule and not by look-up."""
    published = pairs(TABLE[0][-1])
    assert presets.default_chain((16, 32, 64, 128, 256, 512, 800), 6, 800) == (*published[:-1], (800, 6))


@pytest.mark.parametrize(("name", "depth", "width", "dims", "alpha", "layers", "chain"), TABLE)
def test_chain_of_a_published_shape_with_fewer_dims(name, depth, width, dims, alpha, layers, chain):
    """Any two or more of the paper's dims give a rising chain that ends with the largest at the last layer."""
    dims = numbers(dims)
    for leave_out in range(1, 2 ** len(dims) - 1):
        some = [dim for i, dim in enumerate(dims) if not leave_out >> i & 1]
        if len(some) < 2:
            continue
        chain = presets.default_chain(some, depth, width)
        assert len(chain) >= 2, some
        assert chain[-1] == (max(some), depth), some
        assert list(chain) == sorted(chain), some
        assert len({layer for _, layer in chain}) == len(chain), some


@pytest.mark.parametrize("dims", DIMS)
def test_one_layer_has_no_chain(dims):
    """A chain needs two layers: with one, fewer than two chain come back."""
    assert len(presets.default_chain(dims, 1, max(dims))) < 2


@pytest.mark.parametrize("count", range(2, 31))
def test_gammas_of_any_number_of_prefixes(count):
    """From 0.2 to 0.7, rising, on the straight line between the published six, four decimals kept."""
    gammas = presets.default_gammas(count)
    expected = np.interp(np.linspace(0, 5, count), range(6), presets.PAPER_GAMMAS)
    np.testing.assert_allclose(gammas, expected, rtol=0, atol=5.1e-5)
    assert (gammas[0], gammas[-1]) == (0.2, 0.7)
    assert list(gammas) == sorted(set(gammas))
    assert all(gamma == round(gamma, 4) for gamma in gammas)


def test_spread():
    """Distinct, rising, evenly spaced, from at least 1 to exactly the last, for every count that fits; rounded."""
    assert presets.spread(5, 12) == (2, 5, 7, 10, 12)
    for last in range(1, 61):
        for count in range(1, last + 1):
            layers = presets.spread(count, last)
            gaps = np.diff([0, *layers])
            assert len(layers) == count
            assert layers[-1] == last
            assert gaps.min() >= 1
            assert gaps.max() - gaps.min() <= 1 or gaps.max() <= last / count + 1


@pytest.mark.parametrize("depth", range(1, 41))
def test_layers_of_any_depth(depth):
    """Seven layers, or all of a shallower model, rising to the last one."""
    layers = presets.paper_layers(depth, width=384)
    assert len(layers) == min(7, depth)
    assert list(layers) == sorted(set(layers))
    assert layers[0] >= 1
    assert layers[-1] == depth


@pytest.mark.parametrize(
    ("width", "dims"),
    [
        (384, (16, 32, 64, 128, 256, 384)),
        (512, (16, 32, 64, 128, 256, 512)),
        (4096, (16, 32, 64, 128, 256, 512, 4096)),
        (16, (16,)),
        (8, (8,)),
    ],
)
def test_dims_of_any_width(width, dims):
    """The paper's dims below the width, then the width, once."""
    assert presets.paper_dims(width) == dims


@pytest.mark.parametrize(("depth", "alpha"), [(1, 0.4), (12, 0.4), (23, 0.4), (24, 0.5), (48, 0.5)])
def test_alpha_of_any_depth(depth, alpha):
    """0.4 as for the two small published backbones, 0.5 from the depth of the two large ones on."""
    assert presets.paper_alpha(depth, width=384) == alpha
