"""Models and evaluators, drawn at random."""

from __future__ import annotations

import random

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    MSEEvaluator,
    ParaphraseMiningEvaluator,
    RerankingEvaluator,
    SequentialEvaluator,
    TranslationEvaluator,
    TripletEvaluator,
)
from sentence_transformers.sentence_transformer.modules import Dense, LayerNorm, Normalize, Pooling, Router, Transformer

from conftest import ARCHITECTURES, WIDTH, put_lora, sentences
from mipic_st.evaluation.probe import ClassificationProbeEvaluator

POOLINGS = [*Pooling.POOLING_MODES, ("cls", "mean")]
PROMPTS = [
    {},
    {"query": "the cat ", "document": "a dog behind "},
    {"query": "red ", "passage": "blue house "},
    {"corpus": "big ", "other": "in "},
]
KINDS = ["sts", "binary", "triplet", "ir", "rerank", "mining", "translation", "probe", "mse"]
SIMILARITIES = ["cosine", "dot", "euclidean", "manhattan"]


def dense(rng, width, out):
    """Orthogonal, so that the vectors of different texts stay apart: scores of near copies are rounding."""
    module = Dense(
        width, out, bias=rng.random() < 0.5, activation_function=rng.choice([torch.nn.Tanh, torch.nn.Identity])()
    )
    torch.nn.init.orthogonal_(module.linear.weight)
    return module


def draw_tail(rng, width):
    """Dense chains, a norm, a router, Normalize, in this order, each of them or not."""
    modules = []
    for _ in range(rng.choice([0, 0, 1, 2])):
        out = rng.choice([24, 32, 48])
        modules.append(dense(rng, width, out))
        width = out
    if rng.random() < 0.15:
        modules.append(LayerNorm(width))
    if rng.random() < 0.2:
        modules.append(Router.for_query_document([dense(rng, width, width)], [dense(rng, width, width)]))
    if rng.random() < 0.5:
        modules.append(Normalize())
    return modules


def centred(modules, width):
    """A Dense that takes the mean vector off, if the random encoder gives all texts nearly the same one."""
    vectors = torch.tensor(SentenceTransformer(modules=modules, device="cpu").encode_document(sentences(20)))
    mean = vectors.mean(dim=0)
    if mean.norm() < 0.9 * vectors.norm(dim=1).mean():
        return []
    return [Dense(width, width, activation_function=torch.nn.Identity(), init_weight=torch.eye(width), init_bias=-mean)]


def draw_model(rng, transformer_folder):
    """A model, and whether its vectors may depend on how much padding a batch has."""
    architecture, side = rng.choice(ARCHITECTURES), rng.choice(["right", "right", "left"])
    folder = str(transformer_folder(architecture, side))
    lengths = rng.choice([{}, {}, {"query_length": 5}, {"query_length": 6, "document_length": 9}])
    pooling = rng.choice(POOLINGS)

    def front():
        transformer = Transformer(folder, **lengths)
        return [transformer, Pooling(WIDTH, pooling, include_prompt=rng.random() < 0.7)]

    width = WIDTH * (2 if isinstance(pooling, tuple) else 1)
    modules = [Router.for_query_document(front(), front())] if rng.random() < 0.15 else front()
    tail = [*centred(modules, width), *draw_tail(rng, width)]
    prompts = dict(rng.choice(PROMPTS))
    default = rng.choice([None, None, *prompts])
    model = SentenceTransformer(
        modules=[*modules, *tail],
        prompts=prompts,
        default_prompt_name=default,
        similarity_fn_name=rng.choice(SIMILARITIES),
        device="cpu",
    )
    return model.eval(), side == "left"


