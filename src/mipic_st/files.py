"""Writing files and folders whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any


@contextmanager
def new_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """A new or empty folder, which is written as a whole or left as it was, so that another attempt finds it empty."""
    folder = Path(folder)
    existed = folder.exists()
    if existed and not folder.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file; name a new one.")
    if existed and any(folder.iterdir()):
        raise ValueError(f"folder {str(folder)!r} exists and is not empty; name a new one.")
    try:
        yield folder
    except BaseException:
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        # what was there stays itself: a link, a mounted place, a folder with rights of its own
        for content in folder.iterdir():
            shutil.rmtree(content, ignore_errors=True) if content.is_dir() else content.unlink()
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_whole(path: str | PathLike[str], write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and move it there: readers see the old file or the new one, never a part.

    A link is replaced, what it points to stays. A terminal or a pipe has no place beside it and is written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():
        write(path)
        return
    beside = path.with_name(f".{path.name}-{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        write(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
