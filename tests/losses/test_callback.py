"""MIPICCallback and resuming: bit for bit with it, and a line in the log without it."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from torch.optim import optimizer as torch_optimizer
from transformers import TrainerCallback

from conftest import DIMS, column_features, total
from mipic_st import MIPICCallback, MIPICLoss, set_matryoshka_config
from mipic_st.losses.callback import PROJECTIONS_FILE
from training_fixtures import datasets, logs, make_loss, make_trainer, pairs, parameters

DRAWN = {"n_dims_per_step": 2}


def fresh(tiny_model, **options):
    """Model and loss, both as at the start of a run."""
    model = tiny_model(training=True)
    return model, make_loss(model, **options)


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert any("mipic_projections" in name for name in got)
    different = [name for name in got if not torch.equal(got[name], expected[name])]
    assert different == []


class StopAt(TrainerCallback):
    """Ends training after a step, as a lost machine would."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.fixture
def interrupted(tiny_model, tmp_path):
    """A run that saved at step 2 and went no further."""
    folder = tmp_path / "run"
    model, loss = fresh(tiny_model, **DRAWN)
    trainer = make_trainer(
        model,
        loss,
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        callbacks=[MIPICCallback(loss), StopAt(2)],
    )
    trainer.train()
    return folder


# --- resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_is_bit_identical(tiny_model, tmp_path, accumulation):
    """Stopped at step 2 and resumed, every parameter and head is that of the uninterrupted run, dropout included."""
    arguments = {
        "max_steps": 4,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    model, loss = fresh(tiny_model, **DRAWN)
    start = parameters(loss)
    make_trainer(model, loss, tmp_path / "whole", callbacks=[MIPICCallback(loss)], **arguments).train()
    expected = parameters(loss)
    moved = [name for name in start if "mipic_projections" in name and not torch.equal(start[name], expected[name])]
    assert len(moved) == len([name for name in start if "mipic_projections" in name])

    model, loss = fresh(tiny_model, **DRAWN)
    callbacks = [MIPICCallback(loss), StopAt(2)]
    make_trainer(model, loss, tmp_path / "parts", callbacks=callbacks, **arguments).train()
    assert (tmp_path / "parts" / "checkpoint-2" / PROJECTIONS_FILE).is_file()
    model, loss = fresh(tiny_model, **DRAWN)
    trainer = make_trainer(model, loss, tmp_path / "parts", callbacks=[MIPICCallback(loss)], **arguments)
    trainer.train(resume_from_checkpoint=True)
    assert_equal(parameters(loss), expected)


def test_projections_without_the_callback_are_told_once(tiny_model, interrupted, caplog):
    """Whoever trains or resumes without it finds in the log, once, that nobody keeps the projections, and the fix."""
    model, loss = fresh(tiny_model, **DRAWN)
    make_trainer(model, loss, interrupted, max_steps=4).train(resume_from_checkpoint=True)
    assert caplog.text.count("which nobody clips, saves with checkpoints or restores from them") == 1
    assert "callbacks=[MIPICCallback(loss)]" in caplog.text
    caplog.clear()
    without = MIPICLoss(model, losses.MultipleNegativesRankingLoss(model), DIMS)
    looked_after = make_loss(model)
    looked_after.managed = True
    for quiet in (without, looked_after):
        quiet(column_features(model), None)
    make_loss(model.eval())(column_features(model), None)
    assert "nobody" not in caplog.text


def test_resume_from_another_folder(tiny_model, interrupted, tmp_path):
    """A folder that is not in output_dir is named to the callback; without that, a clear error."""
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(interrupted / "checkpoint-2", elsewhere)
    model, loss = fresh(tiny_model, **DRAWN)
    trainer = make_trainer(model, loss, tmp_path / "new", max_steps=4, callbacks=[MIPICCallback(loss)])
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2.* is missing.*resume_from_checkpoint=\.\.\."):
        trainer.train(resume_from_checkpoint=str(elsewhere))

    callback = MIPICCallback(loss, resume_from_checkpoint=elsewhere)
    make_trainer(model, loss, tmp_path / "new", max_steps=4, callbacks=[callback]).train(
        resume_from_checkpoint=str(elsewhere)
    )
    resumed = parameters(loss)
    model, loss = fresh(tiny_model, **DRAWN)
    make_trainer(model, loss, interrupted, max_steps=4, callbacks=[MIPICCallback(loss)]).train(
        resume_from_checkpoint=True
    )
    assert_equal(resumed, parameters(loss))


def test_projections_of_another_run_are_recognised(tiny_model, interrupted, tmp_path):
    """A projections file that does not belong to the resumed optimizer is refused."""
    model, loss = fresh(tiny_model, **DRAWN)
    other = tmp_path / "other"
    arguments = {"max_steps": 2, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    make_trainer(model, loss, other, callbacks=[MIPICCallback(loss)], **arguments).train()
    shutil.copy(other / "checkpoint-2" / PROJECTIONS_FILE, interrupted / "checkpoint-2" / PROJECTIONS_FILE)
    model, loss = fresh(tiny_model, **DRAWN)
    trainer = make_trainer(model, loss, interrupted, max_steps=4, callbacks=[MIPICCallback(loss)])
    with pytest.raises(ValueError, match="is not of the run whose optimizer"):
        trainer.train(resume_from_checkpoint=True)


def without_projections(tiny_model, folder, step=None, callback=True, **options):
    """A trainer of 4 steps whose loss has no parameters, and its loss; it stops at a step."""
    model = tiny_model(training=True)
    options = {"n_dims_per_step": 1} | options
    loss = MIPICLoss(model, losses.MultipleNegativesRankingLoss(model), DIMS, **options)
    assert not any(True for _ in loss.mipic_projections.parameters())
    callbacks = [MIPICCallback(loss)] if callback else []
    callbacks += [StopAt(step)] if step else []
    arguments = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    return make_trainer(model, loss, folder, callbacks=callbacks, **arguments), loss


def test_drawn_dims_of_a_loss_without_parameters(tiny_model, tmp_path):
    """The callback knows the step, and with it the draw goes on; nothing has to be saved for that."""
    trainer, loss = without_projections(tiny_model, tmp_path / "whole")
    trainer.train()
    expected = loss.model.state_dict()
    without_projections(tiny_model, tmp_path / "parts", step=2)[0].train()
    trainer, loss = without_projections(tiny_model, tmp_path / "parts")
    trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(value, expected[name]) for name, value in loss.model.state_dict().items())
    assert not list(tmp_path.rglob(PROJECTIONS_FILE))


def test_all_dims_resume_without_the_callback_or_its_file(tiny_model, tmp_path):
    """Where nothing is drawn and nothing trained but the model, there is nothing to restore."""
    all_dims = {"n_dims_per_step": -1}
    trainer, loss = without_projections(tiny_model, tmp_path / "whole", **all_dims)
    trainer.train()
    expected = loss.model.state_dict()
    without_projections(tiny_model, tmp_path / "parts", step=2, callback=False, **all_dims)[0].train()
    shutil.copytree(tmp_path / "parts", tmp_path / "again")
    for folder, callback in (("parts", False), ("again", True)):
        trainer, loss = without_projections(tiny_model, tmp_path / folder, callback=callback, **all_dims)
        trainer.train(resume_from_checkpoint=True)
        assert all(torch.equal(value, expected[name]) for name, value in loss.model.state_dict().items())


def truncate(path):
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (truncate, ValueError, "is damaged.*earlier checkpoint"),
        (lambda path: path.write_bytes(b""), ValueError, "is damaged"),
        (Path.unlink, FileNotFoundError, "is missing.*made without MIPICCallback.*missing_projections='reset'"),
    ],
)
def test_bad_projections_files(tiny_model, interrupted, spoil, error, message):
    """Truncated, empty, missing: a clear error, and the projections in memory stay as they were."""
    spoil(interrupted / "checkpoint-2" / PROJECTIONS_FILE)
    model, loss = fresh(tiny_model, **DRAWN)
    before = {name: parameter.clone() for name, parameter in loss.mipic_projections.named_parameters()}
    trainer = make_trainer(model, loss, interrupted, max_steps=4, callbacks=[MIPICCallback(loss)])
    with pytest.raises(error, match=message):
        trainer.train(resume_from_checkpoint=True)
    assert all(torch.equal(before[name], value) for name, value in loss.mipic_projections.named_parameters())
    assert (interrupted / "checkpoint-2" / "optimizer.pt").is_file()


