from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message names file and key, what was expected and what was found."""
