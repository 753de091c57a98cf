"""EAPO in NeMo-Aligner (0.7.0): its REINFORCE actor and trainer with entropy-aware credit, and verified rewards."""

from eapo_megatron.integrations.nemo_aligner.actor import MegatronGPTEAPOActorModel
from eapo_megatron.integrations.nemo_aligner.trainer import EAPOTrainer, check_config
from eapo_megatron.integrations.nemo_aligner.verifier import VerifierRewards, read_answers

__all__ = ["EAPOTrainer", "MegatronGPTEAPOActorModel", "VerifierRewards", "check_config", "read_answers"]
