"""examples/benchmarks/compare_retrieval.py, corpus_training.py, benchmark_tails.py: what they load and measure."""

import json
import runpy
import sys

import corpora
import faiss
import numpy as np
import pandas as pd
import pytest
import torch
from benchmark_tails import in_a_process
from compare_retrieval import by_faiss, cells, random_rotation, sparse
from corpora import Corpus, Task, bootstrap
from test_examples import ROOT

from mipic_st.numerics import unit_length
from mipic_st.transforms.faiss_index import balanced


@pytest.fixture
def run_here(monkeypatch, capsys, tiny_model, tmp_path):
    """Run a script in this process with a tiny model, on one thread; returns what it printed."""
    tiny_model().save_pretrained(str(tmp_path / "tiny"))
    threads = torch.get_num_threads(), faiss.omp_get_max_threads()

    def started(script, *arguments):
        always = ["--model", str(tmp_path / "tiny"), "--threads", "1"]
        monkeypatch.setattr(sys, "argv", [script, *always, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / "benchmarks" / script), run_name="__main__")
        return capsys.readouterr().out

    yield started
    torch.set_num_threads(threads[0])
    faiss.omp_set_num_threads(threads[1])


def task_of(documents=60, queries=12, width=16, own=False):
    generator = np.random.default_rng(0)
    vectors = unit_length(generator.normal(size=(documents, width)).astype(np.float32))
    if own:
        rows = generator.permutation(documents)[:queries]
        return Task(vectors, vectors[rows], vectors[:40], [], torch.tensor(rows))
    asked = unit_length(generator.normal(size=(queries, width)).astype(np.float32))
    relevant = [torch.tensor(sorted(generator.permutation(documents)[: 1 + row % 4])) for row in range(queries)]
    return Task(vectors, asked, vectors, relevant, None)


def test_measures_of_a_search_are_those_of_their_definitions():
    """Cut, scaled, ranked, scored: one query after another, in words of its own."""
    task, matrix, dim = task_of(), random_rotation(16, 0), 6
    wanted = task.search(16)
    figures = task.measure(task.search(dim, matrix=matrix), wanted)
    for number, query in enumerate(task.queries):
        cut = query @ matrix[:, :dim]
        cosines = [cut @ (row @ matrix)[:dim] / np.linalg.norm((row @ matrix)[:dim]) for row in task.documents]
        best = sorted(range(60), key=lambda row: -cosines[row])[:10]
        hits = [place for place, row in enumerate(best) if row in task.relevant[number]]
        ideal = sum(1 / np.log2(place + 2) for place in range(len(task.relevant[number])))
        assert figures["ndcg@10"][number] == pytest.approx(100 * sum(1 / np.log2(p + 2) for p in hits) / ideal)
        assert figures["mrr@10"][number] == pytest.approx(100 / (hits[0] + 1) if hits else 0)
        full = sorted(range(60), key=lambda row: -(query @ task.documents[row]))[:10]
        assert figures["recall@10"][number] == pytest.approx(10 * len({*best} & {*full}))


def test_a_query_does_not_find_itself_whatever_searches():
    """Neither with floats, nor with codes, nor in faiss, whose flat index finds what we find."""
    task = task_of(own=True)
    for found in (task.search(16), task.search(16, "int8"), by_faiss(task, "Flat"), by_faiss(task, "SQ8")):
        assert found.shape == (12, 10)
        assert not (found == task.own[:, None]).any()
    assert torch.equal(by_faiss(task, "Flat").sort().values, task.search(16).sort().values)
    assert list(task.measure(task.search(16), task.search(16))) == ["recall@10"]


def test_codes_are_of_the_documents_and_ranges_of_those_that_are_fitted_on():
    """Queries stay floats; with ranges of other rows other documents are found."""
    task = task_of(own=True)
    other = task._replace(fitted=task.documents[:3])
    assert not torch.equal(task.search(16, "int4"), other.search(16, "int4"))
    assert torch.equal(task.search(16), other.search(16))
    assert not torch.equal(task.search(16, "binary"), task.search(16))


def test_cells_hold_the_most_dims_each_once():
    """Whatever the width, a cell is shown at the smallest size that holds it."""
    assert list(cells(384, (8, 64, 128), 8)) == [(8, 64), (64, 384)]
    assert list(cells(384, (8, 16, 64), 8, extra=8)) == [(16, 64), (64, 384)]
    assert list(cells(16, (8, 16, 32), 1)) == [(8, 8), (16, 16)]


def test_interleaved_parts_share_the_leading_values():
    """Each part has one of every run of neighbours, and every value stands once."""
    assert balanced(np.arange(6)[None], "PQ2").reshape(2, 3).tolist() == [[0, 2, 4], [1, 3, 5]]


