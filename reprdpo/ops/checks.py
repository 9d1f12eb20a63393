"""Checks on the arguments of the ops: each error names the argument, what came and what was expected."""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.library import CustomOpDef

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensor(name: str, value: Any) -> None:
    """``TypeError`` unless ``value`` is a plain tensor; DTensors and forward-mode tangents are refused."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
    if hasattr(value, "full_tensor"):  # importing DTensor to ask isinstance would cost half a second
        raise TypeError(
            f"{name} is a DTensor; gather it first ({name}.full_tensor(), or call the op inside the forward of the "
            "module that owns it, where FSDP has gathered it)"
        )
    if forward_ad.unpack_dual(value).tangent is not None:
        raise TypeError(f"{name} has a forward-mode tangent, which would be dropped: take gradients by backward")


def check_float_dtype(name: str, tensor: Tensor) -> None:
    """``TypeError`` unless ``tensor`` is float32, bfloat16, float16 or float64."""
    check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, not {_dtype(tensor)}")


def check_integer_dtype(name: str, tensor: Tensor, *, allow_bool: bool = False) -> None:
    """``TypeError`` unless ``tensor`` is of an integer dtype (or bool, where allowed)."""
    check_tensor(name, tensor)
    if tensor.dtype in INTEGER_DTYPES or (allow_bool and tensor.dtype == torch.bool):
        return
    raise TypeError(f"{name} must be an integer{' or bool' if allow_bool else ''} tensor, not {_dtype(tensor)}")


def check_rank(name: str, tensor: Tensor, *ranks: int, meaning: str = "") -> None:
    """``ValueError`` unless ``tensor`` has one of ``ranks`` dimensions; ``meaning`` is the shape in words: "[B, T]"."""
    if tensor.dim() not in ranks:
        expected = meaning or f"a tensor of rank {' or '.join(map(str, ranks))}"
        raise ValueError(f"{name} must be {expected}, not of shape {_shape(tensor)}")


def check_shape(name: str, tensor: Tensor, shape: Sequence[int | None], *, meaning: str = "") -> None:
    """``ValueError`` unless ``tensor.shape`` is ``shape``; None stands for any size, ``meaning`` names the sizes."""
    if tensor.dim() == len(shape) and all(
        wanted is None or size == wanted for size, wanted in zip(tensor.shape, shape, strict=True)
    ):
        return
    wanted = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    raise ValueError(f"{name} must be of shape {f'{meaning} = ' if meaning else ''}{wanted}, not {_shape(tensor)}")


def check_same_dtype(**tensors: Tensor | None) -> None:
    """``TypeError`` unless all the tensors given have the dtype of the first."""
    _check_same("dtype", TypeError, tensors, _dtype)


def check_same_device(**tensors: Tensor | None) -> None:
    """``ValueError`` unless all the tensors given lie on the device of the first."""
    _check_same("device", ValueError, tensors, lambda tensor: str(tensor.device))


def check_finite_scalar(
    name: str, value: Any, *, minimum: float = -math.inf, maximum: float = math.inf, positive: bool = False
) -> None:
    """``TypeError`` unless ``value`` is a number, ``ValueError`` unless it is finite and in ``[minimum, maximum]``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    if not -math.inf < value < math.inf:  # math.isfinite cannot be traced where torch.compile made the number symbolic
        raise ValueError(f"{name} must be finite, not {value}")
    if positive and value <= 0:
        raise ValueError(f"{name} must be greater than 0, not {value}")
    if not minimum <= value <= maximum:
        raise ValueError(f"{name} must be in [{minimum:g}, {maximum:g}], not {value}")


def check_integer(name: str, value: Any, minimum: int | None = None) -> None:
    """``TypeError`` unless ``value`` is an int, ``ValueError`` where it is under ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, not {value}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """``ValueError`` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")


def check_no_grad(name: str, tensor: Tensor) -> None:
    """``ValueError`` where a constant of the op asks for a gradient."""
    if tensor.requires_grad:
        raise ValueError(f"{name} is a constant of this op and gets no gradient; pass {name}.detach()")


def refuse_second_derivative(op: str, backward: CustomOpDef) -> None:
    """Let a gradient of what an op's ``backward`` returned raise, naming the op."""

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(f"{op} has no second derivative")

    backward.register_autograd(refuse)


def _check_same(what: str, error: type[Exception], tensors: dict[str, Tensor | None], read: Any) -> None:
    given = [(name, read(tensor)) for name, tensor in tensors.items() if tensor is not None]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise error(f"{name} must have the {what} of {given[0][0]}, {given[0][1]}, not {value}")


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
