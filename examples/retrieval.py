"""Retrieval per dim: queries and documents with prompts of their own, before and after a rotation of the model.

    python examples/retrieval.py                                            # offline, synthetic topics
    python examples/retrieval.py --queries queries.csv --corpus corpus.csv --qrels qrels.csv --pairs pairs.csv
    python examples/retrieval.py --model intfloat/e5-small-v2 --query-prompt "query: " --document-prompt "passage: " \
        --nano-beir msmarco nq --pairs pairs.csv

queries.csv and corpus.csv have the columns id, text; qrels.csv has query_id, doc_id, a row for each relevant document
(with a column score, those above 0); pairs.csv has query, document. Queries go through encode_query and documents
through encode_document, so that prompts, and the routes of a Router, are those that the application uses. Vectors below
the full width are brought back to unit length. Scores are nDCG@10 and accuracy@1, x100.
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pandas as pd
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator

from common import choose_dims, load_model
from mipic_st import MatryoshkaEvaluator, rotate_model
from mipic_st.cli.options import add_dims
from mipic_st.demo import synthetic_topics

MEASURES = ("ndcg@10", "accuracy@1")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: one that needs no download)")
    parser.add_argument("--query-prompt", help="put before every query (default: the model's own for queries, if any)")
    parser.add_argument("--document-prompt", help="put before every document (default: the model's own, if any)")
    parser.add_argument("--queries", metavar="FILE", help="csv: id, text")
    parser.add_argument("--corpus", metavar="FILE", help="csv: id, text")
    parser.add_argument("--qrels", metavar="FILE", help="csv: query_id, doc_id")
    parser.add_argument("--nano-beir", nargs="+", metavar="NAME", help="NanoBEIR sets from the hub instead of files")
    parser.add_argument("--pairs", metavar="FILE", help="csv: query, document; the rotation is fitted on these")
    add_dims(parser)
    parser.add_argument("--output", help="where to save the rotated model (default: not saved)")
    parser.add_argument("--smoke", action="store_true", help="a few texts, to see that all runs")
    args = parser.parse_args()
    if len({args.queries is None, args.corpus is None, args.qrels is None}) > 1:
        parser.error("--queries, --corpus and --qrels come together")
    if (args.queries or args.nano_beir) and not args.pairs:
        parser.error("--pairs is needed: the rotation must not be fitted on what is scored")
    return args


def read(file: str, columns: list[str]) -> pd.DataFrame:
    rows = pd.read_csv(file, keep_default_na=False, dtype=str)
    if missing := [name for name in columns if name not in rows.columns]:
        raise SystemExit(f"{file} lacks the columns {missing}; it has {list(rows.columns)}")
    return rows


def synthetic(smoke: bool) -> tuple[dict[str, str], dict[str, str], dict[str, set[str]], Dataset]:
    """Texts of a topic find other texts of it; the pairs are made of other words and sentences."""
    topics = pd.DataFrame(synthetic_topics(120 if smoke else 1500, split="eval"))
    half = len(topics) // 4
    queries, corpus = topics[:half], topics[half:]
    relevant = {str(row): set(map(str, corpus.index[corpus.label == label])) for row, label in queries.label.items()}
    texts = pd.DataFrame(synthetic_topics(1000 if smoke else 4000))
    left, right = (texts[texts.groupby("label").cumcount() % 2 == side] for side in (0, 1))
    columns = {
        "query": left.assign(place=left.groupby("label").cumcount()),
        "document": right.assign(place=right.groupby("label").cumcount()),
    }
    both = columns["query"].merge(columns["document"], on=["label", "place"])
    pairs = Dataset.from_dict({"query": both.text_x.tolist(), "document": both.text_y.tolist()})
    named = [dict(zip(map(str, part.index), part.text, strict=True)) for part in (queries, corpus)]
    return *named, relevant, pairs


def make_evaluator(args: argparse.Namespace, dims: list[int]) -> tuple[MatryoshkaEvaluator, Dataset]:
    """What is scored at every dim, and the pairs of the rotation."""
    prompts = {"query_prompts": args.query_prompt, "corpus_prompts": args.document_prompt}
    if args.nano_beir:
        inner = NanoBEIREvaluator(dataset_names=args.nano_beir, show_progress_bar=False, **prompts)
    else:
        if args.queries:
            queries, corpus = (
                dict(read(file, ["id", "text"])[["id", "text"]].to_numpy()) for file in (args.queries, args.corpus)
            )
            judged = read(args.qrels, ["query_id", "doc_id"])
            if "score" in judged.columns:  # as in BEIR, where 0 is judged and not relevant
                judged = judged[judged["score"].astype(float) > 0]
            relevant = judged.groupby("query_id").doc_id.agg(set).to_dict()
            pairs = None
        else:
            queries, corpus, relevant, pairs = synthetic(args.smoke)
        singular = {"query_prompt": args.query_prompt, "corpus_prompt": args.document_prompt}
        inner = InformationRetrievalEvaluator(queries, corpus, relevant, name="corpus", **singular)
    if args.pairs:
        rows = read(args.pairs, ["query", "document"])
        pairs = Dataset.from_dict({column: rows[column].tolist() for column in ("query", "document")})
    return MatryoshkaEvaluator(inner, dims, primary=dims[-1]), pairs


def score(model: SentenceTransformer, evaluator: MatryoshkaEvaluator, name: str) -> dict[int, list[float]]:
    """Both measures x100 by dim."""
    results = evaluator(model)
    return {dim: [100 * results[f"{name}-{dim}_cosine_{measure}"] for measure in MEASURES] for dim in evaluator.dims}


def own_prompt(model: SentenceTransformer, given: str | None, names: list[str]) -> str:
    """The prompt that was named, else the model's of the first of these names, else its default one."""
    if given is not None:
        return given
    found = [model.prompts[name] for name in [*names, model.default_prompt_name] if name in model.prompts]
    return (found or [""])[0] or ""


def main() -> None:
    args = parse_args()
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())
    evaluator, pairs = make_evaluator(args, dims)
    name = "NanoBEIR_mean" if args.nano_beir else "corpus"
    stages = {"truncated": score(model, evaluator, name)}
    steps = {"max_steps": 20} if args.smoke else {}
    # the prompts that queries and documents will have, encode_query's and encode_document's own unless named
    prompts = {
        "query": own_prompt(model, args.query_prompt, ["query"]),
        "document": own_prompt(model, args.document_prompt, ["document", "passage", "corpus"]),
    }
    print(rotate_model(model, pairs, dims, prompts=prompts, show_progress_bar=True, **steps))
    stages["rotated"] = score(model, evaluator, name)
    table = Table(title="nDCG@10 and accuracy@1 x100 by dim")
    for heading in ("dim", *(f"{name}, {stage}" for name in MEASURES for stage in stages)):
        table.add_column(heading, justify="right")
    for dim in dims:
        cells = [stage[dim][place] for place in range(len(MEASURES)) for stage in stages.values()]
        table.add_row(str(dim), *(f"{cell:.2f}" for cell in cells))
    Console().print(table)
    if args.output:
        model.save_pretrained(args.output)
        print(f"model saved to {args.output}")


if __name__ == "__main__":
    main()
