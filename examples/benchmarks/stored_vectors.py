"""Rows per second and memory of `mipic-st vectors`, compared with pyarrow alone, and a run that is killed and resumed.

    python examples/benchmarks/stored_vectors.py                  # 2 million x 384 float32 to 64 int8: 6 GB of disk
    python examples/benchmarks/stored_vectors.py --rows 200000 --json figures.json

The vectors are made on the spot in a temporary folder and deleted. Each way runs in a process of its own: reading the
file and writing it, reading it and writing as many codes (both pyarrow alone, as many threads as the command has
workers), and the command. Then the command is killed in the middle and resumed, and its files are compared.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

GROUP, BATCH = 2**17, 4096


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--folder", type=Path, help="where there is room (default: the system's temporary folder)")
    parser.add_argument("--one", choices=["make", "same", "codes"], help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, args: argparse.Namespace) -> None:
    """A file of random vectors, and a rotation of some of them: random, as speed does not depend on it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mipic_st import Rotation

    random = np.random.default_rng(0)
    square = np.linalg.qr(random.normal(size=(args.width, args.width)))[0].astype(np.float32)
    kind = pa.list_(pa.float32(), args.width)
    with pq.ParquetWriter(folder / "in.parquet", pa.schema({"id": pa.int64(), "embedding": kind})) as writer:
        for start in range(0, args.rows, GROUP):
            ids = np.arange(start, min(start + GROUP, args.rows))
            vectors = random.standard_normal((len(ids), args.width), dtype=np.float32)
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), args.width)
            writer.write_table(pa.table({"id": ids, "embedding": column}))
    Rotation(square, (args.dim,)).calibrate(vectors[:20_000]).save(folder / "r.safetensors")


def alone(folder: Path, what: str, args: argparse.Namespace) -> None:
    """pyarrow alone: every row group is read, and written again, or as many codes are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    codes = np.random.default_rng(0).normal(0, 40, size=(BATCH, args.dim)).clip(-128, 127).astype(np.int8)

    def copy(groups: list[int]) -> None:
        file, writer = pq.ParquetFile(folder / "in.parquet", buffer_size=2**20, pre_buffer=False), None
        for group in groups:
            pending = []
            for batch in file.iter_batches(BATCH, row_groups=[group], use_threads=False):
                if what == "codes":
                    flat = pa.array(codes[: batch.num_rows].reshape(-1))
                    batch = batch.set_column(1, "embedding", pa.FixedSizeListArray.from_arrays(flat, args.dim))
                pending.append(batch)
                if sum(part.num_rows for part in pending) >= 2**16 or (what == "same" and len(pending) > 3):
                    table, pending = pa.Table.from_batches(pending), []
                    writer = writer or pq.ParquetWriter(folder / f"{what}-{groups[0]}.parquet", table.schema)
                    writer.write_table(table)
            if pending:
                writer.write_table(pa.Table.from_batches(pending))
        writer.close()

    count = pq.ParquetFile(folder / "in.parquet").num_row_groups
    parts = [part.tolist() for part in np.array_split(np.arange(count), args.workers) if len(part)]
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(copy, parts))


def timed(words: list[str]) -> dict[str, float]:
    """Seconds of a process, seconds of processor, and its highest resident size."""
    start = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{words} ended with {status}")
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss * unit / 1e6,
    }


def same_files(first: Path, second: Path) -> bool:
    """Whether two folders have the same files with the same bytes."""
    names = [sorted(path.name for path in folder.rglob("*")) for folder in (first, second)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(first, second, names[0], shallow=False)[1:])


def main() -> None:
    args = parse_args()
    if args.one:
        make(args.folder, args) if args.one == "make" else alone(args.folder, args.one, args)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        folder = Path(place)
        own = [sys.executable, __file__, "--folder", place]
        for name in ("rows", "width", "dim", "workers"):
            own += [f"--{name}", str(getattr(args, name))]
        # in a process of its own: a new process begins with the peak of the one that started it
        subprocess.run([*own, "--one", "make"], check=True)
        size = (folder / "in.parquet").stat().st_size
        print(f"{args.rows:,} x {args.width} float32, {size / 1e9:.2f} GB; {args.workers} workers", flush=True)

        def command(out: str) -> list[str]:
            words = [sys.executable, "-m", "mipic_st", "vectors", f"{folder}/in.parquet", "--output", f"{folder}/{out}"]
            words += ["--rotation", f"{folder}/r.safetensors", "--dim", str(args.dim), "--quiet"]
            return [*words, "--precision", args.precision, "--workers", str(args.workers)]

        figures = {
            "pyarrow alone, reading and writing the file": timed([*own, "--one", "same"]),
            "pyarrow alone, reading it and writing codes": timed([*own, "--one", "codes"]),
            "mipic-st vectors": timed(command("whole")),
        }
        for way, found in figures.items():
            found["rows_per_second"] = args.rows / found["seconds"]
            print(
                f"{way}: {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of processor), "
                f"{found['rows_per_second']:,.0f} rows/s, {found['peak_mb']:,.0f} MB",
                flush=True,
            )
        process = subprocess.Popen(command("resumed"))
        while not list(folder.glob("resumed/_unfinished/*")):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kept = len(list(folder.glob("resumed/in*")))
        resumed = timed([*command("resumed"), "--resume"])
        same = same_files(folder / "whole", folder / "resumed")
        print(f"killed with {kept} files written, resumed in {resumed['seconds']:.1f} s: same bytes: {same}")
        if args.json:
            text = json.dumps({"ways": figures, "resumed": resumed, "kept": kept, "same_bytes": same}, indent=2)
            args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
