"""Advice on vectors and texts: what it recommends, what it says when nothing is gained, and what it refuses."""

from __future__ import annotations

import ast
import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from sentence_transformers.util import quantize_embeddings

from conftest import WIDTH, sentences
from mipic_st import Rotation, advise
from mipic_st.advice import advise as module
from mipic_st.advice.advice import LOSSES, Advice, chosen, engine_lines
from mipic_st.advice.cells import PRECISIONS, Cell
from mipic_st.codes import bytes_per_vector
from transforms_fixtures import hidden_signal, unit

# what counts lies in the last values; pairs agree in it
VECTORS, OTHERS = (
    part * np.repeat([0.2, 1], [WIDTH - 8, 8]).astype(np.float32) for part in hidden_signal(400, WIDTH, 8)
)
RANDOM = np.random.default_rng(0).normal(size=(600, WIDTH))
TEXTS = list(dict.fromkeys(sentences(120, seed=5, shortest=4)))


@pytest.fixture(scope="module")
def advice():
    return advise(VECTORS, bytes=[4, 8, 64], dims=[4, 8, 16, WIDTH])


# --- what is recommended ----------------------------------------------------------------------------------------------


def test_a_corpus_that_gains_gets_a_rotated_cell(advice):
    """What the documents have in common lies in the last values: truncation finds nothing, the rotation most."""
    assert advice.gained
    assert advice.measure == "3-recall@10"
    assert advice.full == 1
    assert [cell.way for cell in advice.budgets.values()] == ["rotated", "rotated", "truncated"]
    assert advice.gain > advice.chance + 0.1
    found = {(cell.way, cell.dim, cell.precision): cell.kept for cell in advice.cells}
    assert found["rotated", 8, "float32"] > found["truncated", 8, "float32"] + 0.2
    assert isinstance(advice.rotation, Rotation)
    assert advice.rotation.dims == (4, 8, 16)
    assert advice.settings | {"documents": 400, "queries": 200, "held_out": 0.5, "model": None} == advice.settings


def test_random_vectors_gain_nothing():
    """No rotated cell is recommended, although they rank the documents that the map has seen better."""
    advice = advise(RANDOM, bytes=[4, 8])
    assert not advice.gained
    assert "A rotation gains nothing" in str(advice)
    recommended = [*advice.budgets.values(), *advice.within.values(), *(cell for cell in advice.cells if cell.front)]
    assert {cell.way for cell in recommended} == {"truncated"}
    assert "No budget reaches a loss of 5%" in advice.verdict
    assert advice.cell == advice.budgets[8]
    assert "Rotation" not in advice.snippet


def test_pairs_are_judged_by_their_answers():
    """nDCG of known answers decides, neighbours stand beside, and another measure may be asked for."""
    advice = advise(VECTORS[:200], pairs=(VECTORS[200:], OTHERS[200:]), dims=[4, 8])
    assert advice.measure == "nDCG@10"
    assert 0 < advice.full <= 1
    assert set(advice.cells[0].scores) == {"nDCG@10", "3-recall@10", "recall@10"}
    assert advice.settings["documents"] == 400
    assert advice.settings["queries"] == 100
    assert "give pairs" not in str(advice), "they were given"
    strict = advise(VECTORS[:200], pairs=(VECTORS[200:], OTHERS[200:]), dims=[4, 8], measure="recall@10", held_out=0.2)
    assert strict.measure == "recall@10"
    assert strict.full == 1
    assert strict.settings["queries"] == 40


def test_what_judges_took_no_part_in_the_fit(monkeypatch):
    """Cells are measured with the map of the fitted part, whose rows are not those that ask; what is kept saw all."""
    seen = []
    measured = module.values_by_cell
    monkeypatch.setattr(module, "values_by_cell", lambda *given: seen.append(given) or measured(*given))
    advice = advise(VECTORS, dims=[8])
    search, rows, matrix, *_ = seen[0]
    assert not set(rows.tolist()) & set(search.own.tolist())
    assert len(rows) + len(search.own) == len(VECTORS)
    assert np.abs(np.asarray(advice.rotation.matrix) - matrix.numpy()).max() > 0.01


