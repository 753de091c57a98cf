"""The keys of rollouts by vLLM: where its servers are, their sizes, and how weights get there."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from eapo_megatron.config.section import Section


class VLLM(Section):
    """vLLM's servers, for `rollout.engine: vllm`."""

    placement: Literal["colocated", "separate"] = "colocated"
    """colocated: the run starts the servers on its own nodes; separate: they run elsewhere (`eapo-megatron serve`)."""
    num_servers: int = Field(1, ge=1, le=4096)
    """Colocated servers in the run; model replica r starts and uses r, r + replicas and so on, or shares one."""
    num_nodes: int = Field(0, ge=0, le=100_000)
    """Nodes for separate servers that `submit` asks SLURM for, beside the trainer's; its job fills in addresses."""
    addresses: list[str] = Field([])
    """host:port of each separate server."""
    tensor_parallel_size: int = Field(1, ge=1, le=64)
    """Ranks of vLLM that share each server's weights."""
    gpu_memory_utilization: float = Field(0.5, gt=0, le=1)
    """Share of each GPU for vLLM's weights and KV cache; a colocated trainer needs the rest."""
    sleep: bool = False
    """Whether colocated servers give their GPU memory back while the policy trains; their weights wait on the host."""
    kv_cache_gib: float | None = Field(None, gt=0, le=100_000)
    """GiB of KV cache of each rank of vLLM; null: what gpu_memory_utilization leaves, 1 on CPU."""
    weight_transfer: Literal["auto", "gloo", "shared_memory", "disk"] = "auto"
    """How weights reach vLLM; auto: shared_memory to colocated servers, gloo to separate ones; disk: files."""
    bucket_mb: int = Field(256, ge=1, le=65_536)
    """MiB of weights in one message of a transfer; a larger tensor is a message of its own."""
    request_timeout_seconds: float = Field(600.0, gt=0, le=1_000_000)
    """Seconds for one response or one message of a transfer; a server that takes longer is started again."""
    start_timeout_seconds: float = Field(600.0, gt=0, le=1_000_000)
    """Seconds for a server to start, or for a separate one to answer."""
    max_restarts: int = Field(3, ge=0, le=1_000_000)
    """Servers started again in one run before it ends."""

    @model_validator(mode="after")
    def _placement(self) -> VLLM:
        if self.placement == "separate" and not (self.addresses or self.num_nodes):
            raise ValueError("placement separate needs addresses, host:port of each server, or num_nodes for `submit`")
        if self.placement == "colocated" and self.num_nodes:
            raise ValueError("num_nodes is of placement separate")
        if self.placement == "separate" and self.sleep:
            raise ValueError("sleep is of placement colocated: separate servers share no memory with the trainer")
        if self.placement == "colocated" and self.addresses:
            raise ValueError("addresses are of placement separate; colocated servers are started by the run")
        for address in self.addresses:
            host, _, port = address.rpartition(":")
            if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
                raise ValueError(f"addresses must be host:port, got {address!r}")
        if len(set(self.addresses)) < len(self.addresses):
            raise ValueError("addresses must differ")
        return self
