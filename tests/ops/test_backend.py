"""Which backend serves: the default, what a user asks for, and what is refused."""

import pytest
import torch

from reprdpo import ops
from reprdpo.ops import native
from reprdpo.ops.backend import declare, select

FLOAT = torch.zeros(1)
needs_native = pytest.mark.skipif(not native.loaded(), reason=f"native: {native.status()}")


def test_backends_names_all_with_reasons():
    status = ops.backends()
    assert list(status) == ["triton", "native", "reference"]
    assert status["reference"].available
    assert all(state.reason for state in status.values())


def test_default_is_native_where_built():
    assert select("probe_reward", FLOAT) == ("native" if native.loaded() else "reference")


@needs_native
def test_float64_goes_to_the_reference_and_is_refused_by_name():
    assert select("probe_reward", FLOAT.double()) == "reference"
    with ops.use_backend("native"), pytest.raises(ValueError, match=r"native.*probe_reward.*float64"):
        select("probe_reward", FLOAT.double())


def test_block_restores_also_after_an_error():
    before = select("probe_reward", FLOAT)

    def fail_inside():
        with ops.use_backend("reference"):
            assert select("probe_reward", FLOAT) == "reference"
            with ops.use_backend("auto"):
                assert select("probe_reward", FLOAT) == before
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert select("probe_reward", FLOAT) == before


def test_environment_chooses_and_block_wins(monkeypatch):
    before = select("probe_reward", FLOAT)
    monkeypatch.setenv("REPRDPO_BACKEND", "reference")
    assert select("probe_reward", FLOAT) == "reference"
    with ops.use_backend("auto"):
        assert select("probe_reward", FLOAT) == before
    monkeypatch.setenv("REPRDPO_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"REPRDPO_BACKEND must be one of .*not 'cuda'"):
        select("probe_reward", FLOAT)


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="use_backend must be one of auto, triton, native, reference, not 'cuda'"):
        ops.use_backend("cuda").__enter__()


@pytest.mark.skipif(ops.backends()["triton"].available, reason="triton serves here")
def test_a_backend_that_cannot_serve_is_refused_with_the_reason():
    with pytest.raises(ValueError, match=f"'triton' cannot serve here: {ops.backends()['triton'].reason}"):
        ops.use_backend("triton").__enter__()


@needs_native
def test_an_op_without_a_kernel_refuses_and_falls_back_only_by_default():
    declare("op_of_this_test")
    assert select("op_of_this_test", FLOAT) == "reference"
    with ops.use_backend("native"), pytest.raises(ValueError, match="'native' has no op_of_this_test"):
        select("op_of_this_test", FLOAT)


@needs_native
def test_ops_that_are_plain_pytorch_everywhere_accept_any_backend():
    token_logprob = torch.ones(3, requires_grad=True)
    with ops.use_backend("native"):
        assert ops.last_token_index(torch.ones(2, 3, dtype=torch.int64)).tolist() == [2, 2]
        sums = ops.sequence_sum(token_logprob, cu_seqlens=torch.tensor([0, 1, 3]))
        sums.sum().backward()
    assert sums.tolist() == [1, 2]
    assert token_logprob.grad.tolist() == [1, 1, 1]
