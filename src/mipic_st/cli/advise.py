"""Recommend the dim and precision in which to store vectors, measured on your own corpus.

A rotation is fitted on one part of the corpus, and the other part searches all of it at every dim, in every precision,
truncated and rotated. The answer: the best dim and precision for each number of bytes, the smallest ones that lose at
most 1, 2 and 5%, and the code that makes them. With --output, DIR gets advice.json, rotation.safetensors (if a rotation
helps) and a plot.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mipic_st.cli import options

if TYPE_CHECKING:
    from mipic_st.advice.advice import Advice
    from mipic_st.advice.cells import Cell

EXAMPLES = """examples:
  mipic-st advise sentence-transformers/all-MiniLM-L6-v2 --texts corpus.txt
  mipic-st advise ./run-a --pairs qa.csv --columns question,answer --bytes 16,32 --output advice
  mipic-st advise --vectors vectors.parquet --columns embedding --precisions int8 binary"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser, required=False)
    data = parser.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("texts", "the documents: txt (one text per line), or a table (csv, tsv, jsonl, parquet) with texts"),
        ("pairs", "a table of queries and the documents that answer them"),
        ("vectors", "the documents' vectors, without MODEL: a file or folder as for mipic-st vectors"),
    ):
        options.add_file(data, f"--{name}", text)
    options.add_file(parser, "--documents", "with --pairs: more documents, as --texts")
    options.add_file(parser, "--queries", "queries without answers, as --texts or --vectors")
    options.add_columns(parser, "the known names; embedding")
    options.add_list(
        parser,
        "--bytes",
        options.whole_number,
        metavar="N",
        default=[8, 16, 32, 64, 128],
        help="budgets per vector (default: 8,16,32,64,128)",
    )
    options.add_dims(parser)
    options.add_list(
        parser, "--precisions", options.given, metavar="P", help="float32, float16, int8, int4, binary (default: all)"
    )
    parser.add_argument("--measure", metavar="M", help="nDCG@10 (needs --pairs), 3-recall@10 or recall@10")
    options.add_prompt(parser, "query", "queries")
    options.add_prompt(parser, "document", "documents")
    parser.add_argument(
        "--output", type=options.output_folder, metavar="DIR", help="new or empty folder (default: print only)"
    )
    options.add_batch_size(parser)
    options.add_seed(parser)


def run(args: argparse.Namespace) -> None:
    """Measure, print, write."""
    from contextlib import ExitStack

    from mipic_st.advice.cells import PRECISIONS
    from mipic_st.files import new_folder

    if bool(args.model) is bool(args.vectors):
        raise ValueError("name a MODEL for texts, or --vectors without one.")
    if args.documents and not args.pairs:
        raise ValueError("--documents goes with --pairs; without them the documents are --texts.")
    if args.model:
        options.check_places([args.model])
    with ExitStack() as stack:
        folder = stack.enter_context(new_folder(args.output)) if args.output else None
        advice = _advised(
            args,
            bytes=args.bytes,
            dims=args.dims,
            precisions=args.precisions or PRECISIONS,
            measure=args.measure,
            query_prompt=args.query_prompt,
            document_prompt=args.document_prompt,
            seed=args.seed,
            batch_size=args.batch_size,
            show_progress_bar=not args.quiet,
        )
        if folder is not None:
            _write(advice, folder)
    if not args.quiet:
        print(advice)
    options.finish(args, _next(advice.cell, args))


def _next(cell: Cell, args: argparse.Namespace) -> str:
    """The command that makes the vectors of a cell; none for truncated vectors, which need no map."""
    if cell.way == "truncated":
        return f"next: mipic-st cut {args.model} --dim {cell.dim} --output DIR" if args.model else ""
    columns = f" --columns {','.join(args.columns)}" if args.columns else ""
    if args.model:
        data = f"--texts {args.texts}" if args.texts else f"--pairs {args.pairs}"
        return f"next: mipic-st rotate {args.model} {data}{columns} --dims {cell.dim} --output DIR"
    rotation = f"--rotation {args.output / 'rotation.safetensors'}" if args.output else "--fit"
    how = f"{rotation}{columns} --dim {cell.dim} --precision {cell.precision}"
    return f"next: mipic-st vectors {args.vectors} {how} --output DIR"


def _advised(args: argparse.Namespace, **settings: Any) -> Advice:
    """The advice on what the files hold."""
    from mipic_st.advice.advise import advise
    from mipic_st.data import load_texts_file, load_training_file
    from mipic_st.stored.plan import read

    if args.vectors:
        column, *more = args.columns or ["embedding"]
        if more:
            raise ValueError(f"--columns names one column of vectors, got {args.columns}.")
        queries = read(args.queries, column) if args.queries else None
        return advise(read(args.vectors, column), queries=queries, **settings)
    corpus = load_texts_file(args.texts, columns=args.columns) if args.texts else None
    if args.documents:
        corpus = load_texts_file(args.documents)
    pairs = load_training_file(args.pairs, columns=args.columns) if args.pairs else None
    queries = load_texts_file(args.queries) if args.queries else None
    return advise(options.load_model(args.model, args), corpus, queries=queries, pairs=pairs, **settings)


def _write(advice: Advice, folder: Path) -> None:
    """The advice, the map and, with matplotlib, the plot."""
    advice.save(folder / "advice.json")
    if advice.gained:
        advice.rotation.save(folder / "rotation.safetensors")
    if options.can_plot():
        advice.plot(folder / "quality_by_bytes")
