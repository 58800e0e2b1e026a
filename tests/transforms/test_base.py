"""What all fitted maps share: files, models that they go into and come out of; and a new map in one file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense
from torch import Tensor

from conftest import WIDTH
from mipic_st.deploy.truncated import export_truncated
from mipic_st.transforms.base import Transform
from mipic_st.transforms.layer_cut import LayerCuts, fit_layer_cuts
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.rotation_fit import fit_rotation
from mipic_st.transforms.word_weights import WordWeights
from transforms_fixtures import DIMS, QUICK, TEXTS, hidden_signal, unit


# a map of one's own: vectors around their mean, the values of largest spread first
@dataclass(frozen=True, eq=False, repr=False)
class Centred(Transform):
    kind: ClassVar[str] = "centred"
    mean: Tensor
    order: Tensor
    dims: tuple[int, ...]
    report: list[dict[str, float]] = field(default_factory=list)

    def __call__(self, vectors, dim=None):
        return (vectors - self.mean.numpy())[:, self.order.numpy()][:, :dim]

    def to_modules(self, model=None):
        matrix = torch.eye(len(self.mean))[self.order]
        return [Dense(*matrix.shape, activation_function=None, init_weight=matrix, init_bias=-self.mean[self.order])]


def fit_centred(vectors, dims):
    vectors = torch.as_tensor(vectors)
    spread = vectors.std(dim=0)
    order = spread.argsort(descending=True)
    report = [
        {"dim": dim, "before": float(spread[:dim].sum()), "after": float(spread[order[:dim]].sum())} for dim in dims
    ]
    return Centred(vectors.mean(dim=0), order, tuple(dims), report)


@pytest.mark.parametrize("tail", [None, "stella"])
def test_a_map_of_ones_own(tiny_model, tail, tmp_path):
    """Fitted, saved, loaded, put into a model, which is saved, loaded and cut; taken out again."""
    model = tiny_model(tail=tail)
    plain = model.encode(TEXTS[:50])
    fit_centred(plain, DIMS).save(tmp_path / "centred.safetensors")
    centred = Centred.load(tmp_path / "centred.safetensors")
    assert [row["after"] > row["before"] for row in centred.report] == [True, True]
    assert centred.to_frame()["dim"].tolist() == DIMS
    assert repr(centred) == f"Centred(mean ({plain.shape[1]},), order ({plain.shape[1]},), dims [4, 8])"

    modules = list(model)
    take_out = centred.put_in(model)
    assert len(modules) + (tail is None) == len(list(model)), "multiplied into the Dense that makes the vectors"
    np.testing.assert_allclose(model.encode(TEXTS[:50]), centred(plain), atol=1e-5)
    model.save_pretrained(str(tmp_path / "model"))
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    np.testing.assert_allclose(loaded.encode(TEXTS[:50]), centred(plain), atol=1e-5)
    small = export_truncated(loaded, dim=8)
    np.testing.assert_allclose(small.encode(TEXTS[:50]), unit(centred(plain, 8)), atol=1e-5)
    take_out()
    assert list(model) == modules
    np.testing.assert_array_equal(model.encode(TEXTS[:50]), plain)


# --- files ------------------------------------------------------------------------------------------------------------


def maps():
    """One of each kind, whatever their values."""
    orthogonal = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    report = [{"dim": 2, "change": 0.25, "error": float("nan")}]
    return [
        Rotation(orthogonal, (2, 4), report),
        LayerCuts({1: torch.rand(5, 6), 3: torch.rand(5, 6)}, (4, 6), report, {3: torch.rand(9)}, "0123"),
        WordWeights(torch.rand(9), (4,), report),
    ]


@pytest.mark.parametrize("number", range(3))
def test_saved_and_loaded(number, tmp_path):
    """Every field comes back as it was."""
    saved = maps()[number]
    saved.save(tmp_path / "map")
    loaded = type(saved).load(tmp_path / "map")
    assert (loaded.dims, str(loaded.report), repr(loaded)) == (saved.dims, str(saved.report), repr(saved))
    for name in ("matrix", "weights"):
        if hasattr(saved, name):
            assert np.array_equal(getattr(loaded, name), getattr(saved, name))
    for name in ("maps", "word_weights"):
        if hasattr(saved, name):
            kept, found = getattr(saved, name), getattr(loaded, name)
            assert kept.keys() == found.keys()
            assert all(torch.equal(kept[layer], found[layer]) for layer in kept)
    assert getattr(loaded, "fingerprint", None) == getattr(saved, "fingerprint", None)


@pytest.mark.parametrize("number", range(3))
def test_equal_maps_are_equal_files(number, tmp_path):
    """Byte for byte, so that a file can be told by its hash."""
    saved = maps()[number]
    for place in range(8):
        saved.save(tmp_path / str(place))
    assert len({(tmp_path / str(place)).read_bytes() for place in range(8)}) == 1


@pytest.mark.parametrize("number", range(3))
def test_one_flipped_byte_is_found(number, tmp_path):
    """Anywhere in the file; what the file format does not notice, the checksum does."""
    saved = maps()[number]
    saved.save(tmp_path / "map")
    content = (tmp_path / "map").read_bytes()
    for place in np.random.default_rng(0).integers(len(content), size=60):
        broken = bytearray(content)
        broken[place] ^= 1
        (tmp_path / "map").write_bytes(broken)
        with pytest.raises(ValueError, match=f"is no {saved.kind} that .* wrote, or is damaged"):
            type(saved).load(tmp_path / "map")


def test_other_files_are_refused(tmp_path):
    """Nothing there, no safetensors, another map, another package's tensors, a later format."""
    rotation, cuts, _ = maps()
    with pytest.raises(FileNotFoundError, match="no file"):
        Rotation.load(tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"not a safetensors file")
    cuts.save(tmp_path / "cuts")
    save_file({"weight": torch.eye(3)}, tmp_path / "other")
    rotation.save(tmp_path / "rotation")
    for name, reason in (("broken", ""), ("cuts", "it holds 'layer cuts'"), ("other", "nothing of this package")):
        with pytest.raises(
            ValueError, match=f"{name} is no rotation that Rotation.save wrote, or is damaged: .*{reason}"
        ):
            Rotation.load(tmp_path / name)
    notes = {"kind": "rotation", "format": "2", "fields": "{}", "checksum": ""}
    save_file(load_file(tmp_path / "rotation"), tmp_path / "later", metadata=notes)
    with pytest.raises(ValueError, match="its format is 2, this version of mipic-st reads 1; update it"):
        Rotation.load(tmp_path / "later")


