"""RotateVectors in every place that batches of a table pass by: the codes are those of the rotation, row by row."""

import json
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="needs the serve extra")
import pyarrow.parquet as pq  # noqa: E402

from mipic_st.codes import PRECISIONS  # noqa: E402
from mipic_st.stored.rotate import RotateVectors  # noqa: E402
from mipic_st.transforms.rotation import Rotation  # noqa: E402
from stored_fixtures import WIDTH, fixed, random_rotation, random_vectors, table_of  # noqa: E402

VECTORS = random_vectors(50)


@pytest.fixture(scope="module")
def rotation():
    return random_rotation()


@pytest.fixture
def rotate(rotation):
    return RotateVectors(rotation, "embedding", dim=8, precision="int8")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_codes_are_those_of_the_rotation(rotation, precision):
    """For every precision, in a fixed-size list of the codes' type and width; other columns are the same."""
    table = table_of(VECTORS)
    coded = RotateVectors(rotation, dim=8, precision=precision)(table)
    wanted = rotation.encode(VECTORS, dim=8, precision=precision)
    assert coded["embedding"].to_pylist() == wanted.tolist()
    kind = coded.schema.field("embedding").type
    assert (kind.list_size, str(kind.value_type.to_pandas_dtype()().dtype)) == (wanted.shape[1], str(wanted.dtype))
    assert coded.schema.names == table.schema.names
    for name in ("id", "text"):
        assert coded[name].equals(table[name])
    assert table.schema.field("embedding").type == fixed(VECTORS).type, "the given table stays"


def test_tables_and_batches_stay_what_they_are(rotate, rotation):
    """A Table in chunks gives the same chunks, a RecordBatch a RecordBatch; no rows give no rows of the same type."""
    parts = pa.concat_tables([table_of(VECTORS[:20]), table_of(VECTORS[20:])])
    coded = rotate(parts)
    assert [len(chunk) for chunk in coded["embedding"].chunks] == [20, 30]
    assert coded["embedding"].to_pylist() == rotation.encode(VECTORS, dim=8).tolist()
    (batch,) = table_of(VECTORS).to_batches()
    assert isinstance(rotate(batch), pa.RecordBatch)
    assert rotate(batch).schema.equals(coded.schema, check_metadata=True)
    for none in (parts.slice(0, 0), parts.schema.empty_table(), pa.RecordBatch.from_pylist([], schema=parts.schema)):
        assert rotate(none).num_rows == 0
        assert rotate(none).schema.equals(coded.schema, check_metadata=True)


def test_rows_without_a_code_are_null_and_named(rotate, rotation, caplog):
    """NaN, infinite, zeros, another width; a null is no fault; all other rows are coded, none moves."""
    given = VECTORS[:9].tolist()
    given[1][2], given[3][0], given[4], given[6], given[7] = np.nan, np.inf, [0.0] * WIDTH, [1.0], None
    table = pa.table({"id": range(9), "embedding": pa.array(given, type=pa.list_(pa.float32()))})
    with caplog.at_level(logging.WARNING):
        coded = rotate(pa.concat_tables([table, table.slice(0, 2)]))
    wanted = rotation.encode(VECTORS[:9], dim=8).tolist()
    wanted = [None if row in (1, 3, 4, 6, 7) else codes for row, codes in enumerate(wanted)]
    assert coded["embedding"].to_pylist() == wanted + wanted[:2]
    assert coded["id"].to_pylist() == [*range(9), 0, 1]
    (message,) = (record.getMessage() for record in caplog.records)
    assert message == (
        "5 rows of column 'embedding' have no code and are null: row 1 holds NaN or infinite values; row 3 holds NaN "
        "or infinite values; row 4 holds zeros only; row 6 has 1 values; row 10 holds NaN or infinite values"
    )


