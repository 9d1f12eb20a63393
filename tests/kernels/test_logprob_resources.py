"""Every configuration of the log-prob and preference kernels compiles for each architecture, and spills nothing."""

import itertools
import re

import pytest

pytest.importorskip("triton")

import aot
from reprdpo_kernels import linear_logprob, logprob, preference_loss
from reprdpo_kernels.preference_loss import LOSS_TYPES

ARCHITECTURES = pytest.mark.parametrize("capability", aot.CAPABILITIES)
# What a program keeps beside the logits.
PLAIN = {}
MORE = {"BIAS": True, "SOFTCAP": True, "ENTROPY": True, "STATS": True, "IGNORE": True}
RESIDUALS = {"none": None, "bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32"}


def signature(kernel, constexprs, *, integers="i32", **types):
    """float32 tensors, 64-bit indices and numbers by the endings of their names, but for ``types``."""
    kinds = {}
    for name in kernel.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr"):
            kinds[name] = {"index_ptr": "*i64", "labels_ptr": "*i64:16", "ids_ptr": "*i64:16"}.get(name, "*fp32:16")
        elif name in ("inner", "outer", "factor", "beta", "margin") or name[1:].isdigit():
            kinds[name] = "fp32"
        else:
            kinds[name] = integers
    return kinds | types


def assert_fits(kernel, constexprs, capability, num_warps, **types):
    for option, pointer in (("BIAS", "bias_ptr"), ("POWER", "power_ptr"), ("REFERENCE", "ref_chosen_ptr")):
        if pointer in kernel.arg_names and not constexprs[option]:
            constexprs = constexprs | {pointer: None}
            types.pop(pointer, None)
    cost = aot.compile(kernel, signature(kernel, constexprs, **types), constexprs, capability, num_warps=num_warps)
    assert cost.spills == 0, (constexprs, types, cost)
    assert cost.narrow_rows == 0
    # A program's registers are handed out by 8 a thread.
    assert -(-cost.registers // 8) * 8 * 32 * num_warps <= 65536
    assert cost.shared <= min(aot.MAX_SHARED.values())
    return cost


@ARCHITECTURES
@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("more", [False, True], ids=["plain", "more"])
@pytest.mark.parametrize("vocabulary", [100, 8000, 32000, 256000])
def test_token_residual(vocabulary, more, residual, capability):
    options = dict.fromkeys(("BIAS", "SOFTCAP", "IGNORE", "ENTROPY", "STATS"), False) | (MORE if more else PLAIN)
    options |= {"RESIDUAL": residual != "none", "RESIDUAL_SCALE": 4096.0 if residual == "fp16" else 1.0}
    types = {"residual_ptr": f"{RESIDUALS[residual] or '*fp32'}:16", "logits_stride": "i32:16", "vocabulary": "i32:16"}
    for aligned in (True, False) if residual == "bf16" else (True,):
        hold, block, warps = logprob.plan(vocabulary, capability, more=more, aligned=aligned)
        cost = assert_fits(
            logprob._token_residual_kernel, options | {"HOLD": hold, "BLOCK": block}, capability, warps,
            **(types | {"residual_stride": "i32:16"} if aligned else {"residual_ptr": types["residual_ptr"]}),
        )  # fmt: skip
        if residual == "fp32" and not more and warps > 1:  # over the logits, the label's of which all threads read
            assert re.match(r"l+b", cost.accesses)


@ARCHITECTURES
@pytest.mark.parametrize("alone", ["BIAS", "SOFTCAP", "ENTROPY", "STATS"])
def test_token_residual_with_one_thing_more(alone, capability):
    for vocabulary in (8192, 256000):
        hold, block, warps = logprob.plan(vocabulary, capability, more=True, aligned=True)
        options = dict.fromkeys(("BIAS", "SOFTCAP", "IGNORE", "ENTROPY", "STATS"), False)
        options |= {alone: True, "RESIDUAL": True, "RESIDUAL_SCALE": 1.0, "HOLD": hold, "BLOCK": block}
        assert_fits(logprob._token_residual_kernel, options, capability, warps, residual_ptr="*bf16:16",
                    logits_stride="i32:16", residual_stride="i32:16", vocabulary="i32:16")  # fmt: skip


@ARCHITECTURES
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_standalone_logprob(dtype, capability):
    hold, block, warps = logprob.plan(32000, capability, more=False, aligned=True)
    options = dict.fromkeys(("BIAS", "SOFTCAP", "RESIDUAL", "ENTROPY", "STATS"), False)
    options |= {"IGNORE": True, "RESIDUAL_SCALE": 1.0, "HOLD": hold, "BLOCK": block}
    assert_fits(logprob._token_residual_kernel, options, capability, warps, logits_ptr=f"*{dtype}:16")
    options = {"BIAS": False, "SOFTCAP": False, "IGNORE": True, "LOGP": True, "ENTROPY": False, "BLOCK": 4096}
    types = {"logits_ptr": f"*{dtype}:16", "out_ptr": f"*{dtype}:16"}
    assert_fits(logprob._logits_gradient_kernel, options, capability, 8, **types)


@ARCHITECTURES
@pytest.mark.parametrize("block", [128, 4096])
def test_logits_gradient(block, capability):
    options = {"BIAS": True, "SOFTCAP": True, "IGNORE": True, "LOGP": True, "ENTROPY": True, "BLOCK": block}
    assert_fits(logprob._logits_gradient_kernel, options, capability, max(1, block // 512), out_ptr="*bf16:16")


@ARCHITECTURES
def test_row_scales(capability):
    assert_fits(linear_logprob._row_scales_kernel, {"INDEX": True, "SEQUENCES": True, "BLOCK": 256}, capability, 4)
    for gather, block in itertools.product((False, True), (128, 4096)):
        options = {"GATHER": gather, "SCATTER": not gather, "POWER": gather, "BLOCK": block}
        assert_fits(linear_logprob._scale_rows_kernel, options, capability, max(1, block // 1024), out_ptr="*bf16:16")


@pytest.mark.parametrize(
    ("loss_type", "capability"), [(name, 90) for name in LOSS_TYPES] + [("all", known) for known in aot.CAPABILITIES]
)
def test_preference_loss(loss_type, capability):
    types, first, _ = preference_loss._encode(*zip(*[(name, 1.0) for name in LOSS_TYPES], strict=True))
    if loss_type != "all":
        types, first, _ = preference_loss._encode([loss_type], [1.0])
    options = {"TYPES": types, "FIRST": first, "REFERENCE": True}
    block = preference_loss._PAIR_BLOCK
    assert_fits(preference_loss._preference_loss_kernel, options | {"LENGTHS": True, "BLOCK": block}, capability, 1)
    block = preference_loss._TOKEN_BLOCK
    assert_fits(preference_loss._sequence_preference_kernel, options | {"STATS": True, "BLOCK": block}, capability, 4)
