"""Invariants of the evaluation: one encoding, no dim's score for another, equal to the native evaluators."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    MSEEvaluatorFromDataFrame,
    NanoBEIREvaluator,
    ParaphraseMiningEvaluator,
    RerankingEvaluator,
    SequentialEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from conftest import sentences
from evaluation_fixtures import CountingModel, tiny_model
from mipic_st.deploy.truncated import export_truncated
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.evaluation.matryoshka import MatryoshkaEvaluator
from mipic_st.evaluation.probe import ClassificationProbeEvaluator
from mipic_st.evaluation.store import EmbeddingStore
from mipic_st.transforms.layer_cut import LayerCuts

DIMS = [4, 9, 32]
A, B, C = sentences(24, 1), sentences(24, 2), sentences(24, 3)
SCORES = [((7 * i) % 24) / 24 for i in range(24)]


def sts(**kwargs):
    return EmbeddingSimilarityEvaluator(A, B, SCORES, **{"name": "sts-dev", **kwargs})


def make(kind, **kwargs):
    ids = {f"d{i}": text for i, text in enumerate(B)}
    queries = {f"q{i}": text for i, text in enumerate(A[:8])}
    if kind == "sts":
        return sts(**kwargs)
    if kind == "binary":
        return BinaryClassificationEvaluator(A, B, [i % 2 for i in range(24)], name="pairs", **kwargs)
    if kind == "triplet":
        return TripletEvaluator(A, B, C, name="trip", **kwargs)
    if kind == "ir":
        relevant = {f"q{i}": {f"d{i}", f"d{i + 3}"} for i in range(8)}
        return InformationRetrievalEvaluator(queries, ids, relevant, name="ir", corpus_chunk_size=10, **kwargs)
    if kind == "rerank":
        samples = [{"query": A[i], "positive": [B[i]], "negative": [B[i + 1], C[i]]} for i in range(10)]
        return RerankingEvaluator(samples, name="rerank", **kwargs)
    return ParaphraseMiningEvaluator(ids, [("d0", "d1"), ("d2", "d5")], name="mining", **kwargs)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", ["sts", "binary", "triplet", "ir", "rerank", "mining"])
def test_equals_the_native_evaluator_at_each_dim(model, kind):
    """Every metric at every dim equals the native evaluator with truncate_dim to 1e-6."""
    ours = MatryoshkaEvaluator(make(kind), DIMS)(model)
    for dim in DIMS:
        native_evaluator = make(kind, truncate_dim=dim)
        name = native_evaluator.name
        for key, value in native_evaluator(model).items():
            if "threshold" in key:
                continue
            assert ours[f"{name}-{dim}_{key.removeprefix(name + '_')}"] == pytest.approx(value, abs=1e-6), (dim, key)


def test_scores_differ_between_dims(model):
    """The equality above would also hold for a store that always answered with one dim, if all scores were equal."""
    scores = MatryoshkaEvaluator(sts(), DIMS)(model)
    assert len({round(scores[f"sts-dev-{dim}_spearman_cosine"], 6) for dim in DIMS}) == len(DIMS)


def test_every_distinct_text_is_encoded_once(model, monkeypatch):
    """Repeated texts, several evaluators, seven dims: one encoding per method and text, empty string included."""
    counted = CountingModel(model, monkeypatch)
    repeated = EmbeddingSimilarityEvaluator([A[0], A[0], ""], [B[0], A[0], B[0]], [0.1, 1.0, 0.3], name="rep")
    MatryoshkaEvaluator(SequentialEvaluator([sts(), make("triplet"), repeated]), [2, 4, 8, 12, 16, 24, 32])(model)
    by_encode, as_queries, as_documents = {*A, *B, ""}, {*A}, {*B, *C}
    assert sorted(counted.texts) == sorted([*by_encode, *as_queries, *as_documents])


def test_cut_vectors_have_unit_length_and_the_full_width_is_the_models(tmp_path):
    """Renormalised below full width; untouched at it, also for a model without Normalize."""
    model = tiny_model(tmp_path, normalize=False)
    store = EmbeddingStore(model)
    np.testing.assert_allclose(np.linalg.norm(store.view(8).encode(A), axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(store.view(32).encode(A), model.encode(A), atol=1e-5)
    raw = store.view(8, normalize=False).encode(A)
    np.testing.assert_allclose(raw, model.encode(A, truncate_dim=8), atol=1e-5)


def test_nano_beir_equals_the_native_one(model, monkeypatch):
    """NanoBEIR's data sets and their mean equal the native evaluator's at each dim (data made on the spot)."""
    ours = MatryoshkaEvaluator(nano(monkeypatch), [4, 32], primary=4)
    scores = ours(model)
    native = nano(monkeypatch, truncate_dim=4)(model)
    for key in ("NanoBEIR_mean{}_cosine_ndcg@10", "NanoMSMARCO{}_cosine_map@100"):
        assert scores[key.format("-4")] == pytest.approx(native[key.format("_4")], abs=1e-6)
    assert ours.primary_metric == "NanoBEIR_mean-4_cosine_ndcg@10"


@pytest.mark.parametrize("primary", [9, "mean", "worst"])
def test_primary_metric_is_the_chosen_one(model, primary):
    """The primary key is in the result and holds the dim's score, the mean or the minimum."""
    evaluator = MatryoshkaEvaluator(sts(), DIMS, primary=primary)
    scores = evaluator(model)
    per_dim = [scores[f"sts-dev-{dim}_spearman_cosine"] for dim in DIMS]
    assert evaluator.primary_metric == f"sts-dev-{primary}_spearman_cosine"
    expected = {9: per_dim[1], "mean": float(np.mean(per_dim)), "worst": min(per_dim)}[primary]
    assert scores[evaluator.primary_metric] == pytest.approx(expected)


