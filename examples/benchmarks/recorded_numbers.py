"""Record what the package computes, and compare it with what another version of the package computes.

    python examples/benchmarks/recorded_numbers.py record before.npz
    python examples/benchmarks/recorded_numbers.py compare before.npz
    python examples/benchmarks/recorded_numbers.py compare before.npz --only loss/bert

For changes of the code that must not change a value: record with the old code, compare with the new one. Which version
of ``mipic_st`` runs is what Python imports; ``PYTHONPATH=OTHER/src`` in front of the command picks another one.

The numbers are those of small random models of twelve architectures, made on the spot, on one thread of a CPU and
without a network: losses with their gradients, a short training with a resume, rotations, layer cuts, scores per
dimension, vectors of exported models. Large arrays are kept as their sum, their norm and a few of their values.

A number counts as changed if it is off by more than 1e-6 of the largest value of its array; the table also says whether
all are equal to the last bit, which they should be on the machine and with the versions that recorded them. Where only
the order of a sum was changed, gradients may be off by some 1e-6: try --tolerance 1e-5. A gradient that is zero but for
rounding, below 5e-8 of the largest gradient of its loss in both versions, does not count. A case that fails counts as
missing. A name that was changed goes into ALIASES, PLACES, VALUES or PARAMETERS below; arrays keep the name that stands
first there.
"""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")

import argparse
import copy
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import logging
import platform
import random
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    SequentialEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import mipic_st

Numbers = dict[str, np.ndarray]

# --- names ------------------------------------------------------------------------------------------------------------

# Public functions, arguments, attributes, terms and keys of reports: the name used here, and its other spellings.
ALIASES: dict[str, tuple[str, ...]] = {
    "add_teacher_vectors": ("add_distillation_vectors",),
    "detach_full_width": ("detach_teacher",),
    "distill_weight": ("teacher_weight",),
    "distill_temperature": ("teacher_temperature",),
    "distillation": ("teacher",),
}
# What is no public name: the modules that may hold it.
PLACES = {"EmbeddingStore": ("mipic_st.evaluation.store", "mipic_st.embedding_store")}
# Settings whose value is a name: its spellings, of which the first that is accepted counts.
VALUES = {"teacher_student": ("full_prefix", "teacher_student")}
# Beginnings of the names of the loss's own parameters, and what stands for them here.
PARAMETERS = [(r"^mipic_projections\.", "")]

TOLERANCE = 1e-6
ZERO = 5e-8  # gradients below this share of the largest of their loss are zero but for rounding
NOTES = "versions.json"  # the one entry that is no array of numbers


def spelled(name: str, known: Iterable[str]) -> str:
    """The spelling of a name that is known; the name itself if none is."""
    known = set(known)
    return next((one for one in (name, *ALIASES.get(name, ())) if one in known), name)


def first_name(name: str) -> str:
    """The name used here for any of its spellings."""
    return next((first for first, others in ALIASES.items() if name in others), name)


def attribute(owner: Any, name: str) -> Any:
    return getattr(owner, spelled(name, dir(owner)))


def public(name: str) -> Any:
    """A public name of the package, or one of PLACES."""
    for place in PLACES.get(name, ()):
        try:
            return getattr(importlib.import_module(place), name)
        except ModuleNotFoundError as error:
            if not str(error.name).startswith("mipic_st"):
                raise
    return attribute(mipic_st, name)


def call(function: Callable, *given: Any, **options: Any) -> Any:
    """Call with arguments under the names, and with the values, that this version of the function knows."""
    known = inspect.signature(function).parameters
    options = {spelled(name, known): value for name, value in options.items()}
    name, spellings = next(
        ((name, VALUES[value]) for name, value in options.items() if isinstance(value, str) and value in VALUES),
        ("", ()),
    )
    for value in spellings[:-1]:
        try:
            return function(*given, **options | {name: value})
        except ValueError:
            continue
    return function(*given, **options | ({name: spellings[-1]} if name else {}))


# --- models and texts -------------------------------------------------------------------------------------------------

WIDTH, DEPTH, DIMS = 32, 3, [32, 16, 8, 4]
WORDS = (
    "a an every no some this that many few six seven green yellow tall short quiet sudden wooden girl boy bird horse "
    "farmer teacher walks builds paints drops carries finds window garden bridge boat story lamp market over under "
    "beside through before after gladly never"
)
VOCABULARY = WORDS.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 72,
    "pad_token_id": 0,
    "vocab_size": len(SPECIAL) + len(VOCABULARY),
}
MARKS = {"bos_token_id": 2, "eos_token_id": 3}


