"""Score models on MTEB tasks at several dims, encoding once.

Each model encodes every text once. --output then has results/ (mteb's files, so that a second run does only what is
missing), report.md, report.csv, report.json, report.tex, and plots as PNG and SVG.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mipic_st.cli import options

if TYPE_CHECKING:
    from mipic_st.evaluation.report import EvaluationReport

EXAMPLES = """examples:
  mipic-st eval sentence-transformers/all-MiniLM-L6-v2 --tasks sts --dims 32,64,128,384 --output results
  mipic-st eval ./run-a ./run-b --tasks STS13 Banking77Classification --data-dir data --dims 16 64 --output results"""


def _precision(text: str) -> str:
    from mipic_st.codes import PRECISIONS

    if text not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"must be among {', '.join(PRECISIONS)}, got {text!r}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser, many=True)
    options.add_list(
        parser,
        "--tasks",
        options.given,
        required=True,
        metavar="TASK",
        help="a group (`mipic-st tasks` lists them), MTEB task names, or one benchmark",
    )
    options.add_dims(parser)
    options.add_output(parser, "folder for results, tables and plots")
    parser.add_argument(
        "--data-dir", type=options.input_folder, metavar="DIR", help="folder with local data, used before the hub"
    )
    options.add_list(
        parser,
        "--precisions",
        _precision,
        default=["float32"],
        metavar="P",
        help="float32 (default), float16, int8, uint8, int4, binary, ubinary",
    )
    parser.add_argument(
        "--scoring",
        choices=("symmetric", "asymmetric"),
        default="symmetric",
        help="compare code with code (default), or float queries with decoded documents, as search engines do",
    )
    text = "texts for the ranges of codes: txt (one text per line), or a table (default: the scored texts)"
    options.add_file(parser, "--calibration", text)
    options.add_batch_size(parser)
    parser.add_argument("--no-normalize", action="store_true", help="do not normalise after truncation")
    parser.add_argument("--overwrite", action="store_true", help="run again what --output already has")
    parser.add_argument("--skip-missing", action="store_true", help="leave out tasks without data instead of failing")
    parser.add_argument("--no-plots", action="store_true", help="write tables only")


def run(args: argparse.Namespace) -> None:
    """Evaluate one model after another, and write what all of them gave."""
    from mipic_st.data import load_texts_file
    from mipic_st.evaluation.report import EvaluationReport
    from mipic_st.evaluation.tasks import resolve_tasks
    from mipic_st.files import require_writable
    from mipic_st.validation import checked_dims

    options.check_places(args.models)
    names = _model_names(args.models)
    if args.dims:
        checked_dims("--dims", args.dims)
    tasks = args.tasks[0] if len(args.tasks) == 1 else args.tasks
    resolve_tasks(tasks)
    require_writable(args.output)
    args.calibration = load_texts_file(args.calibration) if args.calibration else "scored texts"
    report = EvaluationReport([])
    try:
        for place, name in zip(args.models, names, strict=True):
            report += _evaluated(place, name, tasks, args)
    except Exception:
        if len(report):  # hours may have gone into the models before
            print(f"incomplete: {len(args.models)} models were given:", file=sys.stderr)
            with contextlib.suppress(Exception):  # the error that ended the run is the one to be shown
                _write(report, args)
        raise
    if not len(report):
        raise ValueError("no task had data, nothing was evaluated.")
    model = args.models[0] if len(args.models) == 1 else "MODEL"
    _write(report, args, f"next, at a dim that is good enough: mipic-st cut {model} --dim D --output DIR")


def _evaluated(place: str, name: str, tasks: str | list[str], args: argparse.Namespace) -> EvaluationReport:
    """The scores of one model, which is gone from memory afterwards."""
    from mipic_st.encoder.structure import full_width
    from mipic_st.evaluation.mteb import evaluate_mteb
    from mipic_st.validation import default_dims

    if not args.quiet:
        print(place, file=sys.stderr)
    model = options.load_model(place, args)
    return evaluate_mteb(
        model,
        tasks,
        args.dims or default_dims(full_width(model)),
        output=args.output,
        model_name=name,
        data_dir=args.data_dir,
        precisions=list(dict.fromkeys(["float32", *args.precisions])),
        scoring=args.scoring,
        calibration=args.calibration,
        batch_size=args.batch_size,
        normalize=not args.no_normalize,
        overwrite=args.overwrite,
        skip_missing=args.skip_missing,
        show_progress_bar=not args.quiet,
    )


def _write(report: EvaluationReport, args: argparse.Namespace, following: str = "") -> None:
    """Tables and plots into the folder, and the table on the terminal."""
    output: Path = args.output
    report.to_csv(output / "report.csv")
    report.to_json(output / "report.json")
    report.to_latex(output / "report.tex")
    table = report.to_markdown(output / "report.md")
    if not args.no_plots and options.can_plot():
        _plots(report, output)
    if not args.quiet:
        print(table)
    options.finish(args, following)


def _model_names(places: Sequence[str]) -> list[str]:
    """Names that tell the models apart: local folders with one basename get their parent's name too."""
    folders = {place: Path(os.path.abspath(place)) for place in places}  # a link has its own name
    basenames = [folder.name for folder in folders.values()]
    names: list[str] = []
    for place in places:
        folder = folders[place]
        parent = f"{folder.parent.name}-" if basenames.count(folder.name) > 1 else ""
        names.append(f"local/{parent}{folder.name}" if folder.exists() else place)
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"MODEL: {repeated} named twice; give each model once, from folders with different names.")
    return names


def _plots(report: EvaluationReport, output: Path) -> None:
    """What can be drawn."""
    plots = {"score_by_dim": report.plot_score_by_dim, "retained": report.plot_retained}
    if len({record["precision"] for record in report.records}) > 1:
        plots["quality_by_bytes"] = report.plot_quality_by_bytes
    for name, plot in plots.items():
        try:
            plot(output / name)
        except ValueError as error:  # the scores are there, and not every one can be drawn in every way
            print(f"no plot {name}: {error}", file=sys.stderr)
