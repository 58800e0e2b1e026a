"""Compare a running server with the model.

It asks an OpenAI-compatible endpoint for a few vectors and compares them with the model's own. The exit code is 1 if
they differ.
"""

from __future__ import annotations

import argparse
import sys

from mipic_st.cli import options

EXAMPLES = """example:
  mipic-st check ./rotated --url http://localhost:8000 --dim 64"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    options.add_model(parser)
    parser.add_argument(
        "--url", type=options.given, required=True, help="address of the server, or of its .../embeddings route"
    )
    options.add_dim(parser, "ask the server for D dims (default: all)")
    parser.add_argument("--name", type=options.given, default="model", help="the model's name in the request")
    parser.add_argument("--api-key", type=options.given, help="bearer token")


def run(args: argparse.Namespace) -> int:
    """Ask, compare, and say what is wrong."""
    from mipic_st.deploy.endpoint import check_endpoint

    options.check_places([args.model])
    model = options.load_model(args.model, args)
    check = check_endpoint(model, args.url, args.dim, name=args.name, api_key=args.api_key)
    for finding in check.findings:
        print(f"{args.url}: {finding}", file=sys.stderr)
    if check.agrees and not args.quiet:
        print(f"{args.url} gives the model's vectors (largest distance {check.worst:.4f})")
        if args.dim is None:
            print(
                f"next: mipic-st check {args.model} --url {args.url} --dim D, for a dim that you use", file=sys.stderr
            )
    return 0 if check.agrees else 1
