"""LoRA on a decoder: Qwen3, last-token pooling, an instruction before each query.

    python examples/lora_decoder.py --smoke                                             # a tiny random Qwen3, offline
    python examples/lora_decoder.py --model Qwen/Qwen3-Embedding-0.6B --train-file pairs.csv --bf16

Without --model the decoder is tiny, random and made on the spot with a word tokenizer: it shows the steps, not a score.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from common import arguments, dims_for, load_data, parse, random_model, score, show, sts_evaluator, train
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs

INSTRUCTION = "Instruct: Find the sentence with the same meaning\nQuery: "


def main() -> None:
    from peft import LoraConfig, TaskType

    args = parse(arguments(__doc__, learning_rate=1e-3))
    data = load_data(args, synthetic_pairs(4000, negatives=False))
    texts = [INSTRUCTION, *(text for column in data.column_names for text in data[column])]
    if args.model:
        model = SentenceTransformer(args.model)
    else:
        model = random_model(texts, depth=4, width=64, pooling="lasttoken")
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

    # What is saved is the adapter and the name of its base model; loading needs peft and nothing of this package.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        print("saved:", ", ".join(sorted(path.name for path in Path(folder).iterdir())))


if __name__ == "__main__":
    main()
