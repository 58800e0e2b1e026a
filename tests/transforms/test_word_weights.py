"""Invariants of word weights: means against a loop, what is learned, and the module in models, files and servers."""

from __future__ import annotations

import copy
import json
from functools import partial

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling

from conftest import WIDTH, sentences
from mipic_st import cli
from mipic_st.deploy.endpoint import check_endpoint
from mipic_st.deploy.onnx import export_onnx
from mipic_st.deploy.tei import save_for_tei
from mipic_st.deploy.truncated import export_truncated
from mipic_st.encoder.encoding import encode_layers, encode_tokens
from mipic_st.encoder.surgery import no_word_weights, word_weights_module
from mipic_st.transforms.layer_cut import LayerCuts, fit_layer_cuts
from mipic_st.transforms.model_rotation import rotate_model
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.word_weights import WordWeights, fit_word_weights, weighted_means

TEXTS = list(dict.fromkeys(sentences(220, seed=3, shortest=3)))[:200]


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# --- on arrays --------------------------------------------------------------------------------------------------------


def test_means_against_a_loop():
    """Each text's states, weighed and averaged one by one; gradients reach states and weights."""
    random = np.random.default_rng(0)
    states, weights, lengths = random.normal(size=(9, 3)), random.random(9) + 0.1, [4, 1, 4]
    ends = np.cumsum(lengths)
    expected = []
    for start, end in zip(ends - lengths, ends, strict=True):
        total = sum(weights[t] * states[t] for t in range(start, end))
        expected.append(total / sum(weights[t] for t in range(start, end)))
    given = [torch.tensor(part, requires_grad=True) for part in (states, weights)]
    found = weighted_means(*given, torch.tensor(lengths))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-12)
    assert torch.autograd.gradcheck(partial(weighted_means, lengths=torch.tensor(lengths)), given)


@pytest.fixture(scope="module")
def noisy():
    """Texts of topic tokens and of noise tokens, which have an embedding of their own; targets know the topics only."""
    random = np.random.default_rng(0)
    count, vocabulary, width = 600, 40, 6
    noise = np.arange(vocabulary) >= 20
    embeddings = np.concatenate([random.normal(size=(vocabulary, 4)), 2.0 * noise[:, None]], axis=1)
    meaning = random.normal(size=(vocabulary, width))
    lengths = random.integers(3, 9, size=count)
    # tokens 18, 19 and 38, 39 occur in no text
    allowed = np.array([t for t in range(vocabulary) if t % 20 < 18])
    tokens = np.concatenate([[random.integers(18), *random.choice(allowed, size=n - 1)] for n in lengths])
    owners = np.repeat(np.arange(count), lengths)
    targets = np.stack([meaning[[t for t in tokens[owners == i] if not noise[t]]].mean(axis=0) for i in range(count)])
    tensors = (
        torch.tensor(meaning[tokens]).bfloat16(),
        torch.tensor(tokens),
        torch.tensor(lengths),
        torch.tensor(embeddings).float(),
        torch.tensor(unit(targets)).float(),
    )
    return tensors, noise


def test_noise_gets_less_weight_than_topics(noisy):
    """By their embeddings, so also tokens that no text holds; the mean over the texts' tokens is 1."""
    given, noise = noisy
    learned = fit_word_weights(*given, [2, 6], learning_rate=0.01)
    assert learned.gained
    weights = learned.weights
    assert weights.shape == (40,)
    assert weights[noise].max() < 0.7 * weights[~noise].min()
    assert weights[given[1]].mean().item() == pytest.approx(1, abs=1e-5)
    assert weights.min() == weights[given[1]].min()
    assert weights.max() == weights[given[1]].max()


