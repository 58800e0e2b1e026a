"""Half the layers, most of the quality: cut a model, fit its tail, and train the cut on the full depth's vectors.

    python examples/half_depth.py                                                   # offline, on synthetic data
    python examples/half_depth.py --model my-model --pairs pairs.csv --eval-file sts.csv --output my-half-model
    python examples/half_depth.py --dataset sentence-transformers/all-nli:pair --layer 4

The model is rotated first (unless --no-rotation), so that the cut is good at few dims too. The tail is fitted by least
squares to the full depth's vectors of the training texts, and MSELoss then trains the whole cut on them. No labels are
needed. The saved model is a plain SentenceTransformer.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MSELoss

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    positive,
    save,
    score,
    sentences_of,
    training_arguments,
)
from mipic_st import export_truncated, fit_layer_cuts, rotate_model, set_matryoshka_config
from mipic_st.demo import synthetic_pairs

SMOKE_PAIRS = 300


def main() -> None:
    parser = make_parser(__doc__, batch_size=64, learning_rate=5e-4)
    parser.add_argument("--layer", type=positive, help="layer to cut after (default: half the model's depth)")
    parser.add_argument("--no-rotation", action="store_true", help="do not rotate the model first")
    parser.add_argument("--more-eval-files", nargs="+", default=[], help="the scores are the mean over all files")
    parser.add_argument("--seeds", type=int, nargs="+", help="train once with each, and show mean and spread")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores to this file as well")
    args = parser.parse_args()

    # 1. The teacher, rotated
    # a fit wants more texts than the model has values, so a smoke run has them, too
    rows = argparse.Namespace(**{**vars(args), "smoke": False})
    train = load_train(rows, synthetic_pairs(SMOKE_PAIRS if args.smoke else 9500, negatives=False))
    train = train.select(range(min(SMOKE_PAIRS, len(train)))) if args.smoke else train
    teacher = load_model(args.model)
    dims = choose_dims(args.dims, teacher.get_embedding_dimension())
    if not args.no_rotation and dims[-1] < teacher.get_embedding_dimension():
        options = {"max_steps": 5} if args.smoke else {}
        rotate_model(teacher, train, dims, batch_size=64, seed=args.seed, **options)
    layer = args.layer or teacher[0].auto_model.config.num_hidden_layers // 2

    # 2. Its vectors of every text: what the tail is fitted to, and what the cut is trained on
    texts = sentences_of(train)
    labels = teacher.encode(texts, batch_size=64, normalize_embeddings=True, show_progress_bar=False)
    lessons = Dataset.from_dict({"text": texts, "label": labels.tolist()})

    files = [args.eval_file, *args.more_eval_files]
    evaluators = [make_evaluator(argparse.Namespace(**{**vars(args), "eval_file": file}), dims) for file in files]

    def mean_score(model: SentenceTransformer) -> dict[int, float]:
        scores = pd.DataFrame([score(model, evaluator) for evaluator in evaluators]).mean()
        return {dim: float(scores[dim]) for dim in dims}

    # least squares alone: the training does what further steps of the fit would do
    cuts = fit_layer_cuts(teacher, texts, layers=[layer], dims=dims, max_steps=0, batch_size=64)
    stages = {
        "full depth": [mean_score(teacher)],
        f"layer {layer}, as it is": [mean_score(export_truncated(teacher, layer))],
        f"layer {layer}, fitted": [mean_score(export_truncated(teacher, layer, cuts=cuts))],
    }

    # 3. The cut, with a tail that is right already, learns the rest
    name = f"layer {layer}, fitted and trained"
    settings: dict[str, Any] = {"bf16": True, "use_cpu": not torch.cuda.is_available()} if args.bf16 else {}
    for seed in args.seeds or [args.seed]:
        student = export_truncated(teacher, layer, cuts=cuts)
        with tempfile.TemporaryDirectory() as scratch:
            trainer = SentenceTransformerTrainer(
                model=student,
                args=training_arguments(args, student, lessons, args.output or scratch, seed=seed, **settings),
                train_dataset=lessons,
                loss=MSELoss(student),
            )
            trainer.train()
        stages.setdefault(name, []).append(mean_score(student))

    table = Table(title="Spearman x100 by truncation dimension")
    for heading in ("", *map(str, dims)):
        table.add_column(heading, justify="right" if heading else "left")
    for stage, runs in stages.items():
        frame = pd.DataFrame(runs)
        spread = {dim: f" ±{frame[dim].std():.1f}" if len(runs) > 1 else "" for dim in dims}
        table.add_row(stage, *(f"{frame[dim].mean():.1f}{spread[dim]}" for dim in dims))
    Console().print(table)
    if args.json:
        about = {name: getattr(args, name) for name in ("layer", "steps", "epochs", "batch_size", "learning_rate")}
        args.json.write_text(json.dumps({"settings": about, "scores": stages}, indent=1) + "\n", encoding="utf-8")
    set_matryoshka_config(student, dims)  # what serving engines read
    save(student, args.output)


if __name__ == "__main__":
    main()
