"""One server of vLLM over HTTP: responses by token ids, and the control of its weights.

Each thread has a connection of its own, kept open between its requests.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eapo_megatron.rollout.engine import EngineLostError, SamplingParams

InFlight = Literal["wait", "keep", "abort"]  # what becomes of requests when weights change, in vLLM's words
HEALTH_SECONDS = 5.0  # for the answer of a server that is asked whether it is ready


class ServerLostError(EngineLostError):
    """A server that is gone, does not answer in time or has failed."""


class ServerRefusedError(RuntimeError):
    """A request that the server calls wrong: it would be wrong on any other too."""


@dataclass(frozen=True)
class Request:
    """One response to be sampled."""

    prompt: Sequence[int]
    seed: int
    sampling: SamplingParams


@dataclass(frozen=True)
class Answer:
    """One response: its tokens with the stop token, and the log-probs of the full softmax at the temperature."""

    tokens: list[int]
    log_probs: list[float]
    finished: bool  # ended with a stop token
    version: int  # of the oldest weights that sampled a part of it


class VLLMClient:
    """Talks to the server at `address` (host:port); a reply may take `timeout_seconds`.

    Raises:
        ServerLostError: by every method, when the server is gone or has failed.
        ServerRefusedError: by every method, for a request that is wrong.
    """

    def __init__(self, address: str, *, timeout_seconds: float) -> None:
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._local = threading.local()

    def generate(self, request: Request) -> Answer | None:
        """One response; None when it was dropped because weights change."""
        sampling = request.sampling
        body = {
            "token_ids": list(request.prompt),
            "sampling_params": {
                "seed": request.seed,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "max_tokens": sampling.max_response_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
                "ignore_eos": True,  # the stop tokens are all there are
                "logprobs": 0,  # of the sampled token
                "detokenize": False,
            },
        }
        choice = self._call("POST", "/inference/v1/generate", body)["choices"][0]
        if choice["finish_reason"] == "abort":
            return None
        tokens = choice["token_ids"]
        return Answer(
            tokens=tokens,
            log_probs=[content["logprob"] for content in choice["logprobs"]["content"]],
            finished=tokens[-1] in sampling.stop_token_ids,
            version=min(int(span["version"]) for span in choice["weight_versions"]),
        )

    def is_healthy(self) -> bool:
        """Whether the server is ready for requests; what listens there may be something else, and never answer."""
        try:
            VLLMClient(self.address, timeout_seconds=HEALTH_SECONDS)._call("GET", "/health")
        except (ServerLostError, ServerRefusedError):
            return False
        return True

    def vllm_version(self) -> str:
        return str(self._call("GET", "/version")["version"])

    def world_size(self) -> int:
        """The server's workers."""
        return int(self._call("GET", "/get_world_size")["world_size"])

    def weight_version(self) -> str:
        return str(self._call("GET", "/weight_info")["weight_version"])

    def pause(self, in_flight: InFlight) -> None:
        """Serves nothing until `resume`; clears the prefix cache.

        Requests in flight are completed first (wait), go on after it from their tokens so far (keep), or are dropped.
        """
        self._call("POST", f"/pause?mode={in_flight}&clear_cache=true")

    def resume(self) -> None:
        self._call("POST", "/resume")

    def sleep(self) -> None:
        """Moves the weights to the host's memory and drops the caches, on a GPU; serves nothing until `wake_up`."""
        self._call("POST", "/sleep?level=1&mode=wait")

    def wake_up(self) -> None:
        self._call("POST", "/wake_up")

    def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, version: int) -> None:
        """Raises ServerLostError when weights are missing: the server ends then."""
        self._call("POST", "/finish_weight_update", {"weight_version": str(version)})

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = self._connection()
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            reply = response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            words = str(error) or type(error).__name__
            raise ServerLostError(f"vLLM's server {self.address} does not answer {path}: {words}") from error
        if response.status == 200:
            return json.loads(reply) if reply else None
        said = reply.decode(errors="replace")[:500]
        kind = ServerRefusedError if 400 <= response.status < 500 else ServerLostError
        raise kind(f"vLLM's server {self.address} answers {path} with {response.status}: {said}")

    def _connection(self) -> http.client.HTTPConnection:
        if not hasattr(self._local, "connection"):
            host, _, port = self.address.rpartition(":")
            self._local.connection = http.client.HTTPConnection(host, int(port), timeout=self.timeout_seconds)
        connection: http.client.HTTPConnection = self._local.connection
        return connection
