"""The command ``mipic-st``: rotate models, evaluate them per dimension, export cut ones."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mipic_st.evaluation.report import EvaluationReport

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130

_EVAL_EPILOG = """examples:
  mipic-st eval sentence-transformers/all-MiniLM-L6-v2 --tasks sts --dims 32 64 128 384 --output results
  mipic-st eval ./run-a ./run-b --tasks STS13 Banking77Classification --data-dir data --dims 16 64 --output results

what is in --output afterwards: results/ (mteb's files, so a second run does only what is missing), report.md,
report.csv, report.json, report.tex, and plots as PNG and SVG.
exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""


def _whole(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _given(text: str) -> str:
    """A text that is not empty, as an unset variable of a shell is, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def _output_folder(text: str) -> Path:
    """A folder that is there or can be made, for argparse."""
    path = Path(_given(text))
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{str(there)!r} is a file; name a folder")
    return path


def _input_folder(text: str) -> Path:
    """A folder that is there, for argparse."""
    if not Path(_given(text)).is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} is {'a file' if Path(text).exists() else 'not there'}; name a folder"
        )
    return Path(text)


def _parser() -> argparse.ArgumentParser:
    from mipic_st import __version__

    parser = argparse.ArgumentParser(
        prog="mipic-st", description="Matryoshka embeddings: rotate models, evaluate per dimension, export cut models."
    )
    parser.add_argument("--version", action="version", version=f"mipic-st {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # what several commands take
    loads, runs = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    loads.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")
    runs.add_argument("--quiet", action="store_true", help="no progress bars, no table on the terminal")
    runs.add_argument("--device", help="cpu, cuda, mps (default: the best one there is)")

    run = commands.add_parser(
        "eval",
        parents=[loads, runs],
        help="score models on MTEB tasks at several dims, encoding once",
        description="Score models on MTEB tasks at several dims. Every text is encoded once per model.",
        epilog=_EVAL_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("models", nargs="+", metavar="MODEL", help="hub name or local folder")
    run.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="a group (`mipic-st tasks` lists them), MTEB task names, or one benchmark",
    )
    run.add_argument(
        "--dims", nargs="+", type=_whole, metavar="DIM", help="default: powers of 2 from 16, and full width"
    )
    run.add_argument(
        "--output", type=_output_folder, required=True, metavar="DIR", help="folder for results, tables and plots"
    )
    run.add_argument(
        "--data-dir", type=_input_folder, metavar="DIR", help="folder with local data, looked at before the hub"
    )
    run.add_argument(
        "--precisions",
        nargs="+",
        default=["float32"],
        choices=["float32", "int8", "binary"],
        metavar="P",
        help="float32 (default), int8, binary",
    )
    run.add_argument("--batch-size", type=_whole, default=32, metavar="N", help="texts per forward pass (default: 32)")
    run.add_argument("--no-normalize", action="store_true", help="do not renormalise after the cut")
    run.add_argument("--overwrite", action="store_true", help="run again what is in --output already")
    run.add_argument("--skip-missing", action="store_true", help="leave out tasks without data instead of failing")
    run.add_argument("--no-plots", action="store_true", help="write tables only")
    run.set_defaults(function=_eval)

    turn = commands.add_parser(
        "rotate",
        parents=[loads, runs],
        help="make an encoder Matryoshka without training it",
        description="Fit a rotation of the embedding space on texts or pairs, and save the model with it. Full-width "
        "cosines stay as they are; the saved folder loads without this package.",
        epilog="examples:\n  mipic-st rotate ./run-a --pairs pairs.csv --dims 16 32 64 128 --output ./run-a-rotated\n"
        "  mipic-st rotate ./run-a --texts corpus.txt --dims 16 64 --output ./run-a-rotated",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    turn.add_argument("model", metavar="MODEL", help="hub name or local folder")
    data = turn.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--pairs", type=_given, metavar="FILE", help="csv, tsv, jsonl or parquet: anchor, positive, or STS columns"
    )
    data.add_argument("--texts", type=_given, metavar="FILE", help="txt (a text a line), or a table with texts")
    data.add_argument("--dataset", type=_given, metavar="NAME", help="pairs from the hub: NAME or NAME:CONFIG")
    turn.add_argument("--dims", nargs="+", type=_whole, metavar="DIM", help="default: powers of 2 from 8")
    turn.add_argument("--output", type=_output_folder, required=True, metavar="DIR", help="new or empty folder")
    turn.add_argument("--batch-size", type=_whole, default=32, metavar="N", help="texts per forward pass (default: 32)")
    turn.add_argument("--seed", type=int, default=0, metavar="N", help="of the held-out part and the batches")
    turn.set_defaults(function=_rotate)

    cut = commands.add_parser(
        "export",
        parents=[loads, runs],
        help="save a model cut to its first layers and dims",
        description="Save a plain SentenceTransformer with fewer layers and dims; it loads without this package.",
        epilog="example:\n  mipic-st export ./run-a --layer 3 --dim 64 --texts corpus.txt --output ./run-a-small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cut.add_argument("model", metavar="MODEL", help="hub name or local folder")
    cut.add_argument("--layer", type=_whole, metavar="L", help="last layer to keep (default: all)")
    cut.add_argument("--dim", type=_whole, metavar="D", help="values to keep (default: all)")
    cut.add_argument(
        "--texts",
        type=_given,
        metavar="FILE",
        help="txt (a text a line) or a table: fit what follows the last layer to the full model's vectors",
    )
    cut.add_argument(
        "--no-word-weights",
        action="store_true",
        help="with --texts: keep the plain mean of the tokens, for servers that know no WordWeights module",
    )
    cut.add_argument("--output", type=_output_folder, required=True, metavar="DIR", help="new or empty folder")
    cut.set_defaults(function=_export)

    served = commands.add_parser(
        "save",
        parents=[loads],
        help="save a model in the form that a server reads",
        description="tei: the form of text-embeddings-inference, with older module paths and pooling keys, which older "
        "releases of vLLM, and infinity, need too. onnx: a file whose token states are behind the model's linear tail, "
        "for runtimes that pool by themselves.",
        epilog="example:\n  mipic-st save ./rotated --format onnx --output ./rotated-onnx",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    served.add_argument("model", metavar="MODEL", help="hub name or local folder")
    served.add_argument("--format", choices=["tei", "onnx"], required=True, help="which form")
    served.add_argument("--output", type=_output_folder, required=True, metavar="DIR", help="new or empty folder")
    served.set_defaults(function=_save)

    check = commands.add_parser(
        "check",
        parents=[loads],
        help="compare a running server with the model",
        description="Ask an OpenAI-compatible endpoint for some vectors and compare them with the model's own. Exit "
        "code 1 if they differ.",
        epilog="example:\n  mipic-st check ./rotated --url http://localhost:8000 --dim 64",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("model", metavar="MODEL", help="hub name or local folder")
    check.add_argument(
        "--url", type=_given, required=True, help="address of the server, or of its .../embeddings route"
    )
    check.add_argument("--dim", type=_whole, metavar="D", help="ask the server for D dims (default: all)")
    check.add_argument("--name", type=_given, default="model", help="the model's name in the request")
    check.add_argument("--api-key", type=_given, help="bearer token")
    check.set_defaults(function=_check_server)

    groups = commands.add_parser("tasks", help="list groups of tasks with their sizes and expected minutes")
    groups.set_defaults(function=_tasks)

    # Before or after the command; without a default in the second place, which would undo the first.
    text = "show where in the program an error happened"
    parser.add_argument("--debug", action="store_true", help=text)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def _one_line(error: BaseException) -> str:
    """What an error says, on one line; its kind too, where the words alone would not say what is wrong."""
    words = " ".join(str(error).split())
    if isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError)) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__


def _check_device(device: str) -> None:
    """Try the device before anything is loaded."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        raise ValueError(
            f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}; leave --device out for the best "
            "one there is."
        ) from error


