"""The fingerprint changes with whatever changes vectors, and with nothing else."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
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


def with_instruction(model, words):
    """An encode with words in front of each text."""
    original = model.encode

    def encode(texts, *args, **kwargs):
        return original([words + text for text in texts], *args, **kwargs)

    return encode


class Shift:
    """A callable in the place of a method, with a state of its own."""

    def __init__(self, by):
        self.by = np.full(3, by)

    def __call__(self, texts, **kwargs):
        return texts

    def method(self, texts, **kwargs):
        return texts


def test_a_class_s_own_method_on_the_instance_does_not_count(tmp_path):
    """As transformers up to 5.1 leaves it behind."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)
    layer = model[0].auto_model.encoder.layer[0]
    layer.forward = layer.forward
    assert "forward" in vars(layer)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "makers",
    [
        [lambda model: with_instruction(model, "a "), lambda model: with_instruction(model, "b ")],
        [lambda model: lambda texts: texts[1:], lambda model: lambda texts: texts[2:]],
        [lambda model: lambda texts, times=2: texts * times, lambda model: lambda texts, times=3: texts * times],
        [lambda model: partial(print, 2), lambda model: partial(print, 3)],
        [lambda model: Shift(1.0), lambda model: Shift(2.0)],
        [lambda model: Shift(1.0).method, lambda model: Shift(2.0).method],
    ],
)
def test_a_method_set_on_the_instance_counts(tmp_path, makers):
    """None, one and another are three states; the same function defined again is the same one, in any module."""
    model = tiny_model(tmp_path)
    for target, name in ((model, "encode"), (model[1], "forward")):
        found = [fingerprint(model)]
        for make in (*makers, *makers):
            vars(target)[name] = make(model)
            found.append(fingerprint(model))
            del vars(target)[name]
        assert len(set(found)) == 3
        assert found[1:3] == found[3:]


PREFIX = "one "


def _prefixed(text):
    return PREFIX + text


class Instructed(SentenceTransformer):
    """An encode with a constant of its module, by a function of its module."""

    def encode(self, inputs, *args, **kwargs):
        return super().encode([_prefixed(text) for text in inputs], *args, **kwargs)


class Derived(Instructed):
    """Has all from its base."""


def scaled(module, inputs, output):
    return {**output, "sentence_embedding": output["sentence_embedding"] * 2}


def other_tokenizer(model, monkeypatch):
    """Of another class with code of its own."""
    kind = type(model[0].tokenizer)
    model[0].tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": lambda self, texts, **how: texts})


@pytest.mark.parametrize(
    "change",
    [
        lambda model, _: model[1].register_forward_hook(scaled),
        lambda model, _: model[1].register_forward_pre_hook(partial(scaled, output={})),
        lambda model, _: model[0].auto_model.encoder.layer[1].register_forward_hook(lambda *_: None),
        lambda model, patch: patch.setitem(globals(), "PREFIX", "two "),
        lambda model, patch: patch.setitem(globals(), "_prefixed", lambda text: text),
        lambda model, patch: patch.setattr(Instructed, "encode", lambda *_, **__: None),
        other_tokenizer,
    ],
)
def test_code_that_is_not_on_the_module_counts(tmp_path, monkeypatch, change):
    """Hooks, constants and functions that a method uses, base classes, the tokenizer's class."""
    model = tiny_model(tmp_path)
    model.__class__ = Derived
    before = fingerprint(model)
    change(model, monkeypatch)
    assert fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model[0].auto_model.encoder.layer[1].output.LayerNorm, "eps", 0.1),
        lambda model: setattr(model[0].auto_model.encoder.layer[0].attention.self, "scaling", 1.0),
        lambda model: setattr(model[0].auto_model.encoder.layer[0].attention.self, "is_causal", True),
        lambda model: setattr(model[1], "pooling_mode", "cls"),
    ],
)
def test_what_is_set_on_a_loaded_module_counts(tmp_path, change):
    """What no config says and no weight shows."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_dropout_and_checkpointing_do_not_count(tmp_path):
    """They are for training and change no vector."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.7
    model[0].auto_model.gradient_checkpointing_enable()
    assert fingerprint(model) == before


class Described(SentenceTransformer):
    """An encode that reads what it holds, and counts."""

    mark = ": "

    def encode(self, inputs, *args, **kwargs):
        self._calls = getattr(self, "_calls", 0) + 1
        self.seen[str(inputs)] = np.ones(3)
        return super().encode([self._head + self.mark + text for text in inputs], *args, **kwargs)

    @property
    def _head(self):
        return self._words["query"]


@pytest.mark.parametrize(
    ("target", "name", "value"),
    [
        ("instance", "_words", {"query": "b"}),
        ("instance", "mark", " - "),
        ("class", "mark", " - "),
        ("class", "_head", property(lambda self: "b")),
    ],
)
def test_what_own_methods_read_counts(tmp_path, monkeypatch, target, name, value):
    """An instruction on the instance or its class, in a property too; a counter and a cache are no settings."""
    model = tiny_model(tmp_path)
    model.__class__, model._words, model.seen = Described, {"query": "a"}, {}
    model.encode(["one"])
    before = fingerprint(model)
    model.encode(["two"])
    assert fingerprint(model) == before
    monkeypatch.setattr(model if target == "instance" else Described, name, value)
    assert fingerprint(model) != before


def test_half_precision_counts_and_the_device_does_not(tmp_path):
    """Other weights are another state; the same ones read elsewhere are not."""
    model = tiny_model(tmp_path)
    before = fingerprint(model)
    assert fingerprint(model.bfloat16()) != before


def test_an_adapter_that_is_off_counts(tmp_path):
    """The weights are there all the same."""
    peft = pytest.importorskip("peft")
    model = tiny_model(tmp_path)
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, model[0].auto_model)
    before = fingerprint(model)
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    assert fingerprint(model) != before


def test_nothing_is_encoded(tmp_path, monkeypatch):
    """A hundred million parameters take under a second, for only bytes are read."""
    model = tiny_model(tmp_path)
    monkeypatch.setattr(type(model), "forward", None)
    fingerprint(model)


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


def test_the_similarity_stays_unset(tmp_path):
    """What is not set counts as cosine, and is not set by being looked at."""
    model = tiny_model(tmp_path)
    model.similarity_fn_name = None
    unset = fingerprint(model)
    assert model._similarity_fn_name is None
    model.similarity_fn_name = "cosine"
    assert fingerprint(model) == unset
