"""Encoders beyond those of conftest, by the name of transformers' config, with their final norm."""

from __future__ import annotations

import pytest
import transformers

from conftest import WIDTH, make_tokenizer

SIZES = {
    "hidden_size": WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 66,
    "pad_token_id": 0,
}
OPT = {"hidden_size": WIDTH, "num_attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 66, "pad_token_id": 0}
# The name of the final norm, found in the sources of transformers.
PRE_NORM = {
    "RobertaPreLayerNorm": ("LayerNorm", SIZES),
    "MegatronBert": ("encoder.ln", SIZES),
    "XLMRobertaXL": ("encoder.LayerNorm", SIZES),
    "Esm": ("encoder.emb_layer_norm_after", {**SIZES, "mask_token_id": 4, "position_embedding_type": "rotary"}),
    "OPT": ("decoder.final_layer_norm", {**OPT, "word_embed_proj_dim": WIDTH}),
    "Phi": ("final_layernorm", SIZES),
    "Mpt": ("norm_f", {"d_model": WIDTH, "n_heads": 4, "max_seq_len": 66, "expansion_ratio": 2}),
    "XGLM": ("layer_norm", {"d_model": WIDTH, "ffn_dim": 48, "attention_heads": 4, "max_position_embeddings": 66}),
    "Lfm2": ("embedding_norm", {**SIZES, "num_key_value_heads": 2, "layer_types": ["full_attention", "conv", "conv"]}),
    "Mamba": ("norm_f", {"hidden_size": WIDTH, "state_size": 4}),
    "GPT2": ("ln_f", {"n_embd": WIDTH, "n_head": 4, "n_positions": 66}),
    "Gemma3Text": ("norm", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}),
    "EuroBert": ("norm", SIZES),
}
POST_NORM = {
    "Albert": (None, {**SIZES, "embedding_size": 16}),
    "DebertaV2": (None, SIZES),
    "Electra": (None, {**SIZES, "embedding_size": 16}),
    "XLNet": (None, {"d_model": WIDTH, "n_head": 4, "d_inner": 48}),
    "OPT that norms behind": (None, {**OPT, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False}),
}


def config_of(name: str, settings: dict, layers: int):
    """A config of the class, if this transformers has it, with so many layers."""
    kind = getattr(transformers, f"{name.split()[0]}Config", None)
    if kind is None:
        pytest.skip(f"this transformers has no {name}")
    settings = dict(settings)
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][:layers]
    tokens = {"vocab_size": len(make_tokenizer()), "bos_token_id": 2, "eos_token_id": 3}
    return kind(**settings, **tokens, num_hidden_layers=layers)
