"""Recording: what is seen, on every architecture, and that nothing stays behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import sentence_transformers
import torch
from packaging.version import Version
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.nn import functional as F

from conftest import ARCHITECTURES, DEPTH, DIMS, WIDTH, column_features, needs_eager_switch, sentences
from mipic_st import MIPICLoss
from mipic_st.encoder import capturing
from mipic_st.encoder import hidden_states as recording
from mipic_st.encoder.encoding import encode_layers
from mipic_st.encoder.structure import backbone_of
from mipic_st.losses.matryoshka import truncated_passes


def snapshot(model: SentenceTransformer) -> tuple:
    """Everything of a model that recording may touch."""
    config = model[0].auto_model.config
    return "forward" in vars(model), config.output_hidden_states, copy.deepcopy(config.to_dict())


def pooling_of(architecture: str) -> dict:
    return {"pooling": "lasttoken", "padding_side": "left"} if architecture == "qwen3" else {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_records_all_layers_of_the_same_pass(tiny_model, architecture):
    """One pass per model call, depth + 1 states each, and pooling the last one gives the embedding itself."""
    model = tiny_model(architecture, **pooling_of(architecture))
    backbone = backbone_of(model)
    assert (backbone.depth, backbone.width) == (DEPTH, WIDTH)
    calls = []
    original = model[0].auto_model.forward
    model[0].auto_model.forward = lambda *a, **k: (calls.append(1), original(*a, **k))[1]
    before = snapshot(model)
    with recording.record_states(model, backbone) as passes:
        outputs = [model(features) for features in column_features(model)]
    assert len(calls) == 2, "one encoder pass per column, no second forward"
    assert snapshot(model) == before
    assert len(passes) == 2
    for recorded, output in zip(passes, outputs, strict=True):
        assert len(recorded.hidden_states) == DEPTH + 1
        assert torch.equal(recorded.pool(recorded.hidden_states[DEPTH]), output["sentence_embedding"])
        assert "all_layer_embeddings" not in output
        states = recorded.hidden_states
        assert not torch.allclose(states[1], states[2]), "layers are told apart"


def test_a_config_that_already_asks_for_states_keeps_them(tiny_model):
    """What was switched on before by somebody else stays on, in config and output."""
    model = tiny_model()
    model[0].auto_model.config.output_hidden_states = True
    with recording.record_states(model, backbone_of(model)):
        output = model(column_features(model, columns=1)[0])
    assert model[0].auto_model.config.output_hidden_states is True
    assert len(output["all_layer_embeddings"]) == DEPTH + 1


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_patched(tiny_model, error):
    """Forward, config and instance attributes are as before after any exception, also inside nested blocks."""
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error), recording.record_states(model, backbone_of(model)), truncated_passes(model) as passes:
        passes.start_dim(16)
        model(column_features(model, columns=1)[0])
        raise error
    assert snapshot(model) == before


def test_an_instance_forward_that_was_there_is_put_back(tiny_model):
    """A forward that somebody else had set on the instance is called, and is there again afterwards."""
    model = tiny_model()
    calls, original = [], model.forward

    def own_forward(features):
        calls.append(1)
        return original(features)

    model.forward = own_forward
    with recording.record_states(model, backbone_of(model)) as passes:
        model(column_features(model, columns=1)[0])
    assert model.forward is own_forward
    assert len(calls) == len(passes) == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_maps_are_those_before_dropout(tiny_model, architecture):
    """Maps equal the model's own attentions in eval mode, heads averaged; in training mode rows still sum to one."""
    needs_eager_switch(architecture)
    model = tiny_model(architecture, **pooling_of(architecture))
    recording.require_eager_attention(model)
    features = model.preprocess(sentences(5))
    with recording.record_states(model, backbone_of(model), "detached") as passes:
        model(dict(features))
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    expected = model[0].auto_model(**inputs, output_attentions=True).attentions
    for seen, attention in zip(passes[0].attentions, expected, strict=True):
        torch.testing.assert_close(seen, attention.mean(dim=1))

    model.train()
    with recording.record_states(model, backbone_of(model), "detached") as passes:
        model(dict(features))
    real = features["attention_mask"].bool()
    for seen in passes[0].attentions:
        torch.testing.assert_close(seen.sum(dim=-1)[real], torch.ones(int(real.sum())))
        assert not seen.requires_grad


def test_the_probe_matters(tiny_model):
    """Guard for the test above: attentions that a model returns in training mode do not sum to one."""
    model = tiny_model("bert", training=True)
    recording.require_eager_attention(model)
    features = model.preprocess(sentences(5))
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    returned = model[0].auto_model(**inputs, output_attentions=True).attentions[0].sum(dim=-1)
    assert (returned - 1).abs().max() > 0.05


def test_switching_to_eager_is_logged(tiny_model, caplog):
    """The switch is said once, with both names, and an eager model is left alone silently."""
    model = tiny_model()
    assert model[0].auto_model.config._attn_implementation == "sdpa"
    recording.require_eager_attention(model)
    assert "from 'sdpa' to 'eager'" in caplog.text
    caplog.clear()
    recording.require_eager_attention(model)
    assert not caplog.text


