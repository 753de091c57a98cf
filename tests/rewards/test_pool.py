import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from eapo_megatron.rewards import RewardPool, check_reward
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


def assert_equal(rewards: list[float], expected: list[float]) -> None:
    """NaN stands for no verdict."""
    assert [None if math.isnan(value) else value for value in rewards] == [
        None if math.isnan(value) else value for value in expected
    ]


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
        assert_equal(batch.rewards, [math.nan if index in failed else float(index) for index in range(40)])
        assert (batch.timeouts, batch.crashes) == (1, 5)

        pid = os.getpid()
        batch = pool.score(["1", "hang with a child", "2"], ["", f"child of {pid}", ""])
        assert_equal(batch.rewards, [1.0, math.nan, 2.0])
        assert (batch.timeouts, batch.crashes) == (1, 0)
        assert not any(f"child of {pid}" in command for command in commands_running())

        assert pool.score([], []).rewards == []
        with pytest.raises(ValueError, match="answers must be as many as responses, got 1 for 2"):
            pool.score(["1", "2"], [""])
        assert pool.score(["0.25"], [None]).rewards == [0.25]
    with pytest.raises(RuntimeError, match="inside the `with` block"):
        pool.score(["1"], [""])


CONTEXTS = [
    {"prompt": "p" * n, "finished": n % 2 == 0, "length": n, "record": {"level": n, "other": object}} for n in range(30)
]


@pytest.mark.parametrize(
    ("function", "asks", "rewards"),
    [
        (
            "sees_everything",
            {"prompt", "finished", "length", "record"},
            [n * 1011 + 0.5 * (n % 2 == 0) for n in range(30)],
        ),
        ("by_position", {"finished"}, [n + (n % 2 == 0) for n in range(30)]),
        ("takes_anything", set(), [0] * 30),
        ("obedient", set(), list(range(30))),
    ],
)
def test_a_function_gets_what_its_parameters_name(function: str, asks: set[str], rewards: list[float]) -> None:
    responses = [str(n) for n in range(30)]
    with RewardPool(num_workers=2, timeout_seconds=5.0, reward=f"reward_functions:{function}") as pool:
        assert set(pool.asks) == asks
        assert pool.score(responses, [""] * 30, CONTEXTS).rewards == rewards
        with pytest.raises(ValueError, match="contexts must be as many as responses, got 29 for 30"):
            pool.score(responses, [""] * 30, CONTEXTS[1:])
        if asks:
            with pytest.raises(ValueError, match=rf"{function}' asks for .*finished.*, which are not known here"):
                pool.score(responses, [""] * 30)
        else:
            assert pool.score(responses, [""] * 30).rewards == rewards
    assert set(check_reward(f"reward_functions:{function}")) == asks


def test_a_parameter_that_nothing_fills_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reward\.function: .*it must take \(response, answer\), but .*difficulty"):
        check_reward("reward_functions:asks_for_more")


def test_a_worker_loads_sympy_for_mathematics_alone() -> None:
    with RewardPool(num_workers=1, timeout_seconds=5.0, reward="reward_functions:has_sympy") as pool:
        assert pool.score(["anything"], ["1"]).rewards == [0.0]


def test_mathematics_with_an_answer_that_never_ends() -> None:
    responses = [r"\boxed{5}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{2+3}", "#### 6", r"\boxed{x=5}"]
    with RewardPool(num_workers=1, timeout_seconds=2.0) as pool:
        batch = pool.score(responses, ["5"] * 5)
    assert (batch.rewards, batch.timeouts, batch.crashes) == ([1.0, -1.0, 1.0, -1.0, 1.0], 1, 0)


def test_of_one_error_a_batch_says_three_and_how_many_more(caplog: pytest.LogCaptureFixture) -> None:
    with RewardPool(num_workers=2, timeout_seconds=5.0, reward=OBEDIENT) as pool:
        batch = pool.score(["raise"] * 9 + ["inf"] * 3, [""] * 12)
    assert batch.crashes == 12
    said = [record.getMessage() for record in caplog.records]
    assert sum("RuntimeError: asked to" in line for line in said) == 4
    assert "no reward for 6 more answers: RuntimeError: asked to" in said
    assert len(said) == 4 + 3


def test_rewards_of_no_use_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with RewardPool(num_workers=1, timeout_seconds=5.0, reward=OBEDIENT) as pool:
        batch = pool.score(["1e308", "-2e6", "inf", "1e6", "-1e6"], [""] * 5)
    assert_equal(batch.rewards, [math.nan, math.nan, math.nan, 1e6, -1e6])
    assert (batch.timeouts, batch.crashes) == (0, 3)
    assert "the reward is 1e+308, beyond 1e+06 in magnitude" in caplog.text
    assert "the reward is -2e+06, beyond 1e+06 in magnitude" in caplog.text
    assert "the reward is inf, not a finite number" in caplog.text


def test_a_long_error_is_one_short_line(caplog: pytest.LogCaptureFixture) -> None:
    with RewardPool(num_workers=1, timeout_seconds=20.0, reward="reward_functions:fails_at_length") as pool:
        batch = pool.score([""], ["long answer " * 100_000])
    assert (batch.timeouts, batch.crashes) == (0, 1)
    (record,) = caplog.records
    assert "RuntimeError: line line" in record.getMessage()
    assert len(record.getMessage()) < 600
    assert "\n" not in record.getMessage()


