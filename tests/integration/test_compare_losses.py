"""examples/benchmarks/compare_losses.py and the data script before it: resumable, same batches, honest intervals."""

import importlib.util
import json
import sys

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)
from test_examples import ROOT, needs_model, run

ROWS = ["--rows", "truncation", "rotation", "base", "base+pca", "matryoshka", "specialist-8", "rotation+mipic"]


def load(monkeypatch, *arguments):
    """The script with these arguments, which it reads when it is imported."""
    monkeypatch.setattr(sys, "argv", ["compare_losses.py", *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(
        "compare_losses", ROOT / "examples" / "benchmarks" / "compare_losses.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_losses", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch):
    """The script's functions."""
    return load(monkeypatch, "--dims", 8, 4)


@needs_model
@pytest.mark.slow
def test_comparison_resumes_merges_and_reports(tmp_path):
    """Each row once; a second call trains nothing more; differences are those of the means, inside their interval."""
    first, second = tmp_path / "first", tmp_path / "second"
    call = ["benchmarks/compare_losses.py", "--smoke", "--starts", "weak", "--dims", 384, 8, "--layers", 3]
    call += ["--curve", 0, 1]
    code, _, errors = run(*call, *ROWS[:-1], "--output", first)
    assert code == 0, errors
    code, _, errors = run(*call, "--rows", ROWS[-1], "--output", second)
    assert code == 0, errors
    runs = [json.loads(line) for line in (first / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [made["row"] for made in runs] == ROWS[1:-1]
    assert all(made["learning_rate"] == (0 if made["row"] in ("truncation", "rotation") else 1e-4) for made in runs)
    trainings = [json.loads(line) for line in (first / "trainings.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [made["trained"] for made in trainings] == ["base", "matryoshka", "specialist-8"]

    plot = tmp_path / "plot.png"
    code, printed, errors = run(*call, *ROWS, "--output", first, "--merge", second, "--report-only", "--plot", plot)
    assert code == 0, errors
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (plot, plot.with_stem("plot-dark")))
    assert "specialist-8" in printed
    report = json.loads((first / "report.json").read_text(encoding="utf-8"))["weak"]
    assert list(report) == ROWS[1:]
    assert report["rotation"]["sts"]["384"] == report["truncation"]["sts"]["384"]
    start, one = report["rotation+mipic"]["curve"][0]
    fitted = json.loads((second / "starts" / "weak_0" / "rotation.json").read_text(encoding="utf-8"))["seconds"]
    assert [start["step"], one["step"]] == [0, 1]
    assert one["seconds"] > start["seconds"] >= fitted, "the rotation's own seconds are counted"
    assert start["scores"]["synthetic"]["8"] == pytest.approx(report["rotation"]["sts"]["8"]["mean"], abs=0.01)
    for measure in ("sts", "topics", "accuracy@1", "ndcg@10", "sts, layer 3 cut", "sts, layer 3 fitted"):
        found = report["rotation+mipic"][f"{measure} differences"]
        assert list(found) == ["truncation", "base", "matryoshka", "specialist", "rotation"]
        assert list(found["specialist"]) == ["8"]
        for dim, made in found["matryoshka"].items():
            means = [report[name][measure][dim]["mean"] for name in ("rotation+mipic", "matryoshka")]
            assert made["difference"] == pytest.approx(means[0] - means[1], abs=0.011)
            assert made["low"] <= made["difference"] <= made["high"]

    code, _, errors = run(*call, *ROWS[:-1], "--output", first)
    assert code == 0, errors
    assert len((first / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == len(runs)

    lines = [json.loads(line) for line in (second / "trainings.jsonl").read_text(encoding="utf-8").splitlines()]
    changed = [made | {"settings": made["settings"] | {"alpha": 0.7}} for made in lines]
    (second / "trainings.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n", encoding="utf-8")
    code, _, errors = run(*call, *ROWS, "--output", second, "--report-only")
    assert code != 0
    assert "holds runs of rotation+mipic with {'alpha': 0.7}: name another --output" in errors

    code, _, errors = run(*call, *ROWS, "--output", second, "--max-seq-length", 16)
    assert code != 0
    assert "has other settings than this command" in errors


@needs_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "mipik"], "--rows mipik: unknown; a row is [rotation+]LOSS[+rotation|+pca] with LOSS one of base"),
        (["--train", "mix.csv"], "--train, --dev and --test come together"),
        (["--probe", "a.csv", "b.csv"], "--probe needs --train, --dev and --test"),
        (["--dims", "384", "0"], "--dims must be positive"),
        (["--mini-batch-size", "0"], "--mini-batch-size must be at least 1"),
        (["--rows", "mipic-teacher"], "--rows mipic-teacher: unknown"),
        (
            ["--train", "mix.csv", "--dev", "a/test.csv", "--test", "b/test.csv"],
            "--dev and --test: two sets are called 'test'",
        ),
        (["--steps", "0"], "--steps, --bootstrap and --probe-shots must be at least 1"),
    ],
)
def test_comparison_refuses_wrong_arguments(tmp_path, monkeypatch, capsys, arguments, message):
    """Before anything is trained, naming the option."""
    with pytest.raises(SystemExit) as stopped:
        load(monkeypatch, "--smoke", "--output", tmp_path, *arguments).main()
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert not list(tmp_path.iterdir())


@needs_model
def test_large_batches_take_the_cached_loss(script, tiny_model, tmp_path):
    """With --mini-batch-size, for any row; folders of before this option are read on, as without it."""
    data = Dataset.from_dict({"anchor": ["a"], "positive": ["b"]})
    model = tiny_model()
    assert type(script.make_loss("matryoshka", model, data).loss) is MultipleNegativesRankingLoss
    older = {name: getattr(script.args, name) for name in script.SETTINGS if name != "mini_batch_size"}
    (tmp_path / "settings.json").write_text(json.dumps(older), encoding="utf-8")
    script.Runs(tmp_path, [])
    script.args.mini_batch_size = 3
    for name in ("matryoshka", "mipic"):
        base = script.make_loss(name, model, data).loss
        assert type(base) is CachedMultipleNegativesRankingLoss
        assert base.mini_batch_size == 3
    with pytest.raises(SystemExit, match="has other settings than this command"):
        script.Runs(tmp_path, [])
    scored = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]})
    with pytest.raises(SystemExit, match="are for pairs, and the training data are scored"):
        script.make_loss("mipic", model, scored)


