"""A server of vLLM as a process of its own: its command, its start on a free port, its end.

The server is vLLM's OpenAI-compatible one with the routes for reinforcement learning. It starts with random weights
and serves what is sent to it. It ends with the thread that started it, even when that is killed (`vllm_plugin`).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from eapo_megatron.config import Recipe
from eapo_megatron.launcher import free_port
from eapo_megatron.rollout.vllm_client import ServerLostError, VLLMClient
from eapo_megatron.rollout.vllm_plugin import PARENT
from eapo_megatron.rollout.vllm_release import check_installed, check_release
from eapo_megatron.stopping import STOP_SIGNALS
from eapo_megatron.weights.assets import copy_assets, write_whole_config
from eapo_megatron.weights.huggingface import hf_config_of

CPU_BLOCK_SIZE = 32  # tokens; vLLM's 128 on CPU shares no shorter prompt within a group
CPU_BATCHED_TOKENS = 8192
CPU_KV_CACHE_GIB = 1.0
GIB = 2**30
_TRIES = 5  # ports
_SECONDS_TO_END = 10.0


def server_command(recipe: Recipe, folder: Path, *, host: str, port: int, on_gpu: bool) -> list[str]:
    """The command of one server; `folder` holds the model's config.json."""
    rollout, settings = recipe.rollout, recipe.rollout.vllm
    longest = recipe.data.max_prompt_tokens + rollout.max_response_tokens
    options = {
        "model": folder,
        "served-model-name": recipe.name,
        "host": host,
        "port": port,
        "dtype": recipe.model.dtype,
        "load-format": "dummy",
        "generation-config": "vllm",  # no defaults of the model's own
        "tensor-parallel-size": settings.tensor_parallel_size,
        "max-model-len": longest,
        "max-num-seqs": rollout.max_batch_size,
        "weight-transfer-config": json.dumps({"backend": transfer_backend(recipe)}),
        "uvicorn-log-level": "warning",
    }
    switches = ["skip-tokenizer-init", "enable-scale-out", "enable-prefix-caching", "disable-uvicorn-access-log"]
    kv_cache_gib = settings.kv_cache_gib
    if on_gpu:
        options["gpu-memory-utilization"] = settings.gpu_memory_utilization
        switches += ["enable-sleep-mode"] * settings.sleep
    else:
        kv_cache_gib = kv_cache_gib or CPU_KV_CACHE_GIB
        options["block-size"] = CPU_BLOCK_SIZE
        # A seed of its own for each request beside chunked prefill ends the CPU engine.
        options["max-num-batched-tokens"] = max(CPU_BATCHED_TOKENS, longest)
        switches += ["enforce-eager", "no-enable-chunked-prefill"]
    if kv_cache_gib is not None:
        options["kv-cache-memory-bytes"] = int(kv_cache_gib * GIB)
    named = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    return [*command, *named, *(f"--{switch}" for switch in switches)]


def server_environment(*, gpus: Iterable[int] | None, threads: int, parent: int) -> dict[str, str]:
    """This process's environment without its place in the run, and what a server needs."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "VLLM_CPU_KVCACHE_SPACE")
    environment = {key: value for key, value in os.environ.items() if key not in left_out}
    environment |= {
        PARENT: str(parent),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes that pause, update and resume
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # the plugin's log-probs are in the sampler of the first
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "86400",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound servers would share the first cores
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
    }
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else None
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] if names else str(gpu) for gpu in gpus)
    return environment


def transfer_backend(recipe: Recipe) -> str:
    """The recipe's way of the weights, `auto` resolved."""
    settings = recipe.rollout.vllm
    if settings.weight_transfer != "auto":
        return settings.weight_transfer
    return "shared_memory" if settings.placement == "colocated" else "gloo"


