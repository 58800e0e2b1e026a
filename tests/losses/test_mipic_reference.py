"""The whole loss against the per-sentence reference, from the encoder's own outputs to the weighted terms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import DIMS, WIDTH, all_terms, column_features
from reference import head_value, info_nce_value, sia_values


def encoder_outputs(model, features):
    """Hidden states and attentions straight from transformers, in float64, and the mask."""
    inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
    implementation = model[0].auto_model.config._attn_implementation
    model[0].auto_model.set_attn_implementation("eager")
    with torch.no_grad():
        output = model[0].auto_model(**inputs, output_hidden_states=True, output_attentions=True)
    model[0].auto_model.set_attn_implementation(implementation)
    states = [state.double().numpy() for state in output.hidden_states]
    attentions = [attention.double().mean(dim=1).numpy() for attention in output.attentions]
    return states, attentions, features["attention_mask"].numpy().astype(bool)


def pool(rows, pooling):
    """One sentence's real rows to one vector."""
    return {"mean": rows.mean(axis=0), "cls": rows[0], "lasttoken": rows[-1]}[pooling]


SETTINGS = [
    {},
    {"attention_weight": 2.0, "cka_weight": 0.5, "pic_weight": 3.0, "alpha": 0.25},
    {"sia_layers": [1, 3], "aggregation": "mean", "kl_direction": "full_prefix"},
    {"sia_layers": [2], "token_importance": "attention", "gammas": [0.3, 0.5, 1.0], "min_k": 2},
    {"lift_init": "random", "attention_temperature": 0.5, "chain_temperature": 0.2, "seed": 4, "min_k": 4},
    {"pic_chain": [(3, 1), (12, 1), (20, 3)]},
]


@pytest.mark.parametrize(
    ("architecture", "pooling", "side"),
    [("bert", "mean", "right"), ("mpnet", "cls", "right"), ("qwen3", "lasttoken", "left")],
)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_terms_equal_the_reference(tiny_model, architecture, pooling, side, settings):
    """SIA averaged over all sentences of all columns, PIC over columns of separate negatives, weights of Eq. 18."""
    model = tiny_model(architecture, pooling, side)
    loss = all_terms(model, MultipleNegativesRankingLoss(model), DIMS, **settings)
    config = loss.get_config_dict()
    columns = column_features(model, columns=3, rows=5)
    outputs = [encoder_outputs(model, features) for features in columns]
    terms = loss(columns, None)
    prefixes = [dim for dim in sorted(DIMS) if dim < WIDTH]

    attention, distance = [], []
    for layer in config["sia_layers"]:
        lifts = [lift.detach().double().numpy() for lift in loss.terms["sia"].lifts(layer)]
        values = []
        for states, maps, mask in outputs:
            hidden = states[layer]
            query = [pool(hidden[row][mask[row]], pooling) for row in range(len(hidden))]
            importance = None
            if config["token_importance"] == "attention":
                importance = [pool(maps[layer - 1][row][mask[row]], pooling) for row in range(len(hidden))]
            values.append(
                sia_values(
                    hidden,
                    query,
                    mask,
                    prefixes,
                    lifts,
                    config["gammas"],
                    config["min_k"],
                    config["attention_temperature"],
                    config["kl_direction"],
                    importance,
                )
            )
        attention.append(np.concatenate([value[0] for value in values]).mean(axis=0))
        valid = np.concatenate([value[2] for value in values])
        distance.append(np.concatenate([value[1] for value in values]).sum(axis=0) / valid.sum(axis=0))

    links = []
    vectors = [
        [
            np.stack([pool(states[layer][row][mask[row]], pooling) for row in range(len(mask))])[:, :dim]
            for states, _, mask in outputs
        ]
        for dim, layer in config["pic_chain"]
    ]
    for index, head in enumerate(loss.terms["pic"].children()):
        parameters = [parameter.detach().double().numpy() for parameter in head.parameters()]
        links.append(
            np.mean(
                [
                    info_nce_value(np.array(head_value(vector, *parameters)), target, config["chain_temperature"])
                    for vector, target in zip(vectors[index], vectors[index + 1], strict=True)
                ]
            )
        )

    aggregate = np.sum if config["aggregation"] == "sum" else np.mean
    rest = 1 - config["alpha"]
    expected = {
        "sia_attention": rest * config["attention_weight"] * aggregate(attention),
        "sia_cka": rest * config["cka_weight"] * aggregate(distance),
        "pic": rest * config["pic_weight"] * aggregate(links),
    }
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-5, abs=1e-6), name
