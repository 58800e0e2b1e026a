"""MIPICLoss as people train: precision, checkpointing, adapters, routes, prompts, compiling, evaluation."""

from __future__ import annotations

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Router, Transformer
from transformers import TrainerCallback

from conftest import DIMS, add_lora, column_features, gradients, sentences, total
from mipic_st import MIPICCallback, MIPICLoss
from training_fixtures import (
    EVERY_TERM,
    datasets,
    logs,
    make_loss,
    make_trainer,
    pairs,
    parameters,
)

TERMS = ["matryoshka", "sia_attention", "sia_cka", "pic"]
BASES = {
    "plain": losses.MultipleNegativesRankingLoss,
    "cached": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
}


def unmoved(loss, before):
    """Parameters that training left as they were, but for the pooler that nothing uses."""
    after = parameters(loss)
    return sorted(name for name in before if "pooler" not in name and torch.equal(before[name], after[name]))


def check_run(trainer, loss, unmoved_ok=()):
    """Train; every term is logged and finite, and everything that should move did."""
    before = parameters(loss)
    trainer.train()
    for term in TERMS:
        values = logs(trainer, term)
        assert len(values) == trainer.args.max_steps, term
        assert all(torch.isfinite(torch.tensor(values))), term
    assert unmoved(loss, before) == sorted(unmoved_ok)
    assert "forward" not in vars(loss.model) or loss.model.forward.__name__ != "recorded"


# --- precision and memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", list(BASES))
def test_bf16_autocast(tiny_model, tmp_path, base):
    """bf16=True: all terms, and close to float32."""
    first = {}
    for bf16 in (False, True):
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        loss = make_loss(model, BASES[base](model))
        trainer = make_trainer(model, loss, tmp_path, bf16=bf16, max_steps=3)
        check_run(trainer, loss)
        first[bf16] = [logs(trainer, term)[0] for term in TERMS]
        assert next(model.parameters()).dtype == torch.float32
    assert first[True] == pytest.approx(first[False], rel=0.05, abs=0.02)
    assert first[True] != first[False]


@pytest.mark.parametrize("base", list(BASES))
def test_model_loaded_in_bf16(tiny_model, transformer_folder, tmp_path, base):
    """The model is bf16, the projections stay float32, and both train."""
    folder = transformer_folder("bert")
    transformer = Transformer(str(folder), model_kwargs={"dtype": torch.bfloat16})
    model = SentenceTransformer(modules=[transformer, Pooling(32, "mean")], device="cpu")
    assert next(model.parameters()).dtype == torch.bfloat16
    loss = make_loss(model, BASES[base](model))
    before = parameters(loss)
    trainer = make_trainer(model, loss, tmp_path, max_steps=3, learning_rate=2e-2)
    trainer.train()
    assert all(len(logs(trainer, term)) == 3 for term in TERMS)
    projections = {name for name in before if "mipic_projections" in name}
    assert projections
    assert not projections & set(unmoved(loss, before))
    assert {parameter.dtype for parameter in loss.mipic_projections.parameters()} == {torch.float32}
    assert len(unmoved(loss, before)) < len(before) / 4


@pytest.mark.parametrize("base", list(BASES))
def test_gradient_checkpointing(tiny_model, tmp_path, base):
    """Both modes give the gradients that training without checkpointing gives."""
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    loss = make_loss(model, BASES[base](model))
    start = {name: value.clone() for name, value in loss.state_dict().items()}
    make_trainer(model, loss, tmp_path, optim="sgd", max_steps=2).train()
    expected = parameters(loss)
    for reentrant in (True, False):
        loss.load_state_dict(start)
        calls = []
        handle = (
            model[0]
            .auto_model.encoder.layer[1]
            .attention.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        )
        mode = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        make_trainer(model, loss, tmp_path, optim="sgd", max_steps=2, **mode).train()
        handle.remove()
        embedded = {"plain": 4, "cached": 24}[base]
        assert len(calls) > embedded, "nothing was recomputed"
        got = parameters(loss)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-6, msg=name)
        assert any(not torch.equal(start[name], value) for name, value in got.items())


