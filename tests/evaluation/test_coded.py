"""Invariants of codes in an evaluation: exact where codes are compared, floats where queries are, ranges by name."""

import copy
import logging

import numpy as np
import pytest
from scipy.stats import spearmanr
from sentence_transformers import util
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)
from sentence_transformers.util.quantization import semantic_search_faiss

from conftest import WIDTH, sentences
from evaluation_fixtures import CountingModel, tiny_model
from mipic_st.codes import PRECISIONS, Ranges, decode, encode
from mipic_st.codes import scores as code_scores
from mipic_st.evaluation.coded import coded
from mipic_st.evaluation.matryoshka import MatryoshkaEvaluator
from mipic_st.evaluation.mteb import evaluate_mteb
from mipic_st.evaluation.store import EmbeddingStore
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import fit_rotation

A, B = sentences(60, 1), sentences(60, 2)
GOLD = [((7 * i) % 23) / 23 for i in range(60)]
CODES = [precision for precision in PRECISIONS if precision != "float32"]
EVERY = list(PRECISIONS)
QUERIES, DOCUMENTS = A[:10], list(dict.fromkeys(B))
RELEVANT = {f"q{i}": {f"d{i}", f"d{i + 20}"} for i in range(10)}
CALIBRATION = list(dict.fromkeys(sentences(50, 8)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With prompts, so that queries are other vectors than documents, and vectors that have a mean."""
    prompts = {"query": "the cat ", "document": "a dog "}
    return tiny_model(tmp_path_factory.mktemp("model"), prompts=prompts, layers=2)


def sts(**options):
    return EmbeddingSimilarityEvaluator(A, B, GOLD, name="sts", **options)


def ir(**options):
    queries = {f"q{i}": text for i, text in enumerate(QUERIES)}
    documents = {f"d{i}": text for i, text in enumerate(DOCUMENTS)}
    return InformationRetrievalEvaluator(queries, documents, RELEVANT, name="ir", corpus_chunk_size=13, **options)


def cut(vectors, dim):
    """Truncated to unit length."""
    vectors = vectors[:, :dim].astype(np.float64)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def ndcg(similarity):
    """nDCG@10 of the two relevant documents of each query, one after the other."""
    gains = []
    for i, row in enumerate(similarity):
        top = sorted(range(len(row)), key=lambda j: -row[j])[:10]
        gains.append(sum(1 / np.log2(place + 2) for place, j in enumerate(top) if j in (i, i + 20)))
    return np.mean(gains) / (1 + 1 / np.log2(3))


# --- bits: exact ------------------------------------------------------------------------------------------------------

SIMILARITIES = {
    "cosine": (util.pairwise_cos_sim, util.cos_sim),
    "dot": (util.pairwise_dot_score, util.dot_score),
    "euclidean": (util.pairwise_euclidean_sim, util.euclidean_sim),
    "manhattan": (util.pairwise_manhattan_sim, util.manhattan_sim),
}


def bits_of(count, dim, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    ranges = Ranges.of(vectors)
    return coded(vectors, "ubinary", ranges, "symmetric"), vectors > ranges.mean


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 8, 9, 15, 16, 31, 32, 33, 48, 64, 96, 100, 128, 384, 1000])
def test_equal_hamming_distances_are_equal_similarities(dim):
    """By each of sentence-transformers' functions, for pairs and for matrices, and in that order."""
    (first, one), (second, other) = bits_of(200, dim, 1), bits_of(150, dim, 2)
    assert dim <= first.shape[1] <= dim + 4
    hamming = (one[:, None] != other[None]).sum(axis=2)
    for pairwise, matrix in SIMILARITIES.values():
        for scores, distances in (
            (matrix(first, second), hamming),
            (pairwise(first[:150], second), np.diagonal(hamming)),
        ):
            scores = scores.numpy()
            values = [np.unique(scores[distances == distance]) for distance in np.unique(distances)]
            assert all(len(found) == 1 for found in values)
            assert all(np.diff([found[0] for found in values]) < 0)


def test_plain_signs_would_break_ties():
    """The test above could not fail if rounding never showed."""
    _, bits = bits_of(200, 384, 1)
    signs = bits.astype(np.float32) * 2 - 1
    found = util.cos_sim(signs, signs).numpy()
    assert len(np.unique(found)) > len(np.unique((bits[:, None] != bits[None]).sum(axis=2)))


def hamming_of(model, dim, encode_as=("encode", "encode")):
    """Distances of the codes that quantize_embeddings gives for both sides, less their common mean."""
    first, second = (cut(getattr(model, method)(texts), dim) for method, texts in zip(encode_as, (A, B), strict=True))
    mean = np.vstack([first, second])[np.unique([*A, *B], return_index=True)[1]].mean(axis=0)
    codes = [np.unpackbits(util.quantize_embeddings(part - mean, "ubinary"), axis=1) for part in (first, second)]
    return (codes[0] != codes[1]).sum(axis=1)


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("dim", [3, 9, 24, WIDTH])
def test_spearman_of_the_evaluator_is_that_of_hamming_distances(model, precision, dim):
    """By every similarity function, odd dims included."""
    evaluator = sts(similarity_fn_names=["cosine", "dot", "euclidean", "manhattan"])
    scores = MatryoshkaEvaluator(evaluator, [dim], precisions=["float32", precision])(model)
    expected = spearmanr(-hamming_of(model, dim), GOLD).statistic
    for name in ("cosine", "dot", "euclidean", "manhattan"):
        assert scores[f"sts-{dim}-{precision}_spearman_{name}"] == pytest.approx(expected, abs=1e-12)


def test_spearman_of_mteb_is_that_of_hamming_distances(model, tmp_path):
    """mteb computes similarities by itself."""
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset, DatasetDict

    task = mteb.get_task("STS13")
    task.dataset = DatasetDict(test=Dataset.from_dict({"sentence1": A, "sentence2": B, "score": GOLD}))
    task.data_loaded = True
    options = {"output": tmp_path, "precisions": ["float32", "ubinary"], "show_progress_bar": False}
    (record,) = (row for row in evaluate_mteb(model, [task], [24], **options).records if row["precision"] == "ubinary")
    assert record["score"] == pytest.approx(spearmanr(-hamming_of(model, 24), GOLD).statistic, abs=1e-6)


def test_a_search_of_bits_is_that_of_faiss(model):
    """Ranks by cosine are those of sentence-transformers' own search on quantize_embeddings' codes."""
    pytest.importorskip("faiss")
    store = EmbeddingStore(model)
    store.calibrate(CALIBRATION)
    view = store.view(24, precision="ubinary")
    found = util.cos_sim(view.encode_query(QUERIES), view.encode_document(DOCUMENTS)).numpy()
    mean = cut(model.encode_document(CALIBRATION), 24).mean(axis=0)
    queries, documents = (
        util.quantize_embeddings(cut(part, 24) - mean, "ubinary")
        for part in (model.encode_query(QUERIES), model.encode_document(DOCUMENTS))
    )
    hits, *_ = semantic_search_faiss(queries, documents, corpus_precision="ubinary", top_k=len(DOCUMENTS))
    for row, of_query in zip(found, hits, strict=True):
        distances = np.empty(len(row))
        distances[[hit["corpus_id"] for hit in of_query]] = [hit["score"] for hit in of_query]
        np.testing.assert_array_equal(row, np.float32(1) - distances / np.float32(32))  # 24 bits, filled up to 64


# --- code against code ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "uint8"])
@pytest.mark.parametrize("dim", [9, WIDTH])
def test_integers_are_those_of_the_native_evaluator(model, precision, dim):
    """Ranges of the scored texts, the integers' own cosine: what EmbeddingSimilarityEvaluator(precision=...) gives."""
    ours = MatryoshkaEvaluator(sts(), [dim], precisions=EVERY)(model)
    native = sts(precision=precision, truncate_dim=dim)(model)
    assert ours[f"sts-{dim}-{precision}_spearman_cosine"] == pytest.approx(native["sts_spearman_cosine"], abs=1e-6)


@pytest.mark.parametrize("precision", ["int8", "uint8", "int4"])
def test_cosines_of_integers_have_no_ties_to_break(precision):
    """Rounding of float32 moves Spearman by less than a table shows, for as few as four values."""
    rng = np.random.default_rng(0)
    first = rng.standard_normal((3000, 4)).astype(np.float32)
    second = first + 0.5 * rng.standard_normal((3000, 4)).astype(np.float32)
    ranges = Ranges.of(np.vstack([first, second]))
    one, other = (coded(part, precision, ranges, "symmetric") for part in (first, second))
    gold = rng.standard_normal(3000) + (first * second).sum(axis=1)
    exact = [  # to 12 digits, so that equal codes are equal
        round(float(x @ y) / np.sqrt(float(x @ x) * float(y @ y)), 12)
        for x, y in zip(one.astype(np.float64), other.astype(np.float64), strict=True)
    ]
    ours = spearmanr(util.pairwise_cos_sim(one, other).numpy(), gold).statistic
    assert ours == pytest.approx(spearmanr(exact, gold).statistic, abs=2e-5)


@pytest.mark.parametrize("precision", ["float16", "int4"])
def test_other_codes_are_compared_decoded(model, precision):
    """int4 with quantiles of the scored texts, for its 16 levels would be spent on outliers."""
    ours = MatryoshkaEvaluator(sts(), [9], precisions=["float32", precision])(model)
    texts = list(dict.fromkeys([*A, *B]))
    vectors = cut(model.encode(texts), 9)
    decoded = dict(
        zip(texts, decode(encode(vectors, precision, Ranges.of(vectors)), precision, Ranges.of(vectors)), strict=True)
    )
    cosines = [util.cos_sim(decoded[a], decoded[b]).item() for a, b in zip(A, B, strict=True)]
    assert ours[f"sts-9-{precision}_spearman_cosine"] == pytest.approx(spearmanr(cosines, GOLD).statistic, abs=1e-6)


# --- float queries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", CODES)
@pytest.mark.parametrize("dim", [23, WIDTH])
def test_asymmetric_search_is_float_queries_on_decoded_documents(model, precision, dim):
    """By dot product what codes.scores gives; the cosine divides by the decoded vectors' lengths too."""
    score_functions = {"dot": util.dot_score, "cosine": util.cos_sim}
    evaluator = MatryoshkaEvaluator(
        ir(score_functions=score_functions),
        [dim],
        precisions=["float32", precision],
        scoring="asymmetric",
        calibration=CALIBRATION,
    )
    scores = evaluator(model)
    queries, documents = cut(model.encode_query(QUERIES), dim), cut(model.encode_document(DOCUMENTS), dim)
    ranges = Ranges.of(cut(model.encode_document(CALIBRATION), dim))
    codes = encode(documents, precision, ranges)
    similarity = code_scores(queries, codes, precision, ranges)
    lengths = np.linalg.norm(decode(codes, precision, ranges), axis=1)
    for name, expected in (("dot", similarity), ("cosine", similarity / lengths)):
        key = f"ir-{dim}-{precision}-asymmetric_{name}_ndcg@10"
        assert scores[key] == pytest.approx(ndcg(expected), abs=1e-6)


@pytest.mark.parametrize(
    ("method", "options", "query"),
    [
        ("encode_query", {}, True),
        ("encode", {"prompt_name": "query"}, True),
        ("encode", {"task": "query"}, True),
        ("encode", {}, False),
        ("encode_document", {}, False),
        ("encode", {"prompt_name": "document"}, False),
    ],
)
def test_which_texts_are_queries(model, method, options, query):
    """The method, the prompt or the task says it; under symmetric scoring nobody stays a float."""
    store = EmbeddingStore(model)
    store.calibrate(CALIBRATION)
    floats = cut(getattr(model, method)(A, **options), 9)
    for scoring in ("symmetric", "asymmetric"):
        found = getattr(store.view(9, precision="int8", scoring=scoring), method)(A, **options)
        same = found.shape == floats.shape and np.allclose(found, floats, atol=1e-6)
        assert same == (query and scoring == "asymmetric")


def test_a_task_without_queries_is_coded_on_both_sides(model, caplog):
    """STS: its columns have no roles, so both are decoded codes; a warning says so, once, and not for a search."""
    options = {"precisions": ["float32", "int4"], "scoring": "asymmetric", "calibration": CALIBRATION}
    with caplog.at_level(logging.WARNING):
        MatryoshkaEvaluator(ir(), [9], **options)(model)
        assert "asymmetric" not in caplog.text
        scores = MatryoshkaEvaluator(sts(), [8, 9], **options)(model)
    assert caplog.text.count("does not say which texts are queries") == 1
    symmetric = MatryoshkaEvaluator(sts(), [9], **{**options, "scoring": "symmetric"})(model)
    assert scores["sts-9-int4-asymmetric_spearman_cosine"] == symmetric["sts-9-int4_spearman_cosine"]


def test_scorings_share_no_file_of_an_evaluator(model, tmp_path):
    """Both in one folder, as their names are."""
    for scoring in ("symmetric", "asymmetric"):
        options = {"precisions": ["float32", "int8"], "scoring": scoring}
        MatryoshkaEvaluator(SequentialEvaluator([ir()]), [9], **options)(model, str(tmp_path))
    names = sorted(path.name for path in tmp_path.iterdir())
    for name, runs in zip(names, (1, 1, 2), strict=True):
        assert len((tmp_path / name).read_text().splitlines()) == 1 + runs, name
    assert "ir-9-int8-asymmetric" in names[0]


# --- calibration ------------------------------------------------------------------------------------------------------


def test_codes_follow_the_calibration(model):
    """Texts encoded as documents and cut to unit length, or the ranges themselves: the same codes, and other names."""
    ranges = {dim: Ranges.of(cut(model.encode_document(CALIBRATION), dim)) for dim in (9, WIDTH)}
    given = {"texts": CALIBRATION, "ranges": ranges, "scored": "scored texts"}
    found, names = {}, {}
    for name, calibration in given.items():
        evaluator = MatryoshkaEvaluator(sts(), [9, WIDTH], precisions=EVERY, calibration=calibration)
        found[name] = evaluator(model)
        names[name] = {(row["precision"], row["scoring"], row["calibration"]) for row in evaluator.records}
        config = evaluator.get_config_dict()
        assert (config["scoring"], config["calibration"]) == ("symmetric", next(n for p, _, n in names[name] if n))
    assert found["texts"] == pytest.approx(found["ranges"], abs=1e-5)
    assert abs(found["texts"]["sts-9-int8_spearman_cosine"] - found["scored"]["sts-9-int8_spearman_cosine"]) > 1e-4
    assert {name for *_, name in names["scored"]} == {None, "scored texts"}
    assert {calibration for rows in names.values() for *_, calibration in rows if calibration} >= {"scored texts"}
    assert len({row for rows in names.values() for row in rows}) == 2 + 3 * (len(PRECISIONS) - 2)
    assert {row[:2] for row in names["texts"]} == {("float32", None), *((code, "symmetric") for code in CODES)}


@pytest.fixture
def rotated(model, tmp_path):
    """A fitted rotation, saved and loaded, and the model with it; the model's own vectors are what it was fitted on."""
    rotation = fit_rotation(model.encode_document(CALIBRATION), dims=[9, 16], max_steps=3)
    rotation.save(tmp_path / "rotation.safetensors")
    rotation = Rotation.load(tmp_path / "rotation.safetensors")
    changed = copy.deepcopy(model)
    rotation.put_in(changed)
    return rotation, changed


@pytest.mark.parametrize("precision", ["int8", "int4", "binary"])
def test_ranges_of_a_fitted_rotation(model, rotated, precision):
    """The model with the rotation in it is evaluated on the codes that the rotation makes of the model's vectors."""
    rotation, changed = rotated
    options = {"precisions": ["float32", precision], "scoring": "asymmetric", "calibration": rotation.ranges}
    scores = MatryoshkaEvaluator(ir(score_functions={"dot": util.dot_score}), [9, WIDTH], **options)(changed)
    queries, documents = model.encode_query(QUERIES), model.encode_document(DOCUMENTS)
    store = EmbeddingStore(changed)
    store.calibrate(rotation.ranges)
    for dim in (9, WIDTH):
        codes = rotation.encode(documents, dim, precision)
        found = store.view(dim, precision=precision, scoring="asymmetric").encode_document(DOCUMENTS)
        near = np.isclose(found, rotation.decode(codes, dim, precision), atol=1e-5)
        assert near.mean() > 0.995  # rounding puts a value at the border of two codes on either side
        expected = ndcg(rotation.scores(queries, codes, dim, precision))
        assert scores[f"ir-{dim}-{precision}-asymmetric_dot_ndcg@10"] == pytest.approx(expected, abs=0.01)


def test_ranges_of_a_fitted_rotation_in_mteb(rotated, tasks):
    """The scores of the evaluator on the same texts, under a name that says the ranges."""
    rotation, changed = rotated
    options = {"precisions": ["float32", "int8"], "calibration": rotation.ranges}
    report = evaluate_mteb(changed, **{**tasks, "tasks": ["STS13"]}, dims=[9, 16], **options)
    scores = MatryoshkaEvaluator(sts(), [9, 16], **options)(changed)
    for row in report.records:
        label = row["dim"] if row["precision"] == "float32" else f"{row['dim']}-int8"
        assert row["score"] == pytest.approx(scores[f"sts-{label}_spearman_cosine"], abs=1e-6)
        assert (row["calibration"] or "ranges-").startswith("ranges-")
    with pytest.raises(ValueError, match=r"no Ranges for dims \[12\]"):
        evaluate_mteb(changed, **tasks, dims=[12], **options)


def test_a_calibration_set_has_the_names_of_its_texts(model):
    """One text more, or one range wider, is another calibration."""
    ranges = Ranges.of(cut(model.encode_document(CALIBRATION), 9))
    wider = Ranges(ranges.low - 1, ranges.high, ranges.mean, ranges.spread)
    calibrations = [CALIBRATION, CALIBRATION[1:], {9: ranges}, {9: wider}]
    names = [
        MatryoshkaEvaluator(sts(), [9], precisions=["float32", "int8"], calibration=c).get_config_dict()["calibration"]
        for c in calibrations
    ]
    assert len(set(names)) == 4
    assert [name.split("-")[0] for name in names] == ["texts", "texts", "ranges", "ranges"]


def test_layers_are_calibrated_on_their_own_vectors(model):
    """A lower layer's codes have a lower layer's ranges."""
    options = {"precisions": ["float32", "binary"], "calibration": CALIBRATION}
    grid = MatryoshkaEvaluator(sts(), [9], layers=[1, 2], **options)(model)
    plain = MatryoshkaEvaluator(sts(), [9], **options)(model)
    assert grid["sts-L2-9-binary_spearman_cosine"] == pytest.approx(plain["sts-9-binary_spearman_cosine"], abs=1e-6)
    store = EmbeddingStore(model, [1, 2])
    store.calibrate(CALIBRATION)
    lower = cut(store.view(WIDTH, layer=1, normalize=False).encode_document(CALIBRATION), 9)
    np.testing.assert_allclose(store.ranges(9, 1, True, "binary").mean, Ranges.of(lower).mean, atol=1e-6)
    assert np.abs(store.ranges(9, 2, True, "binary").mean - Ranges.of(lower).mean).max() > 1e-3


def test_large_sets_are_calibrated_on_a_part(model, monkeypatch):
    """Evenly spaced texts for the quantiles; the extremes of the scored texts are those of all."""
    monkeypatch.setattr("mipic_st.evaluation.store._MOST_CALIBRATED", 20)
    texts = list(dict.fromkeys([*A, *B]))
    store = EmbeddingStore(model)
    vectors = cut(store.view(WIDTH, normalize=False).encode(texts), 9)
    store.calibrate()
    every = -(-len(texts) // 20)
    np.testing.assert_allclose(store.ranges(9, None, True, "int4").low, Ranges.of(vectors[::every]).low, atol=1e-6)
    extremes = store.ranges(9, None, True, "int8")
    np.testing.assert_allclose(extremes.low, vectors.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(extremes.high, vectors.max(axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": "corpus"}, "calibration must be 'scored texts', a list of texts .*; got 'corpus'"),
        ({"calibration": ["one"]}, "calibration needs two different texts or more, got 1"),
        ({"calibration": ["one", "one"]}, "calibration needs two different texts or more, got 1"),
        ({"calibration": {8: Ranges.of(np.eye(9))}}, r"a Ranges of its own width.*got Ranges of 9 dims at 8"),
        ({"calibration": {8: [[0.0], [1.0]]}}, r"a Ranges of its own width.*got \[\[0.0\], \[1.0\]\] at 8"),
        ({"calibration": {9: Ranges.of(np.eye(9))}}, r"calibration has no Ranges for dims \[8\]"),
        ({"calibration": {8: Ranges.of(np.eye(8))}, "layers": [1]}, "Ranges are those of one layer"),
        ({"scoring": "float"}, r"scoring must be one of \('symmetric', 'asymmetric'\), got 'float'"),
        ({"precisions": ["float32", "int3"]}, "precisions must be one of .* got 'int3'"),
    ],
)
def test_bad_codes_are_named_at_construction(options, message):
    """Before any model is seen."""
    with pytest.raises(ValueError, match=message):
        MatryoshkaEvaluator(sts(), [8], **options)


@pytest.mark.parametrize("calibration", [3, [1, 2], [None, "a"], {"text": ["a", "b"]}.items()])
def test_calibration_of_another_kind_is_named(calibration):
    """TypeError, with what it may be."""
    with pytest.raises(TypeError, match="calibration must be"):
        MatryoshkaEvaluator(sts(), [8], calibration=calibration)


# --- result files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """Two STS tasks by name, from small local files that pass for MTEB's."""
    import pandas as pd

    from mipic_st.evaluation import mteb_data

    mteb = pytest.importorskip("mteb")
    monkeypatch.setattr(mteb.abstasks.task_metadata.TaskMetadata, "descriptive_stats", None)
    for number, name in enumerate(("STS13", "STS14")):
        frame = pd.DataFrame({"sentence1": A[number:], "sentence2": B[number:], "score": GOLD[number:]})
        frame.to_csv(tmp_path / f"{name.lower()}_test.csv", index=False)
        digest = mteb_data.set_digest("STS", {column: frame[column].tolist() for column in frame})
        monkeypatch.setitem(mteb_data.KNOWN_SETS, name, {"test": digest})
    return {"tasks": ["STS13", "STS14"], "data_dir": tmp_path, "output": tmp_path / "out", "show_progress_bar": False}


def test_results_of_other_codes_share_no_file(model, tasks, monkeypatch):
    """Scorings and calibrations in one folder: each its own scores, again without encoding, as in a folder alone."""
    ranges = {9: Ranges.of(cut(model.encode_document(CALIBRATION), 9))}
    runs = [
        {"scoring": scoring, "calibration": calibration}
        for scoring in ("symmetric", "asymmetric")
        for calibration in ("scored texts", CALIBRATION, ranges)
    ]
    options = {**tasks, "tasks": ["STS13"], "dims": [9], "precisions": ["float32", "float16", "int8", "binary"]}
    first = [evaluate_mteb(model, **options, **run) for run in runs]
    counted = CountingModel(model, monkeypatch)
    again = [evaluate_mteb(model, **options, **run) for run in runs]
    assert counted.texts == []
    assert [report.records for report in again] == [report.records for report in first]
    for run, report in zip(runs, first, strict=True):
        assert {row["scoring"] for row in report.records} == {None, run["scoring"]}
        assert len({row["calibration"] for row in report.records} - {None}) == 1
    alone = evaluate_mteb(model, **{**options, "output": tasks["output"] / "alone"}, **runs[4])
    assert alone.records == first[4].records
    table = sum(first[1:], first[0]).table()
    # float32 has one row, float16 one for each scoring, and the others one for each run
    names = table.index.get_level_values("precision")
    assert len(names) == len(set(names)) == 1 + 2 + len(runs) * 2
    assert {"int8", "int8 (asymmetric)", "float16 (asymmetric)"} < set(names)
    assert sum("asymmetric" in name for name in names) == 1 + 3 * 2


def test_calibration_texts_are_encoded_once_for_all_tasks(model, tasks, monkeypatch):
    """And those of the tasks once each, as without codes."""
    counted = CountingModel(model, monkeypatch)
    evaluate_mteb(model, **tasks, dims=[9, WIDTH], precisions=["float32", "int8", "int4"], calibration=CALIBRATION)
    assert len(counted.texts) == len({*A, *B}) + len({*A[1:], *B[1:]}) + len(CALIBRATION)


def test_bits_of_before_are_not_read(model, tasks):
    """Files without a calibration hold bits at zero, compared in another way."""
    options = {**tasks, "tasks": ["STS13"], "dims": [9], "precisions": ["float32", "binary", "int8"]}
    before = evaluate_mteb(model, **options)
    (path,) = (path for path in tasks["output"].rglob("STS13.json") if "binary" in path.parent.name)
    path.unlink()
    for name in ("embed_dim_9__output_dtypes_binary", "precision_binary__truncate_dim_9"):
        (path.parent.parent / name).mkdir()
        (path.parent.parent / name / path.name).write_text("damaged, which would be said if it were read")
    assert evaluate_mteb(model, **options).records == before.records


def test_bits_with_and_without_sign_score_the_same(model, tasks):
    """binary and ubinary are the same bits, in files of their own."""
    report = evaluate_mteb(model, **tasks, dims=[9], precisions=["float32", "binary", "ubinary", "int4"])
    scores = {(row["task"], row["precision"]): row["score"] for row in report.records}
    assert scores["STS13", "binary"] == scores["STS13", "ubinary"] != scores["STS13", "int4"]
    assert len(list(tasks["output"].rglob("STS13.json"))) == 4
