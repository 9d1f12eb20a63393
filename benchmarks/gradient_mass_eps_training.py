"""DPO of a tiny Llama under a frozen, peaked lm_head, with gradient_mass_eps and without: do the loss curves differ?

    python -m benchmarks.gradient_mass_eps_training [--steps 500] [--eps 0.001953125]

Each run draws the same pairs; a third one, without eps and from another seed of the data, shows what noise is.
"""

import argparse

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from reprdpo.ops import linear_preference_loss

_VOCABULARY, _WIDTH, _PAIRS, _LENGTH = 2048, 64, 4, 24
# Of the frozen head's rows: what makes the softmax of a fresh model as peaked as a trained one's.
_HEAD_NORM = 1.0


def losses(eps: float | None, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """The loss of each step, and the final parameters in one vector."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_VOCABULARY, hidden_size=_WIDTH, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=_LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    weight_VD = (_HEAD_NORM * torch.randn(_VOCABULARY, _WIDTH)).requires_grad_(False)
    # The chosen answers repeat themselves, the rejected ones do not: something there is to learn.
    data = torch.Generator().manual_seed(seed)
    parameters = list(model.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=3e-4)
    curve = []
    for _ in range(steps):
        chosen_PT = torch.randint(64, (_PAIRS, 4), generator=data).repeat(1, _LENGTH // 4)
        rejected_PT = torch.randint(64, (_PAIRS, _LENGTH), generator=data)
        rejected_PT[:, : _LENGTH // 2] = chosen_PT[:, : _LENGTH // 2]
        tokens_ST = torch.cat([chosen_PT, rejected_PT])
        labels_ST = tokens_ST.clone()
        labels_ST[:, : _LENGTH // 2] = -100
        hidden_STD = model.model(tokens_ST).last_hidden_state
        loss = linear_preference_loss(
            hidden_STD, weight_VD, labels_ST, beta=0.1, loss_type=["simpo", "sft"], loss_weights=[1.0, 0.2],
            shift=True, gradient_mass_eps=eps,
        ).loss  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve), torch.cat([parameter.detach().flatten() for parameter in parameters])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--eps", type=float, default=2**-9)
    options = parser.parse_args()
    exact, exact_end = losses(None, options.steps, seed=1)
    sparse, sparse_end = losses(options.eps, options.steps, seed=1)
    other, _ = losses(None, options.steps, seed=2)
    tail = slice(-options.steps // 5, None)
    print(f"eps {options.eps:g}, {options.steps} steps: first loss {exact[0]:.4f}")
    for name, curve in (("exact", exact), ("eps", sparse), ("exact, other data", other)):
        print(f"{name:18} mean of the last fifth {curve[tail].mean():.5f}, last {curve[-1]:.5f}")
    print(
        f"largest difference of a step: eps {(sparse - exact).abs().max():.2e}, data {(other - exact).abs().max():.2e}"
    )
    print(f"parameters apart: {(sparse_end - exact_end).norm() / exact_end.norm():.2e} of their norm")


if __name__ == "__main__":
    main()
