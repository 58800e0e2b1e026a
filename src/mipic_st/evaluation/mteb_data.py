"""Data of MTEB tasks: local files, and digests that tell MTEB's own sets from others."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Digests of whole sets as `set_digest` makes them, by task and split: what local files must match to bear MTEB's name.
KNOWN_SETS = {
    "STS13": {"test": "28121df3e17b7b390bea817341018dd7"},
    "STS14": {"test": "4e3ca2ed431647876e69e060b543934d"},
    "STS15": {"test": "0c878ee49f1ceba7328480571b8b95c2"},
    "Banking77Classification": {
        "train": "9288f8a1aeab70a51ad786754ad0b8f8",
        "test": "e30782186c8304a555a95c6f538b171b",
    },
}


_COLUMNS = {
    "STS": ["sentence1", "sentence2", "score"],
    "Classification": ["text", "label"],
    "PairClassification": ["sentence1", "sentence2", "labels"],
}


def _local_file(task_name: str, split: str, data_dir: Path) -> Path | None:
    short = task_name.removesuffix("Classification").lower()
    candidates = [data_dir / task_name / f"{split}{ending}" for ending in (".csv", ".parquet", ".jsonl")]
    candidates += [data_dir / f"{stem}_{split}.csv" for stem in (task_name, short)]
    return next((path for path in candidates if path.is_file()), None)


def with_local_data(task: Any, data_dir: Path | None) -> Any:
    """A copy of the task that holds the data of local files; None if a split has no file."""
    if data_dir is None:
        return None
    import pandas as pd
    from datasets import Dataset, DatasetDict

    name, kind = task.metadata.name, task.metadata.type
    columns = _COLUMNS.get(kind)
    if columns is None or list(task.hf_subsets) != ["default"]:
        return None
    splits = [*([task.train_split] if kind == "Classification" else []), *task.eval_splits]
    files = {split: path for split in splits if (path := _local_file(name, split, data_dir))}
    if not set(splits) <= set(files):
        return None
    texts = dict.fromkeys(columns[:-1], str)
    parts = {}
    for split, path in files.items():
        try:
            if path.suffix == ".parquet":
                frame = pd.read_parquet(path)
            elif path.suffix == ".jsonl":
                frame = pd.read_json(path, lines=True, dtype=texts, encoding="utf-8-sig")
            else:
                # "NA" and empty cells are texts here, not missing values
                frame = pd.read_csv(path, dtype=texts, keep_default_na=False)
        except (ValueError, OSError) as error:  # those of pandas and pyarrow are ValueErrors
            raise ValueError(f"{str(path)!r} cannot be read as {path.suffix[1:]}: {error}") from error
        lacking = [column for column in columns if column not in frame.columns]
        if lacking:
            raise ValueError(f"{str(path)!r} has no column {', '.join(lacking)}; {name} needs {', '.join(columns)}.")
        if "score" in columns:
            scores = pd.to_numeric(frame["score"], errors="coerce")
            if (wrong := scores.isna()).any():
                raise ValueError(
                    f"{str(path)!r} has {int(wrong.sum())} scores that are no numbers, the first is "
                    f"{frame['score'][wrong].iloc[0]!r}."
                )
            frame["score"] = scores
        elif (wrong := frame[columns[-1]].isna() | (frame[columns[-1]].astype(str).str.strip() == "")).any():
            raise ValueError(
                f"{str(path)!r} has {int(wrong.sum())} rows without a label, the first is row "
                f"{int(wrong.to_numpy().argmax()) + 1}; they would be a class of their own. Fill them."
            )
        expected = (task.metadata.descriptive_stats or {}).get(split, {}).get("num_samples")
        if expected is not None and expected != len(frame):
            raise ValueError(
                f"{str(path)!r} has {len(frame)} rows, {name}'s {split} part has {expected}: scores of partial data "
                f"must not carry the task's name. Use the whole set."
            )
        parts[split] = Dataset.from_pandas(frame[columns], preserve_index=False)
    local = copy.copy(task)
    local.dataset = DatasetDict(parts)
    local.data_loaded = True
    return local


def short_hash(value: Any) -> str:
    """Eight hex digits for a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def set_digest(kind: str, columns: Mapping[str, Sequence[Any]]) -> str:
    """Digest of a whole set as MTEB scores it, 32 hex digits.

    Copies of one set differ in white space and quotes: texts count by letters and digits, gold scores by three
    decimals, labels by which rows share one; pairs in any order. Classification draws training texts by row.
    """
    texts = [columns[name] for name in ("text", "sentence1", "sentence2") if name in columns]
    if "score" in columns:
        gold: list[Any] = [f"{float(value):.3f}" for value in columns["score"]]
    else:
        labels = columns["label"] if "label" in columns else columns["labels"]
        number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        gold = [number[label] for label in labels] if kind == "Classification" else list(map(str, labels))
    rows = [
        json.dumps([*("".join(filter(str.isalnum, str(text))) for text in row[:-1]), row[-1]])
        for row in zip(*texts, gold, strict=True)
    ]
    rows = rows if kind == "Classification" else sorted(rows)
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=16).hexdigest()


def is_known_set(task: Any) -> bool:
    """Whether the local data of a task is MTEB's own set, as far as that is known here."""
    known, kind = KNOWN_SETS.get(task.metadata.name), task.metadata.type
    return known == {split: set_digest(kind, part.to_dict()) for split, part in task.dataset.items()}


def with_listed_columns(task: Any) -> Any:
    """A copy of a classification task whose data gives columns as lists: mteb asks for each label on its own."""
    from datasets import Dataset

    class Listed(Dataset):
        def __getitem__(self, key: Any) -> Any:
            found = super().__getitem__(key)
            return found[:] if isinstance(key, str) else found

    def listed(data: Any) -> Any:
        if isinstance(data, dict):
            return type(data)({key: listed(part) for key, part in data.items()})
        if type(data) is Dataset:
            data = copy.copy(data)
            data.__class__ = Listed
        return data

    task = copy.copy(task)
    task.dataset = listed(task.dataset)
    return task
