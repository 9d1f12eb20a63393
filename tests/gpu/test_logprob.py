"""logprob through Triton on the device against float64 on the CPU."""

import pytest
import torch

from reprdpo.ops import logprob

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def eager(logits, labels, temperature=1.0):
    ignored = labels == -100
    logp = (logits / temperature).log_softmax(-1)
    return logp.gather(-1, labels.masked_fill(ignored, 0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(0, 9), (3, 1), (5, 33), (2, 3, 1000), (3, 40001)])
def test_value_and_gradient(shape, inplace, dtype, triton_device):
    logits = (3 * torch.randn(shape)).to(dtype)
    labels, upstream = torch.randint(0, shape[-1], shape[:-1]), torch.randn(shape[:-1])
    labels.view(-1)[1::3] = -100
    exact_in = logits.double().requires_grad_()
    exact = eager(exact_in, labels, 1.3)
    (wanted,) = torch.autograd.grad(exact, exact_in, upstream.double())
    logits[labels == -100] = torch.nan
    leaf = logits.to(triton_device).requires_grad_()
    ours = logprob(leaf * 1, labels.to(triton_device), temperature=1.3, inplace_backward=inplace)
    torch.testing.assert_close(ours.double().cpu(), exact.detach(), rtol=1e-6, atol=2e-6)
    (grad,) = torch.autograd.grad(ours, leaf, upstream.to(triton_device))
    torch.testing.assert_close(grad.double().cpu(), wanted, rtol=max(2e-5, torch.finfo(dtype).eps), atol=1e-7)


def test_rows_past_two_to_the_31_elements(triton_device, cuda_only):
    rows, vocabulary = 67200, 32000  # 4.3 GB in bfloat16, and as much for the gradient
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free memory")
    logits = torch.zeros(rows, vocabulary, dtype=torch.bfloat16, device=triton_device)
    labels = torch.zeros(rows, dtype=torch.int64, device=triton_device)
    logits[-1] = torch.randn(vocabulary)
    logits.requires_grad_()
    ours = logprob(logits, labels)
    exact = eager(logits.detach()[-1:].double(), labels[-1:])
    torch.testing.assert_close(ours[-1:].double(), exact, rtol=1e-6, atol=2e-6)
    (grad,) = torch.autograd.grad(ours[-1], logits)
    wanted = -logits.detach()[-1].double().softmax(0)
    wanted[0] += 1
    torch.testing.assert_close(grad[-1].double(), wanted, rtol=2**-8, atol=1e-7)
    assert grad[:-1].count_nonzero() == 0
