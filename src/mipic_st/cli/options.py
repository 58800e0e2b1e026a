"""Options that several commands take, each under one name, and the model that they name."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def whole_number(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def given(text: str) -> str:
    """A text that is not empty, as an unset variable of a shell is, for argparse."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty")
    return text


def output_folder(text: str) -> Path:
    """A folder that is there or can be made, for argparse."""
    path = Path(given(text))
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{str(there)!r} is a file; name a folder")
    return path


def input_folder(text: str) -> Path:
    """A folder that is there, for argparse."""
    path = Path(given(text))
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is {'a file' if path.exists() else 'not there'}; name a folder")
    return path


class _Flat(argparse.Action):
    """Joins the lists that several arguments give."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        setattr(namespace, self.dest, [value for part in values for value in part])


def add_list(parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], **options: Any) -> None:
    """An option that takes values with spaces or commas between them; a comma in brackets belongs to the value."""

    def split(text: str) -> list[Any]:
        return [kind(part) for part in re.split(r",\s*(?![^(]*\))", text.rstrip(","))]

    parser.add_argument(name, nargs="+", type=split, action=_Flat, **options)


def add_model(parser: argparse.ArgumentParser, *, many: bool = False, required: bool = True) -> None:
    """The model or models, and how to load and run them."""
    text = "hub name or local folder"
    if many:
        parser.add_argument("models", nargs="+", metavar="MODEL", help=text)
    else:
        parser.add_argument("model", nargs=None if required else "?", metavar="MODEL", help=text)
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best available)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that comes with the model")
    parser.add_argument("--quiet", action="store_true", help="errors only: no progress bars, tables or hints")


def add_file(parser: Any, name: str, text: str) -> None:
    """A file that is read; the parser may be a group of options."""
    parser.add_argument(name, type=given, metavar="FILE", help=text)


def add_batch_size(parser: argparse.ArgumentParser) -> None:
    """How many texts are encoded at once."""
    parser.add_argument(
        "--batch-size", type=whole_number, default=32, metavar="N", help="texts per forward pass (default: 32)"
    )


def add_dims(parser: argparse.ArgumentParser) -> None:
    """Several dims."""
    text = "spaces or commas between them (default: powers of 2 from 8, and full width)"
    add_list(parser, "--dims", whole_number, metavar="DIM", help=text)


def add_columns(parser: argparse.ArgumentParser, text: str = "the known names") -> None:
    """Which columns of the file are meant; ``text`` says which are, without the option."""
    text = f"columns of that table, e.g. question,answer (default: {text})"
    add_list(parser, "--columns", given, metavar="NAME", help=text)


def add_prompt(parser: argparse.ArgumentParser, side: str, texts: str) -> None:
    """What the model is told before queries or documents."""
    text = f"put before {texts} (default: the model's own)"
    parser.add_argument(f"--{side}-prompt", metavar="TEXT", help=text)


def add_seed(parser: argparse.ArgumentParser) -> None:
    """What is drawn."""
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the held-out part and the batches")


def add_dim(parser: argparse.ArgumentParser, text: str, *, required: bool = False) -> None:
    """One dim."""
    parser.add_argument("--dim", type=whole_number, metavar="D", required=required, help=text)


def add_output(parser: argparse.ArgumentParser, text: str = "new or empty folder") -> None:
    """Where results go."""
    parser.add_argument("--output", type=output_folder, required=True, metavar="DIR", help=text)


def check_places(places: Sequence[str]) -> None:
    """Say at once, of all models, which cannot be there; a name such as ``org/model`` may be the hub's."""
    for place in places:
        if not place.strip():
            raise ValueError(f"model {place!r} cannot be loaded: the name is empty; name a hub model or a folder.")
        if Path(place).is_file():
            raise ValueError(f"model {place!r} cannot be loaded: it is a file; name the model's folder.")
        local = place.startswith((".", "/", "~")) or "\\" in place or place.count("/") > 1
        if local and not Path(place).exists():
            raise ValueError(f"model {place!r} cannot be loaded: there is no such folder.")


def check_device(device: str) -> None:
    """Try the device before anything is loaded."""
    import torch

    try:
        torch.zeros(1, device=device).cpu()
    except Exception as error:
        raise ValueError(
            f"--device {device!r} cannot be used here: {str(error).splitlines()[0]}; leave --device out for the best "
            "available."
        ) from error


def load_model(place: str, args: argparse.Namespace) -> SentenceTransformer:
    """A model of the command line."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    if args.quiet:
        logging.disable_progress_bar()
    try:
        return SentenceTransformer(place, device=args.device, trust_remote_code=args.trust_remote_code)
    except Exception as error:  # of a damaged file or a module's own code it may be of any kind
        kind = "folder" if Path(place).exists() else "folder or reachable hub model"
        fault = textwrap.shorten(one_line(error), 300, placeholder=" ...")
        raise ValueError(f"model {place!r} cannot be loaded as a {kind}: {fault}") from error


def can_plot() -> bool:
    """Whether there is matplotlib, which then draws without a screen; if not, how to get it is said."""
    from mipic_st.validation import require

    try:
        require("matplotlib", "no plots, they need matplotlib", "eval").use("Agg")
    except ImportError as error:
        print(error, file=sys.stderr)
        return False
    return True


def finish(args: argparse.Namespace, following: str = "") -> None:
    """Say where results are and what comes next."""
    if not args.quiet:
        for line in filter(None, (args.output and f"written to {args.output}", following)):
            print(line, file=sys.stderr)


def is_expected(error: BaseException) -> bool:
    """Whether an error is of a kind whose words say what is wrong."""
    return isinstance(error, (ValueError, TypeError, OSError, ImportError, RuntimeError))


def one_line(error: BaseException) -> str:
    """What an error says, on one printable line; its kind too, where the words alone would not say what is wrong."""
    words = " ".join("".join(letter if letter.isprintable() else " " for letter in str(error)).split())
    return words if words and is_expected(error) else ": ".join(filter(None, [type(error).__name__, words]))
