"""Invariants of evaluate_mteb: equal to mteb's own run, no collisions, resumable, random state kept."""

import copy
import json
import logging
import multiprocessing
import os
import random
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from conftest import sentences
from evaluation_fixtures import CountingModel, tiny_model
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.evaluation import mteb_data
from mipic_st.evaluation import tasks as mteb_tasks
from mipic_st.evaluation.mteb import evaluate_mteb
from mipic_st.evaluation.tasks import TASK_GROUPS

mteb = pytest.importorskip("mteb")


@pytest.fixture
def tiny_tasks():
    """Real task classes with a handful of rows: objects, whose scores go to no file."""
    from datasets import Dataset, DatasetDict

    sts = mteb.get_task("STS13")
    sts.dataset = DatasetDict(
        test=Dataset.from_dict(
            {
                "sentence1": sentences(20, 1),
                "sentence2": sentences(20, 2),
                "score": [float(7 * i % 5) for i in range(20)],
            }
        )
    )
    probe = mteb.get_task("Banking77Classification")
    words = ["cat", "dog", "bird"] * 10
    parts = {
        part: Dataset.from_dict(
            {"text": [f"{w} {t}" for w, t in zip(words, sentences(30, s), strict=True)], "label": words}
        )
        for part, s in (("train", 3), ("test", 4))
    }
    probe.dataset = DatasetDict(parts)
    probe.samples_per_label, probe.n_experiments = 4, 2
    for task in (sts, probe):
        task.data_loaded = True
    return [sts, probe]


@pytest.fixture
def any_size(monkeypatch):
    """mteb does not say how many rows a set has."""
    from mteb.abstasks.task_metadata import TaskMetadata

    monkeypatch.setattr(TaskMetadata, "descriptive_stats", None)


@pytest.fixture
def sts13(tmp_path, monkeypatch, any_size):
    """Arguments for STS13 by name, from a small local file that passes for MTEB's set."""
    frame = pairs(1, 20).to_pandas()
    (tmp_path / "data").mkdir()
    frame.to_csv(tmp_path / "data" / "sts13_test.csv", index=False)
    digest = mteb_data.set_digest("STS", {column: frame[column].tolist() for column in frame})
    monkeypatch.setitem(mteb_data.KNOWN_SETS, "STS13", {"test": digest})
    return {"tasks": ["STS13"], "data_dir": tmp_path / "data"}


@pytest.fixture
def by_name(monkeypatch):
    """(tasks) -> the name of a benchmark that has them, for what is narrowed and given by name."""
    benchmarks = {}
    monkeypatch.setattr(mteb, "get_benchmark", lambda name: SimpleNamespace(tasks=benchmarks[name]()))

    def make(name, tasks):
        benchmarks[name] = tasks
        return name

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def run(model, tasks, dims, output, **kwargs):
    if isinstance(tasks, dict):
        kwargs, tasks = {**tasks, **kwargs}, tasks["tasks"]
        del kwargs["tasks"]
    report = evaluate_mteb(model, tasks, dims, output=output, show_progress_bar=False, **kwargs)
    return {(row["task"], row["dim"], row["precision"]): row["score"] for row in report.records}


def test_full_width_equals_mtebs_own_run(model, tiny_tasks, tmp_path):
    """Scores at full width equal mteb.evaluate's on the same task objects."""
    ours = run(model, tiny_tasks, [8, 32], tmp_path / "out")
    for task in tiny_tasks:
        native = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
        # mteb's files hold 6 digits
        assert ours[(task.metadata.name, 32, "float32")] == round(native.task_results[0].get_score(), 6)


def test_each_text_is_encoded_once_for_all_dims(model, tiny_tasks, tmp_path, monkeypatch):
    """Three dims and three precisions, one encoding."""
    counted = CountingModel(model, monkeypatch)
    run(model, tiny_tasks[:1], [4, 8, 32], tmp_path, precisions=["float32", "int8", "binary"])
    data = tiny_tasks[0].dataset["test"]
    assert sorted(counted.texts) == sorted({*data["sentence1"], *data["sentence2"]})


def test_dims_and_models_never_share_a_result(sts13, tmp_path):
    """Two models under one name and three dims: six different scores, all read back by mteb's ResultCache."""
    models = [tiny_model(tmp_path / str(layers), layers=layers) for layers in (1, 4)]
    scores = [run(m, sts13, [4, 8, 32], tmp_path / "out", model_name="org/same") for m in models]
    values = [value for part in scores for value in part.values()]
    assert len(set(values)) == 6
    files = list((tmp_path / "out").rglob("STS13.json"))
    read = [mteb.results.TaskResult.from_disk(path).get_score() for path in files]
    assert sorted(read) == pytest.approx(sorted(values))


def test_vectors_of_any_length_have_files_of_their_own(sts13, tmp_path):
    """Codes of renormalised vectors are others: both in one folder are what each is alone."""
    model = tiny_model(tmp_path / "m", normalize=False)
    codes = {"precisions": ["float32", "int8"]}
    unit = run(model, sts13, [8], tmp_path / "out", **codes)
    raw = run(model, sts13, [8], tmp_path / "out", normalize=False, **codes)
    assert raw == run(model, sts13, [8], tmp_path / "fresh", normalize=False, **codes)
    assert raw["STS13", 8, "int8"] != unit["STS13", 8, "int8"]


def test_another_method_on_the_instance_is_another_model(sts13, tmp_path):
    """An instruction in front of each text gives its own score, in a folder with the plain model's."""
    model = tiny_model(tmp_path / "m")
    plain = run(model, sts13, [8], tmp_path / "out")
    original = model.encode
    model.encode = lambda texts, **options: original([f"house {text}" for text in texts], **options)
    changed = run(model, sts13, [8], tmp_path / "out")
    assert changed == run(model, sts13, [8], tmp_path / "fresh") != plain


def test_resume_runs_only_what_is_missing(model, sts13, tmp_path, monkeypatch):
    """A second run encodes nothing; a run with one more dim gives the old scores and the new one."""
    first = run(model, sts13, [4, 8], tmp_path)
    counted = CountingModel(model, monkeypatch)
    assert run(model, sts13, [4, 8], tmp_path) == first
    assert counted.texts == []
    more = run(model, sts13, [4, 8, 16], tmp_path)
    assert {key: more[key] for key in first} == first
    assert len(counted.texts) > 0


