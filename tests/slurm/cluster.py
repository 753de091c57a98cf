"""A real SLURM cluster on one machine: slurmctld and four nodes, each with its own hostname and processes.

A node is a slurmd in Linux namespaces of its own. Its process namespace ends with it, so whatever a job leaves there
ends too. Nothing outside the cluster's folder is touched; ports are free ones.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch import free_port
from processes import die_with_parent

NODES = ("node1", "node2", "node3", "node4")
MISSING = [name for name in ("slurmctld", "slurmd", "sbatch", "unshare") if shutil.which(name) is None]


def configuration(folder: Path) -> str:
    """slurm.conf: no munge and no accounting, and a requeued job that waits 15 seconds instead of 120."""
    lines = [
        "ClusterName=test",
        f"SlurmctldHost={socket.gethostname()}(127.0.0.1)",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/none",
        "CredType=cred/none",
        "AuthInfo=cred_expire=6",
        f"SlurmctldPort={free_port()}",
        f"SlurmctldPidFile={folder}/slurmctld.pid",
        f"SlurmdPidFile={folder}/slurmd.%n.pid",
        f"SlurmctldLogFile={folder}/slurmctld.log",
        f"SlurmdLogFile={folder}/slurmd.%n.log",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool/%n",
        "SlurmdParameters=config_overrides",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0",
        "ReturnToService=1",
        "GresTypes=gpu",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
    ]
    for index, node in enumerate(NODES):
        lines.append(
            f"NodeName={node} NodeAddr=127.0.0.{11 + index} Port={free_port()} CPUs=8 SocketsPerBoard=1 "
            "CoresPerSocket=8 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:8 State=UNKNOWN"
        )
    lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=120")
    lines.append("PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=2")
    return "\n".join(lines) + "\n"


class Cluster:
    """What a user does on the login node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str | Path, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, check=False
        )
        assert expect is None or done.returncode == expect, done.stdout + done.stderr
        return done

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job).stdout))

    def wait_for(
        self, job: str, condition: Callable[[dict[str, str]], bool], *, seconds: float = 120
    ) -> dict[str, str]:
        """Waits until the job's fields meet a condition -> the fields."""
        deadline = time.monotonic() + seconds
        while not condition(fields := self.job(job)):
            assert time.monotonic() < deadline, fields
            time.sleep(0.2)
        return fields


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A cluster with all its nodes idle; none of its processes is left behind."""
    for name in ("state", "dev", *(f"spool/{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(configuration(folder))
    for index in range(8):
        os.mknod(folder / "dev" / f"gpu{index}", 0o600 | 0o020000, os.makedev(1, 3))
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/dev/gpu[0-7]\n")
    hosts = [f"127.0.0.1 localhost {socket.gethostname()}"]
    hosts += [f"127.0.0.{11 + index} {node}" for index, node in enumerate(NODES)]
    (folder / "hosts").write_text("\n".join(hosts) + "\n")
    cluster = Cluster(folder)
    processes: list[subprocess.Popen] = []
    try:
        processes.append(_daemon(cluster, "slurmctld", "-D"))
        for node in NODES:
            inside = f"hostname {node} && mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -N {node}"
            apart = ["--mount", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
            processes.append(_daemon(cluster, "unshare", *apart, "sh", "-c", inside))
        deadline = time.monotonic() + 30
        while cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D", expect=None).stdout.strip() != str(len(NODES)):
            assert time.monotonic() < deadline, (folder / "slurmctld.log").read_text()
            time.sleep(0.1)
        yield cluster
    finally:
        for process in reversed(processes):
            process.kill()
            process.wait()


def _daemon(cluster: Cluster, *command: str) -> subprocess.Popen:
    null = subprocess.DEVNULL  # each has a log file
    return subprocess.Popen(command, env=cluster.environment, stdout=null, stderr=null, preexec_fn=die_with_parent)
