"""A residual's product with a frozen head from the columns that hold all but a little of each row's mass.

Of each row of G the columns may be left out whose ``|G_ij|`` sum to at most ``mass``. Rows that keep about as many are
put into a tile, a tile's rows are multiplied by every column that any of them keeps, and how many those are only the
device knows: the product's loop ends there. Nothing waits for the host, so that a CUDA graph holds the whole; a tile
whose rows need all columns costs the dense product.

Shape suffixes: n rows, t tiles of them, s slices of the vocabulary, D hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from reprdpo_kernels.common import HALF_RESIDUAL_SCALE, capability, check_rows

# What the rounding of a slice's sum could add to the mass is taken off first.
_EXACT_PART = tl.constexpr(1 - 2.0**-12)
# Halvings of the exponents between mass / V and mass: to 1.2 times the largest threshold.
_STEPS = tl.constexpr(6)


@triton.jit
def _thresholds_kernel(
    residual_ptr, thresholds_ptr, counts_ptr, vocabulary, residual_stride, slices, slice_width, mass,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A slice of a row: tau, under which ``|G_ij|`` sum to at most ``mass``, the slice's part, and how many are not.

    Layout: a row's columns lie side by side; a slice of them stays in registers. Bytes an element: it is read.
    """
    program = tl.program_id(0)
    row = (program // slices).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    column = program % slices * slice_width + lane
    inside = (lane < slice_width) & (column < vocabulary)
    size = tl.abs(tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32))
    mass *= _EXACT_PART
    threshold = mass / slice_width  # so many of them are no more than the mass, and one of twice the mass is
    factor = tl.sqrt(2.0 * slice_width)
    for _ in range(_STEPS):
        above = threshold * factor
        threshold = tl.where(tl.sum(tl.where(size < above, size, 0.0), axis=0) <= mass, above, threshold)
        factor = tl.sqrt(factor)
    # A NaN is under no threshold.
    whole = tl.sum(tl.where(size < float("inf"), size, 0.0), axis=0)
    threshold = tl.where(whole <= mass, float("inf"), threshold)
    tl.store(thresholds_ptr + program, threshold)
    tl.store(counts_ptr + program, tl.sum(tl.where(size < threshold, 0, 1), axis=0))


