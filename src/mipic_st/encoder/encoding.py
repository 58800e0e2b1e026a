"""Sentence vectors of a model's intermediate layers, as a model that was cut there would give them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn

from mipic_st.encoder.final_norm import final_norm, layer_states
from mipic_st.encoder.hidden_states import hidden_states_requested
from mipic_st.encoder.structure import (
    NO_CUT,
    check_layers,
    evaluation_mode,
    full_width,
    model_depth,
    module_identity,
    require_same_vectors,
    tail_of,
    transformer_of,
)
from mipic_st.validation import checked_prompt

# Models whose last layer was seen to give the model's own vectors, and of which modules they consisted then.
_checked: weakref.WeakKeyDictionary[SentenceTransformer, tuple[int, ...]] = weakref.WeakKeyDictionary()


def encode_layers(
    model: SentenceTransformer,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
    tail: bool = True,
    before: Mapping[int, nn.Module] | None = None,
    behind: Mapping[int, Sequence[nn.Module]] | None = None,
    **kwargs: Any,
) -> np.ndarray:
    """Sentence vectors of several layers from one forward pass per batch, (n, len(layers), D), float32.

    The token states of each layer go through what ``before`` has for it, the model's own final norm, Pooling and, with
    ``tail``, all remaining modules; or, for a layer in ``behind``, the modules that this has in place of all these (but
    for the norm). That the last layer then gives what ``model.encode`` gives is checked once per
    model. Without a prompt, the model's default one is used; "" is none.
    """
    from tqdm.auto import trange

    check_layers(layers, model)
    prompt = prompt_of(model, prompt)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    result: np.ndarray | None = None
    with evaluation_mode(model), torch.inference_mode():
        walk = _LayerWalk(model)
        if order and _checked.get(model) != module_identity(model):
            some = [texts[order[0]], texts[order[-1]]]
            own, ours = (
                batch_to_device(model.preprocess(some, prompt=prompt, **kwargs), model.device) for _ in range(2)
            )
            (last,) = walk(ours, [walk.depth])
            require_same_vectors(model(own)["sentence_embedding"], last, model, "Leave layers out for this model.")
            _checked[model] = module_identity(model)
        for start in trange(0, len(order), batch_size, desc="Batches", disable=not show_progress_bar):
            rows = order[start : start + batch_size]
            features = model.preprocess([texts[i] for i in rows], prompt=prompt, **kwargs)
            for column, vectors in enumerate(walk(features, layers, tail, before, behind)):
                if result is None:
                    result = np.empty((len(texts), len(layers), vectors.shape[1]), dtype=np.float32)
                result[rows, column] = vectors.float().cpu().numpy()
    if result is None:
        width = full_width(model) if tail else transformer_of(model).get_embedding_dimension()
        return np.empty((0, len(layers), width), dtype=np.float32)
    return result


def prompt_of(model: SentenceTransformer, prompt: str | None) -> str | None:
    """The prompt that was given, or the one that ``model.encode`` puts before texts by itself."""
    if checked_prompt("prompt", prompt) is None and model.default_prompt_name is not None:
        return model.prompts.get(model.default_prompt_name)
    return prompt


class TokenStates(NamedTuple):
    """Token states of several layers, the texts one after another, without padding."""

    states: dict[int, Tensor]  # by layer, (T, H), bfloat16
    tokens: Tensor  # their token numbers, (T,)
    lengths: Tensor  # tokens of each text, (n,)
    pooled: Tensor  # the last layer's pooled states, (n, H), float32


def encode_tokens(
    model: SentenceTransformer,
    texts: Sequence[str],
    layers: Sequence[int],
    *,
    most_values: int,
    prompt: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool = False,
) -> TokenStates:
    """Token states of several layers, of as many of the texts as ``most_values`` allows."""
    from tqdm.auto import tqdm

    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    tokens, lengths, pooled = [], [], []
    values = 0
    with evaluation_mode(model), torch.inference_mode(), tqdm(total=len(texts), disable=not show_progress_bar) as bar:
        bar.set_description("Token states")
        walk = _LayerWalk(model)
        # texts of like length in one batch; the batches in any order, so that those within the limit stand for all
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        for number in np.random.default_rng(0).permutation(len(batches)):
            if values < most_values:
                features = model.preprocess([texts[i] for i in batches[number]], prompt=prompt)
                for layer, inputs, states in walk.tokens(features, [*layers, walk.depth]):
                    if layer == walk.depth:
                        mask = inputs["attention_mask"].bool()
                        tokens.append(inputs["input_ids"][mask].cpu())
                        lengths.append(mask.sum(dim=1).cpu())
                        pooled.append(walk.pool(inputs, states, walk.pooled).float().cpu())
                    else:
                        found[layer].append(states[inputs["attention_mask"].bool()].to("cpu", torch.bfloat16))
                        values += found[layer][-1].numel()
            bar.update(len(batches[number]))
    return TokenStates(
        {layer: torch.cat(states) for layer, states in found.items()},
        torch.cat(tokens),
        torch.cat(lengths),
        torch.cat(pooled),
    )


class _LayerWalk:
    """One forward pass of the encoder, then its final norm and the other modules behind each layer."""

    def __init__(self, model: SentenceTransformer) -> None:
        self.model = model
        self.transformer = transformer_of(model)
        self.depth = model_depth(model)
        self.norm = final_norm(self.transformer.auto_model)
        self.behind = list(model.children())[1:]
        self.pooled = self.behind[: len(self.behind) - len(tail_of(model))]

    def __call__(
        self,
        features: dict[str, Any],
        layers: Sequence[int],
        tail: bool = True,
        before: Mapping[int, nn.Module] | None = None,
        behind: Mapping[int, Sequence[nn.Module]] | None = None,
    ) -> list[Tensor]:
        """(R, D) of each layer."""
        found = []
        for layer, inputs, tokens in self.tokens(features, layers):
            first = [before[layer]] if before and layer in before else []
            modules = (behind or {}).get(layer) or [*first, *(self.behind if tail else self.pooled)]
            found.append(self.pool(inputs, tokens, modules))
        return found

    def tokens(self, features: dict[str, Any], layers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any], Tensor]]:
        """Each layer with what the encoder was given and its token states, (R, L, H), behind the final norm."""
        inputs = dict(batch_to_device(features, self.model.device))
        with hidden_states_requested(self.model):
            states = self.transformer(dict(inputs)).get("all_layer_embeddings")
        if states is None or len(states) != self.depth + 1:
            raise TypeError(
                f"{type(self.transformer.auto_model).__name__} gave no hidden states for its {self.depth} layers; "
                "leave layers out for this model."
            )
        by_layer = layer_states(self.transformer.auto_model, states)
        if missing := [layer for layer in layers if layer not in by_layer]:
            raise TypeError(f"layers {missing} are not among what the encoder shows; leave them out for this model.")
        for layer in layers:
            tokens = by_layer[layer]
            if self.norm is not None and layer < self.depth:
                tokens = self.norm(tokens)
            yield layer, inputs, tokens

    def pool(self, inputs: dict[str, Any], tokens: Tensor, modules: Sequence[nn.Module]) -> Tensor:
        """What these modules make of one layer's token states, (R, D)."""
        # The inputs and this layer's states, nothing else of what the Transformer gives: a module that reads the
        # last state under another name, or mixes layers, would give every cell the same.
        cell: dict[str, Any] = {**inputs, "token_embeddings": tokens}
        # Pooling with include_prompt=False writes into the mask, so every layer gets its own.
        if isinstance(inputs.get("attention_mask"), Tensor):
            cell["attention_mask"] = inputs["attention_mask"].clone()
        try:
            for module in modules:
                cell = module(cell)
            return cell["sentence_embedding"]
        except KeyError as error:
            names = [type(module).__name__ for module in self.model.children()]
            raise TypeError(
                f"layers need a model that pools token states, but in {names} something else reads {error}; leave "
                "layers out for this model."
            ) from error


