"""preference_loss on the device against float64 on the CPU, every loss type."""

import pytest
import torch

from reprdpo.ops import preference_loss, use_backend
from reprdpo.ops.reference import PAIR_LOSSES

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("loss_type", [*PAIR_LOSSES, ["sigmoid", "sft"]], ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 70])
def test_value_and_gradient(pairs, loss_type, triton_device):
    kinds = [PAIR_LOSSES[name] for name in ([loss_type] if isinstance(loss_type, str) else loss_type)]
    logp = [-3 * torch.rand(pairs) - 0.1 for _ in range(4 if any(kind.needs_reference for kind in kinds) else 2)]
    constants = {"chosen_length": torch.randint(1, 9, (pairs,)), "rejected_length": torch.randint(1, 9, (pairs,))}
    if not any(kind.averages for kind in kinds):
        constants = {}
    confidence = 0.8 if loss_type == "robust" else torch.rand(pairs)
    upstream = torch.randn(pairs)

    def run(dtype, device):
        inputs = [x.to(device, dtype) for x in logp]
        leaves = [x.requires_grad_() for x in inputs[:2]]
        options = {name: value.to(device) for name, value in constants.items()}
        options["confidence"] = confidence if isinstance(confidence, float) else confidence.to(device, dtype)
        out = preference_loss(*inputs, beta=0.25, loss_type=loss_type, **options)
        grads = torch.autograd.grad(out.loss, leaves, upstream.to(device, dtype))
        return [x.double().cpu() for x in (*out, *grads)]

    ours = run(torch.float32, triton_device)
    with use_backend("reference"):
        wanted = run(torch.float64, "cpu")
    for mine, theirs in zip(ours, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