def test_weights_that_do_not_help_say_so(noisy):
    """Where the plain mean is the target, nothing is gained."""
    (states, tokens, lengths, embeddings, _), _ = noisy
    plain = weighted_means(states.float(), torch.ones(len(tokens)), lengths)
    targets = torch.nn.functional.normalize(plain, dim=1)
    learned = fit_word_weights(states, tokens, lengths, embeddings, targets, [6], max_steps=5)
    assert not learned.gained
    np.testing.assert_allclose(
        learned(states.float(), tokens, lengths), weighted_means(states.float(), learned.weights[tokens], lengths)
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"vector_weight": 0.0},
        {"max_steps": 10},
        {"learning_rate": 0.003},
        {"seed": 1},
        {"dims": [2]},
    ],
    ids=str,
)
def test_every_argument_counts(noisy, changed):
    """Weights are repeatable, and another setting gives others."""
    options = {"dims": [2, 6], "max_steps": 30, "learning_rate": 0.01}
    usual = fit_word_weights(*noisy[0], **options).weights
    assert torch.equal(usual, fit_word_weights(*noisy[0], **options).weights)
    assert not torch.equal(usual, fit_word_weights(*noisy[0], **(options | changed)).weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("rows", [[19], [3], [3, 19], slice(None)], ids=str)
def test_embeddings_that_are_no_vectors(noisy, value, rows):
    """Such tokens are weighed by how often they occur, seen or not; the others are not drawn in."""
    (states, tokens, lengths, features, targets), noise = noisy
    broken = features.clone()
    broken[rows, 1] = value
    learned = fit_word_weights(states, tokens, lengths, broken, targets, [2, 6], learning_rate=0.01, max_steps=100)
    assert bool(learned.weights.isfinite().all())
    assert bool((learned.weights > 0).all())
    assert learned.report[0].keys() == {"plain", "weighted"}
    assert all(np.isfinite(list(learned.report[0].values())))
    if rows != slice(None):
        assert learned.gained
        assert learned.weights[noise].mean() < 0.7 * learned.weights[~noise].mean()


def test_bar_and_bad_lengths(noisy, capsys):
    """The bar has a title; lengths that do not fit are named."""
    states, tokens, lengths, *others = noisy[0]
    fit_word_weights(states, tokens, lengths, *others, [6], max_steps=1, show_progress_bar=True)
    assert "Word weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"599 lengths with a sum of \d+ for \d+ tokens, \d+ states and 600 texts"):
        fit_word_weights(states, tokens, lengths[1:], *others, [6])
    empty = torch.cat([lengths[:1] * 0, lengths[:1] + lengths[1], lengths[2:]])
    bad = states.clone()
    bad[0, 0] = float("nan")
    for given, changed, message in (
        ((states, tokens, empty), {}, "lengths holds 0 in row 0: leave out empty texts"),
        ((bad, tokens, lengths), {}, "states and targets must be finite"),
        ((states, tokens + 10**6, lengths), {}, "tokens must be from 0 to"),
        ((states, tokens, lengths), {"max_steps": -1}, "max_steps must be an integer >= 0"),
        ((states, tokens, lengths), {"dims": []}, "dims is empty"),
        ((states, tokens, lengths), {"learning_rate": 0}, "learning_rate must be > 0"),
        ((states, tokens, lengths), {"vector_weight": -1}, "vector_weight must be >= 0"),
        ((states[:0], tokens[:0], lengths[:0]), {}, "0 lengths with a sum of 0"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_word_weights(*given, *others, **({"dims": [6]} | changed))


# --- in models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    return tiny_model(normalize=True)


def with_weights(model, layer=2, dims=(8, WIDTH), seed=0):
    """Cuts whose weights are random ones, so that none of a cut's parts can be left out without notice."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(model[0].tokenizer), generator=generator) + 0.2
    matrix = torch.randn(WIDTH, WIDTH, generator=generator)
    return LayerCuts({layer: matrix}, dims, [], {layer: weights})


def by_hand(model, cuts, texts, layer, dim):
    """Hidden states of the encoder, weighed, averaged and mapped text by text."""
    rows = []
    for text in texts:
        features = model.preprocess([text])
        with torch.no_grad():
            output = model[0].auto_model(
                input_ids=features["input_ids"],
                attention_mask=features["attention_mask"],
                output_hidden_states=True,
            )
        states = output.hidden_states[layer][0].double().numpy()
        weights = cuts.word_weights[layer][features["input_ids"][0]].double().numpy()
        mean = (weights[:, None] * states).sum(axis=0) / weights.sum()
        rows.append(mean @ cuts.maps[layer][:, :dim].double().numpy())
    return unit(np.array(rows))


def test_saved_cut_weighs_its_tokens(model, tmp_path):
    """The folder loads with sentence-transformers alone, and gives what hidden states give by hand, also in halves."""
    cuts = with_weights(model)
    export_truncated(model, 2, 8, cuts=cuts).save_pretrained(str(tmp_path / "cut"))
    loaded = SentenceTransformer(str(tmp_path / "cut"), device="cpu")
    kinds = ["Transformer", "Dense", "WordWeights", "Pooling", "Normalize"]
    assert [type(module).__name__ for module in loaded] == kinds
    assert all(type(module).__module__.startswith("sentence_transformers.") for module in loaded)
    expected = by_hand(model, cuts, TEXTS[:20], 2, 8)
    np.testing.assert_allclose(loaded.encode(TEXTS[:20]), expected, atol=1e-3)
    assert loaded.get_embedding_dimension() == 8
    np.testing.assert_allclose(loaded.half().encode(TEXTS[:20]), expected, atol=2e-2)
    brief = SentenceTransformer(str(tmp_path / "cut"), device="cpu", model_kwargs={"dtype": "bfloat16"})
    np.testing.assert_allclose(brief.encode(TEXTS[:20]), expected, atol=5e-2)


def test_cuts_of_models_in_half_precision(model):
    """Exported from a model in bfloat16, the cut runs."""
    cuts = with_weights(model)
    expected = by_hand(model, cuts, TEXTS[:20], 2, 8)
    found = export_truncated(model.bfloat16(), 2, 8, cuts=cuts).encode(TEXTS[:20])
    np.testing.assert_allclose(found, expected, atol=5e-2)


def test_without_normalize_and_dim(model):
    """Raw vectors have the mean's length, and no dim keeps all values."""
    cuts = with_weights(model)
    raw = export_truncated(model, 2, cuts=cuts, normalize=False)
    assert not isinstance(list(raw)[-1], Normalize)
    vectors = raw.encode(TEXTS[:5])
    assert vectors.shape == (5, WIDTH)
    assert (np.abs(np.linalg.norm(vectors, axis=1) - 1) > 0.01).any()
    np.testing.assert_allclose(unit(vectors), by_hand(model, cuts, TEXTS[:5], 2, WIDTH), atol=1e-3)


def test_the_default_learns_them_and_the_report_is_the_cut_model_s(model, monkeypatch):
    """Fitted through the model, kept in the cuts, and the report's figures are those of the exported model."""
    from scipy.stats import spearmanr

    from mipic_st.transforms import layer_cut as layer_cuts

    generator = torch.Generator().manual_seed(0)
    known = []

    def learned(states, tokens, lengths, features, targets, dims, **options):
        known.append((states, tokens, lengths, features, targets, dims, options))
        weights = torch.rand(len(features), generator=generator) + 0.2
        return WordWeights(weights, tuple(dims), [{"plain": 1.0, "weighted": 0.5}])

    monkeypatch.setattr(layer_cuts, "fit_word_weights", learned)
    sts = (TEXTS[:40], TEXTS[40:80], np.random.default_rng(0).random(40).tolist())
    cuts = fit_layer_cuts(model, TEXTS, layers=[1, 2], dims=[8], sts=sts, max_steps=20, seed=5, vector_weight=2)
    assert sorted(cuts.word_weights) == [1, 2]
    states, tokens, lengths, features, targets, dims, options = known[1]
    assert (dims, options["max_steps"], options["seed"], options["vector_weight"]) == ([8], 20, 5, 2)
    assert states.shape == (len(tokens), WIDTH)
    assert int(lengths.sum()) == len(tokens)
    assert targets.shape == (len(lengths), WIDTH)
    assert torch.equal(features, model[0].auto_model.get_input_embeddings().weight)
    held = [TEXTS[i] for i in np.random.default_rng(5).permutation(len(TEXTS))[:20]]
    cut = unit(export_truncated(model, 2, 8, cuts=cuts).encode(held))
    full = model.encode(held)
    upper = np.triu_indices(20, 1)
    row = cuts.report[1]
    assert row["similarity_fitted"] == pytest.approx(
        spearmanr((cut @ cut.T)[upper], (full @ full.T)[upper])[0], abs=1e-3
    )
    plain = unit(export_truncated(model, 2, 8).encode(held))
    assert row["similarity_plain"] == pytest.approx(
        spearmanr((plain @ plain.T)[upper], (full @ full.T)[upper])[0], abs=1e-3
    )
    first, second = (unit(export_truncated(model, 2, 8, cuts=cuts).encode(part)) for part in sts[:2])
    assert row["sts_fitted"] == pytest.approx(spearmanr((first * second).sum(axis=1), sts[2])[0], abs=1e-3)


def test_model_and_random_state_are_left_alone(model):
    """Fitting changes neither weights nor modes nor the global generators."""
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    cuts = fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=5)
    word_weights_module(model, torch.ones(4))
    export_truncated(model, 2, 8, cuts=cuts)
    export_truncated(model, 2, 8)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(cuts.maps[2], fit_layer_cuts(model, TEXTS, layers=[2], dims=[8], max_steps=5).maps[2])


@pytest.mark.parametrize("held_out", [0.1, 0.5])
def test_as_many_texts_as_asked_for_are_enough(model, held_out):
    """The number in the message works."""
    options = {"layers": [1], "dims": [8], "max_steps": 5, "held_out": held_out}
    with pytest.raises(ValueError, match="20 texts are too few") as caught:
        fit_layer_cuts(model, TEXTS[:20], **options)
    enough = int(str(caught.value).partition("give ")[2].split()[0])
    assert enough < 2 * WIDTH + 4
    fit_layer_cuts(model, TEXTS[:enough], **options)


def test_off_and_on(model):
    """False keeps the plain mean; so does least squares alone, whose request for weights is refused."""
    quick = {"layers": [1], "dims": [8]}
    assert not fit_layer_cuts(model, TEXTS, word_weights=False, max_steps=5, **quick).word_weights
    assert not fit_layer_cuts(model, TEXTS, max_steps=0, **quick).word_weights
    with pytest.raises(ValueError, match="word_weights is True, but max_steps is 0"):
        fit_layer_cuts(model, TEXTS, word_weights=True, max_steps=0, **quick)
    with pytest.raises(TypeError, match="word_weights must be"):
        fit_layer_cuts(model, TEXTS, word_weights="yes", **quick)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pooling": "cls"}, "the model pools by 'cls', not by the mean"),
        ({"include_prompt": False}, "leaves the prompt out"),
    ],
)
def test_models_without_a_plain_mean(tiny_model, change, reason):
    """Their default is no weights, and asking for them says why there are none."""
    model = tiny_model(**change)
    assert reason in no_word_weights(model)
    assert not fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], max_steps=5).word_weights
    with pytest.raises(ValueError, match=f"word_weights is True, but .*{reason}"):
        fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], word_weights=True)


