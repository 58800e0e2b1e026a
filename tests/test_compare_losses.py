"""examples/compare_losses.py and the data script before it: resumable, same batches, honest intervals."""

import json

import pandas as pd
import pytest

from test_examples import needs_model, run

METHODS = ["--methods", "untrained", "base", "base-pca", "matryoshka", "specialist-8", "mipic"]


@needs_model
@pytest.mark.slow
def test_comparison_resumes_and_reports(tmp_path):
    """Each run once; a second call trains nothing more; differences are those of the means, inside their interval."""
    call = ["compare_losses.py", "--smoke", *METHODS, "--starts", "weak", "--dims", 384, 8, "--output", tmp_path]
    code, _, errors = run(*call)
    assert code == 0, errors
    runs = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [made["method"] for made in runs] == METHODS[1:]
    assert all(made["learning_rate"] == (0 if made["method"] == "untrained" else 1e-4) for made in runs)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["weak"]
    for measure in ("sts", "probe"):
        found = report["mipic"][f"{measure} differences"]
        assert list(found) == ["matryoshka", "specialist"]
        assert list(found["specialist"]) == ["8"]
        for dim, made in found["matryoshka"].items():
            means = [report[name][measure][dim]["mean"] for name in ("mipic", "matryoshka")]
            assert made["difference"] == pytest.approx(means[0] - means[1], abs=0.011)
            assert made["low"] <= made["difference"] <= made["high"]
    assert report["matryoshka"]["step_time_ratio"] == 1

    code, printed, errors = run(*call, "--plot", tmp_path / "plot.png")
    assert code == 0, errors
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()) == len(runs)
    assert "specialist-8" in printed

    changed = [made | {"settings": made["settings"] | {"alpha": 0.7}} if made["settings"] else made for made in runs]
    (tmp_path / "runs.jsonl").write_text("\n".join(map(json.dumps, changed)) + "\n", encoding="utf-8")
    code, _, errors = run(*call, "--report-only")
    assert code != 0
    assert "holds runs of mipic with {'alpha': 0.7}: name another --output" in errors

    code, _, errors = run(*call, "--max-seq-length", 16)
    assert code != 0
    assert "has other settings than this command" in errors


@needs_model
@pytest.mark.slow
def test_pca_control_trains_what_it_rotates(tmp_path):
    """Asked for alone, it needs the base loss's runs."""
    code, printed, errors = run("compare_losses.py", "--smoke", "--methods", "base-pca", "--output", tmp_path)
    assert code == 0, errors
    lines = (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["method"] for line in lines] == ["base", "base-pca"]
    assert "base-pca" in printed


@needs_model
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "mipik"], "--methods mipik: unknown; known are untrained base base-pca matryoshka"),
        (["--train", "mix.csv"], "--train, --dev and --test come together"),
        (["--probe", "a.csv", "b.csv"], "--probe needs --train, --dev and --test"),
        (["--methods", "mipic", "--plot", "a.png"], "add matryoshka to --methods"),
        (["--dims", "384", "0"], "--dims and --small-dims must be positive"),
        (["--steps", "0"], "--steps, --bootstrap and --probe-shots must be at least 1"),
    ],
)
def test_comparison_refuses_wrong_arguments(tmp_path, arguments, message):
    """Before anything is trained, naming the option."""
    code, _, errors = run("compare_losses.py", "--smoke", "--output", tmp_path, *arguments)
    assert code != 0
    assert message in errors


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
        "training_mix.py", *(tmp_path / f"{name}.csv" for name in files), "--output", tmp_path / "mix.csv"
    )
    assert code == 0, errors
    pairs = pd.read_csv(tmp_path / "mix.csv", keep_default_na=False)
    assert "5 pairs (1, 1, 1, 2)" in printed
    assert {("a", "A"), ("c", "None"), ("e", "E")} < set(pairs.itertuples(index=False, name=None))
    drawn = [pair for pair in pairs.itertuples(index=False, name=None) if set(pair) <= set("ghijk")]
    assert len({text for pair in drawn for text in pair}) == 4
    assert {frozenset(pair) <= set("ghi") or frozenset(pair) <= set("jk") for pair in drawn} == {True}
