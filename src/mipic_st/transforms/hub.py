"""A map in a folder or on the Hugging Face hub, with a card that says what it is, for which model, and its figures.

No torch, and huggingface_hub only where it is needed: workers load maps by this.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Self

import numpy as np

from mipic_st.files import new_folder
from mipic_st.transforms.verdict import Judged

_TAGS = ["mipic-st", "matryoshka", "sentence-transformers", "embeddings"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class OnHub(Judged):
    """A square map that says where it comes from, and is kept in a folder or on the hub.

    Attributes:
        model_name: Whose vectors it is for: a name of the hub, or ``local/<folder>``.
        revision: Which state of that model: its :func:`~mipic_st.encoder.fingerprint.fingerprint`, or a commit.
        corpus: What it was fitted on, in words.
    """

    file_name: ClassVar[str] = "rotation.safetensors"
    model_name: str = ""
    revision: str = ""
    corpus: str = ""

    @property
    def fingerprint(self) -> str:
        """A short name of matrix and ranges: files of codes say by it which rotation made them."""
        digest = hashlib.blake2b(self.matrix.tobytes(), digest_size=8)
        for dim, ranges in sorted((self.ranges or {}).items()):
            digest.update(f"{dim}".encode() + np.asarray(ranges).tobytes())
        return digest.hexdigest()

    def describe(
        self, *, model_name: str | None = None, revision: str | None = None, corpus: str | None = None
    ) -> Self:
        """Say what it is for and what it was fitted on, for its file and its card.

        Args:
            model_name: Whose vectors it is for, e.g. ``sentence-transformers/all-MiniLM-L6-v2``. None keeps what is
                known, here and below.
            revision: Which state of that model.
            corpus: What it was fitted on, e.g. ``20,000 help pages of 2026``.

        Returns:
            The same map with these texts.

        Raises:
            TypeError: If one is no text.
        """
        given = {"model_name": model_name, "revision": revision, "corpus": corpus}
        found = replace(self, **{name: text for name, text in given.items() if text is not None})
        found._check_texts()
        return found

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Write the map and its card into a new folder.

        Args:
            folder: A new or empty folder, which gets ``rotation.safetensors`` and ``README.md``.

        Raises:
            ValueError: If the folder is not empty, or cannot be written.
        """
        self._write(Path(folder), Path(folder).resolve().name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Read what :meth:`save_pretrained` or :meth:`push_to_hub` wrote; a model that was rotated has the file too.

        Args:
            name_or_folder: A folder, or a name of the hub.
            revision: Branch, tag or commit on the hub.
            token: For private repositories; None takes that of ``hf auth login``.
            cache_folder: Where files of the hub are kept.
            local_files_only: Do not ask the hub, take what is kept.

        Returns:
            The map.

        Raises:
            FileNotFoundError: If the file is neither in the folder nor on the hub, or the hub cannot be reached.
            ValueError: If the file is damaged or holds something else.

        Example:
            >>> rotation = Rotation.from_pretrained("me/rotation-of-my-corpus")  # doctest: +SKIP
        """
        if Path(name_or_folder).is_dir():
            return cls.load(Path(name_or_folder) / cls.file_name)
        from huggingface_hub import hf_hub_download

        try:
            file = hf_hub_download(
                str(name_or_folder),
                cls.file_name,
                revision=revision,
                token=token,
                cache_dir=cache_folder,
                local_files_only=local_files_only,
            )
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{str(name_or_folder)!r} is no folder, and the hub does not give its {cls.file_name}: {error}"
            ) from error
        return cls.load(file)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
    ) -> str:
        """Put the map and its card on the hub; the repository is made, if it is not there.

        Args:
            repo_id: Name of the repository, with the user or organisation in front.
            token: Of the hub; None takes that of ``hf auth login``.
            private: Whether a new repository is private. None leaves it to the organisation.
            commit_message: Default: that a rotation was added.
            revision: Branch, made if it is not there. Default: the main one.

        Returns:
            Address of the commit.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        with TemporaryDirectory() as place:
            self._write(Path(place), name)
            done = api.upload_folder(
                repo_id=name,
                folder_path=place,
                commit_message=commit_message or f"Add a {self.kind}",
                revision=revision,
            )
        return str(done.commit_url)

    def check(self) -> None:
        """Texts, too."""
        super().check()
        self._check_texts()

    def _check_texts(self) -> None:
        for name in ("model_name", "revision", "corpus"):
            if not isinstance(text := getattr(self, name), str):
                raise TypeError(f"{name} must be a text, got {text!r}.")

    def _write(self, folder: Path, name: str) -> None:
        with new_folder(folder) as new:
            self.save(new / self.file_name)
            (new / "README.md").write_text(self._card(name), encoding="utf-8")

    def _card(self, name: str) -> str:
        """What it is, for which model, from which corpus, its figures, and how it is used."""
        from huggingface_hub import ModelCardData

        width, kind = len(self.matrix), type(self).__name__
        # the card's own header names models of the hub only
        base = None if self.model_name.startswith("local/") else self.model_name or None
        header = ModelCardData(library_name="mipic-st", tags=_TAGS, base_model=base).to_yaml()
        facts = {
            "model": self.model_name or "not given",
            "revision": self.revision or "not given",
            "corpus": self.corpus or "not given",
            "dims": f"{', '.join(map(str, self.dims))} of {width}",
            "fitted as": self.chosen or "not given",
            "fingerprint": self.fingerprint,
        }
        dim = self.dims[len(self.dims) // 2]
        options = f'dim={dim}, precision="{"int8" if dim in (self.ranges or {}) else "float16"}"'
        return f"""---
{header}
---

# A {self.kind} of embeddings

An orthogonal map of vectors of {width} values, fitted so that the first values of rotated vectors carry the most
information: a search with few of them finds most of what the full width finds. Full-width cosine similarities stay as
they are, and no model was trained.

{_table([["", ""], *facts.items()])}
## Figures

{self.caption}.

{_table(self._rows()) if self.report else ""}
{self.verdict}

## Use

`pip install mipic-st`

```python
from mipic_st import {kind}

{self.kind} = {kind}.from_pretrained({json.dumps(name)})
codes = {self.kind}.encode(vectors, {options})  # of documents, at full width
scores = {self.kind}.scores(queries, codes, {options})
{self.kind}.put_in(model)  # or in the model itself: its vectors are then rotated
```
"""

    def __repr__(self) -> str:
        said = "".join(f", {text}" for text in (self.chosen, self.model_name) if text)
        return f"{type(self).__name__}({len(self.matrix)} values, dims {list(self.dims)}{said})"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first row as the head."""
    head, *others = ([" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in rows)
    lines = [head, ["-" * max(3, len(cell)) for cell in head], *others]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