def test_int8_of_a_resumed_run_equals_that_of_a_whole_run(model, sts13, tmp_path):
    """int8 is calibrated on all texts, also when float32 came from an earlier run."""
    whole = run(model, sts13, [8], tmp_path / "a", precisions=["float32", "int8"])
    run(model, sts13, [8], tmp_path / "b")
    resumed = run(model, sts13, [8], tmp_path / "b", precisions=["float32", "int8"])
    assert resumed == whole


def test_a_model_name_is_a_text(model, sts13, tmp_path):
    """A number is none."""
    with pytest.raises(TypeError, match="model_name must be a text, got 3"):
        run(model, sts13, [8], tmp_path, model_name=3)


def test_an_output_that_cannot_be_written_is_named_before_encoding(model, sts13, tmp_path, monkeypatch):
    """A file in its place, or under one."""
    (tmp_path / "file").write_text("mine")
    counted = CountingModel(model, monkeypatch)
    for place in (tmp_path / "file", tmp_path / "file" / "results"):
        with pytest.raises(ValueError, match=r"file.*cannot be written"):
            run(model, sts13, [8], place)
    assert counted.texts == []


def test_the_model_passes_through_four_modules(model, tiny_tasks, tmp_path):
    """Who holds the model while a score is made: few places to look at when a score is wrong."""
    seen = set()

    def look(frame, event, _):
        module = frame.f_globals.get("__name__", "")
        if event == "return" and module.startswith("mipic_st.") and any(v is model for v in frame.f_locals.values()):
            seen.add(module.removeprefix("mipic_st."))

    sys.setprofile(look)
    try:
        run(model, tiny_tasks, [8, 32], tmp_path)
    finally:
        sys.setprofile(None)
    assert seen == {"evaluation.mteb", "evaluation.store", "encoder.fingerprint", "encoder.structure"}


def test_random_state_of_the_caller_is_untouched(model, tiny_tasks, tmp_path):
    """random, numpy and torch continue as if nothing had run, although mteb reseeds them."""

    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    expected = draw()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(7)
    run(model, tiny_tasks, [8], tmp_path)
    assert draw() == expected


def test_prompts_are_honoured(tmp_path, tiny_tasks):
    """A prompt for the task changes the score to what mteb's own run gives with it."""
    model = tiny_model(tmp_path / "m", prompts={"STS13": "query: "})
    plain = run(tiny_model(tmp_path / "n"), tiny_tasks[:1], [32], tmp_path / "a")
    ours = run(model, tiny_tasks[:1], [32], tmp_path / "b")
    native = mteb.evaluate(model, tiny_tasks[0], cache=None, co2_tracker=False, show_progress_bar=False)
    key = ("STS13", 32, "float32")
    assert ours[key] == round(native.task_results[0].get_score(), 6)
    assert ours[key] != pytest.approx(plain[key], abs=1e-6)


def test_missing_data_is_named_before_encoding(model, tmp_path, monkeypatch):
    """Neither file nor hub: an error with the task's name, and nothing encoded."""
    monkeypatch.setattr(mteb_tasks, "_on_hub", lambda task: False)
    counted = CountingModel(model, monkeypatch)
    with pytest.raises(FileNotFoundError, match="no data for STS16"):
        evaluate_mteb(model, ["STS16"], [8], output=tmp_path, data_dir=tmp_path)
    assert counted.texts == []


def test_partial_local_data_is_refused(model, tmp_path):
    """A file with other rows than MTEB's set does not get the task's name."""
    (tmp_path / "sts13_test.csv").write_text("sentence1,sentence2,score\na,b,1\n")
    with pytest.raises(ValueError, match="has 1 rows, STS13's test part has 1500"):
        evaluate_mteb(model, ["STS13"], [8], output=tmp_path / "out", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'sentence1,sentence2,score\na,b,1\n"a,b,1\n', "cannot be read as csv"),
        (b"sentence1,sentence2,score\n\xff,b,1\n", "cannot be read as csv"),
        (b"", "cannot be read as csv"),
        (b"sentence1,sentence2,score\na,b,1\na,b,high\n", "has 1 scores that are no numbers, the first is 'high'"),
        (b"sentence1,sentence2,score\na,b,\na,b,1\n", "has 1 scores that are no numbers, the first is ''"),
    ],
)
def test_a_bad_data_file_is_named(model, tmp_path, content, message):
    """The error says which file, and what is wrong with it."""
    path = tmp_path / "sts13_test.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        evaluate_mteb(model, ["STS13"], [8], output=tmp_path / "out", data_dir=tmp_path)
    assert str(path) in str(caught.value)


def test_rows_without_a_label_are_named(model, any_size, tmp_path):
    """An empty label would be a class of its own."""
    for part in ("train", "test"):
        (tmp_path / f"banking77_{part}.csv").write_text("text,label\na,0\nb,1\nc, \nd,\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 2 rows without a label, the first is row 3.*Fill them"):
        evaluate_mteb(model, ["Banking77Classification"], [8], output=tmp_path / "out", data_dir=tmp_path)


@pytest.mark.parametrize("flag", ["normalize", "overwrite", "skip_missing"])
def test_a_flag_is_no_string(model, tmp_path, flag):
    """ "no" would count as True."""
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        evaluate_mteb(model, ["STS13"], [8], output=tmp_path, **{flag: "no"})


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "tasks is empty"),
        (["NoSuchTask"], "'NoSuchTask' is neither a group"),
        ([3], "tasks: 3 is neither a name nor a task object"),
        (3, "tasks must be a sequence"),
    ],
)
def test_unknown_tasks_are_named(model, tmp_path, tasks, message):
    """Empty and unknown task lists raise."""
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate_mteb(model, tasks, [8], output=tmp_path)


# --- subsets and splits -----------------------------------------------------------------------------------------------


def pairs(seed, count=16):
    """An STS part: sentence pairs with scores."""
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "sentence1": sentences(count, seed),
            "sentence2": sentences(count, seed + 1),
            "score": [float((7 * i + seed) % 5) for i in range(count)],
        }
    )


