"""The command `moekernels`."""

from moekernels.cli.main import main

__all__ = ["main"]
