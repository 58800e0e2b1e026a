"""Write a model in the form that a server reads.

tei: for text-embeddings-inference, infinity and older releases of vLLM, with older module paths and pooling keys.
onnx: one file that already applies the rotation to the token states, for runtimes that pool by themselves.
"""

from __future__ import annotations

import argparse

from mipic_st.cli import options

EXAMPLES = """example:
  mipic-st export ./rotated --format onnx --output ./rotated-onnx"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser)
    parser.add_argument("--format", choices=["tei", "onnx"], required=True, help="tei or onnx, see above")
    options.add_output(parser)


def run(args: argparse.Namespace) -> None:
    """Write the folder."""
    from mipic_st.deploy.onnx import export_onnx
    from mipic_st.deploy.tei import save_for_tei
    from mipic_st.files import new_folder

    options.check_places([args.model])
    with new_folder(args.output) as new:
        model = options.load_model(args.model, args)
        (save_for_tei if args.format == "tei" else export_onnx)(model, new)
    options.finish(args, f"next, once a server runs: mipic-st check {args.model} --url http://HOST:PORT")
