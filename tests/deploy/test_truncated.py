"""Invariants of export_truncated: equals its grid cell, loads without this package, leaves the original alone."""

import json
import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    BoW,
    Module,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from transformers import FunnelConfig, FunnelModel, GPTNeoConfig, LongformerConfig, RwkvConfig

from conftest import TAILS, WIDTH, assemble, make_tokenizer, put_lora, save_encoder, sentences
from evaluation_fixtures import tiny_model
from mipic_st import set_matryoshka_config
from mipic_st.deploy.truncated import export_truncated, measure_speedup
from mipic_st.encoder.encoding import encode_layers
from mipic_st.evaluation.store import EmbeddingStore


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


@pytest.mark.parametrize("layer", [None, 2])
@pytest.mark.parametrize("name", TAILS)
def test_every_tail_can_be_cut(tmp_path, name, layer):
    """Also one that ends in an activation, a residual or a norm, behind which the cut is a module of its own."""
    model = assemble(save_encoder(tmp_path / "encoder"), tail=name)
    cell = EmbeddingStore(model, None if layer is None else [layer]).view(8, layer=layer).encode(sentences(20))
    exported = export_truncated(model, layer, 8)
    np.testing.assert_allclose(exported.encode(sentences(20)), cell, atol=1e-5)
    exported.save_pretrained(str(tmp_path / "small"))
    loaded = SentenceTransformer(str(tmp_path / "small"), device="cpu")
    np.testing.assert_allclose(loaded.encode(sentences(20)), cell, atol=1e-5)


@pytest.mark.parametrize("layer", [None, 2])
def test_without_normalize_a_cut_is_that_of_encode(tmp_path, layer):
    """The model's own Normalize stays in front of it, as with truncate_dim."""
    model = assemble(save_encoder(tmp_path / "encoder"), normalize=True)
    exported = export_truncated(model, layer, 8, normalize=False)
    assert not isinstance(exported[-1], Normalize)
    whole = model if layer is None else export_truncated(model, layer)
    np.testing.assert_allclose(exported.encode(sentences(9)), whole.encode(sentences(9), truncate_dim=8), atol=1e-6)


def test_the_mode_of_the_model_is_left_alone(tmp_path):
    """Every module's: it is checked in evaluation mode, and a training goes on."""
    model = assemble(save_encoder(tmp_path / "encoder")).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    export_truncated(model, dim=8)
    export_truncated(model, layer=2)
    assert [module.training for module in model.modules()] == before


class Adapter(Module):
    """A module whose forward has a keyword that encode hands on."""

    def forward(self, features, task=None):
        step = 1.0 if task == "query" else 0.0
        return features | {"sentence_embedding": features["sentence_embedding"] + step}

    def save(self, output_path, *args, **kwargs):
        pass

    @classmethod
    def load(cls, *args, **kwargs):
        return cls()


@pytest.mark.parametrize("layer", [None, 2])
def test_keywords_of_encode_reach_their_modules(tmp_path, layer):
    """encode takes any task, so one that no module gets would go unnoticed; names may have gaps."""
    encoder, pooling = assemble(save_encoder(tmp_path / "encoder"))
    modules = OrderedDict([("0", encoder), ("1", pooling), ("4", Adapter())])
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    model.module_kwargs = {"0": [], "4": ["task"]}
    exported = export_truncated(model, layer, 8, normalize=False)
    apart = [each.encode(sentences(5), task="query") - each.encode(sentences(5)) for each in (model, exported)]
    np.testing.assert_allclose(apart[0], 1.0, atol=1e-5)
    np.testing.assert_allclose(apart[1], 1.0, atol=1e-5)
    assert exported.module_kwargs == {"0": [], "2": ["task"]}


@pytest.mark.parametrize("behind", [[], [Normalize()]])
def test_static_embeddings_can_be_cut(behind):
    """They have no layers, but dims."""
    words = StaticEmbedding(make_tokenizer().backend_tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[words, *behind], device="cpu")
    cell = EmbeddingStore(model).view(4).encode(sentences(20))
    np.testing.assert_allclose(export_truncated(model, dim=4).encode(sentences(20)), cell, atol=1e-5)


def test_a_model_without_weights_is_refused():
    """A bag of words has nothing to cut."""
    model = SentenceTransformer(modules=[BoW(["cat", "dog"])], device="cpu")
    with pytest.raises(TypeError, match="the model's BoW has no weights"):
        export_truncated(model, dim=1)


