"""Where the weights of many linear SVMs live: in the span of the rows or among the features, at a bounded size.

Shapes: n rows, L layers, D features, M = D + 1 with the intercept's, U unknowns of a problem (n in the Gram form, else
M), b problems; ``layer_b``, ascending, says of which layer each is. All is float64, but for the Gram form's matrices
where float32 is asked for.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

_CG_STEPS = 1000
_CG_TOLERANCE = 1e-2
_DOUBLE = 8
# A block that is read twice stays in a core's cache.
_CACHED_BYTES = 1 << 19


FormName = Literal["gram", "primal", "streamed", "cg"]


class Plan(NamedTuple):
    """How a fit is cut so that what it allocates stays within a budget."""

    form: FormName
    layers: int  # at once
    problems: int  # of a layer, at once
    block_bytes: int  # of features at once


def plan(n: int, L: int, M: int, problems: int, working_bytes: int) -> Plan:
    """The first form that fits: systems n x n if rows are fewer than unknowns, M x M, none.

    Counted for a layer: the matrix its problems share; for a problem: its copy, the system, the factor, LAPACK's copy
    of that, and some vectors. Two blocks of features beside them: one read, one derived from it.
    """
    block = working_bytes // 8
    rest = working_bytes - 2 * block
    square, vectors = min(n, M) ** 2, 40 * n + 8 * M
    sizes: dict[FormName, tuple[int, int]] = {
        "gram": (square, 4 * square + vectors),
        "primal": (n * M, 2 * n * M + 3 * square + vectors),
        "streamed": (0, 3 * square + vectors),
        "cg": (0, vectors + 12 * M),
    }
    order: list[FormName] = ["gram"] if n < M else ["primal", "streamed"]
    form: FormName = next((form for form in order if _DOUBLE * sum(sizes[form]) <= rest), "cg")
    shared, each = (_DOUBLE * size for size in sizes[form])
    together = max(1, min(problems, (rest - shared) // each))
    layers = max(1, min(L, rest // (shared + problems * each))) if together == problems else 1
    return Plan(form, layers, together, block)


class Form(Protocol):
    """Unknowns z [b, U] that stand for weights w; ``image(z)`` is such that ``(u * image(z)).sum(1)`` is w_u . w_z."""

    layers: int
    unknowns: int
    direct: bool  # whether systems are factored, so that `row_solver` is there

    def scores(self, z: Tensor, layer_b: Tensor) -> Tensor:
        """w . x of each row, [b, n]."""
        ...

    def pull(self, row_bN: Tensor, layer_b: Tensor) -> Tensor:
        """The z of ``w = sum_i row_i x_i``."""
        ...

    def image(self, z: Tensor, layer_b: Tensor) -> Tensor:
        """See the class."""
        ...

    def norm2(self, z: Tensor, scores_bN: Tensor) -> Tensor:
        """|w|^2 [b], the scores known."""
        ...

    def solve(self, z: Tensor, image: Tensor, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        """The u of ``w_u + sum_i curvature_i (w_u . x_i) x_i = w_z``; without systems, a point on the way there."""
        ...

    def row_solver(self, inverse_bN: Tensor, layer_b: Tensor) -> Callable[[Tensor], Tensor]:
        """``(X X^T + diag(1 / inverse))^-1`` on [b, n], factored once; rows of inverse 0 give 0."""
        ...

    def weights(self, z: Tensor, row_LN: Tensor) -> "Weights":
        """Those of one problem a layer, computed anew from the features, beside ``w' = sum_i row_i x_i``."""
        ...


class Weights(NamedTuple):
    """Weights w, one problem a layer."""

    coef: Tensor  # [L, D]
    intercept: Tensor  # [L]
    scores: Tensor  # w . x, [L, n]
    norm2: Tensor  # |w|^2, [L]
    distance2: Tensor  # |w - w'|^2, [L]


def make_form(features: Tensor, bias: float, device: torch.device, cut: Plan, *, single: bool = False) -> Form:
    """The form planned, on [n, L, D] features of any floating dtype and device and a constant feature ``bias``.

    ``single``: the Gram form makes and factors its matrices in float32.
    """
    if cut.form == "gram":
        return _Gram(features, bias, device, cut.block_bytes, torch.float32 if single else torch.float64)
    return (_ConjugateGradient if cut.form == "cg" else _Primal)(features, bias, device, cut)


