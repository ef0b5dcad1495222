"""What the processes of `test_commands.py` run: the commands, as `torchrun` starts them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
from typing import Any
from unittest import mock

from moekernels.cli import main as command_line

MAIN = importlib.import_module("moekernels.cli.main")  # by its name it would be the function that the package has


def run(rank: int, commands: dict[str, tuple[list[str], str]]) -> dict[str, Any]:
    """Exit code, output and errors of every command, given what is on stdin."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    found: dict[str, Any] = {}
    for name, (arguments, text) in commands.items():
        out, errors, codes = io.StringIO(), io.StringIO(), []
        # Only rank 0 may read: the others are given something else.
        given = io.StringIO(text if rank == 0 else "something else\n")
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
            mock.patch("sys.stdin", given),
            mock.patch.object(MAIN, "leave", codes.append),
        ):
            command_line([*arguments, "--expert-parallel"])
        found[name] = (codes, out.getvalue(), errors.getvalue())
    return found
