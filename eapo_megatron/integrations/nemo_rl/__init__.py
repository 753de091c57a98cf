"""EAPO in NeMo-RL's GRPO, written against NVIDIA-NeMo/RL at commit 7ea279abfbeb698b092856d0dab61e7cf39bc909 (Aug 2026).

`recipes/nemo_rl/run_grpo_eapo.py` puts the parts together between NeMo-RL's `setup()` and `grpo_train()`:

- `worker` and `policy`: the old-log-prob pass of the Megatron workers returns per-token entropies too;
- `advantages`: group advantages shaped where NeMo-RL estimates them, in the driver, which holds whole groups;
- `loss`: the losses of `eapo_megatron.algorithms` behind NeMo-RL's LossFunction protocol.

Importing this package imports nothing of NeMo-RL; `policy` and `worker` do. `make test-nemo-rl` runs them in NeMo-RL's
own policy, worker and loop on CPU; its Ray actors, vLLM and GPUs were not run here.
"""

from eapo_megatron.integrations.nemo_rl.advantages import EAPOAdvantageEstimator
from eapo_megatron.integrations.nemo_rl.loss import EAPOLossFn

__all__ = ["EAPOAdvantageEstimator", "EAPOLossFn"]
