"""Invariants of export_truncated: equals its grid cell, loads without this package, leaves the original alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import sentences
from evaluation_fixtures import tiny_model
from mipic_st.embedding_store import EmbeddingStore
from mipic_st.export import export_truncated, measure_speedup


@pytest.mark.parametrize("kind", ["bert", "distilbert", "modernbert", "qwen3"])
@pytest.mark.parametrize(("layer", "dim"), [(2, 8), (3, None), (None, 12), (4, 32), (1, 5)])
def test_export_equals_its_grid_cell(tmp_path, kind, layer, dim):
    """Embeddings of the cut model equal the (layer, dim) cell to 1e-5, pre-norm backbones included."""
    model = tiny_model(tmp_path, kind)
    texts = sentences(20)
    store = EmbeddingStore(model, None if layer is None else [layer])
    cell = store.view(dim or 32, layer=layer).encode(texts, show_progress_bar=False)
    exported = export_truncated(model, layer, dim)
    np.testing.assert_allclose(exported.encode(texts), cell, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "modernbert"])
def test_intermediate_layer_of_a_pre_norm_model_passes_the_final_norm(tmp_path, kind):
    """By hand: pooled norm(h_l), not pooled h_l; the two differ here."""
    model = tiny_model(tmp_path, kind, normalize=False)
    cell = EmbeddingStore(model, [2]).view(32, layer=2).encode(["the cat"], show_progress_bar=False)
    backbone = model[0].auto_model
    features = model.preprocess(["the cat"])
    with torch.no_grad():
        states = backbone(
            input_ids=features["input_ids"], attention_mask=features["attention_mask"], output_hidden_states=True
        ).hidden_states
        norm = backbone.norm if kind == "qwen3" else backbone.final_norm
        by_hand = norm(states[2])[0].mean(0).numpy()
        raw = states[2][0].mean(0).numpy()
    np.testing.assert_allclose(cell[0], by_hand, atol=1e-5)
    assert np.abs(raw - by_hand).max() > 0.1


def test_export_loads_without_this_package(tmp_path):
    """A saved export loads in a process that cannot import mipic_st, and gives the same vectors."""
    exported = export_truncated(tiny_model(tmp_path), layer=2, dim=8)
    exported.save_pretrained(str(tmp_path / "small"))
    code = (
        "import sys; sys.modules['mipic_st'] = None\n"
        "from sentence_transformers import SentenceTransformer\n"
        f"m = SentenceTransformer({str(tmp_path / 'small')!r}, device='cpu')\n"
        "print(','.join(repr(float(x)) for x in m.encode(['the cat sits'])[0]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = np.array([float(x) for x in run.stdout.strip().splitlines()[-1].split(",")])
    np.testing.assert_allclose(loaded, exported.encode(["the cat sits"])[0], atol=1e-6)


def test_export_leaves_the_original_alone(tmp_path):
    """The model that was cut still has all layers, its own weights and its width."""
    model = tiny_model(tmp_path)
    before = model.encode(["the cat sits"])
    exported = export_truncated(model, layer=1, dim=4)
    with torch.no_grad():
        for parameter in exported.parameters():
            parameter.zero_()
    np.testing.assert_array_equal(model.encode(["the cat sits"]), before)
    assert model[0].auto_model.config.num_hidden_layers == 4
    assert exported[0].auto_model.config.num_hidden_layers == 1


def test_export_keeps_prompts_and_similarity(tmp_path):
    """Prompts and the similarity function go along."""
    model = tiny_model(tmp_path, prompts={"query": "query: "}, similarity_fn_name="dot")
    exported = export_truncated(model, dim=8)
    assert exported.prompts["query"] == "query: "
    assert exported.similarity_fn_name == "dot"


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize(("truncate_dim", "dim", "expected"), [(8, None, 8), (8, 4, 4), (8, 16, 16), (99, None, 32)])
def test_a_truncated_model_is_exported_as_it_is(tmp_path, layer, truncate_dim, dim, expected):
    """truncate_dim of the loaded model is its width, unless dim says otherwise."""
    model = tiny_model(tmp_path, truncate_dim=truncate_dim)
    exported = export_truncated(model, layer, dim)
    cell = EmbeddingStore(model, None if layer is None else [layer]).view(expected, layer=layer)
    got = exported.encode(["the cat sits"])
    assert got.shape == (1, expected)
    np.testing.assert_allclose(got, cell.encode(["the cat sits"], show_progress_bar=False), atol=1e-5)


def test_numpy_arguments_are_numbers(tmp_path):
    """Layer and dim may come out of an array."""
    exported = export_truncated(tiny_model(tmp_path), np.int64(2), np.int64(8))
    assert (exported[0].auto_model.config.num_hidden_layers, exported.get_embedding_dimension()) == (2, 8)


def test_a_flag_is_no_string(tmp_path):
    """normalize="no" would count as True."""
    with pytest.raises(TypeError, match="normalize must be True or False"):
        export_truncated(tiny_model(tmp_path), dim=8, normalize="no")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to cut"),
        ({"layer": 0}, "layer must be .* from 1 to the model's depth of 4"),
        ({"layer": 5}, "layer must be .* from 1 to the model's depth of 4"),
        ({"dim": 0}, "dim must be > 0"),
        ({"dim": 33}, "exceed the model's width of 32"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    """Layer and dim out of range raise with the range in the message."""
    with pytest.raises(ValueError, match=message):
        export_truncated(tiny_model(tmp_path), **arguments)


def test_speedup_is_measured(tmp_path):
    """A one-layer cut of a sixteen-layer model has fewer parameters and encodes faster."""
    model = tiny_model(tmp_path, layers=16)
    figures = measure_speedup(model, export_truncated(model, layer=1, dim=8), repeats=3)
    assert figures["speedup"] > 1.2
    assert figures["parameters_cut"] < figures["parameters_full"]


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"repeats": 1.5}, {"batch_size": 0}, {"batch_size": "8"}])
def test_bad_counts_are_named(tmp_path, bad):
    """Rounds and texts per pass are whole and at least one."""
    model = tiny_model(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be an integer >= 1"):
        measure_speedup(model, model, **bad)
