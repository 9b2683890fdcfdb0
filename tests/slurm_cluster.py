"""A real Slurm cluster on this machine, for tests: munged, slurmctld and one slurmd per node.

Every node is its own PID, mount, UTS and IPC namespace with its own /dev/shm, so killing its init is a power failure
and teardown leaves nothing behind; all of it dies with this process, however that ends. Nothing outside the cluster's
folder is read or written: SLURM_CONF points there. Several clusters run side by side: each holds a slot, which sets its
ports and its job ids (the launcher's ports follow from those). Needs root and the packages of tools/apt-packages.txt;
`missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo", "unshare", "nsenter")
START_TIMEOUT_S = 60.0


def missing() -> str:
    """Why no cluster can be started here; empty when one can."""
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    if absent:
        return f"not installed: {', '.join(absent)} (tools/install_apt_packages.sh installs them)"
    return "" if os.geteuid() == 0 else "a Slurm cluster of namespaces needs root"


SLOTS, SLOT_PORTS, SLOT_JOBS = 12, 250, 100


@contextmanager
def own_slot() -> Iterator[int]:
    """A number that no other cluster on this machine has meanwhile, and whose ports are free."""
    for slot in range(SLOTS):
        path = Path(f"/tmp/zaya-test-slurm-{slot}.lock")
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            if _all_free(first_port(slot), SLOT_PORTS):
                yield slot
                return
    raise RuntimeError(f"none of {SLOTS} slots for a Slurm cluster is free")


def first_port(slot: int) -> int:
    """First port of a slot: above those of the launcher, below the ephemeral range."""
    return 20_000 + slot * SLOT_PORTS


def _all_free(base: int, count: int) -> bool:
    with contextlib.ExitStack() as stack:
        try:
            for port in range(base, base + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _die_with_parent() -> None:
    """In a child: SIGKILL when this process dies."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