def sts22(*subsets, **parts):
    """STS22 narrowed to subsets, with the same small data for each whatever the others are."""
    from datasets import DatasetDict

    seeds = {"en": 1, "fr": 3, "de": 5}
    task = mteb.get_task("STS22", hf_subsets=list(subsets))
    task.dataset = {name: DatasetDict(test=parts.get(name) or pairs(seeds[name])) for name in subsets}
    task.data_loaded = True
    return task


def native(model, task):
    """Score of mteb's own run."""
    task = copy.copy(task)
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    return result.task_results[0].get_score()


def score_of(model, task, output, dim=32, **kwargs):
    """The one score of a run at one dim."""
    tasks = task if isinstance(task, str) else [task]
    return evaluate_mteb(model, tasks, [dim], output=output, show_progress_bar=False, **kwargs).records[-1]["score"]


@pytest.fixture
def named_sts22(by_name, monkeypatch):
    """(subsets) -> STS22 by name, narrowed to them, with the data of `sts22`."""

    def load(task, *args, **kwargs):
        task.dataset, task.data_loaded = sts22(*task.hf_subsets).dataset, True

    monkeypatch.setattr(type(mteb.get_task("STS22")), "load_data", load)
    monkeypatch.setattr(mteb_tasks, "_on_hub", lambda task: True)

    def make(*subsets):
        return by_name("+".join(subsets), lambda: [mteb.get_task("STS22", hf_subsets=list(subsets))])

    return make


def test_a_score_is_of_the_tasks_own_subsets(model, named_sts22, tmp_path):
    """English alone gives the same before and after French went into the same folder, and both give their mean."""
    english, french = native(model, sts22("en")), native(model, sts22("fr"))
    assert english != pytest.approx(french, abs=1e-3)
    for subsets, expected in ((["en"], english), (["fr"], french), (["en"], english), (["en", "fr"], None)):
        expected = (english + french) / 2 if expected is None else expected
        assert score_of(model, named_sts22(*subsets), tmp_path) == pytest.approx(expected, abs=2e-6)


def test_both_subsets_are_in_one_file_of_mteb(model, named_sts22, tmp_path, monkeypatch):
    """What is there is not encoded again, and mteb reads both subsets from the file."""
    score_of(model, named_sts22("en"), tmp_path)
    score_of(model, named_sts22("fr"), tmp_path)
    counted = CountingModel(model, monkeypatch)
    score_of(model, named_sts22("en", "fr"), tmp_path)
    assert counted.texts == []
    (path,) = tmp_path.rglob("STS22.json")
    assert set(mteb.results.TaskResult.from_disk(path).hf_subsets) == {"en", "fr"}


def test_tasks_of_one_name_with_other_subsets_are_both_kept(model, tmp_path):
    """A row each, under a name that says the subsets, with its own score; the same one twice counts once."""
    english, french = sts22("en"), sts22("fr")
    report = evaluate_mteb(model, [english, french, english], [32], output=tmp_path, show_progress_bar=False)
    assert [row["task"] for row in report.records] == ["STS22 (en)", "STS22 (fr)"]
    expected = [native(model, sts22(name)) for name in ("en", "fr")]
    assert [row["score"] for row in report.records] == pytest.approx(expected, abs=2e-6)
    assert list(report.table().columns) == ["STS22 (en)", "STS22 (fr)", "mean"]


def test_narrowed_splits_are_named(model, tmp_path):
    """A task of some splits is not the task; its score is that of these splits."""
    from datasets import DatasetDict

    scores = {}
    for split in ("dev", "test"):
        task = mteb.get_task("STSBenchmark", eval_splits=[split])
        task.dataset, task.data_loaded = DatasetDict(dev=pairs(1), test=pairs(3)), True
        report = evaluate_mteb(model, [task], [32], output=tmp_path, show_progress_bar=False)
        scores[report.records[0]["task"]] = (report.records[0]["score"], native(model, task))
    assert set(scores) == {"STSBenchmark (dev)", "STSBenchmark"}
    for ours, theirs in scores.values():
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_all_splits_of_a_task_count(model, tmp_path, monkeypatch):
    """mteb's score of a task with several splits is their mean."""
    from datasets import DatasetDict

    task = mteb.get_task("STSBenchmark", eval_splits=["dev", "test"])
    task.dataset, task.data_loaded = DatasetDict(dev=pairs(1), test=pairs(3)), True
    assert score_of(model, task, tmp_path) == pytest.approx(native(model, task), abs=2e-6)


def test_int8_of_a_subset_does_not_depend_on_what_ran_before(model, named_sts22, tmp_path):
    """int8 is calibrated on the texts of the run: a folder with one subset's results changes nothing."""
    options = {"precisions": ["float32", "int8"], "dim": 8}
    fresh = score_of(model, named_sts22("en", "fr"), tmp_path / "a", **options)
    score_of(model, named_sts22("en"), tmp_path / "b", **options)
    assert score_of(model, named_sts22("en", "fr"), tmp_path / "b", **options) == fresh
    alone = score_of(model, named_sts22("en"), tmp_path / "c", **options)
    assert score_of(model, named_sts22("en"), tmp_path / "b", **options) == alone != fresh


@pytest.mark.parametrize("other", [lambda: sts22("en", en=pairs(9)), lambda: "STS22 by name"])
def test_two_tasks_of_one_label_are_refused(model, tmp_path, monkeypatch, other):
    """One row cannot have two scores, of two objects or of an object and a name; nothing is encoded."""
    counted = CountingModel(model, monkeypatch)
    english, original = sts22("en"), mteb.get_task
    monkeypatch.setattr(mteb, "get_task", lambda name, **_: original("STS22", hf_subsets=["en"]))
    with pytest.raises(ValueError, match=r"STS22 \(en\) is given twice, and an object of yours"):
        evaluate_mteb(model, [english, other()], [8], output=tmp_path)
    assert counted.texts == []


def test_clustering_draws_the_same_texts_at_every_dim(model, tmp_path, monkeypatch):
    """mteb's clustering draws from a generator that runs on; here each dim starts where the task starts."""
    from datasets import Dataset, DatasetDict

    def task():
        made = mteb.get_task("BiorxivClusteringP2P.v2")
        texts = sentences(60, 5, shortest=3)
        made.dataset = DatasetDict(
            test=Dataset.from_dict({"sentences": texts, "labels": [f"l{i % 4}" for i in range(60)]})
        )
        made.data_loaded, made.max_document_to_embed, made.max_fraction_of_documents_to_embed = True, 20, None
        made.max_documents_per_cluster = 16
        return made

    counted = CountingModel(model, monkeypatch)
    ours = run(model, [task()], [8, 32], tmp_path)
    assert len(counted.texts) == 20
    assert ours["BiorxivClusteringP2P.v2", 32, "float32"] == pytest.approx(native(model, task()), abs=1e-6)


