"""Which rank reads which sample, and when: a function of one cursor, the number of consumed samples.

Sample i of a run is item i of the training dataset. A micro-step takes the next `micro_batch_size` samples
for each data-parallel rank in turn, as Megatron's pretraining sampler does, so a global batch is one
contiguous range whatever the number of ranks and the size of the micro-batches, and resuming needs the
cursor alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from megatron_zaya.data.errors import DataError


class ResumableSampler(Sampler[list[int]]):
    """A batch sampler: this rank's micro-batches from `consumed_samples` on, as lists of dataset indices.

    It ends before the first micro-step that the dataset cannot fill for all ranks. Every iteration starts
    anew at `consumed_samples`, which counts the samples of all ranks. Raises DataError for sizes that cannot
    be, and when no micro-step is left.
    """

    def __init__(
        self,
        total_samples: int,
        consumed_samples: int,
        micro_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ) -> None:
        if micro_batch_size < 1 or not 0 <= data_parallel_rank < data_parallel_size or consumed_samples < 0:
            raise DataError(
                "the sampler's sizes cannot be",
                value=f"micro-batch {micro_batch_size}, rank {data_parallel_rank} of {data_parallel_size}, "
                f"{consumed_samples} samples consumed",
            )
        self.total_samples = total_samples
        self.consumed_samples = consumed_samples
        self.micro_batch_size = micro_batch_size
        self.data_parallel_rank = data_parallel_rank
        self.step_samples = micro_batch_size * data_parallel_size
        if len(self) < 1:
            raise self.exhausted()

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.consumed_samples + self.data_parallel_rank * self.micro_batch_size
        for step in range(len(self)):
            first = begin + step * self.step_samples
            yield list(range(first, first + self.micro_batch_size))

    def __len__(self) -> int:
        """The micro-steps that are left."""
        return max(self.total_samples - self.consumed_samples, 0) // self.step_samples

    def exhausted(self) -> DataError:
        """The error for reading beyond the end."""
        return DataError(
            "the training samples are used up",
            value=f"{self.total_samples} samples, {self.consumed_samples} consumed before this start, "
            f"{self.step_samples} per micro-step",
            remedy="Build the dataset for all samples the run trains on (steps x global batch size)",
        )


class ResumableLoader:
    """Batches of a ResumableSampler, collated; reading beyond the last one raises DataError.

    The error waits until the missing batch is asked for: worker processes look ahead, and the last batches
    of a run must not be lost to it.
    """

    def __init__(self, loader: DataLoader[Any], sampler: ResumableSampler) -> None:
        self._loader = loader
        self._sampler = sampler

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self._loader
        raise self._sampler.exhausted()

    def __len__(self) -> int:
        """The batches that are left for this rank."""
        return len(self._sampler)


def build_dataloader(dataset: Any, sampler: ResumableSampler, num_workers: int = 0) -> ResumableLoader:
    """Batches `{name: [micro_batch_size, seq_length]}` in the sampler's order, read by `num_workers`."""
    return ResumableLoader(_loader(dataset, sampler, num_workers), sampler)


def document_boundaries(position_ids_BS: torch.Tensor) -> torch.Tensor:
    """Where documents start in the samples laid end to end, and their length: Megatron's `cu_seqlens`, int32.

    With `reset_position_ids`, positions count from the start of each document; a document that runs on from the
    sample before starts anew.
    """
    starts = (position_ids_BS.flatten() == 0).nonzero().flatten()
    return torch.cat([starts, starts.new_tensor([position_ids_BS.numel()])]).to(torch.int32)


def evaluation_batches(
    dataset: Any,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    num_workers: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's batches of held-out data, for ever: after the last whole one it starts over.

    A new iterator starts at the first sample, so that evaluations of equal length see equal data. Raises
    DataError when the dataset cannot fill one micro-step.
    """
    sampler = ResumableSampler(len(dataset), 0, micro_batch_size, data_parallel_rank, data_parallel_size)
    return _for_ever(_loader(dataset, sampler, num_workers))


def _for_ever(loader: DataLoader[Any]) -> Iterator[dict[str, torch.Tensor]]:
    while True:
        yield from loader


def _loader(dataset: Any, sampler: ResumableSampler, num_workers: int) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        # Without a generator of its own a loader draws from the global one at every start, and a resumed run
        # would see other random numbers than an uninterrupted one.
        generator=torch.Generator().manual_seed(0),
    )
