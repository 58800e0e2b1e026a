"""Keep only the first layers of a model, the first dims, or both.

A plain SentenceTransformer is saved, which loads without this package. With --texts, the cut is fitted to the full
model's vectors, which saves many points, and the loss of quality is measured on held-out texts.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mipic_st.cli import options

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from mipic_st.transforms.layer_cut import LayerCuts

EXAMPLES = """example:
  mipic-st cut ./run-a --layer 3 --dim 64 --texts corpus.txt --output ./run-a-small"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser)
    parser.add_argument("--layer", type=options.whole_number, metavar="L", help="last layer to keep (default: all)")
    options.add_dim(parser, "dims to keep (default: all)")
    text = "txt (one text per line) or a table: fit the cut to the full model's vectors"
    options.add_file(parser, "--texts", text)
    options.add_columns(parser)
    options.add_prompt(parser, "document", "the texts")
    parser.add_argument(
        "--no-word-weights",
        action="store_true",
        help="with --texts: keep the plain mean of the tokens, for servers that know no WordWeights module",
    )
    options.add_output(parser)
    options.add_batch_size(parser)
    options.add_seed(parser)


def run(args: argparse.Namespace) -> None:
    """Cut, save, and say what it costs and what it gains."""
    from mipic_st.data import load_texts_file
    from mipic_st.deploy.truncated import export_truncated, measure_speedup
    from mipic_st.encoder.structure import full_width
    from mipic_st.files import new_folder, write_json
    from mipic_st.transforms.layer_cut import fit_layer_cuts

    options.check_places([args.model])
    if not (args.layer or args.dim):
        raise ValueError("there is nothing to cut: give --layer, --dim or both.")
    if args.texts and not args.layer:
        raise ValueError("--texts fits the cut behind an early layer: give --layer too.")
    for option in ("no_word_weights", "columns", "document_prompt"):
        if getattr(args, option) and not args.texts:
            name = option.replace("_", "-")
            raise ValueError(f"--{name} is for the fit on --texts: give these too, or leave it out.")
    with new_folder(args.output) as new:
        texts = load_texts_file(args.texts, columns=args.columns) if args.texts else None
        model = options.load_model(args.model, args)
        cuts, note = None, ""
        if texts is not None:
            cuts = fit_layer_cuts(
                model,
                texts,
                layers=[args.layer],
                dims=[args.dim or full_width(model)],
                word_weights=False if args.no_word_weights else None,
                prompt=args.document_prompt,
                batch_size=args.batch_size,
                seed=args.seed,
                show_progress_bar=not args.quiet,
            )
            note = _without_word_weights(cuts, args, model)
        exported = export_truncated(model, args.layer, args.dim, cuts=cuts)
        statement = {"layer": args.layer, "dim": args.dim}
        if cuts is not None:
            statement |= cuts.report[0]
        if args.layer:
            statement |= measure_speedup(model, exported, batch_size=args.batch_size)
        exported.save_pretrained(str(new))
        write_json(new / "cut.json", statement)
    if not args.quiet:
        _print(args, statement, note)


def _without_word_weights(cuts: LayerCuts, args: argparse.Namespace, model: SentenceTransformer) -> str:
    """Why the fit has no word weights; nothing where it has them."""
    from mipic_st.encoder.surgery import no_word_weights

    if cuts.word_weights:
        return ""
    if args.no_word_weights:
        return "The mean of the tokens has no word weights: with them the cut is closer to the full model."
    if reason := no_word_weights(model):
        return f"The tokens have no word weights, since {reason}."
    return "The mean of the tokens has no word weights: the fit found none that bring the cut closer to the full model."


def _print(args: argparse.Namespace, statement: dict, note: str) -> None:
    from mipic_st.transforms.layer_cut import LayerCuts

    if args.texts:
        print("correlation of cosines with those of the full model, on held-out texts")
        for key in [key for key in LayerCuts.headings if key.startswith("similarity")]:
            print(f"  {LayerCuts.headings[key]:22} {100 * statement[key]:6.1f}")
    if note:
        print(note)
    if args.layer:
        print(
            f"{statement['speedup']:.2f} times as fast ({statement['seconds_full']:.3f} s to "
            f"{statement['seconds_cut']:.3f} s for 128 sentences), {statement['parameters_cut'] / 1e6:.1f} of "
            f"{statement['parameters_full'] / 1e6:.1f} million parameters"
        )
        if not args.texts:
            print(
                "Nothing was fitted, and the loss of quality was not measured: --texts FILE does both. At half depth, "
                "the fit saves many points."
            )
    options.finish(args, f"next: mipic-st eval {args.model} {args.output} --tasks sts --output results")