# --- retrieval and aggregates -----------------------------------------------------------------------------------------


def retrieval(name, seed=1, documents=30, queries=8):
    """A retrieval task on a small corpus; every query has two relevant documents."""
    from datasets import Dataset

    task = mteb.get_task(name)
    (split,) = task.eval_splits
    task.dataset = {
        "default": {
            split: {
                "corpus": Dataset.from_dict(
                    {
                        "id": [f"d{i}" for i in range(documents)],
                        "title": [""] * documents,
                        "text": sentences(documents, seed, shortest=4),
                    }
                ),
                "queries": Dataset.from_dict(
                    {"id": [f"q{i}" for i in range(queries)], "text": sentences(queries, seed + 1, shortest=3)}
                ),
                "relevant_docs": {f"q{i}": {f"d{i}": 1, f"d{i + 3}": 1} for i in range(queries)},
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    return task


def test_retrieval_per_dim(tmp_path, monkeypatch):
    """nDCG@10 at each dim is what NumPy gives for the cut and renormalised vectors, prompts included; one encoding."""
    model = tiny_model(tmp_path / "m", prompts={"query": "find: ", "document": "text: "})
    task = retrieval("NanoSciFactRetrieval")
    part = task.dataset["default"]["train"]
    queries, documents = model.encode_query(part["queries"]["text"]), model.encode_document(part["corpus"]["text"])
    expected = {}
    for dim in (4, 16, 32):
        q, d = ((v[:, :dim] / np.linalg.norm(v[:, :dim], axis=1, keepdims=True)) for v in (queries, documents))
        gains = []
        for i, row in enumerate(q @ d.T):
            top = np.argsort(-row, kind="stable")[:10]
            gains.append(sum(1 / np.log2(rank + 2) for rank, j in enumerate(top) if j in (i, i + 3)))
        expected["NanoSciFactRetrieval", dim, "float32"] = np.mean(gains) / (1 + 1 / np.log2(3))
    counted = CountingModel(model, monkeypatch)
    ours = run(model, [task], [4, 16, 32], tmp_path / "out")
    # mteb rounds nDCG to 5 digits
    assert ours == pytest.approx(expected, abs=1e-5)
    assert len(set(ours.values())) == 3
    assert len(counted.texts) == len({*part["corpus"]["text"]}) + len({*part["queries"]["text"]})
    assert ours["NanoSciFactRetrieval", 32, "float32"] == pytest.approx(native(model, task), abs=1e-6)


def test_presets_are_tasks_of_mteb():
    """Every preset's names exist, and the size of nano-retrieval is that of mteb's statistics."""
    tasks = {name: mteb.get_task(name) for preset in TASK_GROUPS.values() for name in preset.tasks}
    nano = [tasks[name] for name in TASK_GROUPS["nano-retrieval"].tasks]
    assert all(task.metadata.type == "Retrieval" for task in nano)
    texts = sum(part["num_samples"] for task in nano for part in task.metadata.descriptive_stats.values())
    assert TASK_GROUPS["nano-retrieval"].texts == texts


@pytest.mark.slow
def test_nano_retrieval_is_mtebs_nano_beir():
    """The preset has what the benchmark has."""
    assert set(TASK_GROUPS["nano-retrieval"].tasks) == {t.metadata.name for t in mteb.get_benchmark("NanoBEIR").tasks}


@pytest.fixture
def aggregate(monkeypatch):
    """CQADupstackRetrieval of two of its parts, with small data."""
    task = mteb.get_task("CQADupstackRetrieval")
    parts = [retrieval(part.metadata.name, seed) for seed, part in enumerate(task.metadata.tasks[:2], 1)]
    task.metadata = task.metadata.model_copy(update={"tasks": parts})
    task.tasks, task.taskname_to_task = parts, {part.metadata.name: part for part in parts}
    return task


def test_an_aggregate_is_the_mean_of_its_parts(model, aggregate, tmp_path):
    """One row per dim, mteb's own combination."""
    ours = run(model, [aggregate], [8, 32], tmp_path)
    assert len(ours) == 2
    parts = [native(model, part) for part in aggregate.metadata.tasks]
    assert len(set(parts)) == 2
    assert ours["CQADupstackRetrieval", 32, "float32"] == pytest.approx(np.mean(parts), abs=2e-6)


def test_an_aggregate_by_name_is_resumed(model, aggregate, by_name, tmp_path, monkeypatch):
    """Its parts and itself are in files, and a second run encodes nothing."""
    for part in aggregate.metadata.tasks:
        data = part.dataset
        monkeypatch.setattr(
            type(part), "load_data", lambda task, data=data, **_: vars(task).update(dataset=data, data_loaded=True)
        )
        part.unload_data()
    monkeypatch.setattr(mteb_tasks, "_on_hub", lambda task: True)
    name = by_name("dupes", lambda: [aggregate])
    ours = run(model, name, [8, 32], tmp_path)
    assert {path.stem for path in tmp_path.rglob("CQA*.json")} >= {part.metadata.name for part in aggregate.tasks}
    counted = CountingModel(model, monkeypatch)
    assert run(model, name, [8, 32], tmp_path) == ours
    assert counted.texts == []


def test_an_aggregate_of_other_data_is_run_again(model, aggregate, tmp_path):
    """The result of one data set is none of another."""
    before = run(model, [aggregate], [8], tmp_path)
    aggregate.metadata.tasks[1].dataset = retrieval("NanoNQRetrieval", 77).dataset["default"]
    aggregate.metadata.tasks[1].dataset = {"default": {"test": aggregate.metadata.tasks[1].dataset["train"]}}
    assert run(model, [aggregate], [8], tmp_path) != before


# --- where data comes from --------------------------------------------------------------------------------------------


def own_loader(task, load):
    """A task object of mteb that loads its own data."""
    task = mteb.get_task(task) if isinstance(task, str) else task

    class Own(type(task)):
        def load_data(self, *args, **kwargs):
            load(self)
            self.data_loaded = True

    task.__class__ = Own
    return task


def test_a_task_may_load_its_data_by_itself(model, tmp_path):
    """Whatever the hub says: offline, a task with its own loader runs, and its data is freed afterwards."""
    from datasets import DatasetDict

    task = own_loader("STS16", lambda task: setattr(task, "dataset", DatasetDict(test=pairs(1))))
    assert set(run(model, [task], [8], tmp_path)) == {("STS16", 8, "float32")}
    assert not task.data_loaded
    assert task.dataset is None


def test_why_a_task_cannot_load_is_said(model, tmp_path, monkeypatch):
    """The task's own reason, for each task, before anything is encoded; with skip_missing the others run."""
    from datasets import DatasetDict

    def fail(task):
        raise RuntimeError("the moon is full\nand more")

    good = own_loader("STS12", lambda task: setattr(task, "dataset", DatasetDict(test=pairs(1))))
    tasks = [good, own_loader("STS16", fail), "STSBenchmark"]
    counted = CountingModel(model, monkeypatch)
    with pytest.raises(FileNotFoundError, match="STS16: RuntimeError: the moon is full; STSBenchmark: "):
        evaluate_mteb(model, tasks, [8], output=tmp_path, show_progress_bar=False)
    assert counted.texts == []
    assert set(run(model, tasks, [8], tmp_path, skip_missing=True)) == {("STS12", 8, "float32")}


def test_what_the_hub_lists_may_still_not_load(model, tmp_path, monkeypatch):
    """Gated sets and old scripts: the error says so, and with skip_missing the other tasks run."""
    from datasets import DatasetDict

    def fail(task):
        raise RuntimeError("Dataset scripts are no longer supported")

    monkeypatch.setattr(mteb_tasks, "_on_hub", lambda task: True)
    good = own_loader("STS12", lambda task: setattr(task, "dataset", DatasetDict(test=pairs(1))))
    tasks = [own_loader("STS16", fail), good]
    with pytest.raises(FileNotFoundError, match=r"no data for STS16: .*RuntimeError: Dataset scripts are no longer"):
        evaluate_mteb(model, tasks, [8], output=tmp_path, show_progress_bar=False)
    assert set(run(model, tasks, [8], tmp_path, skip_missing=True)) == {("STS12", 8, "float32")}


def test_a_part_that_cannot_load_is_named(model, aggregate, tmp_path, monkeypatch):
    """Of an aggregate, the part."""
    aggregate.metadata.tasks[1].unload_data()
    name = aggregate.metadata.tasks[1].metadata.name
    with pytest.raises(FileNotFoundError, match=f"no data for CQADupstackRetrieval.* {name}: "):
        evaluate_mteb(model, [aggregate], [8], output=tmp_path, show_progress_bar=False)


def test_the_local_cache_of_datasets_is_used_offline(model, tmp_path, monkeypatch):
    """A set that was downloaded once runs with HF_HUB_OFFLINE, as it does in mteb."""
    import datasets

    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    metadata = mteb.get_task("STS16").metadata
    owner, name = metadata.dataset["path"].split("/")
    folder = tmp_path / "cache" / f"{owner}___{name}" / "default" / "0.0.0" / metadata.dataset["revision"]
    pairs(1).to_json(tmp_path / "test.jsonl")
    builder = datasets.load_dataset_builder(
        "json", data_files={"test": str(tmp_path / "test.jsonl")}, cache_dir=str(tmp_path / "made")
    )
    builder.download_and_prepare(str(folder))
    for file in folder.glob("json-*"):
        file.rename(folder / file.name.replace("json-", f"{name}-"))
    info = json.loads((folder / "dataset_info.json").read_text())
    info.update(builder_name=name, dataset_name=name, config_name="default")
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert set(run(model, ["STS16"], [8], tmp_path / "out")) == {("STS16", 8, "float32")}


# --- local files ------------------------------------------------------------------------------------------------------


def write_pairs(path, count, seed=1):
    frame = {"sentence1": sentences(count, seed), "sentence2": sentences(count, seed + 1)}
    frame["score"] = [round((7 * i % 51) / 10, 1) for i in range(count)]
    pd.DataFrame(frame).to_csv(path, index=False)


def test_random_pairs_do_not_pass_for_sts13(model, tmp_path, caplog):
    """1,500 rows of anything are local data: in the report, in the files and in a warning."""
    write_pairs(tmp_path / "sts13_test.csv", 1500)
    with caplog.at_level(logging.WARNING):
        ((task, *_),) = run(model, ["STS13"], [8], tmp_path / "out", data_dir=tmp_path)
    assert task.startswith("STS13-local-")
    assert f"not known to be MTEB's set, so its scores are called {task}" in caplog.text
    assert [path.stem for path in (tmp_path / "out").rglob("STS*.json")] == [task]


@pytest.mark.usefixtures("any_size")
def test_a_set_that_is_not_known_is_local_data(model, tmp_path):
    """STS16 cannot be compared; other rows are another local set, and the caller's object stays as it was."""
    names = []
    for seed in (1, 5):
        write_pairs(tmp_path / "sts16_test.csv", 20, seed)
        task = mteb.get_task("STS16")
        ((name, *_),) = run(model, [task], [8], tmp_path / "out", data_dir=tmp_path)
        assert not task.data_loaded
        names.append(name)
    assert all(name.startswith("STS16-local-") for name in names)
    assert len(set(names)) == 2


@pytest.mark.usefixtures("any_size")
def test_local_data_keeps_the_tasks_prompt(tmp_path):
    """Its name in results is another, its prompt is not."""
    write_pairs(tmp_path / "sts16_test.csv", 20)
    with_prompt = tiny_model(tmp_path / "m", prompts={"STS16": "query: "})
    plain = run(tiny_model(tmp_path / "n"), ["STS16"], [8], tmp_path / "a", data_dir=tmp_path)
    prompted = run(with_prompt, ["STS16"], [8], tmp_path / "b", data_dir=tmp_path)
    assert plain.keys() == prompted.keys()
    assert plain != prompted


def known(monkeypatch, task, **columns):
    """Make a small set the known one."""
    digest = mteb_data.set_digest(task.metadata.type, columns)
    monkeypatch.setitem(mteb_data.KNOWN_SETS, task.metadata.name, {"test": digest})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda f: f, True),
        (lambda f: f.sample(frac=1, random_state=0), True),
        (lambda f: f.assign(sentence1=[f" {t}  ." for t in f.sentence1]), True),
        (lambda f: f.assign(score=f.score.tolist()[::-1]), False),
        (lambda f: f.assign(sentence2=f.sentence2.tolist()[::-1]), False),
        (lambda f: f.assign(sentence1=[*f.sentence1[:-1], "another"]), False),
    ],
)
def test_what_counts_as_the_same_set(change, same):
    """Order and white space do not matter to STS; pairing, scores and words do."""
    frame = pairs(1).to_pandas()
    digests = [mteb_data.set_digest("STS", {c: f[c].tolist() for c in f}) for f in (frame, change(frame))]
    assert (digests[0] == digests[1]) == same


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda texts, labels: (texts, [{"a": 7, "b": 3, "c": 5}[label] for label in labels]), True),
        (lambda texts, labels: (texts, [{"a": "b", "b": "a", "c": "c"}[label] for label in labels]), True),
        (lambda texts, labels: (texts[::-1], labels[::-1]), False),
        (lambda texts, labels: (texts, labels[1:] + labels[:1]), False),
        (lambda texts, labels: (texts, ["a"] * len(labels)), False),
    ],
)
def test_what_counts_as_the_same_classification_set(change, same):
    """Labels may be named otherwise; rows in another order are drawn otherwise, and are another set."""
    texts, labels = sentences(12, 1), list("aabbccabcabc")
    other = dict(zip(("text", "label"), change(texts, labels), strict=True))
    digests = [mteb_data.set_digest("Classification", c) for c in ({"text": texts, "label": labels}, other)]
    assert (digests[0] == digests[1]) == same


