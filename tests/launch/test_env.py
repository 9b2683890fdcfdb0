"""The one reader of rank and world: three launchers, one answer; contradictions are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.devices import cpu_binding, device_index, repaired_environment, visible_devices
from launch.env import LaunchError, RankContext, read_rank_env
from launch.ports import FIRST, job_port

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "n[0-1]",
    "SLURMD_NODENAME": "n1",
}


def changed(environ: dict, change: dict) -> dict:
    return {name: value for name, value in (environ | change).items() if value is not None}


def test_torchrun_world():
    context = read_rank_env(TORCHRUN)
    assert context == RankContext(3, 4, 1, 2, master_addr="n0", master_port=29500)
    assert (context.node_rank, context.nodes, context.agreement_port) == (1, 2, 29501)


def test_srun_world():
    port = job_port(77)
    expected = RankContext(3, 4, 1, 2, hosts=("n0", "n1"), master_addr="n0", master_port=port)
    assert read_rank_env(SRUN) == expected
    assert FIRST <= port < 20000, "away from Slurm's daemons and from ephemeral ports"


def test_the_master_follows_the_hostfile_and_not_the_node_id(tmp_path: Path):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n3\nn3\nn1\nn1\n")
    environ = SRUN | {"SLURM_HOSTFILE": str(hostfile), "SLURM_STEP_NODELIST": "n[1,3]", "SLURMD_NODENAME": "n1"}
    context = read_rank_env(environ | {"SLURM_NODEID": "0"})
    assert (context.master_addr, context.hosts, context.node_rank) == ("n3", ("n3", "n1"), 1)


def test_no_launcher_is_a_world_of_one():
    assert read_rank_env({}).is_single
    assert read_rank_env(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).is_single


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "not RANK"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"RANK": "4"}, "not a possible world"),
        ({"LOCAL_RANK": "2"}, "not a possible world"),
        ({"RANK": "2"}, "ranks of a node must be consecutive"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT='99999' is not a port"),
    ],
)
def test_a_contradiction_of_torchrun_is_refused(change, message):
    with pytest.raises(LaunchError, match=message):
        read_rank_env(changed(TORCHRUN, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_STEP_ID": None}, "batch shell of job 77 with 4 tasks"),
        ({"SLURM_LOCALID": None}, "not SLURM_LOCALID: these come with srun"),
        ({"SLURM_STEP_NODELIST": None}, "SLURM_STEP_NODELIST is not set"),
        ({"SLURM_STEP_NODELIST": "n[0-2]"}, "4 tasks on 3 nodes"),
        ({"SLURM_PROCID": "2"}, "must be consecutive"),
        ({"SLURM_HOSTFILE": "/nowhere/hostfile"}, "hostfile /nowhere/hostfile: No such file"),
        ({"SLURM_HOSTFILE": "{tmp}/strangers"}, "differ in n1, n7"),
        ({"SLURM_HOSTFILE": "{tmp}/swapped"}, "rank 3 runs on n1, .* wants it on n0"),
        ({"SLURM_HOSTFILE": "{tmp}/short"}, "has 3 lines for 4 tasks"),
    ],
)
def test_a_contradiction_of_srun_is_refused(change, message, tmp_path):
    (tmp_path / "strangers").write_text("n0\nn7\n")
    (tmp_path / "swapped").write_text("n1\nn0\n")
    (tmp_path / "short").write_text("n0\nn0\nn1\n")
    change = {name: value and value.format(tmp=tmp_path) for name, value in change.items()}
    with pytest.raises(LaunchError, match=message):
        read_rank_env(changed(SRUN, change))


def test_devices_of_a_slurm_step_on_rocm():
    step = {"ROCR_VISIBLE_DEVICES": "4,5,6,7", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert visible_devices(step, rocm=True) == ("4", "5", "6", "7")
    assert repaired_environment(step, rocm=True) == {"CUDA_VISIBLE_DEVICES": None}
    assert repaired_environment(step, rocm=False) == {}
    with pytest.raises(LaunchError, match="leaves devices 0 to 1, so 4 do not exist; unset HIP_VISIBLE_DEVICES"):
        visible_devices({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "0,4"}, rocm=True)


def test_device_index():
    assert device_index(5, 8, None) == 5
    assert device_index(5, 8, tuple("01234567")) == 5
    assert device_index(5, 8, ("5",)) == 0, "one device per task: it is number 0 there"
    with pytest.raises(LaunchError, match="8 ranks on this node see 4 devices"):
        device_index(5, 8, tuple("0123"))


@pytest.fixture
def two_sockets(tmp_path: Path) -> Path:
    """sysfs of a node with 8 accelerators on two NUMA nodes of 8 cores."""
    for number in range(8):
        folder = tmp_path / f"sys/bus/pci/devices/0000:{number:02x}:00.0"
        folder.mkdir(parents=True)
        for name, text in {"vendor": "0x1002", "class": "0x120000", "numa_node": str(number // 4)}.items():
            (folder / name).write_text(text + "\n")
    for node in range(2):
        folder = tmp_path / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{8 * node}-{8 * node + 7}\n")
    online = tmp_path / "sys/devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-15\n")
    return tmp_path


def test_cores_near_the_device_are_divided_among_its_neighbours(two_sockets: Path):
    allowed = tuple(range(16))
    shares = [cpu_binding(rank, 8, rank, None, allowed, two_sockets) for rank in range(8)]
    assert shares[0] == (0, 4)
    assert shares[5] == (9, 13)
    assert sorted(cpu for share in shares for cpu in share) == list(range(16))
    one_each = [cpu_binding(rank, 8, 0, (str(rank),), allowed, two_sockets) for rank in range(8)]
    assert one_each == shares
    assert cpu_binding(0, 8, 0, None, (0, 1), two_sockets) is None, "the launcher has bound already"
    context = read_rank_env(TORCHRUN | {"CUDA_VISIBLE_DEVICES": "2,3"}, root=two_sockets)
    assert context.device_index == 1
