"""EAPO in a plain torch loop: a small policy learns to write five digits that never fall. On CPU, in seconds."""

import torch

from eapo_megatron.algorithms import LossInputs, LossSettings, eapo_advantages, group_advantages, policy_loss
from eapo_megatron.vocab_parallel import vocab_parallel_log_probs_and_entropy

torch.manual_seed(0)
embed, cell, head = torch.nn.Embedding(11, 64), torch.nn.GRU(64, 64, batch_first=True), torch.nn.Linear(64, 10)
optimizer = torch.optim.Adam([*embed.parameters(), *cell.parameters(), *head.parameters()], lr=3e-3)
group_ids, mask = torch.arange(128) // 8, torch.ones(128, 5, dtype=torch.bool)  # 16 groups of 8 responses of 5 tokens

for step in range(20):
    tokens, state = torch.full((128, 1), 10), None  # 10 begins a response
    with torch.no_grad():  # rollouts
        for _ in range(5):
            hidden, state = cell(embed(tokens[:, -1:]), state)
            tokens = torch.cat([tokens, torch.multinomial(head(hidden[:, -1]).softmax(-1), 1)], dim=1)
    rewards = torch.where((tokens[:, 1:].diff(dim=1) >= 0).all(dim=1), 1.0, -1.0)
    for update in range(4):  # optimizer steps on the same rollouts
        logits = head(cell(embed(tokens[:, :-1]))[0])
        log_probs, entropies = vocab_parallel_log_probs_and_entropy(logits, tokens[:, 1:])
        if update == 0:  # the old policy: one forward gives its log-probs and entropies
            old_log_probs = log_probs.detach()
            advantages = group_advantages(rewards, group_ids)[:, None] * mask
            advantages = eapo_advantages(advantages, entropies, mask, group_ids, alpha=0.2, phi=2.0)
        inputs = LossInputs(log_probs, old_log_probs, advantages, mask)
        optimizer.zero_grad()
        policy_loss(inputs, LossSettings(eps_low=0.2, eps_high=0.28)).loss.backward()
        optimizer.step()
    print(f"step {step}: solve rate {(rewards > 0).float().mean():.2f}, entropy {entropies.mean():.2f} nats")
