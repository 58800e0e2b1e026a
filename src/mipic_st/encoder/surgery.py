"""Changes of a model: the modules of a fitted map put in (and taken out again), layers cut off, adapters merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, WordWeights
from torch import Tensor, nn

from mipic_st.encoder.modules import features_of, is_linear, pooling_like
from mipic_st.encoder.structure import encoders_in, tail_of, transformer_of

Undo = Callable[[], None]


def identity_dense(weight: Tensor, features: str = "sentence_embedding") -> Dense:
    """A bias-free Dense without activation for a map of rows, (in, out)."""
    # a clone: files hold whole storages only, and a slice has a larger one
    weight = weight.T.clone(memory_format=torch.contiguous_format)
    with torch.random.fork_rng(devices=[]):  # a Dense draws random values first
        return Dense(
            weight.shape[1],
            weight.shape[0],
            bias=False,
            activation_function=nn.Identity(),
            init_weight=weight,
            module_input_name=features,
        )


def word_weights_module(model: SentenceTransformer, weights: Tensor) -> WordWeights:
    """The module that multiplies token states with their weights, (V,); tokens behind their end count 1."""
    # numbers may have gaps
    names = {number: token for token, number in transformer_of(model).tokenizer.get_vocab().items()}
    vocabulary = [names.get(number, f"[no token {number}]") for number in range(max(names) + 1)]
    # four digits: the module's file spells every weight out
    values = [float(f"{value:.4g}") for value in weights[: len(vocabulary)].tolist()]
    values += [1.0] * (len(vocabulary) - len(values))
    with torch.random.fork_rng(devices=[]):  # its embedding draws random numbers first
        module = WordWeights(vocabulary, dict(zip(vocabulary, values, strict=True)))
    return module.to(model.device).eval()


def no_word_weights(model: SentenceTransformer) -> str:
    """Why sentence-transformers' own module cannot weigh the tokens in a model's pooling; empty if it can."""
    transformer, behind = transformer_of(model), list(model.children())[1:]
    if not behind or not isinstance(behind[0], Pooling) or any(isinstance(module, Pooling) for module in behind[1:]):
        return f"the model has {[type(module).__name__ for module in behind]} behind its Transformer"
    if behind[0].pooling_mode != "mean":
        return f"the model pools by {behind[0].pooling_mode!r}, not by the mean"
    if not behind[0].include_prompt:
        return "the model's pooling leaves the prompt out (include_prompt=False), which WordWeights cannot"
    try:
        transformer.auto_model.get_input_embeddings().weight  # noqa: B018
        transformer.tokenizer.get_vocab()
    except (AttributeError, NotImplementedError):
        return f"{type(transformer.auto_model).__name__} or its tokenizer knows no tokens"
    if missing := {"input_ids", "attention_mask"} - set(model.preprocess(["a text"])):
        return (
            f"the encoder is not given {' and '.join(sorted(missing))}, which WordWeights reads (with flash attention, "
            "set unpad_inputs of the model's Transformer to False)"
        )
    return ""


def input_embeddings(model: SentenceTransformer) -> Tensor:
    """Static embeddings of the vocabulary, (V, E), of a model whose first module is a Transformer; on the CPU."""
    return transformer_of(model).auto_model.get_input_embeddings().weight.detach().cpu()


def require_one_place_each(model: nn.Sequential) -> None:
    """Refuse a module that stands in two places: sentence-transformers runs it once, and twice when it was saved."""
    if len(modules := list(model._modules.values())) > len({*map(id, modules)}):
        names = " + ".join(type(module).__name__ for module in modules)
        fix = "it runs twice once the model was saved and loaded. Put copy.deepcopy(module) into one of them."
        raise ValueError(f"one module stands in two places of {names}: {fix}")


def put_in(model: nn.Sequential, modules: Sequence[nn.Module], *, at_the_end: bool = False) -> Undo:
    """Put the modules of a fitted map into a model, in place; the function that takes them out again is returned.

    Modules that work on token states go in front of the pooling, others behind everything but a Normalize at the end
    (with ``at_the_end``, behind that too). A linear map is multiplied into the linear Dense that makes the vectors,
    where there is one. All modules get the model's device and, but for WordWeights, its precision.
    """
    require_one_place_each(model)
    children = list(model.named_children())
    on_tokens = _on_tokens(modules)
    poolings = [number for number, (_, module) in enumerate(children) if isinstance(module, Pooling)]
    if on_tokens and not poolings:
        raise TypeError(f"the map works on token states, but {[type(module).__name__ for module in model]} pool none.")
    place = poolings[0] if on_tokens else len(children)
    while not (on_tokens or at_the_end) and place and isinstance(children[place - 1][1], Normalize):
        place -= 1
    kept, rest = children[:place], [module for _, module in children[place:]]
    dense = linear_end([module for _, module in kept])
    if dense is not None and len(modules) == 1 and is_linear(modules[0]):
        undo = _multiply(dense, modules[0])
        if isinstance(kept[-1][1], Pooling):
            kept[-1] = kept[-1][0], pooling_like(kept[-1][1], width=dense.out_features)
        _set_children(model, [*kept, *children[place:]])
    else:
        _to_those_of(model, modules)
        undo = _make_room(kept[0][1], modules, rest) if on_tokens else lambda: None
        # names may have gaps, and none may be taken twice
        first = max(len(kept), *(int(name) + 1 for name, _ in kept if name.isdecimal()), 0)
        _set_children(
            model, [*kept, *((str(number), module) for number, module in enumerate([*modules, *rest], first))]
        )

    def take_out() -> None:
        _set_children(model, children)
        undo()

    return take_out


def behind_encoder(model: SentenceTransformer, modules: Sequence[nn.Module]) -> list[nn.Module]:
    """What stands behind the encoder when a fitted map takes the place of the model's tail; the model stays as is."""
    _to_those_of(model, modules)
    pooling = list(model.children())[1 : len(model) - len(tail_of(model))]
    return [*modules, *pooling] if _on_tokens(modules) else [*pooling, *modules]