def _load(name: str, device: str | None, trust_remote_code: bool):  # type: ignore[no-untyped-def]  # noqa: ANN202
    from sentence_transformers import SentenceTransformer

    try:
        return SentenceTransformer(name, device=device, trust_remote_code=trust_remote_code)
    except Exception as error:  # of a damaged file or a module's own code it may be of any kind
        kind = "folder" if Path(name).exists() else "folder or reachable hub model"
        fault = textwrap.shorten(_one_line(error), 300, placeholder=" ...")
        raise ValueError(f"model {name!r} cannot be loaded as a {kind}: {fault}") from error


def _check_places(places: Sequence[str]) -> None:
    """Say at once, of all models, which cannot be there; a name such as ``org/model`` may be the hub's."""
    for place in places:
        if not place.strip():
            raise ValueError(f"model {place!r} cannot be loaded: the name is empty; name a hub model or a folder.")
        if Path(place).is_file():
            raise ValueError(f"model {place!r} cannot be loaded: it is a file; name the model's folder.")
        local = place.startswith((".", "/", "~")) or "\\" in place or place.count("/") > 1
        if local and not Path(place).exists():
            raise ValueError(f"model {place!r} cannot be loaded: there is no such folder.")


def _eval(arguments: argparse.Namespace) -> int:
    from mipic_st.evaluation.report import EvaluationReport
    from mipic_st.evaluation.tasks import resolve_tasks
    from mipic_st.validation import checked_dims

    _check_places(arguments.models)
    names = _model_names(arguments.models)
    if arguments.dims:
        checked_dims("--dims", arguments.dims)
    tasks = arguments.tasks[0] if len(arguments.tasks) == 1 else arguments.tasks
    resolve_tasks(tasks)
    report = EvaluationReport([])
    try:
        for place, name in zip(arguments.models, names, strict=True):
            report += _evaluated(place, name, tasks, arguments)
    except Exception:
        if len(report):  # hours may have gone into the models before
            print(f"incomplete, {len(arguments.models)} models were asked for:", file=sys.stderr)
            with contextlib.suppress(Exception):  # the error that ended the run is the one to be told
                _write(report, arguments)
        raise
    if not len(report):
        raise ValueError("no task had data, nothing was evaluated.")
    _write(report, arguments)
    return EXIT_OK


