"""What a model's forward passes produced at each layer, recorded while somebody else runs the model.

What it changes in the model, its forward and what its config asks for, is undone when the ``with`` block ends, however
it ends. Only :func:`require_eager_attention` is for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mipic_st.encoder.capturing import no_hooks_left
from mipic_st.encoder.final_norm import first_shown, states_by_layer
from mipic_st.encoder.modules import push_vectors
from mipic_st.encoder.structure import Backbone, backbone_of, encoders_in, evaluation_mode, require_same_vectors, unwrap

logger = logging.getLogger(__name__)

Features = dict[str, Any]


@dataclass
class RecordedPass:
    """One forward pass of the model over R sentences; without a backbone, the sentence embedding is all there is.

    Attributes:
        sentence_embedding: (R, D). R rows are one input column of B sentences, or several one after the other.
        backbone: The model's depth, pooling and tail.
        hidden_states: (R, L, width of the encoder) by layer, up to depth; 0 is the embeddings, if they are shown.
        mask: (R, L), true at real tokens.
        attentions: One tensor (R, L, L) per layer, heads averaged, before attention dropout, if they were asked for.
        prompt_length: What the features said about a prompt, if anything.
        token_embeddings: What the model's Transformer said was the last state, if it said so.
        inputs: What the model was given.
    """

    sentence_embedding: Tensor
    backbone: Backbone = None  # type: ignore[assignment]  # in a pass that is asked for nothing else
    hidden_states: dict[int, Tensor] = field(default_factory=dict)
    mask: Tensor = field(default_factory=lambda: torch.empty(0))
    attentions: list[Tensor] = field(default_factory=list)
    prompt_length: Any = None
    token_embeddings: Tensor | None = None
    inputs: Features = field(default_factory=dict)

    @cached_property
    def has_text(self) -> Tensor:
        """(R,): which sentences have a token that is pooled. An empty text may have none; its vector is no vector."""
        return pooled_tokens(self.mask, self.backbone.pooling, self.prompt_length) > 0

    def pool(self, tokens: Tensor) -> Tensor:
        """Apply the model's own pooling to any (R, L, X) tensor that has one row per token."""
        # A copy of the mask: pooling without the prompt edits it in place in some versions.
        features = {"token_embeddings": tokens, "attention_mask": self.mask.long()}
        if self.prompt_length is not None:
            features["prompt_length"] = self.prompt_length
        return self.backbone.pooling(features)["sentence_embedding"]

    def tokens(self, layer: int) -> Tensor:
        """The token states of a layer pushed through the model's tail, (R, L, D)."""
        return push_vectors(self.backbone.steps, self.hidden_states[layer])

    def vectors(self, layer: int) -> Tensor:
        """The sentence vectors of a layer, (R, D): its pooled states, pushed through the model's tail."""
        pooled = self.pool(self.hidden_states[layer])
        # Pooling nothing may give -inf, which would spoil the gradients of head and tail even if it counts zero.
        return push_vectors(self.backbone.steps, pooled.masked_fill(~self.has_text[:, None], 0.0))

    def attention(self, layer: int) -> Tensor | None:
        """The model's own attention to each token in a layer, pooled as its tokens are, (R, L), if it was recorded."""
        return self.pool(self.attentions[layer - 1]) if self.attentions else None


def pooled_tokens(mask: Tensor, pooling: Pooling | None, prompt_length: Any = None) -> Tensor:
    """Number of tokens of each sentence that the model pools."""
    lengths = mask.bool().sum(dim=1)
    if pooling is None or pooling.include_prompt or prompt_length is None:
        return lengths
    return lengths - int(prompt_length.flatten()[0] if isinstance(prompt_length, Tensor) else prompt_length)


def require_served_states(recorded: RecordedPass, model: nn.Module, fix: str) -> None:
    """Refuse a model whose embedding is made of something else than the states that were recorded."""
    backbone = recorded.backbone
    with torch.no_grad():
        pooled = recorded.pool(recorded.hidden_states[backbone.depth])
        if recorded.token_embeddings is not None:
            require_same_vectors(recorded.pool(recorded.token_embeddings), pooled, model, fix)
        if backbone.dropout and model.training:
            return
        own, pushed = recorded.sentence_embedding, push_vectors(backbone.steps, pooled)
        if backbone.normalize:
            own, pushed = (F.normalize(vectors.float(), dim=-1) for vectors in (own, pushed))
        # The trainer puts autocast around the model only, so its own tail may have run in half precision.
        require_same_vectors(own, pushed, model, fix, half=True if backbone.steps else None)


@contextmanager
def replaced_forward(model: nn.Module, replacement: Callable[..., Features]) -> Iterator[None]:
    """In the block, a call of the model is one of ``replacement``, which gets the former ``forward`` first."""
    had_own, original = "forward" in vars(model), model.forward
    model.forward = lambda *args, **kwargs: replacement(original, *args, **kwargs)
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


class _AttentionProbe(TorchFunctionMode):
    """Sees what eager attention hands to dropout: the (B, heads, L, L) probabilities, still whole.

    Those that a model returns in training mode are taken after dropout, which all of transformers calls, if with p = 0.
    """

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.detach = detach
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.dropout and args[0].ndim == 4 and args[0].shape[-1] == args[0].shape[-2]:
            probabilities = args[0].detach() if self.detach else args[0]
            self.maps.append(probabilities.mean(dim=1))
        return func(*args, **(kwargs or {}))


