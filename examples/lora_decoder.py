"""LoRA on a decoder model: last-token pooling, an instruction before each query, adapters merged after training.

    python examples/lora_decoder.py                                              # offline, a tiny random Qwen3
    python examples/lora_decoder.py --model Qwen/Qwen3-Embedding-0.6B --dataset sentence-transformers/all-nli:pair

Only the adapters are trained. The tiny default has random weights: it shows that all parts fit
together, its scores say nothing. Needs peft.
"""

from __future__ import annotations

import tempfile

import numpy as np
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import Qwen3Config, Qwen3Model

from common import (
    choose_dims,
    load_model,
    load_train,
    make_evaluator,
    make_parser,
    score,
    sentences_of,
    show,
    training_arguments,
    word_tokenizer,
)
from mipic_st import MIPICCallback, MIPICLoss, set_matryoshka_config
from mipic_st.data import is_scored
from mipic_st.demo import synthetic_pairs

QUERY_PROMPT = "Instruct: Find a sentence that says the same\nQuery: "


def tiny_qwen3(train: Dataset, folder: str, seed: int) -> SentenceTransformer:
    """A random Qwen3 of 4 layers and width 64 that knows the words of the training data."""
    tokenizer = word_tokenizer([QUERY_PROMPT, *sentences_of(train)], padding_side="left")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    Qwen3Model(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(64, pooling_mode="lasttoken"), Normalize()])


def main() -> None:
    args = make_parser(__doc__, learning_rate=2e-4).parse_args()
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise SystemExit("Adapters need peft: pip install peft") from None

    train = load_train(args, synthetic_pairs(2000, negatives=False))
    if is_scored(train):
        raise SystemExit(f"A ranking loss needs the columns anchor and positive, got {train.column_names}")
    with tempfile.TemporaryDirectory() as scratch:
        # 1. A decoder whose sentence vector is the last token's state, with adapters in its attention
        model = load_model(args.model) if args.model else tiny_qwen3(train, f"{scratch}/base", args.seed)
        model.prompts = {"query": QUERY_PROMPT, "document": ""}
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        model[0].model = get_peft_model(model[0].model, adapters)
        model[0].model.print_trainable_parameters()
        dims = choose_dims(args.dims, model.get_embedding_dimension())

        # 2. In-batch negatives at every dim, with MIPIC's alignments
        loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), matryoshka_dims=dims)

        # 3. Train with the instruction before each anchor, as queries get it later from encode_query
        evaluator = make_evaluator(args, dims)
        before = score(model, evaluator)
        trainer = SentenceTransformerTrainer(
            model=model,
            args=training_arguments(args, model, train, f"{scratch}/run", prompts={"anchor": QUERY_PROMPT}),
            train_dataset=train,
            loss=loss,
            callbacks=[MIPICCallback(loss)],
        )
        trainer.train()
        show(before, score(model, evaluator))

        # 4. Merge the adapters, save, and load the result as what it is now: a plain model
        query = train[0]["anchor"]
        expected = model.encode_query(query)
        model[0].model = model[0].model.merge_and_unload()
        set_matryoshka_config(model, dims, loss.pic_chain)
        folder = args.output or f"{scratch}/merged"
        model.save_pretrained(folder)
        loaded = SentenceTransformer(folder)
        difference = np.abs(loaded.encode_query(query) - expected).max()
        print(f"merged model loaded from {folder}: largest difference to the trained one {difference:.1e}")


if __name__ == "__main__":
    main()
