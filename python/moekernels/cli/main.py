"""Arguments, and errors in one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

from moekernels._version import __version__
from moekernels.cli import bench, chat, demo, generate, info, quantize, repack, run, translate
from moekernels.cli.ranks import leave, ranks

_EPILOG = """\
examples:
  moekernels demo                                        try everything on a small model, without a download
  moekernels generate --model DIR --prompt "Once upon"   continue a text with a checkpoint on disk
  moekernels chat --model DIR --system "Be brief."       talk to a model
  moekernels run --task summarization --model DIR FILE   run a task on lines of text
  moekernels translate --model DIR --src-lang eng_Latn --tgt-lang fra_Latn FILE
                                                         translate one sentence per line
  moekernels quantize --model DIR --to int4 --output DIR write a checkpoint with weights in 4 bits
  moekernels repack --model DIR --output DIR             prepare a checkpoint for --expert-memory
  moekernels bench --model olmoe-1b-7b --check           how fast each kernel is here, and whether it is right
  moekernels info --json                                 what to put into a bug report

`moekernels COMMAND --help` explains a command. Exit codes: 0 success, 1 a check failed, 2 wrong use.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moekernels: error: {message} (see `{self.prog} --help`)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moekernels",
        description="Mixture-of-Experts kernels for PyTorch, and the models built on them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moekernels {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (info, generate, chat, translate, run, quantize, repack, demo, bench):
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code. What a user got wrong ends with one line on stderr."""
    args = build_parser().parse_args(argv)
    if not getattr(args, "expert_parallel", False):
        return _run(args, nullcontext())
    leave(_run(args, ranks(args)))


def _run(args: argparse.Namespace, setting: AbstractContextManager[None]) -> int:
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            with setting:
                code: int = args.run(args)
        sys.stdout.flush()  # here, where a reader that has left is no error
        return code
    except BrokenPipeError:
        # The reader has seen enough; what is left to flush must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        print(f"moekernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _show_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"moekernels: warning: {message}", file=sys.stderr)
