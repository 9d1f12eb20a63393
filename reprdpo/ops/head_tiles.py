"""One tile of rows against the lm_head: raw logits, the pass over them, and the products of its residual.

Shape suffixes: N tokens, n tokens of a tile, D hidden size, V vocabulary.
"""

import contextlib
import functools
import importlib
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reprdpo.ops import backend, reference
from reprdpo.ops.backend import Backend
from reprdpo.ops.reference import HALF_RESIDUAL_SCALE, Head, TokenResidual


class Needs(NamedTuple):
    """Which inputs of a head ask for a gradient."""

    hidden: bool
    weight: bool
    bias: bool


def default_tile_bytes(device: torch.device) -> int:
    """256 MiB on the CPU; on CUDA the larger of 1 GiB and 1/32 of the device's memory."""
    if device.type == "cuda":
        return max(2**30, torch.cuda.get_device_properties(device).total_memory // 32)
    return 2**28


_settings = threading.Lock()
_inside = 0
_changed: list[tuple[Any, str, Any]] = []


@contextlib.contextmanager
def exact_matmuls(device: torch.device) -> Iterator[None]:
    """Matmuls in their operands' dtype: no autocast (it reaches into an op's body), no TF32 or bf16 for float32, and
    float16 added up in float32.

    The settings are the process's: of several threads inside, the first changes them and the last puts them back.
    """
    global _inside
    with _settings:
        if _inside == 0:
            _change_settings()
        _inside += 1
    try:
        with torch.amp.autocast(device.type, enabled=False):
            yield
    finally:
        with _settings:
            _inside -= 1
            while _inside == 0 and _changed:
                setattr(*_changed.pop())


def _change_settings() -> None:
    backends: Any = torch.backends
    # The precision of all of a backend, which a matmul's is unless it has its own, is found under these names.
    for matmul, whole in ((backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn)):
        before = matmul.fp32_precision
        if before not in ("none", "ieee"):
            inherited = before == whole.fp32_precision
            _changed.append((matmul, "fp32_precision", "none" if inherited else before))
            matmul.fp32_precision = "ieee"
    if backends.cuda.matmul.allow_fp16_accumulation:
        _changed.append((backends.cuda.matmul, "allow_fp16_accumulation", True))
        backends.cuda.matmul.allow_fp16_accumulation = False


def select_head(op: str, hidden_ND: Tensor, weight_VD: Tensor) -> Backend:
    """The backend of an op over an lm_head; the native one reads weights in rows, else is not asked."""
    kind = backend.select(op, hidden_ND)
    in_rows = weight_VD.stride(1) == 1 or weight_VD.shape[1] <= 1
    return kind if kind != "native" or in_rows else "reference"


def empty_residual(kind: Backend, hidden_ND: Tensor, num_rows: int, vocabulary: int) -> Tensor:
    """Room for a residual [R, V], which the native pass writes transposed."""
    if kind == "native":
        return hidden_ND.new_empty(vocabulary, num_rows).t()
    return hidden_ND.new_empty(num_rows, vocabulary)


class TileCost(NamedTuple):
    """Bytes alive while a tile is worked on: a row's, for its logits, residual and pass, and once a tile."""

    logits: int  # a row's logits, which in the compute dtype are also its residual; of a native pass what it packs
    residual: int  # a row's residual beside them
    work: int  # temporaries of the pass, a row, over `work_rows` rows at once
    work_rows: int
    upcast: int  # a row of a half-precision weight taken up to the compute dtype

    def rows(self, budget: int, *, residual: bool) -> int:
        """Rows whose logits, and residual where asked for, fit the budget."""
        row = self.logits + (self.residual if residual else 0)
        return max(budget // max(1, row + self.work), (budget - self.work_rows * self.work) // max(1, row))


def tile_cost(kind: Backend, hidden_ND: Tensor, head: Head, *, entropy: bool) -> TileCost:
    """What a tile costs: the reference's pass has temporaries; the native one keeps logits of a slab of rows alone."""
    vocabulary, width = head.weight.shape
    dtype = reference.compute_dtype(hidden_ND)
    full_row = vocabulary * dtype.itemsize
    half_row = vocabulary * hidden_ND.dtype.itemsize if hidden_ND.dtype != dtype else 0
    if kind == "native":
        packed = width + 1 + (0 if _vendor_product(hidden_ND) else min(vocabulary, _PACKED_ROWS))
        return TileCost(packed * dtype.itemsize, half_row or full_row, full_row, max(32, 2**24 // full_row), upcast=0)
    # CUDA multiplies half precision as it is, but float16 gradients of the weight pass through float32 blocks.
    by_blocks = half_row and (hidden_ND.device.type == "cpu" or hidden_ND.dtype == torch.float16)
    upcast = max(1, width) * dtype.itemsize if by_blocks else 0
    # Upcast beside a row's logits: its hidden state, and its part of a column block of the residual.
    beside = upcast + dtype.itemsize if upcast else 0
    work = full_row * ((head.softcap is not None) + entropy) + half_row if kind == "reference" else 0
    return TileCost(full_row + beside, half_row, work, _work_rows(hidden_ND.device, full_row), upcast)


def _work_rows(device: torch.device, row_bytes: int) -> int:
    """Rows of the reference's pass: on the CPU what a cache holds."""
    return max(1, (2**22 if device.type == "cpu" else 2**26) // row_bytes)


class TileRows(NamedTuple):
    """Rows of a tile, by position among the tokens; ``ignored`` is None where kernels look at the labels themselves."""

    positions: Tensor
    labels: Tensor
    ignored: Tensor | None
    hidden: Tensor


def gather_rows(kind: Backend, hidden_ND: Tensor, labels_N: Tensor, index_n: Tensor, ignore_index: int) -> TileRows:
    """Rows of a tile; for all but Triton's kernels one whose label is ignored becomes a zero row of label 0, so that
    nothing in it can leak."""
    labels_n, hidden_nD = labels_N[index_n], hidden_ND[index_n]
    if kind == "triton":
        return TileRows(index_n, labels_n, None, hidden_nD)
    ignored_n = labels_n == ignore_index
    return TileRows(
        index_n, labels_n.masked_fill_(ignored_n, 0), ignored_n, hidden_nD.masked_fill_(ignored_n.unsqueeze(1), 0)
    )


class HeadTiles:
    """The lm_head over tiles of at most ``rows`` rows on one backend, whose raw logits share one buffer."""

    def __init__(self, kind: Backend, head: Head, rows: int, upcast_bytes: int, ignore_index: int) -> None:
        self.kind, self.head, self.rows, self.upcast_bytes = kind, head, rows, upcast_bytes
        self.ignore_index = ignore_index
        self._buffer: Tensor | None = None

    def run(
        self,
        rows: TileRows,
        *,
        residual: bool = False,
        entropy: bool = False,
        stats: bool = False,
        out: Tensor | None = None,
    ) -> TokenResidual:
        """Log-probs and what else is asked.

        A residual in the compute dtype lies in ``out``, or in the logits' buffer until the next tile, but a native one
        in memory of its own; in half precision Triton's pass writes it to ``out``, where given.
        """
        head, hidden_nD = self.head, rows.hidden
        if self.kind == "native":
            return TokenResidual(
                *torch.ops.reprdpo_native.linear_token_residual(
                    hidden_nD, head.weight, rows.labels, *head[1:], residual, entropy, stats
                )
            )
        half = hidden_nD.dtype != reference.compute_dtype(hidden_nD)
        raw_nV = self.raw_logits(hidden_nD, None if half else out)
        options: dict[str, Any] = {
            "residual_dtype": hidden_nD.dtype if residual else None,
            "entropy": entropy,
            "stats": stats,
        }
        if self.kind == "reference":
            return _reference_pass(raw_nV, rows.labels, head, **options)
        if half and residual:
            options["out"] = out
        return TokenResidual(
            *triton_kernels("logprob").token_residual(
                raw_nV, rows.labels, *head[1:], **options, ignore_index=self.ignore_index
            )
        )

    def raw_logits(self, hidden_nD: Tensor, out: Tensor | None = None) -> Tensor:
        """``h W^T`` in the compute dtype, from exact products, in ``out`` or the buffer."""
        weight_VD = self.head.weight
        dtype = reference.compute_dtype(hidden_nD)
        if out is None:
            if self._buffer is None:
                self._buffer = hidden_nD.new_empty(max(self.rows, 1), weight_VD.shape[0], dtype=dtype)
            out = self._buffer[: hidden_nD.shape[0]]
        if weight_VD.dtype == dtype:
            return torch.mm(hidden_nD, weight_VD.t(), out=out)
        if hidden_nD.is_cuda:
            return torch.mm(hidden_nD, weight_VD.t(), out_dtype=dtype, out=out)
        hidden_nD = hidden_nD.to(dtype)
        for columns in _weight_blocks(weight_VD, 0, self.upcast_bytes):
            torch.mm(hidden_nD, weight_VD[columns].to(dtype).t(), out=out[:, columns])
        return out


@functools.cache
def triton_kernels(op: str) -> Any:
    """The launchers of an op, imported where they are first wanted."""
    return importlib.import_module(f"reprdpo_kernels.{op}")


def _reference_pass(
    raw_nV: Tensor,
    labels_n: Tensor,
    head: Head,
    *,
    residual_dtype: torch.dtype | None,
    entropy: bool,
    stats: bool,
) -> TokenResidual:
    """The oracle's pass, a few rows at a time, so that its temporaries stay small."""
    rows = _work_rows(raw_nV.device, raw_nV.shape[1] * raw_nV.dtype.itemsize)
    residual_nV = raw_nV if residual_dtype == raw_nV.dtype else raw_nV.new_empty(0)
    if residual_dtype not in (None, raw_nV.dtype):
        residual_nV = torch.empty_like(raw_nV, dtype=residual_dtype)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, raw_nV.shape[0], rows):
        block = slice(start, start + rows)
        part = reference.token_residual(
            raw_nV[block], labels_n[block], *head[1:], residual_dtype=residual_dtype, entropy=entropy, stats=stats
        )
        if residual_dtype not in (None, raw_nV.dtype):
            residual_nV[block] = part.residual
        parts.append(part[:-1])
    # [n] and [3, n] alike are joined along n.
    logp_n, row_stats_3n, entropy_n, top1_n, mean_n = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    return TokenResidual(logp_n, row_stats_3n, entropy_n, top1_n, mean_n, residual_nV)


# Rows of the weight that the native ``G W`` packs the residual of at once, in the compute dtype.
_PACKED_ROWS = 4096

# The two products of a residual G with row scales a. Half-precision operands go to the vendor's GEMM as they are where
# it accumulates in float32; its output is rounded once.


def hidden_product(kind: Backend, residual_nV: Tensor, weight_VD: Tensor, upcast_bytes: int) -> Tensor:
    """``G W`` [n, D], in the compute dtype, or in bfloat16 where the CPU's GEMM rounds to it."""
    dtype = reference.compute_dtype(weight_VD)
    undo = HALF_RESIDUAL_SCALE if weight_VD.dtype == torch.float16 else 1.0
    if _vendor_product(residual_nV):
        return residual_nV @ weight_VD
    if kind == "native":
        product_nD = residual_nV.new_empty(residual_nV.shape[0], weight_VD.shape[1], dtype=dtype)
        scale_n = product_nD.new_full((residual_nV.shape[0],), 1.0 / undo)
        torch.ops.reprdpo_native.residual_hidden_grad(residual_nV, weight_VD, scale_n, product_nD)
        return product_nD
    if residual_nV.is_cuda:
        product_nD = torch.mm(residual_nV, weight_VD, out_dtype=dtype)
    else:
        product_nD = residual_nV.new_zeros(residual_nV.shape[0], weight_VD.shape[1], dtype=dtype)
        for columns in _weight_blocks(weight_VD, residual_nV.shape[0], upcast_bytes):
            product_nD.addmm_(residual_nV[:, columns].to(dtype), weight_VD[columns].to(dtype))
    return product_nD if undo == 1.0 else product_nD.div_(undo)


def scaled_rows(rows_nD: Tensor, scale_n: Tensor, dtype: torch.dtype) -> Tensor:
    """``a * rows``, multiplied in the dtype of a and rounded once."""
    return torch.mul(rows_nD, scale_n.unsqueeze(1)).to(dtype)


class GradientSum:
    """The gradients of hidden, weight and bias, added up over tiles; written once in ``dtype``.

    A single tile's product goes straight there; where several meet, the weight's are added up in the compute dtype,
    from exact products.
    """

    def __init__(
        self,
        kind: Backend,
        hidden_ND: Tensor,
        head: Head,
        needs: Needs,
        *,
        single_tile: bool,
        upcast_bytes: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.kind, self.head, self.needs, self.tokens = kind, head, needs, hidden_ND
        self.single_tile, self.upcast_bytes = single_tile, upcast_bytes
        self.dtype = dtype or hidden_ND.dtype
        self.bias_dtype = dtype if head.bias is None or dtype else head.bias.dtype
        self.hidden = torch.zeros_like(hidden_ND, dtype=self.dtype) if needs.hidden else hidden_ND.new_empty(0)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, residual_nV: Tensor, scale_n: Tensor, index_n: Tensor, hidden_nD: Tensor | None) -> None:
        """A tile of rows at ``index_n``, whose raw logits have the gradient ``a G``; Triton needs no hidden states."""
        if index_n.shape[0] == 0:
            return
        if self.needs.hidden:
            self.add_hidden(
                hidden_product(self.kind, residual_nV, self.head.weight, self.upcast_bytes), scale_n, index_n
            )
        if self.needs.weight:
            self._add_weight(residual_nV, scale_n, index_n, hidden_nD)
        if self.needs.bias:
            bias_V = _column_sum(residual_nV, scale_n)
            self.bias = bias_V if self.bias is None else self.bias.add_(bias_V)

    def add_hidden(self, product_nD: Tensor, scale_n: Tensor, index_n: Tensor) -> None:
        """``a * (G W)`` to its rows."""
        if self.kind == "triton":
            triton_kernels("linear_logprob").scatter_hidden_grad(product_nD, index_n, scale_n, self.hidden)
        else:
            self.hidden.index_copy_(0, index_n, scaled_rows(product_nD, scale_n, self.dtype))

    def finish(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three gradients: zero where no tile came, empty for an input that does not ask."""
        weight_VD, bias_V = self.head.weight, self.head.bias
        weight_grad, bias_grad = weight_VD.new_empty(0), weight_VD.new_empty(0)
        if self.needs.weight:
            total = weight_VD.new_zeros(weight_VD.shape, dtype=self.dtype) if self.weight is None else self.weight
            weight_grad = total.to(self.dtype)
        if self.needs.bias and bias_V is not None:
            bias_grad = (torch.zeros_like(bias_V) if self.bias is None else self.bias).to(self.bias_dtype)
        return self.hidden, weight_grad, bias_grad

    def _add_weight(self, residual_nV: Tensor, scale_n: Tensor, index_n: Tensor, hidden_nD: Tensor | None) -> None:
        """``G^T (a * H)``."""
        compute, dtype = scale_n.dtype, self.head.weight.dtype
        whole = dtype == compute or (dtype == torch.bfloat16 and residual_nV.is_cuda)
        first, native = self.weight is None, self.kind == "native"
        if self.single_tile and not native and (whole or _rounding_gemm(residual_nV)):
            self.weight = torch.mm(residual_nV.t(), self._scaled_hidden(scale_n, index_n, hidden_nD, dtype))
            return
        if self.weight is None:
            kept_in, shape = self.dtype if self.single_tile else compute, self.head.weight.shape
            if native:  # in memory that serves the next step's as well
                self.weight = torch.ops.reprdpo_native.new_weight_grad(self.head.weight, kept_in)
            else:
                self.weight = residual_nV.new_empty(shape, dtype=kept_in)
        if native:
            if dtype == torch.float16:
                scale_n = scale_n / HALF_RESIDUAL_SCALE
            torch.ops.reprdpo_native.residual_weight_grad(residual_nV, hidden_nD, scale_n, self.weight, not first)
            return
        if whole:
            rows_nD = self._scaled_hidden(scale_n, index_n, hidden_nD, dtype)
            options: dict[str, Any] = {} if dtype == compute else {"out_dtype": compute}
            # With beta = 0 what the fresh memory holds is not read.
            torch.addmm(self.weight, residual_nV.t(), rows_nD, beta=0 if first else 1, out=self.weight, **options)
            return
        rows_nD, undo = self._rows_in_reach(residual_nV, scale_n, index_n, hidden_nD)
        for columns in _weight_blocks(self.head.weight, residual_nV.shape[0], self.upcast_bytes):
            block_vn = residual_nV[:, columns].t()
            if residual_nV.is_cuda:
                product_vD = torch.mm(block_vn, rows_nD, out_dtype=compute)
            else:
                product_vD = block_vn.to(compute) @ rows_nD.to(compute)
            if undo is not None:
                product_vD *= undo
            if first:
                self.weight[columns] = product_vD
            else:
                self.weight[columns] += product_vD

    def _scaled_hidden(
        self,
        scale_n: Tensor,
        index_n: Tensor,
        hidden_nD: Tensor | None,
        dtype: torch.dtype,
        power: Tensor | None = None,
    ) -> Tensor:
        """``a * H``, brought up by a power of two where one is given."""
        if self.kind == "triton":
            return triton_kernels("linear_logprob").scale_hidden(self.tokens, index_n, scale_n, dtype, power=power)
        assert hidden_nD is not None
        return scaled_rows(hidden_nD, scale_n if power is None else scale_n * power, dtype)

    def _rows_in_reach(
        self, residual_nV: Tensor, scale_n: Tensor, index_n: Tensor, hidden_nD: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """``a * H`` for a product by blocks, and what undoes the powers of two in it and in a float16 residual.

        CUDA multiplies it in float16, brought up by the power that makes the largest |a| about 1.
        """
        if self.head.weight.dtype != torch.float16:
            return self._scaled_hidden(scale_n, index_n, hidden_nD, scale_n.dtype), None
        if not residual_nV.is_cuda:
            undo = scale_n.new_full((1,), 1.0 / HALF_RESIDUAL_SCALE)
            return self._scaled_hidden(scale_n, index_n, hidden_nD, scale_n.dtype), undo
        power, undo = _power_in_reach(scale_n)
        rows_nD = self._scaled_hidden(scale_n, index_n, hidden_nD, torch.float16, power)
        return rows_nD, undo / HALF_RESIDUAL_SCALE


def _power_in_reach(scale_n: Tensor) -> tuple[Tensor, Tensor]:
    """The power of two that brings the largest |a| to about 1, [1], and its inverse: both finite, whatever a is."""
    one = torch.ones_like(scale_n[:1])
    exponent = torch.frexp(scale_n.abs().amax()).exponent.clamp(-126, 127)
    return torch.ldexp(one, -exponent), torch.ldexp(one, exponent)


def _column_sum(residual_nV: Tensor, scale_n: Tensor) -> Tensor:
    """``G^T a`` [V] in the compute dtype, some rows upcast at a time."""
    total_V = scale_n.new_zeros(residual_nV.shape[1])
    rows = _work_rows(residual_nV.device, residual_nV.shape[1] * scale_n.dtype.itemsize)
    for residual_rV, scale_r in zip(residual_nV.split(rows), scale_n.split(rows), strict=True):
        total_V += scale_r @ residual_rV.to(scale_n.dtype)
    return total_V.div_(HALF_RESIDUAL_SCALE) if residual_nV.dtype == torch.float16 else total_V


def _vendor_product(tensor: Tensor) -> bool:
    """Whether the vendor's GEMM multiplies the residual of such hidden states as it is, into the same dtype."""
    return tensor.dtype == reference.compute_dtype(tensor) or _rounding_gemm(tensor)


def _rounding_gemm(tensor: Tensor) -> bool:
    """Whether the CPU multiplies bfloat16 as it is: sums in float32, the output rounded."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and _mkldnn_bf16()


@functools.cache
def _mkldnn_bf16() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _weight_blocks(weight_VD: Tensor, beside: int, upcast_bytes: int) -> Iterator[slice]:
    """Rows of the weight whose upcast, with ``beside`` more numbers each, fits ``upcast_bytes``; at least one."""
    vocabulary, width = weight_VD.shape
    step = max(1, upcast_bytes // (max(1, width + beside) * reference.compute_dtype(weight_VD).itemsize))
    for start in range(0, vocabulary, step):
        yield slice(start, min(start + step, vocabulary))
