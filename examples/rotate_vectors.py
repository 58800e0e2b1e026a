"""Rotate existing vectors: from an API, from a database, or of a model that cannot be changed.

    python examples/rotate_vectors.py                                      # made-up vectors, to see how it works
    python examples/rotate_vectors.py vectors.npy --dims 256 64 16 --output rotated.npy
    python examples/rotate_vectors.py queries.npy documents.npy --dims 64 16 --output rotated.npy

One file holds vectors of texts; two files hold vectors of pairs, row by row, of which the first file's are written. The
saved matrix rotates new vectors: Rotation.load("rotated.safetensors")(vector, dim=64).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from mipic_st import Rotation, fit_rotation


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help=".npy, (N, D): anchors, and optionally positives")
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 32, 16, 8])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=Path, help="where to write the rotated vectors; the matrix goes next to them")
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that all runs")
    return parser.parse_args()


def made_up(count: int = 4000, width: int = 128, topics: int = 40) -> list[np.ndarray]:
    """Pairs of one topic each, the topic in the last quarter of the values, noise in the others."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(topics, width // 4))
    sides = []
    topic = random.integers(topics, size=count)
    own = random.normal(size=(count, width // 4))
    for _ in range(2):
        signal = centres[topic] + 0.5 * own + 0.2 * random.normal(size=own.shape)
        sides.append(np.concatenate([0.5 * random.normal(size=(count, width - width // 4)), signal], axis=1))
    return [side.astype(np.float32) for side in sides]


def main() -> None:
    args = parse_args()
    if len(args.files) > 2:
        raise SystemExit("give one file of vectors, or two files of pairs")
    if args.output and (args.output.suffix != ".npy" or not args.output.absolute().parent.is_dir()):
        raise SystemExit(f"--output must be a file NAME.npy in a folder that is there, got {str(args.output)!r}")
    arrays = [np.load(file) for file in args.files] or made_up()
    rotation = fit_rotation(*arrays, dims=args.dims, max_steps=20 if args.smoke else args.steps, show_progress_bar=True)
    print(rotation)
    if args.output:
        np.save(args.output, rotation(arrays[0]))
        matrix = args.output.with_suffix(".safetensors")
        rotation.save(matrix)
        assert (Rotation.load(matrix).matrix == rotation.matrix).all()
        print(f"rotated vectors in {args.output}, the matrix in {matrix}")


if __name__ == "__main__":
    main()