@pytest.mark.usefixtures("any_size")
def test_the_known_set_keeps_its_name(model, tmp_path, monkeypatch):
    """The digest decides."""
    pairs(1).to_pandas().to_csv(tmp_path / "sts13_test.csv", index=False)
    known(monkeypatch, mteb.get_task("STS13"), **{c: pairs(1)[c][:] for c in pairs(1).column_names})
    assert set(run(model, ["STS13"], [8], tmp_path / "out", data_dir=tmp_path)) == {("STS13", 8, "float32")}


def test_the_digests_are_those_of_the_true_sets(data_folder):
    """The local copies of STS13, STS14, STS15 and Banking77 are recognised, down to one exchanged score."""
    for name, splits in mteb_data.KNOWN_SETS.items():
        stem, kind = name.removesuffix("Classification").lower(), mteb.get_task(name).metadata.type
        for split, digest in splits.items():
            frame = pd.read_csv(data_folder / f"{stem}_{split}.csv", keep_default_na=False)
            columns = {c: frame[c].tolist() for c in ("text", "label", "sentence1", "sentence2", "score") if c in frame}
            assert mteb_data.set_digest(kind, columns) == digest, name
            gold = columns["label" if kind == "Classification" else "score"]
            other = next(i for i, value in enumerate(gold) if value != gold[0])
            gold[0], gold[other] = gold[other], gold[0]
            assert mteb_data.set_digest(kind, columns) != digest, name


