import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eapo_megatron.rewards import RewardPool
from eapo_megatron.stopping import STOP_SIGNALS

OBEDIENT = "reward_functions:obedient"


@pytest.fixture(autouse=True)
def _reward_functions_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def commands_running() -> list[str]:
    commands = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (entry / "cmdline").exists():
            try:
                commands.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (ProcessLookupError, FileNotFoundError):  # it ended between the listing and the reading
                continue
    return commands


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_failures_are_contained_and_counted() -> None:
    with RewardPool(num_workers=2, timeout_seconds=1.0, reward=OBEDIENT) as pool:
        # 40 responses give chunks of five: the second chunk holds every failure, and the pool is used again after it.
        responses = [str(index) for index in range(40)]
        responses[5:10] = ["die", "raise", "hang", "exit", "nan"]
        responses[30] = "not a number"
        batch = pool.score(responses, [""] * 40)
        failed = {5, 6, 7, 8, 9, 30}
        assert batch.rewards == [-1.0 if index in failed else float(index) for index in range(40)]
        assert (batch.timeouts, batch.crashes) == (1, 5)

        pid = os.getpid()
        batch = pool.score(["1", "hang with a child", "2"], ["", f"child of {pid}", ""])
        assert (batch.rewards, batch.timeouts, batch.crashes) == ([1.0, -1.0, 2.0], 1, 0)
        assert not any(f"child of {pid}" in command for command in commands_running())

        assert pool.score([], []).rewards == []
        with pytest.raises(ValueError, match="answers must be as many as responses, got 1 for 2"):
            pool.score(["1", "2"], [""])
        assert pool.score(["0.25"], [None]).rewards == [0.25]
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        pool.score(["1"], [""])


def test_mathematics_with_an_answer_that_never_ends() -> None:
    responses = [r"\boxed{5}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2+3}", "#### 6", r"\boxed{x=5}"]
    with RewardPool(num_workers=1, timeout_seconds=2.0) as pool:
        batch = pool.score(responses, ["5"] * 5)
    assert (batch.rewards, batch.timeouts, batch.crashes) == ([1.0, -1.0, 1.0, -1.0, 1.0], 1, 0)


def test_worker_that_died_while_idle_is_replaced() -> None:
    with RewardPool(num_workers=1, timeout_seconds=5.0, reward="reward_functions:process_id") as pool:
        first = int(pool.score([""], [""]).rewards[0])
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: not is_running(first))
        batch = pool.score([""] * 3, [""] * 3)
        assert (batch.timeouts, batch.crashes) == (0, 0)
        second = int(batch.rewards[0])
        assert second != first
    assert not is_running(second)


def test_a_job_that_is_asked_to_stop_still_gets_its_rewards() -> None:
    with RewardPool(num_workers=1, timeout_seconds=5.0, reward="reward_functions:process_id") as pool:
        worker = int(pool.score([""], [""]).rewards[0])
        for number in STOP_SIGNALS:
            os.kill(worker, number)
        assert pool.score(["", ""], ["", ""]).rewards == [worker, worker]
    with RewardPool(num_workers=1, timeout_seconds=5.0, reward="reward_functions:ends_a_child") as pool:
        assert pool.score([""], [""]).rewards == [signal.SIGTERM]


def test_killed_parent_leaves_no_worker_and_main_is_not_imported_again(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "print('started', flush=True)\n"
        "from eapo_megatron.rewards import RewardPool\n"
        "with RewardPool(num_workers=1, timeout_seconds=600, reward='reward_functions:process_id') as idle:\n"
        "    with RewardPool(num_workers=1, timeout_seconds=600, reward='reward_functions:obedient') as busy:\n"
        "        print(int(idle.score([''], ['']).rewards[0]), flush=True)\n"
        "        busy.score(['hang'], [''])\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    assert parent.stdout.readline() == "started\n"
    idle_worker = int(parent.stdout.readline())
    workers = [int(pid) for pid in Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()]
    assert len(workers) == 2
    assert idle_worker in workers
    parent.kill()
    assert parent.communicate()[0] == ""  # a worker that imported __main__ would have printed too
    assert wait_until(lambda: not any(is_running(pid) for pid in workers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0, "timeout_seconds": 1.0}, "num_workers must be at least 1, got 0"),
        ({"num_workers": 1, "timeout_seconds": 0.0}, "timeout_seconds must be positive and finite, got 0.0"),
        ({"num_workers": 1, "timeout_seconds": 1.0, "reward": "chess"}, r"reward must be one of \['math'\] or"),
        ({"num_workers": 1, "timeout_seconds": 1.0, "reward": "module:"}, r"reward must be one of \['math'\] or"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(**settings)


@pytest.mark.parametrize("reward", ["no_such_module:function", "reward_functions:no_such_function"])
def test_reward_that_cannot_be_loaded(reward: str) -> None:
    pool = RewardPool(num_workers=1, timeout_seconds=1.0, reward=reward)
    with pytest.raises(ValueError, match=f"reward '{reward}' cannot be loaded: .*no_such"):
        pool.__enter__()
