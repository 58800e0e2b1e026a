"""An ONNX file whose ``last_hidden_state`` is behind the model's linear tail, for runtimes that pool by themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn

from mipic_st.encoder.encoding import PROBE_TEXTS, encode_texts, prompt_of
from mipic_st.encoder.structure import describe, evaluation_mode, full_width
from mipic_st.encoder.tail import is_linear
from mipic_st.files import new_folder, write_json
from mipic_st.numerics import unit_length
from mipic_st.validation import missing_extra

logger = logging.getLogger(__name__)


def linear_tail(model: SentenceTransformer) -> Tensor | None:
    """The map of rows that the tail is, if it is linear, so that it commutes with pooling.

    Args:
        model: The model.

    Returns:
        (H, D), or None if there is no Dense.

    Raises:
        ValueError: If the tail does more than bias-free Dense layers and a Normalize at the end, or there is one and
            the pooling is ``max`` or several in one.
    """
    description = describe(model)
    if description.pooling is None or description.routes:
        raise ValueError("the model must be Transformer, Pooling and a linear tail, without a Router.")
    product: Tensor | None = None
    module: Any
    for module in description.steps:
        if not is_linear(module) or module.linear.bias is not None:
            raise ValueError(
                f"behind its pooling the model has a {type(module).__name__} that is no bias-free linear map, so it "
                "cannot go before the pooling."
            )
        weight = module.linear.weight.detach().T.double().cpu()
        product = weight if product is None else product @ weight
    mode = description.pooling.pooling_mode
    if product is not None and (mode == "max" or not isinstance(mode, str)):
        raise ValueError(f"{mode} pooling does not commute with a linear map, so that cannot go before it.")
    return product


class _Rotated(nn.Module):
    """The encoder, whose token states are pushed through what is in front of the pooling, and the tail by a product."""

    def __init__(
        self, auto_model: Any, between: Sequence[nn.Module], product: Tensor | None, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.auto_model, self.between, self.names = auto_model, nn.ModuleList(between), names
        self.register_buffer("product", None if product is None else product.float())

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        features = {**given, "token_embeddings": self.auto_model(**given).last_hidden_state}
        for module in self.between:
            features = module(features)
        states = features["token_embeddings"]
        return states if self.product is None else states.to(self.product.dtype) @ self.product


def export_onnx(model: SentenceTransformer, folder: str | PathLike[str]) -> Path:
    """Write ``onnx/model.onnx``, whose ``last_hidden_state`` has the model's width and space, and the tokenizer.

    A runtime that tokenizes, pools (``mean``, ``cls`` or last token), cuts and normalizes by itself then gives the
    model's vectors; it needs to know nothing of Dense layers, since a bias-free one commutes with pooling, nor of the
    word weights of a layer cut, whose means it gets in the right direction, if not length. The pooling is written
    beside it as sentence-transformers writes it, and ``modules.json`` lists nothing else. A default prompt, which
    ``model.encode`` puts before texts, is not in the files: whoever asks the runtime has to put it there.

    Args:
        model: A model of Transformer, Pooling and a bias-free linear tail.
        folder: A new or empty folder.

    Returns:
        Path of the ONNX file. It is run once, and compared with the model, before the function returns.

    Raises:
        ImportError: If the ``onnx`` extra is missing.
        ValueError: If the folder has content, the tail is not linear, or the model is in bfloat16.
        RuntimeError: If the file does not give what the model gives.

    Example:
        >>> export_onnx(model, "for-onnxruntime")  # doctest: +SKIP
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(missing_extra("the ONNX export needs onnx, onnxscript and onnxruntime", "onnx")) from error
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("the model is in bfloat16, which ONNX Runtime does not compute in on a CPU: model.float() it.")
    product = linear_tail(model)
    if prompt := prompt_of(model, None):
        logger.warning(
            "The model's default prompt %r is not in the exported files: put it before the texts that the runtime "
            "embeds, as model.encode does.",
            prompt,
        )
    with new_folder(folder) as new, evaluation_mode(model):
        _write_onnx(model, product, new, onnxruntime)
    return Path(folder) / "onnx" / "model.onnx"


def _write_onnx(model: SentenceTransformer, product: Tensor | None, folder: Path, onnxruntime: Any) -> None:
    transformer: Any = model[0]
    place = next(place for place, module in enumerate(model.children()) if isinstance(module, Pooling))
    own_pooling: Any = model[place]
    file = folder / "onnx" / "model.onnx"
    file.parent.mkdir(parents=True)
    encoder = transformer.auto_model
    features = transformer.tokenizer(list(PROBE_TEXTS), padding=True, return_tensors="pt")
    names = list(features)
    wrapped = _Rotated(encoder, list(model.children())[1:place], product, names).to(model.device).eval()
    inputs = tuple(features[name].to(model.device) for name in names)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    torch.onnx.export(
        wrapped,
        inputs,
        str(file),
        input_names=names,
        output_names=["last_hidden_state"],
        # one entry for the parameter that takes all inputs
        dynamic_shapes=(tuple({0: batch, 1: length} for _ in inputs),),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    texts = list(PROBE_TEXTS[:2])  # another shape than the one that was traced
    given = model.preprocess(texts)  # with the model's own limit of tokens
    (states,) = session.run(None, {name: given[name].cpu().numpy().astype(np.int64) for name in names})
    pooled = own_pooling({"token_embeddings": torch.as_tensor(states), "attention_mask": given["attention_mask"].cpu()})
    got = unit_length(pooled["sentence_embedding"].numpy())
    own = unit_length(encode_texts(model, texts))
    if not np.abs(got - own).max() < 1e-3:
        raise RuntimeError(f"the ONNX file gives other vectors than the model, by {np.abs(got - own).max():.1e}.")
    width = own_pooling.embedding_dimension if product is None else full_width(model)
    transformer.tokenizer.save_pretrained(str(folder))
    encoder.config.save_pretrained(str(folder))
    pooling = Pooling(width, own_pooling.pooling_mode, include_prompt=own_pooling.include_prompt)
    (folder / "1_Pooling").mkdir()
    pooling.save(str(folder / "1_Pooling"))
    kinds = [("", transformer), ("1_Pooling", pooling)]
    listed = [
        {
            "idx": index,
            "name": str(index),
            "path": path,
            "type": f"sentence_transformers.models.{type(module).__name__}",
        }
        for index, (path, module) in enumerate(kinds)
    ]
    write_json(folder / "modules.json", listed)