# --- whose result a file holds ----------------------------------------------------------------------------------------


def _rolled(self, *args, **kwargs):
    """Predictions of the neighbouring rows."""
    return np.roll(np.asarray(super(type(self), self).__call__(*args, **kwargs)), 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda task: setattr(task, "n_experiments", 5),
        lambda task: setattr(task, "seed", 1),
        lambda task: setattr(task, "evaluator", type("Rolled", (type(task).evaluator,), {"__call__": _rolled})),
        lambda task: task.dataset.update(test=task.dataset["test"].select(range(20))),
        lambda task: task.dataset.update(train=task.dataset["train"].select(range(24))),
    ],
)
def test_an_object_is_run_each_time(model, tiny_tasks, tmp_path, change):
    """Whatever was set on it, its score is its own, before and after others in the same folder; no file holds it."""
    task = tiny_tasks[1]
    before = run(model, [task], [8], tmp_path / "a")
    changed = copy.copy(task)
    changed.dataset = copy.copy(task.dataset)
    change(changed)
    expected = run(model, changed, [8], tmp_path / "b")  # alone, too
    assert expected != before
    assert run(model, [changed], [8], tmp_path / "a") == expected
    assert run(model, [task], [8], tmp_path / "a") == before
    assert not list(tmp_path.rglob("Banking77Classification.json"))


def test_a_task_of_mteb_with_another_load_data_is_run_each_time(model, tmp_path, by_name):
    """Its name does not tell its data, also where a benchmark has the task."""
    from datasets import DatasetDict

    def make(seed):
        task = mteb.get_task("STS13")

        def load(*_, **__):
            task.dataset, task.data_loaded = DatasetDict(test=pairs(seed)), True

        task.load_data = load
        return task

    first, second = (run(model, by_name("Own", lambda s=s: [make(s)]), [8, 32], tmp_path / "a") for s in (1, 4))
    assert second == run(model, by_name("Own", lambda: [make(4)]), [8, 32], tmp_path / "b") != first


def test_mtebs_own_class_of_a_folder_is_run_each_time(model, sts13, tmp_path, monkeypatch):
    """A folder that is called like the hub's set is what `datasets` reads, and no revision tells of its content."""
    path = mteb.get_task("STS13").metadata.dataset["path"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).mkdir(parents=True)
    pairs(9).to_pandas().to_csv(tmp_path / path / "test.csv", index=False)
    run(model, {"tasks": ["STS13"]}, [8], tmp_path / "out")
    assert not list(tmp_path.rglob("STS13.json"))


@pytest.fixture
def folder_task(tmp_path):
    """(name, seed) -> a task of STS13's name whose class says that its data lie in a folder."""

    def make(name, seed):
        path = tmp_path / name
        path.mkdir()
        scores = [float(7 * i % 5) for i in range(20)]
        rows = {"sentence1": sentences(20, seed), "sentence2": sentences(20, seed + 1), "score": scores}
        pd.DataFrame(rows).to_csv(path / "test.csv", index=False)
        base = type(mteb.get_task("STS13"))
        dataset = {"path": str(path), "revision": "local"}
        return type(base.__name__, (base,), {"metadata": base.metadata.model_copy(update={"dataset": dataset})})()

    return make