@contextmanager
def hidden_states_requested(model: nn.Module) -> Iterator[bool]:
    """Ask every encoder of the model for its hidden states, through its config; yields whether one gave them before."""
    configs = {
        id(config): config
        for encoder in encoders_in(unwrap(model))
        for config in (encoder.config, encoder.config.get_text_config())
    }
    before = {key: config.output_hidden_states for key, config in configs.items()}
    with no_hooks_left(model):
        try:
            for config in configs.values():
                config.output_hidden_states = True
            yield any(before.values())
        finally:
            for key, config in configs.items():
                config.output_hidden_states = before[key]


@contextmanager
def record_states(
    model: nn.Module, backbone: Backbone | None, attentions: str = "no", first: int = 0
) -> Iterator[list[RecordedPass]]:
    """Record every forward pass of the model inside the block, with its hidden states if there is a backbone.

    ``attentions`` is "no", "detached" or "with_gradient"; ``first`` is the layer after which the first hidden state is.
    """
    passes: list[RecordedPass] = []

    def recorded(forward: Callable[..., Features], features: Features, *args: Any, **kwargs: Any) -> Features:
        if backbone is None:
            output = forward(features, *args, **kwargs)
            passes.append(RecordedPass(output["sentence_embedding"]))
            return output
        mask, prompt_length = features.get("attention_mask"), features.get("prompt_length")
        if mask is None or "cu_seq_lens_q" in features:
            raise ValueError(
                f"MIPIC needs padded inputs with an attention_mask, but these features are {sorted(features)}. With "
                "flash attention, switch flattening off: model[0].unpad_inputs = False."
            )
        inputs = dict(features)  # as they were
        mask, probe = mask.bool(), _AttentionProbe(attentions == "detached")
        with nullcontext() if attentions == "no" else probe:
            output = forward(features, *args, **kwargs)
        # Taken out, unless it was asked for before, so that the caller's features do not keep every layer alive.
        states: Any = output.get("all_layer_embeddings") if keep else output.pop("all_layer_embeddings", None)
        if states is None or len(states) != backbone.depth + 1:
            got = None if states is None else len(states)
            raise RuntimeError(
                f"Expected {backbone.depth + 1} hidden states from the model, got {got}. The model does not honour "
                "config.output_hidden_states."
            )
        if attentions != "no" and len(probe.maps) != backbone.depth:
            raise RuntimeError(
                f"Expected the attention maps of {backbone.depth} layers, saw {len(probe.maps)}. token_importance="
                "'attention' needs eager attention and no torch.compile; use token_importance='similarity' instead."
            )
        passes.append(
            RecordedPass(
                output["sentence_embedding"],
                backbone,
                states_by_layer(states, first),
                mask.to(states[0].device),
                probe.maps,
                prompt_length,
                output.get("token_embeddings"),
                inputs,
            )
        )
        return output

    with ExitStack() as stack:
        keep = backbone is not None and stack.enter_context(hidden_states_requested(model))
        stack.enter_context(replaced_forward(model, recorded))
        yield passes


class LayerRecorder:
    """Records a model's layers in many batches, and finds out in time if they are not what is served.

    ``backbone`` is described again when modules come or go behind the encoder, as ``rotate_model`` puts one in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.backbone = backbone_of(model)
        self.checked = False  # whether recorded states were found to be those that the embedding is made of
        self._first = 0

    @contextmanager
    def record(self, model: nn.Module, attentions: str = "no") -> Iterator[list[RecordedPass]]:
        """Record the model's forward passes inside the block; what is not :attr:`checked` is checked behind it."""
        backbone, shape = backbone_of(model), self.backbone[:2]
        if backbone[:2] != shape:
            raise ValueError(
                f"The loss was made for a model of (depth, width) {shape}, which is {backbone[:2]} now. Make a new "
                "loss for it."
            )
        if backbone != self.backbone or not self.checked:
            self.backbone, self.checked, self._first = backbone, False, first_shown(model)
        with record_states(model, backbone, attentions, self._first) as passes:
            yield passes
        for recorded in () if self.checked else passes:
            self._check(model, recorded)

    def _check(self, model: nn.Module, recorded: RecordedPass) -> None:
        """Refuse a pass whose embedding is of other states; dropout behind the last layer (XLNet) is none of these."""
        fix = "Use alpha=1 for plain Matryoshka training."
        try:
            require_served_states(recorded, model, fix)
        except ValueError:
            if not model.training:
                raise
            inputs = {**recorded.inputs, "attention_mask": recorded.mask.long()}
            with evaluation_mode(model), torch.no_grad():
                with record_states(model, self.backbone, first=self._first) as again:
                    model(inputs)
                require_served_states(again[0], model, fix)


def require_eager_attention(model: nn.Module) -> None:
    """Switch the model to eager attention, the only kind whose probabilities exist as a tensor, and say so."""
    for encoder in encoders_in(unwrap(model)):
        name, implementation = type(encoder).__name__, encoder.config._attn_implementation
        if implementation == "eager":
            continue
        encoder.set_attn_implementation("eager")
        if encoder.config._attn_implementation != "eager":
            raise ValueError(
                f"token_importance='attention' needs eager attention, which {name} with {implementation!r} does not "
                "offer. Load the model with model_kwargs={'attn_implementation': 'eager'}, or use "
                "token_importance='similarity'."
            )
        logger.warning(
            "token_importance='attention' reads attention maps: switched %s from %r to 'eager' attention.",
            name,
            implementation,
        )
