"""What several kernels share: arithmetic, a float16 residual's scale, and how launchers look at their tensors."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# float16 has no exponents for a softmax's tail: its residual is kept times this.
HALF_RESIDUAL_SCALE = 4096.0


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, whose relative error stays at rounding as x goes to 0."""
    one_plus = 1.0 + x
    kept = one_plus - 1.0
    return tl.where(kept == 0.0, x, tl.log(one_plus) * (x / tl.where(kept == 0.0, 1.0, kept)))


def capability(tensor: Tensor) -> int:
    """90 for compute capability 9.0; that of the oldest device served where there is none."""
    if not tensor.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def check_rows(**tensors: Tensor) -> None:
    """``ValueError`` unless the columns of each tensor lie side by side; its rows may have any stride."""
    for name, tensor in tensors.items():
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have its columns side by side, not strides {tensor.stride()}")


def dense(*tensors: Tensor | None) -> Any:
    """Each as kernels read it that are told no stride; None stays."""
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]
