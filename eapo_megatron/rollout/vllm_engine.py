"""Rollouts by vLLM: servers in processes of their own, each with its own weights and its own tensor parallelism.

The leader of each model replica talks to its servers over HTTP; the other ranks get its responses. Colocated servers
are started, and when they fail started again, by the leader that owns them. Server s belongs to replica s modulo the
number of replicas; where there are fewer servers than replicas, several share one.

Weights go to every server by the rank that owns it, while all ranks iterate over the export together. A server that
fails is lost to all at once: they agree on it, its owner starts it again, all export the current weights once more,
and what it had not answered is sampled again.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from eapo_megatron.config import Recipe
from eapo_megatron.policy.policy_model import Policy
from eapo_megatron.policy.responses import Responses
from eapo_megatron.rollout.engine import SamplingParams
from eapo_megatron.rollout.verification import PROBE_TOKENS, check_weights, probe_prompt
from eapo_megatron.rollout.vllm_client import (
    Answer,
    InFlight,
    Request,
    ServerLostError,
    ServerRefusedError,
    VLLMClient,
)
from eapo_megatron.rollout.vllm_server import (
    SeparateServer,
    VLLMServer,
    server_environment,
    transfer_backend,
)
from eapo_megatron.rollout.weight_transfer import (
    DiskTransport,
    GlooTransport,
    SharedMemoryTransport,
    Transport,
    WeightSender,
)
from eapo_megatron.stopping import TrainingStoppedError
from eapo_megatron.weights.assets import FOLDER
from eapo_megatron.weights.export import export_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIB = 2**20


def open_engine(policy: Policy, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> VLLMEngine:
    """The recipe's servers, started; they serve from the first `update_weights` on.

    Raises:
        TrainingStoppedError: on all ranks, when one of them does not start.
    """
    engine = VLLMEngine(policy, recipe)
    try:
        engine.start()
    except BaseException:
        engine.close()
        raise
    return engine


class VLLMEngine:
    """Samples from servers of vLLM.

    Raises:
        TrainingStoppedError: by its methods, on all ranks, when servers are lost and no restart is left.
    """

    def __init__(self, policy: Policy, recipe: Recipe) -> None:
        self.policy = policy
        self.version = 0
        self.in_flight: InFlight = recipe.rollout.requests_in_flight
        self._dropping = False
        self._asleep = False
        self.restarts = 0
        self._recipe = recipe
        self._settings = recipe.rollout.vllm
        runtime = policy.runtime
        self._total = len(self._settings.addresses) or self._settings.num_servers
        self._replica, self._replicas = runtime.data_parallel_rank, runtime.data_parallel_size
        own = range(self._replica, self._total, self._replicas) if runtime.is_replica_leader else ()
        self._own = {index: self._server(index, place) for place, index in enumerate(own)}
        self._clients: dict[int, VLLMClient] = {}  # of the servers that this rank uses, by their number
        self._lost: dict[int, str] = {}  # servers that have failed since they were last started, and how
        self._lock = threading.Lock()
        self._sender: WeightSender | None = None
        if self._own:
            self._sender = WeightSender(self._transport(), bucket_bytes=self._settings.bucket_mb * MIB)

    def start(self) -> None:
        """Starts this run's servers, or meets those that run elsewhere."""
        self.policy.runtime.gather_objects(None)  # the model's folder is there
        self._start(list(self._own))
        failures = self._all_lost()
        if failures:
            raise TrainingStoppedError(next(iter(failures.values())))

    def update_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Sends the tensors to all servers, which then sample from them as `version`."""
        self.version = version
        self._wake()
        self._send(named_tensors, self._own_left())
        self.restore()
        if self._recipe.rollout.verify_weights:
            self._verify()

    def generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
    ) -> Responses:
        """For each prompt one response a seed, on every rank of the model replica."""
        leads = self.policy.runtime.is_replica_leader
        requests = _requests(prompts, seeds, sampling) if leads else []
        answers: list[Answer | None] = [None] * len(requests)
        self._wake()
        while True:
            self._answer(requests, answers)
            if not self.restore():
                break
        own = responses_of([answer for answer in answers if answer is not None])
        return Responses.from_leader(own, self.policy.runtime.from_replica_leader)

    def sample_here(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: SamplingParams,
        *,
        on_sent: Callable[[], object],
    ) -> Responses:
        """`generate` for the leader alone, from any thread: no other rank takes part.

        It calls `on_sent` when all requests are sent. They wait while weights come, and then do what
        `rollout.requests_in_flight` says.

        Raises:
            ServerLostError: when this leader's servers are all lost; the next `update_weights` starts them again.
        """
        requests = _requests(prompts, seeds, sampling)
        answers: list[Answer | None] = [None] * len(requests)
        self._answer(requests, answers, on_sent)
        done = [answer for answer in answers if answer is not None]
        if len(done) < len(requests):
            raise ServerLostError("; ".join(self._lost.values()) or "requests are dropped")
        return responses_of(done)

    def drop_requests(self) -> None:
        """Ends every `sample_here` that is under way, and all later ones, for good."""
        self._dropping = True
        self._tell(list(self._clients), _drop)

    def sleep(self) -> None:
        """Sends the servers to sleep, where `rollout.vllm.sleep` says so; no replica waits for responses any more."""
        if self._settings.sleep:
            self._asleep = True
            self._tell(self._own_left(), VLLMClient.sleep)

    def _wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self._tell(self._own_left(), VLLMClient.wake_up)

    def _own_left(self) -> list[int]:
        """The servers that this rank owns and has not lost."""
        return [server for server in self._own if server not in self._lost]

    def _tell(self, servers: Iterable[int], call: Callable[[VLLMClient], None]) -> None:
        """Calls each of the servers; one that fails is lost."""
        for server in servers:
            client = self._clients[server]
            try:
                call(client)
            except ServerLostError as error:
                self._lose(server, client, str(error))

    def close(self) -> None:
        """Ends the servers that this run started."""
        if self._sender is not None:
            self._sender.close()
        for server in self._own.values():
            server.end()

    def _answer(
        self,
        requests: Sequence[Request],
        answers: list[Answer | None],
        on_sent: Callable[[], object] = lambda: None,
    ) -> None:
        """Fills in the answers that are still missing, each from whichever server is free, while one is left."""
        while True:
            waiting = deque(index for index, answer in enumerate(answers) if answer is None)
            alive = [server for server in self._clients if server not in self._lost]
            if not waiting or not alive or self._dropping:
                return
            each = min(self._recipe.rollout.max_batch_size, len(waiting))
            with ThreadPoolExecutor(max_workers=each * len(alive)) as pool:
                work = [
                    pool.submit(self._work, server, requests, answers, waiting, on_sent)
                    for server in alive
                    for _ in range(each)
                ]
            for done in work:
                done.result()

    def _work(
        self,
        server: int,
        requests: Sequence[Request],
        answers: list[Answer | None],
        waiting: deque[int],
        on_sent: Callable[[], object],
    ) -> None:
        """One request after the other, until none waits or the server is lost."""
        client = self._clients[server]
        while waiting and server not in self._lost and not self._dropping:
            try:
                index = waiting.popleft()
            except IndexError:
                return
            if not waiting:
                on_sent()
            try:
                answers[index] = client.generate(requests[index])
            except ServerLostError as error:
                self._lose(server, client, str(error))
                return
            except ServerRefusedError:
                waiting.clear()
                raise

    def _lose(self, server: int, client: VLLMClient | None, how: str) -> None:
        """Notes that a server has failed, unless `client` is of one that was started again since."""
        with self._lock:
            if self._clients.get(server) is client:
                self._lost.setdefault(server, how)

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]], servers: Sequence[int]) -> None:
        """All tensors to these of this rank's servers; every rank asks for all of them."""
        if self._sender is None:
            deque(named_tensors, maxlen=0)
            return
        numbers = {self._clients[server]: server for server in servers}
        failed = self._sender.send(named_tensors, list(numbers), self.version, in_flight=self.in_flight)
        for client, error in failed.items():
            self._lose(numbers[client], client, str(error))

    def restore(self) -> bool:
        """Starts lost servers again, with the current weights, until none is lost -> whether any was."""
        revived = False
        while failures := self._all_lost():
            revived = True
            self.restarts += len(failures)
            limit = self._settings.max_restarts
            if self.restarts > limit:
                how = next(iter(failures.values()))
                raise TrainingStoppedError(f"rollout.vllm.max_restarts {limit} are used up: {how}")
            again = [server for server in failures if server in self._own]
            for server in again:
                print(f"rollout server {server} is started again: {failures[server]}", file=sys.stderr, flush=True)
            with self._lock:
                for server in self._lost:  # a thread that samples beside this asks them nothing until they are back
                    self._clients.pop(server, None)
                self._lost.clear()
            self._start(again)
            weights = export_weights(self.policy.modules, self.policy.hf_config, leaders_only=True)
            self._send(weights, [server for server in again if server not in self._lost])
        return revived

    def _verify(self) -> None:
        """Compares a response of every server with the trainer."""
        rollout, runtime = self._recipe.rollout, self.policy.runtime
        sampling = SamplingParams(
            temperature=rollout.temperature,
            max_response_tokens=min(PROBE_TOKENS, rollout.max_response_tokens),
        )
        prompt = probe_prompt(self.policy.vocab_size, self._recipe.data.max_prompt_tokens)
        answers = []
        for server in self._own:
            answer = self._clients[server].generate(Request(prompt, self._recipe.seed, sampling))
            assert answer is not None  # nothing changes the weights meanwhile
            answers.append(answer)
        own = Responses.from_leader(responses_of(answers), runtime.from_replica_leader)
        check_weights(self.policy, prompt, Responses.gathered(own, runtime.gather_rows), rollout.temperature)

    def _all_lost(self) -> dict[int, str]:
        """The servers that any rank has lost, the same on all ranks."""
        everywhere = self.policy.runtime.gather_objects(self._lost)
        return {server: how for lost in reversed(everywhere) for server, how in lost.items()}

    def _start(self, servers: Sequence[int]) -> None:
        """Starts these of this rank's servers together; all ranks then know where every server is."""
        for server in servers:
            self._own[server].start()
        for server in servers:
            try:
                client = self._own[server].wait()
                assert self._sender is not None
                self._sender.connect(client)
                self._clients[server] = client
            except (ServerLostError, ServerRefusedError) as error:
                self._lose(server, self._clients.get(server), str(error))
        addresses: dict[int, str] = {}
        own = {server: client.address for server, client in self._clients.items() if server in self._own}
        for part in self.policy.runtime.gather_objects(own):
            addresses |= part
        if self.policy.runtime.is_replica_leader and not self._own:
            shared = self._replica % self._total
            if shared in addresses:
                timeout = self._settings.request_timeout_seconds
                self._clients = {shared: VLLMClient(addresses[shared], timeout_seconds=timeout)}

    def _server(self, index: int, place: int) -> VLLMServer | SeparateServer:
        """Server `index` of the run, the one at `place` among those of this rank."""
        settings, cluster = self._settings, self._recipe.cluster
        if settings.placement == "separate":
            return SeparateServer(self._recipe, settings.addresses[index])
        on_gpu = self.policy.runtime.device.type == "cuda"
        ranks = settings.tensor_parallel_size
        first = int(os.environ["LOCAL_RANK"]) + place * ranks
        of_node = -(-self._total // cluster.num_nodes) * ranks
        folder = self._recipe.run_folder
        return VLLMServer(
            self._recipe,
            folder / FOLDER,
            folder / "rollout" / f"server-{index}.log",
            environment=server_environment(
                gpus=range(first, first + ranks) if on_gpu else None,
                threads=max(1, (os.cpu_count() or 1) // of_node),
                parent=os.getpid(),
            ),
            on_gpu=on_gpu,
        )

    def _transport(self) -> Transport:
        backend = transfer_backend(self._recipe)
        if backend == "gloo":
            return GlooTransport(timeout_seconds=self._settings.request_timeout_seconds)
        if backend == "disk":
            folder: Path = self._recipe.run_folder / "rollout" / f"weights-{self._replica}"
            return DiskTransport(folder)
        return SharedMemoryTransport()


def _drop(client: VLLMClient) -> None:
    """Ends the requests that are under way."""
    client.pause("abort")
    client.resume()


def _requests(
    prompts: Sequence[Sequence[int]], seeds: Sequence[Sequence[int]], sampling: SamplingParams
) -> list[Request]:
    pairs = zip(prompts, seeds, strict=True)
    return [Request(prompt, seed, sampling) for prompt, of_prompt in pairs for seed in of_prompt]


def responses_of(answers: Sequence[Answer]) -> Responses:
    """The answers as tensors."""
    responses = Responses.of_lists(
        [answer.tokens for answer in answers],
        log_probs=[answer.log_probs for answer in answers],
        finished=[answer.finished for answer in answers],
    )
    versions = torch.tensor([answer.version for answer in answers], dtype=torch.int64)
    return replace(responses, versions=versions)