@needs_model
def test_a_variant_with_a_teacher_needs_one(script, tmp_path):
    """Without --teacher there are no vectors for its term."""
    file = tmp_path / "variants.toml"
    file.write_text("[mine]\ndistill_weight = 2.0\n", encoding="utf-8")
    script.args.variants = str(file)
    script.mipic_settings.cache_clear()
    with pytest.raises(SystemExit, match="distill_weight needs --teacher"):
        script.all_settings("mine")
    script.args.teacher = "models/larger"
    assert script.all_settings("mine")["teacher"] == "larger"


@needs_model
def test_a_teacher_makes_a_row(script, tiny_model, tmp_path):
    """The vectors are made once; the settings of the run name the teacher without its folder."""
    teacher = tmp_path / "models" / "larger"
    tiny_model().save_pretrained(str(teacher))
    with pytest.raises(SystemExit, match="mipic-teacher: unknown"):
        script.row_of("mipic-teacher")
    script.args.teacher = str(teacher)
    for cached in (script.mipic_settings, script.losses_by_name):
        cached.cache_clear()
    assert script.row_of("rotation+mipic-teacher").loss == "mipic-teacher"
    settings = script.all_settings("mipic-teacher")
    assert (settings["teacher"], settings["distill_weight"], settings["alpha"]) == ("larger", 4.0, 0.8)
    assert "teacher" not in script.all_settings("mipic")
    pairs = Dataset.from_dict({"anchor": ["a", "b c"], "positive": ["d", "e"]})
    data = script.Data(pairs, {}, {}, None)
    made = script.with_teacher(tmp_path, data)
    assert np.shape(made.train["label"][:]) == (2, 2, 32)
    assert data.train is pairs
    (teacher / "modules.json").unlink()
    assert (script.with_teacher(tmp_path, data).train["label"][:] == made.train["label"][:]).all()
    (kept,) = (tmp_path / "taught").iterdir()
    assert kept.name.startswith("larger-")
    other = tmp_path / "others" / "larger"
    tiny_model(layers=2).save_pretrained(str(other))
    script.args.teacher = str(other)
    assert (script.with_teacher(tmp_path, data).train["label"][:] != made.train["label"][:]).any(), "of one name only"
    loss = script.make_loss("mipic-teacher", tiny_model(), pairs)
    assert loss.settings.distill_weight == 4.0
    scored = Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]})
    with pytest.raises(SystemExit, match="are for pairs, and the training data are scored"):
        script.make_loss("mipic-teacher", tiny_model(), scored)


