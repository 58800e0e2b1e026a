"""Seconds and memory of fitting tails, on random vectors: rotation, and one layer's cut, in three steps.

    python examples/benchmarks/benchmark_tails.py  # 20,000 x 384 and 50,000 x 1,024, some minutes on two cores
    python examples/benchmarks/benchmark_tails.py --sizes 20000x384 9490x4096
    python examples/benchmarks/benchmark_tails.py --only documents PCA OPQ --neighbour
    python examples/benchmarks/benchmark_tails.py --smoke

Each fit runs in a process of its own. Memory is the highest resident size during the fit beyond what the process had
with the vectors in it, in units of the vectors (anchors and positives). "documents" is the rotation of one array alone;
its PCA, and the training of faiss's OPQ for 32 bytes, are there to compare it with in the same run; "advice" is
`advise` on this array, with all cells. With --neighbour each fit is timed again next to a job that keeps two threads
busy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

DIMS = [256, 128, 64, 32, 16, 8]
ALONE = ("documents", "PCA", "OPQ", "advice")  # fitted on the anchors without positives
WHAT = ("rotation", *ALONE, "word weights", "least squares", "refined cut")
# A job with two threads, until it is ended.
BUSY = "import torch; torch.set_num_threads(2); a = torch.randn(1500, 1500)\nwhile True: a @ a"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["20000x384", "50000x1024"], metavar="NxD")
    parser.add_argument("--only", nargs="+", choices=WHAT, default=WHAT, metavar="WHAT", help=f"of {', '.join(WHAT)}")
    parser.add_argument("--neighbour", action="store_true", help="each fit again, next to a busy job")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="small vectors, to see that all runs")
    parser.add_argument("--one", nargs=2, metavar=("WHAT", "NxD"), help=argparse.SUPPRESS)
    return parser.parse_args()


def peak_bytes() -> int:
    """Highest resident size of this process so far."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(what: str, size: str, threads: int) -> None:
    import time

    import faiss
    import torch

    from mipic_st.advice.advise import advise
    from mipic_st.transforms.cut_fits import fit_cut, refine_cut
    from mipic_st.transforms.orthogonal import pca_basis
    from mipic_st.transforms.rotation_fit import fit_rotation
    from mipic_st.transforms.word_weights import fit_word_weights

    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    count, width = map(int, size.split("x"))
    generator = torch.Generator().manual_seed(0)
    anchors = torch.randn(count, width, generator=generator)
    positives = torch.randn(count, width, generator=generator).mul_(0.5).add_(anchors)
    dims = [dim for dim in DIMS if dim < width]
    if what != "least squares":  # what it imports should not count
        fit_rotation(anchors[:300], positives[:300], dims=[8], max_steps=1)
    if what == "advice":
        advise(anchors[:300])
    # the first 4,000 texts at most, as fit_layer_cuts takes them, of 16 tokens each
    texts = min(4000, count)
    states = torch.randn(16 * texts, width, generator=generator).bfloat16() if what == "word weights" else None
    before, start = peak_bytes(), time.perf_counter()
    if what == "rotation":
        fit_rotation(anchors, positives, dims=dims)
    elif what == "documents":
        fit_rotation(anchors, dims=dims)
    elif what == "advice":
        advise(anchors)
    elif what == "PCA":
        pca_basis(anchors, torch.arange(count))
    elif what == "OPQ":
        faiss.OPQMatrix(width, min(32, width // 4), min(128, width)).train(anchors.numpy())
    elif states is not None:
        tokens = torch.randint(30_000, (len(states),), generator=generator)
        embeddings = torch.randn(30_000, width, generator=generator)
        lengths = torch.full((texts,), 16)
        unit = torch.nn.functional.normalize(anchors[:texts], dim=1)
        fit_word_weights(states, tokens, lengths, embeddings, unit, [*dims, width])
    elif what == "least squares":
        fit_cut(anchors, positives)
    else:
        held = anchors[:512], positives[:512]
        refine_cut(torch.eye(width), anchors[512:], positives[512:], [*dims, width], held_out=held)
    seconds = time.perf_counter() - start
    vectors = (1 if what in ALONE else 2) * anchors.numel() * anchors.element_size()
    print(json.dumps({"seconds": seconds, "memory": (peak_bytes() - before) / vectors}))


def in_a_process(what: str, size: str, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(threads), "--one", what, size]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    args = parse_args()
    if args.one:
        measure(*args.one, args.threads)
        return
    print(f"{'':14} {'vectors':>12} {'seconds':>8} {'added memory / vectors':>23}{'beside a job':>14}")
    for size in ["600x32"] if args.smoke else args.sizes:
        for what in args.only:
            figures = in_a_process(what, size, args.threads)
            beside = ""
            if args.neighbour:
                with subprocess.Popen([sys.executable, "-c", BUSY]) as busy:
                    try:
                        seconds = in_a_process(what, size, args.threads)["seconds"]
                    finally:
                        busy.kill()
                beside = f"x {seconds / figures['seconds']:.2f}"
            line = f"{what:14} {size:>12} {figures['seconds']:8.1f} {figures['memory']:23.2f}{beside:>14}"
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    main()
