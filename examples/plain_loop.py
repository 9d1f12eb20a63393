"""DPO in a plain PyTorch loop: from final hidden states and lm_head straight to the loss, never through logits.

    python examples/plain_loop.py MODEL PAIRS.jsonl

MODEL is a folder or hub name of a causal LM; a line of PAIRS.jsonl is {"prompt": ..., "chosen": ..., "rejected": ...}.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from reprdpo import ops


def collate(tokenizer, pairs: list[dict[str, str]]) -> dict[str, Tensor]:
    """All chosen sequences, then all rejected ones; labels are the ids of the responses, -100 elsewhere."""
    prompts = [tokenizer(pair["prompt"]).input_ids for pair in pairs] * 2
    answers = [pair[side] + tokenizer.eos_token for side in ("chosen", "rejected") for pair in pairs]
    responses = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]

    def pad(rows: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=value)

    both = list(zip(prompts, responses, strict=True))
    return {
        "input_ids": pad([prompt + response for prompt, response in both], 0),
        "attention_mask": pad([[1] * len(prompt + response) for prompt, response in both], 0),
        "labels": pad([[-100] * len(prompt) + response for prompt, response in both], -100),
    }


def preference_loss(model, batch: dict[str, Tensor], beta: float, reference: tuple[Tensor, Tensor]):
    """Gradients reach the decoder through its states and the head through its weight.

    A head with a scale, a softcap, LoRA or a shard of its weight goes through ``reprdpo.heads.run_at_head`` instead.
    """
    states = model.get_decoder()(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return ops.linear_preference_loss(
        states,
        model.lm_head.weight,
        batch["labels"],
        shift=True,
        ref_chosen_logp=reference[0],
        ref_rejected_logp=reference[1],
        beta=beta,
    )


def train(model, batches: list[dict[str, Tensor]], *, epochs: int, beta: float, lr: float) -> list[float]:
    """The loss of every step; the model as it comes is the reference."""
    model.eval()  # no dropout: at the first step the policy is the reference to the last bit
    references = []
    with torch.no_grad():
        for batch in batches:
            zero = torch.zeros(len(batch["labels"]) // 2, device=model.device)
            result = preference_loss(model, batch, beta, (zero, zero))
            references.append((result.chosen_logp, result.rejected_logp))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for epoch in range(epochs):
        for batch, reference in zip(batches, references, strict=True):
            result = preference_loss(model, batch, beta, reference)
            result.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(result.loss.item())
            margin = (result.chosen_reward - result.rejected_reward).mean().item()
            print(f"epoch {epoch + 1}  loss {losses[-1]:.4f}  reward margin {margin:+.3f}")
    return losses


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=1e-6)
    arguments = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model).to(device)
    pairs = [json.loads(line) for line in arguments.pairs.read_text(encoding="utf-8").splitlines()]
    size = arguments.batch_size
    batches = [collate(tokenizer, pairs[start : start + size]) for start in range(0, len(pairs), size)]
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    return train(model, batches, epochs=arguments.epochs, beta=arguments.beta, lr=arguments.lr)


if __name__ == "__main__":
    main()
