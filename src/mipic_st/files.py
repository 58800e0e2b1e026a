"""Writing files and folders whole or not at all."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from os import PathLike
from pathlib import Path
from typing import Any

# Next to content that is moving into an existing folder: its names.
_MOVING = ".moving.json"
# Bytes of a name that leave room for more in front and behind: 255 is what most file systems take.
_LONG = 100


@contextmanager
def new_folder(folder: str | PathLike[str]) -> Iterator[Path]:
    """A place to write the content of a new or empty folder, which gets all of it when the block ends, or nothing.

    Enter the block before the work: a place that has content or cannot be written is a ValueError at once. After an
    error, everything is as it was. A killed process leaves a hidden folder, which the next attempt removes, with what
    had moved out of it.
    """
    target = Path(os.path.realpath(folder))
    if os.path.lexists(target) and not target.is_dir():
        raise ValueError(f"folder {str(folder)!r} is a file; name a new one.")
    existed = target.is_dir()
    # A folder that exists stays itself: a link, a mounted place, one with rights of its own, in a parent without.
    place = target if existed else target.parent
    for left in _left_behind(place, target.name):
        if (left / _MOVING).is_file() and len(list(left.iterdir())) > 1:  # a part of the content had moved
            for name in json.loads((left / _MOVING).read_text(encoding="utf-8")):
                if not (left / name).exists():
                    _remove(target / name)
        _remove(left)
    if existed and any(target.iterdir()):
        raise ValueError(f"folder {str(folder)!r} exists and is not empty; name a new one.")
    aside = place / _name_aside(target.name)
    made = _make(aside, folder)
    moved: list[Path] = []
    try:
        yield aside
        if not existed:
            aside.rename(target)
            return
        # modules.json first, config.json last: no part of the files loads as a model of fewer modules
        order = {"modules.json": 0, "config.json": 2, "adapter_config.json": 2}
        contents = sorted(aside.iterdir(), key=lambda content: order.get(content.name, 1))
        write_whole(aside / _MOVING, lambda file: write_json(file, [content.name for content in contents]))
        for content in contents:
            moved.append(content.rename(target / content.name))
        _remove(aside)
    except BaseException:
        for content in (aside, *moved):
            _remove(content)
        _remove_empty(made)
        raise


def require_writable(folder: str | PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written, before the work; nothing stays there."""
    place = Path(folder)
    for left in _left_behind(place, "probe"):
        _remove(left)
    _remove_empty(_make(place / _name_aside("probe"), folder))


@contextmanager
def only_writer(folder: str | PathLike[str]) -> Iterator[None]:
    """Make a folder, and refuse it while another process writes there. The lock ends with the process."""
    os.makedirs(folder, exist_ok=True)
    if sys.platform == "win32":
        yield
        return
    import fcntl

    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError):  # else a file system without locks
                raise ValueError(f"folder {str(folder)!r}: another process is writing there; name another.") from error
        yield
    finally:
        os.close(place)


def _make(aside: Path, folder: str | PathLike[str]) -> list[Path]:
    """Make a folder; what was made, parents last."""
    made = [path for path in (aside, *aside.parents) if not path.exists()]
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        _remove_empty(made)
        raise ValueError(f"folder {str(folder)!r} cannot be written ({error.strerror}); name another.") from error
    return made


def _name_aside(name: str) -> str:
    """A hidden name that says whose it is: machine and process."""
    return f"{_prefix(name)}{os.getpid()}-{secrets.token_hex(4)}"


def _prefix(name: str) -> str:
    """What such names begin with; of a name as long as file systems allow, a digest."""
    if len(os.fsencode(name)) > _LONG:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()
    return f".{name}.writing-{platform.node()}-"


def _left_behind(place: Path, name: str) -> Iterator[Path]:
    """What ended processes of this machine have left next to a name."""
    prefix = _prefix(name)
    for left in place.glob(f"{glob.escape(prefix)}*"):
        if _has_ended(int(left.name.removeprefix(prefix).partition("-")[0])):
            yield left


def _remove(path: Path) -> None:
    """A file or a folder, if it is there."""
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _has_ended(process: int) -> bool:
    """Whether no process of this number runs on this machine, as far as can be seen without harming it."""
    if os.name == "nt":  # where signal 0 ends the process
        return False
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, ProcessLookupError)
    return False


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_whole(path: str | PathLike[str], write: Callable[[Path], Any]) -> None:
    """Have a file written next to its place and move it there: readers see no part of it. A link is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file.")
    if path.exists() and not path.is_file():  # a terminal or a pipe has no place next to it, and must not be replaced
        with tempfile.TemporaryDirectory() as place:
            aside = Path(place, path.name)
            write(aside)
            path.write_bytes(aside.read_bytes())
        return
    for left in _left_behind(path.parent, path.stem):
        _remove(left)
    aside = path.with_name(_name_aside(path.stem) + path.suffix)
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