def drawn_model(seed, transformer_folder, folder):
    """A model of draw_model that has since got adapters, was saved and loaded, has other prompts or another encode."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, padded = draw_model(rng, transformer_folder)
    more = random.Random(f"more {seed}")  # draws of its own: those before stay what they are
    name = type(model[0].auto_model).__name__ if isinstance(model[0], Transformer) else ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if "Bert" in name and "Modern" not in name and "Distil" not in name and more.random() < 0.5:
            put_lora(model, more.choice(["get_peft_model", "inject"]))
        elif more.random() < 0.3:
            model.save_pretrained(str(folder / "saved"))
            model = SentenceTransformer(str(folder / "saved"), device="cpu")
    if more.random() < 0.3:
        model.prompts = dict(more.choice(PROMPTS))
        model.default_prompt_name = more.choice([None, *model.prompts])
    if more.random() < 0.2:
        set_encode(model)
    return rng, model, padded


def set_encode(model):
    """An encode of the instance's own, which puts an instruction before texts."""
    encode = model.encode

    def instructed(inputs, *args, **kwargs):
        texts = f"one small {inputs}" if isinstance(inputs, str) else [f"one small {text}" for text in inputs]
        return encode(texts, *args, **kwargs)

    model.encode = instructed


def draw_evaluator(rng, model, batch_size, kind=None):
    """Texts repeat between columns, never in a row: ties between copies are broken by rounding."""
    kind = kind or rng.choice([*KINDS, "sequence"])
    if kind == "sequence":
        parts = [draw_evaluator(rng, model, batch_size, kind) for kind in rng.sample(KINDS[:-1], 2)]
        for number, part in enumerate(parts):
            part.name = f"part{number}"
        return SequentialEvaluator(parts)
    pool = list(dict.fromkeys(sentences(80, rng.randrange(1000), shortest=2)))[:40]
    left, right, third = pool[:24], pool[8:32], pool[16:]
    options = {"name": rng.choice([kind, "", "a_b-8"]), "batch_size": batch_size}
    functions = {"similarity_fn_names": rng.choice([None, ["dot"], ["cosine", "euclidean"], SIMILARITIES])}
    ids = {f"d{i}": text for i, text in enumerate(right)}
    if kind == "sts":
        scores = rng.sample(range(100), 24)
        return EmbeddingSimilarityEvaluator(left, right, scores, **options, **functions)
    if kind == "binary":
        return BinaryClassificationEvaluator(left, right, [i % 2 for i in range(24)], **options, **functions)
    if kind == "triplet":
        return TripletEvaluator(left, right, third, **options, **functions)
    if kind == "ir":
        prompts = rng.choice([{}, {"query_prompt": "train "}, {"corpus_prompt": "near ", "query_prompt": ""}])
        if model.prompts and rng.random() < 0.3:
            prompts["query_prompt_name"] = rng.choice(list(model.prompts))
        relevant = {f"q{i}": {f"d{i}", f"d{i + 5}"} for i in range(8)}
        queries = {f"q{i}": text for i, text in enumerate(left[:8])}
        chunk = rng.choice([5, 50_000])
        return InformationRetrievalEvaluator(queries, ids, relevant, corpus_chunk_size=chunk, **prompts, **options)
    if kind == "rerank":
        samples = [{"query": left[i], "positive": [right[i]], "negative": third[i : i + 3]} for i in range(8)]
        return RerankingEvaluator(samples, use_batched_encoding=rng.random() < 0.5, **options)
    if kind == "mining":
        texts = {f"d{i}": text for i, text in enumerate(dict.fromkeys(right))}
        return ParaphraseMiningEvaluator(texts, [("d0", "d1"), ("d2", "d5")], **options)
    if kind == "translation":
        return TranslationEvaluator(left, right, **options)
    if kind == "mse":
        return MSEEvaluator(left, right, teacher_model=model, **options)
    labels = [i % 3 for i in range(24)]
    return ClassificationProbeEvaluator(left, labels, right, labels, n_experiments=2, samples_per_label=3, **options)


def assert_same(ours, native, names, label, seed, most=1e-5):
    for key, value in native.items():
        name = next((name for name in names if key.startswith(f"{name}_")), None)
        full = f"dim-{label}_{key}" if name is None else f"{name}-{label}_{key.removeprefix(f'{name}_')}"
        assert ours[full] == pytest.approx(value, abs=most, rel=most, nan_ok=True), (seed, full)