def test_queries_judge_beside_documents():
    """Those without answers too; all advice depends on the seed alone, and nothing of the caller's changes."""
    vectors, queries, state = VECTORS.copy(), OTHERS[:50].copy(), torch.get_rng_state()
    first, second, other = (advise(vectors, queries=queries, dims=[8], seed=seed) for seed in (0, 0, 1))
    assert first.settings["queries"] == 225
    assert first.cells == second.cells
    assert first.cells != other.cells
    assert (vectors == VECTORS).all()
    assert (queries == OTHERS[:50]).all()
    assert torch.equal(state, torch.get_rng_state())


def test_few_queries_are_warned_of(caplog):
    """Twelve documents are enough for a fit, not for a choice."""
    assert advise(VECTORS[:12], dims=[8]).settings["queries"] == 6
    assert "Only 6 queries judge" in caplog.text


def test_one_thread_measures_and_those_of_the_caller_come_back(monkeypatch):
    """Threads that wait for each other cost a neighbour's job; also after an error."""
    seen, measured, before = [], module.gain_on_unseen, torch.get_num_threads()
    monkeypatch.setattr(
        module, "gain_on_unseen", lambda *given: (seen.append(torch.get_num_threads()), measured(*given))[1]
    )
    try:
        torch.set_num_threads(2)
        advise(VECTORS[:60], bytes=[16], dims=[8])
        assert (seen, torch.get_num_threads()) == ([1], 2)
        monkeypatch.setattr(module, "gain_on_unseen", None)
        with pytest.raises(TypeError):
            advise(VECTORS[:60], bytes=[16], dims=[8])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_only_directions_count():
    """Vectors of any length get the same advice; the dims are powers of two from 8, and the width."""
    random = np.random.default_rng(1)
    vectors = random.normal(size=(60, 12))
    plain, longer = (
        advise(given, bytes=[1, 3]) for given in (vectors, vectors * 2.0 ** random.integers(9, size=(60, 1)))
    )
    assert [cell.kept for cell in plain.cells] == [cell.kept for cell in longer.cells]
    assert {cell.dim for cell in plain.cells} == {8, 12}


# --- models -----------------------------------------------------------------------------------------------------------


def test_texts_are_encoded_as_queries_and_documents_are(tiny_model):
    """With the model's own prompts, unless others are given, and each distinct text once."""
    model = tiny_model()
    model.prompts = {"query": "the ", "document": "a "}
    calls, encode = [], model.encode
    model.encode = lambda texts, **how: calls.append((len(texts), how["prompt"])) or encode(texts, **how)
    pairs = pd.DataFrame({"query": TEXTS[:60], "document": TEXTS[60:120]})
    model.train()
    advice = advise(model, TEXTS[60:] + TEXTS[60:70], pairs=pairs, dims=[8], bytes=[8])
    assert calls == [(60, "the "), (len(TEXTS) - 60, "a ")]
    assert model.training
    assert advice.measure == "nDCG@10"
    assert advice.settings["documents"] == len(TEXTS) - 60
    assert advice.settings["model"].startswith("local/")
    assert len(advice.settings["fingerprint"]) == 16
    calls.clear()
    advise(model, iter(TEXTS), queries=TEXTS[:5], dims=[8], bytes=[8], query_prompt="one ", document_prompt="")
    assert calls == [(len(TEXTS), ""), (5, "one ")]


def test_a_model_and_its_vectors_get_the_same_advice(tiny_model):
    """Texts are vectors, as far as advice goes."""
    model = tiny_model()
    by_texts = advise(model, TEXTS, dims=[8], bytes=[8])
    by_vectors = advise(model.encode(TEXTS), dims=[8], bytes=[8])
    for one, other in zip(by_texts.cells, by_vectors.cells, strict=True):
        assert one.kept == pytest.approx(other.kept, abs=0.02)
    assert "model.encode_document(texts)" in by_texts.snippet
    assert "model" not in by_vectors.snippet


# --- choosing ---------------------------------------------------------------------------------------------------------


