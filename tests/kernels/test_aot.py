"""The ahead-of-time compiler of the kernel tests says what a kernel costs, and what is wrong with it."""

import pytest

pytest.importorskip("triton")

import aot
import triton
import triton.language as tl


@triton.jit
def _centre_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, x - tl.sum(x, axis=0) / count, mask=at < count)


SIGNATURE = {"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "count": "i32"}


@pytest.mark.parametrize("capability", aot.CAPABILITIES)
def test_small_kernel_fits_and_a_huge_one_spills(capability):
    small = aot.compile(_centre_kernel, SIGNATURE, {"BLOCK": 1024}, capability)
    assert 0 < small.registers < 64
    assert small.spills == 0
    assert 0 < small.shared < 1024
    huge = aot.compile(_centre_kernel, SIGNATURE, {"BLOCK": 65536}, capability, num_warps=4)
    assert huge.spills > 0


@triton.jit
def _rows_kernel(x_ptr, x_stride, WIDE: tl.constexpr):
    row = tl.program_id(0)
    tl.store(x_ptr + (row.to(tl.int64) if WIDE else row) * x_stride, 1.0)


@pytest.mark.parametrize("wide", [False, True])
def test_addresses_of_32_bits_are_told(wide):
    assert aot.compile(_rows_kernel, {"x_ptr": "*fp32", "x_stride": "i32"}, {"WIDE": wide}, 90).narrow_rows == (
        not wide
    )


def test_error_of_the_compiler_is_passed_on():
    with pytest.raises(RuntimeError, match="count"):
        aot.compile(_centre_kernel, {**SIGNATURE, "count": "*fp32"}, {"BLOCK": 1024}, 90)
    with pytest.raises(RuntimeError, match="BLOCK"):
        aot.compile(_centre_kernel, SIGNATURE, {}, 90)
