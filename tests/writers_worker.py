"""Every writer, killed, on a full disk, without rights: python writers_worker.py FOLDER KILLS LIMITS [NAME ...].

Leaves ``trials.json`` in the folder: by writer what went wrong; an empty list means that each attempt left the whole
result or none, and that the next one worked. Each attempt is a process forked from this one, which has all loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from mteb.abstasks.task_metadata import TaskMetadata
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from command_files import write_files
from conftest import sentences
from mipic_st import (
    EvaluationReport,
    MIPICCallback,
    MIPICLoss,
    advise,
    evaluate_mteb,
    export_onnx,
    fit_layer_cuts,
    save_for_tei,
)
from mipic_st.cli import main as command
from mipic_st.losses.callback import PROJECTIONS_FILE
from mipic_st.transforms.rotation import Rotation
from mipic_st.transforms.word_weights import WordWeights

torch.set_num_threads(1)
mpl.use("Agg")
NOBODY = 65534
# What Python does to files; a process is killed before one of them.
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir"}


class Writer(NamedTuple):
    """Writes to a place; unless ``whole``, files come one by one, and the next attempt keeps those that are there."""

    write: Callable[[Path], object]
    is_folder: bool
    whole: bool = True


class Outcome(NamedTuple):
    """How a process ended: 0, 1 for an error, -9; its error; how often it touched files below the place."""

    code: int
    error: str
    touched: int


def attempt(
    write: Callable[[Path], object], place: Path, *, kill: int = -1, limit: int = -1, user: int = -1
) -> Outcome:
    """Write in a process of its own: killed before its n-th touch, with a limit on sizes of files, as another user."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1), os.dup2(nothing, 2)
            touched, error = [0], ""

            def hook(event, arguments):
                if event in EVENTS and str(arguments[0]).startswith(str(place.parent)):
                    if touched[0] == kill:
                        os.kill(os.getpid(), signal.SIGKILL)
                    touched[0] += 1

            sys.addaudithook(hook)
            if limit >= 0:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if user >= 0:
                os.setgid(user), os.setuid(user)
            try:
                if code := write(place) if getattr(write, "__name__", "") == "command" else (write(place), 0)[1]:
                    error = f"exit code {code}"
            except BaseException as caught:
                error = f"{type(caught).__name__}: {caught}"
            os.write(writer, json.dumps([touched[0], error[:300]]).encode())
        finally:
            os._exit(1 if error else 0)
    os.close(writer)
    said = b""
    while part := os.read(reader, 65536):
        said += part
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    touched, error = json.loads(said) if said else (0, "killed")
    return Outcome(os.waitstatus_to_exitcode(status), error, touched)


def content(place: Path) -> dict[str, str]:
    """Files by name, without what is hidden."""
    files = sorted(place.rglob("*")) if place.is_dir() else [place] if place.is_file() else []
    found = {}
    for file in files:
        name = "" if file == place else file.relative_to(place).as_posix()
        if file.is_file() and not any(part.startswith(".") for part in Path(name).parts):
            # plots and settings name the time, and what a cut brings is measured, as is how long a task took
            alike = file.suffix not in (".png", ".svg", ".jsonl") and file.name != "cut.json"
            text = file.read_bytes() if alike else b""
            if b'"evaluation_time"' in text:
                text = json.dumps(json.loads(text)["scores"]).encode()
            found[name] = hashlib.sha1(text).hexdigest()
    return found


def command_line(*arguments: object) -> Callable[[Path], object]:
    """A command with --output."""

    def command_of(place: Path) -> object:
        return command([*map(str, arguments), "--output", str(place), "--quiet"])

    command_of.__name__ = "command"
    return command_of


