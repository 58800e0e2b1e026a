"""Whatever the model and the evaluator: full width is what sentence-transformers and mteb report, cuts are cuts."""

import copy
import random

import numpy as np
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
from sentence_transformers.util import quantize_embeddings

from conftest import ARCHITECTURES, DEPTH, WIDTH, sentences
from mipic_st.evaluation.matryoshka import MatryoshkaEvaluator
from mipic_st.evaluation.probe import ClassificationProbeEvaluator

DRAWS = [pytest.param(seed, marks=[] if seed < 20 else pytest.mark.slow) for seed in range(200)]
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


class HandCut:
    """The obvious reference: the model's own methods, the first values, divided by their length, codes at the end.

    With ``float32`` it keeps what it gave, each distinct vector of a text once; codes are calibrated on that.
    """

    def __init__(self, model, dim, normalize, memo, precision="float32", seen=None):
        self.model, self.dim, self.normalize, self.memo = model, dim, normalize, memo
        self.precision, self.seen = precision, seen or {}

    def __getattr__(self, name):
        return getattr(self.model, name)

    def unit(self, vectors):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if self.normalize else vectors

    def cut(self, method, inputs, convert_to_tensor=False, convert_to_numpy=True, **kwargs):
        single = isinstance(inputs, str)
        call = (method, str(inputs), str(kwargs))
        if call not in self.memo:
            self.memo[call] = np.array(getattr(self.model, method)([inputs] if single else inputs, **kwargs))
        full = self.memo[call]
        vectors = full[:, : self.dim]
        if self.dim < full.shape[1] or self.precision != "float32":
            vectors = self.unit(vectors)
        if self.precision == "float32":
            for text, vector in zip([inputs] if single else inputs, vectors, strict=True):
                known = self.seen.setdefault(text, [])
                known += [vector] if not any(np.allclose(vector, other, atol=1e-5) for other in known) else []
            return self.given(vectors, single, convert_to_tensor, convert_to_numpy)
        calibration = self.unit(np.array([vector for known in self.seen.values() for vector in known]))
        if self.precision == "int8":
            vectors = quantize_embeddings(vectors, "int8", calibration_embeddings=calibration).astype(np.float32)
        else:  # filled up with ones to a power of four, where cosines are exact, so that ties are ties
            signs = np.where(vectors > calibration.mean(axis=0), 1, -1)
            total = next(4**k for k in range(9) if 4**k >= self.dim)
            filled = np.hstack([signs, np.ones((len(signs), total - self.dim))])
            vectors = (filled / np.sqrt(total)).astype(np.float32)
        return self.given(vectors, single, convert_to_tensor, convert_to_numpy)

    @staticmethod
    def given(vectors, single, convert_to_tensor, convert_to_numpy):
        if convert_to_tensor:
            vectors = torch.tensor(vectors)
        elif not convert_to_numpy:
            vectors = list(torch.tensor(vectors))
        return vectors[0] if single else vectors

    def encode(self, inputs, **kwargs):
        return self.cut("encode", inputs, **kwargs)

    def encode_query(self, inputs, **kwargs):
        return self.cut("encode_query", inputs, **kwargs)

    def encode_document(self, inputs, **kwargs):
        return self.cut("encode_document", inputs, **kwargs)


def assert_same(ours, native, names, label, seed, most=1e-5):
    for key, value in native.items():
        name = next((name for name in names if key.startswith(f"{name}_")), None)
        full = f"dim-{label}_{key}" if name is None else f"{name}-{label}_{key.removeprefix(f'{name}_')}"
        assert ours[full] == pytest.approx(value, abs=most, rel=most, nan_ok=True), (seed, full)