def test_a_cut_that_has_weights_can_be_cut_again(model):
    """It keeps those it has: no further ones, and a smaller dim."""
    cuts = with_weights(model)
    cut = export_truncated(model, 2, cuts=cuts)
    assert "behind its Transformer" in no_word_weights(cut)
    small = export_truncated(cut, dim=4)
    np.testing.assert_allclose(small.encode(TEXTS[:9]), by_hand(model, cuts, TEXTS[:9], 2, 4), atol=1e-3)
    np.testing.assert_allclose(small.half().encode(TEXTS[:9]), by_hand(model, cuts, TEXTS[:9], 2, 4), atol=2e-2)
    np.testing.assert_allclose(cut.encode(TEXTS[:9]), by_hand(model, cuts, TEXTS[:9], 2, WIDTH), atol=1e-3)
    with pytest.raises(ValueError, match=r"cuts have word weights for layer 1, but the model has .* fit them on this"):
        export_truncated(cut, 1, 8, cuts=with_weights(model, layer=1))


def test_further_maps_go_before_the_mean_too(model, monkeypatch):
    """A rotation of a cut, and a further layer cut of it, also run in half precision, as the Dense of the cut does."""
    cuts = with_weights(model)
    cut = export_truncated(model, 2, 16, cuts=cuts)
    rotated = copy.deepcopy(cut)
    # of a random model no more is wanted than some rotation; whether it gains differs between machines
    monkeypatch.setattr(Rotation, "gained", True)
    rotation = rotate_model(rotated, TEXTS, [4, 2], max_steps=60)
    assert not np.allclose(rotation.matrix, np.eye(16), atol=0.1)
    assert [type(module).__name__ for module in rotated] == [type(module).__name__ for module in cut]
    expected = unit(by_hand(model, cuts, TEXTS[:9], 2, 16) @ rotation.matrix.astype(np.float64))
    np.testing.assert_allclose(rotated.encode(TEXTS[:9]), expected, atol=1e-4)
    np.testing.assert_allclose(rotated.half().encode(TEXTS[:9]), expected, atol=2e-2)

    further = fit_layer_cuts(cut, TEXTS, layers=[1], dims=[8], max_steps=5)
    assert not further.word_weights
    lower = export_truncated(cut, 1, 8, cuts=further)
    assert lower[0].auto_model.config.num_hidden_layers == 1
    twice = {1: cuts.maps[2][:, :16] @ further.maps[1]}
    expected = by_hand(model, LayerCuts(twice, (8,), [], {1: cuts.word_weights[2]}), TEXTS[:9], 1, 8)
    np.testing.assert_allclose(lower.encode(TEXTS[:9]), expected, atol=1e-4)
    np.testing.assert_allclose(lower.half().encode(TEXTS[:9]), expected, atol=2e-2)


