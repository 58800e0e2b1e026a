"""Invariants of the rotation in a model: full-width cosines, gains, prompts, routes, saved folders, errors."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)

from conftest import TAILS, WIDTH, column_features
from mipic_st import MIPICLoss
from mipic_st.transforms.layer_cut import fit_layer_cuts
from mipic_st.transforms.model_rotation import rotate_model
from mipic_st.transforms.rotation import Rotation
from transforms_fixtures import DIMS, ROTATE, TEXTS, cosines, dense_count, rotate_until_gained, unit


class Doubled(Dense):
    """A Dense whose forward is its own."""

    def forward(self, features):
        features = super().forward(features)
        return features | {"sentence_embedding": 2 * features["sentence_embedding"].abs()}


def test_a_dense_with_a_forward_of_its_own_is_not_folded(tiny_model):
    """What it does to the vectors is not known, so the rotation stands behind it."""
    model = tiny_model()
    model.append(Doubled(WIDTH, WIDTH, bias=False, activation_function=None))
    weight, vectors = model[-1].linear.weight.clone(), model.encode(TEXTS[:5])
    rotation = rotate_until_gained(model)
    assert type(model[-1]) is Dense
    assert torch.equal(model[-2].linear.weight, weight)
    np.testing.assert_allclose(model.encode(TEXTS[:5]), rotation(vectors), atol=1e-5)


@pytest.mark.parametrize("tail", [None, *TAILS])
def test_rotated_model_keeps_full_width_and_gains(tiny_model, tail, tmp_path):
    """Behind every kind of tail: equal cosines, the rotation's vectors, also after saving and loading."""
    model = tiny_model(tail=tail, normalize=tail is None)
    before, vectors = cosines(model), model.encode(TEXTS[:20])
    count = dense_count(model)
    rotation = rotate_until_gained(model)
    assert np.abs(cosines(model) - before).max() < 1e-5
    np.testing.assert_allclose(unit(model.encode(TEXTS[:20])), unit(rotation(vectors)), atol=1e-4)
    folded = tail in ("embeddinggemma", "sentence-t5", "stella", "max, normalized in the middle")
    assert dense_count(model) == count + (not folded)
    assert isinstance(model[-1], Normalize) == (tail in (None, "embeddinggemma", "sentence-t5", "labse"))
    model.save_pretrained(str(tmp_path / "rotated"))
    loaded = SentenceTransformer(str(tmp_path / "rotated"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS[:20]), model.encode(TEXTS[:20]), atol=1e-6)


def test_rotated_folder_loads_without_this_package(tiny_model, tmp_path):
    """All modules of the folder are sentence-transformers' own; config keys and card say what the model can do."""
    model = tiny_model(normalize=True)
    assert rotate_model(model, TEXTS, [*DIMS, WIDTH], **ROTATE).gained
    model.save_pretrained(str(tmp_path / "rotated"))
    modules = json.loads((tmp_path / "rotated" / "modules.json").read_text())
    assert [module["type"].split(".")[0] for module in modules] == ["sentence_transformers"] * 4
    loaded = SentenceTransformer(str(tmp_path / "rotated"), device="cpu", truncate_dim=8)
    np.testing.assert_allclose(loaded.encode(TEXTS[:3]), model.encode(TEXTS[:3], truncate_dim=8), atol=1e-6)
    config = loaded[0].auto_model.config
    assert (config.is_matryoshka, config.matryoshka_dimensions) == (True, [4, 8, 32])
    card = (tmp_path / "rotated" / "README.md").read_text()
    assert "- matryoshka" in card
    assert "Dense" in card


def test_the_card_of_a_loaded_model_says_it(tiny_model, tmp_path, monkeypatch):
    """A card that came with the model is kept, and gets the tag and one section, which names the last dims."""
    tiny_model(normalize=True).save_pretrained(str(tmp_path / "plain"))
    model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    monkeypatch.setattr(Rotation, "gained", True)
    for dims in ([4], DIMS, DIMS):
        rotate_model(model, TEXTS, dims, **ROTATE)
    model.save_pretrained(str(tmp_path / "rotated"))
    plain, rotated = ((tmp_path / name / "README.md").read_text() for name in ("plain", "rotated"))
    assert rotated.count("## Truncated embeddings") == 1
    assert rotated.count("- matryoshka") == 1
    assert rotated.count("cut to") == rotated.count("cut to 4 or 8 values") == 1
    assert "SentenceTransformer(..., truncate_dim=8)" in rotated
    assert plain.split("# SentenceTransformer")[1].strip() in rotated


