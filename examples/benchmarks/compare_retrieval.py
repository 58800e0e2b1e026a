"""Quality per dim and per byte of a search: ways to make vectors smaller, fitted on the documents alone.

    python examples/benchmarks/compare_retrieval.py --data FOLDER --json minilm.json  # all sets: files in FOLDER
    python examples/benchmarks/compare_retrieval.py --sets docstrings                 # needs no files
    python examples/benchmarks/compare_retrieval.py --nano msmarco nq --model NAME    # NanoBEIR, from the hub
    python examples/benchmarks/compare_retrieval.py --smoke                           # synthetic data

Sets: Cranfield; docstrings of installed libraries; Banking77 as intent search; and "sentences", those of STS13 to 15,
SICK, MRPC and Banking77, which search their neighbours. Documents are coded; queries stay floats, but in the rows that
say otherwise.

By dim: truncation, a random rotation, PCA (uncentred, as an orthogonal map is), `fit_rotation`. By bytes: these with
int8, int4 and binary codes; ITQ with binary ones; the rotated and truncated vectors with faiss's PQ, whose parts are
neighbouring values or, interleaved, get an equal share of the leading ones; and faiss's own
PCA with SQ8, SQ4 and RaBitQ, PQ, and OPQ with PQ. Where dims would exceed the width, the width is taken, and a cell is
shown once, at the smallest number of bytes that holds it. RaBitQ keeps 8 bytes of its own with each vector. With --csr
also sentence-transformers' CSRLoss: an autoencoder on the vectors, not tuned, one seed, three bytes for each active
value (its place and its int8, though it is scored as a float).

Measures, x100: nDCG@10 and MRR@10 of the answers, recall@10 of what the full width finds. Random rotations, ITQ and
`fit_rotation` are means of the seeds; faiss takes none.
"""

from __future__ import annotations

import os
import sys

if not any(argument.startswith(("--m", "--n")) for argument in sys.argv):  # --model or --nano
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is asked of the hub, so don't wait for it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import corpora
import faiss
import numpy as np
import torch
from compare_rotations import itq, table_of
from corpora import Corpus, K, Task, bootstrap
from rich.console import Console

from mipic_st import fit_rotation
from mipic_st.docstrings import versions
from mipic_st.transforms.faiss_index import balanced
from mipic_st.transforms.orthogonal import pca_basis

sys.path.append(str(Path(__file__).parents[1]))  # what the example scripts share
from common import load_model

DIMS = (256, 128, 64, 32, 16, 8)
# dims of product quantization by its bytes, for our rotation as for OPQ
PQ_DIMS = {8: 64, 16: 128, 32: 128, 64: 256, 128: 384}
PLAIN_PQ, INTERLEAVED = "rotation, PQ", "rotation, PQ, interleaved"
RIVAL, SPARSE = "OPQ + PQ (faiss)", "CSRLoss"
SETS: dict[str, Callable[[Path], Corpus]] = {
    "cranfield": corpora.cranfield,
    "docstrings": lambda _: corpora.docstrings(),
    "banking77": corpora.banking77,
    "sentences": corpora.sentences,
}

Matrix = np.ndarray | None  # (D, D); None leaves vectors as they are
Figures = dict[str, np.ndarray]  # one number per query, by measure
Found = dict[str, dict[int, tuple[str, list[Figures]]]]  # by row and bytes: the cell, and figures per seed


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the files of the sets, but for the docstrings")
    parser.add_argument("--sets", nargs="+", choices=[*SETS], help="default: all with --data, else the docstrings")
    parser.add_argument("--nano", nargs="+", default=[], metavar="NAME", help="NanoBEIR sets, e.g. msmarco")
    parser.add_argument(
        "--nano-id", default="sentence-transformers/NanoBEIR-en", help="data set's name or local folder"
    )
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, help="folder for vectors, so that each text is encoded once")
    parser.add_argument("--json", metavar="FILE", type=Path, help="add the figures of these sets to this file")
    parser.add_argument("--bytes", type=int, nargs="+", choices=PQ_DIMS, default=list(PQ_DIMS), metavar="BYTES")
    parser.add_argument("--csr", type=int, nargs="*", default=[], metavar="BYTES", help="CSRLoss at so many bytes")
    parser.add_argument("--bf16", action="store_true", help="encode in bfloat16 autocast, for large models on a CPU")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--smoke", action="store_true", help="synthetic data, one seed, few bytes")
    args = parser.parse_args()
    if args.sets is None:
        args.sets = [] if args.nano or args.smoke else [*SETS] if args.data else ["docstrings"]
    if args.data is None and {*args.sets} - {"docstrings"}:
        parser.error("--sets: all but docstrings need --data FOLDER")
    if args.smoke:
        args.seeds, args.bytes = args.seeds[:1], args.bytes[:2]
    return args


def random_rotation(width: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0].astype(np.float32)