def test_all_rows_can_be_null(rotate):
    """A batch of nulls, and one of faults."""
    none = pa.array([None, None], type=pa.list_(pa.float32(), WIDTH))
    assert rotate(pa.table({"embedding": none}))["embedding"].to_pylist() == [None, None]
    assert rotate(pa.table({"embedding": fixed(np.zeros((2, WIDTH)))}))["embedding"].to_pylist() == [None, None]


def test_metadata_say_how_it_was_coded(rotation, tmp_path):
    """Also after a way through Parquet; what else stands there stays."""
    table = table_of(VECTORS).replace_schema_metadata({"mine": "x"})
    rotate = RotateVectors(rotation, dim=8, precision="int4", model="my/model")
    pq.write_table(rotate(table), tmp_path / "a.parquet")
    metadata = pq.read_schema(tmp_path / "a.parquet").metadata
    assert metadata[b"mine"] == b"x"
    note = json.loads(metadata[b"mipic_st"])
    ranges = {name: np.array(values, dtype=np.float32) for name, values in note.pop("ranges").items()}
    assert note == {
        "column": "embedding",
        "rotation": rotation.fingerprint,
        "model": "my/model",
        "width": WIDTH,
        "dim": 8,
        "precision": "int4",
        "bytes": 4,
    }
    assert ranges.keys() == {"low", "high", "mean", "spread"}
    for name, values in ranges.items():
        np.testing.assert_array_equal(values, getattr(rotation.ranges[8], name))


@pytest.mark.parametrize(("seed", "which"), [(0, "this"), (1, "another")])
def test_codes_are_not_coded_again(rotate, seed, which):
    """Whether this rotation made them or another one; float codes too, which look like vectors."""
    made = RotateVectors(random_rotation(seed), dim=WIDTH, precision="float32")
    with pytest.raises(ValueError, match=rf"was coded by {which} rotation before \(24 dims, float32, rotation "):
        rotate(made(table_of(VECTORS)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"dim": 25}, ValueError, "dim .*25"),
        ({"dim": 8, "precision": "int2"}, ValueError, "precision must be one of"),
        ({"dim": 9}, ValueError, "9"),  # no ranges
        ({"dim": 8, "column": "vectors"}, ValueError, r"no one column 'vectors'; the columns are \['id', "),
        ({"dim": 8, "column": "text"}, TypeError, "must hold a list of float16, float32 or float64"),
    ],
)
def test_wrong_arguments(rotation, arguments, error, message):
    """Are named."""
    with pytest.raises(error, match=message):
        RotateVectors(rotation, **arguments)(table_of(VECTORS))


def test_wrong_batches(rotate):
    """Something else than a table, and vectors of another model."""
    with pytest.raises(TypeError, match="batch must be a Table or RecordBatch of Arrow or a dict, got list"):
        rotate([1])
    with pytest.raises(ValueError, match="vectors of width 12, this rotation is for 24"):
        rotate(table_of(random_vectors(3, 12)))


@pytest.mark.parametrize("kind", ["array", "lists", "arrays", "objects"])
def test_dicts_of_columns(rotate, rotation, kind):
    """As datasets and Ray give them: an array, lists, a list of arrays, an array of objects."""
    objects = np.empty(len(VECTORS), dtype=object)
    objects[:] = list(VECTORS)
    given = {"array": VECTORS, "lists": VECTORS.tolist(), "arrays": list(VECTORS), "objects": objects}[kind]
    batch = {"id": list(range(50)), "embedding": given}
    coded = rotate(batch)
    np.testing.assert_array_equal(coded["embedding"], rotation.encode(VECTORS, dim=8))
    assert coded["embedding"].dtype == np.int8
    assert coded["id"] is batch["id"]
    assert batch["embedding"] is given


def test_dicts_have_none_for_rows_without_a_code(rotate, rotation):
    """A list, as an array has no place for it."""
    coded = rotate({"embedding": [None, *VECTORS[:2].tolist(), [np.nan] * WIDTH]})["embedding"]
    assert [coded[0], coded[3]] == [None, None]
    np.testing.assert_array_equal(coded[1:3], rotation.encode(VECTORS[:2], dim=8))