def dense(inner: int, outer: int, bias: bool = False, activation: Any = torch.nn.Identity) -> Dense:
    return Dense(inner, outer, bias=bias, activation_function=activation())


@dataclass(frozen=True)
class Architecture:
    """A config class of transformers with its options, and what stands behind the encoder."""

    config: str
    options: dict[str, Any] = field(default_factory=dict)
    pooling: str = "mean"
    tail: Callable[[], list] = list
    left: bool = False


ARCHITECTURES = {
    "bert": Architecture("BertConfig"),
    "distilbert": Architecture(
        "DistilBertConfig", {"dim": WIDTH, "n_heads": 4, "hidden_dim": 40, "n_layers": DEPTH}, "cls"
    ),
    "mpnet": Architecture("MPNetConfig", tail=lambda: [Normalize()]),
    "xlm-roberta": Architecture("XLMRobertaConfig", pooling="cls", tail=lambda: [Normalize()]),
    "modernbert": Architecture("ModernBertConfig", MARKS | {"cls_token_id": 2, "sep_token_id": 3}),
    "qwen3": Architecture("Qwen3Config", {"head_dim": 8, "num_key_value_heads": 2}, "lasttoken", left=True),
    "t5": Architecture(
        "T5Config", {"d_model": WIDTH, "d_kv": 8, "d_ff": 40, "num_heads": 4}, tail=lambda: [dense(32, 24), Normalize()]
    ),
    "electra": Architecture("ElectraConfig", {"embedding_size": 16}, "weightedmean"),
    "deberta-v2": Architecture(
        "DebertaV2Config", {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}, "cls"
    ),
    "albert": Architecture("AlbertConfig", {"embedding_size": 16}, "max"),
    "gemma3": Architecture(
        "Gemma3TextConfig",
        MARKS | {"head_dim": 8, "num_key_value_heads": 2},
        tail=lambda: [dense(32, 48), dense(48, 32), Normalize()],
    ),
    "roberta": Architecture(
        "RobertaConfig", MARKS, tail=lambda: [dense(32, 32, bias=True, activation=torch.nn.Tanh), Normalize()]
    ),
}


def make_tokenizer(left: bool) -> transformers.PreTrainedTokenizerFast:
    """Every word of the vocabulary is a token."""
    numbers = {token: number for number, token in enumerate(SPECIAL + VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    side = "left" if left else "right"
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, padding_side=side, **names
    )


@cache
def folder_of_models() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="recorded-numbers-")


@cache
def loaded(name: str, layers: int, normalize: bool) -> SentenceTransformer:
    made = ARCHITECTURES[name]
    depth = {"num_layers": layers} if name == "t5" else {"num_hidden_layers": layers}
    config = getattr(transformers, made.config)(**SIZES | depth | made.options)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(11)
        encoder = transformers.AutoModel.from_config(config)
        for key, weight in encoder.named_parameters():
            # Random encoders are nearly linear and their norms all ones; formulas that differ shall give other numbers.
            if weight.ndim > 1:
                weight.mul_(1 if name == "t5" else 3)  # T5's are wide already
            elif "norm" in key.lower() and key.endswith("weight"):
                weight.add_(torch.randn_like(weight), alpha=0.2)
        tail = [*made.tail(), *([Normalize()] if normalize else [])]
        for module in tail:
            for weight in module.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.2)
    place = Path(folder_of_models().name) / f"{name}-{layers}"
    encoder.save_pretrained(place)
    make_tokenizer(made.left).save_pretrained(place)
    transformer = Transformer(str(place))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), made.pooling), *tail]
    return SentenceTransformer(modules=modules, device="cpu").eval()


def make_model(name: str = "bert", layers: int = DEPTH, normalize: bool = False) -> SentenceTransformer:
    """A fresh copy of a small model, in evaluation mode."""
    return copy.deepcopy(loaded(name, layers, normalize))


