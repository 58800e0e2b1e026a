"""The command ``mipic-st``: rotate models and vectors, cut and export models, evaluate them at several dims.

Each command is a file of this folder, named as the command, with a docstring (the help), ``EXAMPLES``,
``add_arguments(parser)`` and ``run(args)``, which prints, and raises if something is wrong.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from mipic_st.cli.options import check_device, is_expected, one_line

EXIT_DONE, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
# not sentence-transformers, which says when it has guessed a model's pooling
_OTHERS = ("datasets", "mteb", "transformers")
COMMANDS = ("advise", "rotate", "vectors", "cut", "export", "check", "eval", "tasks")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from mipic_st import __version__

    parser = argparse.ArgumentParser(
        prog="mipic-st",
        description="Small embeddings: rotate models and vectors, cut, export and evaluate models.",
        epilog="exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.",
    )
    parser.add_argument("--version", action="version", version=f"mipic-st {__version__}")
    debug = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", help=debug)
    commands = parser.add_subparsers(metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"mipic_st.cli.{name}")
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name,
            help=text.partition("\n")[0].rstrip("."),
            description=text,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        # without a default, which would undo a --debug before the command
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=debug)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command of these arguments, or of the process's own; what is returned is the exit code."""
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not hasattr(args, "run"):
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        with _own_words_only(args.debug):
            return _run(args)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


@contextmanager
def _own_words_only(debug: bool) -> Iterator[None]:
    """Keep the warnings of other libraries, which a command's user can do nothing about, off the terminal."""
    if debug:
        yield
        return
    levels = {name: logging.getLogger(name).level for name in _OTHERS}
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it sets its logger's level when it is imported
    os.environ.setdefault("TORCH_LOGS", "-onnx")  # the same for torch, whose exporter misses torchvision
    try:
        for name in _OTHERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _run(args: argparse.Namespace) -> int:
    """The command's exit code; what is wrong on one line."""
    try:
        if getattr(args, "device", None) is not None:
            check_device(args.device)
        return int(args.run(args) or EXIT_DONE)
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        hint = "" if is_expected(error) else " (unexpected: run again with --debug, and report it)"
        print(f"mipic-st: {one_line(error)}{hint}", file=sys.stderr)
        return EXIT_FAILED