def test_a_second_rotation_is_folded(tiny_model, monkeypatch):
    """Rotating a rotated model multiplies into the same Dense; cosines still are the first model's."""
    model = tiny_model(normalize=True)
    before = cosines(model)
    monkeypatch.setattr(Rotation, "gained", True)
    rotate_model(model, TEXTS, [2], **ROTATE)
    module = next(module for module in model if isinstance(module, Dense))
    weight = module.linear.weight.detach().clone()
    rotate_model(model, TEXTS, [8, 16], **ROTATE)
    assert dense_count(model) == 1
    assert not torch.equal(weight, module.linear.weight)
    assert np.abs(cosines(model) - before).max() < 1e-5


def test_static_embeddings_can_be_rotated_but_not_cut(tiny_model):
    """Token vectors without layers: the rotation works, layers are refused."""
    tokenizer = tiny_model().tokenizer.backend_tokenizer
    # its weights are drawn: with some draws nothing gains, and the model rightly stays as it was
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        static = StaticEmbedding(tokenizer, embedding_dim=16)
    model = SentenceTransformer(modules=[static], device="cpu")
    before = cosines(model)
    assert rotate_model(model, TEXTS, DIMS, **ROTATE).gained
    assert np.abs(cosines(model) - before).max() < 1e-5
    with pytest.raises(TypeError, match="StaticEmbedding"):
        fit_layer_cuts(model, TEXTS, layers=[1])


def test_a_router_is_rotated_behind_its_routes(transformer_folder, monkeypatch):
    """One rotation for both routes; texts are encoded by the route of their column."""
    from datasets import Dataset

    def route(pooling):
        return [Transformer(str(transformer_folder())), Pooling(WIDTH, pooling), Normalize()]

    model = SentenceTransformer(
        modules=[Router.for_query_document(route("mean"), route("cls")), Normalize()], device="cpu"
    ).eval()
    data = Dataset.from_dict({"query": TEXTS[:150], "answer": TEXTS[150:]})
    before = [model.encode(TEXTS[:20], task=task) for task in ("query", "document")]
    monkeypatch.setattr(Rotation, "gained", True)  # of texts that have nothing to do with each other
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kw: calls.append((len(texts), kw)) or encode(texts, **kw))
    rotation = rotate_model(
        model,
        data,
        DIMS,
        documents=[f"{text} two" for text in TEXTS],
        queries=TEXTS[:40],
        router_mapping={"query": "query", "answer": "document"},
        **ROTATE,
    )
    # documents and queries go the way of the data's own
    assert [(count, options["task"]) for count, options in calls[:2]] == [(150, "query"), (450, "document")]
    monkeypatch.setattr(model, "encode", encode)
    assert isinstance(model[-1], Normalize)
    for task, vectors in zip(("query", "document"), before, strict=True):
        np.testing.assert_allclose(model.encode(TEXTS[:20], task=task), rotation(vectors), atol=1e-5)


def test_half_precision_models(tiny_model):
    """In bfloat16 the Dense has the model's precision; cosines move by its rounding, the matrix is exact."""
    model = tiny_model(normalize=True).to(torch.bfloat16)
    before = cosines(model)
    rotation = rotate_until_gained(model)
    assert next(m for m in model if isinstance(m, Dense)).linear.weight.dtype == torch.bfloat16
    assert np.abs(cosines(model) - before).max() < 3e-2
    assert np.abs(rotation.matrix.T @ rotation.matrix - np.eye(WIDTH)).max() < 1e-5


def test_texts_are_encoded_once_with_their_prompts(tiny_model, monkeypatch):
    """Each distinct text of a column one time, with the prompt of its column."""
    from datasets import Dataset

    model = tiny_model(normalize=True)
    calls = []
    original = model.encode
    monkeypatch.setattr(model, "encode", lambda texts, **kw: calls.append((list(texts), kw)) or original(texts, **kw))
    data = Dataset.from_dict({"anchor": TEXTS[:100] + TEXTS[:100], "positive": TEXTS[100:300]})
    rotate_model(model, data, DIMS, prompts={"anchor": "query: "}, **ROTATE)
    assert [(len(texts), options["prompt"]) for texts, options in calls[:2]] == [(100, "query: "), (200, None)]
    assert all(len(texts) <= 32 for texts, _ in calls[2:]), "afterwards, probes only"