def old_file(path, matrix, dims=(1, 2), report=()):
    """A rotation as version 0.1 wrote it."""
    save_file({"rotation": matrix}, path, metadata={"dims": json.dumps(dims), "report": json.dumps(report)})


def test_files_of_earlier_versions_load(tmp_path):
    """Tensor "rotation", dims and report; later, each note under a key of its own."""
    old_file(tmp_path / "old", torch.eye(4)[:, [1, 0, 2, 3]], [1, 2], [{"dim": 1}])
    loaded = Rotation.load(tmp_path / "old")
    assert (loaded.dims, loaded.report) == ((1, 2), [{"dim": 1}])
    assert loaded(np.eye(4))[0].tolist() == [0, 1, 0, 0]

    rotation, *_ = maps()
    rotation.save(tmp_path / "new")
    with safe_open(tmp_path / "new", "pt") as file:
        notes = json.loads(file.metadata()["transform"])
    save_file(load_file(tmp_path / "new"), tmp_path / "old", metadata=notes)
    assert Rotation.load(tmp_path / "old").fingerprint == rotation.fingerprint


@pytest.mark.parametrize(
    ("matrix", "dims", "reason"),
    [
        (torch.rand(3, 5), (1, 2), "is not square"),
        (torch.zeros(4, 4), (1, 2), "not orthogonal"),
        (torch.full((4, 4), float("nan")), (1, 2), "matrix holds values that are not finite"),
        (torch.eye(4) + 0.01, (1, 2), "not orthogonal"),
        (torch.eye(4, dtype=torch.int8), (1, 2), "must hold floating numbers"),
        (torch.eye(4), (1, 5), "exceed the model's width of 4"),
        (torch.eye(4), ("one", "two"), "dims must be integers"),
        (torch.eye(4), (), "dims is empty"),
        (torch.eye(4), 3, "not iterable"),
    ],
)
def test_what_is_no_rotation_is_refused(matrix, dims, reason, tmp_path):
    """Shape, orthogonality and dims of what was read."""
    old_file(tmp_path / "old", matrix, dims)
    with pytest.raises(ValueError, match=f"is no rotation that Rotation.save wrote, or is damaged: .*{reason}"):
        Rotation.load(tmp_path / "old")


def test_layer_cuts_are_fitted_once(tiny_model, tmp_path):
    """Saved with the model's fingerprint, they export the same cut in another session, and refuse another model."""
    model = tiny_model(normalize=True)
    cuts = fit_layer_cuts(model, TEXTS, layers=[1, 2], dims=DIMS, max_steps=5)
    cuts.save(tmp_path / "cuts.safetensors")
    model.save_pretrained(str(tmp_path / "model"))
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    loaded = LayerCuts.load(tmp_path / "cuts.safetensors")
    expected, got = (export_truncated(model, 2, 8, cuts=each).encode(TEXTS[:5]) for each in (cuts, loaded))
    np.testing.assert_array_equal(expected, got)
    assert loaded.report == cuts.report
    with pytest.raises(ValueError, match="cuts were fitted when the model gave other vectors"):
        export_truncated(tiny_model("modernbert"), 2, 8, cuts=loaded)


def test_cuts_are_applied_to_arrays(tiny_model):
    """Pooled states to full-depth vectors, cut and scaled with a dim; a layer that is not there is named."""
    matrix = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    cuts = LayerCuts({2: matrix}, (3,), [])
    states = hidden_signal(7, width=6, signal=2)[0]
    np.testing.assert_allclose(cuts(states, 2), states @ matrix.numpy(), atol=1e-5)
    np.testing.assert_allclose(cuts(states, 2, 3), unit(states @ matrix.numpy()[:, :3]), atol=1e-5)
    with pytest.raises(ValueError, match=r"cuts hold layers \[2\], not 1"):
        cuts(states, 1)
    with pytest.raises(ValueError, match="states have width 5, the map of layer 2 is for 6"):
        cuts(states[:, :5], 2)


def test_a_rotation_is_put_in_and_taken_out(tiny_model):
    """By hand, without rotate_model."""
    model = tiny_model(normalize=True)
    rotation = fit_rotation(np.random.default_rng(0).normal(size=(80, WIDTH)), dims=DIMS, **QUICK)
    plain = model.encode(TEXTS[:5])
    take_out = rotation.put_in(model)
    np.testing.assert_allclose(model.encode(TEXTS[:5]), rotation(plain), atol=1e-5)
    take_out()
    np.testing.assert_array_equal(model.encode(TEXTS[:5]), plain)
