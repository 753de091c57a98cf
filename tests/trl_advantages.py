"""Run in TRL's environment: the example's trainer on a tiny model, its advantages against Eq. 6 and 7 in float64.

python tests/trl_advantages.py EXAMPLES_FOLDER MODEL_FOLDER PROMPTS.jsonl -> one line of JSON
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ALPHA, PHI = 0.2, 2.0


def expected(advantages, entropies, mask, group_size):
    """float64 [N, T]: one advantage a response in, its shaped ones at its tokens out."""
    shaped = torch.zeros_like(entropies)
    for first in range(0, len(mask), group_size):
        rows = slice(first, first + group_size)
        tokens = entropies[rows][mask[rows]]
        mean, std = tokens.mean(), tokens.std(correction=0)
        for row in range(first, first + group_size):
            for position in range(mask.shape[1]):
                if mask[row, position]:
                    a = advantages[row]
                    z = (entropies[row, position] - mean) / std
                    bound = a.abs() / PHI
                    shaped[row, position] = a + ALPHA * a.sign() * z.clamp(-bound, bound)
    return shaped


def main(examples: str, model: str, prompts: str) -> None:
    sys.path.insert(0, examples)
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl_trainer import EAPOTrainer

    before = {}
    plain = GRPOTrainer._generate_and_score_completions

    def remember(self, inputs):
        batch = plain(self, inputs)
        before.update({name: value.clone() for name, value in batch.items() if torch.is_tensor(value)})
        return batch

    GRPOTrainer._generate_and_score_completions = remember
    errors, shapes = [], []

    class Checked(EAPOTrainer):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            ids = torch.cat([before["prompt_ids"], before["completion_ids"]], 1)
            attention = torch.cat([before["prompt_mask"], before["completion_mask"]], 1)
            length = before["completion_ids"].shape[1]
            with torch.no_grad():
                logits = self.model.double()(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
            self.model.float()
            log_p = (logits / self.temperature).log_softmax(-1)
            entropies = -(log_p.exp() * log_p).sum(-1)
            mask = before["completion_mask"].bool()
            wanted = expected(before["advantages"].double(), entropies, mask, self.num_generations)
            errors.append(float((batch["advantages"].double() - wanted).abs().max()))
            shapes.append([list(batch["advantages"].shape), float(batch["advantages"].abs().max())])
            return batch

    torch.manual_seed(0)
    settings = GRPOConfig(
        str(Path(prompts).parent / "trl_run"),
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=12,
        learning_rate=1e-3,
        beta=0.0,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    rewards = lambda completions, **_: [float(sum(map(ord, text)) % 3) for text in completions]  # noqa: E731
    data = load_dataset("json", data_files=prompts, split="train")
    trainer = Checked(model=model, reward_funcs=rewards, args=settings, train_dataset=data)
    with torch.no_grad():  # a random policy's entropies are all the same: make them differ
        trainer.model.get_output_embeddings().weight.mul_(5)
    start = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    moved = max(float((a - b).detach().abs().max()) for a, b in zip(start, trainer.model.parameters(), strict=True))
    print(json.dumps({"errors": errors, "shapes": shapes, "moved": moved}))


if __name__ == "__main__":
    main(*sys.argv[1:])