def _on_tokens(modules: Sequence[nn.Module]) -> bool:
    """Whether the modules of a map work on token states."""
    return isinstance(modules[0], WordWeights) or features_of(modules[0])[1] == "token_embeddings"


def _to_those_of(model: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Give new modules the device and precision of a model's."""
    *_, like = model.parameters()
    for module in modules:
        module.to(like.device, None if isinstance(module, WordWeights) else like.dtype)


def with_map(modules: Sequence[nn.Module], new: Sequence[nn.Module]) -> list[nn.Module]:
    """A model's modules with those of a fitted map behind them, or where else :func:`put_in` puts them."""
    model = nn.Sequential(*modules)
    put_in(model, new, at_the_end=True)
    return list(model)


def _make_room(encoder: Any, modules: Sequence[nn.Module], rest: list[nn.Module]) -> Undo:
    """Fit the encoder in front and the pooling behind to modules that work on token states."""
    widths = [module.out_features for module in modules if isinstance(module, Dense)]
    rest[0] = pooling_like(rest[0], width=widths[-1]) if widths else rest[0]
    unpadded = getattr(encoder, "unpad_inputs", None)
    if any(isinstance(module, WordWeights) for module in modules) and unpadded is not None:
        encoder.unpad_inputs = False  # they need the attention mask, also with flash attention
        return lambda: setattr(encoder, "unpad_inputs", unpadded)
    return lambda: None


def _set_children(model: nn.Sequential, children: Sequence[tuple[str, nn.Module]]) -> None:
    for name, _ in list(model.named_children()):
        delattr(model, name)
    for name, module in children:
        model.add_module(name, module)


def linear_end(modules: Sequence[nn.Module]) -> Any:
    """The Dense into whose weight a further linear map of the vectors can be multiplied, or None."""
    if is_linear(modules[-1]):
        return modules[-1]
    if [type(module) for module in modules[-3:]] == [Dense, WordWeights, Pooling]:
        dense, pooling = modules[-3], modules[-1]
        if pooling.pooling_mode == "mean" and is_linear(dense, "token_embeddings"):
            return dense
    return None


def _multiply(dense: Any, new: Any) -> Undo:
    """Multiply a linear map into a Dense; its parameters stay the same objects where their shapes do."""
    old, width = dense.linear, dense.out_features
    weight = new.linear.weight.detach().cpu().double()
    before = {name: value.detach().clone() for name, value in old.state_dict().items()}
    after = {name: weight @ value.cpu().double() for name, value in before.items()}
    if new.linear.bias is not None:
        after["bias"] = after.get("bias", 0) + new.linear.bias.detach().cpu().double()
    if {name: value.shape for name, value in after.items()} == {name: value.shape for name, value in before.items()}:
        old.load_state_dict(after)
        return lambda: old.load_state_dict(before)
    with torch.random.fork_rng(devices=[]):
        dense.linear = nn.Linear(old.in_features, len(weight), bias="bias" in after).to(old.weight)
    dense.linear.load_state_dict(after)
    dense.out_features, dense.bias = len(weight), "bias" in after

    def undo() -> None:
        dense.linear, dense.out_features, dense.bias = old, width, old.bias is not None

    return undo


def keep_description(model: SentenceTransformer) -> Undo:
    """Note what the configs and the card of a model say; the function that brings it back is returned."""
    owners = [vars(owner) for owner in (model.model_card_data, *(encoder.config for encoder in encoders_in(model)))]
    before = [
        {name: list(value) if isinstance(value, list) else value for name, value in each.items()} for each in owners
    ]
    text = getattr(model, "_model_card_text", None)  # private: there is no other way to a loaded card

    def undo() -> None:
        for owner, values in zip(owners, before, strict=True):
            owner.clear()
            owner.update(values)
        model._model_card_text = text

    return undo


def cut_layers(auto_model: Any, layer: int) -> Any:
    """A backbone of the same class with ``layer`` layers and the original's weights, each in its own precision."""
    config = copy.deepcopy(auto_model.config)
    text_config = config.get_text_config()
    depth = text_config.num_hidden_layers
    try:
        text_config.num_hidden_layers = layer
        # lists whose length is checked: attention kinds of Qwen3, Gemma3, ModernBERT, windows of Longformer
        for name in ("layer_types", "attention_window"):
            value = getattr(text_config, name, None)
            if isinstance(value, (list, tuple)) and len(value) == depth:
                setattr(text_config, name, list(value[:layer]))
        with torch.random.fork_rng(devices=[]):  # random weights, which the model's own replace
            cut = type(auto_model)(config)
    except Exception as error:  # the architecture's own code may raise anything
        raise TypeError(
            f"{type(auto_model).__name__} cannot be built with {layer} of its {depth} layers "
            f"({type(error).__name__}: {error}); leave layer out."
        ) from error
    weights = dict(auto_model.named_parameters())
    missing = [
        name for name, value in cut.named_parameters() if name not in weights or weights[name].shape != value.shape
    ]
    if missing:
        raise TypeError(
            f"{type(auto_model).__name__} cannot be cut at layer {layer}: no weights for {missing[:3]}. Leave it out."
        )
    # not .to(dtype): rotary frequencies, and what transformers keeps in float32, must stay so
    buffers = dict(auto_model.named_buffers())
    for name, parameter in cut.named_parameters():
        parameter.data = weights[name].detach().clone()
    for name, buffer in cut.named_buffers():
        source = buffers.get(name, buffer)
        buffer.data = (source if source.shape == buffer.shape else buffer).detach().clone().to(auto_model.device)
    return cut.eval()


def merged_encoders(model: SentenceTransformer) -> dict[int, Any]:
    """Copies of the encoders that carry adapters, with what is switched on of these merged into the weights."""
    return {
        id(encoder): _merged(encoder)
        for encoder in encoders_in(model)
        if hasattr(encoder, "peft_config") or getattr(encoder, "_hf_peft_config_loaded", False)  # PEFT's two ways
    }


def _merged(auto_model: Any) -> Any:
    """A copy of the encoder that PEFT has no part in any more, so that its weights are saved under their own names."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(auto_model)
    if hasattr(merged, "get_base_model"):
        merged = merged.get_base_model()
    done: list[str] = []
    for name, module in list(merged.named_modules()):
        if any(name.startswith(f"{other}.") for other in done):
            continue
        if isinstance(module, BaseTunerLayer):
            if not module.disable_adapters:
                module.merge()
            elif module.merged:
                module.unmerge()
            own = module.get_base_layer()
        elif hasattr(module, "unload_and_optionally_merge_module"):  # modules_to_save, trainable tokens
            if module.disable_adapters:
                own = module.original_module
            else:
                own = module.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(merged.get_submodule(parent), child, own)
        done.append(name)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        if attribute in vars(merged):
            delattr(merged, attribute)
    return merged
