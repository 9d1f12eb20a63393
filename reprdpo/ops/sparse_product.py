"""A residual's product with a frozen head from the columns that hold all but a little of each row's mass.

Shape suffixes: n tokens of a tile, m flat ones among them, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from reprdpo.ops import reference
from reprdpo.ops.backend import Backend
from reprdpo.ops.head_tiles import Needs, hidden_product, triton_kernels
from reprdpo.ops.reference import HALF_RESIDUAL_SCALE

_REFERENCE_BYTES = 2**24


def check_mass_eps(gradient_mass_eps: float | None, needs: Needs) -> None:
    """Refuse an eps outside (0, 1), and a weight or bias that asks for a gradient."""
    if gradient_mass_eps is None:
        return
    if isinstance(gradient_mass_eps, bool) or not isinstance(gradient_mass_eps, (int, float)):
        raise TypeError(f"gradient_mass_eps must be a number or None, not {type(gradient_mass_eps).__name__}")
    if not 0.0 < gradient_mass_eps < 1.0:
        raise ValueError(
            f"gradient_mass_eps must be in (0, 1), or None for the exact gradient, not {gradient_mass_eps}"
        )
    if needs.weight or needs.bias:
        name = "weight" if needs.weight else "bias"
        raise ValueError(
            f"gradient_mass_eps bounds the gradient of hidden states alone, but {name} requires one too: "
            f"freeze it ({name}.requires_grad_(False)), or leave gradient_mass_eps None"
        )


def sparse_hidden_product(
    kind: Backend, residual_nV: Tensor, weight_VD: Tensor, mass_eps: float, upcast_bytes: int
) -> Tensor:
    """``G W`` [n, D] without columns of each row whose ``|G_ij|`` sum to at most ``mass_eps``; may consume G.

    The reference drops the most, all that are under :func:`reference.mass_threshold`; the native product drops at
    least what 128 steps between powers of ``V^(1/4)`` tell apart, and nothing of a row that keeps over V / 8. Triton's
    drops what all of 128 rows can do without.
    """
    if kind != "reference" and weight_VD.stride(1) != 1:  # a float32 weight may lie otherwise
        weight_VD = weight_VD.contiguous()
    if kind == "triton":
        return triton_kernels("sparse_product").sparse_residual_product(residual_nV, weight_VD, mass_eps)
    if kind == "native":
        return _native_product(residual_nV, weight_VD, mass_eps, upcast_bytes)
    scale = HALF_RESIDUAL_SCALE if residual_nV.dtype == torch.float16 else 1.0
    rows = max(1, _REFERENCE_BYTES // (32 * residual_nV.shape[1]))
    for block_rV in residual_nV.split(rows):
        threshold_r = reference.mass_threshold(block_rV, mass_eps * scale)
        block_rV.masked_fill_(block_rV.abs() < threshold_r.unsqueeze(1), 0)
    return hidden_product("reference", residual_nV, weight_VD, upcast_bytes)


def _native_product(residual_nV: Tensor, weight_VD: Tensor, mass_eps: float, upcast_bytes: int) -> Tensor:
    product_nD, kept_n = torch.ops.reprdpo_native.sparse_residual_product(residual_nV, weight_VD, mass_eps)
    flat_m = (kept_n < 0).nonzero().squeeze(1)
    if flat_m.shape[0] == 0:
        return product_nD
    if 2 * flat_m.shape[0] > residual_nV.shape[0]:  # gathering them would cost what it saves
        dense_nD = hidden_product("reference", residual_nV, weight_VD, upcast_bytes).to(product_nD.dtype)
        return torch.where((kept_n < 0).unsqueeze(1), dense_nD, product_nD)
    dense_mD = hidden_product("reference", residual_nV[flat_m], weight_VD, upcast_bytes)
    return product_nD.index_copy_(0, flat_m, dense_mD.to(product_nD.dtype))
