"""A new folder has all of its content or none of it, whatever happens meanwhile."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mipic_st.files import new_folder, require_writable, write_whole

NAMES = ["modules.json", "config.json", "0_Own/config.json", "weights"]


def fill(folder):
    """Some files, one of them in a folder."""
    for name in NAMES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)


def content(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["new", "deep", "empty", "link"])
def test_the_content_comes_as_a_whole(tmp_path, kind):
    """While it is written, nothing that loads is there; a folder or link that was there stays itself."""
    folder = tmp_path / "deep" / "er" / "out" if kind == "deep" else tmp_path / "out"
    if kind == "link":
        (tmp_path / "real").mkdir(mode=0o750)
        folder.symlink_to(tmp_path / "real")
    elif kind == "empty":
        folder.mkdir(mode=0o750)
    with new_folder(folder) as aside:
        fill(aside)
        assert not any((folder / name).exists() for name in NAMES)
    assert content(folder) == set(NAMES)
    assert folder.is_symlink() == (kind == "link")
    assert kind not in ("link", "empty") or folder.stat().st_mode & 0o777 == 0o750
    assert [path.name for path in tmp_path.rglob(".*")] == []


@pytest.mark.parametrize("existed", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path, existed):
    """Folders on the way that were made for it go too; one that was there stays, empty."""
    folder = tmp_path / "deep" / "out"
    if existed:
        folder.mkdir(parents=True)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt), new_folder(folder) as aside:
        fill(aside)
        raise KeyboardInterrupt
    assert set(tmp_path.rglob("*")) == before


def test_an_error_while_the_content_moves_in_takes_it_out_again(tmp_path, monkeypatch):
    """Files move in one by one where the folder was there; modules.json is the first, config.json the last."""
    rename, moved = Path.rename, []

    def stop(path, target):
        if path.name == "config.json":
            raise OSError("stopped")
        moved.append(path.name)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(OSError, match="stopped"), new_folder(tmp_path) as aside:
        fill(aside)
    assert moved[0] == "modules.json"
    assert set(moved) == {"modules.json", "0_Own", "weights"}
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "content", "hidden content", "nowhere"])
def test_a_place_that_cannot_be_used_is_refused_before_the_work(tmp_path, kind):
    """In words that name the folder."""
    folder = Path("/proc/mipic-st/out") if kind == "nowhere" else tmp_path / "out"
    if kind == "file":
        folder.write_text("mine")
    elif kind != "nowhere":
        folder.mkdir()
        (folder / (".mine" if kind == "hidden content" else "mine")).write_text("mine")
    message = {"file": "is a file", "nowhere": r"cannot be written \("}.get(kind, "exists and is not empty")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"{folder}' {message}"), new_folder(folder):
        pytest.fail("the work has begun")
    assert set(tmp_path.rglob("*")) == before


def test_whether_a_folder_can_be_written_is_tried_without_a_trace(tmp_path):
    """Also below folders that are not there yet, and in one with content."""
    require_writable(tmp_path / "deep" / "out")
    (tmp_path / "mine").write_text("mine")
    require_writable(tmp_path)
    with pytest.raises(ValueError, match=r"folder '/proc/mipic-st/out' cannot be written \("):
        require_writable("/proc/mipic-st/out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("existed", [False, True])
def test_a_killed_process_leaves_nothing_that_loads_and_the_next_one_works(tmp_path, existed):
    """Its hidden folder is removed by the next attempt, that of a process that still runs is not."""
    folder = tmp_path / "out"
    if existed:
        folder.mkdir()
    code = (
        "import os, signal, sys; from mipic_st.files import new_folder\n"
        "with new_folder(sys.argv[1]) as aside:\n"
        "    (aside / 'modules.json').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], check=False)
    assert run.returncode == -signal.SIGKILL
    assert folder.exists() == existed
    assert not (folder / "modules.json").exists()
    (left,) = (path for path in tmp_path.rglob(".out.writing-*"))
    running = tmp_path / f".out.writing-{platform.node()}-{os.getpid()}-0"
    running.mkdir()
    with new_folder(folder) as aside:
        fill(aside)
    assert content(folder) == set(NAMES)
    assert not left.exists()
    assert running.exists()


def test_a_file_is_written_whole(tmp_path):
    """After an error the old one is there, and nothing next to it."""
    file = tmp_path / "report.md"
    write_whole(file, lambda path: path.write_text("old"))

    def stop(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(file, stop)
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_process_killed_while_the_content_moves_in(tmp_path, moves):
    """The next attempt takes out what had moved, and nothing else; with all of it moved, the folder is not empty."""
    folder = tmp_path / "out"
    folder.mkdir()
    code = (
        "import os, pathlib, signal, sys; from mipic_st.files import new_folder\n"
        "rename, left = pathlib.Path.rename, [int(sys.argv[2])]\n"
        "def renamed(self, target):\n"
        "    if not left[0]: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    left[0] -= 1\n"
        "    return rename(self, target)\n"
        "pathlib.Path.rename = renamed\n"
        "import shutil; shutil.rmtree = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)\n"
        "with new_folder(sys.argv[1]) as aside:\n"
        "    for name in ('modules.json', 'model', 'config.json'): (aside / name).write_text('x')"
    )
    run = subprocess.run([sys.executable, "-c", code, folder, str(moves)], check=False)
    assert run.returncode == -signal.SIGKILL
    assert len([path for path in folder.iterdir() if ".writing-" not in path.name]) == moves
    if moves == 3:
        with pytest.raises(ValueError, match="not empty"), new_folder(folder):
            pass
        return
    (folder / "config.json").write_text("mine")
    with pytest.raises(ValueError, match="not empty"), new_folder(folder):
        pass
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    (folder / "config.json").unlink()
    with new_folder(folder) as aside:
        fill(aside)
    assert content(folder) == set(NAMES)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_what_a_killed_process_left_of_a_file_goes(tmp_path):
    """With the next attempt; the file is then whole."""
    file = tmp_path / "report.a-b"
    code = (
        "import os, signal, sys; from mipic_st.files import write_whole\n"
        "write_whole(sys.argv[1], lambda path: (path.write_text('half'), os.kill(os.getpid(), signal.SIGKILL)))"
    )
    assert subprocess.run([sys.executable, "-c", code, file], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    assert not file.exists()
    write_whole(file, lambda path: path.write_text("whole"))
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_probe_left_goes(tmp_path):
    """A process that was killed while it looked whether a folder can be written."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".probe.writing-{platform.node()}-{ended.pid}-0123abcd").mkdir()
    require_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["n" * 250, "ü" * 125])
def test_names_as_long_as_the_file_system_takes(tmp_path, name):
    """What is written aside has room for its own name, and is found again after its process has ended."""
    with new_folder(tmp_path / name) as place:
        (place / "a").write_text("a")
        left = tmp_path / place.name.replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    left.mkdir()
    write_whole(tmp_path / name / f"{name[:-5]}.json", lambda path: path.write_text("b"))
    shutil.rmtree(tmp_path / name)
    with new_folder(tmp_path / name) as place:
        assert not left.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes of POSIX")
def test_a_pipe_stays_what_it_is(tmp_path):
    """It gets the content, also of a writer that would replace a file; a folder is refused."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def write(path):
        path.with_name("new").write_text("all")
        path.with_name("new").replace(path)

    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        write_whole(pipe, write)
        assert reader.communicate()[0] == b"all"
    assert pipe.is_fifo()
    with pytest.raises(ValueError, match="is a folder; name a file"):
        write_whole(tmp_path, write)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_to_itself_is_refused_at_once(tmp_path):
    """It is no place for a folder."""
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match="is a file; name a new one"), new_folder(tmp_path / "loop"):
        raise AssertionError