def test_csv_files_are_one_per_dim(model, tmp_path):
    """No dim writes into another dim's CSV file, and a second run appends."""
    evaluator = MatryoshkaEvaluator(sts(), DIMS)
    evaluator(model, output_path=str(tmp_path))
    evaluator(model, output_path=str(tmp_path))
    for dim in DIMS:
        lines = (tmp_path / f"similarity_evaluation_sts-dev-{dim}_results.csv").read_text().splitlines()
        assert len(lines) == 3
        assert lines[0].count(",") == lines[1].count(",")


def test_last_layer_of_the_grid_is_the_model(model):
    """The last layer's cells equal the scores without layers; a lower layer's differ; the config flag is restored."""
    plain = MatryoshkaEvaluator(sts(), DIMS)(model)
    grid = MatryoshkaEvaluator(sts(), DIMS, layers=[1, 4])(model)
    for dim in DIMS:
        key = f"{dim}_spearman_cosine"
        assert grid[f"sts-dev-L4-{key}"] == pytest.approx(plain[f"sts-dev-{key}"], abs=1e-6)
        assert abs(grid[f"sts-dev-L1-{key}"] - plain[f"sts-dev-{key}"]) > 1e-4
    assert model[0].auto_model.config.output_hidden_states is False


def random_cuts(model, layers, words=True):
    """Maps, and with ``words`` weights of the tokens, that no model would learn, so that none can be left out."""
    generator = torch.Generator().manual_seed(1)
    width = model[0].get_embedding_dimension()
    maps = {layer: torch.randn(width, model.get_embedding_dimension(), generator=generator) for layer in layers}
    weights = {layer: torch.rand(len(model.tokenizer), generator=generator) + 0.1 for layer in layers if words}
    return LayerCuts(maps, (4, 8), [], weights, fingerprint(model))


@pytest.mark.parametrize("tail", [None, "distiluse"])
@pytest.mark.parametrize("words", [False, True])
def test_fitted_cells_are_the_exported_models(tiny_model, tail, words):
    """Layers with a map score as the models that were cut there; others as without cuts; the last one as the model."""
    model = tiny_model("bert", normalize=True, tail=tail)
    cuts, dims = random_cuts(model, [1], words), [8, model.get_embedding_dimension()]
    evaluator = MatryoshkaEvaluator(sts(), dims, layers=[1, 2, 3], layer_cuts=cuts, precisions=["float32", "int8"])
    scores = evaluator(model)
    plain = MatryoshkaEvaluator(sts(), dims, layers=[1, 2, 3], precisions=["float32", "int8"])(model)
    for dim in dims:
        own = sts()(export_truncated(model, 1, dim, cuts=cuts))["sts-dev_spearman_cosine"]
        assert scores[f"sts-dev-L1-fitted-{dim}_spearman_cosine"] == pytest.approx(own, abs=1e-6)
        assert abs(own - plain[f"sts-dev-L1-{dim}_spearman_cosine"]) > 1e-4
    same = {key: value for key, value in scores.items() if "-L1-" not in key}
    assert same == {key: plain[key] for key in same}
    assert {key.replace("-fitted", "") for key in scores} == set(plain)
    assert evaluator.get_config_dict()["layer_cuts"] == [1]
    figure = evaluator.report("m").plot_layer_dim()
    shown = 100 * scores["sts-dev-L1-fitted-8_spearman_cosine"]
    assert f"{shown:.1f}" in [text.get_text() for text in figure.axes[0].texts]


def test_fitted_cells_of_a_model_in_half_precision(tiny_model):
    """The map takes the model's precision, as in the exported model."""
    model = tiny_model("bert", normalize=True).to(torch.bfloat16)
    for words in (False, True):
        cuts = random_cuts(model, [2], words)
        with EmbeddingStore(model, [2], cuts=cuts) as store:
            vectors = store.view(8, layer=2).encode(A)
        np.testing.assert_allclose(vectors, export_truncated(model, 2, 8, cuts=cuts).encode(A), atol=2e-2)


def test_cuts_of_another_model_or_layer_are_refused(model):
    """At construction what cannot be cuts or serves no layer; at a call those that were fitted on another model."""
    cuts = random_cuts(model, [2])
    for layers in (None, [1, 4]):
        with pytest.raises(ValueError, match=r"layer_cuts have maps for layers \[2\], so name some in layers="):
            MatryoshkaEvaluator(sts(), [8], layers=layers, layer_cuts=cuts)
    with pytest.raises(TypeError, match="layer_cuts must be LayerCuts of fit_layer_cuts, got dict"):
        MatryoshkaEvaluator(sts(), [8], layers=[2], layer_cuts={2: 0})
    other = replace(cuts, fingerprint="another")
    with pytest.raises(ValueError, match="cuts were fitted when the model gave other vectors"):
        MatryoshkaEvaluator(sts(), [8], layers=[2], layer_cuts=other)(model)