@triton.jit(do_not_specialize=["rows", "slices"])
def _kept_columns_kernel(
    residual_ptr, order_ptr, thresholds_ptr, kept_ptr, rows, vocabulary, residual_stride, slices, slice_width, blocks,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which columns of a block any row of a tile keeps, as bytes [t, V]. Bytes an element: it is read."""
    program = tl.program_id(0)
    tile = (program // blocks).to(tl.int64)
    first = program % blocks * BLOCK
    column = first + tl.arange(0, BLOCK)
    position = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order_ptr + position, mask=position < rows, other=0)
    threshold = tl.load(thresholds_ptr + row * slices + first // slice_width)
    threshold = tl.where(position < rows, threshold, float("inf"))
    mask = (position < rows)[:, None] & (column < vocabulary)[None, :]
    cells = row[:, None] * residual_stride + column[None, :]
    size = tl.abs(tl.load(residual_ptr + cells, mask=mask, other=0.0).to(tl.float32))
    kept = tl.max(tl.where(size < threshold[:, None], 0, 1), axis=0)
    tl.store(kept_ptr + tile * vocabulary + column, kept.to(tl.int8), mask=column < vocabulary)


@triton.jit(do_not_specialize=["rows"])
def _pack_kernel(
    residual_ptr, order_ptr, kept_ptr, columns_ptr, counts_ptr, rows, vocabulary, residual_stride,
    TILE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A few rows of a tile: the columns that it keeps move to the row's front, in their order, and are listed there.

    Bytes an element: it is read, and written where kept.
    """
    first = tl.program_id(0) * GROUP
    position = first + tl.arange(0, GROUP)
    tile = (first // TILE).to(tl.int64)
    row = tl.load(order_ptr + position, mask=position < rows, other=0)
    inside = (position < rows)[:, None]
    cells = residual_ptr + row[:, None] * residual_stride
    count = 0
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        known = column < vocabulary
        kept = tl.load(kept_ptr + tile * vocabulary + column, mask=known, other=0).to(tl.int32)
        target = count + tl.cumsum(kept, axis=0) - kept
        values = tl.load(cells + column[None, :], mask=inside & known[None, :])
        tl.debug_barrier()  # no thread writes what another has yet to read: no target lies behind its column
        tl.store(cells + target[None, :], values, mask=inside & (kept != 0)[None, :])
        if first % TILE == 0:
            tl.store(columns_ptr + tile * vocabulary + target, column, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    if first % TILE == 0:
        tl.store(counts_ptr + tile, count)


@triton.jit
def _add_block(
    product, residual_row, columns, weight_ptr, weight_stride, start, count, d, width, MULTIPLIED: tl.constexpr,
    BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``product + G[:, k] W[columns[k]]`` over a block of k."""
    k = start + tl.arange(0, BLOCK)
    in_width = (d < width)[None, :]
    if MASKED:
        column = tl.load(columns + k, mask=k < count, other=0).to(tl.int64)
        residual = tl.load(residual_row[:, None] + k[None, :], mask=(k < count)[None, :], other=0.0)
        in_width &= (k < count)[:, None]
    else:
        column = tl.load(columns + k).to(tl.int64)
        residual = tl.load(residual_row[:, None] + k[None, :])
    rows = weight_ptr + column * weight_stride
    weight = tl.load(rows[:, None] + d[None, :], mask=in_width, other=0.0)
    return tl.dot(residual.to(MULTIPLIED), weight.to(MULTIPLIED), product, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _packed_product_kernel(
    residual_ptr, order_ptr, columns_ptr, counts_ptr, weight_ptr, product_ptr,
    rows, width, vocabulary, blocks, residual_stride, weight_stride, factor,
    MULTIPLIED: tl.constexpr, TILE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """``factor G W`` of a tile's rows and a block of D, over the tile's list of columns.

    Layout: rows of the weight have their elements side by side, and so do the packed ones of the residual. FLOP:
    2 D a row and listed column; bytes: each tile reads those rows of the weight, each block of D the packed residual.
    """
    program = tl.program_id(0)
    tile = (program // blocks).to(tl.int64)
    position = tile * TILE + tl.arange(0, TILE)
    row = tl.load(order_ptr + position, mask=position < rows, other=0)
    residual_row = residual_ptr + row * residual_stride
    columns = columns_ptr + tile * vocabulary
    d = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    count = tl.load(counts_ptr + tile)
    full = count // BLOCK_V * BLOCK_V
    product = tl.zeros([TILE, BLOCK_D], tl.float32)
    for start in range(0, full, BLOCK_V):
        product = _add_block(
            product,
            residual_row,
            columns,
            weight_ptr,
            weight_stride,
            start,
            count,
            d,
            width,
            MULTIPLIED,
            BLOCK_V,
            False,
        )
    if full < count:
        product = _add_block(
            product, residual_row, columns, weight_ptr, weight_stride, full, count, d, width, MULTIPLIED, BLOCK_V, True
        )
    out = product_ptr + row[:, None] * width + d[None, :]
    mask = (position < rows)[:, None] & (d < width)[None, :]
    tl.store(out, (product * factor).to(product_ptr.dtype.element_ty), mask=mask)


class Config(NamedTuple):
    """Hidden size and columns of a block, warps and stages of the product over tiles of 128 rows."""

    block_d: int
    block_v: int
    warps: int
    stages: int


# By compute capability, in half precision: 128 x 256 fp32 sums fill the registers of 8 warps, 85 FLOP for a byte from
# L2. The list that the weight's rows are found by takes every other stage; the rest are as many as shared memory has
# room for. Chosen by bytes, registers and spills, not yet by measurement on a device.
CONFIGS = {
    80: Config(256, 32, 8, 7),
    86: Config(128, 32, 8, 7),
    90: Config(256, 64, 8, 7),
    100: Config(256, 64, 8, 7),
    120: Config(128, 32, 8, 7),
}
# float32 without TF32 has no tensor core; loads of an element each take registers for their addresses.
CONFIG_FLOAT32, CONFIG_UNALIGNED = Config(64, 32, 8, 5), Config(32, 16, 8, 3)
# Rows that share a list of columns: fewer share less of the weight's traffic, more keep more columns between them.
TILE = 128
# Columns of a row that a program holds in registers.
_HOLD = 16384
_KEPT_BLOCK = 128
_PACK_GROUP, _PACK_BLOCK = 4, 1024


def sparse_residual_product(residual_nV: Tensor, weight_VD: Tensor, mass: float) -> Tensor:
    """``G W`` [n, D] in the weight's dtype, less columns of each row whose ``|G_ij|`` sum to at most ``mass``.

    Consumes G. A row of NaN stays one, and no other is touched. Beside its result it takes 5 bytes for each column and
    128 rows.

    Args:
        residual_nV: ``[n, V]`` float32, bfloat16 or float16 (then times 4096), columns side by side.
        weight_VD: ``[V, D]`` of the same dtype, rows side by side.
    """
    check_rows(residual=residual_nV, weight=weight_VD)
    (rows, vocabulary), width = residual_nV.shape, weight_VD.shape[1]
    product_nD = weight_VD.new_empty(rows, width)
    if product_nD.numel() == 0:
        return product_nD
    scale = HALF_RESIDUAL_SCALE if residual_nV.dtype == torch.float16 else 1.0
    with torch.cuda.device_of(residual_nV):
        thresholds_ns, counts_ns, slice_width = _thresholds(residual_nV, mass * scale)
        order_n = counts_ns.sum(1).argsort(descending=True, stable=True)
        columns_tV, counts_t = _pack(residual_nV, order_n, thresholds_ns, slice_width)
        aligned = all(number % 16 == 0 for number in (width, residual_nV.stride(0), weight_VD.stride(0)))
        config = plan(residual_nV.dtype, capability(residual_nV), aligned=aligned)
        blocks = triton.cdiv(width, config.block_d)
        _packed_product_kernel[(counts_t.shape[0] * blocks,)](
            residual_nV, order_n, columns_tV, counts_t, weight_VD, product_nD,
            rows, width, vocabulary, blocks, residual_nV.stride(0), weight_VD.stride(0), 1.0 / scale,
            MULTIPLIED=_multiplied(residual_nV),
            TILE=TILE, BLOCK_D=config.block_d, BLOCK_V=config.block_v,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return product_nD


def plan(dtype: torch.dtype, capability: int, *, aligned: bool) -> Config:
    """The product's blocks; ``aligned``: rows begin and end at multiples of 16 elements."""
    if not aligned:
        return CONFIG_UNALIGNED
    if dtype == torch.float32:
        return CONFIG_FLOAT32
    return CONFIGS[max(known for known in CONFIGS if known <= max(capability, min(CONFIGS)))]


def _multiplied(tensor: Tensor) -> tl.dtype:
    """The dtype of the product's operands; Triton's interpreter would multiply the bits of bfloat16."""
    return getattr(tl, str(tensor.dtype).removeprefix("torch.")) if tensor.is_cuda else tl.float32


def slices_of(vocabulary: int) -> tuple[int, int, int]:
    """How many slices a row is held in, their width, which blocks of kept columns divide, and that of the registers."""
    slices = triton.cdiv(vocabulary, _HOLD)
    width = triton.cdiv(triton.cdiv(vocabulary, slices), _KEPT_BLOCK) * _KEPT_BLOCK
    return slices, width, triton.next_power_of_2(width)


def _thresholds(residual_nV: Tensor, mass: float) -> tuple[Tensor, Tensor, int]:
    """Thresholds and counts of kept columns [n, s], each slice with its part of the mass, and a slice's width."""
    rows, vocabulary = residual_nV.shape
    slices, width, block = slices_of(vocabulary)
    thresholds_ns = residual_nV.new_empty(rows, slices, dtype=torch.float32)
    counts_ns = residual_nV.new_empty(rows, slices, dtype=torch.int32)
    _thresholds_kernel[(rows * slices,)](
        residual_nV, thresholds_ns, counts_ns, vocabulary, residual_nV.stride(0), slices, width, mass / slices,
        BLOCK=block, num_warps=max(1, min(16, block // 512)), enable_fp_fusion=True,
    )  # fmt: skip
    return thresholds_ns, counts_ns, width


def _pack(residual_nV: Tensor, order_n: Tensor, thresholds_ns: Tensor, slice_width: int) -> tuple[Tensor, Tensor]:
    """Each tile's list of columns and its length, and the residual's rows packed to it, in place."""
    rows, vocabulary = residual_nV.shape
    tiles, blocks = triton.cdiv(rows, TILE), triton.cdiv(vocabulary, _KEPT_BLOCK)
    kept_tV = residual_nV.new_empty(tiles, vocabulary, dtype=torch.int8)
    columns_tV = residual_nV.new_empty(tiles, vocabulary, dtype=torch.int32)
    counts_t = residual_nV.new_empty(tiles, dtype=torch.int32)
    _kept_columns_kernel[(tiles * blocks,)](
        residual_nV, order_n, thresholds_ns, kept_tV, rows, vocabulary, residual_nV.stride(0),
        thresholds_ns.shape[1], slice_width, blocks, TILE=TILE, BLOCK=_KEPT_BLOCK, num_warps=8,
        enable_fp_fusion=True,
    )  # fmt: skip
    _pack_kernel[(triton.cdiv(rows, _PACK_GROUP),)](
        residual_nV, order_n, kept_tV, columns_tV, counts_t, rows, vocabulary, residual_nV.stride(0),
        TILE=TILE, GROUP=_PACK_GROUP, BLOCK=_PACK_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return columns_tV, counts_t
