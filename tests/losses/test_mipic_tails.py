"""MIPICLoss on models with modules behind the pooling: against the reference, and in all ways that people train."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Dense, Dropout, LayerNorm, Router

from conftest import (
    DEPTH,
    TAILS,
    WIDTH,
    add_lora,
    all_terms,
    column_features,
    gradients,
    make_tail,
    sentences,
    tail_dims,
    total,
)
from mipic_st import MIPICCallback, MIPICLoss
from reference import head_tensor, info_nce_tensor, push_tensor, sia_tensors
from training_fixtures import EVERY_TERM, logs, make_trainer, parameters

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TERMS = ["matryoshka", "sia_attention", "sia_cka", "pic"]
BASES = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
}


def reference_steps(model: SentenceTransformer) -> list[tuple]:
    """The tail as the reference takes it: no Dropout, no Normalize at the end."""
    steps = []
    for module in list(model)[2:]:
        if isinstance(module, Dense):
            residual = getattr(module, "residual", None)
            residual = module.use_residual if residual is None else residual.weight
            activation = type(module.activation_function).__name__
            steps.append(("dense", module.linear.weight, module.linear.bias, activation, residual))
        elif isinstance(module, LayerNorm):
            steps.append(("norm", module.norm.weight, module.norm.bias, module.norm.eps))
        elif not isinstance(module, Dropout):
            steps.append(("unit",))
    while steps and steps[-1] == ("unit",):
        steps.pop()
    return steps


def pool(rows: torch.Tensor, pooling: str) -> torch.Tensor:
    """One sentence's real rows to one vector."""
    by_mode = {"mean": rows.mean(dim=0), "cls": rows[0], "lasttoken": rows[-1], "max": rows.max(dim=0).values}
    return by_mode[pooling]


def reference_terms(model: SentenceTransformer, loss: MIPICLoss, columns: list[dict]) -> dict[str, torch.Tensor]:
    """The alignment terms, sentence by sentence, from the encoder's hidden states and the weights of the tail."""
    config, steps, pooling = loss.get_config_dict(), reference_steps(model), model[1].pooling_mode
    prefixes = sorted(config["matryoshka_dims"])[:-1]
    outputs = []
    for features in columns:
        inputs = {key: features[key] for key in ("input_ids", "attention_mask")}
        states = model[0].auto_model(**inputs, output_hidden_states=True).hidden_states
        outputs.append(
            [[state[row][mask.bool()] for row, mask in enumerate(inputs["attention_mask"])] for state in states]
        )

    attention, distance = [], []
    for layer in config["sia_layers"]:
        lifts = [loss.mipic_projections.get_parameter(f"sia.{layer}.{dim}") for dim in prefixes]
        per_sentence = []
        for states in outputs:
            for tokens in states[layer]:
                query = push_tensor(pool(tokens, pooling), steps)
                pushed = torch.stack([push_tensor(token, steps) for token in tokens])
                per_sentence.append(
                    sia_tensors(
                        pushed[None],
                        query[None],
                        torch.ones(1, len(tokens)),
                        prefixes,
                        lifts,
                        config["gammas"],
                        config["min_k"],
                        config["attention_temperature"],
                        config["kl_direction"],
                        config["detach_full_width"],
                    )
                )
        attention.append(torch.cat([part[0] for part in per_sentence]).mean(dim=0))
        valid = torch.cat([part[2] for part in per_sentence]).sum(dim=0)
        distance.append(torch.cat([part[1] for part in per_sentence]).sum(dim=0) / valid)

    vectors = [
        [
            torch.stack([push_tensor(pool(tokens, pooling), steps)[:dim] for tokens in states[layer]])
            for states in outputs
        ]
        for dim, layer in config["pic_chain"]
    ]
    links = []
    for index, head in enumerate(loss.mipic_projections["pic"].children()):
        pairs = zip(vectors[index], vectors[index + 1], strict=True)
        values = [
            info_nce_tensor(head_tensor(vector, *head.parameters()), target, config["chain_temperature"])
            for vector, target in pairs
        ]
        links.append(torch.stack(values).mean())
    rest = 1 - config["alpha"]
    return {
        "sia_attention": rest * config["attention_weight"] * torch.stack(attention).sum(),
        "sia_cka": rest * config["cka_weight"] * torch.stack(distance).sum(),
        "pic": rest * config["pic_weight"] * torch.stack(links).sum(),
    }