def test_flag_is_restored_after_an_error(model, monkeypatch):
    """An exception inside the grid's forward leaves config and training mode as they were."""
    model.train()
    monkeypatch.setattr(model[0], "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MatryoshkaEvaluator(sts(), DIMS, layers=[1])(model)
    assert model[0].auto_model.config.output_hidden_states is False
    assert model.training
    model.eval()


def test_nan_embeddings_are_named(tmp_path):
    """NaN raises with the number of texts and the first one, instead of a silent NaN score."""
    model = tiny_model(tmp_path)
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight[5] = float("nan")
    with pytest.raises(ValueError, match=r"NaN or infinite values for \d+ of \d+ texts, the first is '"):
        MatryoshkaEvaluator(sts(), DIMS)(model)


def test_vectors_are_freed(model):
    """After a call the evaluator holds scores only, and says how large the vectors were."""
    evaluator = MatryoshkaEvaluator(sts(), DIMS)
    evaluator(model)
    assert evaluator.peak_store_bytes == len({*A, *B}) * 32 * 4


def test_sequence_scores_every_evaluator(model):
    """A SequentialEvaluator's parts keep their names, and its score gets the dim."""
    evaluator = MatryoshkaEvaluator(SequentialEvaluator([make("triplet"), sts()]), [4, 32], primary=4)
    scores = evaluator(model)
    assert {"trip-4_cosine_accuracy", "sts-dev-32_spearman_cosine", "dim-mean_sequential_score"} <= set(scores)
    assert scores["dim-4_sequential_score"] == scores["sts-dev-4_spearman_cosine"]
    assert evaluator.primary_metric == "dim-4_sequential_score"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": []}, "dims is empty"),
        ({"dims": [8, 8]}, "dims has duplicates"),
        ({"dims": [0]}, "dims must be > 0"),
        ({"dims": [8], "primary": 9}, "primary must be"),
        ({"dims": [8], "primary": 8.0}, "primary must be .* got 8.0"),
        ({"dims": [8], "layers": [-1]}, r"layers must be from 0 \(embeddings\), got \[-1\]"),
        ({"dims": [8], "layers": [2, 2]}, "layers has duplicates"),
        ({"dims": [8], "precisions": ["int8"]}, "must include 'float32'"),
        ({"dims": [8], "evaluator": sts(truncate_dim=8)}, "leave it unset"),
        ({"dims": [8], "evaluator": SequentialEvaluator([sts(), sts()])}, "share the name 'sts-dev'"),
        ({"dims": [8], "layers": []}, "layers is empty"),
    ],
)
def test_bad_arguments_are_named_at_construction(arguments, message):
    """Bad arguments raise before any model is seen."""
    with pytest.raises(ValueError, match=message):
        MatryoshkaEvaluator(**{"evaluator": sts(), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": 8}, "dims must be a sequence"),
        ({"dims": [8.0]}, r"dims must be integers, e\.g\. \[384, 64, 16\], got \[8.0\]"),
        ({"layers": 2}, "layers must be a sequence"),
        ({"precisions": "int8"}, "precisions must be a sequence"),
        ({"precisions": 8}, "precisions must be a sequence"),
        ({"normalize": "no"}, "normalize must be True or False, got 'no'"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named_at_construction(arguments, message):
    """A number for a list, a string for a flag: TypeError."""
    with pytest.raises(TypeError, match=message):
        MatryoshkaEvaluator(**{"evaluator": sts(), "dims": [8], **arguments})


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_numpy_and_tensor_arguments_are_numbers(model, array):
    """Arrays and tensors mean what the lists mean, and the metric that selects checkpoints exists."""
    plain = MatryoshkaEvaluator(sts(), [8, 32], layers=[1, 4], primary=8)
    arrays = MatryoshkaEvaluator(sts(), array([8, 32]), layers=array([1, 4]), primary=array(8))
    assert arrays(model) == plain(model)
    assert arrays.primary_metric == plain.primary_metric == "sts-dev-L4-8_spearman_cosine"
    assert json.dumps(arrays.get_config_dict()) == json.dumps(plain.get_config_dict())


def test_dims_above_the_width_and_unknown_layers_are_named(model):
    """Dims beyond D and layers beyond L raise with the limit."""
    with pytest.raises(ValueError, match=r"dims \[64\] exceed the model's width of 32"):
        MatryoshkaEvaluator(sts(), [8, 64])(model)
    with pytest.raises(ValueError, match=r"from 0 .* to the model's depth of 4"):
        MatryoshkaEvaluator(sts(), [8], layers=[5])(model)


def test_evaluator_that_does_not_encode_is_refused(model):
    """The scores of an evaluator that runs the forward pass itself would say nothing about dims."""

    class Forward(BaseEvaluator):
        name = "x"

        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            return {"x_width": float(model(model.preprocess(["cat"]))["sentence_embedding"].shape[-1])}

    with pytest.raises(TypeError, match="encode"):
        MatryoshkaEvaluator(Forward(), [8])(model)


@pytest.mark.parametrize("bad", [8, 32])
def test_worst_does_not_hide_a_score_that_is_not_a_number(model, bad):
    """Whichever dim it is at, a NaN shows in mean and worst."""

    class Scores(BaseEvaluator):
        name = "x"

        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            width = model.encode(["cat"]).shape[-1]
            self.primary_metric = f"{self.name}_score"
            return {f"{self.name}_score": float("nan") if width == bad else 0.5}

    results = MatryoshkaEvaluator(Scores(), [8, 32])(model)
    assert np.isnan(results["x-worst_score"])
    assert np.isnan(results["x-mean_score"])


class Widths(BaseEvaluator):
    """An evaluator of somebody's own, whose primary metric may or may not carry its name."""

    def __init__(self, primary_metric):
        super().__init__()
        self.name, self.primary_metric = "own", primary_metric

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        return {f"{self.name}_first": 0.0, f"{self.name}_width": float(model.encode(["cat"]).shape[-1])}


@pytest.mark.parametrize("primary_metric", ["width", "own_width"])
def test_a_primary_metric_is_found_with_and_without_the_name(model, primary_metric):
    """The scores carry the evaluator's name, and at each dim another one; the primary metric is the one meant."""
    evaluator = MatryoshkaEvaluator(Widths(primary_metric), [8, 32], primary=8)
    assert evaluator(model)["own-mean_width"] == 20
    assert evaluator.primary_metric == "own-8_width"


def test_a_primary_metric_that_is_no_score_is_named(model):
    """With the scores that there are."""
    with pytest.raises(ValueError, match=r"Widths says primary_metric='depth'.*own-8_first"):
        MatryoshkaEvaluator(Widths("depth"), [8])(model)


class TwoMetrics(BaseEvaluator):
    """Like InformationRetrievalEvaluator with several score functions: takes the better one of the moment, once."""

    def __init__(self, name="two", sticky=True):
        super().__init__()
        self.name, self.sticky = name, sticky

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        width = model.encode(["cat"]).shape[-1]
        scores = {"up": width / 100, "down": 0.2}
        if not (self.sticky and self.primary_metric):
            self.primary_metric = max(scores, key=scores.get)
        return self.prefix_name_to_metrics(scores, self.name)


@pytest.mark.parametrize("primary", ["mean", "worst", 8])
def test_all_dims_count_by_one_metric(model, primary):
    """The largest dim says "up" (0.32), dim 8 alone would say "down" (0.2): both count "up", in the report too."""
    assert TwoMetrics()(model)["two_up"] == 0.32
    for sticky in (True, False):
        evaluator = MatryoshkaEvaluator(TwoMetrics(sticky=sticky), [8, 32], primary=primary)
        for _ in range(2):
            scores = evaluator(model)
            assert scores[evaluator.primary_metric] == pytest.approx({"mean": 0.2, "worst": 0.08, 8: 0.08}[primary])
            assert "two-mean_up" in scores
            assert {row["metric"] for row in evaluator.records if row["primary"]} == {"up"}


def test_all_dims_of_a_sequence_count_by_one_metric(model, caplog):
    """The sequence's score is made of one metric; an evaluator that insists on another one is named."""
    for sticky, score in ((True, 0.08), (False, 0.2)):
        evaluator = MatryoshkaEvaluator(SequentialEvaluator([sts(), TwoMetrics(sticky=sticky)]), [8, 32])
        assert evaluator(model)["dim-8_sequential_score"] == score
        assert ("choose other primary metrics" in caplog.text) != sticky


def test_retrieval_with_two_similarities_counts_by_one(tmp_path):
    """Under the native choice per dim another score function would win at some dim: ours is one at all of them."""
    from sentence_transformers.util import cos_sim, euclidean_sim

    model = tiny_model(tmp_path, normalize=False)
    functions = {"cosine": cos_sim, "euclid": euclidean_sim}
    dims = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    native = [make("ir", score_functions=functions, truncate_dim=dim) for dim in dims]
    chosen = set()
    for evaluator in native:
        evaluator(model)
        chosen.add(evaluator.primary_metric)
    assert len(chosen) == 2
    ours = MatryoshkaEvaluator(make("ir", score_functions=functions), dims, normalize=False)
    scores = ours(model)
    metric = ours.primary_metric.removeprefix("ir-mean_")
    assert scores[ours.primary_metric] == pytest.approx(np.mean([scores[f"ir-{dim}_{metric}"] for dim in dims]))
    assert f"ir_{metric}" == native[-1].primary_metric


def test_a_metric_that_a_dim_lacks_is_named(model):
    """No mean over two metrics."""

    class Named(Widths):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            width = model.encode(["cat"]).shape[-1]
            self.primary_metric = f"width{width}"
            return {f"{self.name}_width{width}": 1.0}

    with pytest.raises(ValueError, match=r"gives no 'own-32_width32' at 8, only \['own-8_width8'\]"):
        MatryoshkaEvaluator(Named(""), [8, 32])(model)


@pytest.mark.parametrize("similarity", ["dot", "euclidean", "cosine"])
def test_scores_that_depend_on_length_are_compared_alike(tmp_path, caplog, similarity):
    """The uncut width is given raw, as the native evaluator has it, and renormalised; mean and worst use the latter."""
    model = tiny_model(tmp_path, normalize=False, similarity_fn_name=similarity)
    evaluator = MatryoshkaEvaluator(sts(), [8, 32], primary="worst")
    scores = evaluator(model)
    evaluator(model)
    key = f"spearman_{similarity}"
    assert scores[f"sts-dev-32_{key}"] == pytest.approx(sts()(model)[f"sts-dev_{key}"], abs=1e-6)
    alike = sts(precision="float32")(model)[f"sts-dev_{key}"]  # with a precision it renormalises
    compared = [scores[f"sts-dev-8_{key}"], alike]
    assert scores[f"sts-dev-mean_{key}"] == pytest.approx(np.mean(compared), abs=1e-6)
    assert scores[f"sts-dev-worst_{key}"] == pytest.approx(min(compared), abs=1e-6)
    differs = similarity != "cosine"
    assert (f"sts-dev-32-unit_{key}" in scores) == differs
    assert caplog.text.count("depends on the length of the vectors") == differs
    if differs:
        assert abs(alike - scores[f"sts-dev-32_{key}"]) > 1e-3


@pytest.mark.parametrize("options", [{"normalize": False}, {"dims": [8, 16]}, {"dims": [32]}])
def test_no_second_score_where_all_dims_are_alike(tmp_path, caplog, options):
    """All raw, all cut, or one dim: nothing to warn of."""
    model = tiny_model(tmp_path, normalize=False, similarity_fn_name="dot")
    scores = MatryoshkaEvaluator(sts(), **{"dims": [8, 32], **options})(model)
    assert not any("unit" in key for key in scores)
    assert "length of the vectors" not in caplog.text


def test_evaluators_with_layers_share_a_model_in_threads(tmp_path):
    """None fails, all have the scores of one alone, and nothing stays switched on."""
    from concurrent.futures import ThreadPoolExecutor

    model = tiny_model(tmp_path)
    expected = MatryoshkaEvaluator(sts(), [8, 32], layers=[1, 4])(model)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(MatryoshkaEvaluator(sts(), [8, 32], layers=[1, 4]), model) for _ in range(9)]
        for run in runs:
            assert run.result() == pytest.approx(expected, abs=1e-6)
    assert model[0].auto_model.config.output_hidden_states is False


def teacher_and_student(tmp_path):
    return [tiny_model(tmp_path / str(layers), normalize=False, layers=layers) for layers in (2, 4)]


def test_a_teacher_is_cut_as_the_student_is(tmp_path):
    """MSEEvaluator, both kinds: raw at the uncut width (the native score), cut and renormalised below, or just cut."""
    teacher, student = teacher_and_student(tmp_path)
    frame = [{"en": a, "xx": b} for a, b in zip(A, B, strict=True)]
    makers = [
        lambda **options: MSEEvaluator(A, B, teacher_model=teacher, name="mse", **options),
        lambda **options: MSEEvaluatorFromDataFrame(frame, teacher, [("en", "xx")], name="mse", **options),
    ]
    left, right = teacher.encode(A), student.encode(B)
    for maker in makers:
        for normalize in (True, False):
            scores = MatryoshkaEvaluator(maker(), [1, 8, 32], normalize=normalize)(student)
            native = maker()(student)["mse_negative_mse"]
            assert scores["mse-32_negative_mse"] == pytest.approx(native, rel=1e-5)
            for dim in (1, 8):
                pair = [vectors[:, :dim] for vectors in (left, right)]
                if normalize:
                    pair = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in pair]
                expected = -100 * ((pair[0] - pair[1]) ** 2).mean()
                assert scores[f"mse-{dim}_negative_mse"] == pytest.approx(expected, rel=1e-4)
                if not normalize:
                    native = maker(truncate_dim=dim)(student)["mse_negative_mse"]
                    assert scores[f"mse-{dim}_negative_mse"] == pytest.approx(native, rel=1e-4)


def test_a_raw_teacher_of_a_student_of_unit_length(tmp_path, caplog):
    """The uncut width compares with the raw teacher, as the native evaluator; mean and worst do so renormalised."""
    teacher = tiny_model(tmp_path / "teacher", normalize=False, layers=2)
    student = tiny_model(tmp_path / "student", normalize=True, layers=4)
    scores = MatryoshkaEvaluator(MSEEvaluator(A, B, teacher_model=teacher, name="mse"), [8, 32])(student)
    native = MSEEvaluator(A, B, teacher_model=teacher, name="mse")(student)["mse_negative_mse"]
    assert scores["mse-32_negative_mse"] == pytest.approx(native, rel=1e-5)
    left, right = teacher.encode(A, normalize_embeddings=True), student.encode(B)
    alike = -100 * ((left - right) ** 2).mean()
    assert alike > native + 1
    assert scores["mse-32-unit_negative_mse"] == pytest.approx(alike, rel=1e-4)
    values = [alike, scores["mse-8_negative_mse"]]
    assert scores["mse-mean_negative_mse"] == pytest.approx(np.mean(values), rel=1e-4)
    assert scores["mse-worst_negative_mse"] == pytest.approx(min(values), rel=1e-4)
    assert "the model's or the teacher's are not of length 1" in caplog.text


class WidthAsError(BaseEvaluator):
    """Lower is better: the number of values."""

    def __init__(self, name):
        super().__init__()
        self.name, self.primary_metric, self.greater_is_better = name, "err", False

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        scores = {"err": float(model.encode(["a red house"]).shape[1])}
        return self.prefix_name_to_metrics(scores, self.name)


@pytest.mark.parametrize("sequence", [False, True])
def test_the_worst_of_what_should_be_low(tmp_path, sequence):
    """A sequence counts as its last evaluator does, also in whether more is better."""
    inner = SequentialEvaluator([sts(), WidthAsError("e")]) if sequence else WidthAsError("e")
    evaluator = MatryoshkaEvaluator(inner, [8, 32])
    scores = evaluator(tiny_model(tmp_path))
    assert not evaluator.greater_is_better
    assert [value for key, value in scores.items() if "worst" in key] == [32.0]
    negated = SequentialEvaluator([WidthAsError("e")], main_score_function=lambda values: -values[-1])
    assert MatryoshkaEvaluator(negated, [8]).greater_is_better


def test_what_has_no_teacher_at_a_dim_is_refused(tmp_path):
    """Codes of int8 have no teacher, a teacher of another width has no cut; at dim 1 NumPy would compare them."""
    teacher, student = teacher_and_student(tmp_path)
    evaluator = MSEEvaluator(A, B, teacher_model=teacher, name="mse")
    with pytest.raises(ValueError, match="precisions: an MSEEvaluator"):
        MatryoshkaEvaluator(SequentialEvaluator([sts(), evaluator]), [8], precisions=["float32", "int8"])
    evaluator.source_embeddings = evaluator.source_embeddings[:, :20]
    with pytest.raises(ValueError, match="gives 20 values and the model 32"):
        MatryoshkaEvaluator(evaluator, [1])(student)


class WithText(BaseEvaluator):
    """Scores, a text and a missing value in one dict."""

    def __init__(self, primary_metric="score"):
        super().__init__()
        self.name, self.primary_metric = "own", primary_metric

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        scores = {"note": "fine", "score": float(len(model.encode("cat"))), "none": None, "flag": True}
        return {f"{self.name}_{key}": value for key, value in scores.items()}


def test_metrics_that_are_texts_are_handed_on(model):
    """As the native evaluator does; the report holds numbers only, and a text cannot be the main score."""
    evaluator = MatryoshkaEvaluator(WithText(), [8, 32])
    scores = evaluator(model)
    assert scores["own-8_note"] == "fine"
    assert scores["own-32_none"] is None
    assert scores["own-mean_score"] == 20
    assert {row["metric"] for row in evaluator.records} == {"score", "flag"}
    with pytest.raises(ValueError, match="primary_metric='own-8_note', which is no number but 'fine'"):
        MatryoshkaEvaluator(WithText("note"), [8])(model)


def test_an_empty_set_has_scores_at_every_precision(model):
    """An evaluator without texts is no crash in the calibration."""

    class Empty(Widths):
        def __call__(self, model, output_path=None, epoch=-1, steps=-1):
            return {f"{self.name}_width": float(len(model.encode([])))}

    scores = MatryoshkaEvaluator(Empty("width"), [8, 32], precisions=["float32", "int8", "binary"])(model)
    assert scores["own-8-int8_width"] == 0


def nano(monkeypatch, names=("msmarco", "nq"), **options):
    parts = {
        "corpus": [{"_id": f"d{i}", "text": text} for i, text in enumerate(B)],
        "queries": [{"_id": f"q{i}", "text": text} for i, text in enumerate(A[:6])],
        "qrels": [{"query-id": f"q{i}", "corpus-id": f"d{i}"} for i in range(6)],
    }
    monkeypatch.setattr(
        NanoBEIREvaluator, "_load_dataset_subset_split", lambda self, subset, split, required_columns: parts[subset]
    )
    return NanoBEIREvaluator(list(names), **options)


class Collection(BaseEvaluator):
    """A collection of somebody's own: evaluators in a dict, one more alone, and a mean."""

    def __init__(self):
        super().__init__()
        self.name, self.primary_metric = "mine", "mean"
        self.parts = {"a": make("triplet"), "b": sts()}
        self.last = make("ir")

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        scores = {}
        for part in [*self.parts.values(), self.last]:
            scores |= part(model, output_path, epoch, steps)
        mains = [scores[part.primary_metric] for part in [*self.parts.values(), self.last]]
        return scores | self.prefix_name_to_metrics({"mean": float(np.mean(mains))}, self.name)


@pytest.mark.parametrize("kind", ["nano", "sequence", "collection", "nested", "ir"])
def test_every_score_carries_its_evaluators_name_and_dim(model, kind, monkeypatch, tmp_path):
    """Evaluators inside evaluators: all native scores, each under its own name, at each dim, and as many files."""
    makers = {
        "nano": lambda: nano(monkeypatch),
        "sequence": lambda: SequentialEvaluator([nano(monkeypatch), sts(), make("ir")]),
        "nested": lambda: SequentialEvaluator([make("binary"), SequentialEvaluator([nano(monkeypatch), make("ir")])]),
        "collection": Collection,
        "ir": lambda: make("ir", write_predictions=True),
    }
    native = makers[kind]()(model, str(tmp_path / "native"))
    evaluator = MatryoshkaEvaluator(makers[kind](), [8, 32])
    scores = evaluator(model, str(tmp_path / "ours"))
    names = ["NanoBEIR_mean", "NanoMSMARCO", "NanoNQ", "sts-dev", "ir", "trip", "mine", "pairs"]
    for key, value in native.items():
        name = next((name for name in names if key.startswith(f"{name}_")), None)
        full = f"dim-32_{key}" if name is None else f"{name}-32_{key.removeprefix(f'{name}_')}"
        assert scores[full] == pytest.approx(value, abs=1e-6), key
        assert full.replace("-32_", "-8_") in scores
    assert len(scores) == 2 * len(native) + 2
    assert {row["task"] for row in evaluator.records} <= {*names, "dim"}
    native_files, files = ([path.name for path in (tmp_path / part).rglob("*.*")] for part in ("native", "ours"))
    assert len(files) == 2 * len(native_files) == len(set(files))
    assert all("-8" in name or "-32" in name or "_8_" in name or "_32_" in name for name in files)


def test_evaluators_inside_that_share_a_name_are_refused(model, monkeypatch):
    """Two NanoBEIR collections in two languages write the same names; a MatryoshkaEvaluator inside has its own dims."""
    english, german = nano(monkeypatch), nano(monkeypatch, aggregate_key="de-mean")
    with pytest.raises(ValueError, match="share the name 'NanoMSMARCO'"):
        MatryoshkaEvaluator(SequentialEvaluator([english, german]), [8])
    with pytest.raises(TypeError, match="MatryoshkaEvaluator already"):
        MatryoshkaEvaluator(SequentialEvaluator([MatryoshkaEvaluator(sts(), [8])]), [8])


def test_memory_limit_changes_no_score(model):
    """Vectors in a file give the scores that vectors in memory give."""
    evaluators = [
        MatryoshkaEvaluator(make("ir"), DIMS, precisions=["float32", "int8"], memory_limit=n) for n in (0, None)
    ]
    assert evaluators[0](model) == evaluators[1](model)
    assert evaluators[0].peak_store_bytes == evaluators[1].peak_store_bytes > 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"memory_limit": -1}, ValueError, "memory_limit must be >= 0"),
        ({"memory_limit": "2 GB"}, TypeError, "memory_limit must be a number"),
        ({"device": []}, ValueError, "device is an empty list"),
        ({"device": 3}, TypeError, "device must be a device such as"),
        ({"device": ["cpu", "cpu"], "layers": [1]}, ValueError, "no list and no pool"),
    ],
)
def test_bad_places_are_named_at_construction(arguments, error, message):
    """Where to keep and where to encode."""
    with pytest.raises(error, match=message):
        MatryoshkaEvaluator(sts(), [8], **arguments)


