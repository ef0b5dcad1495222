"""Experts larger than memory."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_expert_memory_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="leave experts in the files, and read them into so much memory when they are needed: 8GiB, or auto for "
        "what is free",
    )


def print_expert_stats(model: Any) -> None:
    """One line on stderr, if the experts of a model are in files: how often they were there, and what was read."""
    if getattr(model, "expert_cache", None) is not None:
        print(model.expert_cache.stats(), file=sys.stderr)
