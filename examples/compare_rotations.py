"""Ways to choose the first values of an embedding, without training: quality at each dim, and the time each takes.

    python examples/compare_rotations.py --train mix.csv --sts sts14_test.csv sts15_test.csv \\
        --topics banking77_train.csv banking77_test.csv
    python examples/compare_rotations.py --smoke                             # synthetic data, a few steps

Rows: truncation; PCA; ITQ (PCA to the largest dim, then the rotation that brings values nearest to signs); 32
Householder reflections, fitted with the objective of `fit_rotation`; `fit_rotation` on pairs, on their texts alone, and
on 1,000 of these. Columns: mean Spearman x100 of the STS sets at each dim, and the share of test texts whose nearest
training text has their label (1-NN, x100).

It also fits the layer cuts: the same STS sets at layers 3 and 4, cut as they are and fitted.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, concatenate_datasets
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from common import load_model
from mipic_st import fit_layer_cuts, fit_rotation
from mipic_st.data import load_sts_file, load_training_file
from mipic_st.demo import synthetic_pairs, synthetic_sts, synthetic_topics
from mipic_st.embedding_store import unit_length
from mipic_st.tails import rotation_objective


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--train", help="pairs: anchor, positive (default: synthetic)")
    parser.add_argument("--sts", nargs="+", default=[], help="sentence1, sentence2, score (default: synthetic)")
    parser.add_argument("--topics", nargs=2, metavar=("TRAIN", "TEST"), help="text, label (default: synthetic)")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 128, 64, 32, 16, 8])
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of fit_rotation; figures are their mean")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file, too")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    return parser.parse_args()


def pca(vectors: np.ndarray) -> np.ndarray:
    """All directions by the variance of unit-length vectors around their mean."""
    return np.linalg.eigh(np.cov(unit_length(vectors).T))[1][:, ::-1].astype(np.float32)


def itq(vectors: np.ndarray, dim: int, rounds: int = 50) -> np.ndarray:
    """PCA to ``dim`` values, then the rotation of these that brings them nearest to their signs (Gong et al. 2011)."""
    frame = pca(vectors)
    turned = unit_length(vectors) @ frame[:, :dim]
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))[0]
    for _ in range(rounds):
        left, _, right = np.linalg.svd(turned.T @ np.sign(turned @ turn))
        turn = left @ right
    return np.concatenate([frame[:, :dim] @ turn, frame[:, dim:]], axis=1).astype(np.float32)


def householder(anchors: np.ndarray, positives: np.ndarray, dims: list[int], count: int, steps: int) -> np.ndarray:
    """A product of a few reflections, with the objective, batches and schedule of ``fit_rotation``."""
    first, second = (torch.tensor(unit_length(vectors)) for vectors in (anchors, positives))
    width = first.shape[1]
    generator = torch.Generator().manual_seed(0)
    mirrors = torch.randn(count, width, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([mirrors], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def product() -> torch.Tensor:
        # two equal reflections cancel, so the product starts near the identity
        matrix = torch.eye(width)
        for mirror, still in zip(mirrors, start, strict=True):
            for vector in (still, mirror):
                unit = vector / vector.norm()
                matrix = matrix - 2 * torch.outer(matrix @ unit, unit)
        return matrix

    start = mirrors.detach().clone()
    for _ in range(steps):
        rows = torch.randperm(len(first), generator=generator)[:4096]
        contrastive = [dim for dim in dims if dim <= 32]
        batch, others = rows.tensor_split([512])
        loss = rotation_objective(
            first[batch],
            second[batch],
            product()[:, : max(dims)],
            sorted(dims),
            contrastive_dims=contrastive,
            negatives=second[others],
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return product().detach().numpy()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    model = load_model(args.model)
    train = load_training_file(args.train) if args.train else Dataset.from_list(synthetic_pairs())
    sts = [load_sts_file(file) for file in args.sts] or [Dataset.from_list(synthetic_sts())]
    topics = [pd.read_csv(file, keep_default_na=False) for file in args.topics or []]
    if not topics:
        rows = pd.DataFrame(synthetic_topics())
        topics = [rows[::2], rows[1::2]]
    if args.smoke:
        train, sts = train.select(range(500)), [sts[0].select(range(60))]
        topics = [part[:80] for part in topics]
    steps = {"max_steps": 10} if args.smoke else {}

    def encode(texts) -> np.ndarray:
        return model.encode(list(texts), batch_size=64, show_progress_bar=False)

    started = time.perf_counter()
    anchors, positives = encode(train["anchor"]), encode(train["positive"])
    print(f"{2 * len(train)} texts encoded in {time.perf_counter() - started:.0f} s")
    pairs = [(encode(part["sentence1"]), encode(part["sentence2"]), part["score"]) for part in sts]
    known, fresh = (encode(part["text"]) for part in topics)
    labels = [part["label"].to_numpy() for part in topics]
    width = anchors.shape[1]
    dims = sorted((dim for dim in args.dims if dim < width), reverse=True)
    texts = np.random.default_rng(0).permutation(np.concatenate([anchors, positives]))

    def figures(matrix: np.ndarray) -> dict[str, float]:
        found = {}
        for dim in [width, *dims]:
            cut = [[unit_length((part @ matrix)[:, :dim]) for part in pair[:2]] for pair in pairs]
            scores = [spearmanr((a * b).sum(1), pair[2]).statistic for (a, b), pair in zip(cut, pairs, strict=True)]
            found[f"sts {dim}"] = 100 * float(np.mean(scores))
            near = (unit_length((fresh @ matrix)[:, :dim]) @ unit_length((known @ matrix)[:, :dim]).T).argmax(axis=1)
            found[f"1-NN {dim}"] = 100 * float(np.mean(labels[0][near] == labels[1]))
        return found

    def fitted(*arrays: np.ndarray) -> Callable[[int], np.ndarray]:
        return lambda seed: fit_rotation(*arrays, dims=dims, seed=seed, **steps).matrix.numpy()

    reflect_steps = 10 if args.smoke else 250
    ways: dict[str, Callable[[int], np.ndarray]] = {
        "truncation": lambda _: np.eye(width, dtype=np.float32),
        "PCA": lambda _: pca(texts),
        "ITQ": lambda _: itq(texts, max(dims)),
        "32 Householder reflections": lambda _: householder(anchors, positives, dims, 32, reflect_steps),
        "rotation, pairs": fitted(anchors, positives),
        "rotation, texts only": fitted(texts),
        "rotation, 1,000 texts": fitted(texts[:1000]),
    }
    rows = {}
    for name, way in ways.items():
        results, seconds = [], []
        for seed in args.seeds if name.startswith("rotation") else [0]:
            started = time.perf_counter()
            matrix = way(seed)
            seconds.append(time.perf_counter() - started)
            results.append(figures(matrix))
        mean = pd.DataFrame(results).mean().to_dict()
        rows[name] = {"seconds": float(np.mean(seconds)), **mean}
    topic_dims = [dim for dim in (64, 16, 8) if dim in dims]
    table = Table(title="mean Spearman x100 of the STS sets, and 1-NN accuracy x100")
    for heading in ("", "fit s", *map(str, [width, *dims]), *(f"1-NN {dim}" for dim in topic_dims)):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        cells = [row[f"sts {dim}"] for dim in [width, *dims]] + [row[f"1-NN {dim}"] for dim in topic_dims]
        table.add_row(name, f"{row['seconds']:.1f}", *(f"{cell:.1f}" for cell in cells))
    Console(width=160).print(table)

    scored = concatenate_datasets([part.select_columns(["sentence1", "sentence2", "score"]) for part in sts])
    columns = [column for column in train.column_names if column != "score"]
    some = list(dict.fromkeys(text for column in columns for text in train[column]))
    started = time.perf_counter()
    cuts = fit_layer_cuts(model, some, layers=args.layers, dims=[width, *dims], sts=scored, batch_size=64)
    seconds = time.perf_counter() - started
    print(f"\nlayer cuts, all STS pairs together: one encoding and all fits in {seconds:.0f} s")
    print(cuts.to_frame().round(3).to_string(index=False))
    if args.json:
        args.json.write_text(json.dumps({"rotations": rows, "cuts": cuts.report}, indent=1) + "\n")


if __name__ == "__main__":
    main()
