"""Train a Matryoshka model on AllNLI: rotate it, train it with MIPICLoss, score it at every dim on STSbenchmark.

    python examples/train_nli.py
    python examples/train_nli.py --model microsoft/mpnet-base --output models/mpnet-nli \
        --report-to wandb --push-to-hub me/mpnet-nli-mipic

Data and model come from the Hugging Face hub: the (anchor, positive, negative) triplets of
sentence-transformers/all-nli, and the scored pairs of sentence-transformers/stsb. --pairs, --eval-file and
--test-file take your own instead. In addition to its own negative, each anchor has all other sentences of the batch
as negatives. Everything is in this file: copy it and change what you need.
"""

from __future__ import annotations

import argparse
import logging

import torch
from datasets import load_dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerModelCardData,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from mipic_st import MatryoshkaEvaluator, MIPICCallback, MIPICLoss, rotate_model
from mipic_st.cli.options import add_dims
from mipic_st.data import load_sts_file, load_training_file
from mipic_st.validation import default_dims


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="sentence-transformers/all-MiniLM-L6-v2", help="name on the hub or local folder"
    )
    parser.add_argument("--pairs", help="csv, tsv, jsonl or parquet: anchor, positive, negative (default: all-nli)")
    parser.add_argument("--train-rows", type=int, default=100_000, help="training rows to take, 0 takes all")
    parser.add_argument(
        "--eval-file", help="sentence1, sentence2, score; chooses the checkpoint (default: stsb validation)"
    )
    parser.add_argument("--test-file", help="the same, scored at the end (default: stsb test, or --eval-file if given)")
    add_dims(parser)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--output", default="models/nli-mipic", help="checkpoints, and the model in its folder final")
    parser.add_argument("--report-to", nargs="+", default=["none"], help="wandb, tensorboard, trackio, ...")
    parser.add_argument(
        "--push-to-hub", metavar="NAME", help="name on the hub, as in me/my-model; needs `hf auth login`"
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    args = parser.parse_args()
    if args.train_rows < 0:
        parser.error(f"--train-rows must be 0 or more, got {args.train_rows}")
    return args


def evaluator_of(dataset, name, dims):
    """Spearman correlation of cosine similarity and score, at every dim: each text is encoded once for all of them."""
    sts = EmbeddingSimilarityEvaluator(
        sentences1=list(dataset["sentence1"]),
        sentences2=list(dataset["sentence2"]),
        scores=list(dataset["score"]),
        main_similarity="cosine",
        name=name,
    )
    return MatryoshkaEvaluator(sts, dims, primary="mean")


def main() -> None:
    args = parse_args()
    logging.basicConfig(format="%(asctime)s - %(message)s", datefmt="%Y-%m-%d %H:%M:%S", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)

    # 1. A model with what its card shall say, and the dims that it will be served at
    model_name = args.model.rstrip("/").split("/")[-1]
    model = SentenceTransformer(
        args.model,
        model_card_data=SentenceTransformerModelCardData(
            language="en",
            license="apache-2.0",
            model_name=f"{model_name}, trained on AllNLI triplets for several dims",
        ),
    )
    width = model.get_embedding_dimension()
    dims = sorted(set(args.dims or default_dims(width)), reverse=True)
    if wrong := [dim for dim in dims if not 1 <= dim <= width]:
        raise SystemExit(f"--dims must be from 1 to the model's width of {width}, got {wrong}")

    # 2. Data: triplets for training, scored pairs for evaluation
    if args.pairs:
        train_dataset = load_training_file(args.pairs)
    else:
        train_dataset = load_dataset("sentence-transformers/all-nli", "triplet", split="train")
    if "negative" not in train_dataset.column_names:
        raise SystemExit(f"Triplets need the columns anchor, positive and negative, got {train_dataset.column_names}")
    eval_dataset, test_dataset = (
        load_sts_file(file) if file else load_dataset("sentence-transformers/stsb", split=split)
        for file, split in ((args.eval_file, "validation"), (args.test_file or args.eval_file, "test"))
    )
    train_rows = 200 if args.smoke else args.train_rows or len(train_dataset)
    train_dataset = train_dataset.shuffle(seed=12).select(range(min(train_rows, len(train_dataset))))
    logging.info("Training on %d rows with the columns %s.", len(train_dataset), train_dataset.column_names)

    # 3. Rotate, which moves most information into the first values. Full-width cosines stay as they are.
    rotate_on = train_dataset.select(range(min(10_000, len(train_dataset))))
    rotation = rotate_model(model, rotate_on, dims, **({"max_steps": 20} if args.smoke else {}))
    logging.info("Held-out rows before and after the rotation:\n%s", rotation)

    # 4. The usual loss for triplets, at every dim and with MIPIC's alignments
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=dims)

    # 5. One evaluator for all dims: each text is encoded once
    dev_evaluator = evaluator_of(eval_dataset, "sts-dev", dims)
    dev_evaluator(model)
    logging.info("Spearman x100, rotated and not yet trained:\n%s", dev_evaluator.report(model_name).to_markdown())

    # 6. Training arguments
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    training_args = SentenceTransformerTrainingArguments(
        output_dir=args.output,
        num_train_epochs=args.epochs,
        max_steps=3 if args.smoke else -1,
        per_device_train_batch_size=8 if args.smoke else args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        warmup_steps=0.1,
        bf16=has_bf16,
        # encode puts a default prompt before texts; the trainer does so only if it is given one
        prompts=model.prompts.get(model.default_prompt_name),
        dataloader_pin_memory=torch.cuda.is_available(),
        # the same sentence twice in a batch would be its own negative
        batch_sampler="no_duplicates",
        eval_strategy="steps",
        eval_steps=3 if args.smoke else 0.1,
        save_strategy="steps",
        save_steps=3 if args.smoke else 0.1,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_sts-dev-mean_spearman_cosine",
        logging_steps=1 if args.smoke else 0.02,
        report_to=args.report_to,
        run_name="nli-mipic",
    )

    # 7. Train. The callback writes the dims into config.json and the model card of every checkpoint.
    trainer = SentenceTransformerTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        loss=loss,
        evaluator=dev_evaluator,
        callbacks=[MIPICCallback(loss)],
    )
    trainer.train()

    # 8. Score the best checkpoint on data that chose nothing, or say that they chose it
    name = "sts-dev, which chose the checkpoint" if args.eval_file and not args.test_file else "sts-test"
    test_evaluator = evaluator_of(test_dataset, name, dims)
    test_evaluator(model)
    print(test_evaluator.report(model_name).to_markdown())

    # 9. Save. The folder is a plain SentenceTransformer: SentenceTransformer(folder, truncate_dim=64)
    folder = f"{args.output}/final"
    model.save_pretrained(folder)
    print(f"model saved to {folder}")

    # 10. Share it, if asked to
    if args.push_to_hub:
        model.push_to_hub(args.push_to_hub)


if __name__ == "__main__":
    main()