@dataclass
class SlurmCluster:
    """A running cluster. `run` executes a client command in its environment."""

    folder: Path
    node_names: list[str]
    slot: int
    topology_conf: str = ""
    cpus: int = 16
    gpus: int = 0  # fake GPUs per node: clones of /dev/null that Slurm hands out as devices
    partition: str = "main"
    more_conf: str = ""  # lines at the end of slurm.conf
    _daemons: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _inits: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Environment of clients: inherited Slurm variables removed, SLURM_CONF set."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
        return {**kept, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(
        self,
        command: Sequence[str],
        *,
        timeout_s: float = 60.0,
        check: bool = True,
        extra_env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a Slurm client. Raises RuntimeError with its output (and the controller's log) on failure."""
        done = subprocess.run(
            list(command),
            env={**self.environment, **(extra_env or {})},
            cwd=cwd,
            timeout=timeout_s,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}\n{self.log_tail()}")
        return done

    def start(self) -> None:
        """Start all daemons and wait until every node is idle."""
        self._prepare()
        munge = self.folder / "munge"
        files = {"key-file": "key", "socket": "run/munge.sock", "pid-file": "pid", "log-file": "log"}
        options = [f"--{option}={munge}/{name}" for option, name in files.items()]
        self._daemon("munged", "-F", "--force", *options, f"--seed-file={munge}/seed")
        self._wait(lambda: (munge / "run/munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i")
        for name in self.node_names:
            self.start_node(name)
        self._wait(lambda: self.count("idle") == len(self.node_names), "all nodes idle")

    def start_node(self, name: str) -> None:
        """Boot one node: an init in new namespaces, whose only child is slurmd."""
        script = (
            f"hostname {name} && mount --bind {self.folder}/hosts /etc/hosts && mount -t tmpfs tmpfs /dev/shm && "
            f"exec slurmd -D -N {name} >{self.folder}/log/{name}.out 2>&1"
        )
        unshare = ["unshare", "-m", "-u", "-i", "-p", "--fork", "--kill-child=SIGKILL", "--mount-proc"]
        self._inits[name] = self._spawn([*unshare, "sh", "-c", script], subprocess.DEVNULL)

    def crash_node(self, name: str) -> None:
        """Cut the power of one node."""
        process = self._inits.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait(10)

    def reboot_node(self, name: str) -> None:
        """Bring a crashed node back. Slurm is told of the crash first: by itself it waits a minute."""
        for state in ("down", "resume"):
            if state == "resume":
                self.start_node(name)
            self.run(["scontrol", "update", f"nodename={name}", f"state={state}", "reason=test"], check=False)
        self._wait(lambda: self.state(name) in ("idle", "mixed", "allocated"), f"{name} back")

    def enter(self, name: str, command: str) -> str:
        """Run a shell command on a node, outside of Slurm; return its output."""
        pid = subprocess.run(["pgrep", "-P", str(self._inits[name].pid)], capture_output=True, text=True, check=True)
        nsenter = ["nsenter", f"--target={pid.stdout.split()[0]}", "--mount", "--uts", "--ipc", "--pid"]
        return self.run([*nsenter, "sh", "-c", command], check=False).stdout

    def state(self, name: str) -> str:
        """State of one node, as sinfo words it."""
        return self.run(["sinfo", "-h", "-N", "-n", name, "-o", "%T"], check=False).stdout.split("\n")[0]

    def count(self, state: str) -> int:
        """Number of nodes whose state begins with `state`; 0 while the controller does not answer."""
        done = self.run(["sinfo", "-h", "-N", "-o", "%N %T"], check=False)
        lines = {tuple(line.split()) for line in done.stdout.splitlines() if " " in line}  # one per partition
        return sum(line[1].startswith(state) for line in lines)

    def stop(self) -> None:
        """Kill all processes of the cluster, by their own ids."""
        for process in [*self._inits.values(), *reversed(self._daemons)]:
            if process.poll() is None:
                process.kill()
        for process in [*self._inits.values(), *self._daemons]:
            process.wait(10)
        self._inits.clear()
        self._daemons.clear()

    def log_tail(self, lines: int = 20) -> str:
        """Last lines of the controller's log."""
        path = self.folder / "log/slurmctld.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""

    def _prepare(self) -> None:
        munge = self.folder / "munge"
        for path in (munge, munge / "run", self.folder / "log", self.folder / "state", self.folder / "spool"):
            path.mkdir(parents=True)
        munge.chmod(0o700)
        (munge / "run").chmod(0o755)
        key = munge / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        for node in self.node_names:  # PMIx makes a folder per job there: each node needs its own
            (self.folder / "tmp" / node).mkdir(parents=True)
        names = [f"127.0.0.1 localhost {' '.join(self.node_names)}"]
        (self.folder / "hosts").write_text("\n".join(names) + "\n")
        (self.folder / "slurm.conf").write_text(self._configuration())
        if self.topology_conf:
            (self.folder / "topology.conf").write_text(self.topology_conf)
        if self.gpus:
            self._make_gpus()

    def _make_gpus(self) -> None:
        """Slurm accepts device nodes only: /dev/null (character device 1, 3) under other names."""
        devices = self.folder / "dev"
        devices.mkdir()
        for index in range(self.gpus):
            os.mknod(devices / f"gpu{index}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        nodes = " ".join([f"NodeName={','.join(self.node_names)}", "Name=gpu", f"Count={self.gpus}"])
        files = f"File={devices}/gpu[0-{self.gpus - 1}]"
        (self.folder / "gres.conf").write_text(f"AutoDetect=off\n{nodes} {files}\n")

    def _configuration(self) -> str:
        base = first_port(self.slot)
        assert len(self.node_names) < SLOT_PORTS
        size = f"CPUs={self.cpus} RealMemory=1000000" + (f" Gres=gpu:{self.gpus}" if self.gpus else "")
        nodes = "\n".join(
            f"NodeName={name} NodeAddr=127.0.0.1 Port={base + 1 + i} {size}" for i, name in enumerate(self.node_names)
        )
        plugin = "topology/tree" if self.topology_conf else "topology/none"
        return f"""
ClusterName=test
FirstJobId={1 + self.slot * SLOT_JOBS}
SlurmctldHost={socket.gethostname()}(127.0.0.1)
SlurmctldPort={base}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={self.folder}/munge/run/munge.sock,cred_expire=5
StateSaveLocation={self.folder}/state
TmpFS={self.folder}/tmp/%n
SlurmdSpoolDir={self.folder}/spool/%n
SlurmctldLogFile={self.folder}/log/slurmctld.log
SlurmdLogFile={self.folder}/log/%n.log
SlurmctldPidFile={self.folder}/slurmctld.pid
SlurmdPidFile={self.folder}/spool/%n.pid
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,bf_interval=1,sched_interval=1,defer_batch
TopologyPlugin={plugin}
ReturnToService=1
KillWait=3
MessageTimeout=30
SlurmdTimeout=60
TreeWidth={max(2, len(self.node_names))}
{"GresTypes=gpu" if self.gpus else ""}
{nodes}
PartitionName={self.partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP GraceTime=60
{self.more_conf}
"""

    def _daemon(self, *command: str) -> None:
        with (self.folder / f"log/{command[0]}.out").open("wb") as out:
            self._daemons.append(self._spawn(command, out))

    def _spawn(self, command: Sequence[str], out: int | IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip

    def _wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not ready():
            dead = [p.args for p in self._daemons if p.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"Slurm did not start: waiting for {what}, ended: {dead}\n{self.log_tail()}")
            time.sleep(0.1)


@contextmanager
def slurm_cluster(
    folder: Path, node_names: Sequence[str], topology_conf: str = "", gpus: int = 0, more_conf: str = ""
) -> Iterator[SlurmCluster]:
    """A started cluster that is gone afterwards, whatever happens."""
    with own_slot() as slot:
        cluster = SlurmCluster(folder, list(node_names), slot, topology_conf, gpus=gpus, more_conf=more_conf)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