def test_metadata_set_on_a_task_decide_and_stay(model, folder_task, tmp_path):
    """Data and main score that the object names are what is scored, and the object is as it was."""
    task, other = folder_task("a", 1), folder_task("b", 7)
    update = {"dataset": other.metadata.dataset, "main_score": "cosine_pearson"}
    task.metadata = own = task.metadata.model_copy(update=update)
    report = evaluate_mteb(model, [task], [32], output=tmp_path / "out", show_progress_bar=False)
    assert task.metadata is own
    assert not task.data_loaded
    other.metadata = own
    expected = mteb.evaluate(model, other, cache=None, co2_tracker=False, show_progress_bar=False)
    assert report.records[0]["metric"] == "cosine_pearson"
    assert report.records[0]["score"] == pytest.approx(expected.task_results[0].get_score(), abs=1e-6)


def test_another_folder_or_main_score_is_another_result(model, folder_task, tmp_path):
    """One name and one revision, but other rows, or another score of them: what is there of the first is not taken."""
    first, second = folder_task("a", 1), folder_task("b", 7)
    scores = [score_of(model, task, tmp_path / "out") for task in (first, second)]
    assert scores[0] != scores[1]
    assert scores == [score_of(model, task, tmp_path / name) for name, task in (("x", first), ("y", second))]
    (tmp_path / "a" / "test.csv").write_bytes((tmp_path / "b" / "test.csv").read_bytes())
    assert score_of(model, first, tmp_path / "out") == scores[1]
    second.metadata = second.metadata.model_copy(update={"main_score": "cosine_pearson"})
    assert score_of(model, second, tmp_path / "out") == score_of(model, second, tmp_path / "z") != scores[1]


def test_results_of_another_data_revision_are_not_read(model, sts13, tmp_path, monkeypatch):
    """mteb moved the task to another revision of its data: run again, and the file is replaced."""
    before = run(model, sts13, [8], tmp_path)
    (path,) = tmp_path.rglob("STS13.json")
    written = path.read_text()
    path.write_text(written.replace(mteb.get_task("STS13").metadata.revision, "0" * 40))
    counted = CountingModel(model, monkeypatch)
    assert run(model, sts13, [8], tmp_path) == before
    assert counted.texts
    assert json.loads(path.read_text())["dataset_revision"] == json.loads(written)["dataset_revision"]


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("normalize", [True, False])
def test_files_under_the_keys_of_before_are_read(model, sts13, tmp_path, monkeypatch, precision, normalize):
    """`truncate_dim` and `precision` in the place of mteb's `embed_dim` and `output_dtypes`."""
    options = {"precisions": list(dict.fromkeys(["float32", precision])), "normalize": normalize}
    before = run(model, sts13, [8], tmp_path, **options)
    for path in list(tmp_path.rglob("STS13.json")):
        kind = "precision_int8__" if "int8" in path.parent.name else ""
        name = f"{'' if normalize else 'normalize_False__'}{kind}truncate_dim_8"
        path.parent.rename(path.parent.with_name(name))
    counted = CountingModel(model, monkeypatch)
    assert run(model, sts13, [8], tmp_path, **options) == before
    assert counted.texts == []


def test_entries_for_other_data_in_files_of_before_are_not_read(model, sts13, tmp_path, monkeypatch):
    """An entry that says conditions was written for an object."""
    run(model, sts13, [8], tmp_path)
    (path,) = tmp_path.rglob("STS13.json")
    content = json.loads(path.read_text())
    content["scores"]["test"][0].update(mipic_st="settings {}", main_score=0.9)
    path.write_text(json.dumps(content))
    counted = CountingModel(model, monkeypatch)
    assert list(run(model, sts13, [8], tmp_path).values()) != [0.9]
    assert counted.texts


def test_reports_before_and_after_training_stay_apart(tiny_tasks, tmp_path):
    """A fine-tuned model carries its base model's name: two rows, not their mean."""
    model = tiny_model(tmp_path / "m")
    before = evaluate_mteb(model, tiny_tasks[:1], [8], output=tmp_path / "out", show_progress_bar=False)
    with torch.no_grad():
        weight = model[0].auto_model.embeddings.word_embeddings.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    after = evaluate_mteb(model, tiny_tasks[:1], [8], output=tmp_path / "out", show_progress_bar=False)
    table = (before + after).table()
    assert list(table["STS13"]) == pytest.approx([100 * part.records[0]["score"] for part in (before, after)])
    assert table["STS13"].nunique() == 2


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage",
    [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "[]"],
)
def test_a_damaged_result_file_is_named(model, sts13, tmp_path, monkeypatch, damage):
    """Before anything is encoded, with the fix; overwrite replaces it, and then all is as before."""
    before = run(model, sts13, [8], tmp_path)
    (path,) = tmp_path.rglob("STS13.json")
    path.write_text(damage(path.read_text()))
    counted = CountingModel(model, monkeypatch)
    with pytest.raises(ValueError, match=r"is no result file of mteb for STS13.*Delete it, or run") as caught:
        run(model, sts13, [8], tmp_path)
    assert repr(str(path)) in str(caught.value)
    assert counted.texts == []
    assert run(model, sts13, [8], tmp_path, overwrite=True) == before
    assert run(model, sts13, [8], tmp_path) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda entries: entries[0].update(main_score="high"),
        lambda entries: entries.append({**entries[0], "main_score": 0.9}),
    ],
)
def test_scores_that_cannot_be_are_named(model, sts13, tmp_path, damage):
    """A text in the place of a score, and two scores of one subset, whose mean would pass for one."""
    run(model, sts13, [8], tmp_path)
    (path,) = tmp_path.rglob("STS13.json")
    content = json.loads(path.read_text())
    damage(content["scores"]["test"])
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is no result file of mteb for STS13.*Delete it, or run"):
        run(model, sts13, [8], tmp_path)


def test_a_file_of_another_task_is_refused(model, sts13, tmp_path):
    """A copied or renamed file is no result."""
    run(model, sts13, [8], tmp_path)
    (path,) = tmp_path.rglob("STS13.json")
    path.write_text(path.read_text().replace('"STS13"', '"STS14"'))
    with pytest.raises(ValueError, match="it holds no scores of STS13"):
        run(model, sts13, [8], tmp_path)