@pytest.mark.slow
@pytest.mark.parametrize("base", list(BASES))
def test_torch_compile_without_a_recompilation_storm(tiny_model, tmp_path, base):
    """torch_compile=True over 20 steps of varying length: terms as without, and a handful of graphs, not one a step."""
    from torch._dynamo.utils import counters

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            graphs.append(counters["stats"].get("unique_graphs", 0))

    results = {}
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        graphs = []
        model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        loss = make_loss(model, BASES[base](model))
        # Steps of lengths that jump up and down.
        longest = [5, 12, 7, 14, 4, 9, 13, 6, 11, 8, 10, 3, 14, 5, 9, 12, 6, 13, 8, 11]
        data = datasets.Dataset.from_dict(
            {
                name: [text for step in longest for text in sentences(8, seed=step + 1, shortest=2, longest=step)]
                for name in ("anchor", "positive")
            }
        )
        trainer = make_trainer(
            model,
            loss,
            tmp_path,
            train=data,
            max_steps=20,
            torch_compile=compiled,
            torch_compile_backend="aot_eager",
            callbacks=[Count()],
        )
        trainer.get_batch_sampler = lambda dataset, batch_size, **_: torch.utils.data.BatchSampler(
            torch.utils.data.SequentialSampler(dataset), batch_size, drop_last=False
        )
        before = parameters(loss)
        trainer.train()
        assert unmoved(loss, before) == []
        results[compiled] = [logs(trainer, term) for term in TERMS]
    assert 1 <= graphs[-1] <= 20
    assert graphs[-1] == graphs[9], "still compiling in the second half"
    for one, other in zip(results[False], results[True], strict=True):
        assert other == pytest.approx(one, rel=0.02, abs=2e-3)


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", list(BASES))
def test_lora(tiny_model, tmp_path, base):
    """Projections and adapters train, the base stays frozen, and the adapter is saved without the projections."""
    model = tiny_model(training=True)
    add_lora(model, target_modules=["query", "value"], init_lora_weights="gaussian")
    loss = make_loss(model, BASES[base](model))
    before = parameters(loss)
    trainer = make_trainer(
        model,
        loss,
        tmp_path / "run",
        max_steps=3,
        save_strategy="steps",
        save_steps=3,
        callbacks=[MIPICCallback(loss)],
    )
    trainer.train()
    moved = set(before) - set(unmoved(loss, before)) - {name for name in before if "pooler" in name}
    assert {name for name in before if "mipic_projections" in name or "lora" in name} == moved
    assert (tmp_path / "run" / "checkpoint-3" / "mipic_projections.safetensors").is_file()
    model.save(str(tmp_path / "saved"))
    assert not [path for path in (tmp_path / "saved").rglob("*") if "mipic" in path.name]


def router_model(transformer_folder):
    """Query and document routes of one shape."""
    make = lambda: [Transformer(str(transformer_folder("bert"))), Pooling(32, "mean")]  # noqa: E731
    router = Router.for_query_document(query_modules=make(), document_modules=make())
    return SentenceTransformer(modules=[router], device="cpu")


@pytest.mark.parametrize("base", list(BASES))
def test_router(transformer_folder, tmp_path, base):
    """An asymmetric model: both routes are recorded and trained."""
    model = router_model(transformer_folder)
    loss = make_loss(model, BASES[base](model))
    trainer = make_trainer(
        model, loss, tmp_path, max_steps=3, router_mapping={"anchor": "query", "positive": "document"}
    )
    check_run(trainer, loss)


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("base", list(BASES))
def test_prompts(tiny_model, tmp_path, base, include_prompt):
    """prompts= of the trainer, pooled or not; without pooling them, the prompt's tokens do not enter the query."""
    model = tiny_model(training=True, include_prompt=include_prompt)
    loss = make_loss(model, BASES[base](model))
    trainer = make_trainer(
        model, loss, tmp_path, max_steps=3, prompts={"anchor": "the old man buys ", "positive": "a letter without "}
    )
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].get("prompt_length")))
    check_run(trainer, loss)
    assert seen
    if not include_prompt:
        assert all(length is not None for length in seen)