def test_default_prompts_do_not_disturb_the_export(model):
    """The check of what was exported has no prompt."""
    model.prompts, model.default_prompt_name = {"q": "the old woman "}, "q"
    cuts = with_weights(model)
    cut = export_truncated(model, 2, 8, cuts=cuts)
    np.testing.assert_allclose(cut.encode(TEXTS[:9], prompt=""), by_hand(model, cuts, TEXTS[:9], 2, 8), atol=1e-3)
    assert cut.default_prompt_name == "q"


def test_numbers_with_gaps_and_inputs_without_a_mask(model, monkeypatch):
    """Each token has its own weight where the tokenizer leaves numbers out; without a mask there are no weights."""
    vocabulary = {"a": 0, "None": 3, "b": 5}
    monkeypatch.setattr(type(model[0].tokenizer), "get_vocab", lambda self: dict(vocabulary))
    module = word_weights_module(model, torch.tensor([2, 9, 9, 3e-5, 9, 4.0]))
    assert module.emb_layer.weight[:, 0].tolist() == pytest.approx([2, 9, 9, 3e-5, 9, 4])
    assert no_word_weights(model) == ""
    monkeypatch.setattr(model, "preprocess", lambda texts: {"input_ids": torch.zeros(1, 1)})
    assert "is not given attention_mask" in no_word_weights(model)