def test_probe_draws_from_labels_of_pandas(model):
    """Labels may be strings in a pandas column, also with drawn texts."""
    labels = pd.Series(["a", "b"] * 6)
    evaluator = ClassificationProbeEvaluator(
        sentences(12, 5), labels, sentences(4, 6), ["a", "b", "a", "b"], n_experiments=2, samples_per_label=3, name="p"
    )
    assert MatryoshkaEvaluator(evaluator, [8])(model)["p-8_accuracy"] >= 0


def probe(**kwargs):
    words = ["cat", "dog", "bird"] * 12
    train = [f"{text} {word} {word}" for text, word in zip(sentences(36, 5), words, strict=True)]
    test = [f"{word} {text}" for text, word in zip(sentences(36, 6), words, strict=True)]
    return ClassificationProbeEvaluator(train, words, test, words, name="animals", **kwargs)


def test_every_option_of_the_probe_counts(model, tmp_path, monkeypatch):
    """Batches and bars reach encode, one iteration is another classifier, and the CSV file can be left out."""
    from sklearn.exceptions import ConvergenceWarning

    asked = []
    encode = SentenceTransformer.encode

    def noted(called, texts, **options):
        asked.append((options["batch_size"], options["show_progress_bar"]))
        return encode(called, texts, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", noted)
    usual = probe()(model, str(tmp_path / "usual"))
    assert set(asked) == {(32, False)}
    asked.clear()
    assert probe(batch_size=5, show_progress_bar=True)(model)["animals_accuracy"] == usual["animals_accuracy"]
    assert set(asked) == {(5, True)}
    with pytest.warns(ConvergenceWarning):
        assert probe(max_iter=1)(model) != usual
    assert [path.name for path in (tmp_path / "usual").iterdir()] == ["classification_probe_animals_results.csv"]
    probe(write_csv=False)(model, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_probe_equals_a_plain_loop(model):
    """MTEB's protocol, written out: chained shuffles, k per label, mean accuracy and macro-F1, renormalised vectors."""
    from collections import defaultdict

    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    evaluator = probe(n_experiments=3, samples_per_label=4, seed=42)
    ours = MatryoshkaEvaluator(evaluator, [8])(model)
    train = model.encode(evaluator.train_texts)[:, :8]
    test = model.encode(evaluator.test_texts)[:, :8]
    train /= np.linalg.norm(train, axis=1, keepdims=True)
    test /= np.linalg.norm(test, axis=1, keepdims=True)
    indices, accuracy, f1 = list(range(36)), [], []
    for _ in range(3):
        np.random.RandomState(42).shuffle(indices)
        seen, chosen = defaultdict(int), []
        for i in indices:
            if seen[evaluator.train_labels[i]] < 4:
                chosen.append(i)
                seen[evaluator.train_labels[i]] += 1
        fitted = LogisticRegression(max_iter=100, random_state=42).fit(train[chosen], evaluator.train_labels[chosen])
        predicted = fitted.predict(test)
        accuracy.append(accuracy_score(evaluator.test_labels, predicted))
        f1.append(f1_score(evaluator.test_labels, predicted, average="macro"))
    assert ours["animals-8_accuracy"] == pytest.approx(np.mean(accuracy), abs=1e-6)
    assert ours["animals-8_macro_f1"] == pytest.approx(np.mean(f1), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a", "b"], [0, 0], ["c"], [0]), "one class only, 0"),
        ((["a", "b"], [0], ["c"], [0]), "train_texts has 2 entries and train_labels 1"),
        ((["a", "b"], [0, 1], ["c"], [2]), "test_labels holds"),
        ((["a", "b"], [0, 1], [], []), "test_texts is empty"),
        ((["a"], [0], ["b"], [0]), "one class only, 0"),
    ],
)
def test_probe_names_bad_labels(arguments, message):
    """One class, lengths that differ, unknown test labels and empty parts raise at construction."""
    with pytest.raises(ValueError, match=message):
        ClassificationProbeEvaluator(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("ab", [0, 1], ["c"], [0]), "train_texts must be a sequence.* got 'ab'"),
        ((5, [0, 1], ["c"], [0]), "train_texts must be a sequence.* got 5"),
        ((["a", "b"], [0, 1], "c", [0]), "test_texts must be a sequence.* got 'c'"),
        ((["a", None], [0, 1], ["c"], [0]), "train_texts must be strings, got None at index 1"),
        ((["a", "b"], "xy", ["c"], ["x"]), "train_labels must be a sequence.* got 'xy'"),
        ((["a", "b"], ["x", None], ["c"], ["x"]), "train_labels must be all strings .* got None at index 1"),
        ((["a", "b"], [None, 1], ["c"], [1]), "train_labels must be all strings .* got None at index 0"),
        ((["a", "b"], [0.5, 1.5], ["c"], [0.5]), "train_labels must be all strings .* got 0.5 at index 0"),
        ((["a", "b"], np.array([0, np.nan]), ["c"], [0]), "train_labels .* turn floats into integers"),
        ((["a", "b"], ["x", 1], ["c"], [1]), "train_labels must be all strings .* got 1 at index 1"),
        ((["a", "b"], [[0], [1]], ["c"], [[1]]), r"train_labels must be all strings .* got \[0\]"),
    ],
)
def test_probe_names_texts_and_labels_of_the_wrong_kind(arguments, message):
    """A string for a list of texts, missing labels, floats and mixtures raise at construction."""
    with pytest.raises(TypeError, match=message):
        ClassificationProbeEvaluator(*arguments)