@pytest.mark.parametrize("detach_full_width", [True, False])
@pytest.mark.parametrize("name", TAILS)
def test_terms_and_gradients_equal_the_reference(tiny_model, name, detach_full_width):
    """Each term's value, and its gradient by parameter name, those of the tail's weights among them."""
    model = tiny_model(tail=name)
    settings = {"sia_layers": [1, 3], "min_k": 2, "detach_full_width": detach_full_width}
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), tail_dims(name), **settings).double()
    columns = column_features(model, columns=2, rows=3)
    expected = reference_terms(model, loss, columns)
    named = {name: parameter for name, parameter in loss.named_parameters() if parameter.requires_grad}
    terms = loss(columns, None)
    for term, value in expected.items():
        assert terms[term].item() == pytest.approx(value.item(), rel=1e-6), term
        got, wanted = (
            torch.autograd.grad(scalar, list(named.values()), retain_graph=True, allow_unused=True)
            for scalar in (terms[term], value)
        )
        for parameter, one, other in zip(named, got, wanted, strict=True):
            zero = torch.zeros_like(named[parameter])
            one, other = (zero if gradient is None else gradient for gradient in (one, other))
            scale = max(1.0, float(other.abs().max()))
            torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=1e-7, msg=f"{term}: {parameter}")
    tail = [key for key in named if key.startswith(("model.2.", "model.3.", "model.4."))]
    assert tail
    grads = dict(zip(named, torch.autograd.grad(total(expected), list(named.values()), allow_unused=True), strict=True))
    assert all(grads[key].abs().max() > 1e-4 for key in tail if "bias" not in key)


@pytest.mark.parametrize("name", ["embeddinggemma", "sentence-t5", "stella"])
def test_pushed_tokens_pool_to_the_pushed_vector_where_the_tail_is_affine(tiny_model, name):
    """What the docstring calls exact."""
    from mipic_st.encoder.hidden_states import record_states
    from mipic_st.encoder.structure import backbone_of

    model = tiny_model(tail=name)
    with torch.no_grad(), record_states(model, backbone_of(model)) as passes:
        model(column_features(model, columns=1)[0])
    recorded = passes[0]
    for layer in recorded.hidden_states:
        torch.testing.assert_close(recorded.pool(recorded.tokens(layer)), recorded.vectors(layer))


def test_without_steps_nothing_changes(tiny_model):
    """Dropout and Normalize alone are no tail: terms as without them, to the last bit."""
    plain, with_dropout = tiny_model(), tiny_model()
    with_dropout.append(Dropout(0.5))
    values = []
    for model in (plain, with_dropout.eval()):
        loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), [32, 16, 8])
        values.append({name: term.item() for name, term in loss(column_features(model), None).items()})
    assert values[0] == values[1]


def test_dropout_of_the_tail_does_not_reach_the_terms(tiny_model):
    """In training mode only the base loss sees it; without it the terms are the same."""
    model = tiny_model(tail="residual")
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), tail_dims("residual"))
    quiet = {name: term.item() for name, term in loss(column_features(model), None).items()}
    for module in model.modules():
        if isinstance(module, Dropout):
            module.train()
    noisy = {name: term.item() for name, term in loss(column_features(model), None).items()}
    assert noisy["matryoshka"] != quiet["matryoshka"]
    assert {name: noisy[name] for name in TERMS[1:]} == {name: quiet[name] for name in TERMS[1:]}


