"""Ways to choose the first values of an embedding, without training: quality at each dim, and the time each takes.

    python examples/benchmarks/compare_rotations.py --train mix.csv --sts sts14_test.csv sts15_test.csv \\
        --cut-sts sts13_test.csv sts14_test.csv sts15_test.csv --topics banking77_train.csv banking77_test.csv
    python examples/benchmarks/compare_rotations.py --smoke                             # synthetic data, a few steps

Rows: truncation; PCA; ITQ (PCA to the largest dim, then the rotation that brings values nearest to signs); 32
Householder reflections, fitted with the objective of `fit_rotation`; `fit_rotation` on pairs, on their texts alone, on
1,000 of these, and on pairs of the topics' training texts alone, which are foreign to the STS sets. Columns: seconds of
the fit, mean Spearman x100 of the STS sets at each dim, the share of test texts whose nearest training text has their
label (1-NN, x100), and the dims that the fit itself warns of.

A second table has the layer cuts: layers 3 and 4 as they are, fitted, and fitted to the rotated vectors.
"""

from __future__ import annotations

import os
import sys

if not any(argument.startswith("--m") for argument in sys.argv):  # --model, or --model=NAME
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize

from mipic_st import Rotation, export_truncated, fit_layer_cuts, fit_rotation
from mipic_st.data import load_sts_file, load_training_file
from mipic_st.demo import synthetic_pairs, synthetic_sts, synthetic_topics
from mipic_st.encoder.surgery import identity_dense
from mipic_st.numerics import unit_length
from mipic_st.transforms.objectives import RotationObjective

sys.path.append(str(Path(__file__).parents[1]))  # what the example scripts share
from common import load_model, sentences_of


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--train", help="pairs: anchor, positive (default: synthetic)")
    parser.add_argument("--sts", nargs="+", default=[], help="sentence1, sentence2, score (default: synthetic)")
    parser.add_argument("--cut-sts", nargs="+", default=[], help="for the layer cuts (default: those of --sts)")
    parser.add_argument("--topics", nargs=2, metavar=("TRAIN", "TEST"), help="text, label (default: synthetic)")
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 128, 64, 32, 16, 8])
    parser.add_argument("--layers", type=int, nargs="*", default=[3, 4], help="none: no layer cuts")
    parser.add_argument("--pairs", type=int, help="fit on so many of the pairs (default: all)")
    parser.add_argument("--bf16", action="store_true", help="encode in bfloat16 autocast, for large models on a CPU")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of fit_rotation; figures are their mean")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to this file, too")
    parser.add_argument("--smoke", action="store_true", help="a few steps on a few rows, to see that all runs")
    return parser.parse_args()


def pca(vectors: np.ndarray) -> np.ndarray:
    """All directions by the variance of unit-length vectors around their mean."""
    return np.linalg.eigh(np.cov(unit_length(vectors).T))[1][:, ::-1].astype(np.float32)


def itq(vectors: np.ndarray, dim: int, rounds: int = 50, seed: int = 0) -> np.ndarray:
    """PCA to ``dim`` values, then the rotation of these that brings them nearest to their signs (Gong et al. 2011)."""
    frame = pca(vectors)
    turned = unit_length(vectors) @ frame[:, :dim]
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))[0]
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
        objective = RotationObjective(sorted(dims), contrastive)
        loss = objective(first[batch], second[batch], product()[:, : max(dims)], negatives=second[others])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return product().detach().numpy()


