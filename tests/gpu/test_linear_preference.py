"""linear_preference_loss through Triton on the device against float64 on the CPU."""

import pytest
import torch

from reprdpo.ops import linear_preference_loss, use_backend

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(pairs, length, width, vocabulary):
    sequences = 2 * pairs
    hidden, weight = torch.randn(sequences, length, width), torch.randn(vocabulary, width) / width**0.5
    labels = torch.randint(0, vocabulary, (sequences, length))
    labels[:, : length // 2] = -100
    labels[-1] = -100  # an empty response
    references = [-length * torch.rand(pairs) for _ in range(2)]
    return hidden, weight, labels, references, torch.rand(pairs)


def run(inputs, dtype, device, **options):
    hidden, weight, labels, references, confidence = inputs
    leaves = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    names = ("ref_chosen_logp", "ref_rejected_logp")
    if options.get("loss_type") != "simpo":
        options |= dict(zip(names, (x.to(device) for x in references), strict=True))
    out = linear_preference_loss(
        *leaves, labels.to(device), beta=0.3, confidence=confidence.to(device), return_stats=True, **options
    )
    grads = torch.autograd.grad(1.7 * out.loss.sum(), leaves)
    return [x.detach().double().cpu() for x in (*out[:5], *out.stats, *grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "simpo"])
@pytest.mark.parametrize("budget", [None, 2**15])
@pytest.mark.parametrize("pairs", [1, 3])
def test_matches_float64(pairs, budget, loss_type, dtype, triton_device):
    inputs = make(pairs, 8, 16, 300)
    rounded = [x.to(dtype).float() for x in inputs[:2]]
    options = {"loss_type": loss_type, "reduction": "mean"}
    ours = run((*rounded, *inputs[2:]), dtype, triton_device, max_tile_bytes=budget, **options)
    with use_backend("reference"):
        wanted = run((*rounded, *inputs[2:]), torch.float64, "cpu", **options)
    for mine, theirs in zip(ours[:-2], wanted[:-2], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(ours[-2:], wanted[-2:], strict=True):
        assert (mine - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * theirs.norm()


def test_policy_equal_to_reference_gives_log_two(triton_device):
    hidden, weight, labels, _, confidence = make(2, 8, 16, 300)
    options = {"beta": 0.3, "confidence": confidence.to(triton_device)}
    tensors = [x.to(triton_device) for x in (hidden, weight, labels)]
    zero = torch.zeros(2, device=triton_device)
    first = linear_preference_loss(*tensors, ref_chosen_logp=zero, ref_rejected_logp=zero, **options)
    again = linear_preference_loss(
        *tensors, ref_chosen_logp=first.chosen_logp, ref_rejected_logp=first.rejected_logp, **options
    )
    assert abs(again.loss.item() - 0.6931472) <= 0.3e-4


def test_graph_capture(triton_device, cuda_only):
    inputs = [x.cuda() if torch.is_tensor(x) else [y.cuda() for y in x] for x in make(2, 32, 64, 1000)]
    hidden, weight, labels, references, confidence = inputs
    hidden.requires_grad_()

    def step():
        out = linear_preference_loss(
            hidden, weight, labels, ref_chosen_logp=references[0], ref_rejected_logp=references[1], beta=0.3,
            confidence=confidence,
        )  # fmt: skip
        return out.loss, *torch.autograd.grad(out.loss, hidden)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for mine, theirs in zip(captured, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
