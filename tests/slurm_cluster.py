"""A private SLURM cluster on one machine: two virtual nodes with four GPUs each that are device nodes and nothing more.

It needs root (device nodes, node names in /etc/hosts) and Debian's packages slurmctld, slurmd, slurm-client and munge.
Everything lives in one folder; only daemons that were started here are ended, by their pid files.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from conftest import ROOT, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "sinfo", "squeue")
HOSTS = Path("/etc/hosts")
FREEZER = Path("/sys/fs/cgroup/freezer")  # what process tracking by cgroups (version 1) needs
N_NODES = 2

T = TypeVar("T")


def missing() -> str | None:
    """Why no cluster can be started here; None where one can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"SLURM is not installed: no {', '.join(absent)}"
    if os.geteuid() != 0:
        return "a private SLURM cluster needs root"
    if not os.access(HOSTS, os.W_OK):
        return f"a private SLURM cluster needs to name its nodes in {HOSTS}"
    with tempfile.TemporaryDirectory() as folder:
        try:
            _make_device(Path(folder) / "gpu0")
        except OSError as error:
            return f"a private SLURM cluster needs device nodes for its GPUs: {error}"
    return None


def wait_for(what: str, probe: Callable[[], T | None], timeout_s: float = 120, report: Callable[[], str] = str) -> T:
    """Poll until `probe` returns something true, and return it; AssertionError with `report()` when time is up."""
    deadline = time.monotonic() + timeout_s
    while not (found := probe()):
        assert time.monotonic() < deadline, f"not within {timeout_s:.0f} s: {what}\n{report()}"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Cluster:
    """A running cluster; its commands find it by `environment`."""

    folder: Path
    environment: dict[str, str]
    signals_only_tasks: bool  # SLURM signals the step's tasks and not their children, as most clusters do

    def run(self, *command: object, **environment: str) -> str:
        """Output of a SLURM command that must succeed, run in the repository."""
        result = self.call(*command, **environment)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def call(self, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a SLURM command in the repository."""
        return subprocess.run(
            [str(part) for part in command],
            cwd=ROOT,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job, by its names (JobState, Restarts, ExitCode, ...)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "--oneliner", "show", "job", job)))

    def wait_state(self, job: str, *states: str, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in one of `states` for good, i.e. its processes are gone if it has ended."""

        def probe() -> dict[str, str] | None:
            facts = self.show(job)
            return facts if facts["JobState"] in states else None

        return wait_for(f"job {job} in {states}", probe, timeout_s, lambda: self.report(job))

    def report(self, job: str) -> str:
        """What a failed test needs to show: the job's facts and the end of its log."""
        facts = self.show(job)
        log = Path(facts.get("StdOut", "/nonexistent"))
        text = log.read_text(errors="replace")[-4000:] if log.is_file() else f"no log {log}"
        return f"{facts}\n--- {log}\n{text}"

    def idle(self) -> None:
        """Cancel what still runs and wait for empty nodes, so that a failed test does not disturb the next."""
        self.call("scancel", "--user=root")
        wait_for("an empty queue", lambda: not self.run("squeue", "--noheader"), report=lambda: self.run("squeue"))
        wait_for("idle nodes", lambda: self._n_idle() == N_NODES, report=lambda: self.run("sinfo"))

    def _n_idle(self) -> int:
        nodes = self.call("sinfo", "--noheader", "--Node", "--partition=normal", "--format=%N %t").stdout.split("\n")
        return sum(line.endswith(" idle") for line in nodes)


@contextmanager
def start_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster in the empty `folder`, and end it afterwards."""
    host, nodes = socket.gethostname(), [f"puma{os.getpid()}n{number}" for number in (1, 2)]
    by_cgroup = os.access(FREEZER, os.W_OK) and (FREEZER / "cgroup.procs").exists()
    environment = {name: value for name, value in os.environ.items() if not re.match(r"S(LURM|BATCH|RUN)_", name)}
    environment |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path(), "TERM": "dumb"}
    _write_settings(folder, host, nodes, by_cgroup)
    with ExitStack() as stack:
        stack.enter_context(_host_names(nodes))
        daemons = {
            "munged": ["munged", "--force", "--num-threads=2"]
            + [f"--{kind}={folder / name}" for kind, name in MUNGE_FILES.items()],
            "slurmctld": ["slurmctld", "-c"],
            **{f"slurmd.{node}": ["slurmd", "-N", node] for node in nodes},
        }
        for name, command in daemons.items():
            stack.callback(_end_daemon, folder / f"{name}.pid")
            subprocess.run(command, env=environment, check=True, timeout=60, stdout=subprocess.DEVNULL)
        cluster = Cluster(folder, environment, by_cgroup)
        wait_for("two idle nodes", lambda: cluster._n_idle() == N_NODES, 60, lambda: _logs(folder))
        stack.callback(cluster.idle)
        yield cluster


MUNGE_FILES = {
    "socket": "munge.socket",
    "key-file": "munge.key",
    "pid-file": "munged.pid",
    "seed-file": "munge.seed",
    "log-file": "munged.log",
}


def _write_settings(folder: Path, host: str, nodes: list[str], by_cgroup: bool) -> None:
    """slurm.conf, gres.conf, cgroup.conf, the munge key and the device nodes that pose as GPUs."""
    key = folder / MUNGE_FILES["key-file"]
    key.touch(mode=0o400)
    key.write_bytes(os.urandom(128))
    for number in range(4):
        _make_device(folder / f"gpu{number}")
    (folder / "state").mkdir()
    control, *ports = (free_port() for _ in range(1 + len(nodes)))
    machines = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=64 RealMemory=4000 Gres=gpu:4"
        for node, port in zip(nodes, ports, strict=True)
    )
    # cred_expire: a requeued job waits so long, at least; the processors are counted as told, two cores pose as 64.
    (folder / "slurm.conf").write_text(f"""
ClusterName=puma
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder / MUNGE_FILES["socket"]},cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/{"cgroup" if by_cgroup else "linuxproc"}
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
JobRequeue=1
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{machines}
PartitionName=normal Nodes={",".join(nodes)} Default=YES PriorityTier=1
PartitionName=urgent Nodes={",".join(nodes)} PriorityTier=10 PreemptMode=OFF
""")
    (folder / "gres.conf").write_text(f"NodeName={','.join(nodes)} Name=gpu File={folder}/gpu[0-3]\n")
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")


def _make_device(path: Path) -> None:
    """A device node, of the null device."""
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))


@contextmanager
def _host_names(nodes: list[str]) -> Iterator[None]:
    """The nodes' names as this machine's, as long as the context lasts."""
    lines = [f"127.0.0.1 {node} # tests/slurm_cluster.py\n" for node in nodes]
    text = HOSTS.read_text()
    HOSTS.write_text(text + "\n" * (not text.endswith("\n")) + "".join(lines))
    try:
        yield
    finally:
        HOSTS.write_text("".join(line for line in HOSTS.read_text().splitlines(keepends=True) if line not in lines))


def _end_daemon(pid_file: Path, timeout_s: float = 10) -> None:
    """End the process that wrote `pid_file`, if it lives."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            os.kill(pid, 0)
            time.sleep(0.05)
        os.kill(pid, signal.SIGKILL)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in folder.glob("*.log"))


def _path() -> str:
    """The search path with the folders of daemons."""
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
