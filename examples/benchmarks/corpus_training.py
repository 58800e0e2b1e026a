"""What training adds for the search of one corpus, from the plain model and from the rotation of its documents.

    python examples/benchmarks/corpus_training.py --data FOLDER --output runs   # Cranfield's files are in FOLDER
    python examples/benchmarks/corpus_training.py --smoke                       # synthetic data, a few steps

Half the queries, with the documents that answer them, are for training: three quarters of them are trained on, the
others choose the learning rate (with MatryoshkaLoss and the first seed, for each start). The other half of the queries
searches all documents afterwards. Every row is scored as it was trained and after a rotation that is fitted to the
documents' new vectors. A query that stands in several pairs is in one batch only once.

Each run is written to OUTPUT/runs.jsonl, and the command goes on where it was stopped; --report makes the report of
what is there.
"""

from __future__ import annotations

import os
import sys

if not any(argument.startswith("--m") for argument in sys.argv):  # --model, or --model=NAME
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import corpora
import numpy as np
import torch
from corpora import Corpus, Task, bootstrap
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from torch import nn

from mipic_st import MIPICCallback, MIPICLoss, Rotation, fit_rotation
from mipic_st.docstrings import versions

sys.path.append(str(Path(__file__).parents[1]))  # what the example scripts share
from common import load_model

BYTES = (64, 32, 16, 8)  # of int4 codes
TERMS: dict[str, dict[str, Any]] = {
    "mipic": {},  # the default: SIA, no PIC
    "mipic-pic": {"attention_weight": 0, "cka_weight": 0, "pic_weight": 0.5},
    "mipic-all": {"pic_weight": 0.5},
}
ROWS = ("matryoshka", "mipic", "rotation+matryoshka", "rotation+mipic", "rotation+mipic-pic")
UNTRAINED = ("truncation", "rotation")  # the first is the same for all seeds
AGAIN = ", rotated again"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with Cranfield's files (default: docstrings only)")
    parser.add_argument("--docstrings", type=int, default=1000, help="pairs of summary and body")
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument(
        "--rows", nargs="+", default=ROWS, help=f"[rotation+]LOSS with LOSS one of base matryoshka {' '.join(TERMS)}"
    )
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 256, 128, 64, 32, 16, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[3e-5, 1e-4])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-seq-length", type=int, default=32, help="tokens in training")
    parser.add_argument("--score-length", type=int, default=64, help="tokens in scoring and for the rotation")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, in training and scoring")
    parser.add_argument("--threads", type=int, help="torch's CPU threads")
    parser.add_argument(
        "--output", type=Path, default=Path("corpus-training"), help="folder for runs.jsonl and vectors"
    )
    parser.add_argument("--report", metavar="FILE", type=Path, help="write means, spread and intervals to this file")
    parser.add_argument("--report-only", action="store_true", help="no training: report what is there")
    parser.add_argument("--smoke", action="store_true", help="a few steps on synthetic data, one seed and rate")
    args = parser.parse_args()
    if args.smoke:
        args.steps, args.batch_size, args.seeds, args.learning_rates = 2, 8, args.seeds[:1], args.learning_rates[:1]
    return args


class Halves(NamedTuple):
    """Rows of a corpus's queries."""

    train: np.ndarray
    dev: np.ndarray
    test: np.ndarray