def encode_texts(
    model: SentenceTransformer,
    texts: Sequence[str],
    *,
    prompt: str | None = "",
    route: str | None = None,
    batch_size: int = 32,
    show_progress_bar: bool | None = False,
) -> np.ndarray:
    """Full-width vectors, float32, each distinct text encoded once."""
    distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    task: dict[str, Any] = {} if route is None else {"task": route}
    vectors = model.encode(
        list(distinct),
        prompt=prompt,
        batch_size=batch_size,
        show_progress_bar=show_progress_bar,
        truncate_dim=NO_CUT,
        convert_to_numpy=True,
        **task,
    )
    return np.asarray(vectors, dtype=np.float32)[[distinct[text] for text in texts]]


def encode_columns(
    model: SentenceTransformer,
    columns: Mapping[str, Sequence[str]],
    *,
    prompts: Mapping[str, str | None],
    routes: Mapping[str, str | None],
    batch_size: int,
    show_progress_bar: bool | None,
) -> Iterator[tuple[str, np.ndarray]]:
    """The vectors of some columns; a text that is in several of them has the same vector to the last bit."""
    alike: dict[tuple[str | None, str | None], list[str]] = {}
    for name in columns:
        checked_prompt(f"the prompt of {name}", prompts[name])
        alike.setdefault((prompts[name], routes[name]), []).append(name)
    for (prompt, route), names in alike.items():
        joined = [text for name in names for text in columns[name]]
        vectors = encode_texts(
            model, joined, prompt=prompt, route=route, batch_size=batch_size, show_progress_bar=show_progress_bar
        )
        ends = np.cumsum([len(columns[name]) for name in names])[:-1]
        yield from zip(names, np.split(vectors, ends), strict=True)


#: Texts for a first look at a model.
PROBE_TEXTS = (
    "A short text.",
    "Another one, with a few more words in it than the first.",
    "What is the third text about?",
)
