from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names file and key, what was expected and what was found."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint of that name; the message says where it was looked for."""