@pytest.mark.parametrize("names", [("0", "1", "3"), ("1", "2"), ("0", "2", "3"), ("encoder", "pooling", "normalize")])
@pytest.mark.parametrize("ends", [Normalize, Dropout])
def test_modules_keep_their_places_whatever_their_names(tiny_model, names, ends):
    """Names may have gaps, as after an entry was taken out of modules.json; nothing is overwritten."""
    encoder, pooling = tiny_model()
    modules = OrderedDict(zip(names, [encoder, pooling, ends()], strict=False))
    model = SentenceTransformer(modules=modules, device="cpu").eval()
    kinds = [type(module) for module in model]
    before = cosines(model)
    assert rotate_until_gained(model)
    place = len(kinds) - (kinds[-1] is Normalize)
    assert [type(module) for module in model] == [*kinds[:place], Dense, *kinds[place:]]
    assert np.abs(cosines(model) - before).max() < 1e-5


def test_every_route_is_checked(transformer_folder):
    """Routes of two precisions: the Dense fits one of them, and the model is given back as it was."""
    from datasets import Dataset

    tokenizer = Transformer(str(transformer_folder())).tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        static = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=WIDTH)
    halves = [Transformer(str(transformer_folder())).bfloat16(), Pooling(WIDTH, "mean")]
    model = SentenceTransformer(modules=[Router.for_query_document([static], halves)], device="cpu").eval()
    data = Dataset.from_dict({"anchor": TEXTS[:150], "positive": TEXTS[150:]})
    before = [model.encode(TEXTS[:5], task=task, convert_to_tensor=True) for task in ("query", "document")]
    with pytest.raises(RuntimeError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rotation, "gained", True)
        rotate_model(model, data, DIMS, router_mapping={"anchor": "document", "positive": "query"}, **ROTATE)
    for task, vectors in zip(("query", "document"), before, strict=True):
        assert torch.equal(model.encode(TEXTS[:5], task=task, convert_to_tensor=True), vectors)


def test_a_truncated_model_is_rotated_at_full_width(tiny_model):
    """truncate_dim cuts in encode only; the rotation has the model's width, and the cut stays."""
    model = tiny_model(normalize=True)
    model.truncate_dim = 8
    rotation = rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert len(rotation.matrix) == WIDTH
    assert model.encode(["the cat"]).shape == (1, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prompts": {"Anchor": "query: "}},
            r"prompts names \['Anchor'\], .* its columns are \['anchor', 'positive'\]",
        ),
        ({"router_mapping": {"query": "query"}}, r"router_mapping names \['query'\], which data does not have"),
        ({"prompts": ["query: "]}, r"prompts must be a string or a dict of column names to strings, got \['query: '\]"),
        ({"prompts": {"anchor": 5}}, r"prompts must map column names to strings, got \{'anchor': 5\}"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
    ],
    ids=str,
)
def test_options_that_fit_no_column_are_named(tiny_model, options, message):
    """A name that is spelt otherwise would leave the prompt out and say nothing."""
    from datasets import Dataset

    data = Dataset.from_dict({"anchor": TEXTS[:100], "positive": TEXTS[100:200]})
    with pytest.raises((TypeError, ValueError), match=message):
        rotate_model(tiny_model(), data, DIMS, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"held_out": 0.9}, ValueError, "held_out must be"),
        ({"max_steps": 0}, ValueError, "max_steps must be an integer >= 1"),
        ({"documents": ["a text", 5]}, TypeError, "documents must be a list of texts, it holds 5"),
        ({"queries": {"text": TEXTS}}, TypeError, r"queries must be a list of texts, got a table with the columns"),
        ({"dims": [WIDTH]}, ValueError, f"must hold a dimension below the vectors' width of {WIDTH}"),
        ({"dims": [WIDTH + 1]}, ValueError, "exceed the model's width"),
        ({"data": TEXTS[:5]}, ValueError, "5 distinct documents are too few"),
        ({"steps": 5}, TypeError, r"rotate_model has no arguments \['steps'\], and neither has fit_rotation"),
    ],
    ids=str,
)
def test_nothing_is_encoded_before_all_arguments_are_fine(tiny_model, monkeypatch, options, error, message):
    """What is wrong is said at once, not after an hour of encoding."""
    model = tiny_model()
    monkeypatch.setattr(model, "encode", lambda *_, **__: pytest.fail("texts were encoded"))
    given = {"data": TEXTS, "dims": DIMS} | options
    with pytest.raises(error, match=message):
        rotate_model(model, given.pop("data"), given.pop("dims"), **given)