@pytest.mark.parametrize(
    ("option", "value"),
    [("n_experiments", 0), ("n_experiments", 2.5), ("samples_per_label", "8"), ("seed", -1), ("max_iter", 0)],
)
def test_probe_names_bad_numbers(option, value):
    """Counts are whole and in range."""
    with pytest.raises(ValueError, match=f"{option} must be an integer >= .*, got {value!r}"):
        probe(**{option: value})


@pytest.mark.parametrize("array", [np.array, torch.tensor, pd.Series])
def test_probe_takes_labels_of_arrays(array):
    """Whole numbers in any of the usual containers are the same labels."""
    texts = ["a", "b", "c", "d"]
    plain = ClassificationProbeEvaluator(texts, [0, 1, 0, 1], texts, [1, 0, 1, 0])
    arrays = ClassificationProbeEvaluator(texts, array([0, 1, 0, 1]), texts, array([1, 0, 1, 0]))
    assert arrays.train_labels.tolist() == plain.train_labels.tolist()
    assert arrays.test_labels.tolist() == plain.test_labels.tolist()


@pytest.mark.slow
def test_inside_the_trainer(tmp_path):
    """Scores land in the logs, the model card and the choice of the best checkpoint."""
    from training_fixtures import datasets, make_trainer

    model = tiny_model(tmp_path)
    trainer = make_trainer(
        model,
        MultipleNegativesRankingLoss(model),
        tmp_path / "run",
        datasets.Dataset.from_dict({"anchor": A, "positive": B}),
        evaluator=MatryoshkaEvaluator(sts(), DIMS, primary=9),
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sts-dev-9_spearman_cosine",
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_sts-dev-9_spearman_cosine" in entry]
    assert len(logged) == 2
    assert trainer.state.best_metric == max(entry["eval_sts-dev-9_spearman_cosine"] for entry in logged)
    model.save_pretrained(str(tmp_path / "final"))
    card = (tmp_path / "final" / "README.md").read_text()
    assert "sts-dev-4" in card
    assert "sts-dev-32" in card