@pytest.mark.parametrize(
    ("then", "now"),
    [(["old", "both"], ["new", "both"]), (["old", "both"], ["both"]), (["both"], ["old", "both"]), ([""], ["new"])],
)
def test_renamed_data_sets(tiny_model, tmp_path, then, now):
    """What differs is named; projections in memory stay as they were."""

    def callback(names, seed):
        made = {name: make_loss(tiny_model(), seed=seed) for name in names}
        return MIPICCallback(made[""] if names == [""] else made)

    callback(then, 1).save(tmp_path)
    other = callback(now, 2)
    before = {name: value.clone() for name, value in other.projections().items()}
    differing = (set(then) ^ set(now)) - {""}
    with pytest.raises(ValueError, match=rf"other projections, they differ in .*'{min(differing)}\.mipic_projections"):
        other.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.projections().items())
    callback(now, 2).save(tmp_path)
    other.load(tmp_path)


# --- model_init -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["instance", "factory", "dict"])
def test_each_trial_starts_with_fresh_projections(tiny_model, tmp_path, kind):
    """model_init twice, as a hyperparameter search does: both trials end with the same model, projections and draws.

    The trainer calls a factory of losses once only, so that its loss outlives the trial too.
    """

    def make(model):
        return make_loss(model, lift_init="random", **DRAWN)

    data = pairs(32)
    loss = {"instance": lambda: make(tiny_model()), "factory": lambda: make, "dict": lambda: {"one": make}}[kind]()
    train = datasets.DatasetDict({"one": data}) if kind == "dict" else data
    trainer = make_trainer(None, loss, tmp_path, train, max_steps=3, model_init=lambda: tiny_model(training=True))
    results = []
    for _ in range(2):
        trainer.train()
        used = trainer.loss["one"] if kind == "dict" else trainer.loss
        assert used.model is trainer.model
        results.append(parameters(used))
    assert_equal(results[1], results[0])
    untouched = parameters(make(tiny_model()))
    assert not any(torch.equal(value, untouched[name]) for name, value in results[0].items() if "projections" in name)