def test_k_sparse_vectors_are_trained_by_a_seed():
    """The same seed finds the same, another one something else; the global generator is left alone."""
    task = task_of(documents=300)
    state = torch.get_rng_state()
    first, again, other = (sparse(task, 4, seed, steps=3, batch=32) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_intervals_cover_queries_and_seeds():
    """One seed: the spread over queries alone; seeds that differ widen it."""
    generator = np.random.default_rng(1)
    queries = generator.normal(1, 5, size=400)
    one = bootstrap(queries[None])
    assert one["high"] - one["low"] == pytest.approx(2 * 1.96 * queries.std() / 20, rel=0.1)
    assert one["difference"] == pytest.approx(queries.mean())
    assert one["low"] < one["difference"] < one["high"]
    many = bootstrap(queries + np.array([[-3.0], [0], [3]]))
    assert many["high"] - many["low"] > 2 * (one["high"] - one["low"])


def test_collections_are_read_from_files(tmp_path, monkeypatch):
    """Cranfield by its three files, Banking77 by labels, sentences once each; queries are not fitted on."""
    pd.DataFrame({"id": ["a", "b"], "text": ["wings", "drag"]}).to_csv(tmp_path / "cranfield_docs.csv", index=False)
    asked = pd.DataFrame({"id": [1, 2, 3], "text": ["lift?", "drag?", "none?"]})
    asked.to_csv(tmp_path / "cranfield_queries.csv", index=False)
    qrels = pd.DataFrame({"query": [1, 1, 2, 3], "doc": ["b", "a", "b", "gone"]})
    qrels.to_csv(tmp_path / "cranfield_qrels.csv", index=False)
    found = corpora.cranfield(tmp_path)
    assert found == Corpus(["wings", "drag"], ["lift?", "drag?"], [[1, 0], [1]])
    for part, texts in (("train", ["pay", "card", "owe"]), ("test", ["debt", "null"])):
        data = pd.DataFrame({"text": texts, "label": ["x", "y", "x"][: len(texts)]})
        data.to_csv(tmp_path / f"banking77_{part}.csv", index=False)
    assert corpora.banking77(tmp_path) == Corpus(["pay", "card", "owe"], ["debt", "null"], [[0, 2], [1]])
    pair = pd.DataFrame({"sentence1": ["pay", "a", "b"], "sentence2": ["c", "d", "e"]})
    for name in ("sts13_test", "sts14_test", "sts15_test", "sick_train", "sick_validation", "mrpc_train"):
        pair.to_csv(tmp_path / f"{name}.csv", index=False)
    found = corpora.sentences(tmp_path, queries=3, fitted=4)
    assert sorted(found.documents) == sorted({"pay", "card", "owe", "debt", "null", *"abcde"})
    assert found.queries == [found.documents[row] for row in found.own]
    assert len(found.fitted) == 4
    assert not {*found.own} & {*found.fitted}
    monkeypatch.setattr(corpora, "docstring_pairs", lambda size: [{"query": "how", "document": "so"}] * size)
    assert corpora.docstrings(2) == Corpus(["so", "so"], ["how", "how"], [[0], [1]])


@pytest.mark.parametrize("precision", ["int8", "int4", "binary"])
def test_queries_are_coded_where_a_row_says_so(precision):
    """Codes against codes: levels of int8 and int4, equal bits of binary; one pair after another."""
    task, matrix, dim = task_of(), random_rotation(16, 0), 8
    queries, documents, fitted = task.cut(dim, matrix)
    low, high, mean = np.quantile(fitted, 0.003, axis=0), np.quantile(fitted, 0.997, axis=0), fitted.mean(axis=0)
    levels = {"int8": 255, "int4": 15}.get(precision)

    def score(query, document):
        if levels is None:
            return sum((query > mean) == (document > mean))
        step = (high - low) / levels
        rounded = [np.clip((side - low) / step, 0, levels) for side in (query, document)]
        whole = np.floor if precision == "int8" else np.rint  # int8 as sentence-transformers has it
        first, second = (low + step * whole(side) for side in rounded)
        return first @ second

    for query, found in zip(queries, task.search_by_codes(dim, precision, matrix), strict=True):
        scores = np.array([score(query, document) for document in documents])
        assert scores[found] == pytest.approx(np.sort(scores)[::-1][:10])


def test_nano_beir_is_read_by_name(tmp_path):
    """A local folder of the hub's shape stands in for the download."""
    rows = {
        "corpus": [{"_id": f"d{row}", "text": f"document {row}"} for row in range(5)],
        "queries": [{"_id": "q0", "text": "first"}, {"_id": "q1", "text": "unanswered"}],
        "qrels": [{"query-id": "q0", "corpus-id": "d3"}, {"query-id": "q0", "corpus-id": "d1"}],
    }
    configs = []
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        configs.append(f"- config_name: {name}\n  data_files:\n  - split: NanoNQ\n    path: {name}.jsonl\n")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n", encoding="utf-8")
    found = corpora.nano("nq", str(tmp_path))
    assert found.documents == [f"document {row}" for row in range(5)]
    assert found.queries == ["first"]
    assert sorted(found.relevant[0]) == [1, 3]


def test_texts_are_encoded_once_with_the_model_s_prompts(tiny_model, tmp_path, monkeypatch):
    """Vectors are kept by model, prompt and texts."""
    model = tiny_model()
    model.prompts = {"query": "woman ", "document": ""}
    texts = ["a man eats", "a dog"]
    vectors = corpora.encode(model, texts, "query", tmp_path)
    np.testing.assert_allclose(
        vectors, model.encode([f"woman {text}" for text in texts], normalize_embeddings=True), atol=1e-6
    )
    other = corpora.encode(model, texts, "document", tmp_path)
    assert np.abs(vectors - other).max() > 1e-3
    monkeypatch.setattr(corpora, "encode_texts", None)
    assert np.array_equal(corpora.encode(model, texts, "query", tmp_path), vectors)
    with pytest.raises(TypeError):
        corpora.encode(model, texts[:1], "query", tmp_path)


def test_compare_retrieval_prints_and_keeps_every_way(run_here, tmp_path):
    """All rows with their cells, differences that are those of the means, and sets that are added to a file."""
    file = tmp_path / "figures.json"
    file.write_text(json.dumps({"sets": {"earlier": {}}}), encoding="utf-8")
    printed = run_here("compare_retrieval.py", "--smoke", "--csr", 8, "--json", file)
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["settings"]["model"] == "tiny"
    assert list(report["sets"]) == ["earlier", "synthetic"]
    found = report["sets"]["synthetic"]
    assert found["documents"] == found["fitted on"] == 280
    assert list(found["dims"]) == ["truncation", "random rotation", "PCA", "rotation"]
    assert set(found["dims"]["PCA"]) == {"16", "8"}
    assert found["bytes"]["rotation, int4"]["8"]["cell"] == "int4 x 16"
    assert "PCA + RaBitQ (faiss)" in printed
    assert "CSRLoss" in printed
    rows = found["bytes"]
    for row, by_size in found["over OPQ"].items():
        for size, made in by_size.items():
            ours, theirs = (rows[name][size]["ndcg@10"]["mean"] for name in (row, "OPQ + PQ (faiss)"))
            assert made["difference"] == pytest.approx(ours - theirs)
            assert made["low"] <= made["difference"] <= made["high"]
    assert found["over OPQ"]["rotation, PQ"]


def test_corpus_training_resumes_and_reports(run_here, tmp_path):
    """Every row once, trained and rotated again; the report's means and differences are those of the runs."""
    file = tmp_path / "figures.json"
    call = ("corpus_training.py", "--smoke", "--dims", 32, 8, "--learning-rates", 0.01)
    call += ("--output", tmp_path / "runs", "--report", file)
    rows = ("--rows", "matryoshka", "rotation+mipic-pic")
    first = run_here(*call, *rows)
    assert first.count("seed 0") == 4
    assert "seed 0" not in run_here(*call, *rows)
    report = json.loads(file.read_text(encoding="utf-8"))
    found = report["corpora"]["synthetic"]
    again = [f"{row}, rotated again" for row in rows[1:]]
    assert set(found) == {"truncation", "rotation", *rows[1:], *again, "settings"}
    rates = found["settings"].pop("rates")
    assert found["settings"] == {"documents": 280, "train": 15, "dev": 5, "test": 20}
    lines = [json.loads(line) for line in (tmp_path / "runs" / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    by_row = {line["row"]: line for line in lines}
    dev = by_row["matryoshka"]["dev"]
    assert rates == {"matryoshka": {"0.01": pytest.approx(np.mean(dev["32"] + dev["8"]))}}
    assert by_row["rotation"]["test"]["32"] == pytest.approx(by_row["truncation"]["test"]["32"], abs=0.01)
    assert by_row["rotation"]["test"]["8"] != by_row["truncation"]["test"]["8"]
    for row in rows[1:]:
        assert by_row[row]["test"]["32"] != by_row["truncation"]["test"]["32"], "it was trained"
        assert found[row]["ndcg@10"]["8"]["mean"] == pytest.approx(np.mean(by_row[row]["test"]["8"]))
        made = found[f"{row}, rotated again"]["over the rotation"]["8 B"]
        gained = np.mean(by_row[row]["again"]["test"]["8 B"]) - np.mean(by_row["rotation"]["test"]["8 B"])
        assert made["difference"] == pytest.approx(gained)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "seconds"), [("documents", 30), ("advice", 90), ("rotation", 180)])
def test_a_fit_takes_at_most_three_times_its_vectors(what, seconds):
    """20,000 x 384, of pairs both sides, in a process of its own."""
    figures = in_a_process(what, "20000x384", threads=1)
    assert figures["memory"] <= 3
    assert figures["seconds"] <= seconds
