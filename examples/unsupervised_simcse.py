"""Unsupervised SimCSE as in the paper: a sentence and itself, told apart only by dropout.

    python examples/unsupervised_simcse.py                                      # offline, synthetic sentences
    python examples/unsupervised_simcse.py --model bert-base-uncased --train-file sentences.csv --steps 7500

Settings of the paper's Table 7: the paper preset, batch 16, learning rate 2e-5, cosine schedule, weight decay 0.01; it
trained 5 epochs on about 24k sentences, from backbones that were no sentence models yet. all-MiniLM-L6-v2, the offline
default, is one already and has nothing to learn from this: its loss is close to zero from the first step. The default
run therefore starts from that model with the upper half of its layers made random.
"""

from __future__ import annotations

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch import nn

from common import arguments, dims_for, load_data, load_model, parse, score, show, sts_evaluator, train, twice
from mipic_st import MIPICLoss
from mipic_st.synthetic import synthetic_pairs


def forget(model: SentenceTransformer) -> None:
    """Give the upper half of the layers random weights."""
    layers = model[0].auto_model.encoder.layer
    for module in layers[len(layers) // 2 :].modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()


def main() -> None:
    args = parse(arguments(__doc__, batch_size=16, learning_rate=2e-5))
    model = load_model(args.model)
    if args.model is None:
        torch.manual_seed(args.seed)
        forget(model)
    data = twice(load_data(args, synthetic_pairs(4000, negatives=False)))
    dims = dims_for(model, args)

    # scale 20 is a temperature of 0.05
    loss = MIPICLoss.from_preset(model, MultipleNegativesRankingLoss(model, scale=20), dims, "paper")

    evaluator = sts_evaluator(args, dims)
    before = score(model, evaluator, dims)
    train(model, loss, data, args, lr_scheduler_type="cosine", weight_decay=0.01)
    show(before, score(model, evaluator, dims), "unsupervised SimCSE")


if __name__ == "__main__":
    main()