def fitted_matrices(
    task: Task, dims: list[int], seeds: list[int], max_steps: int | None
) -> tuple[dict[str, list[Matrix]], dict[str, float], list[str]]:
    """For each way one (D, D) per seed, the seconds of one fit, and which candidate the fit chose."""
    vectors, width = task.fitted, task.fitted.shape[1]
    chosen: list[str] = []

    def rotation(seed: int) -> np.ndarray:
        fit = fit_rotation(vectors, dims=dims, seed=seed, max_steps=max_steps, show_progress_bar=False)
        chosen.append(fit.chosen)
        return np.asarray(fit.matrix)

    ways: dict[str, Callable[[int], Matrix]] = {
        "truncation": lambda _: None,
        "random rotation": lambda seed: random_rotation(width, seed),
        "PCA": lambda _: pca_basis(torch.tensor(vectors), torch.arange(len(vectors))).numpy(),
        "rotation": rotation,
    }
    matrices, seconds = {}, {}
    for name, way in ways.items():
        started = time.perf_counter()
        own = seeds if name in ("random rotation", "rotation") else seeds[:1]
        matrices[name] = [way(seed) for seed in own]
        seconds[name] = (time.perf_counter() - started) / len(own)
    return matrices, seconds, chosen


def cells(width: int, budgets: Sequence[int], per_byte: float, extra: int = 0) -> Iterator[tuple[int, int]]:
    """(bytes, dim): the most dims that so many bytes hold, each cell once."""
    shown = set()
    for size in budgets:
        dim = min(width, int((size - extra) * per_byte))
        if dim > 0 and dim not in shown:
            shown.add(dim)
            yield size, dim


def by_faiss(task: Task, spec: str, sides: list[np.ndarray] | None = None) -> torch.Tensor:
    """What an index of faiss's factory finds; trained on the documents that are fitted on."""
    queries, documents, fitted = sides or (task.queries, task.documents, task.fitted)
    index = faiss.index_factory(documents.shape[1], spec, faiss.METRIC_INNER_PRODUCT)
    index.train(fitted)
    index.add(documents)
    found = torch.from_numpy(index.search(queries, K + (task.own is not None))[1])
    if task.own is None:
        return found
    # the query itself, or the last one where it was not found, is left out
    others = found != task.own[:, None]
    others[others.all(dim=1), -1] = False
    return found[others].reshape(len(found), K)


