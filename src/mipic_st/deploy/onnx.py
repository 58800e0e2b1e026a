"""An ONNX file whose ``last_hidden_state`` is behind the model's linear tail, for runtimes that do the pooling."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AutoTokenizer

from mipic_st.deploy.written import OLDER_NAMES, PROMPTS_LEFT_OUT, WITHOUT_PROMPTS, difference, without_adapters
from mipic_st.encoder.encoding import PROBE_TEXTS, encode_texts, prompt_of
from mipic_st.encoder.modules import is_linear, kind_of, leaves_prompts_out, load_pooling, pooling_like, pooling_place
from mipic_st.encoder.structure import describe, evaluation_mode, full_width, in_half_precision, unwrap
from mipic_st.files import new_folder, write_json
from mipic_st.numerics import unit_length
from mipic_st.validation import require

logger = logging.getLogger(__name__)


def linear_tail(model: SentenceTransformer) -> Tensor | None:
    """The product, (H, D), of the tail's bias-free Dense layers, which commutes with pooling; None if there is none."""
    description = describe(model)
    if description.pooling is None or description.routes:
        raise ValueError("the model must be Transformer, Pooling and a linear tail, without a Router.")
    product: Tensor | None = None
    module: Any
    for module in description.steps:
        if kind_of(module) == "Normalize":  # changes the length only
            continue
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
    """The encoder, what is between it and the pooling, and the tail as a product."""

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

    A runtime that tokenizes, pools (``mean``, ``cls`` or last token), truncates and normalizes on its own then gives
    the model's vectors; it needs to know neither Dense layers nor word weights. A default prompt, which
    ``model.encode`` puts before texts, is not in the files: whoever asks the runtime has to put it there.

    Args:
        model: A model of Transformer, Pooling and a bias-free linear tail.
        folder: A new or empty folder.

    Returns:
        Path of the ONNX file, whose vectors were compared with the model's.

    Raises:
        ImportError: If the ``onnx`` extra is missing.
        ValueError: If the folder has content, the tail is not linear, the pooling leaves out the tokens of prompts, or
            the model is in bfloat16.
        RuntimeError: If the architecture cannot be written, or the file does not give what the model gives.

    Example:
        >>> export_onnx(model, "for-onnxruntime")  # doctest: +SKIP
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        require(name, "the ONNX export needs onnx, onnxscript and onnxruntime", "serve")
    model = unwrap(model)
    if any(parameter.dtype == torch.bfloat16 for parameter in model.parameters()):
        raise ValueError("the model is in bfloat16, which ONNX Runtime does not compute in on a CPU: model.float() it.")
    if leaves_prompts_out(model):
        raise ValueError(f"{PROMPTS_LEFT_OUT} no runtime with a pooling of its own does; {WITHOUT_PROMPTS}")
    product = linear_tail(model)
    if prompt := prompt_of(model, None):
        logger.warning(
            "The model's default prompt %r is not in the exported files: put it before the texts that the runtime "
            "embeds, as model.encode does.",
            prompt,
        )
    plain = without_adapters(model)
    with new_folder(folder) as new, evaluation_mode(plain), evaluation_mode(model):
        _write_graph(plain, product, new / "onnx" / "model.onnx")
        _write_rest(plain, product, new)
        _require_same_from_runtime(model, new)
    return Path(folder) / "onnx" / "model.onnx"


def _write_graph(model: SentenceTransformer, product: Tensor | None, file: Path) -> None:
    transformer: Any = model[0]
    features = transformer.tokenizer(list(PROBE_TEXTS), padding=True, return_tensors="pt")
    names = list(features)
    between = list(model.children())[1 : pooling_place(model)]
    wrapped = _Rotated(transformer.auto_model, between, product, names).to(model.device).eval()
    inputs = tuple(features[name].to(model.device) for name in names)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    file.parent.mkdir()
    try:
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
    except OSError:
        raise
    except Exception as error:  # of the architecture's own code it may be of any kind
        raise _not_for_onnx(model, error) from error


def _not_for_onnx(model: SentenceTransformer, error: Exception) -> RuntimeError:
    """Which architecture failed, and the first words of an error that may have a thousand lines."""
    words = str(error).partition("\x1b")[0].strip().partition("\n")[0]
    encoder: Any = model[0]
    return RuntimeError(
        f"{type(encoder.auto_model).__name__} cannot be written as ONNX with torch {torch.__version__} "
        f"({type(error).__name__}: {words}); serve it in the form of save_for_tei, or by sentence-transformers."
    )


def _write_rest(model: SentenceTransformer, product: Tensor | None, folder: Path) -> None:
    """Tokenizer, config and pooling, and modules.json, which lists nothing else."""
    transformer: Any = model[0]
    pooling: Any = model[pooling_place(model)]
    transformer.tokenizer.save_pretrained(str(folder))
    transformer.auto_model.config.save_pretrained(str(folder))
    (folder / "1_Pooling").mkdir()
    pooling_like(pooling, width=None if product is None else full_width(model)).save(str(folder / "1_Pooling"))
    kinds = enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])
    listed = [{"idx": i, "name": str(i), "path": path, "type": OLDER_NAMES + kind} for i, (path, kind) in kinds]
    write_json(folder / "modules.json", listed)


def _require_same_from_runtime(model: SentenceTransformer, folder: Path) -> None:
    """Read the folder as a runtime does, and compare its vectors with the model's, at unit length."""
    import onnxruntime

    texts = list(PROBE_TEXTS[:2])  # another shape than the one that was traced
    limits = {} if model.max_seq_length is None else {"truncation": True, "max_length": model.max_seq_length}
    given = AutoTokenizer.from_pretrained(str(folder))(texts, padding=True, return_tensors="np", **limits)
    try:
        session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
        inputs = {each.name: given[each.name].astype(np.int64) for each in session.get_inputs()}
        (states,) = session.run(None, inputs)
    except Exception as error:  # the runtime has kinds of its own
        raise _not_for_onnx(model, error) from error
    mask = torch.as_tensor(given["attention_mask"])
    features = load_pooling(folder / "1_Pooling")({"token_embeddings": torch.as_tensor(states), "attention_mask": mask})
    got = unit_length(features["sentence_embedding"].numpy())
    own = unit_length(encode_texts(model, texts))
    if found := difference(own, got, half=in_half_precision(model)):
        raise RuntimeError(f"the ONNX file gives other vectors than the model, they differ by {found}.")
