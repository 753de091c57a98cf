"""One run folder, one writer: a lock file that says who has it, and how it is found to be left behind.

    runs/NAME/lock.json    host, process, its start, SLURM job; its time is the last heartbeat

A holder on this machine is dead when its process is gone; one elsewhere when its heartbeat is older than two minutes,
or when it is this SLURM job before it was requeued.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from eapo_megatron.config import RecipeError
from eapo_megatron.durable import write_json

LOCK_FILE = "lock.json"
HEARTBEAT_SECONDS = 20.0
DEAD_AFTER_SECONDS = 120.0
_SETTLE_SECONDS = 0.2


@dataclass(frozen=True)
class Holder:
    """A process that writes to a run folder."""

    host: str
    machine: str  # this boot of the kernel and its process numbers: within one of these a pid means a process
    pid: int
    started: int  # of the process, in the kernel's ticks since its boot
    slurm_job: str | None
    slurm_restarts: int

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> Holder:
        """This process."""
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        started = _start_of(os.getpid())
        assert started is not None
        return cls(
            socket.gethostname(),
            f"{boot} {Path('/proc/self/ns/pid').readlink()}",
            os.getpid(),
            started,
            environment.get("SLURM_JOB_ID"),
            int(environment.get("SLURM_RESTART_COUNT", "0")),
        )

    def describe(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"

    def is_alive(self, heartbeat_age: float, me: Holder) -> bool:
        """Whether it may still write, judged by `me`; `heartbeat_age` in seconds."""
        if self.machine == me.machine:
            return _start_of(self.pid) == self.started
        requeued = self.slurm_job is not None and self.slurm_job == me.slurm_job
        if requeued and me.slurm_restarts > self.slurm_restarts:
            return False
        return heartbeat_age < DEAD_AFTER_SECONDS


def check_unlocked(folder: Path) -> Holder | None:
    """Whether this process may write to a run folder -> the dead holder that left it locked, if one did.

    Raises:
        RecipeError: naming the process that has it.
    """
    path = folder / LOCK_FILE
    found = _read(path)
    if found is None:
        return None
    holder, beat = found
    age = _now(folder) - beat
    if holder is None:  # a lock that cannot be read: a start that was killed while it wrote, or damage
        if age < DEAD_AFTER_SECONDS:
            raise RecipeError(f"{path} cannot be read: remove it if no process writes to {folder}")
        return None
    me = Holder.here()
    if holder != me and holder.is_alive(age, me):
        raise RecipeError(
            f"{folder} belongs to {holder.describe()}, heard of {max(age, 0):.0f} s ago: two runs must not share it "
            f"(logging.run_dir, name)"
        )
    return holder


class RunLock:
    """Holds a run folder until the block ends; its heartbeat comes from a thread.

    Raises:
        RecipeError: when another process has it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / LOCK_FILE
        self.me = Holder.here()
        self._done = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> RunLock:
        """Takes the lock: one process at a time looks who has it, where the file system has locks of its own.

        Where it has none, of several processes that find a dead one's lock at once the last to write has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with _alone(self.folder / f".{LOCK_FILE}.guard"):
            self.left_by = check_unlocked(self.folder)
            write_json(self.path, asdict(self.me))
        time.sleep(_SETTLE_SECONDS)
        if not self.is_held():
            check_unlocked(self.folder)
            raise RecipeError(f"{self.folder} was taken by another process in this very moment: start again")
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._heart.join()
        if self.is_held():
            self.path.unlink()

    def is_held(self) -> bool:
        """Whether the lock is still this process's: one that was stopped for minutes may have lost it."""
        found = _read(self.path)
        return found is not None and found[0] == self.me

    def _beat(self) -> None:
        while not self._done.wait(HEARTBEAT_SECONDS):
            if self.is_held():
                os.utime(self.path)


@contextmanager
def _alone(guard: Path) -> Iterator[None]:
    """Waits until no other process is inside, where the file system can tell."""
    with guard.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield


def _read(path: Path) -> tuple[Holder | None, float] | None:
    """The holder (None: not readable) and its last heartbeat in the file system's time; None without a lock."""
    try:
        data, beat = path.read_bytes(), path.stat().st_mtime
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(data))
    except (ValueError, TypeError):
        return None, beat
    return holder if isinstance(holder.pid, int) and isinstance(holder.slurm_restarts, int) else None, beat


def _now(folder: Path) -> float:
    """The present by the clock that gives files their times, which may be a server's."""
    probe = folder / f".now.{socket.gethostname()}.{os.getpid()}"
    probe.touch()
    now = probe.stat().st_mtime
    probe.unlink()
    return now


def _start_of(pid: int) -> int | None:
    """When a process of this machine started, in ticks since boot; None when there is none, or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else int(fields[19])