def test_texts_stay_padded_in_a_cut_with_weights(model):
    """WordWeights needs the mask that a Transformer with flash attention leaves out, unless flattening is off."""
    model[0].unpad_inputs = True
    cuts = with_weights(model)
    assert export_truncated(model, 2, 8, cuts=cuts)[0].unpad_inputs is False
    assert export_truncated(model, 2, 8, cuts=LayerCuts(cuts.maps, (8,), []))[0].unpad_inputs is True
    assert model[0].unpad_inputs is True


def test_too_few_texts_for_weights(model, noisy, monkeypatch, caplog):
    """Where memory allows fewer texts than hidden values, there are none, and the log says so."""
    monkeypatch.setattr("mipic_st.transforms.layer_cut._WEIGHED_VALUES", 1)
    cuts = fit_layer_cuts(model, TEXTS, layers=[1, 2], dims=[8], max_steps=5, batch_size=8)
    assert not cuts.word_weights
    assert "No word weights: the token states of 8 texts fill the memory" in caplog.text
    states, _, _, embeddings, targets = noisy[0]
    with pytest.raises(ValueError, match="2 texts are too few for word weights"):
        fit_word_weights(states[:4], torch.tensor([0, 1, 2, 3]), torch.tensor([2, 2]), embeddings, targets[:2], [6])


def test_token_states_are_those_of_the_layer(model):
    """Without padding, text by text; no more texts than the limit allows."""
    found = encode_tokens(model, TEXTS[:40], [1, 2], most_values=10**9, batch_size=8)
    assert (len(found.lengths), int(found.lengths.sum())) == (40, len(found.tokens))
    ones = torch.ones(len(found.tokens))
    pooled = {layer: weighted_means(found.states[layer].float(), ones, found.lengths).numpy() for layer in (1, 2)}
    expected = encode_layers(model, TEXTS[:40], [1, 2, 3], tail=False)
    # the order of the texts is another one; a text is known by its full-depth state
    rows = [int(np.abs(expected[:, 2] - row).sum(axis=1).argmin()) for row in found.pooled.numpy()]
    assert sorted(rows) == list(range(40)) or len({TEXTS[row] for row in rows}) == len(set(TEXTS[:40]))
    for column, layer in enumerate((1, 2)):
        np.testing.assert_allclose(pooled[layer], expected[rows, column], atol=2e-2)
    few = encode_tokens(model, TEXTS[:40], [1, 2], most_values=1, batch_size=8)
    assert len(few.lengths) == 8


