"""What a loss changes in the model that it is given: its forward, and what its config asks for.

Both are undone when their ``with`` block ends, however it ends; only :func:`require_eager_attention` is for good:

- :func:`record_states` keeps what every forward pass of the model produced at each layer.
- :func:`truncated_passes` lets a base loss run once per truncation dimension on one set of forward passes.
- :func:`stand_in` copies a loss with other methods, so that the loss itself need not be changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mipic_st.encoder.final_norm import states_by_layer
from mipic_st.encoder.structure import unwrap

logger = logging.getLogger(__name__)

Features = dict[str, Any]


@dataclass
class RecordedPass:
    """One forward pass of the model.

    Attributes:
        hidden_states: (R, L, D) by layer, up to depth; 0 is the embedding layer, if the encoder shows it. R rows are
            one input column of B sentences, or several columns one after the other.
        mask: (R, L), true at real tokens.
        attentions: One tensor (R, L, L) per layer, heads averaged, before attention dropout; rows are queries.
            Empty unless asked for.
        prompt_length: What the features said about a prompt, if anything.
        token_embeddings: What the model's Transformer said was the last state, if it said so.
        sentence_embedding: (R, D), what the model gave.
    """

    hidden_states: dict[int, Tensor]
    mask: Tensor
    attentions: list[Tensor]
    prompt_length: Any = None
    token_embeddings: Tensor | None = None
    sentence_embedding: Tensor | None = None

    def has_text(self, pooling: Pooling) -> Tensor:
        """Which sentences have a token that is pooled. An empty text may have none, its vector is then no vector."""
        return pooled_tokens(self.mask, pooling, self.prompt_length) > 0

    def pool(self, pooling: Pooling, tokens: Tensor) -> Tensor:
        """Apply the model's own pooling to any (R, L, X) tensor that has one row per token."""
        # A copy of the mask: pooling without the prompt edits it in place in some versions.
        features = {"token_embeddings": tokens, "attention_mask": self.mask.long()}
        if self.prompt_length is not None:
            features["prompt_length"] = self.prompt_length
        return pooling(features)["sentence_embedding"]


def pooled_tokens(mask: Tensor, pooling: Pooling | None, prompt_length: Any = None) -> Tensor:
    """Number of tokens of each sentence that the model pools."""
    lengths = mask.bool().sum(dim=1)
    if pooling is None or pooling.include_prompt or prompt_length is None:
        return lengths
    return lengths - int(prompt_length.flatten()[0] if isinstance(prompt_length, Tensor) else prompt_length)


@contextmanager
def replaced_forward(
    model: nn.Module, make: Callable[[Callable[..., Features]], Callable[..., Features]]
) -> Iterator[None]:
    """Put ``make(model.forward)`` in the place of ``model.forward`` for the duration of the block."""
    had_own = "forward" in vars(model)
    original = model.forward
    model.forward = make(original)
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


class _AttentionProbe(TorchFunctionMode):
    """Sees what eager attention hands to dropout: the attention probabilities, still whole.

    The attentions that a model returns in training mode are taken after dropout, so their rows do not sum to one and
    the ranking of tokens is partly noise. Every eager implementation in transformers calls ``dropout`` on the
    (B, heads, L, L) probabilities, with p = 0 outside training.
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


@dataclass
class Recorder:
    """What :func:`record_states` has seen so far.

    Attributes:
        depth: Number of layers that each pass must show.
        attentions: Whether attention maps are recorded too: "no", "detached" or "with_gradient".
        leave_states: Whether the model's own output keeps the hidden states, because they were switched on before.
        first: The layer after which the first hidden state is, see :func:`mipic_st.encoder.final_norm.first_shown`.
        passes: The forward passes, in order.
    """

    depth: int
    attentions: str = "no"
    leave_states: bool = False
    first: int = 0
    passes: list[RecordedPass] = field(default_factory=list)

    def wrap(self, forward: Callable[..., Features]) -> Callable[..., Features]:
        """Return a forward that does what the given one does, and is recorded."""

        def recorded(features: Features, *args: Any, **kwargs: Any) -> Features:
            mask = features.get("attention_mask")
            if mask is None or "cu_seq_lens_q" in features:
                raise ValueError(
                    "MIPIC needs padded inputs with an attention_mask, but these features are "
                    f"{sorted(features)}. With flash attention, switch flattening off: model[0].unpad_inputs = False."
                )
            mask, prompt_length = mask.bool(), features.get("prompt_length")
            with ExitStack() as stack:
                probe = stack.enter_context(_AttentionProbe(self.attentions == "detached")) if self._probing else None
                output = forward(features, *args, **kwargs)
            states = output.get("all_layer_embeddings")
            if not self.leave_states:
                # So that the caller's features do not keep every layer alive.
                output.pop("all_layer_embeddings", None)
            if states is None or len(states) != self.depth + 1:
                raise RuntimeError(
                    f"Expected {self.depth + 1} hidden states from the model, got "
                    f"{None if states is None else len(states)}. The model does not honour config.output_hidden_states."
                )
            maps = probe.maps if probe is not None else []
            if probe is not None and len(maps) != self.depth:
                raise RuntimeError(
                    f"Expected the attention maps of {self.depth} layers, saw {len(maps)}. "
                    "token_importance='attention' needs eager attention and no torch.compile; use "
                    "token_importance='similarity' instead."
                )
            self.passes.append(
                RecordedPass(
                    states_by_layer(states, self.first),
                    mask.to(states[0].device),
                    maps,
                    prompt_length,
                    output.get("token_embeddings"),
                    output.get("sentence_embedding"),
                )
            )
            return output

        return recorded

    @property
    def _probing(self) -> bool:
        return self.attentions != "no"


@contextmanager
def hidden_states_requested(model: nn.Module) -> Iterator[bool]:
    """Ask every encoder of the model for its hidden states, through its config, for the duration of the block."""
    configs = {
        id(config): config
        for module in unwrap(model).modules()
        if isinstance(module, Transformer)
        for config in (module.auto_model.config, module.auto_model.config.get_text_config())
    }
    before = {key: config.output_hidden_states for key, config in configs.items()}
    try:
        for config in configs.values():
            config.output_hidden_states = True
        yield any(before.values())
    finally:
        for key, config in configs.items():
            config.output_hidden_states = before[key]


@contextmanager
def record_states(model: nn.Module, depth: int, attentions: str = "no", first: int = 0) -> Iterator[Recorder]:
    """Record the hidden states of every forward pass of the model inside the block."""
    with hidden_states_requested(model) as before:
        recorder = Recorder(depth, attentions, leave_states=before, first=first)
        with replaced_forward(model, recorder.wrap):
            yield recorder


def require_eager_attention(model: nn.Module) -> None:
    """Switch the model to eager attention, the only kind whose probabilities exist as a tensor, and say so."""
    for module in unwrap(model).modules():
        if not isinstance(module, Transformer):
            continue
        encoder = module.auto_model
        implementation = encoder.config._attn_implementation
        if implementation == "eager":
            continue
        encoder.set_attn_implementation("eager")
        if encoder.config._attn_implementation != "eager":
            raise ValueError(
                f"token_importance='attention' needs eager attention, which {type(encoder).__name__} with "
                f"{implementation!r} does not offer. Load the model with "
                "model_kwargs={'attn_implementation': 'eager'}, or use token_importance='similarity'."
            )
        logger.warning(
            "token_importance='attention' reads attention maps: switched %s from %r to 'eager' attention.",
            type(encoder).__name__,
            implementation,
        )
