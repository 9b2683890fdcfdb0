"""Checkpointer: saves that do not hold training up, loads into any layout. Needs torch, not Megatron-Core.

checkpointer = Checkpointer(Path("runs/mine/checkpoints"))
save = checkpointer.save(120, shards, common={"seed": 1})   # returns when the tensors may change again
for finished in checkpointer.poll(): ...                    # between steps; never waits
checkpointer.load(shards)                                   # fills the tensors from the newest valid step
"""

from __future__ import annotations

import json
import platform
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed import ProcessGroup

from ckpt.background import Background
from ckpt.errors import CheckpointError
from ckpt.manifest import MANIFEST
from ckpt.memory import collector_off, parts_of, signature_of
from ckpt.rankfile import FilePlan, plan_file
from ckpt.restore import LoadReport, load_newest
from ckpt.retention import Retention
from ckpt.save import Save
from ckpt.shard import Shard
from ckpt.steps import complete_iterations, partial_dir
from ckpt.storage import POSIX
from ckpt.tiers import recover


class Checkpointer:
    """Steps of one job under ``root``. Every rank of ``group`` makes one and calls the same methods in the same order.

    Problems of the disk or of the writer never raise out of :meth:`save`: they become ``Save.error``, the step before
    stays loadable, and the next save starts anew with a fresh writer if need be.
    """

    def __init__(
        self,
        root: Path,
        group: ProcessGroup | None = None,
        *,
        retention: Retention | None = None,
        max_host_bytes: int | None = None,
        commit_timeout_s: float = 600.0,
        stall_timeout_s: float = 300.0,
        storage: str = POSIX,
        storage_options: dict[str, Any] | None = None,
        local: Path | None = None,
    ) -> None:
        """Make a checkpointer; no communication, nothing is written.

        Args:
            root: folder of the steps, on storage that all ranks share.
            group: the ranks that save together; None is the world, or this process alone without torch.distributed.
            retention: which steps stay; all of them if not given.
            max_host_bytes: hard cap of this rank's staging memory. Below the size of its file, saves wait for the disk.
            commit_timeout_s: how long the committing writer waits for the other ranks' parts.
            stall_timeout_s: a writer without progress for so long is given up.
            storage: what writes, as "module:factory", see ckpt.storage.
            storage_options: its keyword arguments.
            local: folder of this run on the node's own disk. Files are written there first and copied to ``root`` in
                the background; :func:`ckpt.tiers.recover` finishes what a crash interrupted.
        """
        self.root, self.group = Path(root), group
        self.local = None if local is None else Path(local)
        self.retention = retention or Retention()
        self.commit_timeout_s = commit_timeout_s
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = torch.distributed.get_rank(group) if distributed else 0
        self.world_size = torch.distributed.get_world_size(group) if distributed else 1
        self._background = Background(
            self.rank, storage, storage_options or {}, max_host_bytes, commit_timeout_s, stall_timeout_s
        )
        self._plan: tuple[list[Any], FilePlan] | None = None
        self._session: str | None = None
        self._number = 0

    # ------------------------------------------------------------------ saving

    def save(
        self,
        iteration: int,
        shards: Sequence[Shard],
        common: Any = None,
        *,
        layout: dict[str, Any] | None = None,
        score: float | None = None,
    ) -> Save:
        """Start to save a step. All ranks call it; only the first call of a job communicates (8 bytes).

        Returns as soon as the tensors may change: they are in the arena. Waits for the save before only if that one is
        still being written, and says so in ``Save.waited_s``. An existing step of this number is replaced in the end.

        Args:
            iteration: number of the step.
            shards: what this rank holds; the ranks together must hold every element of every tensor.
            common: any JSON value; that of the first rank counts.
            layout: how the job is spread over ranks, for people.
            score: lower is better, for ``Retention.keep_best``.

        Raises:
            CheckpointError: the description cannot be saved (two tensors of one name, an unknown type, no JSON).
        """
        return self._start(iteration, shards, common, layout or {}, score, None)

    def save_into(self, folder: Path, shards: Sequence[Shard], iteration: int = 0, common: Any = None) -> Save:
        """Save into a folder of the caller's, which must hold no step; for adapters to other programs' interfaces.

        The folder is a step once its manifest is there, which comes last. All ranks call it.

        Raises:
            CheckpointError: the description cannot be saved, or the folder holds a step already.
        """
        if (folder / MANIFEST).exists():
            raise CheckpointError(f"{folder}: holds a checkpoint already; save into a new folder")
        return self._start(iteration, shards, common, {}, None, folder)

    @collector_off()
    def _start(
        self,
        iteration: int,
        shards: Sequence[Shard],
        common: Any,
        layout: dict[str, Any],
        score: float | None,
        folder: Path | None,
    ) -> Save:
        start = time.monotonic()
        self._number += 1
        self._agree_on_session()
        plan = self._plan_of(shards)
        order = self._order(iteration, plan, common, layout, score)
        if folder is not None:
            order["folder"], order["local"] = str(folder.absolute()), None
            if order["commit"] is not None:
                order["commit"]["publish"] = False
        save = Save(iteration, plan.size, order["save_id"], commits=self.rank == 0)
        self._background.start(self._number, save, order, plan, shards)
        save.stall_s = time.monotonic() - start
        return save

    def poll(self) -> list[Save]:
        """Return the saves that finished, well or badly, since the last call. Never waits, no communication."""
        return self._background.finished()

    def wait(self, timeout_s: float | None = None) -> list[Save]:
        """Wait until every save is finished or given up; return those that :meth:`poll` has not yet returned.

        Raises:
            CheckpointError: ``timeout_s`` passed.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        finished = self.poll()
        while self._background.saves:
            if deadline is not None and time.monotonic() > deadline:
                raise CheckpointError(f"saves are still under way after {timeout_s:g} s")
            time.sleep(0.002)
            finished += self.poll()
        return finished

    def wait_for_part(self, save: Save) -> None:
        """Wait until this rank's file of ``save`` is on the disk, or the save is given up."""
        while save.part_s is None and not save.done:
            self._background.hear()
            time.sleep(0.002)

    def progress(self) -> tuple[int, int]:
        """Return (bytes written, bytes to write) of the newest save of this rank; (0, 0) if none is under way."""
        return self._background.progress()

    def close(self, timeout_s: float = 60.0) -> None:
        """Let the writer finish for at most ``timeout_s``, then leave it to end by itself. Idempotent."""
        self._background.close(timeout_s)

    def _agree_on_session(self) -> None:
        if self._session is None:
            session = [secrets.token_hex(4)]
            if self.world_size > 1:
                source = torch.distributed.get_global_rank(self.group, 0) if self.group is not None else 0
                torch.distributed.broadcast_object_list(session, src=source, group=self.group)
            self._session = session[0]

    def _plan_of(self, shards: Sequence[Shard]) -> FilePlan:
        """Return the plan of this rank's file; planned once for all saves of equal descriptions."""
        signature = signature_of(shards)
        if self._plan is None or self._plan[0] != signature:
            self._plan = (signature, plan_file(parts_of(shards), self.rank))
        return self._plan[1]

    def _order(
        self, iteration: int, plan: FilePlan, common: Any, layout: dict[str, Any], score: float | None
    ) -> dict[str, Any]:
        save_id = f"{self._session}-{self._number}"
        order: dict[str, Any] = {
            "op": "save",
            "number": self._number,
            "save_id": save_id,
            "folder": str(partial_dir(self.root.absolute(), iteration, save_id)),
            "rank": self.rank,
            "size": plan.size,
            "layout": id(plan),
            "local": None if self.local is None else str(partial_dir(self.local.absolute(), iteration, save_id)),
            "commit": None,
        }
        if self.rank == 0:
            order["commit"] = {
                "iteration": iteration,
                "ranks": list(range(self.world_size)),
                "timeout_s": self.commit_timeout_s,
                "common": common,
                "layout": layout,
                "libraries": {"torch": torch.__version__, "python": platform.python_version()},
                "retention": asdict(self.retention),
                "score": score,
            }
            try:
                json.dumps(common)
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"`common` must be a JSON value: {error}") from None
        return order

    # ------------------------------------------------------------------ loading

    def iterations(self) -> list[int]:
        """Return the complete steps, oldest first. Any rank, no communication."""
        return complete_iterations(self.root)

    def load(
        self,
        shards: Sequence[Shard],
        iteration: int | None = None,
        *,
        partial: bool = False,
        optional: str | None = None,
    ) -> LoadReport:
        """Fill the tensors of ``shards`` from a step. All ranks call it, each with what its layout needs.

        Args:
            shards: what to fill, in place; any layout.
            iteration: the step; None takes the newest that is valid, passing over damaged ones with a warning. Before
                the first save, one that is newer on the nodes' own disks is completed.
            partial: the step may hold tensors that nobody asks for.
            optional: tensors whose keys begin so may be missing (they keep their values) or left over.

        Raises:
            CorruptCheckpointError: the step is damaged; names file, chunk and tensor.
            CheckpointError: there is no step, tensors are missing or left over, or of another shape or type.
        """
        if self.local is not None and iteration is None and not self._number:  # a job's own saves go on by themselves
            recover(self.root, self.local, self.group)
        return load_newest(self.root, self.group, shards, iteration, partial, optional)