def test_module_has_every_token_of_the_tokenizer(model):
    """Four digits, by number; tokens behind the end of the weights count 1."""
    size = len(model[0].tokenizer)
    module = word_weights_module(model, torch.full((size - 2,), 0.123456))
    weights = module.emb_layer.weight[:, 0].tolist()
    assert weights[:-2] == pytest.approx([0.1235] * (size - 2))
    assert weights[-2:] == [1, 1]


# --- where it is served -----------------------------------------------------------------------------------------------


def test_onnx_file_has_them_inside(model, tmp_path):
    """A runtime that takes the plain mean of the states gets the cut's vectors, at unit length."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the serve extra")
    pytest.importorskip("onnxscript", reason="needs the serve extra")
    cut = export_truncated(model, 2, 8, cuts=with_weights(model))
    session = onnxruntime.InferenceSession(str(export_onnx(cut, tmp_path / "onnx")))
    given = cut[0].tokenizer(TEXTS[:10], padding=True, return_tensors="np")
    (states,) = session.run(None, {each.name: given[each.name].astype(np.int64) for each in session.get_inputs()})
    mask = given["attention_mask"][:, :, None]
    np.testing.assert_allclose(unit((states * mask).sum(axis=1) / mask.sum(axis=1)), cut.encode(TEXTS[:10]), atol=1e-4)
    pooling = json.loads((tmp_path / "onnx" / "1_Pooling" / "config.json").read_text())
    assert (pooling["embedding_dimension"], pooling["pooling_mode"]) == (8, "mean")


def test_servers_that_do_not_know_them(model, tmp_path, monkeypatch):
    """The older form is refused with the way out, and a server that leaves them out is found."""
    cut = export_truncated(model, 2, 8, cuts=with_weights(model))
    with pytest.raises(ValueError, match=r"does not know\. Fit the cut with word_weights=False, or serve the file of"):
        save_for_tei(cut, tmp_path / "tei")
    by_cls = Pooling(8, "cls")
    none, no_dense, not_read = "no word weights", "in front of the Dense layers", "pooled by 'cls' where the model has"
    for modules, words in (
        ([cut[0], cut[1], cut[3]], [none]),
        ([cut[0], cut[2], cut[3]], [no_dense]),
        ([cut[0], cut[3]], [none, no_dense]),
        ([cut[0], cut[1], cut[2], by_cls], [not_read]),
        ([cut[0], cut[1], by_cls], [not_read]),  # a single token's weight is only its length
        ([cut[0], by_cls], [no_dense, not_read]),
    ):
        served = SentenceTransformer(modules=modules, device="cpu").eval()
        # a server that skips the last Dense gives as many values as were asked for
        monkeypatch.setattr(
            "mipic_st.deploy.endpoint._ask", lambda url, texts, *_, s=served: unit(s.encode(texts)[:, :8])
        )
        (finding,) = check_endpoint(cut, "http://127.0.0.1:9", tolerance=1e-3).findings
        assert [word for word in (none, no_dense, not_read) if word in finding] == words


def test_command_can_leave_them_out(model, tmp_path, capsys):
    """--no-word-weights keeps the plain mean; without --texts it makes no sense."""
    model.save_pretrained(str(tmp_path / "model"))
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    command = ["cut", str(tmp_path / "model"), "--layer", "2", "--dim", "8", "--quiet", "--no-word-weights"]
    assert cli.main([*command, "--output", str(tmp_path / "a")]) == 1
    assert "--no-word-weights is for the fit on --texts" in capsys.readouterr().err
    assert cli.main([*command, "--texts", str(tmp_path / "texts.txt"), "--output", str(tmp_path / "b")]) == 0
    loaded = SentenceTransformer(str(tmp_path / "b"), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling", "Dense", "Normalize"]
    (dense,) = (module for module in loaded if isinstance(module, Dense))
    assert dense.module_input_name == "sentence_embedding"