def encoder_of(kind, **options):
    """A config's maker, for conftest's save_encoder."""
    return lambda layers: kind(hidden_size=WIDTH, num_hidden_layers=layers, **options)


def test_settings_per_layer_are_cut_with_the_layers(tmp_path):
    """Longformer has a window for each layer, and counts them."""
    sizes = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 70, "pad_token_id": 0}
    encoder = encoder_of(LongformerConfig, attention_window=[4, 4, 8], **sizes)
    model = assemble(save_encoder(tmp_path / "encoder", encoder))
    exported = export_truncated(model, layer=2)
    assert exported[0].auto_model.config.attention_window == [4, 4]
    np.testing.assert_allclose(exported.encode(sentences(9)), encode_layers(model, sentences(9), [2])[:, 0], atol=1e-4)


def test_what_cannot_be_built_smaller_is_named(tmp_path):
    """RWKV divides by the number of its layers less one: what its own code raises is said, and what to do."""
    model = assemble(save_encoder(tmp_path / "encoder", encoder_of(RwkvConfig, attention_hidden_size=WIDTH)))
    with pytest.raises(TypeError, match=r"RwkvModel cannot be built with 1 of its 3 layers \(.*\); leave layer out"):
        export_truncated(model, layer=1)


def test_what_cannot_be_saved_is_named(tmp_path):
    """GPT-Neo's config lists the attention of each layer, and is checked when it is saved (before transformers 5.2 when
    it is loaded); dims alone can be cut.
    """
    kinds = {"attention_types": [[["global", "local"], 2]], "intermediate_size": 48, "max_position_embeddings": 64}

    def encoder(layers):
        return GPTNeoConfig(hidden_size=WIDTH, num_layers=4, num_heads=4, **kinds)

    model = assemble(save_encoder(tmp_path / "encoder", encoder))
    saved, loaded = (
        r"the cut GPTNeoModel cannot be saved \(.*leave layer out",
        "cannot be loaded again once it is saved",
    )
    with pytest.raises((TypeError, RuntimeError), match=f"{saved}|{loaded}"):
        export_truncated(model, layer=2)
    export_truncated(model, dim=8).save_pretrained(str(tmp_path / "small"))


def test_a_depth_that_cannot_be_set_is_named(tmp_path):
    """Funnel's layers stand in blocks, and its config takes no number of them."""
    config = FunnelConfig(
        vocab_size=len(make_tokenizer()), block_sizes=[2, 2], d_model=WIDTH, n_head=4, d_head=8, d_inner=48
    )
    FunnelModel(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"FunnelModel cannot be built with 1 of its 4 layers \(.*block_sizes"):
        export_truncated(assemble(tmp_path), layer=1)


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


@pytest.mark.parametrize(
    ("layer", "dim", "dims", "chain"),
    [
        (2, 8, [4, 8], [[8, 1]]),
        (None, 12, [4, 8, 12], [[8, 1]]),
        (2, None, [4, 8, 16, 32], [[8, 1], [16, 2]]),
        (None, 4, None, None),
    ],
)
def test_the_config_says_what_the_cut_model_can(tmp_path, layer, dim, dims, chain):
    """Dims up to its width, its width among them, and pairs of layers that it still has; the original keeps its own."""
    model = tiny_model(tmp_path)
    set_matryoshka_config(model, [4, 8, 16, 32], [(8, 1), (16, 2), (32, 3)])
    export_truncated(model, layer, dim).save_pretrained(str(tmp_path / "small"))
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    found = [config.get(name) for name in ("is_matryoshka", "matryoshka_dimensions", "mipic_chain")]
    assert found == [dims and True, dims, chain]
    assert model[0].auto_model.config.matryoshka_dimensions == [4, 8, 16, 32]


