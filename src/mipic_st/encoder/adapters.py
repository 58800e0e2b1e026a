"""Adapters of PEFT, merged into copies of the encoders that carry them."""

from __future__ import annotations

import copy
from typing import Any

from sentence_transformers import SentenceTransformer

from mipic_st.encoder.structure import encoders_in


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