def test_the_log_says_what_was_used(tiny_model, caplog):
    """Columns go by their order, whatever they are called, so a user can see which ones were taken."""
    from datasets import Dataset

    data = Dataset.from_dict({"number": list(range(150)), "anchr": TEXTS[:150], "postive": TEXTS[150:]})
    with caplog.at_level(logging.INFO, logger="mipic_st.transforms.model_rotation"):
        rotate_model(tiny_model(), data, DIMS, **ROTATE)
        rotate_model(tiny_model(), data.remove_columns("postive"), DIMS, **ROTATE)
    assert "fitted on 150 pairs of 'anchr' and 'postive'" in caplog.text
    assert "fitted on 150 texts of 'anchr'" in caplog.text


def test_nothing_gained_nothing_changed(tiny_model, caplog):
    """A fit that improves no dim leaves the model as it was and says so."""
    from datasets import Dataset

    model = tiny_model(normalize=True)
    modules, before = list(model.children()), model.encode(TEXTS[:5])
    unlike = Dataset.from_dict({"one": TEXTS[:150], "other": TEXTS[150:]})
    with caplog.at_level(logging.WARNING, logger="mipic_st.transforms.model_rotation"):
        rotation = rotate_model(model, unlike, [31], documents=TEXTS[:20])
    assert not rotation.gained
    assert "No dim gained on held-out data, so the model was left as it is" in caplog.text
    assert "fitted on 150 pairs of 'one' and 'other' and 20 documents" in caplog.text
    assert list(model.children()) == modules
    np.testing.assert_array_equal(model.encode(TEXTS[:5]), before)
    assert not hasattr(model[0].auto_model.config, "is_matryoshka")


@pytest.mark.parametrize("similarity", [None, "cosine", "dot", "euclidean", "manhattan"])
def test_which_similarities_a_rotation_keeps(tiny_model, similarity, caplog, monkeypatch):
    """All at full width but Manhattan distances, of which a warning speaks; nobody's setting is changed."""
    model = tiny_model()
    model.similarity_fn_name = similarity
    monkeypatch.setattr(Rotation, "gained", True)
    before = model.encode(TEXTS[:20])
    with caplog.at_level(logging.WARNING, logger="mipic_st.transforms.model_rotation"):
        rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert model._similarity_fn_name == similarity
    assert ("Manhattan distance, which no rotation keeps" in caplog.text) == (similarity == "manhattan")
    one, other = (model.similarity(vectors, vectors) for vectors in (before, model.encode(TEXTS[:20])))
    assert bool((one - other).abs().max() < 1e-3) == (similarity != "manhattan")