def test_a_new_model_is_described_again(tiny_model):
    """Its own pooling is used and its attention made eager; the terms are those of a loss made for it."""
    first, second = tiny_model(pooling="mean"), tiny_model(pooling="cls", hidden_act="relu")
    settings = {"token_importance": "attention"}
    loss = make_loss(first, **settings)
    loss.model = loss.loss.model = second
    features = column_features(second)
    expected = make_loss(second, **settings)(features, None)
    assert {name: value.item() for name, value in loss(features, None).items()} == pytest.approx(
        {name: value.item() for name, value in expected.items()}
    )


def test_loaded_projections_survive_the_first_model_init(tiny_model):
    """Projections that were loaded and not yet trained are what the run is meant to start from."""
    saved = make_loss(tiny_model(), lift_init="random", seed=5)
    loss = make_loss(tiny_model())
    loss.mipic_projections.load_state_dict(saved.mipic_projections.state_dict())
    loss.model = tiny_model()
    assert all(
        torch.equal(*pair)
        for pair in zip(saved.mipic_projections.parameters(), loss.mipic_projections.parameters(), strict=True)
    )


def test_a_model_of_another_shape_is_refused(tiny_model):
    """Projections, layers and checkpoints were chosen for a shape: both are named, and the loss stays as it was."""
    model = tiny_model()
    loss = make_loss(model)
    with pytest.raises(ValueError, match=r"\(depth, width\) \(3, 32\), and model_init made one of \(4, 32\)"):
        loss.model = tiny_model(layers=4)
    with pytest.raises(ValueError, match=r"does not fit the model that model_init made: .*depth of 2"):
        loss.model = tiny_model(layers=2)
    assert loss.model is model


def test_saving_into_a_missing_folder(tiny_model, tmp_path):
    """The folder is named, before anything is written."""
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere to save the projections in"):
        MIPICCallback(fresh(tiny_model)[1]).save(tmp_path / "nowhere")