def test_truncation(tiny_model, tmp_path):
    """Texts longer than max_seq_length are cut by the model, and the terms are those of the cut texts."""
    model = tiny_model()
    model.max_seq_length = 6
    loss = make_loss(model)
    long = [model.preprocess(sentences(6, seed=column, shortest=12)) for column in range(2)]
    assert {column["input_ids"].shape[1] for column in long} == {6}
    short = [
        model.preprocess([" ".join(text.split()[:4]) for text in sentences(6, seed=column, shortest=12)])
        for column in range(2)
    ]
    assert {k: v.item() for k, v in loss(long, None).items()} == {k: v.item() for k, v in loss(short, None).items()}
    check_run(make_trainer(model.train(), loss, tmp_path, max_steps=2), loss)


# --- the trainer ------------------------------------------------------------------------------------------------------


def test_several_data_sets_with_a_dict_of_losses(tiny_model, tmp_path):
    """Each data set trains its own projections."""
    model = tiny_model(training=True)
    by_name = {
        "pairs": make_loss(model),
        "scores": MIPICLoss(model, losses.CoSENTLoss(model), DIMS, alpha=0.4, sia_layers=[2]),
    }
    scored = pairs(32, columns=("one", "two")).add_column("score", [index / 32 for index in range(32)])
    data = datasets.DatasetDict({"pairs": pairs(32), "scores": scored})
    before = {name: parameters(loss) for name, loss in by_name.items()}
    make_trainer(model, by_name, tmp_path, train=data, max_steps=4).train()
    assert {name: unmoved(loss, before[name]) for name, loss in by_name.items()} == {"pairs": [], "scores": []}


def test_gradient_accumulation_equals_the_mean_of_the_batches(tiny_model, tmp_path):
    """num_items_in_batch does not disturb: one step over two batches is the step along their mean gradient."""
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model(**settings)
    loss = make_loss(model)
    rate = 0.1
    expected = parameters(loss)
    batches = []
    trainer = make_trainer(
        model,
        loss,
        tmp_path,
        max_steps=1,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        optim="sgd",
        learning_rate=rate,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    forward = loss.forward
    loss.forward = lambda features, labels: batches.append([dict(f) for f in features]) or forward(features, labels)
    trainer.train()
    del loss.forward
    got = parameters(loss)
    assert len(batches) == 2
    with torch.no_grad():
        for name, parameter in loss.named_parameters():
            parameter.copy_(expected[name])
    loss.zero_grad()
    for features in batches:
        (total(loss(features, None)) / 2).backward()
    for name, gradient in gradients(loss).items():
        torch.testing.assert_close(got[name], expected[name] - rate * gradient, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("base", list(BASES))
def test_evaluation_loss_during_training(tiny_model, tmp_path, base):
    """Deterministic, at all dims, without gradients or any change of parameters or draws."""
    # no dropout: any evaluation moves the global generator, since data loaders draw from it
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model(**settings)
    loss = make_loss(model, BASES[base](model), n_dims_per_step=1)
    trainer = make_trainer(
        model, loss, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, eval_dataset=pairs(16, seed=9)
    )
    before = parameters(loss)
    first, second = trainer.evaluate(), trainer.evaluate()
    names = [f"eval_{term}" for term in TERMS]
    assert first["eval_loss"] == second["eval_loss"]
    history = [entry for entry in trainer.state.log_history if "eval_pic" in entry]
    assert [history[0][name] for name in names] == [history[1][name] for name in names]
    assert all(torch.equal(before[name], value) for name, value in parameters(loss).items())
    assert all(parameter.grad is None for parameter in loss.parameters())
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "eval_pic" in entry]) == 2

    without = tiny_model(**settings)
    other = make_loss(without, BASES[base](without), n_dims_per_step=1)
    make_trainer(without, other, tmp_path, max_steps=4).train()
    assert all(torch.equal(value, parameters(loss)[name]) for name, value in parameters(other).items())


def test_flattened_inputs_are_refused(tiny_model):
    """Packed sequences have no mask; the error says how to switch packing off, with cached losses too."""
    model = tiny_model()
    features = column_features(model)
    for column in features:
        column["cu_seq_lens_q"] = torch.tensor([0, 2, 4, 6])
    for make in BASES.values():
        with pytest.raises(ValueError, match=r"padded inputs with an attention_mask.*unpad_inputs = False"):
            MIPICLoss(model, make(model), DIMS, **EVERY_TERM)(features, None)
        assert "forward" not in vars(model)