def topic_pairs(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of texts with equal labels, two by two and each once."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first, second = order[:-1:2], order[1::2]
    equal = labels[first] == labels[second]
    return first[equal], second[equal]


def mean_spearman(pairs: list[tuple], dim: int) -> float:
    """x100, over sets of (vectors, vectors, scores), each vector cut to ``dim``."""
    cut = [(*(unit_length(part[:, :dim]) for part in pair[:2]), pair[2]) for pair in pairs]
    return 100 * float(np.mean([spearmanr((a * b).sum(axis=1), scores).statistic for a, b, scores in cut]))


def table_of(title: str, rows: dict[str, dict[str, str]]) -> Table:
    """One row per name, one column per heading."""
    table = Table(title=title)
    headings = list(next(iter(rows.values())))
    for heading in ("", *headings):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        table.add_row(name, *(row[heading] for heading in headings))
    return table


def layer_cuts(
    model: SentenceTransformer,
    train: Dataset,
    layers: list[int],
    dims: list[int],
    turn: Rotation,
    sts: list[Dataset],
    encode_pairs: Callable[[Dataset, SentenceTransformer], tuple],
    steps: dict[str, int],
) -> tuple[dict[str, dict[str, float]], list[dict[str, float]]]:
    """Score each layer cut as it is, fitted, and fitted to rotated vectors; and what held-out texts say."""
    unscaled = list(model)
    while isinstance(unscaled[-1], Normalize):
        unscaled.pop()
    dense = identity_dense(torch.from_numpy(turn.matrix)).to(model.device)
    rotated = SentenceTransformer(modules=[*unscaled, dense, Normalize()])
    models, report = {"full depth": model, "full depth, rotated": rotated}, []
    for what, start in (("fitted", model), ("fitted, rotated", rotated)):
        started = time.perf_counter()
        cuts = fit_layer_cuts(start, sentences_of(train), layers=layers, dims=dims, batch_size=64, **steps)
        print(f"layer cuts, {what}: one encoding and all fits in {time.perf_counter() - started:.0f} s")
        report += [{"model": what, **cell} for cell in cuts.report]
        for layer in layers:
            if start is model:
                models[f"layer {layer}, as it is"] = export_truncated(model, layer)
            models[f"layer {layer}, {what}"] = export_truncated(start, layer, cuts=cuts)
    scores = {}
    for name in sorted(models, key=lambda name: name.split(",")[0]):
        found = [encode_pairs(part, models[name]) for part in sts]
        scores[name] = {str(dim): mean_spearman(found, dim) for dim in dims}
    return scores, report


def main() -> None:
    args = parse_args()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    model = load_model(args.model)
    train = load_training_file(args.train) if args.train else Dataset.from_list(synthetic_pairs())
    sts = [load_sts_file(file) for file in args.sts] or [Dataset.from_list(synthetic_sts())]
    cut_sts = [load_sts_file(file) for file in args.cut_sts] or sts
    topics = [pd.read_csv(file, keep_default_na=False) for file in args.topics or []]
    if not topics:
        topics = [pd.DataFrame(synthetic_topics(split=split)) for split in ("train", "eval")]
    if args.pairs:
        train = train.shuffle(seed=0).select(range(min(args.pairs, len(train))))
    if args.smoke:
        train, sts = train.select(range(min(500, len(train)))), [sts[0].select(range(60))]
        cut_sts = sts
        topics = [topics[0][:400], topics[1][:80]]
    steps = {"max_steps": 10} if args.smoke else {}

    def encode(texts, with_model=model) -> np.ndarray:
        with torch.autocast(with_model.device.type, torch.bfloat16, enabled=args.bf16):
            vectors = with_model.encode(list(texts), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().cpu().numpy()

    def encode_pairs(data: Dataset, with_model=model) -> tuple:
        return *(encode(data[name], with_model) for name in ("sentence1", "sentence2")), data["score"]

    started = time.perf_counter()
    anchors, positives = encode(train["anchor"]), encode(train["positive"])
    print(f"{2 * len(train)} texts encoded in {time.perf_counter() - started:.0f} s")
    pairs = [encode_pairs(part) for part in sts]
    known, fresh = (encode(part["text"]) for part in topics)
    labels = [part["label"].to_numpy() for part in topics]
    width = anchors.shape[1]
    dims = sorted((dim for dim in args.dims if dim < width), reverse=True)
    texts = np.random.default_rng(0).permutation(np.concatenate([anchors, positives]))
    first, second = topic_pairs(labels[0])

    def figures(rotation: Rotation) -> dict[str, float]:
        turned = [(rotation(a), rotation(b), scores) for a, b, scores in pairs]
        found = {f"sts {dim}": mean_spearman(turned, dim) for dim in [width, *dims]}
        for dim in dims:
            near = (rotation(fresh, dim) @ rotation(known, dim).T).argmax(axis=1)
            found[f"1-NN {dim}"] = 100 * float(np.mean(labels[0][near] == labels[1]))
        return found

    def fixed(matrix: np.ndarray) -> Rotation:
        return Rotation(torch.from_numpy(matrix), tuple(dims))

    def fitted(*arrays: np.ndarray) -> Callable[[int], Rotation]:
        return lambda seed: fit_rotation(*arrays, dims=dims, seed=seed, **steps)

    reflect_steps = 10 if args.smoke else 250
    ways: dict[str, Callable[[int], Rotation]] = {
        "truncation": lambda _: fixed(np.eye(width, dtype=np.float32)),
        "PCA": lambda _: fixed(pca(texts)),
        "ITQ": lambda _: fixed(itq(texts, max(dims))),
        "32 Householder reflections": lambda _: fixed(householder(anchors, positives, dims, 32, reflect_steps)),
        "rotation, pairs": fitted(anchors, positives),
        "rotation, texts only": fitted(texts),
        "rotation, 1,000 texts": fitted(texts[:1000]),
        "rotation, topics alone": fitted(known[first], known[second]),
    }
    results, rotations = {}, {}
    for name, way in ways.items():
        found, seconds, warned = [], [], set()
        for seed in args.seeds if name.startswith("rotation") else [0]:
            started = time.perf_counter()
            rotations[name] = way(seed)
            seconds.append(time.perf_counter() - started)
            warned |= set(rotations[name].worse_dims)
            found.append(figures(rotations[name]))
        results[name] = {
            "seconds": float(np.mean(seconds)),
            **pd.DataFrame(found).mean().to_dict(),
            "warned": sorted(warned),
        }
    topic_dims = [dim for dim in (64, 16, 8) if dim in dims]
    shown = {
        name: {
            "fit s": f"{row['seconds']:.1f}",
            **{str(dim): f"{row[f'sts {dim}']:.1f}" for dim in [width, *dims]},
            **{f"1-NN {dim}": f"{row[f'1-NN {dim}']:.1f}" for dim in topic_dims},
            "warns of": " ".join(map(str, row["warned"])) or "-",
        }
        for name, row in results.items()
    }
    console = Console(width=160)
    console.print(table_of("mean Spearman x100 of the STS sets, and 1-NN accuracy x100", shown))

    by_layer, held_out = {}, []
    if args.layers:
        by_layer, held_out = layer_cuts(
            model, train, args.layers, [width, *dims], rotations["rotation, pairs"], cut_sts, encode_pairs, steps
        )
        rounded = {name: {dim: f"{value:.1f}" for dim, value in row.items()} for name, row in by_layer.items()}
        console.print(table_of("layer cuts: mean Spearman x100 of the STS sets", rounded))
    if args.json:
        report = {"rotations": results, "cuts": by_layer, "cuts, held-out texts": held_out}
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
