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


def process_id(response: str, answer: object) -> float:
    return float(os.getpid())
