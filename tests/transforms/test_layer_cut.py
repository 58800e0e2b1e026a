"""Invariants of layer cuts: the maps, the report, the model that is exported with them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense

from conftest import TAILS, WIDTH
from mipic_st.deploy.truncated import export_truncated
from mipic_st.transforms.layer_cut import LayerCuts, fit_layer_cuts
from mipic_st.transforms.model_rotation import rotate_model
from transforms_fixtures import DIMS, ROTATE, TEXTS, cosines, rotate_until_gained, unit


def test_under_inference_mode_a_model_stays_trainable(tiny_model):
    """What is put into a model, and a cut copy, must not be made of tensors that autograd refuses."""
    model = tiny_model(normalize=True)
    with torch.inference_mode():
        rotate_until_gained(model)
        cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=5)
        cut = export_truncated(model, layer=2, dim=8, cuts=cuts)
    for each in (model, cut):
        loss = each.train()(each.preprocess(["a dog", "the cat"]))["sentence_embedding"].sum()
        loss.backward()
        assert all(parameter.grad is not None for parameter in each[-2].parameters())


def test_cuts_of_another_state_of_the_model_are_refused(tiny_model):
    """A rotation changes what the cuts were fitted to; an export would give vectors of the old space."""
    model = tiny_model(normalize=True)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=0)
    export_truncated(model, layer=2, dim=8, cuts=cuts)
    rotate_until_gained(model)
    with pytest.raises(ValueError, match="cuts were fitted when the model gave other vectors: it was rotated, trained"):
        export_truncated(model, layer=2, dim=8, cuts=cuts)
    again = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=0)
    export_truncated(model, layer=2, dim=8, cuts=again)
    model.default_prompt_name, model.prompts = "query", {"query": "find: "}
    with pytest.raises(ValueError, match="its prompts changed"):
        export_truncated(model, layer=2, dim=8, cuts=again)


def test_cuts_are_fitted_as_the_model_encodes(tiny_model):
    """With its default prompt, unless another one is given; an empty one is none."""
    model = tiny_model(normalize=True)
    model.prompts, model.default_prompt_name = {"q": "the old woman "}, "q"
    options = {"layers": [2], "dims": [8], "max_steps": 0}
    default, named, none = (
        fit_layer_cuts(model, TEXTS, prompt=prompt, **options).maps[2] for prompt in (None, "the old woman ", "")
    )
    assert torch.equal(default, named)
    model.default_prompt_name = None
    assert torch.equal(none, fit_layer_cuts(model, TEXTS, **options).maps[2])
    assert (default - none).abs().max() > 1e-3


@pytest.mark.parametrize("word_weights", [False, True])
def test_a_text_of_nothing_is_named(tiny_model, word_weights):
    """It has no states, so it cannot be fitted; the message has the text, not a row of a shuffled part."""
    model = tiny_model(normalize=True)
    model[0].tokenizer.backend_tokenizer.post_processor = None  # no special tokens
    with pytest.raises(ValueError, match="texts holds '', of which the tokenizer leaves nothing: leave it out"):
        fit_layer_cuts(
            model, [*TEXTS, ""], layers=[2], dims=[8], max_steps=int(word_weights), word_weights=word_weights
        )


@pytest.mark.parametrize("tail", [None, "embeddinggemma", "labse", "stella"])
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_fitted_export_is_the_least_squares_map(tiny_model, architecture, tail, tmp_path):
    """The saved cut model gives pooled states times W, W fitted here by NumPy on the same texts."""
    if tail is not None and architecture != "bert":
        pytest.skip("one architecture is enough for the tails")
    model = tiny_model(architecture, tail=tail, normalize=tail is None)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], ridge=0.01, max_steps=0)
    export_truncated(model, 2, 8, cuts=cuts).save_pretrained(str(tmp_path / "cut"))
    loaded = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    assert loaded[0].auto_model.config.get_text_config().num_hidden_layers == 2
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    (dense,) = (module for module in loaded if isinstance(module, Dense))
    assert (dense.in_features, dense.out_features, dense.linear.bias) == (WIDTH, 8, None)

    plain = export_truncated(model, 2)
    pooled = SentenceTransformer(modules=list(plain.children())[:2], device="cpu").eval()
    states, full = (np.asarray(m.encode(TEXTS), dtype=np.float64) for m in (pooled, model))
    order = np.random.default_rng(0).permutation(len(TEXTS))[30:]
    gram = states[order].T @ states[order]
    weight = np.linalg.solve(gram + 0.01 * np.trace(gram) / WIDTH * np.eye(WIDTH), states[order].T @ unit(full)[order])
    np.testing.assert_allclose(loaded.encode(TEXTS[:30]), unit(states[:30] @ weight[:, :8]), atol=1e-4)


def test_grid_reports_every_cell(tiny_model):
    """Figures of plain, fitted and full depth against vectors of models that were really cut."""
    from datasets import Dataset
    from scipy.stats import spearmanr

    model = tiny_model(normalize=True)
    sts = Dataset.from_dict(
        {"sentence1": TEXTS[:40], "sentence2": TEXTS[40:80], "score": np.random.default_rng(0).random(40).tolist()}
    )
    cuts = fit_layer_cuts(model, TEXTS, dims=[8, WIDTH], sts=sts, max_steps=20)
    assert [(row["layer"], row["dim"]) for row in cuts.report] == [(1, 8), (1, 32), (2, 8), (2, 32)]
    assert cuts.to_frame().shape == (4, 9)
    held = [TEXTS[i] for i in np.random.default_rng(0).permutation(len(TEXTS))[:30]]
    upper = np.triu_indices(30, 1)
    reference = cosines(model, held)[upper]
    row = cuts.report[2]
    for kind, cut in (
        ("plain", export_truncated(model, 2, 8)),
        ("fitted", export_truncated(model, 2, 8, cuts=cuts)),
        ("full", export_truncated(model, dim=8)),
    ):
        assert row[f"similarity_{kind}"] == pytest.approx(spearmanr(cosines(cut, held)[upper], reference)[0], abs=1e-3)
        first, second = (unit(cut.encode(list(sts[name]))) for name in ("sentence1", "sentence2"))
        assert row[f"sts_{kind}"] == pytest.approx(spearmanr((first * second).sum(1), sts["score"])[0], abs=1e-3)
    ours = unit(export_truncated(model, 2, 8, cuts=cuts).encode(held))
    theirs = unit(model.encode(held)[:, :8])
    assert row["similarity_mixed"] == pytest.approx(spearmanr((ours @ theirs.T)[upper], reference)[0], abs=1e-3)


def test_cuts_are_refined_for_their_dims(tiny_model):
    """By default the map goes on from least squares, and what a dim keeps on held-out texts is not less."""
    model = tiny_model(normalize=True)
    plain, refined = (fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], max_steps=steps) for steps in (0, 150))
    assert not torch.equal(plain.maps[1], refined.maps[1])
    free = fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], max_steps=150, vector_weight=0)
    assert not torch.equal(free.maps[1], refined.maps[1])
    assert free.report[0]["similarity_mixed"] < refined.report[0]["similarity_mixed"] - 0.02
    assert refined.report[0]["similarity_fitted"] > plain.report[0]["similarity_fitted"]


def test_cut_of_a_rotated_model_aims_at_the_rotated_space(tiny_model):
    """After a rotation, the fitted cut gives the rotated vectors: at small dims it follows the full depth."""
    model = tiny_model(normalize=True)
    rotate_model(model, TEXTS, DIMS, **ROTATE)
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=100, vector_weight=10)
    small = export_truncated(model, 2, 8, cuts=cuts)
    full = model.encode(TEXTS[:50], truncate_dim=8, normalize_embeddings=True)
    assert (small.encode(TEXTS[:50]) * full).sum(axis=1).mean() > 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "texts": TEXTS}, "give a layer below 3"),
        ({"layer": 3, "dim": 8, "texts": TEXTS}, "give a layer below 3"),
        ({"layer": 1, "dim": 8, "texts": TEXTS[:20]}, "20 texts are too few for a map from 32 values: give 38 or more"),
    ],
)
def test_fits_that_make_no_sense_are_refused(tiny_model, arguments, message):
    """No layer to bridge, or too few texts."""
    with pytest.raises(ValueError, match=message):
        export_truncated(tiny_model(), **arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"texts": "one text"}, TypeError, "texts must be a list of texts, got one text"),
        ({"texts": [1, 2]}, TypeError, "texts must be a list of texts, it holds 1"),
        ({"texts": []}, ValueError, "texts has no texts"),
        ({"dims": [64]}, ValueError, "exceed the model's width of 32"),
        ({"batch_size": 0}, ValueError, "batch_size must be an integer >= 1, got 0"),
        ({"ridge": -1}, ValueError, "ridge must be >= 0"),
        ({"held_out": 0.9}, ValueError, "held_out must be"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"vector_weight": -1}, ValueError, "vector_weight must be >= 0 and finite, got -1"),
        ({"max_steps": -1}, ValueError, "max_steps must be an integer >= 0, got -1"),
        ({"sts": (["a"], ["b"], [1.0])}, ValueError, "sts must hold as many first texts"),
        ({"sts": (["a", "b"], ["b", "c"], [1.0, float("nan")])}, ValueError, "sts holds scores that are no finite"),
        ({"sts": (["a", "b"], [1, "c"], [1.0, 0.5])}, TypeError, "sts must be a list of texts, it holds 1"),
        ({"sts": (["a", "b"], ["b", "c"], ["x", "y"])}, TypeError, "sts must be three columns or lists, .* 'x'"),
        ({"sts": "sts.csv"}, TypeError, "sts must be three columns or lists"),
        ({"sts": {"sentence1": ["a"], "score": [1.0]}}, ValueError, r"sts lacks the columns \['sentence2'\]"),
        ({"prompt": 5}, TypeError, "prompt must be a text to put before others, or None, got 5"),
    ],
    ids=str,
)
def test_bad_arguments_of_cuts_are_named(tiny_model, monkeypatch, change, error, message):
    """Argument, value and fix in the message, before anything is encoded."""
    for name in ("encode_layers", "encode_tokens"):
        monkeypatch.setattr(f"mipic_st.transforms.layer_cut.{name}", lambda *_, **__: pytest.fail("texts were encoded"))
    arguments = {"texts": TEXTS, "layers": [1], "dims": [8]} | change
    with pytest.raises(error, match=message):
        fit_layer_cuts(tiny_model(), arguments.pop("texts"), **arguments)


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("tail", TAILS)
def test_tails_are_cut_to_their_first_values(tiny_model, tail, layer, tmp_path):
    """Saved and loaded, an export without a fit gives the first values of what the model's own tail gives."""
    from mipic_st.encoder.encoding import encode_layers

    model = tiny_model(tail=tail)
    export_truncated(model, layer, 8).save_pretrained(str(tmp_path / "cut"))
    loaded = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    wanted = encode_layers(model, TEXTS[:10], [layer or 3])[:, 0]
    np.testing.assert_allclose(loaded.encode(TEXTS[:10]), unit(wanted[:, :8]), atol=1e-5)


