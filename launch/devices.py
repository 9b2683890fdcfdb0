"""Which accelerator and which CPU cores belong to a local rank, from the environment and sysfs.

ROCm applies ROCR_VISIBLE_DEVICES first and numbers what is left from 0; HIP_VISIBLE_DEVICES, or CUDA_VISIBLE_DEVICES
where it is not set, then picks from that. Slurm sets both to the same list, so that a job on GPUs 4-7 would see none:
`repaired_environment` drops the second list. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.errors import LaunchError

ROCM_FIRST, ROCM_SECOND = "ROCR_VISIBLE_DEVICES", ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
AMD_VENDOR, NVIDIA_VENDOR, DISPLAY_CLASSES = "0x1002", "0x10de", ("0x0300", "0x0302", "0x0380", "0x1200")


@dataclass(frozen=True)
class Accelerator:
    """One device of the node, in PCI order."""

    pci: str
    vendor: str
    numa_node: int
    """-1 where the firmware does not say."""


def is_rocm(root: Path = Path("/")) -> bool:
    """True when AMD's compute driver is loaded."""
    return (root / "dev/kfd").exists()


def accelerators(root: Path = Path("/")) -> list[Accelerator]:
    """List the node's compute devices from sysfs."""
    found = []
    for folder in sorted((root / "sys/bus/pci/devices").glob("*")):
        vendor, kind = (_read(folder / name) for name in ("vendor", "class"))
        if vendor in (AMD_VENDOR, NVIDIA_VENDOR) and kind[:6] in DISPLAY_CLASSES:
            found.append(Accelerator(folder.name, vendor, int(_read(folder / "numa_node") or -1)))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """`0-3,8` to (0, 1, 2, 3, 8)."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        cpus += range(int(low), int(high or low) + 1)
    return tuple(cpus)


def repaired_environment(environ: Mapping[str, str], rocm: bool) -> dict[str, str | None]:
    """Return the changes that make device lists of a Slurm step usable: name -> new value, None removes it."""
    if not rocm or not environ.get(ROCM_FIRST):
        return {}
    return {name: None for name in ROCM_SECOND if environ.get(name) == environ[ROCM_FIRST]}


def visible_devices(environ: Mapping[str, str], rocm: bool) -> tuple[str, ...] | None:
    """Return the devices that this process may use, or None when nothing limits them.

    Raises:
        LaunchError: both lists of ROCm are set and the second names devices that the first took away.
    """
    lists = {n: tuple(filter(None, environ[n].split(","))) for n in (ROCM_FIRST, *ROCM_SECOND) if environ.get(n)}
    if not rocm:
        return lists.get("CUDA_VISIBLE_DEVICES")
    first = lists.get(ROCM_FIRST)
    name = next((n for n in ROCM_SECOND if n in lists), None)
    if name is None:
        return first
    if first is not None and name not in repaired_environment(environ, rocm):
        beyond = [item for item in lists[name] if item.isdigit() and int(item) >= len(first)]
        if beyond:
            raise LaunchError(
                f"{name}={environ[name]} with {ROCM_FIRST}={environ[ROCM_FIRST]}: the first list leaves devices 0 to "
                f"{len(first) - 1}, so {', '.join(beyond)} do not exist; unset {name}"
            )
        return lists[name]
    return first if first is not None else lists[name]


def device_index(local_rank: int, local_world_size: int, visible: tuple[str, ...] | None) -> int:
    """Return the index of this rank's device among those it sees.

    Raises:
        LaunchError: it sees more than one device but fewer than there are ranks on the node.
    """
    if visible is None or len(visible) >= local_world_size:
        return local_rank
    if len(visible) == 1:
        return 0  # the launcher has already given each rank its own
    raise LaunchError(
        f"{local_world_size} ranks on this node see {len(visible)} devices ({','.join(visible)}): ask for one per rank "
        "(--gpus-per-node), or start fewer ranks"
    )


def cpu_binding(
    local_rank: int,
    local_world_size: int,
    index: int,
    visible: tuple[str, ...] | None,
    allowed: tuple[int, ...],
    root: Path = Path("/"),
) -> tuple[int, ...] | None:
    """Return the cores of this rank: its share of those next to its device; None leaves the binding as it is.

    Cores of a NUMA node are divided among the ranks whose devices hang on it, in rank order. Nothing is bound without
    accelerators, where the launcher has bound already, or where a share would be empty.
    """
    devices = accelerators(root)
    online = parse_cpu_list(_read(root / "sys/devices/system/cpu/online"))
    if not devices or len(allowed) < len(online):
        return None

    # With one visible device per rank the list differs between ranks: the physical number is in it.
    def physical(rank: int) -> int:
        if visible is None:
            return rank
        if len(visible) == 1:
            return int(visible[0]) if rank == local_rank and visible[0].isdigit() else rank
        return int(visible[rank]) if visible[rank].isdigit() else rank

    def numa(rank: int) -> int:
        number = physical(rank)
        return devices[number].numa_node if number < len(devices) else -1

    own = numa(local_rank)
    if own < 0:
        return None
    cpus = set(parse_cpu_list(_read(root / f"sys/devices/system/node/node{own}/cpulist")))
    near = sorted(cpus & set(allowed))
    sharing = [rank for rank in range(local_world_size) if numa(rank) == own]
    share = near[sharing.index(local_rank) :: len(sharing)]
    return tuple(share) or None
