"""Build the supervised pairs of the README's comparison from four public sets: SICK, MRPC, STS 2012 and Banking77.

    python examples/benchmarks/training_mix.py sick_train.csv mrpc_train.csv sts12_train.csv banking77_train.csv \
        --output mix.csv

Columns: SICK sentence1, sentence2, entailment; MRPC sentence1, sentence2, label; STS sentence1, sentence2, score;
Banking77 text, label. The pairs that mean the same are kept: SICK's ENTAILMENT, MRPC's label 1, STS scores of 4
and more, and Banking77 texts of one label, paired at random.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("sick", "mrpc", "sts", "banking77"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--output", type=Path, default="mix.csv")
    return parser.parse_args()


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False)  # "None" and "NA" are texts too


def same_label_pairs(texts: pd.DataFrame) -> pd.DataFrame:
    """Every text at most once, with another one of its label."""
    drawn = texts.sample(frac=1, random_state=0)
    place = drawn.groupby("label").cumcount()
    first, second = (drawn[place % 2 == side].assign(number=place // 2) for side in (0, 1))
    return first.merge(second, on=["label", "number"], suffixes=("1", "2"))


def main() -> None:
    args = parse_args()
    sick, mrpc, sts, banking = map(read, (args.sick, args.mrpc, args.sts, args.banking77))
    pairs = [
        sick[sick["entailment"].str.upper() == "ENTAILMENT"],
        mrpc[mrpc["label"] == 1],
        sts[sts["score"] >= 4],
        same_label_pairs(banking).rename(columns={"text1": "sentence1", "text2": "sentence2"}),
    ]
    mix = pd.concat([part[["sentence1", "sentence2"]] for part in pairs]).sample(frac=1, random_state=0)
    mix = mix.rename(columns={"sentence1": "anchor", "sentence2": "positive"})
    mix.to_csv(args.output, index=False)
    print(f"{len(mix)} pairs ({', '.join(str(len(part)) for part in pairs)}) written to {args.output}")


if __name__ == "__main__":
    main()
