"""Collections to search, their vectors (encoded once), and what a search is judged by. Shared, no script itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sentence_transformers import SentenceTransformer

from mipic_st import codes
from mipic_st.demo import synthetic_topics
from mipic_st.docstrings import docstring_pairs
from mipic_st.encoder.encoding import encode_texts
from mipic_st.encoder.fingerprint import fingerprint
from mipic_st.numerics import unit_length
from mipic_st.transforms.measures import ndcg, ranked, recall, reciprocal_rank

K = 10


class Corpus(NamedTuple):
    """Documents, queries, and the rows of the documents that answer each query, one at least.

    Where queries are documents themselves, ``own`` has their rows: a query does not find itself, and has no answers.
    ``fitted`` are the rows of the documents that maps and codes are fitted on; all, if it is None.
    """

    documents: list[str]
    queries: list[str]
    relevant: list[list[int]]
    own: list[int] | None = None
    fitted: list[int] | None = None


def judged(documents: Mapping[str, str], queries: Mapping[str, str], qrels: Mapping[str, Sequence[str]]) -> Corpus:
    """By names, as sentence-transformers' evaluators have them; queries without a known answer are left out."""
    row = {name: place for place, name in enumerate(documents)}
    answers = {name: [row[answer] for answer in qrels.get(name, ()) if answer in row] for name in queries}
    asked = [name for name in queries if answers[name]]
    return Corpus([*documents.values()], [queries[name] for name in asked], [answers[name] for name in asked])


def cranfield(folder: Path) -> Corpus:
    """Abstracts on aerodynamics and questions; cranfield_docs.csv, _queries.csv and _qrels.csv."""
    docs, queries, qrels = (
        pd.read_csv(folder / f"cranfield_{name}.csv", dtype=str) for name in ("docs", "queries", "qrels")
    )
    relevant = qrels.groupby("query").doc.apply(list).to_dict()
    return judged(docs.set_index("id").text.to_dict(), queries.set_index("id").text.to_dict(), relevant)


def docstrings(size: int = 2400) -> Corpus:
    """Docstrings of installed libraries: a summary line asks for its body."""
    pairs = docstring_pairs(size=size)
    return Corpus([p["document"] for p in pairs], [p["query"] for p in pairs], [[row] for row in range(size)])


def topics(documents: pd.DataFrame, queries: pd.DataFrame) -> Corpus:
    """Texts that ask for those of the same label: text, label."""
    rows = documents.groupby("label").indices
    return Corpus([*documents.text], [*queries.text], [rows[label].tolist() for label in queries.label])


def banking77(folder: Path) -> Corpus:
    """Intent search: questions of bank customers, known ones of the same intent. No retrieval in the strict sense."""
    return topics(*(pd.read_csv(folder / f"banking77_{part}.csv", keep_default_na=False) for part in ("train", "test")))


def nano(name: str, dataset_id: str = "sentence-transformers/NanoBEIR-en") -> Corpus:
    """One of NanoBEIR's sets, e.g. "msmarco", from the hub or a local folder of the same shape."""
    from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator

    (part,) = NanoBEIREvaluator(dataset_names=[name], dataset_id=dataset_id).evaluators
    queries, documents = (
        dict(zip(ids, texts, strict=True))
        for ids, texts in ((part.queries_ids, part.queries), (part.corpus_ids, part.corpus))
    )
    return judged(documents, queries, {name: [*answers] for name, answers in part.relevant_docs.items()})


def sentences(folder: Path, queries: int = 1500, fitted: int = 8000) -> Corpus:
    """STS13 to 15, SICK, MRPC and Banking77, each sentence once; some ask for their neighbours."""
    texts: dict[str, None] = {}
    for name in ("sts13_test", "sts14_test", "sts15_test", "sick_train", "sick_validation", "mrpc_train"):
        data = pd.read_csv(folder / f"{name}.csv", keep_default_na=False)
        texts |= dict.fromkeys([*data.sentence1, *data.sentence2])
    for name in ("banking77_train", "banking77_test"):
        texts |= dict.fromkeys(pd.read_csv(folder / f"{name}.csv", keep_default_na=False).text)
    documents = [*texts]
    order = np.random.default_rng(0).permutation(len(documents)).tolist()
    own, rows = order[:queries], order[queries : queries + fitted]
    return Corpus(documents, [documents[row] for row in own], [], own, rows)


def synthetic(documents: int = 280, queries: int = 40) -> Corpus:
    """Offline stand-in: sentences that ask for those of the same topic."""
    parts = (synthetic_topics(size, split=split) for size, split in ((documents, "train"), (queries, "eval")))
    return topics(*(pd.DataFrame(part) for part in parts))


