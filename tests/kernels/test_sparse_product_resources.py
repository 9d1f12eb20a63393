"""Every configuration of the sparse product's kernels compiles for each architecture, and spills nothing."""

import re

import pytest
import torch

pytest.importorskip("triton")

import aot
from reprdpo_kernels import sparse_product

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONSTANTS = {"rows": "i32", "slices": "i32", "slice_width": "i32:16", "blocks": "i32", "mass": "fp32", "factor": "fp32"}
POINTERS = {"order_ptr": "*i64:16", "kept_ptr": "*i8:16", "columns_ptr": "*i32:16", "counts_ptr": "*i32:16"}


def cost_of(kernel, dtype, capability, constexprs, *, aligned=True, **options):
    types = CONSTANTS | POINTERS | {"thresholds_ptr": "*fp32:16"}
    types |= dict.fromkeys(("residual_ptr", "weight_ptr", "product_ptr"), f"*{dtype}:16")
    sizes = dict.fromkeys(("vocabulary", "width", "residual_stride", "weight_stride"), "i32:16" if aligned else "i32")
    signature = {name: (types | sizes)[name] for name in kernel.arg_names if name not in constexprs}
    cost = aot.compile(kernel, signature, constexprs, capability, **options)
    assert cost.spills == 0, (constexprs, cost)
    # A program's registers are handed out by 8 a thread.
    assert -(-cost.registers // 8) * 8 * 32 * options["num_warps"] <= 65536
    assert cost.shared <= aot.MAX_SHARED[capability]
    return cost


OTHERS = [(86, "bf16", True), *((known, "bf16", False) for known in aot.CAPABILITIES)]
OTHERS += [
    (known, dtype, aligned) for known in aot.CAPABILITIES for dtype in ("fp16", "fp32") for aligned in (True, False)
]


@pytest.mark.parametrize(
    ("capability", "dtype", "aligned"),
    [(known, "bf16", True) for known in aot.CAPABILITIES]
    + [pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS],
)
def test_packed_product(capability, dtype, aligned):
    config = sparse_product.plan(DTYPES[dtype], capability, aligned=aligned)
    blocks = {"TILE": sparse_product.TILE, "BLOCK_D": config.block_d, "BLOCK_V": config.block_v}
    multiplied = f"tl.{str(DTYPES[dtype]).removeprefix('torch.')}"
    cost_of(
        sparse_product._packed_product_kernel, dtype, capability, blocks | {"MULTIPLIED": multiplied},
        aligned=aligned, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


BEFORE = [(known, "bf16", True) for known in aot.CAPABILITIES] + [(90, "fp16", True)]
OTHERS_BEFORE = [
    (known, dtype, aligned)
    for known in aot.CAPABILITIES
    for dtype in ("bf16", "fp16", "fp32")
    for aligned in (True, False)
    if (known, dtype, aligned) not in BEFORE
]


@pytest.mark.parametrize(
    ("capability", "dtype", "aligned"),
    [*BEFORE, *(pytest.param(*each, marks=pytest.mark.slow) for each in OTHERS_BEFORE)],
)
def test_what_goes_before(capability, dtype, aligned):
    cost_of(sparse_product._thresholds_kernel, dtype, capability, {"BLOCK": 16384}, aligned=aligned, num_warps=16)
    tile = {"TILE": sparse_product.TILE}
    cost_of(
        sparse_product._kept_columns_kernel, dtype, capability, tile | {"BLOCK": sparse_product._KEPT_BLOCK},
        aligned=aligned, num_warps=8,
    )  # fmt: skip
    pack = {"GROUP": sparse_product._PACK_GROUP, "BLOCK": sparse_product._PACK_BLOCK}
    packed = cost_of(sparse_product._pack_kernel, dtype, capability, tile | pack, aligned=aligned, num_warps=4)
    assert "s" in packed.accesses
    assert not re.search(r"l[^b]*s", packed.accesses), "a row is packed over what a thread has yet to read"
