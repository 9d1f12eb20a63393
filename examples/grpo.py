"""Group-relative policy optimisation (GRPO, arXiv 2402.03300) on linear_logprob.

    python examples/grpo.py MODEL "A prompt" "Another prompt"

Every token has an upstream gradient of its own here, which linear_logprob takes as it comes: three matmuls, no logits.
The reward is a toy: the share of different words in an answer.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprdpo import ops
from reprdpo.heads import HeadSpec, run_at_head

Reward = Callable[[str], float]


def variety(text: str) -> float:
    """The share of different words in ``text``."""
    words = text.split()
    return len(set(words)) / max(1, len(words))


def sample(model: Any, tokenizer: Any, prompt: str, group: int, max_new_tokens: int) -> dict[str, Tensor]:
    """``group`` answers to one prompt; labels are shifted: the token to predict from each position, -100 elsewhere."""
    start = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    ids = model.generate(
        start.expand(group, -1), do_sample=True, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id
    )
    answers = ids[:, start.shape[1] :]
    ended = (answers == tokenizer.eos_token_id).cumsum(1)
    live = (ended - (answers == tokenizer.eos_token_id).long()) == 0  # up to and with the first end of sequence
    labels = torch.full_like(ids, -100)
    labels[:, start.shape[1] - 1 : -1] = torch.where(live, answers, -100)
    mask = torch.cat([torch.ones_like(start).expand(group, -1), live.long()], 1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "answers": answers}


def token_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probs [G, T] of the sampled tokens, 0 elsewhere."""

    def use(hidden: Tensor, head: HeadSpec) -> Tensor:
        return ops.linear_logprob(hidden, labels=batch["labels"], **head._asdict())

    return run_at_head(model, use, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


def grpo_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, scored: Tensor, clip: float = 0.2) -> Tensor:
    """The clipped surrogate, a mean over tokens within each of the G answers and then over answers."""
    ratio = (logps - old_logps).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - clip, 1 + clip) * advantages[:, None])
    return -((gain * scored).sum(1) / scored.sum(1).clamp(min=1)).mean()


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    reward: Reward = variety,
    rounds: int = 1,
    group: int = 8,
    updates: int = 2,
    max_new_tokens: int = 32,
    lr: float = 1e-6,
) -> list[float]:
    """The mean reward of every round's answers; each batch of answers is used for ``updates`` optimizer steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    history = []
    for number in range(rounds):
        rewards_of_round = []
        for prompt in prompts:
            batch = sample(model, tokenizer, prompt, group, max_new_tokens)
            texts = tokenizer.batch_decode(batch["answers"], skip_special_tokens=True)
            rewards = torch.tensor([float(reward(text)) for text in texts], device=model.device)
            advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
            with torch.no_grad():
                old_logps = token_logps(model, batch)
            for _ in range(updates):
                loss = grpo_loss(token_logps(model, batch), old_logps, advantages, batch["labels"] != -100)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            rewards_of_round.append(rewards.mean())
        history.append(torch.stack(rewards_of_round).mean().item())
        print(f"round {number + 1}  mean reward {history[-1]:.3f}")
    return history


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device).eval()
    return train(model, tokenizer, arguments.prompts, rounds=arguments.rounds, max_new_tokens=arguments.max_new_tokens)


if __name__ == "__main__":
    main()