def _evaluated(place: str, name: str, tasks: str | list[str], arguments: argparse.Namespace) -> EvaluationReport:
    """The scores of one model, which is gone from memory afterwards."""
    from mipic_st.encoder.structure import full_width
    from mipic_st.evaluation.mteb import evaluate_mteb
    from mipic_st.validation import powers_of_two

    if not arguments.quiet:
        print(place, file=sys.stderr)
    model = _load(place, arguments.device, arguments.trust_remote_code)
    width = full_width(model)
    return evaluate_mteb(
        model,
        tasks,
        arguments.dims or [*powers_of_two(16, width), width],
        output=arguments.output,
        model_name=name,
        data_dir=arguments.data_dir,
        precisions=list(dict.fromkeys(["float32", *arguments.precisions])),
        batch_size=arguments.batch_size,
        normalize=not arguments.no_normalize,
        overwrite=arguments.overwrite,
        skip_missing=arguments.skip_missing,
        show_progress_bar=not arguments.quiet,
    )


def _write(report: EvaluationReport, arguments: argparse.Namespace) -> None:
    """Tables and plots into the folder, and the table on the terminal."""
    output: Path = arguments.output
    report.to_csv(output / "report.csv")
    report.to_json(output / "report.json")
    report.to_latex(output / "report.tex")
    table = report.to_markdown(output / "report.md")
    if not arguments.no_plots:
        _plots(report, output)
    if not arguments.quiet:
        print(table)
    print(f"written to {output}", file=sys.stderr)


def _model_names(places: Sequence[str]) -> list[str]:
    """Names that tell the models apart: local folders with one basename get their parent's name too."""
    names: list[str] = []
    for place in places:
        folder = Path(place)
        if not folder.exists():
            names.append(place)
            continue
        folder = folder.resolve()
        same = [other for other in places if other != place and Path(other).resolve().name == folder.name]
        names.append(f"local/{folder.parent.name}-{folder.name}" if same else f"local/{folder.name}")
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(
            f"MODEL: {sorted(map(str, repeated))} named twice; give each model once, from folders with different names."
        )
    return names


def _plots(report: EvaluationReport, output: Path) -> None:
    from mipic_st.validation import missing_extra

    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        print(missing_extra("no plots, they need matplotlib", "plot"), file=sys.stderr)
        return
    plots = {"score_by_dim": report.plot_score_by_dim, "retained": report.plot_retained}
    if len({record["precision"] for record in report.records}) > 1:
        plots["quality_by_bytes"] = report.plot_quality_by_bytes
    for name, plot in plots.items():
        try:
            plot(output / name)
        except ValueError as error:  # the scores are there, and not every one can be drawn in every way
            print(f"no plot {name}: {error}", file=sys.stderr)


def _check_empty(output: Path) -> None:
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {str(output)!r} exists and is not an empty folder; name a new one.")


def _rotate(arguments: argparse.Namespace) -> int:
    from mipic_st.data import load_texts_file, load_training_file, load_training_hub
    from mipic_st.encoder.structure import full_width
    from mipic_st.transforms.rotation import rotate_model
    from mipic_st.validation import checked_dims, powers_of_two

    output: Path = arguments.output
    _check_empty(output)
    _check_places([arguments.model])
    if arguments.dims:
        checked_dims("--dims", arguments.dims)
    if arguments.texts:
        data = load_texts_file(arguments.texts)
    else:
        data = load_training_file(arguments.pairs) if arguments.pairs else load_training_hub(arguments.dataset)
    model = _load(arguments.model, arguments.device, arguments.trust_remote_code)
    width = full_width(model)
    dims = arguments.dims or powers_of_two(8, width)
    if not dims:
        raise ValueError(f"the model's {width} values leave no power of 2 from 8 on below them: give --dims.")
    rotation = rotate_model(
        model,
        data,
        dims,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        show_progress_bar=not arguments.quiet,
    )
    if not rotation.gained:
        raise ValueError("no dim gained, nothing was saved.")
    model.save_pretrained(str(output))
    rotation.save(output / "rotation.safetensors")
    if not arguments.quiet:
        print(rotation)
    print(f"written to {output}", file=sys.stderr)
    return EXIT_OK


