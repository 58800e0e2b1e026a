"""Rotate, truncate and code vectors that are stored in files.

VECTORS is a file (.parquet, .npy, .safetensors), a Lance data set (.lance) or a folder of files of one kind. --output
gets their codes, the rotation and a manifest. Memory stays constant, and --resume continues a run that was stopped. At
the end, a sample of the rows shows how many of the full-width neighbours the codes still find.
"""

from __future__ import annotations

import argparse
import sys
import time

from mipic_st.cli import options

EXAMPLES = """examples:
  mipic-st vectors vectors.parquet --rotation r.safetensors --columns embedding --dim 64 --output codes
  mipic-st vectors vectors.parquet --rotation r.safetensors --dim 64 --output codes --resume
  mipic-st vectors vectors.npy --fit --dim 64 --precision int4 --output codes"""

FIT_ROWS = 20_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "vectors", type=options.given, metavar="VECTORS", help="file, Lance data set, or folder of files"
    )
    rotation = parser.add_mutually_exclusive_group(required=True)
    rotation.add_argument(
        "--rotation", type=options.given, metavar="FILE", help="the rotation, as written by Rotation.save"
    )
    rotation.add_argument(
        "--fit",
        nargs="?",
        type=options.whole_number,
        const=FIT_ROWS,
        metavar="ROWS",
        help=f"fit one first, on this many of the rows (default: {FIT_ROWS:,}), and save it with the codes",
    )
    parser.add_argument(
        "--columns", default="embedding", metavar="NAME", help="the column of the vectors (default: embedding)"
    )
    options.add_dim(parser, "dims to keep", required=True)
    parser.add_argument(
        "--precision",
        default="int8",
        metavar="P",
        help="float32, float16, int8 (default), uint8, int4, binary, ubinary",
    )
    options.add_output(parser)
    parser.add_argument("--model", default="", metavar="NAME", help="the model that made the vectors, for the manifest")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run has written into --output")
    parser.add_argument(
        "--workers",
        type=options.whole_number,
        metavar="N",
        help="pieces at once (default: the number of cores, at most 8)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of the rows for the fit and for the check"
    )
    parser.add_argument("--quiet", action="store_true", help="errors only: no progress bar, no report")


def run(args: argparse.Namespace) -> int:
    """Code, and say what the codes find and what was left out."""
    from mipic_st.stored.job import rotate_files

    start = time.perf_counter()
    made = rotate_files(
        args.vectors,
        args.output,
        args.rotation,
        column=args.columns,
        dim=args.dim,
        precision=args.precision,
        model=args.model,
        fit_rows=args.fit or FIT_ROWS,
        seed=args.seed,
        resume=args.resume,
        workers=args.workers,
        show_progress_bar=not args.quiet,
    )
    if not args.quiet:
        _print(made, time.perf_counter() - start)
    rotation = str(args.output / "_rotation.safetensors")
    options.finish(args, f"next, for queries: mipic_st.Rotation.load({rotation!r})(vectors, dim={args.dim})")
    for part in made["failed"]:
        rows = f" rows {part['first_row']:,} to {part['first_row'] + part['rows'] - 1:,}" if part.get("rows") else ""
        print(f"mipic-st: {part['source']}{rows}: {part['error']}", file=sys.stderr)
    return 1 if made["failed"] else 0


def _print(made: dict, seconds: float) -> None:
    note, check = made["note"], made["check"]
    print(
        f"{made['rows']:,} rows of {note['width']} values as {note['dim']} x {note['precision']}: "
        f"{note['bytes']} bytes each, {seconds:.1f} s"
    )
    for piece in made["pieces"]:
        for row, fault in list(piece["faulty_rows"].items())[:3]:
            print(f"no code: {piece['source']} row {row} {fault}")
    if faults := sum(piece["faults"] for piece in made["pieces"]):
        print(f"{faults:,} rows have no code: nulls, or zeros in .npy and .safetensors; the manifest names them")
    if check:
        print(
            f"of the {check['neighbors']} nearest at full width the codes find {100 * check['rotated']:.1f}% "
            f"(not rotated {100 * check['truncated']:.1f}%), {check['queries']:,} queries among {check['rows']:,} rows"
        )