@pytest.mark.parametrize("form", ["python", "numpy", "arrow"])
@pytest.mark.parametrize("feature", ["list", "fixed", "Array2D"])
def test_datasets_map(rotation, form, feature, tmp_path):
    """``map(batched=True)`` in each format; written as Parquet and loaded again it is the same."""
    datasets = pytest.importorskip("datasets", reason="needs the eval extra")
    value = datasets.Value("float32")
    features = {
        "list": datasets.List(value),
        "fixed": datasets.List(value, length=WIDTH),
        "Array2D": datasets.Array2D((4, 6), "float32"),
    }
    vectors = VECTORS.reshape(-1, 4, 6) if feature == "Array2D" else VECTORS
    kinds = datasets.Features({"embedding": features[feature], "label": datasets.ClassLabel(names=["a", "b"])})
    data = datasets.Dataset.from_dict({"embedding": list(vectors), "label": [0, 1] * 25}, features=kinds)
    coded = data.with_format(None if form == "python" else form).map(
        RotateVectors(rotation, dim=8), batched=True, batch_size=20
    )
    wanted = rotation.encode(VECTORS, dim=8).tolist()
    assert coded.with_format(None)["embedding"][:] == wanted
    if form == "arrow":  # in the others datasets casts to the old type where it can
        assert coded.features["embedding"] == datasets.List(datasets.Value("int8"), length=8)
    # the way by Parquet and Arrow: what datasets notes of its columns is noted anew
    data.to_parquet(tmp_path / "in.parquet")
    pq.write_table(RotateVectors(rotation, dim=8)(pq.read_table(tmp_path / "in.parquet")), tmp_path / "out.parquet")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))
    assert loaded["embedding"][:] == wanted
    assert loaded.features["label"].names == ["a", "b"]
    assert loaded.features["embedding"] == datasets.List(datasets.Value("int8"), length=8)


NO_TORCH = """
import pickle, sys
class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in {"torch", "transformers", "sentence_transformers"}:
            raise ImportError(f"{name} was asked for")
sys.meta_path.insert(0, Refuse())
import pyarrow.parquet as pq
from mipic_st import RotateVectors, rotate_files
rotate = pickle.loads(open("rotate.pickle", "rb").read())
pq.write_table(rotate(pq.read_table("in.parquet")), "out.parquet")
assert rotate_files("in.parquet", "codes", "r.safetensors", dim=8, show_progress_bar=False)["rows"] == 50
"""


def test_a_pickled_one_works_where_torch_is_not(rotate, rotation, tmp_path):
    """In another process, in which neither torch nor transformers can be imported; so does the whole job."""
    table = table_of(VECTORS)
    pq.write_table(table, tmp_path / "in.parquet")
    rotation.save(tmp_path / "r.safetensors")
    (tmp_path / "rotate.pickle").write_bytes(pickle.dumps(rotate))
    path = {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", NO_TORCH], check=True, cwd=tmp_path, env=path)
    assert pq.read_table(tmp_path / "out.parquet").equals(rotate(table))
    assert pq.read_table(tmp_path / "codes" / "in.parquet").equals(rotate(table))


def test_a_file_of_a_rotation_will_do(rotation, rotate, tmp_path):
    """As workers load it."""
    rotation.save(tmp_path / "r.safetensors")
    table = table_of(VECTORS)
    assert RotateVectors(tmp_path / "r.safetensors", dim=8)(table).equals(rotate(table))


def test_a_rotation_that_moves_the_first_value_behind_the_cut():
    """No vector but the given ones is coded."""
    reverse = Rotation(np.eye(WIDTH, dtype=np.float32)[::-1].copy(), (8,)).calibrate(random_vectors(50))
    table = table_of(random_vectors(20))
    codes = RotateVectors(reverse, dim=8)(table)["embedding"].combine_chunks().values.to_numpy()
    np.testing.assert_array_equal(codes.reshape(20, 8), reverse.encode(random_vectors(20), dim=8))