def cell(size, kept, way="truncated"):
    return Cell(8, "int8", way, size, {"m": kept}, kept, kept - 1, 0.0, 0.0)


def test_the_choice_is_the_obvious_one():
    """Best in each budget, smallest for each loss, front of all that may be recommended; against a search in loops."""
    random = np.random.default_rng(2)
    cells = [
        cell(int(size), round(float(kept), 2), way)
        for size, kept, way in zip(
            random.integers(1, 40, 60), random.uniform(0.5, 0.97, 60), ["truncated", "rotated"] * 30, strict=True
        )
    ]
    cells += [cell(50, 1.0), cell(50, 1.0, "rotated"), cell(3, 0.991, "rotated")]
    for rotated in (True, False):
        marked, by_budget, by_loss = chosen(cells, [4, 20, 60], rotated)
        allowed = [one for one in cells if rotated or one.way == "truncated"]
        for one, now in zip(cells, marked, strict=True):
            better = any(
                (other.bytes <= one.bytes and other.kept > one.kept)
                or (other.bytes < one.bytes and other.kept >= one.kept)
                for other in allowed
            )
            if now.front:
                assert one in allowed
                assert not better
            elif one in allowed and not better:
                assert any(other.front and (other.bytes, other.kept) == (one.bytes, one.kept) for other in marked)
        for size, found in by_budget.items():
            assert found.kept == max(one.kept for one in allowed if one.bytes <= size)
            assert found.bytes == min(one.bytes for one in allowed if one.kept == found.kept)
        for loss, found in by_loss.items():
            assert found.bytes == min(one.bytes for one in allowed if one.kept >= 1 - loss)
    assert chosen(cells, [60], True)[1][60].way == "truncated", "needs no map"
    assert chosen(cells, [60], True)[2] == dict.fromkeys(LOSSES, cells[-1]) | {0.01: cells[-1]}


# --- what comes out ---------------------------------------------------------------------------------------------------


def test_the_text_says_what_to_do(advice):
    """Budgets, losses, verdict and snippet in print; one line in repr; the front in a notebook."""
    lines = str(advice).splitlines()
    assert lines[0] == "3-recall@10 x100 of 200 held-out queries in 400 documents"
    assert [line.split("  ")[0] for line in lines[2:8]] == [
        *(f"up to {size} bytes" for size in (4, 8, 64)),
        *(f"loses up to {loss}%" for loss in (1, 2, 5)),
    ]
    assert advice.verdict in str(advice)
    assert str(advice).endswith(advice.snippet)
    assert f"Store {advice.cell}" in advice.verdict
    assert repr(advice) == f"Advice(3-recall@10 of 200 queries, {len(advice.cells)} cells: {advice.cell})"
    html = advice._repr_html_()
    assert html.count("<tr") == 1 + sum(one.front for one in advice.cells)
    assert "Store " in html
    assert "give pairs if you have them" in html


def test_the_table_has_every_cell(advice):
    """Fewest bytes first; measures, what is kept, and the interval around the change."""
    frame = advice.to_frame()
    assert len(frame) == len(advice.cells)
    assert frame.bytes.is_monotonic_increasing
    assert list(frame.columns[:6]) == ["bytes", "precision", "dim", "way", "3-recall@10", "recall@10"]
    assert (frame.low <= frame.change + 1e-12).all()
    assert (frame.change <= frame.high + 1e-12).all()
    assert (frame["recall@10"] <= 1).all()


def test_json_has_everything_but_the_map(advice, tmp_path):
    """Whole, and of plain values."""
    advice.save(tmp_path / "advice.json")
    content = json.loads((tmp_path / "advice.json").read_text())
    assert content["format"] == 1
    assert content["cells"][0].keys() == vars(advice.cells[0]).keys()
    assert [Cell(**one) for one in content["cells"]] == advice.cells
    assert {int(size): Cell(**one) for size, one in content["budgets"].items()} == advice.budgets
    assert content["within"].keys() == {"0.01", "0.02", "0.05"}
    assert content["settings"]["seed"] == 0
    assert content["verdict"] == advice.verdict


