"""RL algorithms with entropy-aware credit: tensors in, tensors out, torch alone.

The order of use: `group_advantages` from rewards, `shape_advantages` (EAPO and its baselines), `loss_weights` over the
optimizer step, `policy_loss` for each micro-batch. `Algorithm` is the four of them with their settings, built from a
configuration. Every statistic is exact over the ranks of `process_group`; with `process_group=None` no function
communicates, whether or not torch.distributed is initialised.
"""

from .advantages import ESTIMATORS, group_advantages, min_group_size
from .aggregation import AGGREGATIONS, loss_weights
from .algorithm import SECTION_KEYS, Algorithm, Needs
from .corrections import CORRECTIONS, Correction, kept_mass_metrics, mismatch_metrics
from .losses import KL_ESTIMATORS, LOSSES, LossInputs
from .policy_loss import LossOutputs, LossSettings, policy_loss, policy_loss_unchecked
from .quadrants import QUADRANTS, quadrant_masks, quadrant_metrics, quadrant_statistics
from .registry import reads
from .selection import SelectionInputs, uniform_draws
from .shaping import SHAPINGS, ShapingInputs, eapo_advantages, shape_advantages
from .thresholds import THRESHOLDS

__all__ = [
    "AGGREGATIONS",
    "CORRECTIONS",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "LOSSES",
    "QUADRANTS",
    "SECTION_KEYS",
    "SHAPINGS",
    "THRESHOLDS",
    "Algorithm",
    "Correction",
    "LossInputs",
    "LossOutputs",
    "LossSettings",
    "Needs",
    "SelectionInputs",
    "ShapingInputs",
    "eapo_advantages",
    "group_advantages",
    "kept_mass_metrics",
    "loss_weights",
    "min_group_size",
    "mismatch_metrics",
    "policy_loss",
    "policy_loss_unchecked",
    "quadrant_masks",
    "quadrant_metrics",
    "quadrant_statistics",
    "reads",
    "shape_advantages",
    "uniform_draws",
]
