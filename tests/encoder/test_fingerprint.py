"""The fingerprint changes with whatever changes vectors, and with nothing else."""

import json
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Router, Transformer

from conftest import ARCHITECTURES, WIDTH, assemble, save_encoder, sentences
from evaluation_fixtures import tiny_model
from mipic_st.encoder.fingerprint import fingerprint


def routed(folder, query_pooling="mean", document_pooling="mean", **options):
    """A Router whose two routes share one encoder."""
    transformer = Transformer(str(save_encoder(folder / "encoder")))
    routes = {
        "query": [transformer, Pooling(WIDTH, query_pooling)],
        "document": [transformer, Pooling(WIDTH, document_pooling)],
    }
    return SentenceTransformer(modules=[Router(routes, **options)], device="cpu").eval()


def changed_config(folder, architecture="bert", pooling="mean", **changes):
    """The same weights under another config."""
    plain = save_encoder(folder / "plain", architecture)
    other = folder / "other"
    if not other.exists():
        other.mkdir()
        for file in plain.iterdir():
            (other / file.name).write_bytes(file.read_bytes())
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, **changes}))
    return assemble(plain, pooling), assemble(other, pooling)


@pytest.mark.parametrize("poolings", [("cls", "mean"), ("mean", "cls")])
def test_the_pooling_of_a_route_counts(tmp_path, poolings):
    """Other vectors by encode_query or encode_document alone; with a default route too."""
    assert fingerprint(routed(tmp_path)) != fingerprint(routed(tmp_path, *poolings))
    options = {"default_route": "query"}
    assert fingerprint(routed(tmp_path, **options)) != fingerprint(routed(tmp_path, *poolings, **options))


def test_swapped_routes_count(tmp_path):
    """The same modules under the other names."""
    assert fingerprint(routed(tmp_path, "cls", "mean")) != fingerprint(routed(tmp_path, "mean", "cls"))


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("bert", {"hidden_act": "relu"}),
        ("bert", {"hidden_act": "gelu_new"}),
        ("bert", {"is_decoder": True}),
        ("bert", {"layer_norm_eps": 0.1}),
        ("modernbert", {"local_attention": 2}),
        ("qwen3", {"rope_parameters": {"rope_theta": 10.0, "rope_type": "default"}}),
    ],
)
def test_the_backbones_config_counts(tmp_path, architecture, changes):
    """Activation, direction of attention, window and positions, with the same weights."""
    plain, other = changed_config(tmp_path, architecture, **changes)
    assert fingerprint(plain) != fingerprint(other)


def test_code_counts(tmp_path):
    """A module with the same weights and settings but other code gives other vectors: bidirectional, say."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)

    class Twice(Pooling):
        def forward(self, features):
            features["token_embeddings"] = features["token_embeddings"].roll(1, dims=-1)
            return super().forward(features)

    Twice.__name__ = "Pooling"
    model[1].__class__ = Twice
    assert fingerprint(model) != before


def test_the_padding_side_counts(tmp_path):
    """On absolute positions a text's vector depends on it."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)
    model.tokenizer.padding_side = "left"
    assert fingerprint(model) != before


def test_the_tokenizers_words_count(tmp_path):
    """Two words that swap their numbers, whatever the fixed texts hold."""
    models = []
    for swap in (False, True):
        folder = save_encoder(tmp_path / str(swap))
        if swap:
            rules = json.loads((folder / "tokenizer.json").read_text())
            words = rules["model"]["vocab"]
            words["quickly"], words["slowly"] = words["slowly"], words["quickly"]
            (folder / "tokenizer.json").write_text(json.dumps(rules))
        models.append(assemble(folder))
    assert fingerprint(models[0]) != fingerprint(models[1])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.prompts.update(query="query: "),
        lambda model: setattr(model, "max_seq_length", 5),
        lambda model: setattr(model[1], "include_prompt", False),
        lambda model: model.append(Dense(WIDTH, WIDTH, bias=False)),
        lambda model: model.append(Normalize()),
        lambda model: setattr(model, "similarity_fn_name", "dot"),
        lambda model: model[0].auto_model.embeddings.word_embeddings.weight.data[7].add_(1e-3),
    ],
)
def test_settings_and_weights_count(tmp_path, change):
    """One change each."""
    model = tiny_model(tmp_path, normalize=False)
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_keeps_its_fingerprint(tmp_path, architecture):
    """Saved and loaded, also after texts were encoded: the same digits."""
    model = tiny_model(tmp_path / "m", architecture)
    before = fingerprint(model)
    model.encode(sentences(40))
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert fingerprint(model) == fingerprint(loaded) == before


def test_metadata_does_not_count(tmp_path):
    """What the callback writes for serving engines, a truncate_dim and a moved folder change no stored vector."""
    model = tiny_model(tmp_path / "m")
    before = fingerprint(model)
    model[0].auto_model.config.is_matryoshka = True
    model[0].auto_model.config.matryoshka_dimensions = [32, 8]
    model.truncate_dim = 8
    assert fingerprint(model) == before
    assert fingerprint(tiny_model(tmp_path / "elsewhere")) == before


def test_the_model_stays_as_it_is(tmp_path, monkeypatch):
    """Modes of all modules, random state, and nothing of what wraps encode on the instance is called."""
    model = tiny_model(tmp_path)
    model.train()
    model[1].eval()
    monkeypatch.setattr(model, "encode", None)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fingerprint(model)
    assert torch.rand(1) == expected
    assert model.training
    assert model[0].auto_model.training
    assert not model[1].training


@pytest.mark.slow
def test_the_fingerprint_is_the_same_in_every_process(minilm_path):
    """Two processes with one and two threads."""
    code = (
        "import sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "from sentence_transformers import SentenceTransformer; from mipic_st.encoder.fingerprint import fingerprint;"
        "print(fingerprint(SentenceTransformer(sys.argv[1], device='cpu')))"
    )
    seen = {
        subprocess.run([sys.executable, "-c", code, minilm_path, n], capture_output=True, text=True, check=True).stdout
        for n in "12"
    }
    assert len(seen) == 1
