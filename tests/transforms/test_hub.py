"""A rotation in folders and on the hub: the same map, and a card that says what it is. No test asks the hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import ModelCard
from sentence_transformers import SentenceTransformer

from mipic_st import Rotation, rotate_model
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.transforms.rotation_fit import fit_rotation
from transforms_fixtures import DIMS, QUICK, ROTATE, TEXTS, hidden_signal

SAID = {"model_name": "org/model", "revision": "0123", "corpus": "help pages | of\n2026"}


@pytest.fixture(scope="module")
def rotation():
    return fit_rotation(*hidden_signal(), dims=DIMS, **QUICK).describe(**SAID)


class Hub:
    """What the hub is asked for, and what it is given."""

    def __init__(self, token=None):
        self.calls, self.files = [("token", token)], {}

    def create_repo(self, repo_id, **options):
        self.calls.append(("create", repo_id, options))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("branch", repo_id, options))

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload", options))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="the commit")


@pytest.fixture
def hub(monkeypatch):
    made = []
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: made.append(Hub(token)) or made[-1])
    return made


def test_a_folder_holds_map_and_card(rotation, tmp_path):
    """What is read is what was written; the file is that of save; a folder with content is refused."""
    rotation.save_pretrained(tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["README.md", "rotation.safetensors"]
    loaded = Rotation.from_pretrained(tmp_path / "mine")
    assert loaded.fingerprint == rotation.fingerprint
    assert (loaded.report, loaded.chosen, loaded.dims) == (rotation.report, rotation.chosen, rotation.dims)
    assert {name: getattr(loaded, name) for name in SAID} == SAID
    assert Rotation.load(tmp_path / "mine" / "rotation.safetensors").fingerprint == rotation.fingerprint
    with pytest.raises(ValueError, match="is not empty"):
        rotation.save_pretrained(tmp_path / "mine")


def test_the_card_says_what_it_is(rotation, tmp_path):
    """Model, revision, corpus, one row of figures per dim, and lines of use that run."""
    rotation.save_pretrained(tmp_path / "mine")
    text = (tmp_path / "mine" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "org/model"
    assert card.data.library_name == "mipic-st"
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    facts = dict(row for row in rows if len(row) == 2)
    assert facts["model"] == "org/model"
    assert facts["revision"] == "0123"
    assert facts["corpus"] == r"help pages \| of 2026"
    assert facts["dims"] == "4, 8 of 32"
    assert facts["fitted as"] == rotation.chosen
    figures = {row[0]: row for row in rows if len(row) > 2}
    assert figures["dim"][:4] == ["dim", "truncated", "PCA", "rotated"]
    for row in rotation.report:
        shown = figures[str(row["dim"])][1:4]
        assert shown == [f"{100 * row[way]:.1f}" for way in ("truncated", "pca", "rotated")]
    assert rotation.verdict in text

    vectors, queries = hidden_signal(20, seed=3)
    code = text.split("```python\n")[1].split("```")[0].replace('"mine"', repr(str(tmp_path / "mine")))
    put = []
    names = {"vectors": vectors, "queries": queries, "model": None}
    exec(code.replace("rotation.put_in(", "put("), names | {"put": put.append}, names)
    assert np.array_equal(names["codes"], rotation.encode(vectors, 8, "int8"))
    assert names["scores"].shape == (20, 20)
    assert put == [None]
    assert len([line for line in code.splitlines() if line]) == 5


def test_a_card_of_little(tmp_path):
    """No report, no ranges, a model of this machine: nothing is made up, and the lines of use still run."""
    bare = Rotation(np.eye(4), (2,)).describe(model_name="local/mine")
    bare.save_pretrained(tmp_path / "bare")
    text = (tmp_path / "bare" / "README.md").read_text()
    assert ModelCard(text).data.base_model is None
    assert "| corpus | not given |" in text
    assert "Not judged on any data." in text
    assert 'dim=2, precision="float16"' in text


def test_push_to_hub(rotation, hub):
    """Repository, branch, both files; the card has the name that the hub gives."""
    assert rotation.push_to_hub("rotated", token="secret", private=True, revision="next") == "the commit"
    api = hub[0]
    assert api.calls == [
        ("token", "secret"),
        ("create", "rotated", {"private": True, "exist_ok": True}),
        ("branch", "me/rotated", {"branch": "next", "exist_ok": True}),
        ("upload", {"repo_id": "me/rotated", "commit_message": "Add a rotation", "revision": "next"}),
    ]
    assert sorted(api.files) == ["README.md", "rotation.safetensors"]
    assert 'Rotation.from_pretrained("me/rotated")' in api.files["README.md"].decode()
    rotation.push_to_hub("rotated", commit_message="Again")
    assert [call[0] for call in hub[1].calls] == ["token", "create", "upload"]
    assert hub[1].calls[-1][1]["commit_message"] == "Again"


def test_from_the_hub(rotation, tmp_path, monkeypatch):
    """What is no folder is asked for there, with all options; what it says is passed on."""
    rotation.save(tmp_path / "file")
    asked = []

    def download(*given, **options):
        asked.append((given, options))
        if given[0] == "no/where":
            raise OSError("404")
        return str(tmp_path / "file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = {"revision": "v1", "token": "t", "local_files_only": True}
    loaded = Rotation.from_pretrained("me/rotated", cache_folder="kept", **options)
    assert loaded.fingerprint == rotation.fingerprint
    assert asked == [(("me/rotated", "rotation.safetensors"), {"cache_dir": "kept", **options})]
    with pytest.raises(FileNotFoundError, match=r"'no/where' is no folder, and the hub does not give .*: 404"):
        Rotation.from_pretrained("no/where")


def test_a_name_that_is_none():
    """Offline, or no name of the hub at all: an error of one kind."""
    for name in ("org/no-such-rotation", "a/b/c/d"):
        with pytest.raises(FileNotFoundError, match="is no folder, and the hub does not give"):
            Rotation.from_pretrained(name, local_files_only=True)


def test_a_folder_without_a_rotation(tmp_path):
    """The file that is missing is named."""
    with pytest.raises(FileNotFoundError, match=r"rotation\.safetensors"):
        Rotation.from_pretrained(tmp_path)


def test_describe(rotation):
    """A copy; what is not given stays; only texts."""
    other = rotation.describe(corpus="others")
    assert (other.model_name, other.revision, other.corpus) == ("org/model", "0123", "others")
    assert rotation.corpus == SAID["corpus"]
    assert other.fingerprint == rotation.fingerprint
    assert replace(other, corpus="").corpus == ""
    with pytest.raises(TypeError, match="corpus must be a text, got 5"):
        rotation.describe(corpus=5)


def test_a_file_that_says_something_else_is_refused(rotation, tmp_path):
    """Texts are checked where they are read, too."""
    replace(rotation, corpus=["a", "b"]).save(tmp_path / "broken")
    with pytest.raises(ValueError, match=r"is damaged: corpus must be a text, got \['a', 'b'\]"):
        Rotation.load(tmp_path / "broken")


def test_rotate_model_knows_the_model(tiny_model, tmp_path):
    """Its name and its state before the change, and what was read; the file in the model's folder is found."""
    tiny_model().save_pretrained(str(tmp_path / "plain"))
    for seed in range(20):
        model = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
        before = fingerprint(model)
        rotation = rotate_model(model, TEXTS, DIMS, **ROTATE, seed=seed)
        assert (rotation.model_name, rotation.revision) == ("local/plain", before)
        assert rotation.corpus == f"{len(TEXTS)} texts of a list"
        if rotation.gained:
            break
    assert fingerprint(model) != before
    model.save_pretrained(str(tmp_path / "rotated"))
    rotation.save(tmp_path / "rotated" / "rotation.safetensors")
    assert Rotation.from_pretrained(tmp_path / "rotated").revision == before


def test_notebooks_and_prompts(rotation):
    """One line, and a table with the columns of the text."""
    assert repr(rotation) == f"Rotation(32 values, dims [4, 8], {rotation.chosen}, org/model)"
    assert repr(Rotation(np.eye(4), (2,))) == "Rotation(4 values, dims [2])"
    html = rotation._repr_html_()
    assert html.count("<tr>") == 1 + len(DIMS)
    for row in rotation.report:
        assert f"<td>{100 * row['rotated']:.1f}</td>" in html
    assert f"<p>{rotation.verdict}</p>" in html
