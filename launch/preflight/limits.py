"""What a healthy node has: the `preflight:` section of a site file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

NonNegative = Annotated[float, Field(ge=0)]


class Limits(BaseModel):
    """Thresholds of the checks. A limit of None (or an empty collection) switches its check off."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    gpus: Annotated[int, Field(ge=0)] | None = None
    gpu_memory_gib: NonNegative | None = None
    """Least memory of each GPU."""
    max_uncorrectable_ecc: Annotated[int, Field(ge=0)] = 0
    """Uncorrectable ECC errors since the driver was loaded, per GPU."""
    max_correctable_ecc: Annotated[int, Field(ge=0)] | None = None
    min_gpu_clock_mhz: NonNegative | None = None
    """Highest engine clock that the GPU may reach: a capped GPU is slow."""
    max_gpu_temperature_c: NonNegative | None = 100.0
    max_used_gpu_memory_gib: NonNegative | None = 4.0
    """Memory that a GPU may already have in use: leftovers of another job."""
    full_mesh: bool = False
    """All pairs of GPUs must be linked by xGMI."""
    nics: list[str] = []
    """RDMA devices that must be there, active, in rail order."""
    nic_rate_gbps: NonNegative | None = None
    nic_firmware: str | None = None
    nic_neighbours: dict[str, str] = {}
    """Rail identity: RDMA device -> pattern of the switch that LLDP must see there, such as `ionic_3: r3l*`."""
    max_clock_offset_s: NonNegative | None = 0.5
    """Largest offset that chrony reports."""
    min_free_disk_gib: dict[str, NonNegative] = {}
    """Folder -> least free space."""
    min_shared_memory_gib: NonNegative | None = None
    min_memory_gib: NonNegative | None = None
    versions: dict[str, str] = {}
    """What -> version that it must have: kernel, driver, rocm, python, torch, megatron-core, ..."""
    min_gemm_tflops: NonNegative | None = None
    """Tier 2: bf16 (fp32 on a CPU) matrix product, per rank."""
    min_memory_bandwidth_gbs: NonNegative | None = None
    """Tier 2: copy in device memory, GB/s read plus written, per rank."""
    spread: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Tier 2: a rank, pair or rail below this share of the median is slow."""
    network_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Tier 2: least share of the bandwidth that the topology planner expects; needs `cluster` in the site file."""
