"""What the model's ``config.json`` and its model card say about dims, for serving engines and for readers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import nn

from mipic_st.encoder.structure import depth_of, embedding_width, encoders_in, full_width, unwrap
from mipic_st.validation import checked_dims, checked_pairs

logger = logging.getLogger(__name__)

_CUT = "Its vectors can be cut"
_SECTION = "## Truncated embeddings"


def set_matryoshka_config(
    model: nn.Module, matryoshka_dims: Sequence[int], pic_chain: Iterable[tuple[int, int]] = ()
) -> None:
    """Write into the model's config what serving engines read, so that every later ``save`` puts it in ``config.json``.

    The keys are ``is_matryoshka: true``, ``matryoshka_dimensions: [...]`` and, with a chain,
    ``mipic_chain: [[dim, layer], ...]``, in each encoder of a Router. A model with adapters (PEFT) is saved without
    ``config.json``: call this again after merging them. The model card gets a tag and a line on ``truncate_dim``.

    Args:
        model: SentenceTransformer model.
        matryoshka_dims: The dimensions that the model was trained at, each from 1 to its width.
        pic_chain: The (dim, layer) pairs that PIC trained.

    Raises:
        TypeError: If dims or the chain are of the wrong kind.
        ValueError: If no dim is given, a dim or layer is out of range, or the model has no Transformer.

    Example:
        >>> set_matryoshka_config(model, [384, 128, 32])  # doctest: +SKIP
    """
    if not encoders_in(unwrap(model)):
        raise ValueError("The model has no Transformer module, so there is no config.json for the keys.")
    describe_dims(model, matryoshka_dims, pic_chain)


def describe_dims(
    model: nn.Module, dims: Iterable[int], pic_chain: Iterable[tuple[int, int]] = (), introduction: str = ""
) -> None:
    """Say at which dims the model can be used: in its config, where it has one, and in its card."""
    inner = unwrap(model)
    width, encoders = embedding_width(inner), encoders_in(inner)
    dims = sorted(checked_dims("matryoshka_dims", dims, width))
    depths = [depth for encoder in encoders if (depth := depth_of(encoder)) is not None]
    pairs = checked_pairs("pic_chain", pic_chain, min(depths, default=None), width)
    for config in (encoder.config for encoder in encoders):
        config.is_matryoshka, config.matryoshka_dimensions = True, dims
        if pairs:
            config.mipic_chain = [list(pair) for pair in pairs]
        elif hasattr(config, "mipic_chain"):  # of a training before
            del config.mipic_chain
    extend_model_card(inner, dims, introduction)


def extend_model_card(model: SentenceTransformer, dims: Iterable[int], introduction: str = "") -> None:
    """Say in the model card how to load the model at other dims, replacing what it said about dims before.

    A card that sentence-transformers writes again has the line behind what the model is for; one that came with the
    model is saved as it is, so it gets a section.
    """
    smaller = sorted(dim for dim in set(dims) if dim < full_width(model))
    data: Any = model.model_card_data
    data.task_name = data.task_name and data.task_name.partition(f". {_CUT}")[0]
    if not smaller:
        data.tags = [tag for tag in data.tags or [] if tag != "matryoshka"]
        _extend_loaded_card(model, "")
        return
    listed = " or ".join(filter(None, [", ".join(map(str, smaller[:-1])), str(smaller[-1])]))
    usage = (
        f"{_CUT} to {listed} values: load the model with `SentenceTransformer(..., truncate_dim="
        f"{smaller[len(smaller) // 2]})` and encode with `normalize_embeddings=True`"
    )
    data.add_tags(["matryoshka"])
    if data.task_name is not None:
        # the template ends the sentence with a full stop
        data.task_name = f"{data.task_name}. {usage}"
    _extend_loaded_card(model, f"{introduction} {usage}.".strip())


def _extend_loaded_card(model: SentenceTransformer, text: str) -> None:
    """Replace the text of its section; an empty text removes section and tag."""
    from huggingface_hub import ModelCard

    # private: sentence-transformers has no other way to a loaded card. Without it the tag remains.
    content = getattr(model, "_model_card_text", None)
    if not isinstance(content, str):
        return
    # a section of that name with other words is the author's own
    put_there = rf"\n+{_SECTION}\n(?:(?!\n#).)*?{_CUT}.*?(?=\n#|\Z)"
    if not text and not re.search(put_there, content, flags=re.DOTALL):
        return
    try:
        card: Any = ModelCard(content, ignore_metadata_errors=True)
    except Exception as error:  # what is above the text may be anything, and reading it raise anything
        reason = " ".join(str(error).split())
        logger.warning("The model card stays as it is, since its front matter cannot be read: %s", reason)
        return
    listed = card.data.get("tags")
    tags = [tag for tag in (listed if isinstance(listed, list) else [listed]) if tag not in (None, "matryoshka")]
    card.data.tags = [*tags, "matryoshka"] if text else tags
    others = re.sub(put_there, "", card.text.rstrip(), flags=re.DOTALL)
    section = f"\n\n{_SECTION}\n\n{text}" if text else ""
    card.text = f"{others.rstrip()}{section}\n"
    model._model_card_text = str(card)  # type: ignore[assignment]


def restate_config(exported: SentenceTransformer, layer: int | None, dim: int | None) -> None:
    """Keep of what the config says about dims and layers what still holds for a model that was cut."""
    width = dim or full_width(exported)
    for config in (encoder.config for encoder in encoders_in(exported)):
        dims = [value for value in getattr(config, "matryoshka_dimensions", None) or [] if value < width]
        for name in ("is_matryoshka", "matryoshka_dimensions"):
            if hasattr(config, name):
                delattr(config, name)
        if dims:
            config.is_matryoshka, config.matryoshka_dimensions = True, [*sorted(dims), width]
            extend_model_card(exported, dims)
        if (pairs := getattr(config, "mipic_chain", None)) is not None:
            config.mipic_chain = [pair for pair in pairs if pair[0] <= width and (layer is None or pair[1] <= layer)]
            if not config.mipic_chain:
                del config.mipic_chain