def test_projections_of_another_shape_are_refused(tiny_model, interrupted):
    """A loss with other dims names what differs; one with other layers too."""
    model = tiny_model()
    loss = MIPICLoss(
        model, losses.MultipleNegativesRankingLoss(model), DIMS, attention_weight=1, sia_layers=[2], lift_init="random"
    )
    with pytest.raises(ValueError, match=r"other projections, they differ in .*mipic_projections.sia.2"):
        MIPICCallback(loss).load(interrupted / "checkpoint-2")
    loss = make_loss(model, pic_chain=[(4, 1), (8, 2), (32, 3)])
    before = {name: parameter.clone() for name, parameter in loss.mipic_projections.named_parameters()}
    with pytest.raises(ValueError, match=r"other projections, they differ in .*'mipic_projections.pic.0"):
        MIPICCallback(loss).load(interrupted / "checkpoint-2")
    assert all(torch.equal(before[name], value) for name, value in loss.mipic_projections.named_parameters())


def test_a_checkpoint_made_without_the_callback_can_be_continued(tiny_model, tmp_path, caplog):
    """missing_projections="reset": the model resumes, the others start afresh with new moments, and that is logged."""
    model, loss = fresh(tiny_model)
    make_trainer(model, loss, tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    model, loss = fresh(tiny_model)
    trainer = make_trainer(
        model, loss, tmp_path, max_steps=5, callbacks=[MIPICCallback(loss, missing_projections="reset")]
    )
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "the projections start afresh" in caplog.text
    head = next(loss.mipic_projections.parameters())
    assert int(trainer.optimizer.state[head]["step"]) == 2
    assert trainer.state.global_step == 5


def test_training_on_in_the_same_process(tiny_model, tmp_path):
    """A second train() with the same loss, and a new trainer with it, are no resume and run."""
    model, loss = fresh(tiny_model)
    trainer = make_trainer(model, loss, tmp_path, max_steps=2)
    trainer.train()
    trainer.train()
    make_trainer(model, loss, tmp_path, max_steps=2).train()


def test_load_best_model_at_end_and_save_total_limit(tiny_model, tmp_path):
    """The projections at the end are those of the best checkpoint; old folders go whole."""
    model, loss = fresh(tiny_model)

    class Worsening(TrainerCallback):
        """Each evaluation is worse than the one before."""

        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    trainer = make_trainer(
        model,
        loss,
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        eval_dataset=pairs(8),
        callbacks=[MIPICCallback(loss), Worsening()],
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-2"
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-2", "checkpoint-6"]
    assert all((tmp_path / name / PROJECTIONS_FILE).is_file() for name in kept)
    at_end = {name: value.clone() for name, value in loss.mipic_projections.named_parameters()}
    callback = MIPICCallback(loss)
    callback.load(tmp_path / "checkpoint-6")
    assert any(not torch.equal(at_end[name], value) for name, value in loss.mipic_projections.named_parameters())
    callback.load(best)
    assert all(torch.equal(at_end[name], value) for name, value in loss.mipic_projections.named_parameters())


def test_a_dict_of_losses_resumes_bit_for_bit(tiny_model, tmp_path):
    """Several losses under one callback, one of them shared by two data sets, one no MIPICLoss."""
    data = {"one": pairs(24, seed=1), "two": pairs(24, seed=5), "three": pairs(24, seed=9), "four": pairs(24, seed=13)}

    def run(folder, resume=False, stop=None):
        model = tiny_model(training=True)
        shared = make_loss(model, n_dims_per_step=1)
        by_name = {
            "one": shared,
            "two": make_loss(model, losses.MultipleNegativesSymmetricRankingLoss(model), seed=4, sia_layers=[2]),
            "three": shared,
            "four": losses.MultipleNegativesRankingLoss(model),
        }
        callbacks = [MIPICCallback(by_name)] + ([StopAt(stop)] if stop else [])
        trainer = make_trainer(
            model,
            by_name,
            folder,
            train=datasets.DatasetDict(data),
            max_steps=8,
            save_strategy="steps",
            save_steps=4,
            per_device_train_batch_size=4,
            callbacks=callbacks,
            learning_rate_mapping={r"^(one|two)\.mipic_projections\.": 5e-3},
        )
        trainer.train(resume_from_checkpoint=resume)
        return {f"{name}.{key}": value for name in ("one", "two") for key, value in parameters(by_name[name]).items()}

    expected = run(tmp_path / "whole")
    run(tmp_path / "parts", stop=4)
    assert_equal(run(tmp_path / "parts", resume=True), expected)


# --- clipping, logging, learning rate ---------------------------------------------------------------------------------


def test_gradients_of_the_projections_are_clipped_and_logged(tiny_model, tmp_path):
    """With the callback, to max_grad_norm on their own; without it they are not clipped."""
    norms, logged = {}, {}
    for clipped in (True, False):
        model, loss = fresh(tiny_model)
        seen = []
        handle = torch_optimizer.register_optimizer_step_pre_hook(
            lambda *_, loss=loss, seen=seen: seen.append(
                torch.stack([p.grad.norm() for p in loss.mipic_projections.parameters()]).norm().item()
            )
        )
        callbacks = [MIPICCallback(loss)] if clipped else []
        trainer = make_trainer(model, loss, tmp_path, max_grad_norm=0.01, callbacks=callbacks, max_steps=3)
        trainer.train()
        handle.remove()
        norms[clipped], logged[clipped] = seen, logs(trainer, "projections_grad_norm")
    assert norms[True] == pytest.approx([0.01] * 3, rel=1e-3)
    assert min(norms[False]) > 0.02
    assert logged[False] == []
    assert len(logged[True]) == 3
    assert logged[True][0] == pytest.approx(norms[False][0], rel=1e-3)


def test_the_flags_of_the_loss_end_with_the_training(tiny_model, tmp_path):
    """Who looks after it, whether a scaler skips steps, and the step: a loop of one's own begins without them."""
    model, loss = fresh(tiny_model)
    during = []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            during.append((loss.managed, loss.skips_nonfinite, loss.global_step))

    trainer = make_trainer(model, loss, tmp_path, max_steps=1, callbacks=[MIPICCallback(loss), Note()])
    trainer.args.fp16 = True  # which needs a GPU; the callback asks the arguments only
    trainer.train()
    assert during == [(True, True, 0)]
    assert (loss.managed, loss.skips_nonfinite, loss.global_step) == (False, False, None)


def test_without_a_limit_nothing_is_clipped(tiny_model):
    """max_grad_norm=0 means none, as it does to the trainer."""
    model, loss = fresh(tiny_model)
    total(loss(column_features(model), None)).backward()
    before = [parameter.grad.clone() for parameter in loss.mipic_projections.parameters()]
    MIPICCallback(loss).on_pre_optimizer_step(SimpleNamespace(max_grad_norm=0.0), None, None)
    after = [parameter.grad for parameter in loss.mipic_projections.parameters()]
    assert before
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_learning_rate_for_the_projections(tiny_model, tmp_path):
    """learning_rate_mapping with their prefix; by default they have the base rate and, but for biases, decay."""
    model, loss = fresh(tiny_model)
    trainer = make_trainer(model, loss, tmp_path, learning_rate_mapping={r"^mipic_projections\.": 7e-3}, max_steps=1)
    trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
    projections = {id(p) for p in loss.mipic_projections.parameters()}
    assert projections <= rates.keys()
    assert all((rate == 7e-3) == (key in projections) for key, rate in rates.items())
    trainer = make_trainer(model, loss, tmp_path, learning_rate=1e-3, weight_decay=0.1, max_steps=1)
    trainer.create_optimizer()
    groups = {id(p): group for group in trainer.optimizer.param_groups for p in group["params"]}
    for name, parameter in loss.mipic_projections.named_parameters():
        assert groups[id(parameter)]["lr"] == 1e-3
        assert groups[id(parameter)]["weight_decay"] == (0.0 if name.endswith("bias") else 0.1)


def test_an_optimizer_without_the_projections_is_refused(tiny_model, tmp_path):
    """optimizer_cls_and_kwargs drops them silently; the callback says so."""
    model, loss = fresh(tiny_model)
    trainer = make_trainer(
        model,
        loss,
        tmp_path,
        optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": list(model.parameters()), "lr": 1e-3}),
        callbacks=[MIPICCallback(loss)],
    )
    with pytest.raises(
        ValueError, match=r"does not have the projections of the loss given to MIPICCallback.*args\.optim"
    ):
        trainer.train()


@pytest.mark.parametrize(
    "bad", ["a string", {"one": "x"}, {}, lambda model: None], ids=["text", "dict of text", "empty dict", "function"]
)
def test_the_callback_wants_the_loss(bad):
    """Anything else is a TypeError that says what is wanted."""
    with pytest.raises(TypeError, match="loss must be the MIPICLoss that the trainer gets"):
        MIPICCallback(bad)


def test_missing_projections_is_checked(tiny_model):
    """One of two words."""
    _, loss = fresh(tiny_model)
    with pytest.raises(ValueError, match="missing_projections must be 'error' or 'reset', got 'ignore'"):
        MIPICCallback(loss, missing_projections="ignore")


# --- saved config -----------------------------------------------------------------------------------------------------


def test_the_config_says_matryoshka(tiny_model, tmp_path):
    """With the callback, config.json of checkpoint and trained model has the keys; the model loads without us."""
    model, loss = fresh(tiny_model)
    trainer = make_trainer(
        model, loss, tmp_path, max_steps=2, save_strategy="steps", save_steps=2, callbacks=[MIPICCallback(loss)]
    )
    trainer.train()
    model.save(str(tmp_path / "saved"))
    for folder in ("saved", "checkpoint-2"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert config["is_matryoshka"] is True
        assert config["matryoshka_dimensions"] == [4, 8, 16, 32]
        assert config["mipic_chain"] == [[4, 1], [16, 2], [32, 3]] == [list(p) for p in loss.pic_chain]
        assert not config.get("output_hidden_states")
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert not (tmp_path / "saved" / PROJECTIONS_FILE).exists()
    texts = ["a red house", "the old man plays guitar"]
    torch.testing.assert_close(loaded.encode(texts), model.eval().encode(texts))


def test_the_model_card_lists_the_loss(tiny_model, tmp_path):
    """Class path, base loss, settings and the paper's citation."""
    model, loss = fresh(tiny_model)
    make_trainer(model, loss, tmp_path / "run", max_steps=1, callbacks=[MIPICCallback(loss)]).train()
    model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "mipic_st.losses.mipic.MIPICLoss" in card
    assert '"loss": "MultipleNegativesRankingLoss"' in card
    for name in loss.get_config_dict():
        assert f'"{name}"' in card
    assert "2604.24374" in card


def test_the_card_of_a_trained_model_says_how_to_cut(tiny_model, tmp_path):
    """The saved README.md has the tag and a line with truncate_dim; in place of the line of a rotation before it."""
    model, loss = fresh(tiny_model)
    set_matryoshka_config(model, [2, 32])
    make_trainer(model, loss, tmp_path / "run", max_steps=1, callbacks=[MIPICCallback(loss)]).train()
    model.save(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "generated_from_trainer" in card
    assert card.count("- matryoshka\n") == 1
    line = "can be cut to 4, 8 or 16 values: load the model with `SentenceTransformer(..., truncate_dim=8)`"
    assert card.count("truncate_dim") == card.count(line) == 1
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", truncate_dim=8)
    assert loaded.encode("a red house", normalize_embeddings=True).shape == (8,)


# --- without a trainer ------------------------------------------------------------------------------------------------


def stepped(tiny_model, steps, **options):
    """A loss and its optimizer after some steps of a plain loop."""
    _, loss = fresh(tiny_model, **options)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=1e-3)
    for step in range(steps):
        step_once(loss, optimizer, step)
    return loss, optimizer


def step_once(loss, optimizer, seed):
    torch.manual_seed(seed)
    optimizer.zero_grad()
    total(loss(column_features(loss.model, seed=seed), None)).backward()
    optimizer.step()


@pytest.mark.parametrize("order", ["loss first", "optimizer first"])
def test_a_plain_loop_resumes_from_state_dicts(tiny_model, order):
    """load_state_dict of loss and optimizer, in either order, is a right resume: it goes on bit for bit."""
    loss, optimizer = stepped(tiny_model, 3)
    saved = copy.deepcopy({"loss": loss.state_dict(), "optimizer": optimizer.state_dict()})
    step_once(loss, optimizer, 3)
    expected = parameters(loss)

    loss, optimizer = stepped(tiny_model, 0)
    if order == "loss first":
        loss.load_state_dict(saved["loss"])
    optimizer.load_state_dict(saved["optimizer"])
    if order == "optimizer first":
        loss.load_state_dict(saved["loss"])
    step_once(loss, optimizer, 3)
    assert_equal(parameters(loss), expected)