def test_cuts_of_another_layer_are_refused(tiny_model):
    """A grid serves the layers it was fitted for."""
    model = tiny_model()
    cuts = fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], max_steps=0)
    with pytest.raises(ValueError, match=r"cuts hold layers \[1\], not 2"):
        export_truncated(model, 2, 8, cuts=cuts)
    with pytest.raises(ValueError, match="both given"):
        export_truncated(model, 1, 8, cuts=cuts, texts=TEXTS)
    for layers in ([0], [3]):
        with pytest.raises(ValueError, match="layers must be from 1 to 2"):
            fit_layer_cuts(model, TEXTS, layers=layers)


def test_nothing_to_cut_and_nothing_to_keep(tiny_model):
    """A model of one layer has none to cut after; texts that are all one to the tokenizer have no similarities."""
    with pytest.raises(ValueError, match="the model has one layer, below which nothing can be cut"):
        fit_layer_cuts(tiny_model(layers=1), TEXTS)
    unknown = [f"unknown{number}" for number in range(60)]
    with pytest.raises(ValueError, match="all texts have the same vector"):
        fit_layer_cuts(tiny_model(), unknown, layers=[1], dims=[8], max_steps=5)


# --- what a reader sees -----------------------------------------------------------------------------------------------


def some_cuts():
    """Three layers, two dims, each figure told from all others; one is not a number."""
    report = [
        {"layer": layer, "dim": dim, "similarity_full": 0.9 + dim / 1000}
        | {f"similarity_{way}": layer / 10 + dim / 1000 + place / 100 for place, way in enumerate(WAYS)}
        for layer in (2, 1, 4)
        for dim in (4, 8)
    ]
    report[0]["similarity_mixed"] = float("nan")
    return LayerCuts({layer: torch.rand(5, 8) for layer in (1, 2, 4)}, (4, 8), report)