def make_texts(count: int, seed: int, shortest: int = 1, longest: int = 12) -> list[str]:
    """Different texts of random words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choices(VOCABULARY, k=draw.randint(shortest, longest)))] = None
    return list(found)


def make_pairs(count: int, seed: int) -> dict[str, list[str]]:
    """Texts, and the same with two words put behind."""
    draw, anchors = random.Random(seed + 1), make_texts(count, seed, shortest=3)
    return {
        "anchor": anchors,
        "positive": [f"{text} {' '.join(draw.choices(VOCABULARY, k=2))}" for text in anchors],
    }


# --- what is kept -----------------------------------------------------------------------------------------------------


def digest(values: torch.Tensor | np.ndarray, count: int = 8) -> np.ndarray:
    """Sum, norm and some of the values, at places that depend on the size alone; all values where these are few."""
    flat = torch.as_tensor(values).detach().cpu().double().flatten().numpy()
    places = np.sort(np.random.default_rng(flat.size).permutation(flat.size)[:count])
    return np.concatenate([[flat.sum(), np.sqrt(flat @ flat)], flat[places]])


def rows_of(report: Iterable[dict[str, Any]], keys: tuple[str, ...], values: tuple[str, ...] = ()) -> Numbers:
    """Numbers of a table with one dict per row, named by the row's ``keys``; all others, or ``values`` alone."""
    found: Numbers = {}
    for row in report:
        named = {first_name(name): value for name, value in row.items()}
        place = "-".join(str(named[key]) for key in keys)
        wanted = values or [name for name in named if name not in keys]
        found |= {f"report/{place}/{name}": np.asarray(float(named[name])) for name in wanted}
    return found


# --- losses -----------------------------------------------------------------------------------------------------------

EVERY_TERM = {
    "alpha": 0.4,
    "attention_weight": 1.0,
    "cka_weight": 1.0,
    "pic_weight": 0.5,
    "sia_layers": [1, 3],
    "min_k": 2,
    "lift_init": "identity",
    "detach_full_width": False,
}


@dataclass(frozen=True)
class Setting:
    """One configuration of the loss, and the batch that it gets."""

    options: dict[str, Any] = field(default_factory=dict)
    base: Callable = losses.MultipleNegativesRankingLoss
    preset: str = ""
    labels: str = ""
    columns: int = 2
    training: bool = False
    empty: bool = False
    half: bool = False
    plain: bool = False


def cached_ranking(model: SentenceTransformer) -> torch.nn.Module:
    return losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=4)


def cached_gist(model: SentenceTransformer) -> torch.nn.Module:
    return losses.CachedGISTEmbedLoss(model, make_model("bert"), mini_batch_size=3)


def mega_batch(model: SentenceTransformer) -> torch.nn.Module:
    return losses.MegaBatchMarginLoss(model, mini_batch_size=4)


EVERYWHERE = {
    "defaults": Setting(),
    "every_term": Setting(EVERY_TERM),
    "paper": Setting(preset="paper"),
    "alpha_one": Setting({"alpha": 1.0}, plain=True),
    "distillation": Setting({"distill_weight": 4.0}, labels="vectors"),
    "cached": Setting(EVERY_TERM, base=cached_ranking),
    "cosent": Setting(base=losses.CoSENTLoss, labels="scores"),
}
ATTENTION = Setting(EVERY_TERM | {"token_importance": "attention"})
SOMEWHERE = {
    "bert": {
        "attention": ATTENTION,
        "released": Setting(preset="released"),
        "mean": Setting(EVERY_TERM | {"aggregation": "mean"}),
        "orthogonal": Setting(EVERY_TERM | {"lift_init": "orthogonal", "seed": 5, "gammas": [0.3, 0.5, 0.9]}),
        "reverse": Setting(EVERY_TERM | {"kl_direction": "teacher_student"}),
        "weights": Setting(
            EVERY_TERM | {"matryoshka_weights": [1.0, 0.5, 0.25, 2.0], "pic_chain": [(4, 1), (16, 2), (32, 3)]}
        ),
        "temperatures": Setting(
            EVERY_TERM
            | {"distill_weight": 1.0, "distill_temperature": 0.3}
            | {"attention_temperature": 0.2, "chain_temperature": 0.1},
            labels="vectors",
        ),
        "three_columns": Setting(EVERY_TERM, columns=3),
        "cached_three_columns": Setting(EVERY_TERM, base=cached_ranking, columns=3),
        "cached_distillation": Setting({"distill_weight": 4.0}, base=cached_ranking, labels="vectors"),
        "cached_attention": Setting(ATTENTION.options, base=cached_ranking),
        "cached_gist": Setting(EVERY_TERM, base=cached_gist, columns=3),
        "mega_batch": Setting(EVERY_TERM, base=mega_batch),
        "bfloat16": Setting(EVERY_TERM | {"distill_weight": 1.0}, labels="vectors", half=True),
        "dropout": Setting(EVERY_TERM, training=True),
        "cached_dropout": Setting(EVERY_TERM, base=cached_ranking, training=True),
    },
    "mpnet": {"attention": ATTENTION},
    "qwen3": {"attention": ATTENTION},
    # only where the vector of an empty text is the bias of the tail does the base loss have a gradient
    "roberta": {"empty_text": Setting(EVERY_TERM, empty=True)},
}


