"""What can go wrong with a checkpoint. Messages are for the user: what, where, the value seen, the remedy."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be used, or a save cannot be made."""


class CorruptCheckpointError(CheckpointError):
    """What lies on the disk is not what was written: another step must be used."""