def test_the_plot_shows_cells_and_front(advice, tmp_path):
    """Every precision, rotated and truncated, and the front; written as PNG and SVG."""
    import matplotlib as mpl

    mpl.use("Agg")
    figure = advice.plot(tmp_path / "quality")
    assert {path.name for path in tmp_path.iterdir()} == {"quality.png", "quality.svg"}
    (axes,) = figure.axes
    labels = axes.get_legend_handles_labels()[1]
    assert {"int4, rotated", "int4, truncated", "Pareto front"} <= set(labels)
    (line,) = [line for line in axes.lines if line.get_label() == "Pareto front"]
    assert list(line.get_xdata()) == sorted(one.bytes for one in advice.cells if one.front)


def with_cell(advice, **changes):
    """The same advice with another cell to take."""
    one = Cell(**vars(advice.cell) | changes)
    return Advice(**{**vars(advice), "within": dict.fromkeys(LOSSES, one), "budgets": {1000: one}})


@pytest.mark.parametrize("way", ["rotated", "truncated"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4", "binary"])
def test_snippets_run(advice, way, precision, tmp_path, monkeypatch):
    """For vectors: the codes have the bytes that were promised, and their scores find what was stored."""
    monkeypatch.chdir(tmp_path)
    advice.rotation.save("rotation.safetensors")
    now = with_cell(advice, way=way, precision=precision, dim=16)
    names = {"vectors": VECTORS, "query_vectors": VECTORS[:3]}
    exec(now.snippet, names)
    codes = names.get("codes", names["vectors"])
    assert codes.nbytes == len(VECTORS) * {"float32": 64, "float16": 32, "int8": 16, "int4": 8, "binary": 2}[precision]
    if way == "rotated" and precision != "binary":
        assert names["scores"].argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("way", ["rotated", "truncated"])
def test_snippets_of_models_run(advice, tiny_model, way, tmp_path, monkeypatch):
    """The map is in the model afterwards."""
    monkeypatch.chdir(tmp_path)
    advice.rotation.save("rotation.safetensors")
    now = with_cell(advice, way=way, dim=8)
    now.settings["model"] = "local/tiny"
    model = tiny_model()
    before = model.encode(TEXTS[:3])
    exec(now.snippet, {"model": model, "texts": TEXTS, "questions": TEXTS[:3]})
    now.settings["model"] = None
    expected = advice.rotation(before) if way == "rotated" else before
    np.testing.assert_allclose(model.encode(TEXTS[:3]), expected, atol=1e-4)


def settings_of(dim, precision):
    """By engine what follows its name, without a comment."""
    pairs = (line.split("  ", 1) for line in engine_lines(dim, precision))
    return {name: text.strip().split("  #")[0] for name, text in pairs}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [7, 64])
def test_settings_of_engines_are_of_their_language(dim, precision):
    """Python, JSON or a type of a column, with the dim wherever one stands, and the engine's word for the precision."""
    said = {"float32": "", "float16": "halfvec FLOAT16 SQfp16 float16", "int8": "INT8 SQ8 int8_hnsw int8"}
    said |= {"int4": "SQ4 int4_hnsw", "binary": "RaBitQ Binary bit"}
    settings = settings_of(dim, precision)
    assert {"float32": 4, "float16": 4, "int8": 4, "int4": 1 + (dim == 64), "binary": 3}[precision] == len(settings)
    for name, text in settings.items():
        assert not said[precision] or any(word in text for word in said[precision].split()), text
        if name == "Elasticsearch":
            field = json.loads(f"{{{text}}}")
            assert (field["type"], field["dims"]) == ("dense_vector", dim)
            assert field["index_options"] == {"type": f"{precision}_hnsw"}
        elif name == "pgvector":
            assert re.match(r"(vector|halfvec|bit)\((\d+)\)", text)[2] == str(dim)
        else:
            tree = ast.parse(text, mode="eval")
            numbers = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
            assert {number for number in numbers if type(number) is int} <= {dim}
            assert ("size" in text or "truncate_dim" in text or "factory" in text) == (dim in numbers)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_settings_of_engines_run(precision, tiny_model):
    """What is installed here takes them as they stand: faiss in the bytes that were promised, sentence-transformers."""
    faiss = pytest.importorskip("faiss", reason="needs the serve extra")
    if precision == "binary" and not hasattr(faiss, "IndexRaBitQ"):
        pytest.skip("needs faiss 1.11")
    settings, vectors = settings_of(16, precision), unit(VECTORS[:, -16:])
    index = eval(settings["faiss"], {"faiss": faiss})
    index.train(vectors)
    index.add(vectors)
    assert index.sa_code_size() == bytes_per_vector(16, precision) + 8 * (precision == "binary")
    assert np.mean(index.search(vectors, 1)[1][:, 0] == np.arange(len(vectors))) > (
        0.3 if precision == "binary" else 0.95
    )
    if text := settings.get("sentence-transformers"):
        ranges = np.stack([vectors.min(axis=0), vectors.max(axis=0)])
        names = {"vectors": vectors, "ranges": ranges, "quantize_embeddings": quantize_embeddings, "texts": TEXTS}
        names |= {"model": tiny_model(), "SentenceTransformer": lambda path, truncate_dim: np.empty((1, truncate_dim))}
        found = eval(text, names | {"path": ""})
        assert found.shape[1] == 16
        assert str(found.dtype) == precision or precision == "float32"


# --- what is refused --------------------------------------------------------------------------------------------------


def changed(row, value):
    vectors = VECTORS.copy()
    vectors[row] = value
    return vectors


PAIRED = (VECTORS, OTHERS)
OF_VECTORS = [
    ((np.empty((0, 8), dtype=np.float32),), {}, ValueError, r"vectors must have the shape \(N, D\).*\(0, 8\)"),
    ((VECTORS[:1],), {}, ValueError, "1 distinct documents are too few"),
    ((np.repeat(VECTORS[:1], 50, axis=0),), {}, ValueError, "1 distinct documents are too few"),
    ((changed(7, np.nan),), {}, ValueError, "vectors holds NaN or infinite values in 1 of 400 rows, first in 7"),
    ((changed(9, 0),), {}, ValueError, "vectors holds 1 zero vectors, the first in row 9"),
    (({"embedding": VECTORS},), {}, TypeError, r"model must be a SentenceTransformer, or vectors .* got dict"),
    (("all-MiniLM-L6-v2",), {}, TypeError, r"got str: load a model with SentenceTransformer\(name\)"),
    ((torch.nn.Linear(2, 2),), {}, TypeError, "model must be a SentenceTransformer"),
    ((VECTORS, TEXTS), {}, TypeError, "corpus is for a model's texts"),
    ((VECTORS,), {"queries": TEXTS[:5]}, (TypeError, ValueError), "queries"),
    ((VECTORS,), {"queries": OTHERS[:, :8]}, ValueError, "queries have width 8, vectors 32"),
    ((VECTORS,), {"pairs": (VECTORS, OTHERS[:-1])}, ValueError, "one document for each query, got 400 .* 399"),
    ((VECTORS,), {"pairs": VECTORS}, TypeError, r"pairs must be \(queries, documents\), got ndarray"),
    ((VECTORS,), {"pairs": (VECTORS, VECTORS)}, ValueError, "are the same vectors"),
    ((VECTORS,), {"pairs": (VECTORS, changed(3, np.nan))}, ValueError, "pairs' documents holds NaN"),
    ((VECTORS,), {"dims": [8, 64]}, ValueError, r"dims \[64\] exceed"),
    ((VECTORS,), {"dims": [WIDTH]}, ValueError, "dims must hold a dimension below"),
    ((VECTORS,), {"bytes": [1, 4, 8], "precisions": ["int8"]}, ValueError, r"bytes \[1, 4\]: no cell .* takes 8"),
    ((VECTORS,), {"bytes": [0]}, ValueError, "bytes must be an integer >= 1, got 0"),
    ((VECTORS,), {"bytes": []}, ValueError, "bytes is empty"),
    ((VECTORS,), {"bytes": 16}, TypeError, "bytes must be a sequence"),
    ((VECTORS,), {"precisions": ["int2"]}, ValueError, "precisions must be one of .* got 'int2'"),
    ((VECTORS,), {"precisions": []}, ValueError, "precisions is empty"),
    ((VECTORS,), {"precisions": "int8"}, TypeError, "precisions must be a sequence"),
    ((VECTORS,), {"measure": "nDCG@10"}, ValueError, "measure 'nDCG@10' needs pairs"),
    ((VECTORS,), {"measure": "accuracy"}, ValueError, "measure must be one of"),
    ((VECTORS,), {"held_out": 0.7}, ValueError, "held_out must be"),
]
OF_TEXTS = [
    ((), {}, ValueError, "corpus is missing"),
    (([],), {}, ValueError, "corpus has no texts"),
    (("one text",), {}, TypeError, "corpus must be a list of texts, got one text"),
    (([1, 2],), {}, TypeError, "corpus must be a list of texts, it holds 1"),
    (({"text": TEXTS},), {}, TypeError, r"got a table with the columns \['text'\]: give one of them"),
    ((pd.DataFrame({"text": TEXTS}),), {}, TypeError, r"got a table with the columns \['text'\]"),
    ((["same"] * 50,), {}, ValueError, "1 distinct documents are too few"),
    ((iter(()),), {}, ValueError, "corpus has no texts"),
    ((TEXTS,), {"queries": "what"}, TypeError, "queries must be a list of texts, got one text"),
    ((TEXTS,), {"queries": []}, ValueError, "queries has no texts"),
    ((TEXTS,), {"pairs": (TEXTS[:2], TEXTS[:1])}, ValueError, "one document for each query, got 2 queries and 1"),
    ((TEXTS,), {"pairs": (TEXTS[:2], [TEXTS[0], None])}, TypeError, "pairs' documents must be a list of texts"),
    ((TEXTS,), {"pairs": TEXTS}, TypeError, r"pairs must be \(queries, documents\), or a table .* got list"),
    ((TEXTS,), {"pairs": {"query": TEXTS}}, ValueError, r"pairs must have two columns of texts, got \['query'\]"),
    ((TEXTS,), {"batch_size": 0}, ValueError, "batch_size must be"),
    ((TEXTS,), {"queries": TEXTS[:5], "query_prompt": 5}, TypeError, "prompt of queries must be a text to put before"),
    (
        (TEXTS,),
        {"document_prompt": 5},
        TypeError,
        "the prompt of .* must be a text to put before others, or None, got 5",
    ),
]


@pytest.mark.parametrize(("given", "options", "error", "message"), OF_VECTORS)
def test_bad_vectors_are_refused(given, options, error, message):
    """Argument, value and what to do are in the message."""
    with pytest.raises(error, match=message):
        advise(*given, **options)


@pytest.mark.parametrize(("given", "options", "error", "message"), OF_TEXTS)
def test_bad_texts_are_refused_before_anything_is_encoded(tiny_model, given, options, error, message):
    """The model is not asked."""
    model = tiny_model()

    def encode(*_, **__):
        raise AssertionError("encoded")

    model.encode = encode
    with pytest.raises(error, match=message):
        advise(model, *given, **options)


def test_answers_that_are_never_found_are_said(monkeypatch):
    """Pairs out of order give a full width that finds nothing, and nothing to compare."""
    monkeypatch.setattr("mipic_st.advice.cells.ndcg", lambda found, _: torch.zeros(len(found), dtype=torch.double))
    with pytest.raises(ValueError, match=r"none of the 200 held-out queries finds an answer .* are pairs in order"):
        advise(VECTORS, pairs=PAIRED, dims=[8])


@pytest.mark.parametrize("table", [pd.DataFrame(VECTORS), VECTORS.tolist(), torch.tensor(VECTORS)], ids=type)
def test_vectors_of_other_kinds_get_the_same_advice(advice, table):
    """Data frames of numbers, lists and tensors."""
    assert advise(table, bytes=[4, 8, 64], dims=[4, 8, 16, WIDTH]).verdict == advice.verdict
