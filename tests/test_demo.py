"""Invariants of the synthetic data: deterministic, well-formed, graded as documented, splits without overlap."""

import hashlib
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mipic_st import demo
from mipic_st.demo import SCORES, synthetic_pairs, synthetic_sts, synthetic_topics

# Change it together with the frames only: otherwise rows would differ between platforms or Python versions.
DIGEST = "c18cb31581cbc3ddfb404429fbfbf95104ef574d91ecc8948ddc8895eda96455"

DIGEST_CODE = """
import hashlib, json
from mipic_st.demo import synthetic_pairs, synthetic_sts, synthetic_topics
rows = [synthetic_pairs(300, seed=SEED), synthetic_sts(300, seed=SEED), synthetic_topics(100, seed=SEED)]
digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
"""


def digest(seed):
    names = {"SEED": seed}
    exec(DIGEST_CODE, names)
    return names["digest"]


@pytest.fixture(scope="module")
def pairs():
    return synthetic_pairs(6000, seed=1)


@pytest.fixture(scope="module")
def sts():
    return {split: synthetic_sts(3000, seed=1, split=split) for split in ("train", "eval")}


@pytest.fixture(scope="module")
def all_sentences(pairs, sts):
    rows = [*pairs, *sts["train"], *sts["eval"], *synthetic_topics(1000)]
    return sorted({value for row in rows for key, value in row.items() if key not in ("score", "kind", "label")})


def test_rows_are_the_same_everywhere():
    """A seed gives the rows that it always gave; another seed changes the digest."""
    assert digest(5) == DIGEST
    assert digest(6) != DIGEST


@pytest.mark.parametrize("seed", [-1, None, "1", 1.5])
def test_seeds_that_would_be_another_are_refused(seed):
    """Random takes -1 for 1, and None for a new one each time; NumPy's whole numbers are whole numbers."""
    for make in (synthetic_pairs, synthetic_sts, synthetic_topics):
        with pytest.raises(ValueError, match="seed must be an integer >= 0"):
            make(3, seed=seed)
        assert make(3, seed=np.int64(3)) == make(3, seed=3)


def test_rows_do_not_depend_on_the_hash_seed():
    """A process with another hash seed gives the same rows."""
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"SEED = 5\n{DIGEST_CODE}\nprint(digest)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == DIGEST, done.stderr


def test_seeds_give_other_rows():
    """Another seed gives other rows, in each of the three sets."""
    for make in (synthetic_pairs, synthetic_sts, synthetic_topics):
        assert make(50, seed=0) != make(50, seed=1)


def test_global_random_state_is_left_alone():
    """Making data draws nothing from the global generator."""
    random.seed(3)
    expected = random.random()
    random.seed(3)
    synthetic_pairs(20), synthetic_sts(20), synthetic_topics(20)
    assert random.random() == expected


def test_training_and_evaluation_share_no_sentence(pairs, sts):
    """Neither the pairs nor the scored pairs of the train split have a sentence of the eval split."""
    train = {text for row in pairs for text in row.values()}
    train |= {row[key] for row in sts["train"] for key in ("sentence1", "sentence2")}
    held_out = {row[key] for row in sts["eval"] for key in ("sentence1", "sentence2")}
    assert len(held_out) > 2000
    assert not train & held_out


def test_names_are_held_out(all_sentences, sts):
    """Slot words are split too: a first name of the training lists never shows up in evaluation."""
    text = " ".join(row["sentence1"] + " " + row["sentence2"] for row in sts["eval"])
    assert re.search(r"\bOliver\b", text)
    assert any("Anna" in sentence for sentence in all_sentences)
    assert not re.search(r"\b(Anna|Peter|Maria|Paris|Canada)\b", text)


def test_pairs_are_varied(pairs):
    """6000 rows are 6000 different rows, and hardly any anchor comes twice."""
    assert len({tuple(row.values()) for row in pairs}) == 6000
    assert len({row["anchor"] for row in pairs}) > 4500


def test_negatives_are_not_positives(pairs):
    """Over all rows, no sentence is the positive and the negative of one anchor, nor the anchor itself."""
    positives = {(row["anchor"], row["positive"]) for row in pairs}
    negatives = {(row["anchor"], row["negative"]) for row in pairs}
    assert not positives & negatives
    assert all(row["anchor"] not in (row["positive"], row["negative"]) for row in pairs)


