"""MIPICLoss and the rotation on one GPU: step and memory against MatryoshkaLoss, the fit, and its application.

    python examples/benchmarks/gpu.py --json gpu.json   # at most 8 minutes on one large GPU; nothing is downloaded
    python examples/benchmarks/gpu.py --smoke           # tiny models on the CPU, to see that all runs

Models have random weights in the shapes of BERT-base, BGE-M3 and Qwen3-0.6B, and run in bfloat16: time and memory do
not depend on what they have learned. Figures are ratios to MatryoshkaLoss in the same run, medians over rounds in which
every method takes one step. The fit is of a million random vectors of 1,024 values, on six dims. What does not fit into
the time left or the memory is named and left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F

from mipic_st import MIPICLoss, fit_rotation

# Config class, its sizes and the pooling of each shape; "smoke" is for the CPU.
SHAPES: dict[str, tuple[str, dict[str, int], str]] = {
    "bert-base": (
        "BertConfig",
        {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
        | {"vocab_size": 30522, "max_position_embeddings": 2050},
        "mean",
    ),
    "bge-m3": (
        "XLMRobertaConfig",
        {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        | {"vocab_size": 250002, "max_position_embeddings": 8194},
        "cls",
    ),
    "qwen3-0.6b": (
        "Qwen3Config",
        {"hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8}
        | {"head_dim": 128, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 4096},
        "lasttoken",
    ),
    "smoke": (
        "BertConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
        | {"vocab_size": 100, "max_position_embeddings": 64},
        "mean",
    ),
}
METHODS: dict[str, Callable[[Any, list[int]], torch.nn.Module]] = {
    "MatryoshkaLoss": lambda model, dims: losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model), dims
    ),
    "MIPICLoss": lambda model, dims: MIPICLoss(model, losses.MultipleNegativesRankingLoss(model), dims),
    "MatryoshkaLoss, cached": lambda model, dims: losses.MatryoshkaLoss(
        model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH), dims
    ),
    "MIPICLoss, cached": lambda model, dims: MIPICLoss(
        model, losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=MINI_BATCH), dims
    ),
}
MINI_BATCH = 8
PADDING_ID = 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES][:-1], default=[*SHAPES][:-1])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048], help="tokens per sentence")
    parser.add_argument("--tokens", type=int, default=2**13, help="tokens of one column of a batch")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps per method, after one that is not timed")
    parser.add_argument("--rows", type=int, default=10**6, help="vectors of the fit")
    parser.add_argument("--width", type=int, default=1024, help="their width")
    parser.add_argument("--minutes", type=float, default=8, help="what has not begun by then is left out")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file, too")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to see that all runs")
    args = parser.parse_args()
    if args.smoke:
        args.shapes, args.lengths, args.tokens, args.rounds = ["smoke"], [8, 16], 128, 1
        args.rows, args.width, args.device = 2000, 64, "cpu"
    elif not torch.cuda.is_available() and args.device.startswith("cuda"):
        raise SystemExit("there is no GPU here; --smoke runs tiny sizes on the CPU")
    return args


def make_model(shape: str, device: str) -> SentenceTransformer:
    """A model of this shape with random weights, in bfloat16; its tokenizer is never asked."""
    kind, sizes, pooling = SHAPES[shape]
    config = getattr(transformers, kind)(**sizes, pad_token_id=PADDING_ID)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        transformers.AutoModel.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[PAD]": PADDING_ID}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]"
        ).save_pretrained(folder)
        transformer = Transformer(folder, model_kwargs={"dtype": torch.bfloat16})
    modules = [transformer, Pooling(sizes["hidden_size"], pooling_mode=pooling), Normalize()]
    return SentenceTransformer(modules=modules, device=device)


def dims_of(width: int) -> list[int]:
    return [width, *(dim for dim in (512, 256, 128, 64, 32) if dim < width)]


def measure_steps(args: argparse.Namespace, shape: str, length: int) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak memory of each method's steps, and their ratios to MatryoshkaLoss."""
    model = make_model(shape, args.device).train()
    width, rows = model.get_embedding_dimension(), max(4, args.tokens // length)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, SHAPES[shape][1]["vocab_size"], (2, rows, length), generator=generator).to(args.device)
    batch = [{"input_ids": column, "attention_mask": torch.ones_like(column)} for column in tokens]
    trained = {name: make(model, dims_of(width)).to(args.device) for name, make in METHODS.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # no state: what differs is the loss
    seconds: dict[str, list[float]] = {name: [] for name in trained}
    peaks: dict[str, float] = {}
    for number in range(args.rounds + 1):
        for name, loss in trained.items():
            taken, peak = one_step(args.device, loss, batch, optimizer)
            if number:  # the first step also allocates
                seconds[name].append(taken)
                peaks[name] = max(peak, peaks.get(name, 0.0))
    found = {}
    for name in trained:
        reference = "MatryoshkaLoss, cached" if name.endswith("cached") else "MatryoshkaLoss"
        pairs = zip(seconds[name], seconds[reference], strict=True)
        found[name] = {
            "step_ms": 1000 * statistics.median(seconds[name]),
            "step_ratio": statistics.median(own / other for own, other in pairs),
            "peak_mb": peaks[name],
            "peak_ratio": peaks[name] / max(peaks[reference], 1e-9),
            "rows": rows,
        }
    return found


def one_step(device: str, loss: torch.nn.Module, batch: list[dict], optimizer: Any) -> tuple[float, float]:
    """Seconds and peak MB of a step; memory is measured on a GPU only."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = loss([dict(column) for column in batch], None)
    (sum(value.values()) if isinstance(value, dict) else value).backward()
    optimizer.step()
    optimizer.zero_grad()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start, torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0


def measure_vectors(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of the fit of many vectors, and gigabytes of vectors a second that the rotation is applied to."""
    generator = torch.Generator(args.device).manual_seed(0)
    # values that fall off, as those of real vectors do along their principal axes, then mixed
    scales = torch.arange(1, args.width + 1, device=args.device).float().rsqrt()
    mixing = torch.linalg.qr(torch.randn(args.width, args.width, device=args.device, generator=generator))[0]
    vectors = torch.randn(args.rows, args.width, device=args.device, generator=generator) * scales @ mixing
    vectors = F.normalize(vectors, dim=1)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = time.perf_counter()
    dims = [dim for dim in (512, 256, 128, 64, 32, 16) if dim < args.width]
    rotation = fit_rotation(vectors, dims=dims, max_steps=10 if args.smoke else None)
    found = {"fit_seconds": time.perf_counter() - before}
    if on_gpu:
        found["fit_peak_ratio"] = torch.cuda.max_memory_allocated() / vectors.nbytes
    taken = []
    for _ in range(6):
        before = time.perf_counter()
        for part in vectors.split(2**17):
            rotation(part, dim=64 if args.width > 64 else 16)
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - before)
    found["gigabytes_per_second"] = vectors.nbytes / 1e9 / statistics.median(taken[1:])
    return found


def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    result: dict[str, Any] = {"device": device, "torch": torch.__version__, "steps": [], "left_out": []}
    # the quickest first: should the time end, the rest is named
    jobs: list[tuple[str, Callable[[], Any]]] = [("vectors", lambda: measure_vectors(args))]
    for length in args.lengths:
        for shape in args.shapes:
            jobs.append((f"{shape}, {length} tokens", lambda s=shape, n=length: measure_steps(args, s, n)))
    for name, job in jobs:
        if time.perf_counter() - start > 60 * args.minutes:
            result["left_out"].append(f"{name}: no time left")
            continue
        try:
            found = job()
        except torch.cuda.OutOfMemoryError:
            result["left_out"].append(f"{name}: out of memory")
            continue
        if name == "vectors":
            result["vectors"] = found
            print(f"{name}: " + ", ".join(f"{key} {value:.2f}" for key, value in found.items()), flush=True)
            continue
        for method, figures in found.items():
            result["steps"].append({"case": name, "method": method, **figures})
            memory = f"{figures['peak_mb']:8.0f} MB x {figures['peak_ratio']:.2f}" if figures["peak_mb"] else ""
            print(
                f"{name:24} {method:24} {figures['step_ms']:8.1f} ms x {figures['step_ratio']:.2f} {memory}", flush=True
            )
    for line in result["left_out"]:
        print(f"left out: {line}")
    result["seconds"] = time.perf_counter() - start
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