def writers(folder: Path) -> dict[str, Writer]:
    """All of them, on a tiny model."""
    files = write_files(folder)
    pairs = zip(sentences(24, 1, shortest=3), sentences(24, 2, shortest=3), strict=True)
    lines = [f"{one},{other},{7 * row % 5}" for row, (one, other) in enumerate(pairs)]
    (folder / "sts13_test.csv").write_text("\n".join(["sentence1,sentence2,score", *lines]))
    model = SentenceTransformer(str(files / "model"), device="cpu")
    rotate = command_line("rotate", files / "model", "--texts", files / "texts.txt", "--dims", "4,8")
    outcome = attempt(rotate, folder / "rotated" / "out")
    assert outcome.code == 0, outcome
    rotation = Rotation.load(folder / "rotated" / "out" / "rotation.safetensors")
    weights = WordWeights(torch.rand(5000), (4, 8), [{"plain": 1.0, "weighted": 0.5}])
    rows = [
        {"model": "a", "task": task, "metric": "s", "dim": dim, "score": 0.5 + dim / 100, "precision": "float32"}
        for task in ("one", "two")
        for dim in (4, 8, 16)
    ]
    report = EvaluationReport(rows)
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), [32, 8], lift_init="identity")
    callback = MIPICCallback(loss)

    def checkpoint(place: Path) -> None:
        place.parent.mkdir(exist_ok=True)
        shutil.move(callback.save(place.parent), place) if place.name != PROJECTIONS_FILE else callback.save(
            place.parent
        )

    def mteb(place: Path) -> None:
        TaskMetadata.descriptive_stats = None  # the file has fewer rows than MTEB's set
        evaluate_mteb(model, "STS13", [8, 32], output=place, data_dir=folder, show_progress_bar=False)

    def evaluate(place: Path) -> object:
        TaskMetadata.descriptive_stats = None
        given = [files / "model", "--tasks", "STS13", "--dims", "8,32", "--data-dir", folder]
        return command_line("eval", *given)(place)

    evaluate.__name__ = "command"
    texts = sentences(120, 7, shortest=3)
    cuts = fit_layer_cuts(model, texts, layers=[1], dims=[8, 16], max_steps=0, word_weights=False)
    advice = advise(model, texts, bytes=[4, 8], precisions=["binary"], show_progress_bar=False)
    return {
        "Rotation.save": Writer(rotation.save, False),
        "WordWeights.save": Writer(weights.save, False),
        "EvaluationReport.to_json": Writer(report.to_json, False),
        "EvaluationReport.to_csv": Writer(report.to_csv, False),
        "EvaluationReport.to_markdown": Writer(report.to_markdown, False),
        "EvaluationReport.to_latex": Writer(report.to_latex, False),
        "plot_score_by_dim": Writer(report.plot_score_by_dim, False),
        "plot_retained": Writer(report.plot_retained, False),
        "LayerCuts.plot": Writer(cuts.plot, False),
        "Advice.plot": Writer(advice.plot, False),
        "MIPICCallback.save": Writer(checkpoint, False),
        "save_for_tei": Writer(partial(save_for_tei, model), True),
        "export_onnx": Writer(partial(export_onnx, model), True),
        "mipic-st rotate": Writer(rotate, True),
        "mipic-st cut": Writer(command_line("cut", files / "model", "--layer", 2, "--dim", 8), True),
        "mipic-st export": Writer(command_line("export", files / "model", "--format", "tei"), True),
        "evaluate_mteb": Writer(mteb, True, whole=False),
        "mipic-st eval": Writer(evaluate, True, whole=False),
    }