def loss_numbers(name: str, setting: Setting, work: Path) -> Numbers:
    """Every term, and the gradient of their sum by parameter."""
    rows, model = 8, make_model(name)
    if setting.half:
        model.bfloat16()
    width = model.get_embedding_dimension()
    dims = [width, *(dim for dim in DIMS if dim < width)]
    base = setting.base(model)
    if setting.preset:
        loss = mipic_st.MIPICLoss.from_preset(model, base, setting.preset, dims)
    else:
        loss = call(mipic_st.MIPICLoss, model, base, dims, **setting.options)
    model.train(setting.training)
    features = [model.preprocess(make_texts(rows, seed, longest=30)) for seed in range(setting.columns)]
    if setting.empty:
        features[0]["attention_mask"][2] = 0
    labels = None
    if setting.labels == "scores":
        labels = torch.linspace(0, 1, rows)[torch.randperm(rows, generator=torch.Generator().manual_seed(2))]
    elif setting.labels:
        labels = torch.randn(rows, setting.columns, 24, generator=torch.Generator().manual_seed(3))
    terms, gradients = one_step(loss, model, features, labels)
    found = {f"term/{first_name(term)}": np.asarray(value) for term, value in terms.items()}
    found |= {f"gradient/{parameter}": digest(gradient) for parameter, gradient in gradients.items()}
    if setting.plain:
        whole = losses.MatryoshkaLoss(model, setting.base(model), dims)
        others, plain_gradients = one_step(whole, model, features, labels)
        apart = [abs(sum(others.values()) - sum(terms.values()))]
        apart += [float((plain_gradients[key] - gradients[key]).abs().max()) for key in plain_gradients]
        found["off_from_matryoshka_loss"] = np.asarray([*apart, len(gradients) - len(plain_gradients)])
    return found