@pytest.mark.parametrize("name", ["labse", "embeddinggemma"])
def test_padding_and_neighbours_do_not_matter(tiny_model, name):
    """SIA of one sentence alone is that in any batch, padded to any length."""
    model = tiny_model(tail=name)
    settings = {"pic_weight": 0, "sia_layers": [1, 3], "min_k": 2}
    loss = all_terms(model, losses.MultipleNegativesRankingLoss(model), tail_dims(name), **settings)
    texts = sentences(5, shortest=3)

    def observed(batch):
        features = model.preprocess(batch)
        with torch.no_grad(), loss.record() as passes:
            model(features)
        return [loss.terms["sia"].per_sentence(passes[0], layer) for layer in loss.sia_layers]

    together = observed([*texts, sentences(1, seed=9, shortest=14)[0] * 2])
    for row, text in enumerate(texts):
        alone = observed([text])
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one.attention[0], other.attention[row], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one.cka[0], other.cka[row], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TAILS)
def test_alpha_one_is_matryoshka_loss_bit_for_bit(tiny_model, name):
    """Tails or not: without alignment, loss and gradients are those of MatryoshkaLoss."""
    results = []
    for make in (losses.MatryoshkaLoss, lambda *arguments: MIPICLoss(*arguments, alpha=1)):
        model = tiny_model(tail=name)
        loss = make(model, losses.MultipleNegativesRankingLoss(model), tail_dims(name))
        value = loss(column_features(model), None)
        value = total(value) if isinstance(value, dict) else value
        value.backward()
        results.append((value.item(), gradients(model)))
    assert results[0][0] == results[1][0]
    assert results[0][1].keys() == results[1][1].keys()
    assert all(torch.equal(gradient, results[1][1][key]) for key, gradient in results[0][1].items())


# --- training ---------------------------------------------------------------------------------------------------------


def tail_loss(model, name, base="plain", **options):
    """Every term on a model with a tail."""
    return MIPICLoss(model, BASES[base](model), tail_dims(name), **{**EVERY_TERM, **options})


@pytest.mark.parametrize("name", TAILS)
def test_cached_losses_give_the_same(tiny_model, name):
    """Values and gradients by name, of the tail too, are those of the uncached loss."""
    results = {}
    for base in BASES:
        model = tiny_model(tail=name)
        loss = tail_loss(model, name, base)
        terms = loss(column_features(model, rows=7), None)
        total(terms).backward()
        results[base] = ({key: term.item() for key, term in terms.items()}, gradients(loss))
    assert results["cached"][0] == pytest.approx(results["plain"][0], rel=1e-5)
    assert results["cached"][1].keys() == results["plain"][1].keys()
    for key, gradient in results["plain"][1].items():
        torch.testing.assert_close(results["cached"][1][key], gradient, rtol=1e-3, atol=3e-5, msg=key)


@pytest.mark.parametrize("base", list(BASES))
@pytest.mark.parametrize("name", ["labse", "residual"])
def test_bf16_autocast_and_gradient_checkpointing(tiny_model, tmp_path, name, base):
    """Each alone: every term is logged and close to float32's, and all parameters move, those of the tail too."""
    first = {}
    for mode in ({}, {"bf16": True}, {"gradient_checkpointing": True}):
        model = tiny_model(tail=name, **NO_DROPOUT)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.dropout_layer.p = 0.0
        loss = tail_loss(model, name, base)
        before = parameters(loss)
        trainer = make_trainer(model, loss, tmp_path, max_steps=1, **mode)
        trainer.train()
        after = parameters(loss)
        assert not [key for key in before if "pooler" not in key and torch.equal(before[key], after[key])]
        first[str(mode)] = [logs(trainer, term)[0] for term in TERMS]
    plain, bf16, checkpointed = first.values()
    assert bf16 == pytest.approx(plain, rel=0.05, abs=0.05)
    assert bf16 != plain
    assert checkpointed == pytest.approx(plain, rel=1e-4)


def test_a_model_in_bf16(tiny_model, tmp_path):
    """Encoder and tail in bf16, projections in float32; the tail trains."""
    model = tiny_model(tail="embeddinggemma").to(torch.bfloat16)
    loss = tail_loss(model, "embeddinggemma")
    before = parameters(loss)
    trainer = make_trainer(model, loss, tmp_path, max_steps=2, learning_rate=2e-2)
    trainer.train()
    after = parameters(loss)
    assert {after[key].dtype for key in after if key.startswith("model.")} == {torch.bfloat16}
    for key in ("model.2.linear.weight", "model.3.linear.weight", "mipic_projections.pic.0.0.weight"):
        assert not torch.equal(before[key], after[key])
    assert all(len(logs(trainer, term)) == 2 for term in TERMS)


