"""Give an existing encoder good small dims without training: rotate its embedding space, in about a minute.

    python examples/rotate_existing_model.py                                       # offline, on synthetic pairs
    python examples/rotate_existing_model.py --model NAME --pairs pairs.csv --output rotated
    python examples/rotate_existing_model.py --texts corpus.txt --eval-file sts.csv --output rotated

Full-width cosine similarities stay as they are; the first values of a vector now carry the most information. The saved
folder is plain: SentenceTransformer("rotated", truncate_dim=32).encode(texts, normalize_embeddings=True).
"""

from __future__ import annotations

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from datasets import Dataset

from common import choose_dims, load_model, load_train, make_evaluator, make_parser, save, score, show
from mipic_st import rotate_model
from mipic_st.data import load_texts_file
from mipic_st.demo import synthetic_pairs


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--texts", help="documents instead of pairs: txt (one text per line), or a table")
    args = parser.parse_args()
    model = load_model(args.model)
    dims = choose_dims(args.dims, model.get_embedding_dimension())
    evaluator = make_evaluator(args, dims)
    if args.texts:
        data = load_texts_file(args.texts)
    elif args.smoke:
        data = Dataset.from_list(synthetic_pairs(300))
    else:
        data = load_train(args, synthetic_pairs())
    before = score(model, evaluator)
    steps = {"max_steps": 30} if args.smoke else {}
    rotation = rotate_model(
        model, data, dims, batch_size=args.batch_size, seed=args.seed, show_progress_bar=True, **steps
    )
    print(rotation)
    show(before, score(model, evaluator))
    save(model, args.output)


if __name__ == "__main__":
    main()