def everything(model):
    """Modules and their names, weights, config and card of a model."""
    names = [(name, id(module)) for name, module in model.named_modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    card = model.model_card_data
    said = model[0].auto_model.config.to_dict(), list(card.tags), card.task_name, model._model_card_text
    return names, weights, said


@pytest.mark.parametrize("fault", ["cosines", "config", "card"])
@pytest.mark.parametrize("tail", [None, "stella"])
def test_all_or_nothing(tiny_model, tail, fault, monkeypatch, tmp_path):
    """Whatever fails after the fit, the model has afterwards the modules, weights, config and card that it had."""
    tiny_model(normalize=tail is None, tail=tail).save_pretrained(str(tmp_path / "model"))
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    if fault == "cosines":
        original = Rotation.to_modules

        def skewed(rotation, model=None):
            (dense,) = original(rotation)
            dense.linear.weight.data.mul_(1.01).add_(0.01)
            return [dense]

        monkeypatch.setattr(Rotation, "to_modules", skewed)
        error = pytest.raises(RuntimeError, match="changed full-width cosines by")
    else:
        part = {"config": "extend_model_card", "card": "_extend_loaded_card"}[fault]
        monkeypatch.setattr(f"mipic_st.encoder.card.{part}", lambda *_: 1 / 0)
        error = pytest.raises(ZeroDivisionError)
    before, vectors = everything(model), model.encode(TEXTS[:5])
    monkeypatch.setattr(Rotation, "gained", True)
    with error:
        rotate_model(model, TEXTS, DIMS, **ROTATE)
    after = everything(model)
    assert all(torch.equal(before[1][name], value) for name, value in after[1].items())
    assert before[::2] == after[::2]
    np.testing.assert_array_equal(model.encode(TEXTS[:5]), vectors)


def test_an_adapter_on_the_dense_is_no_part_of_it(tiny_model):
    """A map cannot be multiplied into a weight that an adapter stands around: it gets a Dense of its own."""
    peft = pytest.importorskip("peft", reason="needs peft")
    model = tiny_model(tail="sentence-t5")
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["linear"], init_lora_weights=False), model[2])
    model.eval()
    weights, before = {name: value.clone() for name, value in model[2].state_dict().items()}, cosines(model)
    assert rotate_until_gained(model)
    assert all(torch.equal(weights[name], value) for name, value in model[2].state_dict().items())
    assert [type(module) for module in model][-2:] == [Dense, Normalize]
    assert np.abs(cosines(model) - before).max() < 1e-5


def test_a_rotated_model_trains(tiny_model):
    """MIPICLoss on it sees the rotated space, and the rotation's weight gets a gradient."""
    model = tiny_model(normalize=True, training=True)
    rotate_model(model, TEXTS, DIMS, **ROTATE)
    assert model.training
    assert [name for name, module in model.named_modules() if not module.training] == []
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, *DIMS])
    terms = loss(column_features(model), None)
    torch.stack(list(terms.values())).sum().backward()
    (dense,) = (module for module in model if isinstance(module, Dense))
    assert dense.linear.weight.grad.abs().max() > 0


@pytest.mark.parametrize("after_a_step", [False, True])
@pytest.mark.parametrize("tail", [None, "labse"])
def test_a_loss_that_was_made_before_sees_the_rotation(tiny_model, tail, after_a_step):
    """Its terms are those of a loss that is made afterwards, whether or not it has run already."""

    def make():
        return MIPICLoss(model, MultipleNegativesRankingLoss(model), [WIDTH, *DIMS], detach_full_width=False)

    model = tiny_model(tail=tail, normalize=tail is None)
    loss, features = make(), column_features(model)
    if after_a_step:
        loss(features, None)
    assert rotate_until_gained(model)
    before, after = (each(features, None) for each in (loss, make()))
    assert {name: term.item() for name, term in before.items()} == {name: term.item() for name, term in after.items()}
    model.append(Dense(WIDTH, 16))
    with pytest.raises(ValueError, match=r"made for a model of \(depth, width\) \(3, 32\), which is \(3, 16\) now"):
        loss(features, None)


@pytest.mark.slow
def test_minilm_on_its_own_texts(minilm, data_folder):
    """2,000 Banking77 texts: topics at 16 dims gain, STS13 stays within half a point, cosines within 1e-5."""
    import pandas as pd
    from scipy.stats import spearmanr

    train, test, sts = (
        pd.read_csv(data_folder / name, keep_default_na=False)
        for name in ("banking77_train.csv", "banking77_test.csv", "sts13_test.csv")
    )
    train = train.sample(2000, random_state=0)
    test = test.sample(1000, random_state=0)

    def figures():
        first, second, fitted, fresh = (
            minilm.encode(list(texts), truncate_dim=16, normalize_embeddings=True, batch_size=64)
            for texts in (sts.sentence1, sts.sentence2, train.text, test.text)
        )
        found = train.label.to_numpy()[(fresh @ fitted.T).argmax(axis=1)] == test.label.to_numpy()
        return spearmanr((first * second).sum(axis=1), sts.score)[0], found.mean()

    before = figures()
    rotation = rotate_model(minilm, list(train.text), [128, 64, 32, 16, 8], max_steps=100)
    after = figures()
    assert rotation.gained
    assert after[0] > before[0] - 0.005
    assert after[1] > before[1] + 0.04
    cuts = fit_layer_cuts(minilm, list(train.text), layers=[3], dims=[64, 16])
    assert all(row["similarity_fitted"] > row["similarity_plain"] + 0.1 for row in cuts.report)
