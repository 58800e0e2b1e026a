"""Whatever the model and the evaluator: full width is what sentence-transformers and mteb report, cuts are cuts."""

import copy

import numpy as np
import pytest
import torch
from sentence_transformers.sentence_transformer.evaluation import MSEEvaluator
from sentence_transformers.sentence_transformer.modules import Router
from sentence_transformers.util import quantize_embeddings

from conftest import DEPTH, sentences
from mipic_st.evaluation.matryoshka import MatryoshkaEvaluator
from random_models import assert_same, draw_evaluator, drawn_model

DRAWS = [pytest.param(seed, marks=[] if seed < 20 else pytest.mark.slow) for seed in range(200)]


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


@pytest.mark.parametrize("seed", DRAWS)
@pytest.mark.filterwarnings("ignore")
def test_full_width_is_the_native_score_and_cuts_are_cuts(seed, transformer_folder, tmp_path):
    """Architecture, pooling, tail, prompts, router, adapters, evaluator, dims, grid, precision: all drawn."""
    rng, model, padded = drawn_model(seed, transformer_folder, tmp_path)
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
    layers = [1, DEPTH] if not routed and rng.random() < 0.25 and "encode" not in vars(model) else None
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

    rng, model, padded = drawn_model(seed, transformer_folder, tmp_path)
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