def test_garbage_on_inherited_descriptors_confuses_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    responses = [str(index) for index in range(12)]
    with RewardPool(num_workers=2, timeout_seconds=20.0, reward="reward_functions:writes_everywhere") as pool:
        batch = pool.score(responses, [""] * 12)
        assert (batch.rewards, batch.timeouts, batch.crashes) == (list(range(12)), 0, 0)
        assert pool.score(["12"], [""]).rewards == [12.0]
    with RewardPool(num_workers=1, timeout_seconds=1.0, reward="reward_functions:floods") as pool:
        batch = pool.score(["1", "flood", "2"], [""] * 3)
        assert_equal(batch.rewards, [1.0, math.nan, 2.0])
        assert (batch.timeouts, batch.crashes) == (1, 0)
    with RewardPool(num_workers=1, timeout_seconds=20.0, reward="reward_functions:forks") as pool:
        assert pool.score(responses, [""] * 12).rewards == list(range(12))
    assert capfd.readouterr().out == ""


def test_daemons_end_with_their_worker(tmp_path: Path) -> None:
    with RewardPool(num_workers=1, timeout_seconds=20.0, reward="reward_functions:daemonises") as pool:
        daemon = int(pool.score([""], [""]).rewards[0])
        assert is_running(daemon)
    assert not is_running(daemon)
    for response in ("die", "hang"):
        noted = tmp_path / response
        with RewardPool(num_workers=1, timeout_seconds=3.0, reward="reward_functions:daemonises_into") as pool:
            pool.score([response], [str(noted)])
            assert not is_running(int(noted.read_text()))


def test_daemons_end_with_a_pool_that_is_killed() -> None:
    program = (
        "from eapo_megatron.rewards import RewardPool\n"
        "with RewardPool(num_workers=1, timeout_seconds=600, reward='reward_functions:daemonises') as pool:\n"
        "    print(int(pool.score([''], ['']).rewards[0]), flush=True)\n"
        "    import time; time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    daemon = int(parent.stdout.readline())
    assert is_running(daemon)
    parent.kill()
    parent.wait()
    assert wait_until(lambda: not is_running(daemon))


def test_thinking_reaches_the_mathematical_reward() -> None:
    responses = [r"\boxed{5}", r"<think>\boxed{5}", r"</think>\boxed{5}"]
    rewards = {}
    for thinking in ("auto", "opened", "none"):
        with RewardPool(num_workers=1, timeout_seconds=5.0, thinking=thinking) as pool:
            rewards[thinking] = pool.score(responses, ["5"] * 3).rewards
    assert rewards == {"auto": [1.0, -1.0, 1.0], "opened": [-1.0, -1.0, 1.0], "none": [1.0, 1.0, 1.0]}


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
    workers = [process.pid for process in psutil.Process(parent.pid).children(recursive=True)]
    assert len(workers) == 4  # each under a guard
    assert idle_worker in workers
    parent.kill()
    assert parent.communicate()[0] == ""  # a worker that imported __main__ would have printed too
    assert wait_until(lambda: not any(is_running(pid) for pid in workers))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": 0, "timeout_seconds": 1.0}, "num_workers must be at least 1, got 0"),
        ({"num_workers": 1, "timeout_seconds": 0.0}, "timeout_seconds must be positive and finite, got 0.0"),
        ({"num_workers": 1, "timeout_seconds": 1.0, "reward": "chess"}, r"reward must be math, or"),
        ({"num_workers": 1, "timeout_seconds": 1.0, "reward": "module:"}, r"reward must be math, or"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(**settings)


@pytest.mark.parametrize(
    ("reward", "reason"),
    [
        ("no_such_module:function", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("reward_functions:no_such_function", "AttributeError: .*no_such_function"),
        ("reward_functions:NOT_A_FUNCTION", "NOT_A_FUNCTION is not callable but float"),
        (
            "reward_functions:without_an_answer",
            r"must take \(response, answer\), but without_an_answer\(response: str\)",
        ),
        ("reward_that_dies:function", "its process ended"),
        ("reward_that_hangs:function", "that took longer than 3 s"),
    ],
)
def test_reward_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, reward: str, reason: str) -> None:
    if "hangs" in reward:
        monkeypatch.setattr("eapo_megatron.rewards.pool._START_SECONDS", 3.0)
    with pytest.raises(ValueError, match=f"reward.function: reward '{reward}' cannot be loaded: .*{reason}"):
        check_reward(reward)


def test_reward_that_can_be_loaded() -> None:
    check_reward("math")
    check_reward(OBEDIENT)
    check_reward("operator:eq")  # written in C
    with pytest.raises(ValueError, match=r"reward.function: reward must be math, or"):
        check_reward("chess")


def test_a_worker_that_is_still_starting_is_ended_under_nohup() -> None:
    program = (
        "import signal\n"
        "from eapo_megatron.rewards import RewardPool\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "pool = RewardPool(num_workers=1, timeout_seconds=5, reward='reward_functions:obedient')\n"
        "pool._start_worker()\n"
        "pool._kill_workers()\n"
        "with pool:\n"
        "    print(pool.score(['hang', '2'], ['', '']).rewards[1])\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "2.0\n"


def test_no_verdict_of_math_can_be_told_from_wrong() -> None:
    for no_verdict, expected in ((None, -1.0), (math.nan, math.nan)):
        with RewardPool(num_workers=1, timeout_seconds=10.0, no_verdict=no_verdict) as pool:
            batch = pool.score([r"\boxed{1}", r"\boxed{1}", r"\boxed{1}"], ["1", None, "2"])
        assert_equal(batch.rewards, [1.0, expected, -1.0])
        assert batch.crashes == 1
