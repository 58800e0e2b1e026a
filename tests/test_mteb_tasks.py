"""Invariants of evaluate_mteb: equal to mteb's own run, no collisions, resumable, random state kept."""

import random

import numpy as np
import pytest
import torch

from conftest import sentences
from evaluation_fixtures import CountingModel, tiny_model
from mipic_st import mteb_tasks
from mipic_st.mteb_tasks import evaluate_mteb

mteb = pytest.importorskip("mteb")


@pytest.fixture
def tiny_tasks():
    """Real task classes with a handful of rows; objects, so that no file carries a partial set under MTEB's name."""
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
    probe.samples_per_label, probe.n_experiments = 4, 3
    for task in (sts, probe):
        task.data_loaded = True
    return [sts, probe]


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path / "model")


def run(model, tasks, dims, output, **kwargs):
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


def test_dims_and_models_never_share_a_result(tiny_tasks, tmp_path):
    """Two models under one name and three dims: six different scores, all read back by mteb's ResultCache."""
    models = [tiny_model(tmp_path / str(layers), layers=layers) for layers in (1, 4)]
    scores = [run(m, tiny_tasks[:1], [4, 8, 32], tmp_path / "out", model_name="org/same") for m in models]
    values = [value for part in scores for value in part.values()]
    assert len(set(values)) == 6
    files = list((tmp_path / "out").rglob("STS13.json"))
    read = [mteb.results.TaskResult.from_disk(path).get_score() for path in files]
    assert sorted(read) == pytest.approx(sorted(values))


def test_result_cache_of_mteb_finds_the_results(model, tiny_tasks, tmp_path):
    """mteb.ResultCache(output).load_results lists the task for the model."""
    run(model, tiny_tasks[:1], [8], tmp_path, model_name="org/m")
    path = mteb.ResultCache(tmp_path).get_task_result_path(
        "STS13", "org/m", mteb_tasks.fingerprint(model), experiment_name="truncate_dim_8"
    )
    assert path.is_file()


def test_resume_runs_only_what_is_missing(model, tiny_tasks, tmp_path, monkeypatch):
    """A second run encodes nothing; a run with one more dim gives the old scores and the new one."""
    first = run(model, tiny_tasks[:1], [4, 8], tmp_path)
    counted = CountingModel(model, monkeypatch)
    assert run(model, tiny_tasks[:1], [4, 8], tmp_path) == first
    assert counted.texts == []
    more = run(model, tiny_tasks[:1], [4, 8, 16], tmp_path)
    assert {key: more[key] for key in first} == first
    assert len(counted.texts) > 0


def test_int8_of_a_resumed_run_equals_that_of_a_whole_run(model, tiny_tasks, tmp_path):
    """int8 is calibrated on all texts, also when float32 came from an earlier run."""
    whole = run(model, tiny_tasks[:1], [8], tmp_path / "a", precisions=["float32", "int8"])
    run(model, tiny_tasks[:1], [8], tmp_path / "b")
    resumed = run(model, tiny_tasks[:1], [8], tmp_path / "b", precisions=["float32", "int8"])
    assert resumed == whole


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


@pytest.mark.parametrize("flag", ["normalize", "overwrite", "skip_missing"])
def test_a_flag_is_no_string(model, tmp_path, flag):
    """ "no" would count as True."""
    with pytest.raises(TypeError, match=f"{flag} must be True or False, got 'no'"):
        evaluate_mteb(model, ["STS13"], [8], output=tmp_path, **{flag: "no"})


@pytest.mark.parametrize(
    ("tasks", "message"), [([], "tasks is empty"), (["NoSuchTask"], "'NoSuchTask' is neither a preset")]
)
def test_unknown_tasks_are_named(model, tmp_path, tasks, message):
    """Empty and unknown task lists raise."""
    with pytest.raises(ValueError, match=message):
        evaluate_mteb(model, tasks, [8], output=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("task", "published"), [("STS13", 80.60), ("STS14", 75.60), ("STS15", 85.39)])
def test_published_scores_of_minilm(minilm, data_folder, tmp_path, task, published):
    """all-MiniLM-L6-v2 gives its published Spearman x 100 on the local files."""
    scores = run(minilm, [task], [384], tmp_path, data_dir=data_folder)
    assert 100 * scores[(task, 384, "float32")] == pytest.approx(published, abs=0.05)