def test_an_interrupted_write_leaves_the_old_file(model, named_sts22, tmp_path, monkeypatch):
    """Killed while writing: the file of before is whole, nothing lies next to it, the next run goes on from it."""
    score_of(model, named_sts22("en"), tmp_path)
    original = mteb.results.TaskResult.to_disk
    files = sorted(tmp_path.rglob("*"))

    def half(self, path):
        original(self, path)
        path.write_text(path.read_text()[:100])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mteb.results.TaskResult, "to_disk", half)
        with pytest.raises(KeyboardInterrupt):
            score_of(model, named_sts22("fr"), tmp_path)
    assert sorted(tmp_path.rglob("*")) == files
    counted = CountingModel(model, monkeypatch)
    score_of(model, named_sts22("en"), tmp_path)
    assert counted.texts == []


def test_runs_share_an_output_folder(named_sts22, tmp_path):
    """Three processes write one file again and again at the same time: none fails, and a reader finds it whole."""
    model = tiny_model(tmp_path / "m")
    names, fork = ("en", "fr", "de"), multiprocessing.get_context("fork")
    seen = fork.Queue()

    def several(name):
        try:
            seen.put((name, {score_of(model, named_sts22(name), tmp_path / "out", 8, overwrite=True) for _ in "1234"}))
        except Exception as error:
            seen.put((name, repr(error)))

    torch.set_num_threads(1)
    runs = [fork.Process(target=several, args=(name,)) for name in names]
    for process in runs:
        process.start()
    while any(process.is_alive() for process in runs) and seen.empty():
        for path in (tmp_path / "out" / "results").rglob("STS22.json"):
            assert set(mteb.results.TaskResult.from_disk(path).hf_subsets) <= set(names)
    found = dict(seen.get(timeout=120) for _ in runs)
    for process in runs:
        process.join()
    assert found == {name: {score_of(model, sts22(name), tmp_path / name, 8)} for name in names}
    score = score_of(model, named_sts22(*names), tmp_path / "out", 8)
    assert score == pytest.approx(np.mean([value for values in found.values() for value in values]))


def test_load_results_finds_what_was_written(model, sts13, tmp_path):
    """As the docstring says: the full width without an option, every dim or one of them with one."""
    ours = run(model, sts13, [8, 16, 32], tmp_path, model_name="org/m", precisions=["float32", "int8", "binary"])
    cache = mteb.ResultCache(tmp_path)

    def found(**options):
        loaded = cache.load_results(**options)
        assert all((m.model_name, m.model_revision) == ("org/m", fingerprint(model)) for m in loaded)
        return {m.experiment_name: m.task_results[0].get_score() for m in loaded}

    key = "STS13", 32, "float32"
    assert found() == {None: ours[key]}
    assert found(models=["org/m"]) == {None: ours[key]}
    every = found(load_experiments="match_name")
    assert len(every) == 9
    assert sorted(every.values()) == sorted(ours.values())
    for dim, precision in ((8, "float32"), (32, "int8"), (16, "binary")):
        kwargs = {"embed_dim": dim} if dim < 32 else {}
        kwargs |= {"output_dtypes": precision} if precision != "float32" else {}
        kwargs |= {"calibration": "scored texts"} if precision == "binary" else {}
        assert list(found(experiment_kwargs=kwargs).values()) == [ours["STS13", dim, precision]]
    for options, dim in (({}, 32), ({"experiment_kwargs": {"embed_dim": 8}}, 8)):
        frame = cache.load_results(**options).to_dataframe(format="long")
        assert list(frame["score"]) == [ours["STS13", dim, "float32"]]


def test_mteb_finds_the_files_for_the_same_model(model, sts13, tmp_path):
    """The folders are those of mteb's own wrapper and loader: embed_dim and output_dtypes, in the model's data too."""
    run(model, sts13, [8, 32], tmp_path, model_name="org/m", precisions=["float32", "int8"])
    encoder = mteb.models.SentenceTransformerEncoderWrapper(model)
    named = {"name": "org/m", "revision": fingerprint(model)}
    at_eight = {**named, "embed_dim": 8, "experiment_kwargs": {"embed_dim": 8}}  # as load_model(embed_dim=8) has it
    for update, dim in ((named, 32), (at_eight, 8)):
        encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update=update)
        compressed = mteb.models.CompressionWrapper(copy.copy(encoder))
        for meta, dtypes in ((encoder.mteb_model_meta, None), (compressed.mteb_model_meta, ["int8"])):
            path = mteb.ResultCache(tmp_path).get_task_result_path("STS13", meta)
            assert path.is_file()
            written = json.loads((path.parent / "model_meta.json").read_text())
            assert (written["embed_dim"], written["output_dtypes"]) == (dim, dtypes)


def test_columns_as_lists_change_no_score(model, tiny_tasks, tmp_path, monkeypatch):
    """Speed only; and mteb's tables keep their kind for everybody else."""
    fast = run(model, tiny_tasks[1:], [8], tmp_path)
    monkeypatch.setattr("mipic_st.evaluation.mteb.with_listed_columns", lambda task: task)
    assert run(model, tiny_tasks[1:], [8], tmp_path) == fast
    listed = mteb_data.with_listed_columns(tiny_tasks[1]).dataset["test"].select_columns(["label", "text"])
    assert listed["label"] == ["cat", "dog", "bird"] * 10
    assert not isinstance(tiny_tasks[1].dataset["test"]["label"], list)


def test_memory_limit_and_device_reach_the_store(model, tiny_tasks, tmp_path):
    """Vectors in a file give the scores of vectors in memory."""
    precisions = ["float32", "int8"]
    in_file, in_memory = (
        run(model, tiny_tasks[:1], [8, 32], tmp_path / f"{n}", precisions=precisions, memory_limit=n, device="cpu")
        for n in (0, None)
    )
    assert in_file == in_memory


@pytest.mark.slow
@pytest.mark.parametrize(("task", "published"), [("STS13", 80.60), ("STS14", 75.60), ("STS15", 85.39)])
def test_published_scores_of_minilm(minilm, data_folder, tmp_path, task, published):
    """all-MiniLM-L6-v2 gives its published Spearman x 100 on the local files."""
    scores = run(minilm, [task], [384], tmp_path, data_dir=data_folder)
    assert 100 * scores[(task, 384, "float32")] == pytest.approx(published, abs=0.05)