def halves(corpus: Corpus) -> Halves:
    """Three eighths to train on, one to choose with, one half to report."""
    order = np.random.default_rng(0).permutation(len(corpus.queries))
    first, test = np.split(order, [len(order) // 2])
    return Halves(*np.split(first, [3 * len(first) // 4]), test)


def make_loss(name: str, model: SentenceTransformer, dims: list[int], seed: int) -> nn.Module:
    base = losses.MultipleNegativesRankingLoss(model)
    if name == "base":
        return base
    if name == "matryoshka":
        return losses.MatryoshkaLoss(model, base, dims)
    return MIPICLoss(model, base, dims, seed=seed, **TERMS[name])


class Bench:
    """The corpora, the start, and the runs that are done."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        if args.smoke:
            self.corpora = {"synthetic": corpora.synthetic()}
        else:
            self.corpora = {"docstrings": corpora.docstrings(args.docstrings)}
            if args.data:
                self.corpora["cranfield"] = corpora.cranfield(args.data)
        self.cache = None if args.smoke else args.output / "vectors"
        self.lines: list[dict[str, Any]] = []
        if (file := args.output / "runs.jsonl").exists():
            self.lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def start(self) -> SentenceTransformer:
        model = load_model(self.args.model)
        model.max_seq_length = self.args.score_length
        return model

    def rotation(self, vectors: np.ndarray, seed: int) -> Rotation:
        return fit_rotation(vectors, dims=self.args.dims, seed=seed, max_steps=2 if self.args.smoke else None)

    def task(self, name: str, model: SentenceTransformer, cache: Path | None = None) -> Task:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self.args.bf16):
            return Task.of(self.corpora[name], model, cache)

    def train(self, name: str, model: SentenceTransformer, loss: nn.Module, rate: float, seed: int) -> None:
        corpus, args = self.corpora[name], self.args
        pairs = [(row, answer) for row in halves(corpus).train for answer in corpus.relevant[row]]
        if args.smoke:
            pairs = pairs[:64]
        data = Dataset.from_dict(
            {
                "query": [corpus.queries[row] for row, _ in pairs],
                "document": [corpus.documents[answer] for _, answer in pairs],
            }
        )
        with tempfile.TemporaryDirectory() as scratch:
            settings = SentenceTransformerTrainingArguments(
                output_dir=scratch,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=rate,
                warmup_steps=0.1,
                batch_sampler="no_duplicates",
                bf16=args.bf16,
                use_cpu=not torch.cuda.is_available(),
                seed=seed,
                save_strategy="no",
                logging_steps=10,
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            )
            callbacks = [MIPICCallback(loss)] if isinstance(loss, MIPICLoss) else []
            model.max_seq_length = args.max_seq_length
            SentenceTransformerTrainer(
                model=model, args=settings, train_dataset=data, loss=loss, callbacks=callbacks
            ).train()
            model.max_seq_length = args.score_length

    def score(self, name: str, task: Task, matrix: np.ndarray | None = None) -> dict[str, dict[str, list[float]]]:
        """nDCG@10 of each development and test query at each dim, and of int4 codes by their bytes."""
        width = task.documents.shape[1]
        cells = {str(dim): (dim, "float32") for dim in self.args.dims}
        cells |= {f"{size} B": (2 * size, "int4") for size in BYTES if 2 * size <= width}
        figures = {
            cell: corpora.ndcg(task.search(*how, matrix), task.relevant).numpy() * 100 for cell, how in cells.items()
        }
        parts = halves(self.corpora[name])._asdict()
        return {
            part: {cell: values[parts[part]].round(3).tolist() for cell, values in figures.items()}
            for part in ("dev", "test")
        }

    def run(self, name: str, row: str, rate: float, seed: int) -> dict[str, Any]:
        """One training with its scores; what is done is read."""
        key = {"corpus": name, "row": row, "rate": rate, "seed": seed}
        for line in self.lines:
            if all(line[part] == value for part, value in key.items()):
                return line
        started = time.perf_counter()
        torch.manual_seed(seed)
        model = self.start()
        if row.startswith("rotation"):
            self.rotation(self.task(name, model, self.cache).documents, seed).put_in(model)
        what = "" if row in UNTRAINED else row.removeprefix("rotation+")
        if what:
            self.train(name, model, make_loss(what, model, self.args.dims, seed), rate, seed)
        trained = time.perf_counter()
        task = self.task(name, model, None if what else self.cache)
        line = {**key, "seconds": trained - started, **self.score(name, task)}
        if what:
            again = self.rotation(task.documents, seed)
            line["again"] = self.score(name, task, np.asarray(again.matrix))
        self.lines.append(line)
        self.args.output.mkdir(parents=True, exist_ok=True)
        with (self.args.output / "runs.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = " ".join(f"{cell}: {np.mean(values):.1f}" for cell, values in line["test"].items())
        whole = time.perf_counter() - started
        print(f"{name} {row} {rate:g} seed {seed}: dev {dev_score(line):.2f}, test {shown}, {whole:.0f} s", flush=True)
        return line

    def rate(self, name: str, rotated: bool) -> float:
        """The best on the development queries, over all dims."""
        row = "rotation+matryoshka" if rotated else "matryoshka"
        if len(self.args.learning_rates) == 1:
            return self.args.learning_rates[0]
        tried = {rate: self.run(name, row, rate, self.args.seeds[0]) for rate in self.args.learning_rates}
        return max(tried, key=lambda rate: dev_score(tried[rate]))


def dev_score(line: dict[str, Any]) -> float:
    return float(np.mean([np.mean(values) for cell, values in line["dev"].items() if cell.isdecimal()]))


def report(bench: Bench) -> dict[str, Any]:
    """By corpus and row: means, standard deviation over seeds, and what is gained over the rotation alone."""
    found: dict[str, dict[str, Any]] = {}
    for name in bench.corpora:
        mine = [line for line in bench.lines if line["corpus"] == name]
        rates = {row: bench.rate(name, row.startswith("rotation")) for row in {line["row"] for line in mine}}
        by_row: dict[str, list[tuple[dict, dict]]] = {}
        for line in sorted(mine, key=lambda line: line["seed"]):
            if line["rate"] in (0, rates[line["row"]]):
                by_row.setdefault(line["row"], []).append((line, line["test"]))
                if "again" in line:
                    by_row.setdefault(line["row"] + AGAIN, []).append((line, line["again"]["test"]))
        figures = {
            row: {cell: np.array([scores[cell] for _, scores in runs]) for cell in runs[0][1]}
            for row, runs in by_row.items()
        }
        found[name] = {}
        for row, runs in by_row.items():
            same = re.sub(r"mipic(-[a-z]+)?", "matryoshka", row)  # from the same start, at the same rate
            rivals = {"over the rotation": "rotation"} | ({"over MatryoshkaLoss": same} if same != row else {})
            found[name][row] = {
                "learning_rate": runs[0][0]["rate"],
                "seeds": len(runs),
                "seconds": float(np.mean([line["seconds"] for line, _ in runs])),
                "ndcg@10": {
                    cell: {"mean": float(by_seed.mean()), "std": float(by_seed.mean(axis=1).std(ddof=len(runs) > 1))}
                    for cell, by_seed in figures[row].items()
                },
            } | {
                kind: {
                    cell: bootstrap(by_seed - figures[rival][cell][: len(by_seed)])
                    for cell, by_seed in figures[row].items()
                }
                for kind, rival in rivals.items()
                if rival in figures
            }
        found[name]["settings"] = {
            "documents": len(bench.corpora[name].documents),
            **{part: len(rows) for part, rows in halves(bench.corpora[name])._asdict().items()},
            "rates": {
                row: {
                    f"{line['rate']:g}": dev_score(line)
                    for line in sorted(mine, key=lambda line: line["rate"])
                    if line["row"] == row and line["seed"] == bench.args.seeds[0]
                }
                for row in sorted(rates)
                if row.endswith("matryoshka")
            },
        }
    return found


def main() -> None:
    args = parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args)
    if not args.report_only:
        for seed in args.seeds:
            for name in bench.corpora:
                for row in (*UNTRAINED[seed != args.seeds[0] :], *args.rows):
                    rate = 0 if row in UNTRAINED else bench.rate(name, row.startswith("rotation"))
                    bench.run(name, row, rate, seed)
    if args.report:
        settings = {
            key: value
            for key, value in vars(args).items()
            if key in ("dims", "seeds", "steps", "batch_size", "max_seq_length", "score_length", "bf16")
        }
        settings |= {"model": Path(args.model).name if args.model else "all-MiniLM-L6-v2", "docstrings": versions()}
        args.report.write_text(
            json.dumps({"settings": settings, "corpora": report(bench)}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
