"""List the groups of MTEB tasks, with their sizes and expected minutes."""

from __future__ import annotations

import argparse
import sys

EXAMPLES = """example:
  mipic-st tasks"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command takes nothing."""


def run(args: argparse.Namespace) -> None:
    """Print the list."""
    from mipic_st.evaluation.tasks import TASK_GROUPS

    for name, group in TASK_GROUPS.items():
        print(f"{name:15} {group.texts:7,} texts, about {group.minutes:g} min on two CPU cores (22M parameters)")
        print(f"{'':15} {', '.join(group.tasks)}")
    print("next: mipic-st eval MODEL --tasks GROUP --dims 16,64 --output results", file=sys.stderr)