class _Gram:
    """``w = X^T z``, through ``K = X X^T``."""

    direct = True

    def __init__(
        self, features: Tensor, bias: float, device: torch.device, block_bytes: int, dtype: torch.dtype
    ) -> None:
        n, L, _ = features.shape
        self.layers, self.unknowns = L, n
        self._features, self._bias, self._device, self._block_bytes = features, bias, device, block_bytes
        self._K_LNN = torch.full((L, n, n), bias * bias, dtype=dtype, device=device)
        for layer, _, x_Nd in self._columns(dtype, block_bytes):
            self._K_LNN[layer].addmm_(x_Nd, x_Nd.T)
        self._layer_b: Tensor | None = None

    def _columns(self, dtype: torch.dtype, block_bytes: int) -> Iterator[tuple[int, slice, Tensor]]:
        """Each layer's features, some columns at a time; a block is overwritten by the next."""
        n, L, D = self._features.shape
        width = max(1, min(D, block_bytes // (dtype.itemsize * n)))
        buffer = torch.empty(n * width, dtype=dtype, device=self._device)
        for layer in range(L):
            for first in range(0, D, width):
                columns = slice(first, min(first + width, D))
                block = buffer[: n * (columns.stop - first)].view(n, -1)
                yield layer, columns, block.copy_(self._features[:, layer, columns])

    def _kernel(self, layer_b: Tensor) -> Tensor:
        if self._layer_b is not layer_b:
            self._layer_b, self._K_bNN = layer_b, self._K_LNN[:0]  # let go of the copy before the next is made
            self._K_bNN = self._K_LNN[layer_b]
        return self._K_bNN

    def scores(self, z: Tensor, layer_b: Tensor) -> Tensor:
        K_bNN = self._kernel(layer_b)
        return (K_bNN @ z[:, :, None].to(K_bNN.dtype))[:, :, 0].double()

    def pull(self, row_bN: Tensor, layer_b: Tensor) -> Tensor:
        return row_bN

    def image(self, z: Tensor, layer_b: Tensor) -> Tensor:
        return self.scores(z, layer_b)

    def norm2(self, z: Tensor, scores_bN: Tensor) -> Tensor:
        return (z * scores_bN).sum(1)

    def solve(self, z: Tensor, image: Tensor, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        return z - self.row_solver(curvature_bN, layer_b)(image)

    def row_solver(self, inverse_bN: Tensor, layer_b: Tensor) -> Callable[[Tensor], Tensor]:
        K_bNN = self._kernel(layer_b)
        root_bN = inverse_bN.sqrt().to(K_bNN.dtype)
        factor = _factor((K_bNN * root_bN[:, :, None]).mul_(root_bN[:, None, :]))
        return lambda right_bN: (root_bN * _back(factor, root_bN * right_bN.to(root_bN.dtype))).double()

    def weights(self, z: Tensor, row_LN: Tensor) -> Weights:
        coef = z.new_empty(self._features.shape[1:])
        both_L2N = torch.stack([z, z - row_LN], dim=1)
        constant_L2 = self._bias * both_L2N.sum(2)
        norm2_L2 = constant_L2.square()
        scores_LN = (self._bias * constant_L2[:, :1]).repeat(1, z.shape[1])
        for layer, columns, x_Nd in self._columns(torch.float64, min(self._block_bytes, _CACHED_BYTES)):
            both_2d = both_L2N[layer] @ x_Nd
            coef[layer, columns] = both_2d[0]
            norm2_L2[layer] += both_2d.square().sum(1)
            scores_LN[layer].addmv_(x_Nd, both_2d[0])
        return Weights(coef, self._bias * constant_L2[:, 0], scores_LN, *norm2_L2.unbind(1))


class _Primal:
    """``z = (w, intercept / bias)``, through blocks of rows: one that holds all, or many read anew at each pass."""

    direct = True

    def __init__(self, features: Tensor, bias: float, device: torch.device, cut: Plan) -> None:
        n, L, D = features.shape
        self.layers, self.unknowns = L, D + (bias != 0)
        self._features, self._bias, self._device = features, bias, device
        self._height = max(1, min(n, cut.block_bytes // (_DOUBLE * self.unknowns)))
        self._x_LNM: Tensor | None = None
        if cut.form == "primal":
            self._x_LNM = torch.empty(L, n, self.unknowns, dtype=torch.float64, device=device)
            for layer in range(L):
                self._fill(self._x_LNM[layer], features[:, layer])
        self._layer_b: Tensor | None = None

    def _fill(self, block_RM: Tensor, rows_RD: Tensor) -> Tensor:
        D = rows_RD.shape[1]
        block_RM[:, :D] = rows_RD
        block_RM[:, D:] = self._bias
        return block_RM

    def _blocks(self, layer_b: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Problems, rows, and their features [problems, rows, M]; a block may be overwritten by the next."""
        if self._x_LNM is not None:
            if self._layer_b is not layer_b:
                self._layer_b, self._x_bNM = layer_b, self._x_LNM[:0]
                self._x_bNM = self._x_LNM[layer_b]
            yield slice(None), slice(None), self._x_bNM
            return
        if self._layer_b is not layer_b:
            self._layer_b, self._layers = layer_b, layer_b.tolist()
        n = len(self._features)
        buffer = torch.empty(self._height, self.unknowns, dtype=torch.float64, device=self._device)
        for layer in sorted(set(self._layers)):
            problems = [i for i, of in enumerate(self._layers) if of == layer]
            for first in range(0, n, self._height):
                rows = slice(first, min(first + self._height, n))
                block = self._fill(buffer[: rows.stop - first], self._features[rows, layer])
                for i in problems:
                    yield slice(i, i + 1), rows, block[None]

    def scores(self, z: Tensor, layer_b: Tensor) -> Tensor:
        f_bN = z.new_empty(len(z), len(self._features))
        for i, rows, x in self._blocks(layer_b):
            f_bN[i, rows] = (x @ z[i, :, None])[:, :, 0]
        return f_bN

    def pull(self, row_bN: Tensor, layer_b: Tensor) -> Tensor:
        z = row_bN.new_zeros(len(row_bN), self.unknowns)
        for i, rows, x in self._blocks(layer_b):
            z[i] += (row_bN[i, None, rows] @ x)[:, 0]
        return z

    def image(self, z: Tensor, layer_b: Tensor) -> Tensor:
        return z

    def norm2(self, z: Tensor, scores_bN: Tensor) -> Tensor:
        return z.square().sum(1)

    def solve(self, z: Tensor, image: Tensor, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        return _back(self._curved(curvature_bN, layer_b), z)

    def row_solver(self, inverse_bN: Tensor, layer_b: Tensor) -> Callable[[Tensor], Tensor]:
        factor = self._curved(inverse_bN, layer_b)

        def solve(right_bN: Tensor) -> Tensor:
            u = _back(factor, self.pull(inverse_bN * right_bN, layer_b))
            return inverse_bN * (right_bN - self.scores(u, layer_b))

        return solve

    def _curved(self, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        system = curvature_bN.new_zeros(len(layer_b), self.unknowns, self.unknowns)
        for i, rows, x in self._blocks(layer_b):
            scaled = x * curvature_bN[i, rows, None].sqrt()
            system[i].baddbmm_(scaled.mT, scaled)
        return _factor(system)

    def weights(self, z: Tensor, row_LN: Tensor) -> Weights:
        D, layer_L = self._features.shape[2], torch.arange(len(z), device=z.device)
        distance2_L = (z - self.pull(row_LN, layer_L)).square().sum(1)
        scores_LN = self.scores(z, layer_L)
        return Weights(z[:, :D], self._bias * z[:, D:].sum(1), scores_LN, z.square().sum(1), distance2_L)


class _ConjugateGradient(_Primal):
    """The primal without any system: conjugate gradients, preconditioned by the diagonal."""

    direct = False

    def solve(self, z: Tensor, image: Tensor, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        diagonal = torch.ones_like(z)
        for i, rows, x in self._blocks(layer_b):
            diagonal[i] += (curvature_bN[i, None, rows] @ x.square())[:, 0]
        tiny = torch.finfo(z.dtype).tiny
        u, residual = torch.zeros_like(z), z.clone()
        direction = residual / diagonal
        energy = first = (residual * direction).sum(1, keepdim=True)
        for _ in range(_CG_STEPS):
            product = self._curve(direction, curvature_bN, layer_b)
            size = energy / (direction * product).sum(1, keepdim=True).clamp(min=tiny)
            u += size * direction
            residual -= size * product
            step = residual / diagonal
            energy, last = (residual * step).sum(1, keepdim=True), energy
            if bool((energy <= _CG_TOLERANCE**2 * first).all()):
                break
            direction = step + energy / last.clamp(min=tiny) * direction
        return u

    def _curve(self, z: Tensor, curvature_bN: Tensor, layer_b: Tensor) -> Tensor:
        product = z.clone()
        for i, rows, x in self._blocks(layer_b):
            weighted = (x @ z[i, :, None])[:, :, 0] * curvature_bN[i, rows]
            product[i] += (weighted[:, None] @ x)[:, 0]
        return product


def _factor(system: Tensor) -> Tensor:
    """The Cholesky factor of I + system, which is used up."""
    system.diagonal(dim1=1, dim2=2).add_(1)
    return torch.linalg.cholesky_ex(system)[0]


def _back(factor: Tensor, right: Tensor) -> Tensor:
    return torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