@pytest.mark.parametrize(("layer", "dim"), [(2, None), (None, 8), (2, 8)])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter"])
def test_adapters_are_merged(tmp_path, way, layer, dim):
    """Added by either way of PEFT: the export is a plain model with the adapted vectors, and the original stays."""
    model = assemble(save_encoder(tmp_path / "encoder"))
    plain, kind = model.encode(sentences(9)), type(model[0].auto_model)
    put_lora(model, way)
    adapted = model.encode(sentences(9))
    assert np.abs(adapted - plain).max() > 0.1
    cell = EmbeddingStore(model, None if layer is None else [layer]).view(dim or WIDTH, layer=layer)
    expected = cell.encode(sentences(9))
    exported = export_truncated(model, layer, dim)
    np.testing.assert_allclose(exported.encode(sentences(9)), expected, atol=1e-5)
    assert type(exported[0].auto_model) is kind
    assert not any("lora" in name for name in exported.state_dict())
    np.testing.assert_array_equal(model.encode(sentences(9)), adapted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("architecture", "kept"), [("qwen3", "inv_freq"), ("modernbert", "inv_freq"), ("t5", "DenseReluDense.wo.weight")]
)
def test_every_tensor_keeps_its_precision(tmp_path, architecture, kept, dtype):
    """What transformers holds in float32 next to half-precision weights stays so: rotary frequencies, T5's output."""
    transformer = Transformer(str(save_encoder(tmp_path / "encoder", architecture)), model_kwargs={"dtype": dtype})
    model = SentenceTransformer(modules=[transformer, Pooling(WIDTH, "mean")], device="cpu")

    def precisions(model):
        encoder = model[0].auto_model
        return {name: value.dtype for name, value in (*encoder.named_parameters(), *encoder.named_buffers())}

    before = precisions(model)
    if (architecture, dtype) != ("t5", torch.bfloat16):  # which holds all of it
        assert any(kept in name and found == torch.float32 for name, found in before.items())
    after = precisions(export_truncated(model, 2, 8))
    assert after == {name: before[name] for name in after}


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
        ({"layer": 0}, "layer must be from 1 to the model's depth of 4"),
        ({"layer": 5}, "layer must be from 1 to the model's depth of 4"),
        ({"dim": 0}, "dim must be > 0"),
        ({"dim": 33}, "exceed the model's width of 32"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    """Layer and dim out of range raise with the range in the message."""
    with pytest.raises(ValueError, match=message):
        export_truncated(tiny_model(tmp_path), **arguments)


def test_what_a_cut_lost_is_said(tmp_path, caplog):
    """Without texts nothing was measured; a path is no cuts."""
    caplog.set_level("INFO", "mipic_st")
    export_truncated(tiny_model(tmp_path), dim=8)
    assert "not measured" not in caplog.text
    export_truncated(tiny_model(tmp_path), layer=2)
    assert "Nothing was fitted to replace the layers, and what the cut lost was not measured: give texts" in caplog.text
    with pytest.raises(TypeError, match=r"cuts must be LayerCuts, got str: LayerCuts\.load reads a file"):
        export_truncated(tiny_model(tmp_path), layer=2, cuts="cuts.safetensors")


def test_speedup_is_measured(tmp_path):
    """A one-layer cut of an eight-layer model has fewer parameters and encodes faster."""
    model = tiny_model(tmp_path, layers=8)
    figures = measure_speedup(model, export_truncated(model, layer=1, dim=8), repeats=2)
    assert figures["speedup"] > 1.2
    assert figures["parameters_cut"] < figures["parameters_full"]


def test_speedup_is_of_the_given_texts(tmp_path, monkeypatch):
    """In the given batches, by both models, the first one of each to warm up."""
    model = tiny_model(tmp_path, layers=2)
    cut = export_truncated(model, layer=1)
    asked = []
    encode = SentenceTransformer.encode

    def noted(called, texts, **options):
        asked.append((called is cut, texts, options["batch_size"]))
        return encode(called, texts, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", noted)
    texts = ["one", "two", "three"]
    measure_speedup(model, cut, texts, batch_size=2, repeats=1)
    expected = [(which, part, 2) for part in (texts[:2], texts) for which in (False, True)]
    assert asked == expected
    for wrong in (dict.fromkeys(texts), [{"text": "one"}], "one"):
        with pytest.raises(TypeError, match="texts must be a list of texts"):
            measure_speedup(model, cut, wrong)


@pytest.mark.parametrize("bad", [{"repeats": 0}, {"repeats": 1.5}, {"batch_size": 0}, {"batch_size": "8"}])
def test_bad_counts_are_named(tmp_path, bad):
    """Rounds and texts per pass are whole and at least one."""
    model = tiny_model(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be an integer >= 1"):
        measure_speedup(model, model, **bad)