@pytest.mark.parametrize("seed", DRAWS)
@pytest.mark.filterwarnings("ignore")
def test_full_width_is_the_native_score_and_cuts_are_cuts(seed, transformer_folder):
    """Architecture, pooling, tail, prompts, router, padding side, evaluator, dims, grid, precision: all drawn."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, padded = draw_model(rng, transformer_folder)
    evaluator = draw_evaluator(rng, model, 1 if padded else rng.choice([5, 32]))
    names = [part.name for part in getattr(evaluator, "evaluators", [evaluator]) if part.name]

    def fresh(truncate_dim=None):
        """Native runs write into an evaluator."""
        twin = copy.deepcopy(evaluator)
        if truncate_dim is not None:
            twin.truncate_dim = truncate_dim
        return twin

    width = model.encode(["cat"], **({"task": "query"} if isinstance(model[0], Router) else {})).shape[-1]
    dims = [rng.randrange(1, width), width]
    normalize = rng.random() < 0.7
    routed = any(isinstance(module, Router) for module in model)
    layers = [1, DEPTH] if not routed and rng.random() < 0.25 else None
    teacher = isinstance(evaluator, MSEEvaluator)
    precision = None if teacher or rng.random() < 0.5 else rng.choice(["int8", "binary"])
    ours = MatryoshkaEvaluator(
        evaluator,
        dims,
        layers=layers,
        precisions=["float32", precision] if precision else ["float32"],
        normalize=normalize,
        memory_limit=rng.choice([0, 3000, 2**29]),
    )
    scores = ours(model)
    prefix = "" if layers is None else f"L{DEPTH}-"
    assert_same(scores, fresh()(model), names, f"{prefix}{width}", seed)
    assert ours.primary_metric in scores
    memo = {}
    for dim in dims:
        # a teacher is cut too, and renormalised: tests/test_evaluation.py compares that
        if not teacher:
            hand = HandCut(model, dim, normalize, memo)
            assert_same(scores, fresh()(hand), names, f"{prefix}{dim}", seed)
        if not (normalize or teacher) and hasattr(evaluator, "truncate_dim"):
            assert_same(scores, fresh(dim)(model), names, f"{prefix}{dim}", seed)
        if precision:
            codes = fresh()(HandCut(model, dim, normalize, memo, precision, hand.seen))
            # a value on the border of two codes may fall on either side
            most = 2e-2 if precision == "int8" else 1e-5
            assert_same(scores, codes, names, f"{prefix}{dim}-{precision}", seed, most)


def mteb_tasks(rng):
    """Real task classes on a handful of rows: STS asks encode, retrieval encode_query and encode_document."""
    from datasets import Dataset, DatasetDict

    mteb = pytest.importorskip("mteb")
    pool = list(dict.fromkeys(sentences(80, rng.randrange(1000), shortest=2)))[:40]
    sts = mteb.get_task("STS13")
    rows = {"sentence1": pool[:24], "sentence2": pool[8:32], "score": [float(x) for x in rng.sample(range(50), 24)]}
    sts.dataset = DatasetDict(test=Dataset.from_dict(rows))
    retrieval = mteb.get_task("NFCorpus")
    retrieval.dataset = {
        "default": {
            "test": {
                "corpus": Dataset.from_dict(
                    {"id": [f"d{i}" for i in range(24)], "title": [""] * 24, "text": pool[:24]}
                ),
                "queries": Dataset.from_dict({"id": [f"q{i}" for i in range(12)], "text": pool[16:28]}),
                "relevant_docs": {f"q{i}": {f"d{i}": 1, f"d{i + 5}": 1} for i in range(12)},
                "top_ranked": None,
            }
        }
    }
    for task in (sts, retrieval):
        task.data_loaded = True
    return [sts, retrieval]


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[] if seed < 2 else pytest.mark.slow) for seed in range(12)])
@pytest.mark.filterwarnings("ignore")
def test_full_width_is_what_mteb_reports(seed, transformer_folder, tmp_path):
    """The same models under mteb's own protocol, prompts and tasks chosen by mteb."""
    mteb = pytest.importorskip("mteb")
    from mipic_st.evaluation.mteb import evaluate_mteb

    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, padded = draw_model(rng, transformer_folder)
    model.similarity_fn_name = rng.choice(["cosine", "dot"])  # mteb knows no other for pairs
    for task in mteb_tasks(rng):
        if isinstance(model[0], Router) and task.metadata.name == "STS13":
            continue  # mteb gives no task there
        width = model.get_embedding_dimension()
        options = {"batch_size": 1 if padded else 8, "show_progress_bar": False}
        ours = evaluate_mteb(model, [task], [4, width], output=tmp_path, **options)
        native = mteb.evaluate(
            model, task, cache=None, co2_tracker=False, encode_kwargs=options, show_progress_bar=False
        ).task_results[0]
        score = next(row["score"] for row in ours.records if row["dim"] == width)
        assert score == pytest.approx(native.get_score(), abs=1e-5), (seed, task.metadata.name)
