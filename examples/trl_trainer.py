"""EAPO in TRL's GRPOTrainer: python examples/trl_trainer.py MODEL_FOLDER PROMPTS.jsonl [STEPS]

PROMPTS.jsonl has "prompt" and "answer" in each line. Written for trl 1.16, whose loss takes advantages of shape [N, T].
"""

import sys

import torch
from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer

from eapo_megatron.algorithms import eapo_advantages


class EAPOTrainer(GRPOTrainer):
    """GRPOTrainer whose advantages are re-weighted token by token (arXiv 2604.11056, Eq. 6 and 7)."""

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)  # advantages [N], one a response
        ids, attention = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        mask, size = batch["completion_mask"].bool(), self.args.per_device_train_batch_size
        with torch.no_grad():  # the old policy's entropies [N, T], nats
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, attention, mask.size(1), batch_size=size, compute_entropy=True
            )
        rows = torch.arange(len(mask), device=mask.device) + self.accelerator.process_index * len(mask)
        world = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        batch["advantages"] = eapo_advantages(
            batch["advantages"][:, None] * mask, entropies, mask, rows // self.num_generations, process_group=world
        )
        return batch


def reward(completions, answer, **_):
    """1 where the answer is the completion's last word."""
    return [float(text.split()[-1:] == [right]) for text, right in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    model, prompts, steps = [*sys.argv[1:], "100"][:3]
    settings = GRPOConfig(
        "trl_run", max_steps=int(steps), epsilon_high=0.28, beta=0.0, use_cpu=not torch.cuda.is_available()
    )
    data = load_dataset("json", data_files=prompts, split="train")
    EAPOTrainer(model=model, reward_funcs=reward, args=settings, train_dataset=data).train()