def encode(model: SentenceTransformer, texts: Sequence[str], role: str, cache: Path | None = None) -> np.ndarray:
    """Unit-length vectors at full width, with the model's own prompt for "query" or "document".

    With ``cache``, a folder, each list of texts is encoded only once per model.
    """
    prompt = model.prompts.get(role) or ""
    if cache is not None:
        key = f"{fingerprint(model)} {model.max_seq_length} {len(texts)}\n" + "\n".join(prompt + text for text in texts)
        path = cache / f"{hashlib.blake2b(key.encode(), digest_size=12).hexdigest()}.npy"
        if path.exists():
            return np.load(path)
    vectors = unit_length(encode_texts(model, texts, prompt=prompt, batch_size=64))
    if cache is not None:
        cache.mkdir(parents=True, exist_ok=True)
        np.save(path, vectors)
    return vectors


class Task(NamedTuple):
    """A corpus as unit-length vectors."""

    documents: np.ndarray
    queries: np.ndarray
    fitted: np.ndarray
    relevant: list[torch.Tensor]
    own: torch.Tensor | None

    @classmethod
    def of(cls, corpus: Corpus, model: SentenceTransformer, cache: Path | None = None) -> Task:
        documents = encode(model, corpus.documents, "document", cache)
        queries = encode(model, corpus.queries, "query", cache) if corpus.own is None else documents[corpus.own]
        fitted = documents if corpus.fitted is None else documents[corpus.fitted]
        relevant = [torch.tensor(rows) for rows in corpus.relevant]
        return cls(documents, queries, fitted, relevant, None if corpus.own is None else torch.tensor(corpus.own))

    def found(self, scores: Callable[[slice], np.ndarray]) -> torch.Tensor:
        """The best rows for each query, given the scores of some queries with all documents."""
        found = []
        for start in range(0, len(self.queries), 64):
            rows = slice(start, start + 64)
            own = None if self.own is None else self.own[rows]
            found.append(ranked([torch.as_tensor(scores(rows))], K, own))
        return torch.cat(found)

    def cut(self, dim: int, matrix: np.ndarray | None = None) -> list[np.ndarray]:
        """Queries, documents and those that are fitted on, rotated, truncated, and of unit length again."""
        sides = self.queries, self.documents, self.fitted
        return [unit_length(side[:, :dim] if matrix is None else side @ matrix[:, :dim]) for side in sides]

    def measure(self, found: torch.Tensor, wanted: torch.Tensor) -> dict[str, np.ndarray]:
        """x100, one number per query; ``wanted`` is what the full width finds."""
        figures = {f"recall@{K}": recall(found, wanted)}
        if self.relevant:
            figures |= {f"ndcg@{K}": ndcg(found, self.relevant), f"mrr@{K}": reciprocal_rank(found, self.relevant)}
        return {name: 100 * values.numpy() for name, values in figures.items()}

    def search(self, dim: int, precision: str = "float32", matrix: np.ndarray | None = None) -> torch.Tensor:
        """Truncated vectors, rotated before if there is a matrix; documents as codes."""
        queries, documents, fitted = self.cut(dim, matrix)
        ranges = None if precision == "float32" else codes.Ranges.of(fitted)
        coded = codes.encode(documents, precision, ranges)
        return self.found(lambda rows: codes.scores(queries[rows], coded, precision, ranges))

    def search_by_codes(self, dim: int, precision: str, matrix: np.ndarray) -> torch.Tensor:
        """As :meth:`search`, with queries as codes too; bits are compared by how many are equal."""
        *sides, fitted = self.cut(dim, matrix)
        ranges = codes.Ranges.of(fitted)
        coded = [codes.encode(side, precision, ranges) for side in sides]
        if precision == "binary":
            queries, documents = (np.unpackbits(side.view(np.uint8), axis=1) * 2.0 - 1 for side in coded)
        else:
            queries, documents = (codes.decode(side, precision, ranges) for side in coded)
        return self.found(lambda rows: queries[rows] @ documents.T)


def bootstrap(differences: np.ndarray, draws: int = 2000) -> dict[str, float]:
    """Mean of (seeds, queries) and its 95% interval; queries are drawn again, and seeds if there are several."""
    generator = np.random.default_rng(0)
    seeds, queries = differences.shape
    means = [
        differences[generator.integers(seeds, size=seeds)][:, generator.integers(queries, size=queries)].mean()
        for _ in range(draws)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}