def test_pairs_without_negatives():
    """negatives=False gives two columns."""
    assert {tuple(row) for row in synthetic_pairs(100, negatives=False)} == {("anchor", "positive")}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_scores_follow_the_kinds(sts, split):
    """Each kind comes equally often, with its documented score, and no pair has two scores."""
    rows = sts[split]
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(SCORES, len(rows) // len(SCORES))
    assert all(row["score"] == SCORES[row["kind"]] for row in rows)
    scores = {}
    for row in rows:
        scores.setdefault(frozenset((row["sentence1"], row["sentence2"])), set()).add(row["score"])
    assert all(len(found) == 1 for found in scores.values())
    assert all(row["sentence1"] != row["sentence2"] for row in rows)


def test_role_swaps_keep_every_word(sts):
    """Some contradictions use exactly the words of the first sentence, in another order."""
    swapped = [
        row
        for row in sts["eval"]
        if row["kind"] == "contradiction" and words(row["sentence1"]) == words(row["sentence2"])
    ]
    assert len(swapped) > 20


def test_word_overlap_does_not_solve_it(sts):
    """The share of common words does not rank the kinds, so a model has something to learn."""
    overlap = {kind: [] for kind in SCORES}
    for row in sts["eval"]:
        one, two = set(words(row["sentence1"])), set(words(row["sentence2"]))
        overlap[row["kind"]].append(len(one & two) / len(one | two))
    mean = {kind: sum(values) / len(values) for kind, values in overlap.items()}
    assert mean["change"] > mean["paraphrase"]
    assert mean["topic"] > mean["unrelated"]


def words(sentence):
    return Counter(re.findall(r"\w+", sentence.lower()))


@pytest.mark.parametrize(
    ("flaw", "pattern"),
    [
        ("leftover of the template", r"[\[\]{}()|/=]"),
        ("space", r"  |^\s|\s$|\s[.,?]"),
        ("beginning", r"^[^A-Z0-9$]"),
        ("end", r"[^.?]$|[.?]{2}"),
        ("a before a vowel", r"\b[Aa] (?!uni|use|eu|one)[aeiou8]"),
        ("an before a consonant", r"\b[Aa]n (?!hour)[^aeiou81]"),
        ("word twice", r"\b(\w+) \1\b"),
        ("lower case after the end of a sentence", r"[.?] [a-z]"),
    ],
)
def test_sentences_are_clean(all_sentences, flaw, pattern):
    """No sentence shows a trace of its making."""
    found = [sentence for sentence in all_sentences if re.search(pattern, sentence)]
    assert not found, f"{flaw}: {found[:5]}"


def test_frames_are_well_formed():
    """All wordings of a frame have the same slots, with and without the detail, so each of them says the same."""

    for split, least in (("train", 150), ("eval", 40)):
        frames = demo._corpus(split).frames
        assert len(frames) >= least
        for frame in frames:
            assert len(frame.same) >= 3, frame
            assert frame.opposite, frame
            for detail in (False, True):
                slots = {frozenset(re.findall(r"\{(\w+)", re.sub(*edit(detail), line))) for line in frame.same}
                assert len(slots) == 1, frame.same
            assert len({"[" in line for line in frame.same}) == 1, frame.same


def edit(detail):
    return (r"[\[\]]", "") if detail else (r"\[[^\]]*\]", "")


def test_topics_are_balanced_and_the_same_in_both_splits():
    """Every topic comes equally often, and training and evaluation have the same topics but no common text."""
    train, held_out = synthetic_topics(360), synthetic_topics(360, split="eval")
    counts = Counter(row["label"] for row in train)
    assert len(counts) >= 15
    assert set(counts.values()) == {360 // len(counts)}
    assert {row["label"] for row in held_out} == set(counts)
    assert not {row["text"] for row in train} & {row["text"] for row in held_out}


@pytest.mark.parametrize("make", [synthetic_pairs, synthetic_sts, synthetic_topics])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "size must be a positive integer, got 0"),
        ({"size": True}, "size must be a positive integer, got True"),
        ({"size": 2.5}, "size must be a positive integer, got 2.5"),
        ({"size": 5, "split": "test"}, "split must be 'train' or 'eval', got 'test'"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    """A bad size or split is refused with its name and value."""
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


def test_a_size_out_of_an_array_is_a_number():
    """NumPy's integers are integers."""
    assert synthetic_pairs(np.int64(5)) == synthetic_pairs(5)


def test_too_many_rows_are_refused(monkeypatch):
    """More rows than the frames can give end in an error, not in an endless loop."""

    full = demo._corpus("train")
    frame = next(frame for frame in full.frames if not frame.slots or set(frame.slots) == {"subject", "exam"})
    monkeypatch.setattr(demo, "_corpus", lambda split: demo.Corpus((frame,), full.words))
    with pytest.raises(ValueError, match=r"size=100000 is too large: the synthetic frames gave no new row after \d+"):
        synthetic_topics(100_000)


def test_scores_table_in_the_docstring():
    """The module's docstring documents every kind with its score."""

    documented = dict(re.findall(r"^\| (\w+) +\| (\d\.\d)", demo.__doc__, re.MULTILINE))
    assert {kind: float(score) for kind, score in documented.items()} == SCORES


def test_the_packaged_weights_are_the_published_ones(minilm_path):
    """The packaged model is a third party's copy; its weights are those of the model that it is named after."""
    published = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256((Path(minilm_path) / "model.safetensors").read_bytes()).hexdigest() == published
