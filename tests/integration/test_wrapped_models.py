"""Models that are compiled or wrapped are looked into, and what is no model is named, by all who take one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from conftest import sentences
from mipic_st import (
    MatryoshkaEvaluator,
    Rotation,
    advise,
    evaluate_mteb,
    export_truncated,
    fit_layer_cuts,
    measure_speedup,
    rotate_model,
    set_matryoshka_config,
)
from mipic_st.deploy.tei import save_for_tei

TEXTS = sentences(120, seed=7, shortest=3)


def evaluated(model, **options):
    judge = EmbeddingSimilarityEvaluator(TEXTS[:20], TEXTS[20:40], [(7 * i % 20) / 20 for i in range(20)], name="sts")
    return MatryoshkaEvaluator(judge, [8, 32], **options)(model)


CALLS = {
    "rotate_model": lambda model: rotate_model(model, TEXTS, [4, 8], max_steps=5, show_progress_bar=False),
    "fit_layer_cuts": lambda model: fit_layer_cuts(model, TEXTS, layers=[1], dims=[8], word_weights=False, max_steps=0),
    "export_truncated": lambda model: export_truncated(model, layer=2),
    "measure_speedup": lambda model: measure_speedup(model, model, TEXTS[:2], repeats=1),
    "MatryoshkaEvaluator": evaluated,
    "MatryoshkaEvaluator, layers": lambda model: evaluated(model, layers=[1, 2]),
    "set_matryoshka_config": lambda model: set_matryoshka_config(model, [8, 32]),
    "advise": lambda model: advise(model, TEXTS, bytes=[8], precisions=["binary"]),
}


def no_task(model, folder):
    pytest.importorskip("mteb", reason="needs the eval extra")
    evaluate_mteb(model, "NoSuchTask", [8], output=folder)


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_wrapped_models_are_models(tiny_model, tmp_path, wrap):
    """What holds the model has no encode of its own and no modules to count."""
    for name, call in CALLS.items():
        call(wrap(tiny_model()))
        assert name
    with pytest.raises(ValueError, match="'NoSuchTask' is neither a group"):
        no_task(wrap(tiny_model()), tmp_path)


@pytest.mark.parametrize("kind", ["path", "encoder", "module", "nothing"])
def test_what_is_no_model_is_named(tiny_model, tmp_path, kind):
    """Not by what it lacks."""
    model = tiny_model()
    wrong = {"path": tmp_path, "encoder": model[0].auto_model, "module": model[0], "nothing": None}[kind]
    for name, call in {**CALLS, "evaluate_mteb": lambda model: no_task(model, tmp_path)}.items():
        if name == "advise" and kind in ("path", "nothing"):
            continue
        with pytest.raises(TypeError, match="model must be a SentenceTransformer, or one wrapped for training, got"):
            call(wrong)


def test_a_module_in_two_places_is_refused(tiny_model, tmp_path):
    """sentence-transformers runs it once, and twice when it was saved; the model stays what it is."""
    model = tiny_model()
    model.append(torch.nn.Identity())
    model.append(model[-1])
    before, names = model.encode(TEXTS[:3]), list(model._modules)
    for call in (
        CALLS["rotate_model"],
        lambda model: Rotation(np.eye(32)[::-1], (8,)).put_in(model),
        lambda model: save_for_tei(model, tmp_path / "tei"),
    ):
        with pytest.raises(ValueError, match=r"one module stands in two places of .* \+ Identity \+ Identity: it"):
            call(model)
    assert list(model._modules) == names
    np.testing.assert_array_equal(model.encode(TEXTS[:3]), before)
    assert not (tmp_path / "tei").exists()