def serve(recipe: Recipe, *, source: str, host: str, port: int, on_gpu: bool) -> int:
    """Runs a server of the recipe's model for other machines until it ends -> its exit code.

    It serves nothing before a trainer has sent it weights.

    Raises:
        RecipeError: when the recipe or this environment is wrong.
    """
    check_installed()
    hf_config = hf_config_of(recipe.model, source=source)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if recipe.model.path is None:
            write_whole_config(folder, hf_config)
        else:
            copy_assets(Path(recipe.model.path), folder)
        separate = recipe.rollout.vllm.model_copy(update={"placement": "separate", "addresses": [f"{host}:{port}"]})
        rollout = recipe.rollout.model_copy(update={"vllm": separate})
        settings = recipe.model_copy(update={"rollout": rollout})
        environment = server_environment(gpus=None, threads=os.cpu_count() or 1, parent=os.getpid())
        process = subprocess.Popen(
            server_command(settings, folder, host=host, port=port, on_gpu=on_gpu), env=environment
        )
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:
            process.kill()
            process.wait()


class VLLMServer:
    """One server that this process starts, watches and ends. `log` takes what it prints; `log`.1 is the one before."""

    def __init__(
        self, recipe: Recipe, folder: Path, log: Path, *, environment: Mapping[str, str], on_gpu: bool
    ) -> None:
        self._recipe = recipe
        self._folder = folder
        self._log = log
        self._environment = dict(environment)
        self._on_gpu = on_gpu
        self._process: subprocess.Popen[bytes] | None = None
        self.client: VLLMClient | None = None

    def start(self) -> None:
        """Starts the process on a free port; `wait` for it before the first request."""
        self.end()
        port = free_port()
        command = server_command(self._recipe, self._folder, host="127.0.0.1", port=port, on_gpu=self._on_gpu)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists():
            self._log.replace(self._log.with_name(f"{self._log.name}.1"))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        settings = self._recipe.rollout.vllm
        self.client = VLLMClient(f"127.0.0.1:{port}", timeout_seconds=settings.request_timeout_seconds)

    def wait(self) -> VLLMClient:
        """Waits until the server is ready -> its client.

        Raises:
            ServerLostError: when it ends or takes too long, naming its log.
        """
        limit = self._recipe.rollout.vllm.start_timeout_seconds
        deadline = time.monotonic() + limit
        tries = 1
        while True:
            assert self._process is not None
            assert self.client is not None
            if self._process.poll() is not None:
                said = self._log.read_text(errors="replace")
                if "address already in use" in said.lower() and tries < _TRIES:
                    tries += 1
                    self.start()
                    continue
                raise ServerLostError(
                    f"vLLM's server ended while starting (exit code {self._process.returncode}); its log: {self._log}"
                )
            if self.client.is_healthy():
                return self.client
            if time.monotonic() > deadline:
                raise ServerLostError(f"vLLM's server did not start within {limit:g} seconds; its log: {self._log}")
            time.sleep(0.1)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def end(self) -> None:
        """Ends the server with all its processes, which are a session of their own.

        It is asked first: vLLM's shared memory outlives processes that are killed.
        """
        if self._process is None:
            return
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_SECONDS_TO_END)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None


class SeparateServer:
    """A server that runs elsewhere, at `address`; it is met, and met again when it has failed."""

    def __init__(self, recipe: Recipe, address: str) -> None:
        self._settings = recipe.rollout.vllm
        self._address = address

    def start(self) -> None:
        """Others start it."""

    def wait(self) -> VLLMClient:
        """Waits until it answers -> its client.

        Raises:
            ServerLostError: when it does not in time, or is not what the recipe says.
        """
        limit = self._settings.start_timeout_seconds
        client = VLLMClient(self._address, timeout_seconds=self._settings.request_timeout_seconds)
        deadline = time.monotonic() + limit
        while not client.is_healthy():
            if time.monotonic() > deadline:
                raise ServerLostError(
                    f"rollout.vllm.addresses: no server at {self._address} answered within {limit:g} seconds"
                )
            time.sleep(0.1)
        check_release(client.vllm_version(), where=f"at {self._address}")
        ranks = client.world_size()
        if ranks != self._settings.tensor_parallel_size:
            raise ServerLostError(
                f"rollout.vllm.tensor_parallel_size is {self._settings.tensor_parallel_size}, "
                f"and the server at {self._address} has {ranks}"
            )
        return client

    def end(self) -> None:
        """Others end it."""
