"""Reward functions that misbehave on request, loaded by the pool's workers by their dotted path."""

import os
import subprocess
import sys
import time


def obedient(response: str, answer: object) -> float:
    """Does what the response says: a number is the reward, a word is a way to fail."""
    if response == "hang":
        time.sleep(3600)
    if response == "hang with a child":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)  # " + str(answer)], check=True)
    if response == "die":
        os._exit(3)
    if response == "exit":
        raise SystemExit(0)
    if response == "raise":
        raise RuntimeError("asked to")
    return float(response)


def ends_a_child(response: str, answer: object) -> float:
    """The signal that ended a child it started and asked to end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    child.terminate()
    return float(-child.wait())


def has_sympy(response: str, answer: object) -> float:
    return float("sympy" in sys.modules)


def process_id(response: str, answer: object) -> float:
    return float(os.getpid())


def writes_everywhere(response: str, answer: object) -> float:
    """Writes garbage on every descriptor it can reach, whole lines and reports of other answers too."""
    print("garbage on stdout", flush=True)
    for descriptor in range(3, 64):
        for garbage in (b"\x00\x00\x00\x05garbage", b"[1, 99.0, null]", b'["", 1, 99.0, null]', b"x" * 9000):
            try:
                os.write(descriptor, garbage)
            except OSError:
                continue
    return float(response)


def floods(response: str, answer: object) -> float:
    """Never answers, and writes on every descriptor but stdout and stderr all the while."""
    descriptors = [descriptor for descriptor in range(3, 64) if os.path.exists(f"/proc/self/fd/{descriptor}")]
    while response == "flood":
        for descriptor in descriptors:
            try:
                os.write(descriptor, b"garbage")
            except OSError:
                continue
    return float(response)


def forks(response: str, answer: object) -> float:
    """Returns twice: in the worker and in a fork of it."""
    if os.fork() == 0:
        return 99.0
    return float(response)


def daemonises(response: str, answer: object) -> float:
    """The process id of a child that has left its session, and its parent, for good."""
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        daemon = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
        os.write(writing, str(daemon.pid).encode())
        os._exit(0)
    pid = int(os.read(reading, 100))
    if response == "die":
        os._exit(3)
    return float(pid)


def daemonises_into(response: str, answer: object) -> float:
    """Writes that process id into the file `answer`, then does what the response says."""
    with open(str(answer), "w") as file:
        file.write(str(int(daemonises("", ""))))
    return obedient(response, answer)


def fails_at_length(response: str, answer: object) -> float:
    raise RuntimeError("line\n" * 1_000_000)


def without_an_answer(response: str) -> float:
    return 0.0


NOT_A_FUNCTION = 1.0


def sees_everything(response: str, answer: object, *, record: dict, length: int, prompt: str, finished: bool) -> float:
    """A number that tells all four apart."""
    return record["level"] * 1000 + length * 10 + len(prompt) + 0.5 * finished


def by_position(length: str, answer: object, finished: bool = True) -> float:
    """Its first parameter is the response, whatever its name."""
    return float(length) + finished


def asks_for_more(response: str, answer: object, *, difficulty: int) -> float:
    return 0.0


def takes_anything(response: str, answer: object, **others: object) -> float:
    return float(len(others))
