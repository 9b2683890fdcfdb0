"""Save and load through Megatron-Core's dist_checkpointing. The only module here that imports Megatron-Core.

A step appears under its final name by one rename, after every rank has written and synced its part.
"""

from __future__ import annotations

import os
import shutil
import textwrap
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed import ProcessGroup

from ckpt.steps import CheckpointError, complete_iterations, step_dir


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Checkpointer:
    """Steps of one run under ``root``."""

    def __init__(self, root: Path, group: ProcessGroup | None = None) -> None:
        self.root = root
        self.group = group

    def iterations(self) -> list[int]:
        """Return the complete steps, oldest first. Any rank, no communication."""
        return complete_iterations(self.root)

    def save(self, iteration: int, state: dict[str, Any]) -> Path:
        """Write one step. Collective, blocking; afterwards the step is complete and durable.

        Args:
            iteration: its number; an existing step of this number is replaced.
            state: a sharded state dict in Megatron-Core's terms.
        """
        final = step_dir(self.root, iteration)
        partial = final.with_name(final.name + ".partial")
        first = torch.distributed.get_rank(self.group) == 0
        if first:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        torch.distributed.barrier(self.group)
        dist_checkpointing.save(state, str(partial), validate_access_integrity=True)
        torch.distributed.barrier(self.group)
        if first:
            for path in (*partial.rglob("*"), partial):
                _sync(path)
            if final.exists():
                old = final.with_name(final.name + ".replaced.partial")
                shutil.rmtree(old, ignore_errors=True)
                final.rename(old)
                partial.rename(final)
                shutil.rmtree(old)
            else:
                partial.rename(final)
            _sync(self.root)
        torch.distributed.barrier(self.group)
        return final

    def load(self, iteration: int, template: dict[str, Any], partial: bool = False) -> dict[str, Any]:
        """Read one step into the layout that ``template`` describes. Collective.

        Args:
            iteration: a complete step.
            template: a sharded state dict; what it asks for must be there.
            partial: the step may hold more than the template asks for.

        Raises:
            CheckpointError: the step is damaged, or its tensors are not the ones asked for.
        """
        folder = step_dir(self.root, iteration)
        strict = StrictHandling.RAISE_UNEXPECTED if partial else StrictHandling.RAISE_ALL
        try:
            return dist_checkpointing.load(template, str(folder), strict=strict)
        except (dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
            reason = textwrap.shorten(str(error), 400, placeholder=" ...")
            raise CheckpointError(f"{folder}: cannot be loaded into this model and layout: {reason}") from error

    def load_common(self, iteration: int) -> dict[str, Any]:
        """Return the part of the step that is the same on every rank, without its tensors."""
        return dist_checkpointing.load_common_state_dict(str(step_dir(self.root, iteration)))