@needs_model
def test_rows_say_what_is_done_in_which_order(script):
    """A name is taken apart into the start, the loss and what follows; rows of one training share its name."""
    found = {
        name: (script.row_of(name)[1:], script.row_of(name).trained)
        for name in ("truncation", "rotation", "pca", "base+rotation", "rotation+mipic", "rotation+mipic+pca")
    }
    assert found == {
        "truncation": ((False, "", ""), "truncation"),
        "rotation": ((True, "", ""), "rotation"),
        "pca": ((False, "", "pca"), "truncation"),
        "base+rotation": ((False, "base", "rotation"), "base"),
        "rotation+mipic": ((True, "mipic", ""), "rotation+mipic"),
        "rotation+mipic+pca": ((True, "mipic", "pca"), "rotation+mipic"),
    }
    assert script.row_of("specialist-12").loss == "specialist-12"


@needs_model
def test_a_rate_at_the_edge_widens_the_grid(script, monkeypatch, tmp_path):
    """The best rate has a worse one on either side, however far it is from the grid that was asked for."""
    tried = []

    def train(runs, data, start, row, rate, seed):
        tried.append(rate)
        return {"learning_rate": rate, "loss": "mipic", "dev": {"sts": {"8": -abs(rate - 4.1e-4), "4": 0.0}}}

    monkeypatch.setattr(script, "trained_model", train)
    runs = script.Runs(tmp_path, [])
    assert script.chosen_rate(runs, None, "good", script.row_of("mipic")) == 4e-4
    assert sorted(set(tried)) == [2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4]


@needs_model
def test_a_grid_that_never_turns_is_told(script, monkeypatch, tmp_path, capsys):
    """It ends at nine rates, and the log says that the best one is at an edge still."""

    def train(runs, data, start, row, rate, seed):
        return {"learning_rate": rate, "loss": "mipic", "dev": {"sts": {"8": -rate, "4": 0.0}}}

    monkeypatch.setattr(script, "trained_model", train)
    assert script.chosen_rate(script.Runs(tmp_path, []), None, "good", script.row_of("mipic")) < 2e-6
    assert "good mipic: the best of 9 rates, " in capsys.readouterr().out


@needs_model
def test_a_diverged_training_is_not_the_best(script):
    """Its scores are not numbers, which max would take for the largest if they came first."""
    lines = [{"loss": "mipic", "dev": {"sts": {"8": score, "4": 1.0}}} for score in (float("nan"), -5.0, 3.0)]
    assert max(lines, key=script.dev_score) == lines[2]
    assert script.dev_score(lines[0]) == float("-inf")


