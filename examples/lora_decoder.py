"""LoRA on a decoder: Qwen3, last-token pooling, an instruction before each query.

    python examples/lora_decoder.py --smoke                                             # a tiny random Qwen3, offline
    python examples/lora_decoder.py --model Qwen/Qwen3-Embedding-0.6B --train-file pairs.csv --bf16

Without --model the decoder is tiny, random and made on the spot with a word tokenizer: it shows the steps, not a score.
"""

from __future__ import annotations

import tempfile

from common import arguments, dims_for, load_data, parse, score, show, sts_evaluator, train
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs

INSTRUCTION = "Instruct: Find the sentence with the same meaning\nQuery: "


def tiny_decoder(texts: list[str]) -> SentenceTransformer:
    """A random Qwen3 of four layers and 64 dims that knows the words of the texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", padding_side="left", model_max_length=64
    )
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        Qwen3Model(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    return SentenceTransformer(modules=[transformer, pooling, Normalize()])


def main() -> None:
    from peft import LoraConfig, TaskType

    args = parse(arguments(__doc__, learning_rate=1e-3))
    data = load_data(args, synthetic_pairs(4000, negatives=False))
    texts = [INSTRUCTION, *(text for column in data.column_names for text in data[column])]
    model = SentenceTransformer(args.model) if args.model else tiny_decoder(texts)
    dims = dims_for(model, args)

    model.add_adapter(
        LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION, r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"]
        )
    )
    # The loss sees the adapted model like any other: SIA and PIC read its hidden states, LoRA takes their gradients.
    loss = MIPICLoss(model, MultipleNegativesRankingLoss(model), dims)

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    train(model, loss, data, args, prompts={"anchor": INSTRUCTION}, batch_sampler="no_duplicates")
    after = score(model, evaluator, dims)
    show(before, after, "LoRA on a decoder")

    # What is saved is the adapter and the path of its base; the package is not needed to load it.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        print("saved:", sorted(path.name for path in __import__("pathlib").Path(folder).iterdir()))


if __name__ == "__main__":
    main()
