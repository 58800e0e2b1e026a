"""Give a model good small dims without training: fit a rotation, and save the model with it.

The rotation is fitted on texts or pairs. Full-width cosines stay as they are, and the saved folder loads without this
package.
"""

from __future__ import annotations

import argparse
from typing import Any

from mipic_st.cli import options

EXAMPLES = """examples:
  mipic-st rotate ./run-a --pairs pairs.csv --dims 16 32 64 128 --output ./run-a-rotated
  mipic-st rotate ./run-a --texts corpus.txt --dims 16,64 --output ./run-a-rotated
  mipic-st rotate ./run-a --pairs qa.csv --columns question,answer --documents corpus.txt --output ./run-a-rotated
  mipic-st rotate ./run-a --texts corpus.txt --check other.txt --output ./run-a-rotated"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser)
    data = parser.add_mutually_exclusive_group(required=True)
    options.add_file(data, "--pairs", "csv, tsv, jsonl or parquet: anchor, positive, or STS columns")
    options.add_file(data, "--texts", "the documents: txt (one text per line), or a table with texts")
    data.add_argument("--dataset", type=options.given, metavar="NAME", help="pairs from the hub: NAME or NAME:CONFIG")
    options.add_columns(parser)
    for name, text in (
        ("documents", "more documents, as --texts"),
        ("queries", "queries without answers, as --texts"),
        ("check", "texts to judge the rotation on as well, e.g. of a different domain, as --texts"),
    ):
        options.add_file(parser, f"--{name}", text)
    options.add_prompt(parser, "query", "queries and the first text of pairs")
    options.add_prompt(parser, "document", "documents and the second text of pairs")
    options.add_dims(parser)
    options.add_output(parser)
    options.add_batch_size(parser)
    options.add_seed(parser)


def run(args: argparse.Namespace) -> None:
    """Fit, save, and say what each dim gained."""
    from mipic_st.data import load_texts_file, load_training_file, load_training_hub
    from mipic_st.deploy.written import require_same_when_loaded
    from mipic_st.encoder.encoding import encode_texts
    from mipic_st.encoder.structure import full_width
    from mipic_st.files import new_folder
    from mipic_st.transforms.model_rotation import rotate_model
    from mipic_st.validation import checked_count, checked_dims, default_dims

    options.check_places([args.model])
    checked_count("--seed", args.seed, least=0)
    if args.dims:
        checked_dims("--dims", args.dims)
    with new_folder(args.output) as new:
        if args.texts:
            data = load_texts_file(args.texts, columns=args.columns)
        else:
            load, place = (load_training_file, args.pairs) if args.pairs else (load_training_hub, args.dataset)
            data = load(place, columns=args.columns)
        documents, queries, other = (
            load_texts_file(file) if file else None for file in (args.documents, args.queries, args.check)
        )
        model = options.load_model(args.model, args)
        dims = args.dims or default_dims(full_width(model))
        shown = {"batch_size": args.batch_size, "show_progress_bar": not args.quiet}
        # before the model is rotated
        checked = None if other is None else encode_texts(model, other, prompt=args.document_prompt, **shown)
        rotation = rotate_model(
            model,
            data,
            dims,
            documents=documents,
            queries=queries,
            prompts=_prompts(data, args),
            seed=args.seed,
            **shown,
        )
        judged = None if checked is None else rotation.evaluate(checked)
        if not rotation.gained:
            raise ValueError("no dim gained, nothing was saved.")
        model.save_pretrained(str(new))
        require_same_when_loaded(model, new)
        rotation.save(new / "rotation.safetensors")
    if not args.quiet:
        print(rotation)
        if judged is not None:
            print(f"\n{args.check}: {judged}")
    options.finish(args, f"next: mipic-st eval {args.model} {args.output} --tasks sts --output results")


def _prompts(data: Any, args: argparse.Namespace) -> dict[str, str] | str | None:
    """The prompts by column; a list of texts has documents alone, and further queries theirs."""
    if args.query_prompt is None and args.document_prompt is None:
        return None
    names = ["", ""] if isinstance(data, list) else [name for name in data.column_names if name != "score"]
    given = {names[0]: args.query_prompt, names[1]: args.document_prompt}
    given |= {"queries": args.query_prompt} if args.queries else {}
    given |= {"documents": args.document_prompt} if args.documents else {}
    return {name: prompt for name, prompt in given.items() if prompt is not None}