@needs_model
def test_hub_sets_have_the_split_of_their_use(script, monkeypatch):
    """Rates are never chosen on a test split."""
    asked = []

    def load(name, *, split="train"):
        asked.append((name, split))
        return Dataset.from_dict({"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]})

    monkeypatch.setattr(script, "load_training_hub", load)
    script.args.train, script.args.dev, script.args.test = "a/train", ["a/sts"], ["b/sts"]
    script.load_data()
    assert asked == [("a/train", "train"), ("a/sts", "validation"), ("b/sts", "test")]


@needs_model
@pytest.mark.parametrize(
    ("test", "probe", "titles"),
    [
        (
            ["sts14_test.csv", "sts15_test.csv"],
            ["banking77_train.csv", "banking77_test.csv"],
            ["STS14 and STS15, Spearman x100", "Banking77 intent search, accuracy@1 x100"],
        ),
        ([], None, ["SYNTHETIC, Spearman x100", "Synthetic intent search, accuracy@1 x100"]),
    ],
)
def test_the_picture_names_its_data(script, monkeypatch, tmp_path, test, probe, titles):
    """From the files that were scored, not from what the committed picture shows."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *_, **__: drawn.append([a.get_title("left") for a in self.axes])
    )
    cells = {str(dim): {"mean": 50.0, "low": 40.0, "high": 60.0} for dim in script.args.dims}
    about = {"sts": cells, "accuracy@1": cells}
    entry = {"truncation": about, "rotation": about}
    script.plot({"settings": {"test": test, "probe": probe}, "good": entry}, tmp_path / "plot.png")
    assert drawn == [titles, titles]


@needs_model
def test_a_row_is_reported_at_one_rate(script, tmp_path):
    """After a wider grid a row has the seeds of its new rate alone, not those of the old one as well."""
    runs = script.Runs(tmp_path, [])
    row = script.row_of("base")
    assert script.chosen_runs(runs, "good", row) == []
    for rate, seed in ((1e-4, 0), (1e-4, 1), (1e-4, 2), (5e-5, 0), (5e-5, 2)):
        runs.write("runs", {"start": "good", "row": "base", "learning_rate": rate, "seed": seed})
    chosen = script.chosen_runs(runs, "good", row)
    assert [(run["learning_rate"], run["seed"]) for run in chosen] == [(5e-5, 0), (5e-5, 2)]


@needs_model
def test_the_newest_run_is_the_youngest_of_all_folders(script, tmp_path):
    """Whatever the order of the folders; what it rests on is read from its own."""
    old, new = script.Runs(tmp_path / "old", []), script.Runs(tmp_path / "new", [])
    for runs, rate in ((old, 1e-4), (new, 5e-5)):
        runs.write("runs", {"start": "good", "row": "base", "learning_rate": rate, "seed": 0})
    for folder, other in (("old", "new"), ("new", "old")):
        runs = script.Runs(tmp_path / folder, [tmp_path / other])
        (chosen,) = script.chosen_runs(runs, "good", script.row_of("base"))
        assert chosen["learning_rate"] == 5e-5
        assert runs.rows_file(chosen).parent == tmp_path / "new" / "rows"


@needs_model
def test_a_fit_on_a_sample_is_run_with_every_seed(script, monkeypatch, tmp_path):
    """PCA draws its texts; truncation is the same each time."""
    monkeypatch.setattr(script, "load_start", lambda *_: (None, 0.0))
    monkeypatch.setattr(script, "Vectors", lambda *_: type("None", (), {"sets": lambda self, turn: {}})())
    monkeypatch.setattr(script, "turn_of", lambda *_: None)
    monkeypatch.setattr(script, "score", lambda *_: ({}, {}))
    runs = script.Runs(tmp_path, [])
    script.finish_rows(runs, None, "good", [script.row_of("truncation"), script.row_of("pca")])
    made = [(run["row"], run["seed"]) for run in runs.read("runs")]
    assert sorted(made) == [("pca", 0), ("pca", 1), ("pca", 2), ("truncation", 0)]


@needs_model
def test_a_start_is_rotated_once_and_with_these_defaults(script, monkeypatch, tiny_model, tmp_path):
    """A second process takes what is there; a folder of other defaults is refused."""
    fits = []
    monkeypatch.setattr(script, "load_model", lambda *_: tiny_model())
    monkeypatch.setattr(script, "rotate_model", lambda model, data, dims, *, batch_size=1, seed=0: fits.append(seed))
    (tmp_path / "starts").mkdir()
    data = script.Data(None, {}, {}, None)
    for _ in range(2):
        assert script.load_start(tmp_path, "good", 1, True, data)[1] >= 0
    assert fits == [0]
    unfinished = tmp_path / "starts" / "another"
    unfinished.mkdir()
    script.take_place(unfinished, tmp_path / "starts" / "good_0")
    assert [path.name for path in (tmp_path / "starts").iterdir()] == ["good_0"]
    monkeypatch.setattr(script, "fit_options", lambda: {"max_steps": 7})
    with pytest.raises(SystemExit, match="was rotated with other defaults"):
        script.load_start(tmp_path, "good", 0, True, data)


@needs_model
def test_a_rotation_after_scored_training_is_fitted_as_one_before(script, monkeypatch, tiny_model):
    """rotate_model knows which of the scored pairs belong together; the trained model stays as it is."""
    model = tiny_model()
    monkeypatch.setattr(script, "rotate_model", lambda fitted, *_, **__: ("rotation", fitted is model))
    rows = {"sentence1": ["a"], "sentence2": ["b"], "score": [0.5]}
    data = script.Data(Dataset.from_dict(rows), {}, {}, None)
    assert script.turn_of("rotation", model, data, 0) == ("rotation", False)


@needs_model
def test_a_perfect_search_has_all_of_ndcg(script):
    """Also where a label has fewer than ten training texts; labels that nothing has in common are refused."""
    train = [0] * 3 + [1] * 12
    vectors = np.eye(8)[train], np.eye(8)[[0, 1]]
    parts = [Dataset.from_dict({"text": ["x"] * len(labels), "label": labels}) for labels in (train, [0, 1])]
    rows = script.topic_rows(list(vectors), script.Data(None, {}, {}, tuple(parts)))
    assert rows["ndcg@10"] == pytest.approx(np.ones((2, 2)))
    parts[1] = Dataset.from_dict({"text": ["x", "x"], "label": ["0", "1"]})
    with pytest.raises(SystemExit, match="no label in common"):
        script.topic_rows(list(vectors), script.Data(None, {}, {}, tuple(parts)))


@needs_model
def test_bootstrap_statistics_are_those_of_the_drawn_rows(script):
    """Without ties, Spearman of rows drawn once each is scipy's; a mean counts a row as often as it was drawn."""
    random = np.random.default_rng(0)
    rows, gold = random.normal(size=(2, 3, 40)), random.normal(size=40)
    found = script.resampled(rows, gold, np.ones((1, 40), dtype=int))[0]
    expected = [[100 * spearmanr(row, gold).statistic for row in side] for side in rows]
    np.testing.assert_allclose(found, expected)
    counts = random.multinomial(40, np.full(40, 1 / 40), size=3)
    drawn = np.repeat(np.arange(40), counts[1])
    found = script.resampled(rows, None, counts)[1]
    np.testing.assert_allclose(found, 100 * rows[:, :, drawn].mean(axis=-1))


def test_training_mix_keeps_pairs_of_one_meaning(tmp_path):
    """ENTAILMENT, label 1, scores from 4, and two different texts of one label, none of them twice."""
    files = {
        "sick": pd.DataFrame(
            {"sentence1": ["a", "b"], "sentence2": ["A", "B"], "entailment": ["ENTAILMENT", "NEUTRAL"]}
        ),
        "mrpc": pd.DataFrame({"label": [1, 0], "sentence1": ["c", "d"], "sentence2": ["None", "D"]}),
        "sts": pd.DataFrame({"score": [4.0, 3.9], "sentence1": ["e", "f"], "sentence2": ["E", "F"]}),
        "banking": pd.DataFrame({"text": [*"ghijk"], "label": ["x", "x", "x", "y", "y"]}),
    }
    for name, table in files.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    code, printed, errors = run(
        "benchmarks/training_mix.py", *(tmp_path / f"{name}.csv" for name in files), "--output", tmp_path / "mix.csv"
    )
    assert code == 0, errors
    pairs = pd.read_csv(tmp_path / "mix.csv", keep_default_na=False)
    assert "5 pairs (1, 1, 1, 2)" in printed
    assert {("a", "A"), ("c", "None"), ("e", "E")} < set(pairs.itertuples(index=False, name=None))
    drawn = [pair for pair in pairs.itertuples(index=False, name=None) if set(pair) <= set("ghijk")]
    assert len({text for pair in drawn for text in pair}) == 4
    assert {frozenset(pair) <= set("ghi") or frozenset(pair) <= set("jk") for pair in drawn} == {True}
