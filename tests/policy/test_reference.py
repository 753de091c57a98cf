"""Where the reference policy is when; what it scores is tested under every layout (test_methods_over_ranks.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eapo_megatron.policy.reference import Reference


@pytest.mark.parametrize(("on_host", "expected"), [(True, ["cpu", "cuda", "scored", "cpu"]), (False, ["scored"])])
def test_on_the_host_between_uses_when_asked(on_host: bool, expected: list[str]) -> None:
    seen: list[str] = []

    def scored(batch: Any) -> tuple[str, None]:
        seen.append("scored")
        return "log-probs", None

    module = SimpleNamespace(to=lambda device: seen.append(device.type))
    policy: Any = SimpleNamespace(modules=[module], runtime=SimpleNamespace(device=torch.device("cuda")))
    worker: Any = SimpleNamespace(policy=policy, log_probs_and_entropies=scored)
    opened = Reference(worker, on_host=on_host)
    assert opened.log_probs(SimpleNamespace()) == "log-probs"  # type: ignore[arg-type]
    assert seen == expected