class Trial:
    """The cases of one writer; ``wrong`` collects what should not be."""

    def __init__(self, name: str, writer: Writer, folder: Path) -> None:
        self.name, self.writer, self.folder = name, writer, folder
        self.ending = ".png" if "plot" in name else ".safetensors" if name.endswith(".save") else ".txt"
        self.wrong: list[str] = []
        self.number = 0
        place = self.place()
        outcome = attempt(writer.write, place)
        assert outcome.code == 0, (name, outcome)
        self.expected, self.touched = content(place), outcome.touched

    def place(self) -> Path:
        """A new place in a folder of its own."""
        self.number += 1
        parent = self.folder / self.name.replace(" ", "-") / str(self.number)
        parent.mkdir(parents=True, mode=0o755)
        ending = "" if self.writer.is_folder else self.ending
        return parent / (PROJECTIONS_FILE if self.name == "MIPICCallback.save" else f"out{ending}")

    def expect(self, case: str, place: Path, before: dict[str, str], outcome: Outcome) -> None:
        """The whole result after success; after failure what was there before; then the next attempt works."""
        found = content(place)
        if not self.writer.whole:
            if bad := [name for name, digest in found.items() if self.expected.get(name, digest) != digest]:
                self.wrong.append(f"{case}: {bad} are other files than those of a run without a fault")
        elif found not in ([self.expected] if outcome.code == 0 else [before, self.expected]):
            self.wrong.append(f"{case}: {sorted(found)} was left ({outcome.error})")
        if self.writer.is_folder and found == self.expected and self.writer.whole:
            return  # the next attempt is rightly refused
        again = attempt(self.writer.write, place)
        if again.code or content(place) != self.expected:
            self.wrong.append(f"{case}: the next attempt {again.error or 'gave another result'}")
        if left := [path.name for path in place.parent.rglob(".*writing-*")]:
            self.wrong.append(f"{case}: {left} stays")

    def killed(self, kills: int) -> None:
        """Before random touches of its files, the first and the last among them; in a new place and one that exists."""
        random.seed(0)
        moments = sorted({0, self.touched - 1, *random.sample(range(self.touched), min(kills, self.touched))})
        for number, moment in enumerate(moments[: max(2, kills)]):
            place = self.place()
            if number % 2:
                place.mkdir() if self.writer.is_folder else place.write_text("old")
            before = content(place)
            outcome = attempt(self.writer.write, place, kill=moment)
            if outcome.code != -signal.SIGKILL:
                self.wrong.append(f"killed before touch {moment}: {outcome}")
            self.expect(f"killed before touch {moment} of {self.touched}", place, before, outcome)

    def full(self, limits: int) -> None:
        """No file may be larger than a share of the largest one."""
        sample = self.place()
        outcome = attempt(self.writer.write, sample)
        assert outcome.code == 0, (self.name, outcome)
        sizes = [
            file.stat().st_size for file in ([sample] if sample.is_file() else sample.rglob("*")) if file.is_file()
        ]
        for share in np.linspace(0, 0.95, limits):
            place = self.place()
            outcome = attempt(self.writer.write, place, limit=int(share * max(sizes)))
            if outcome.code != 1:
                self.wrong.append(f"full at {share:.0%}: {outcome}")
            self.expect(f"full at {share:.0%}", place, {}, outcome)

    def no_rights(self) -> None:
        """A folder that somebody else may not write."""
        place = self.place()
        outcome = attempt(self.writer.write, place, user=NOBODY if os.geteuid() == 0 else -1)
        if outcome.code != 1 or content(place):
            self.wrong.append(f"no rights: {outcome}")
        else:
            self.expect("no rights", place, {}, outcome)

    def exists(self) -> None:
        """A folder with content is refused, a file is replaced; what a resumed run finds is kept."""
        place = self.place()
        if self.writer.is_folder and self.writer.whole:
            place.mkdir()
            (place / "mine").write_text("mine")
            outcome = attempt(self.writer.write, place)
            if outcome.code != 1 or list(content(place)) != ["mine"]:
                self.wrong.append(f"exists: {outcome}, {sorted(content(place))}")
        else:
            attempt(self.writer.write, place)
            self.expect("exists", place, self.expected, attempt(self.writer.write, place))


def main(folder: Path, kills: int, limits: int, *names: str) -> None:
    """All writers, or those named; without names all but the ONNX export, which takes long."""
    folder.chmod(0o755)
    results = {}
    for name, writer in writers(folder).items():
        if name in names or (not names and name != "export_onnx"):
            trial = Trial(name, writer, folder)
            trial.killed(kills)
            trial.full(limits)
            trial.no_rights()
            trial.exists()
            results[name] = {"touched": trial.touched, "files": len(trial.expected), "wrong": trial.wrong}
            (folder / "trials.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