def test_recording_attention_without_eager_is_an_error(tiny_model):
    """Never silently without maps."""
    model = tiny_model()
    with (
        pytest.raises(RuntimeError, match="needs eager attention"),
        recording.record_states(model, backbone_of(model), "detached"),
    ):
        model(column_features(model, columns=1)[0])


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken", "weightedmean", "mean_sqrt_len_tokens"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_pooling_of_a_layer_is_the_models_own(tiny_model, pooling, padding_side):
    """The query vector of an intermediate layer equals what a model cut at that layer would embed."""
    if (pooling, padding_side) == ("weightedmean", "left") and Version(sentence_transformers.__version__) < Version(
        "6.2"
    ):
        pytest.skip("before sentence-transformers 6.2, weightedmean counted left padding as positions")
    model = tiny_model("bert", pooling=pooling, padding_side=padding_side)
    features = model.preprocess(sentences(6))
    with recording.record_states(model, backbone_of(model)) as passes:
        model(dict(features))
    recorded = passes[0]
    for layer in (1, 2):
        vector = recorded.pool(recorded.hidden_states[layer])
        for row in range(6):
            real = recorded.hidden_states[layer][row][features["attention_mask"][row].bool()]
            weights = torch.arange(1, len(real) + 1.0)[:, None]
            by_hand = {
                "cls": real[0],
                "mean": real.mean(dim=0),
                "max": real.max(dim=0).values,
                "lasttoken": real[-1],
                "weightedmean": (real * weights).sum(dim=0) / weights.sum(),
                "mean_sqrt_len_tokens": real.sum(dim=0) / len(real) ** 0.5,
            }[pooling]
            torch.testing.assert_close(vector[row], by_hand, rtol=1e-4, atol=1e-5)


def test_prompt_tokens_are_left_out_of_pooling_only_where_the_model_leaves_them_out(tiny_model):
    """include_prompt=False: layer vectors are means without the prompt, and the recorded mask is not edited."""
    model = tiny_model("bert", include_prompt=False)
    texts = sentences(4, shortest=3)
    features = model.preprocess(texts, prompt="the old ")
    assert "prompt_length" in features
    length = int(features["prompt_length"])
    with recording.record_states(model, backbone_of(model)) as passes:
        output = model(dict(features))
    recorded = passes[0]
    vector = recorded.pool(recorded.hidden_states[DEPTH])
    assert torch.equal(vector, output["sentence_embedding"])
    assert torch.equal(recorded.mask, features["attention_mask"].bool())
    real = recorded.hidden_states[DEPTH][0][features["attention_mask"][0].bool()]
    torch.testing.assert_close(vector[0], real[length:].mean(dim=0))


def test_truncated_passes_run_the_model_once(tiny_model):
    """Later dims get the first dim's outputs, cut and normalised."""
    model = tiny_model()
    features = column_features(model)
    expected = [model(dict(column))["sentence_embedding"] for column in features]
    seen = {}
    with recording.record_states(model, backbone_of(model)) as recorded, truncated_passes(model) as passes:
        for dim in (32, 8):
            passes.start_dim(dim)
            seen[dim] = [model(column)["sentence_embedding"] for column in features]
    assert len(recorded) == 2
    for dim, embeddings in seen.items():
        for embedding, full in zip(embeddings, expected, strict=True):
            torch.testing.assert_close(embedding, F.normalize(full[:, :dim], dim=-1))


def test_a_base_loss_that_calls_the_model_more_often_later_is_refused(tiny_model):
    """No stale output for a call that has none."""
    model = tiny_model()
    features = column_features(model)
    with truncated_passes(model) as passes:
        passes.start_dim(32)
        model(features[0])
        passes.start_dim(8)
        model(features[0])
        with pytest.raises(RuntimeError, match="more often for a later dim"):
            model(features[1])


def test_flattened_inputs_are_refused(tiny_model):
    """No attention mask, no rows: said with the fix."""
    model = tiny_model()
    with pytest.raises(ValueError, match="unpad_inputs = False"), recording.record_states(model, backbone_of(model)):
        model({"input_ids": torch.ones(1, 9, dtype=torch.long), "cu_seq_lens_q": torch.tensor([0, 4, 9])})


def test_base_loss_merging_columns_is_one_pass(tiny_model):
    """Where sentence-transformers merges columns, one recorded pass holds them all (anchors stay apart)."""
    model = tiny_model()
    with recording.record_states(model, backbone_of(model)) as passes:
        MultipleNegativesRankingLoss(model)(column_features(model, columns=4), None)
    assert [len(recorded.mask) for recorded in passes] == [6, 18]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_hooks_are_left(tiny_model, architecture):
    """After a training step and after layers were encoded the model can be pickled, as several processes need it."""
    model = tiny_model(architecture, **pooling_of(architecture))

    def hooks():
        return [hook for module in model.modules() for hook in module._forward_hooks.values()]

    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), DIMS)
    loss(column_features(model), None)["sia_cka"].backward()
    assert hooks() == []
    assert encode_layers(model, ["a dog"], [1, 3]).shape[-1] == WIDTH
    assert hooks() == []
    pickle.dumps(model)


def test_hooks_of_others_stay(tiny_model):
    """Those of a user, and what transformers installed before; states are seen a second time either way."""
    model = tiny_model()
    features = column_features(model, columns=1)[0]
    user = model[0].auto_model.encoder.layer[0].register_forward_hook(lambda *_: None)
    model[0].auto_model(input_ids=features["input_ids"], output_hidden_states=True)
    before = [len(module._forward_hooks) for module in model.modules()]
    for _ in range(2):
        with recording.record_states(model, backbone_of(model)) as passes:
            model(dict(features))
        assert set(passes[0].hidden_states) == set(range(DEPTH + 1))
        assert [len(module._forward_hooks) for module in model.modules()] == before
    user.remove()


def test_the_hooks_are_known_by_transformers_names(tiny_model):
    """If transformers renames what the removal goes by, this fails, or there are no such hooks any more."""
    model = tiny_model()
    model[0].auto_model(input_ids=torch.ones(1, 3, dtype=torch.long), output_hidden_states=True)
    found = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert all(hook.__module__ == capturing._SOURCE for hook in found)
    assert (capturing._FLAG in vars(model[0].auto_model)) == bool(found)