def one_step(
    loss: torch.nn.Module, model: torch.nn.Module, features: list[dict], labels: torch.Tensor | None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Terms, and gradients under names that do not depend on how the loss holds the model."""
    loss.zero_grad(set_to_none=True)
    torch.manual_seed(21)
    terms = loss([dict(column) for column in features], labels)
    terms = terms if isinstance(terms, dict) else {"loss": terms}
    torch.stack([term.float() for term in terms.values()]).sum().backward()
    named = own_names(loss, model)
    gradients = {name: parameter.grad.clone() for name, parameter in named.items() if parameter.grad is not None}
    return {name: float(term.detach()) for name, term in terms.items()}, gradients


def own_names(loss: torch.nn.Module, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters of the model, and those that the loss adds."""
    named = {f"model/{name}": parameter for name, parameter in model.named_parameters()}
    known = {id(parameter) for parameter in named.values()}
    for name, parameter in loss.named_parameters():
        if id(parameter) not in known:
            for start, instead in PARAMETERS:
                name = re.sub(start, instead, name)
            named[f"loss/{name}"] = parameter
    return named


def distillation_vectors(work: Path) -> Numbers:
    """The vectors that a larger model adds to a dataset."""
    data = public("add_teacher_vectors")(
        Dataset.from_dict(make_pairs(12, 30)), make_model("t5", layers=5), batch_size=5, show_progress_bar=False
    )
    (column,) = (name for name in data.column_names if name not in ("anchor", "positive"))
    return {"vectors": np.asarray(data[column][:])}


# --- training ---------------------------------------------------------------------------------------------------------


def training(options: dict[str, Any], with_callback: bool, work: Path) -> Numbers:
    """Three steps straight, and the third once more from the checkpoint before it."""

    def run(folder: Path, checkpoint: Path | None) -> tuple[dict[str, torch.Tensor], Numbers]:
        model = make_model()
        loss = call(mipic_st.MIPICLoss, model, losses.MultipleNegativesRankingLoss(model), DIMS, **options)
        settings = SentenceTransformerTrainingArguments(
            output_dir=str(folder),
            max_steps=3,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_steps=2,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=4,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_dict(make_pairs(40, 50)),
            loss=loss,
            callbacks=[mipic_st.MIPICCallback(loss)] if with_callback else [],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        logged = [entry for entry in trainer.state.log_history if "loss" in entry or "matryoshka" in entry]
        numbers = {
            f"step{entry['step']}/{first_name(key)}": np.asarray(float(value))
            for entry in logged
            for key, value in entry.items()
            if isinstance(value, (int, float)) and key not in ("step", "epoch")
        }
        return {name: value.detach().clone() for name, value in own_names(loss, model).items()}, numbers

    straight, logged = run(work / "run", None)
    resumed, again = run(work / "run", work / "run" / "checkpoint-2")
    found = {f"straight/{name}": value for name, value in logged.items()}
    found |= {f"resumed/{name}": value for name, value in again.items()}
    for kind, parameters in (("straight", straight), ("resumed", resumed)):
        # the gradient of a key's bias is zero but for rounding, and Adam makes steps of full size of it
        kept = {name: value for name, value in parameters.items() if not name.endswith("key.bias")}
        found |= {f"{kind}/{name}": digest(value) for name, value in kept.items()}
    apart = max(float((straight[name] - resumed[name]).abs().max()) for name in straight)
    return found | {"resumed_off_from_straight": np.asarray(apart)}


# --- rotations and layer cuts -----------------------------------------------------------------------------------------


def structured(count: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of few directions of falling size and some noise, and others near them."""
    draw = np.random.default_rng(seed)
    inner = draw.normal(size=(count, 10)) * np.linspace(2, 0.3, 10)
    mixing = draw.normal(size=(10, width))
    return tuple(
        ((inner + shift * draw.normal(size=inner.shape)) @ mixing + draw.normal(size=(count, width))).astype(np.float32)
        for shift in (0, 0.3)
    )


FIT = {"max_steps": 25, "show_progress_bar": False}


def rotated(rotation: Any) -> Numbers:
    return {"matrix": digest(attribute(rotation, "matrix"), 64)} | rows_of(attribute(rotation, "report"), ("dim",))


def fitted_rotation(given: str, width: int, options: dict[str, Any], work: Path) -> Numbers:
    """A rotation of arrays or tensors, of pairs or of texts only, and some vectors through it."""
    vectors, others = structured(400, width, 1)
    pair = [vectors] if given == "texts" else [vectors, others]
    if given == "torch":
        pair = [torch.from_numpy(part) for part in pair]
    rotation = call(mipic_st.fit_rotation, *pair, **FIT | options)
    found = rotated(rotation)
    for dim in (None, 8):
        found[f"vectors/{dim or 'all'}"] = digest(rotation(pair[0][:20], dim), 64)
    rotation.save(work / "rotation.safetensors")
    again = mipic_st.Rotation.load(work / "rotation.safetensors")
    return found | {"loaded_off": np.asarray(float(abs(again.matrix - rotation.matrix).max()))}


def rotated_model(name: str, kind: str, work: Path) -> Numbers:
    """A rotation that was fitted on texts and put into a model."""
    model, pairs = make_model(name, normalize=name == "bert"), make_pairs(300, 60)
    if kind == "scored":
        pairs["score"] = [float(row % 3 > 0) for row in range(300)]
    data = pairs["anchor"] if kind == "texts" else Dataset.from_dict(pairs)
    fit = {"max_steps": 60, "show_progress_bar": False}
    rotation = call(mipic_st.rotate_model, model, data, [16, 8, 4], **fit)
    modules = np.asarray([len(list(model.children())), float(attribute(rotation, "gained"))])
    return rotated(rotation) | {"modules": modules, "vectors": model.encode(make_texts(6, 61))}


def fit_cuts(model: SentenceTransformer, **options: Any) -> Any:
    settings = {"layers": [1, 2], "dims": [8, 24], "max_steps": 30, "show_progress_bar": False}
    return call(mipic_st.fit_layer_cuts, model, make_texts(500, 70), **settings | options)


def layer_cuts(name: str, layers: int, options: dict[str, Any], work: Path) -> Numbers:
    """Maps, word weights and the report of cuts at two layers."""
    scored = (make_texts(30, 71), make_texts(30, 72), [float(7 * row % 11) for row in range(30)])
    cuts = fit_cuts(make_model(name, layers), sts=scored, **options)
    found = {f"map/{layer}": digest(weight, 64) for layer, weight in attribute(cuts, "maps").items()}
    weighed = attribute(cuts, "word_weights")
    found |= {f"word_weights/{layer}": digest(weights, 64) for layer, weights in weighed.items()}
    return found | rows_of(attribute(cuts, "report"), ("layer", "dim"))


# --- evaluation -------------------------------------------------------------------------------------------------------

PRECISIONS = ["float32", "int8", "binary"]


def local_tasks() -> list[Any]:
    """Tasks of MTEB with made-up data: similarity of sentences, and classification."""
    import mteb

    sts, classes = mteb.get_task("STS13"), mteb.get_task("Banking77Classification")
    scores = [float(5 * row % 6) for row in range(24)]
    pairs = {"sentence1": make_texts(24, 80), "sentence2": make_texts(24, 81), "score": scores}
    sts.dataset = DatasetDict({"test": Dataset.from_dict(pairs)})
    names = ["boat", "lamp", "horse"]
    classes.dataset = DatasetDict()
    for seed, part in enumerate(("train", "test"), 82):
        texts = [f"{names[row % 3]} {text}" for row, text in enumerate(make_texts(36, seed))]
        labels = [names[row % 3] for row in range(36)]
        classes.dataset[part] = Dataset.from_dict({"text": texts, "label": labels})
    classes.samples_per_label, classes.n_experiments = 5, 2
    for task in (sts, classes):
        task.data_loaded = True
    return [sts, classes]


def mteb_scores(options: dict[str, Any], work: Path) -> Numbers:
    report = call(
        mipic_st.evaluate_mteb,
        make_model(layers=4, normalize=True),
        local_tasks(),
        [4, 8, 32],
        output=work / "results",
        precisions=PRECISIONS,
        show_progress_bar=False,
        **options,
    )
    return rows_of(attribute(report, "records"), ("task", "dim", "precision"), ("score",))


def evaluator_scores(normalize: bool, options: dict[str, Any], work: Path) -> Numbers:
    """Metrics of three evaluators in a row."""
    left, right = make_texts(30, 90, shortest=2), make_texts(30, 91, shortest=2)
    labels = [row % 3 for row in range(30)]
    documents = {str(row): text for row, text in enumerate(right)}
    queries, relevant = {str(row): left[row] for row in range(8)}, {str(row): {str(row), "20"} for row in range(8)}
    scores = [float(11 * row % 31) for row in range(30)]
    parts = [
        EmbeddingSimilarityEvaluator(left, right, scores, name="sts", similarity_fn_names=["cosine", "dot"]),
        InformationRetrievalEvaluator(queries, documents, relevant, name="search"),
        mipic_st.ClassificationProbeEvaluator(
            left, labels, right, labels, name="probe", n_experiments=2, samples_per_label=5
        ),
    ]
    model = make_model(layers=4, normalize=normalize)
    metrics = call(mipic_st.MatryoshkaEvaluator, SequentialEvaluator(parts), [4, 8, 32], **options)(model)
    return {name: np.asarray(float(value)) for name, value in metrics.items() if not isinstance(value, str)}


def store_views(layers: list[int] | None, work: Path) -> Numbers:
    """Vectors of the store at every dim, layer and precision."""
    texts, found = make_texts(20, 95), {}
    with public("EmbeddingStore")(make_model("qwen3", layers=4), layers) as store:
        for precision in PRECISIONS:
            if precision == "int8":
                store.calibrate()
            for layer in layers or [None]:
                for dim in (4, 8, 32):
                    for normalize in (True, False):
                        view = call(store.view, dim, layer=layer, precision=precision, normalize=normalize)
                        name = f"{'last' if layer is None else layer}-{dim}-{precision}-{normalize}"
                        found[name] = digest(view.encode(texts), 32)
    return found


# --- exports ----------------------------------------------------------------------------------------------------------

READ = make_texts(6, 99)


def cut_model(name: str, layer: int | None, dim: int | None, cuts: dict[str, Any] | None, work: Path) -> Numbers:
    """Vectors of a model without its last layers or dims, also after it was saved and loaded."""
    model = make_model(name, layers=6, normalize=name == "bert")
    given = {} if cuts is None else {"cuts": fit_cuts(model, layers=[layer], **cuts)}
    small = call(mipic_st.export_truncated, model, layer=layer, dim=dim, **given)
    small.save_pretrained(str(work / "small"))
    return {
        "modules": np.asarray(len(list(small.children()))),
        "vectors": small.encode(READ),
        "loaded": SentenceTransformer(str(work / "small"), device="cpu").encode(READ),
    }


def rotated_by_hand(name: str) -> SentenceTransformer:
    """A model whose last map of its tail is a rotation of random directions."""
    model = make_model(name)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))
    layer = Dense(WIDTH, WIDTH, bias=False, activation_function=torch.nn.Identity(), init_weight=turned)
    return SentenceTransformer(modules=[*model.children(), layer, Normalize()], device="cpu").eval()


def for_tei(name: str, work: Path) -> Numbers:
    mipic_st.save_for_tei(rotated_by_hand(name), work / "tei")
    return {"vectors": SentenceTransformer(str(work / "tei"), device="cpu").encode(READ)}


def onnx_file(name: str, work: Path) -> Numbers:
    """Token states that the file gives on one thread."""
    import onnxruntime

    model, options = rotated_by_hand(name), onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    file = mipic_st.export_onnx(model, work / "onnx")
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    given = model.preprocess(READ)
    (states,) = session.run(None, {one.name: given[one.name].numpy().astype(np.int64) for one in session.get_inputs()})
    real = states * given["attention_mask"].numpy()[:, :, None]
    return {"states": digest(real, 64), "sums": real.sum(axis=1)}


# --- all of them ------------------------------------------------------------------------------------------------------


def all_cases() -> dict[str, Callable[[Path], Numbers]]:
    """Every case by its name; what it computes lies below that name."""
    cases: dict[str, Callable[[Path], Numbers]] = {}
    for name in ARCHITECTURES:
        for title, setting in (EVERYWHERE | SOMEWHERE.get(name, {})).items():
            cases[f"loss/{name}/{title}"] = partial(loss_numbers, name, setting)
    cases["loss/distillation_vectors"] = distillation_vectors
    cases["train/default"] = partial(training, {}, False)
    cases["train/projections"] = partial(training, EVERY_TERM, True)
    dims = {"dims": [4, 8, 24]}
    for title, given, options in (
        ("pairs_numpy", "numpy", dims),
        ("pairs_torch", "torch", dims),
        ("texts", "texts", dims),
        ("another_seed", "numpy", dims | {"seed": 3}),
        ("wide", "numpy", {"dims": [16], "max_steps": 3}),
    ):
        cases[f"rotation/{title}"] = partial(fitted_rotation, given, 1100 if title == "wide" else 48, options)
    for name, kind in (("bert", "pairs"), ("bert", "scored"), ("roberta", "texts"), ("gemma3", "pairs")):
        cases[f"rotation/model_{name}_{kind}"] = partial(rotated_model, name, kind)
    # deep enough for word weights to help, so that they are kept; on the shallow t5 they do not, and are not
    cases["cuts/bert_weighed"] = partial(layer_cuts, "bert", 6, {"word_weights": True, "max_steps": 150})
    cases["cuts/gemma3_weighed"] = partial(layer_cuts, "gemma3", 6, {})
    cases["cuts/t5_weighed"] = partial(layer_cuts, "t5", DEPTH, {"word_weights": True})
    cases["cuts/bert_plain"] = partial(layer_cuts, "bert", DEPTH, {"word_weights": False, "vector_weight": 0.5})
    cases["cuts/modernbert_least_squares"] = partial(layer_cuts, "modernbert", DEPTH, {"max_steps": 0})
    cases["cuts/qwen3_last_token"] = partial(layer_cuts, "qwen3", DEPTH, {})
    cases["mteb/tasks"] = partial(mteb_scores, {})
    cases["mteb/tasks_not_normalized"] = partial(mteb_scores, {"normalize": False})
    cases["mteb/evaluator"] = partial(evaluator_scores, True, {"precisions": PRECISIONS})
    cases["mteb/evaluator_layers"] = partial(evaluator_scores, False, {"layers": [0, 2, 4], "primary": 8})
    cases["mteb/evaluator_not_normalized"] = partial(evaluator_scores, False, {"normalize": False})
    cases["mteb/store"] = partial(store_views, None)
    cases["mteb/store_layers"] = partial(store_views, [0, 2, 4])
    for title, *place in (
        ("layer", "bert", 2, None, None),
        ("dim", "roberta", None, 8, None),
        ("layer_dim", "qwen3", 2, 8, None),
        ("cuts", "bert", 2, 8, {"word_weights": False}),
        ("cuts_weighed", "gemma3", 2, 8, {"word_weights": True}),
    ):
        cases[f"export/{title}"] = partial(cut_model, *place)
    cases["export/tei"] = partial(for_tei, "mpnet")
    if importlib.util.find_spec("onnxscript") and importlib.util.find_spec("onnxruntime"):
        cases["export/onnx"] = partial(onnx_file, "bert")
        cases["export/onnx_modernbert"] = partial(onnx_file, "modernbert")
    return cases


def group_of(name: str) -> str:
    return "/".join(name.split("/")[:2])


def compute(only: str, failures: dict[str, str] | None) -> Numbers:
    """Numbers of the cases that ``only`` is the beginning of, or in; without ``failures`` the first error is raised."""
    found: Numbers = {}
    seconds: dict[str, float] = {}
    for name, case in all_cases().items():
        if not name.startswith(only) and not only.startswith(f"{name}/"):
            continue
        start = time.perf_counter()
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        try:
            with tempfile.TemporaryDirectory(prefix="recorded-numbers-") as work:
                found |= {f"{name}/{key}": np.asarray(value) for key, value in case(Path(work)).items()}
        except Exception as error:
            if failures is None:
                raise
            failures[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        part = name.split("/")[0]
        seconds[part] = seconds.get(part, 0) + time.perf_counter() - start
    print("seconds:", ", ".join(f"{part} {spent:.0f}" for part, spent in seconds.items()))
    return {name: value for name, value in found.items() if name.startswith(only)}


def versions() -> dict[str, str]:
    packages = ("torch", "transformers", "sentence-transformers", "numpy", "scikit-learn", "mteb", "onnxruntime")
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def record(file: Path) -> int:
    found = compute("", None)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **found, **{NOTES: np.asarray(json.dumps(versions()))})
    groups = [group_of(name) for name in found]
    for group in dict.fromkeys(groups):
        print(f"{group:<40} {groups.count(group):>6} arrays")
    print(f"{len(found)} arrays, {file.stat().st_size / 1e6:.1f} MB")
    return 0


def compare(file: Path, only: str, tolerance: float) -> int:
    with np.load(file) as loaded_file:
        notes = json.loads(str(loaded_file[NOTES]))
        recorded = {name: loaded_file[name] for name in loaded_file.files if name != NOTES and name.startswith(only)}
    if not recorded:
        print(f"{file.name} holds nothing that begins with {only!r}.")
        return 1
    for name, now in versions().items():
        if notes.get(name) != now:
            print(f"recorded with {name} {notes.get(name)}, compared with {now}")
    failures: dict[str, str] = {}
    found = compute(only, failures)
    largest_gradient: dict[str, float] = {}
    for name, values in recorded.items():
        case, is_gradient, _ = name.partition("/gradient/")
        if is_gradient:
            largest_gradient[case] = max(largest_gradient.get(case, 0.0), float(values[1]))
    lines: dict[str, list[Any]] = {}
    offenders: list[str] = []
    for name in dict.fromkeys([*recorded, *found]):
        line = lines.setdefault(group_of(name), [0, 0.0, 0.0, True])
        line[0] += 1
        if name not in found or name not in recorded:
            line[3] = False
            offenders.append(f"{name}: {'missing' if name not in found else 'was not recorded'}")
            continue
        case, _, _ = name.partition("/gradient/")
        floor = ZERO * largest_gradient.get(case, 0.0)
        same, off, share = difference(recorded[name], found[name], floor)
        line[1:] = max(line[1], off), max(line[2], share), line[3] and same
        if share > tolerance:
            offenders.append(f"{name}: off by {off:.2e}, {share:.2e} of its largest value")
    print(f"{'group':<40} {'arrays':>6} {'largest difference':>20} {'relative':>10}  equal to the last bit")
    for group, (count, off, share, same) in lines.items():
        print(f"{group:<40} {count:>6} {off:>20.2e} {share:>10.2e}  {'yes' if same else 'NO'}")
    for title, lines_of in (("failed", [f"{k}: {v}" for k, v in failures.items()]), ("changed or missing", offenders)):
        if lines_of:
            print(f"\n{len(lines_of)} {title}:", *lines_of, sep="\n  ")
    return 1 if offenders or failures else 0


def difference(before: np.ndarray, after: np.ndarray, floor: float) -> tuple[bool, float, float]:
    """Whether equal to the last bit, the largest difference, and its share of the largest value."""
    if before.shape != after.shape:
        return False, float("inf"), float("inf")
    if np.array_equal(before, after, equal_nan=True):
        return True, 0.0, 0.0
    off = float(np.abs(before.astype(np.float64) - after.astype(np.float64)).max())
    size = max(float(np.abs(before).max()), float(np.abs(after).max()))
    if np.isnan(off):
        return False, float("inf"), float("inf")
    return False, off, 0.0 if size <= floor else off / size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (("record", "compute the numbers and write them"), ("compare", "compute and compare them")):
        command = commands.add_parser(name, help=about)
        command.add_argument("file", type=Path, metavar="FILE.npz")
    command.add_argument("--only", default="", metavar="PREFIX", help="numbers whose names begin so, e.g. loss/bert")
    command.add_argument("--tolerance", type=float, default=TOLERANCE, help="what counts as changed (default: 1e-6)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    for chatty in ("mipic_st", "transformers", "sentence_transformers", "mteb", "datasets", "torch.onnx"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    start = time.perf_counter()
    code = record(args.file) if args.command == "record" else compare(args.file, args.only, args.tolerance)
    print(f"{time.perf_counter() - start:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