def test_lora(tiny_model, tmp_path):
    """With adapters on a frozen encoder, adapters, projections and the tail train."""
    model = tiny_model(tail="sentence-t5", training=True)
    add_lora(model, target_modules=["query", "value"], init_lora_weights="gaussian")
    loss = tail_loss(model, "sentence-t5")
    before = parameters(loss)
    make_trainer(model, loss, tmp_path, max_steps=2).train()
    after = parameters(loss)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "mipic_projections" in key or "lora" in key or key.startswith("model.2.")}


def test_resuming(tiny_model, tmp_path):
    """Stopped, loaded and resumed, model, tail and projections end where the uninterrupted run ends, bit for bit."""

    def run(folder, steps, **kwargs):
        model = tiny_model(tail="distiluse", training=True)
        loss = tail_loss(model, "distiluse")
        settings = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        trainer = make_trainer(model, loss, folder, max_steps=steps, callbacks=[MIPICCallback(loss)], **settings)
        trainer.train(**kwargs)
        return parameters(loss)

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, resume_from_checkpoint=True)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_saved_and_loaded(tiny_model, tmp_path):
    """The trained model is a plain one: loaded again, it gives the same vectors and the same terms."""
    model = tiny_model(tail="residual", training=True)
    loss = tail_loss(model, "residual")
    make_trainer(model, loss, tmp_path / "run", max_steps=2).train()
    model.eval().save(str(tmp_path / "model"))
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu").eval()
    texts = sentences(4)
    torch.testing.assert_close(
        loaded.encode(texts, convert_to_tensor=True), model.encode(texts, convert_to_tensor=True)
    )
    again = tail_loss(loaded, "residual")
    again.mipic_projections.load_state_dict(loss.mipic_projections.state_dict())
    one, other = (each(column_features(model), None) for each in (loss, again))
    assert {key: term.item() for key, term in one.items()} == {key: term.item() for key, term in other.items()}


def test_router_with_a_shared_tail(transformer_folder, tmp_path):
    """Both routes are pushed through the tail behind the Router, and all of it trains."""
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    make = lambda: [Transformer(str(transformer_folder("bert"))), Pooling(WIDTH, "mean")]  # noqa: E731
    router = Router.for_query_document(query_modules=make(), document_modules=make())
    model = SentenceTransformer(modules=[router, *make_tail("sentence-t5")], device="cpu")
    loss = tail_loss(model, "sentence-t5")
    before = parameters(loss)
    mapping = {"anchor": "query", "positive": "document"}
    make_trainer(model, loss, tmp_path, max_steps=2, router_mapping=mapping).train()
    after = parameters(loss)
    assert not [key for key in before if "pooler" not in key and torch.equal(before[key], after[key])]


@pytest.mark.slow
def test_torch_compile(tiny_model, tmp_path):
    """Terms as without, and the tail trains."""
    first = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny_model(tail="labse", **NO_DROPOUT)
        loss = tail_loss(model, "labse")
        before = parameters(loss)
        settings = {"torch_compile": compiled, "torch_compile_backend": "aot_eager"}
        trainer = make_trainer(model, loss, tmp_path, max_steps=3, **settings)
        trainer.train()
        first[compiled] = [value for term in TERMS for value in logs(trainer, term)]
        assert not torch.equal(before["model.2.linear.weight"], parameters(loss)["model.2.linear.weight"])
    assert first[True] == pytest.approx(first[False], rel=0.02, abs=2e-3)


# --- widths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sentence-t5", "stella"])
def test_everything_follows_the_tails_width(tiny_model, name):
    """Dims, prefixes, lifts, checkpoints and presets, narrower or wider than the hidden states."""
    model, width = tiny_model(tail=name), TAILS[name].width
    base = losses.MultipleNegativesRankingLoss(model)
    loss = all_terms(model, base, tail_dims(name))
    term = loss.terms["sia"]
    assert term.prefixes == (4, 8, 16)
    assert [tuple(lift.shape) for lift in term.lifts(DEPTH)] == [(dim, width) for dim in term.prefixes]
    assert loss.pic_chain[-1] == (width, DEPTH)
    with pytest.raises(ValueError, match=f"exceed the model's width of {width}"):
        MIPICLoss(model, base, [width + 1, 8])
    paper = MIPICLoss.from_preset(model, base, "paper")
    assert paper.matryoshka_dims[0] == width
    total(paper(column_features(model), None)).backward()