def _export(arguments: argparse.Namespace) -> int:
    from mipic_st.data import load_texts_file
    from mipic_st.deploy.truncated import export_truncated, measure_speedup
    from mipic_st.encoder.structure import full_width
    from mipic_st.transforms.layer_cut import fit_layer_cuts

    output: Path = arguments.output
    _check_empty(output)
    _check_places([arguments.model])
    if arguments.texts and not arguments.layer:
        raise ValueError("--texts fits the tail behind an early layer: give --layer too.")
    if arguments.no_word_weights and not arguments.texts:
        raise ValueError("--no-word-weights is about the fit on --texts: give these too, or leave it out.")
    texts = load_texts_file(arguments.texts) if arguments.texts else None
    model = _load(arguments.model, arguments.device, arguments.trust_remote_code)
    cell: dict[str, float] = {}
    cuts = None
    if texts is not None:
        dims = [arguments.dim or full_width(model)]
        bar = not arguments.quiet
        weigh = False if arguments.no_word_weights else None
        cuts = fit_layer_cuts(
            model, texts, layers=[arguments.layer], dims=dims, word_weights=weigh, show_progress_bar=bar
        )
        (cell,) = cuts.report
    exported = export_truncated(model, arguments.layer, arguments.dim, cuts=cuts)
    figures = measure_speedup(model, exported)
    exported.save_pretrained(str(output))
    statement = {"layer": arguments.layer, "dim": arguments.dim, **cell, **figures}
    (output / "export.json").write_text(json.dumps(statement, indent=1) + "\n", encoding="utf-8")
    if cell and not arguments.quiet:
        print("correlation of cosines with those of the full model, on held-out texts")
        kinds = {"plain": "cut as it is", "fitted": "fitted", "mixed": "fitted with full depth", "full": "full depth"}
        for kind, what in kinds.items():
            print(f"  {what:22} {100 * cell[f'similarity_{kind}']:6.1f}")
    print(
        f"{output}: {figures['speedup']:.2f} times as fast ({figures['seconds_full']:.3f} s to "
        f"{figures['seconds_cut']:.3f} s for 128 sentences on {model.device}), "
        f"{figures['parameters_cut'] / 1e6:.1f} of {figures['parameters_full'] / 1e6:.1f} million parameters"
    )
    return EXIT_OK


def _save(arguments: argparse.Namespace) -> int:
    from mipic_st.deploy.onnx import export_onnx
    from mipic_st.deploy.tei import save_for_tei

    _check_empty(arguments.output)
    _check_places([arguments.model])
    model = _load(arguments.model, "cpu", arguments.trust_remote_code)
    (save_for_tei if arguments.format == "tei" else export_onnx)(model, arguments.output)
    print(f"written to {arguments.output}", file=sys.stderr)
    return EXIT_OK


def _check_server(arguments: argparse.Namespace) -> int:
    from mipic_st.deploy.endpoint import check_endpoint

    _check_places([arguments.model])
    model = _load(arguments.model, "cpu", arguments.trust_remote_code)
    check = check_endpoint(model, arguments.url, arguments.dim, name=arguments.name, api_key=arguments.api_key)
    if check.agrees:
        print(f"{arguments.url} gives the model's vectors (largest distance {check.worst:.4f})")
        return EXIT_OK
    for finding in check.findings:
        print(f"{arguments.url}: {finding}", file=sys.stderr)
    return EXIT_FAILED


def _tasks(arguments: argparse.Namespace) -> int:
    from mipic_st.evaluation.tasks import TASK_GROUPS

    for name, group in TASK_GROUPS.items():
        print(f"{name:15} {group.texts:7,} texts, about {group.minutes:g} min on two CPU cores (22M parameters)")
        print(f"{'':15} {', '.join(group.tasks)}")
    return EXIT_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None takes the process's.

    Returns:
        Exit code: 0 done, 1 failed with a message on stderr, 2 wrong arguments, 130 interrupted.
    """
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        if getattr(arguments, "device", None) is not None:
            _check_device(arguments.device)
        return int(arguments.function(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        expected = isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError))
        hint = "" if expected else " (not foreseen: run again with --debug and report it)"
        print(f"mipic-st: {_one_line(error)}{hint}", file=sys.stderr)
        return EXIT_FAILED