WAYS = ("plain", "fitted", "mixed")


def test_the_plot_shows_every_cell(tmp_path):
    """One heatmap for each way in the same colours, layers from the deepest, under the full depth; PNG and SVG."""
    cuts = some_cuts()
    figure = cuts.plot(tmp_path / "cuts")
    assert {path.name for path in tmp_path.iterdir()} == {"cuts.png", "cuts.svg"}
    *panels, _ = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["cut as it is", "fitted", "fitted with full depth"]
    found = {(row["layer"], row["dim"]): row for row in cuts.report}
    for axes, way in zip(panels, WAYS, strict=True):
        (image,) = axes.images
        wanted = [[100 * found[4, dim]["similarity_full"] for dim in (4, 8)]]
        wanted += [[100 * found[layer, dim][f"similarity_{way}"] for dim in (4, 8)] for layer in (4, 2, 1)]
        np.testing.assert_allclose(image.get_array().filled(np.nan), wanted)
        assert image.get_clim() == pytest.approx((100 * (0.1 + 0.004), 100 * 0.908))
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4", "8"]
        assert ("n/a" in [text.get_text() for text in axes.texts]) == (way == "mixed")
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["full", "4", "2", "1"]
    cuts.plot(str(tmp_path / "one.svg"))
    assert not (tmp_path / "one.png").exists()
    with pytest.raises(ValueError, match="the cuts have no report, so there is nothing to draw"):
        LayerCuts(cuts.maps, (4,), []).plot()


def test_cuts_in_a_notebook():
    """One line for a prompt, without the report's numbers; a table with a row per cell."""
    cuts = some_cuts()
    assert repr(cuts) == "LayerCuts(maps [1, 2, 4], word_weights [], dims [4, 8])"
    html = cuts._repr_html_()
    assert html.count("<tr>") == 1 + len(cuts.report)
    assert "<th>fitted with full depth</th>" in html
    assert "<td>50.8</td>" not in html
    assert "<td>40.8</td>" in html, "layer 4, dim 8, cut as it is"
    bare = LayerCuts(cuts.maps, (4,), [])
    assert bare._repr_html_() == f"<p>{bare!r}</p>"


def test_fits_share_a_model_in_threads(tiny_model):
    """Of hidden states, each gets its own; nothing stays on the model."""
    model, options = tiny_model("qwen3"), {"layers": [1], "dims": [8], "max_steps": 0, "word_weights": False}
    expected = fit_layer_cuts(tiny_model("qwen3"), TEXTS, **options).maps[1]
    with ThreadPoolExecutor(3) as pool:
        for cuts in pool.map(lambda _: fit_layer_cuts(model, TEXTS, **options), range(6)):
            torch.testing.assert_close(cuts.maps[1], expected, rtol=0, atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())