def by_bytes(
    task: Task, matrices: dict[str, list[Matrix]], seeds: list[int], budgets: list[int], csr: list[int]
) -> tuple[Found, dict[str, float]]:
    """Every way at every number of bytes; and the seconds of OPQ with PQ."""
    wanted = task.search(task.documents.shape[1])
    width = task.documents.shape[1]
    found: Found = {}
    seconds: dict[str, float] = {}

    def add(row: str, size: int, cell: str, results: list[torch.Tensor]) -> None:
        found.setdefault(row, {})[size] = cell, [task.measure(result, wanted) for result in results]

    for way, per_seed in matrices.items():
        for precision, per_byte in (("int8", 1), ("int4", 2), ("binary", 8)):
            for size, dim in cells(width, budgets, per_byte):
                add(
                    f"{way}, {precision}",
                    size,
                    f"{precision} x {dim}",
                    [task.search(dim, precision, matrix) for matrix in per_seed],
                )
                if way == "rotation":
                    both = [task.search_by_codes(dim, precision, matrix) for matrix in per_seed]
                    add(f"{way}, {precision}, queries coded", size, f"{precision} x {dim}", both)
    for size, dim in cells(width, budgets, 8):
        add(
            "ITQ, binary",
            size,
            f"binary x {dim}",
            [task.search(dim, "binary", itq(task.fitted, dim, seed=seed)) for seed in seeds],
        )
    for name, code, per_byte, extra in (("SQ8", "SQ8", 1, 0), ("SQ4", "SQ4", 2, 0), ("RaBitQ", "RaBitQ", 8, 8)):
        for size, dim in cells(width, budgets, per_byte, extra):
            add(f"PCA + {name} (faiss)", size, f"{name} x {dim}", [by_faiss(task, f"PCA{dim},{code}")])
    for size in csr:
        add(SPARSE, size, f"{size // 3} active", [sparse(task, size // 3, seeds[0])])
    for size in budgets:
        dim = min(width, PQ_DIMS[size])
        if dim % size == 0:
            # the order that faiss_index has for this factory; for none the values stay where they are
            for row, factory in ((PLAIN_PQ, ""), (INTERLEAVED, f"PQ{size}")):
                pq = [
                    by_faiss(task, f"PQ{size}np", [balanced(side, factory) for side in task.cut(dim, matrix)])
                    for matrix in matrices["rotation"]
                ]
                add(row, size, f"PQ of {dim}", pq)
            started = time.perf_counter()
            add(RIVAL, size, f"OPQ of {dim}", [by_faiss(task, f"OPQ{size}_{dim},PQ{size}np")])
            seconds[f"OPQ + PQ, {size} bytes"] = time.perf_counter() - started
        if width % size == 0:
            add("PQ (faiss)", size, f"PQ of {width}", [by_faiss(task, f"PQ{size}np")])
    return found, seconds


def sparse(task: Task, active: int, seed: int, steps: int = 300, batch: int = 256) -> torch.Tensor:
    """What k-sparse vectors find: an autoencoder on the vectors that are fitted on, trained with CSRLoss."""
    from sentence_transformers.sparse_encoder.losses import CSRLoss
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder

    queries, documents, fitted = (torch.from_numpy(side) for side in (task.queries, task.documents, task.fitted))
    width = fitted.shape[1]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SparseAutoEncoder(width, 4 * width, k=active, k_aux=min(512, 4 * width))
    loss = CSRLoss(model)  # without labels every text is its own positive
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randperm(len(fitted), generator=generator)[:batch]
        optimizer.zero_grad()
        sum(loss([{"sentence_embedding": fitted[rows]} for _ in range(2)]).values()).backward()
        optimizer.step()
    with torch.inference_mode():
        sides = [model({"sentence_embedding": side})["sentence_embedding"] for side in (queries, documents)]
        first, second = (torch.nn.functional.normalize(side, dim=1) for side in sides)
        return task.found(lambda rows: first[rows] @ second.T)


def summary(results: list[Figures]) -> dict[str, dict[str, float]]:
    """Mean over queries and seeds, and the standard deviation over seeds."""
    means = {name: np.array([result[name].mean() for result in results]) for name in results[0]}
    return {
        name: {"mean": float(each.mean()), "std": float(each.std(ddof=len(each) > 1))} for name, each in means.items()
    }


def figures_of(task: Task, args: argparse.Namespace) -> dict[str, Any]:
    width = task.documents.shape[1]
    dims = [dim for dim in DIMS if dim < width]
    matrices, seconds, chosen = fitted_matrices(task, dims, args.seeds, 5 if args.smoke else None)
    wanted = task.search(width)
    main = f"ndcg@{K}" if task.relevant else f"recall@{K}"
    at_dims = {
        way: {dim: [task.measure(task.search(dim, matrix=matrix), wanted) for matrix in per_seed] for dim in dims}
        for way, per_seed in matrices.items()
    }
    at_bytes, more_seconds = by_bytes(task, matrices, args.seeds, args.bytes, args.csr)

    def beyond(ours: list[Figures], theirs: list[Figures]) -> dict[str, float]:
        """Ours minus theirs, over all seeds of both."""
        first, second = (np.array([figures[main] for figures in each]) for each in (ours, theirs))
        return bootstrap(first - second.mean(axis=0))

    return {
        "documents": len(task.documents),
        "queries": len(task.queries),
        "fitted on": len(task.fitted),
        "measure": main,
        "full width": summary([task.measure(wanted, wanted)]),
        "chosen": chosen,
        "seconds": seconds | more_seconds,
        "dims": {way: {str(dim): summary(runs) for dim, runs in by_dim.items()} for way, by_dim in at_dims.items()},
        "over PCA": {str(dim): beyond(at_dims["rotation"][dim], at_dims["PCA"][dim]) for dim in dims},
        "bytes": {
            row: {str(size): {"cell": cell, **summary(runs)} for size, (cell, runs) in by_size.items()}
            for row, by_size in at_bytes.items()
        },
        "over OPQ": {
            row: {
                str(size): beyond(runs, at_bytes[RIVAL][size][1])
                for size, (_, runs) in at_bytes[row].items()
                if size in at_bytes[RIVAL]
            }
            for row in ("rotation, int8", "rotation, int4", "rotation, binary", PLAIN_PQ, INTERLEAVED)
        },
    }


def show(name: str, found: dict[str, Any]) -> None:
    main = found["measure"]
    console = Console(width=160)
    title = f"{name}: {main} x100, {found['documents']} documents, full width {found['full width'][main]['mean']:.1f}"
    for part in ("dims", "bytes"):
        headings = dict.fromkeys(key for by_key in found[part].values() for key in by_key)
        rows = {
            row: {key: f"{by_key[key][main]['mean']:.1f}" if key in by_key else "" for key in headings}
            for row, by_key in found[part].items()
        }
        console.print(table_of(f"{title}, by {part}", rows))


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    model = load_model(args.model)
    sets: dict[str, Callable[[], Corpus]] = {name: (lambda name=name: SETS[name](args.data)) for name in args.sets}
    sets |= {f"nano {name}": (lambda name=name: corpora.nano(name, args.nano_id)) for name in args.nano}
    if args.smoke and not sets:
        sets["synthetic"] = corpora.synthetic
    settings = {"model": Path(args.model).name if args.model else "all-MiniLM-L6-v2", "seeds": args.seeds}
    settings |= {"docstrings": versions(), "faiss": faiss.__version__}
    report: dict[str, Any] = {"settings": settings, "sets": {}}
    if args.json and args.json.exists():
        report["sets"] = json.loads(args.json.read_text(encoding="utf-8"))["sets"]
    for name, load in sets.items():
        with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
            task = Task.of(load(), model, args.cache)
        report["sets"][name] = figures_of(task, args)
        show(name, report["sets"][name])
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
