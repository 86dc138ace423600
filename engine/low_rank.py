"""Matrices of low rank: the best approximation of a product or a difference, and how good it is.

The best approximation of rank R keeps the R largest singular values (Eckart and Young 1936), and
its error in the Frobenius norm is what the others amount to.

Shapes: O rows, I columns (of a convolution's weight, inputs times kernel), R rank, S sketch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ConfigError

# What rounding in float64 leaves, as a part of the norm of the factors.
_ROUNDING = 1e-14
# Power iterations end when one gains less than this part of the squared error that is left.
_GAIN = 3e-3
_MOST_ITERATIONS = 8
# A squared error below this part of the squared norm is lost in a difference of float32 norms.
_UNRESOLVED = 1e-3
_CHUNK_VALUES = 2**24


@dataclass(frozen=True)
class LowRank:
    """``up`` [O, R] times ``down`` [R, I], in float32.

    ``relative_error`` is that of the product, as a part of the whole matrix's norm; it is 0 for a
    matrix of zeros.
    """

    up_OR: Tensor
    down_RI: Tensor
    singular_values: Tensor
    relative_error: float


@dataclass(frozen=True)
class Decomposition:
    """The leading part of a singular value decomposition, on the CPU in float64.

    Args:
        singular_R: in descending order.
        rest: squared norm of what is not in it; 0 if it is complete.
    """

    left_OR: Tensor
    singular_R: Tensor
    right_RI: Tensor
    rest: float = 0.0

    @property
    def squared_norm(self) -> float:
        """Of the whole matrix."""
        return float(self.singular_R.square().sum()) + self.rest

    def relative_error(self, rank: int) -> float:
        """Of the best approximation of this rank."""
        left_out = float(self.singular_R[rank:].square().sum()) + self.rest
        return math.sqrt(left_out / self.squared_norm) if left_out else 0.0

    def truncated(self, rank: int) -> LowRank:
        """The best approximation of this rank, or of a lower one if that is as good.

        Each singular value is divided evenly between both sides, which keeps their entries in
        the range of half precision. A matrix of zeros has rank 1.
        """
        rank = max(1, int((self.singular_R[:rank] > 0).sum()))
        root = self.singular_R[:rank].sqrt()
        up_OR = (self.left_OR[:, :rank] * root).float()
        down_RI = (root[:, None] * self.right_RI[:rank]).float()
        return LowRank(up_OR, down_RI, self.singular_R[:rank], self.relative_error(rank))


def decompose_product(up_OR: Tensor, down_RI: Tensor) -> Decomposition:
    """The complete decomposition of ``up down``, which is not formed.

    Costs (O + I) R^2: both factors are reduced to triangles, whose product has R rows and columns.
    Singular values that are nothing but rounding are left out, all but the first.
    """
    left_OR, left_RR = torch.linalg.qr(up_OR.to("cpu", torch.float64))
    right_IR, right_RR = torch.linalg.qr(down_RI.to("cpu", torch.float64).mT)
    inner_left, singular_R, inner_right = torch.linalg.svd(
        left_RR @ right_RR.mT, full_matrices=False
    )
    noise = _ROUNDING * float(left_RR.norm() * right_RR.norm())
    rank = max(1, int((singular_R > noise).sum()))
    singular_R = torch.where(singular_R > noise, singular_R, 0)[:rank]
    return Decomposition(
        left_OR @ inner_left[:, :rank], singular_R, inner_right[:rank] @ right_IR.mT
    )


def decompose_kronecker(
    first: Decomposition, second: Decomposition, *, limit: int | None = None
) -> Decomposition:
    """The decomposition of the Kronecker product of two matrices that are decomposed completely.

    Its singular values are all products of theirs (Van Loan 2000, "The ubiquitous Kronecker
    product"), so that it costs nothing but sorting them. Only the ``limit`` largest are kept.
    """
    products = torch.outer(first.singular_R, second.singular_R).flatten()
    order = products.argsort(descending=True)
    kept, others = order[:limit], order[limit:] if limit else order[:0]
    from_first = kept.div(len(second.singular_R), rounding_mode="floor")
    from_second = kept % len(second.singular_R)
    left_OR = _kronecker_columns(first.left_OR[:, from_first], second.left_OR[:, from_second])
    right_IR = _kronecker_columns(first.right_RI[from_first].mT, second.right_RI[from_second].mT)
    rest = float(products[others].square().sum())
    return Decomposition(left_OR, products[kept], right_IR.mT, rest)


def _kronecker_columns(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product of each column with the one beside it."""
    return (first[:, None] * second[None]).flatten(0, 1)


def truncate(up_OR: Tensor, down_RI: Tensor, *, rank: int) -> LowRank:
    """The best approximation of ``up down`` of this rank, as accurate as float64 allows."""
    return decompose_product(up_OR, down_RI).truncated(rank)


def decompose(
    matrix_OI: Tensor, *, rank: int, generator: torch.Generator, exact_below: int = 256
) -> Decomposition:
    """The ``rank`` largest singular values of a matrix, and their vectors.

    Exact where the shorter side is at most ``exact_below``, or ``rank`` is more than a quarter of
    it. Otherwise by subspace iteration from a random sketch (Halko et al. 2011, arXiv:0909.4061,
    algorithm 4.4), on the matrix's device in float32, until another iteration would lower the
    error by less than 0.15 %. The error was then at most 0.3 % larger than the best possible one,
    for pure noise, and 0.05 % for spectra that fall off. What is found is never larger than the
    true singular values, and `relative_error` is the true error of it, not an estimate.

    Args:
        generator: of the CPU; the sketch is drawn from it.
    """
    shorter = min(matrix_OI.shape)
    if shorter <= exact_below or 4 * rank > shorter:
        left, singular, right = torch.linalg.svd(
            matrix_OI.to("cpu", torch.float64), full_matrices=False
        )
        rest = float(singular[rank:].square().sum())
        return Decomposition(left[:, :rank], singular[:rank], right[:rank], rest)
    matrix_OI = matrix_OI.float()
    num_sketch = min(shorter, rank + max(10, rank // 2))
    sketch_IS = torch.randn(matrix_OI.shape[1], num_sketch, generator=generator)
    total = squared_norm(matrix_OI)
    basis_OS = _orthonormal(matrix_OI @ sketch_IS.to(matrix_OI.device))
    right_IS, core_SS = _projected(matrix_OI, basis_OS)
    captured = _captured(core_SS, rank)
    for _ in range(_MOST_ITERATIONS):
        basis_OS = _orthonormal(matrix_OI @ right_IS)
        right_IS, core_SS = _projected(matrix_OI, basis_OS)
        before, captured = captured, _captured(core_SS, rank)
        if captured - before <= _GAIN * max(0.0, total - captured) + 1e-7 * total:
            break
    return _from_basis(matrix_OI, basis_OS, right_IS, core_SS, rank=rank, total=total)


def _projected(matrix_OI: Tensor, basis_OS: Tensor) -> tuple[Tensor, Tensor]:
    """``matrix^T basis`` as orthonormal columns and a triangle in float64."""
    right_IS, core_SS = torch.linalg.qr(matrix_OI.mT @ basis_OS)
    return right_IS, core_SS.to("cpu", torch.float64)


def _captured(core_SS: Tensor, rank: int) -> float:
    """Squared norm of the best approximation within the basis."""
    return float(torch.linalg.svdvals(core_SS)[:rank].square().sum())


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix).Q


def _from_basis(
    matrix_OI: Tensor,
    basis_OS: Tensor,
    right_IS: Tensor,
    core_SS: Tensor,
    *,
    rank: int,
    total: float,
) -> Decomposition:
    """Decomposes what the basis captures, ``basis core^T right^T``."""
    inner_left, singular, inner_right = torch.linalg.svd(core_SS.mT)
    left_OR = basis_OS.to("cpu", torch.float64) @ inner_left[:, :rank]
    right_RI = inner_right[:rank] @ right_IS.to("cpu", torch.float64).mT
    singular_R = singular[:rank]
    rest = total - float(singular_R.square().sum())
    if rest < _UNRESOLVED * total:
        up_OR = (left_OR * singular_R).to(matrix_OI)
        rest = squared_error(matrix_OI, up_OR, right_RI.to(matrix_OI))
    return Decomposition(left_OR, singular_R, right_RI, rest)


def squared_norm(matrix_OI: Tensor) -> float:
    """Sum of the squares, added up in float64."""
    rows = max(1, _CHUNK_VALUES // max(1, matrix_OI.shape[1]))
    return sum(_squared(part) for part in matrix_OI.split(rows))


def squared_error(matrix_OI: Tensor, up_OR: Tensor, down_RI: Tensor) -> float:
    """Squared norm of ``matrix - up down``, computed in float32, a few rows at a time."""
    rows = max(1, _CHUNK_VALUES // max(1, matrix_OI.shape[1]))
    down_RI = down_RI.float()
    return sum(
        _squared(torch.addmm(part.float(), up.float(), down_RI, alpha=-1))
        for part, up in zip(matrix_OI.split(rows), up_OR.split(rows), strict=True)
    )


def product_squared_norm(up_OR: Tensor, down_RI: Tensor) -> float:
    """Squared norm of ``up down``, which is not formed.

    Its rounding error is at most about 1e-15 of the squared product of the factors' norms.
    """
    up_OR, down_RI = up_OR.to("cpu", torch.float64), down_RI.to("cpu", torch.float64)
    return max(0.0, float(((up_OR.mT @ up_OR) * (down_RI @ down_RI.mT)).sum()))


def _squared(matrix: Tensor) -> float:
    # Row by row, as one sum in float32 over millions of squares loses digits.
    return float(torch.linalg.vector_norm(matrix.float(), dim=1).cpu().double().square().sum())


# How many singular values to keep

# From singular values [R] in descending order, and an amount, to a number of them.
_Count = Callable[[Decomposition, float], int]


def _by_energy(found: Decomposition, amount: float) -> int:
    """Smallest rank that keeps this part of the squared norm."""
    squares = found.singular_R.square()
    # Summed from the smallest, so that what is left out keeps its digits. An amount such as
    # 0.8 ** 2 is not exact itself.
    left_out = squares.flip(0).cumsum(0).flip(0) + found.rest
    allowed = (1 - amount) * (1 + 1e-12) * found.squared_norm
    return int((left_out > allowed).sum())


def _by_frobenius(found: Decomposition, amount: float) -> int:
    """Smallest rank that keeps this part of the norm."""
    return _by_energy(found, amount**2)


def _by_ratio(found: Decomposition, amount: float) -> int:
    """Those larger than the largest divided by ``amount``."""
    return int((found.singular_R > found.singular_R[0] / amount).sum())


def _by_cumulative(found: Decomposition, amount: float) -> int:
    """Smallest rank that keeps this part of the sum of all singular values."""
    left_out = found.singular_R.flip(0).cumsum(0).flip(0)
    return int((left_out > (1 - amount) * (1 + 1e-12) * left_out[0]).sum())


METHODS: dict[str, _Count] = {
    "energy": _by_energy,
    "frobenius": _by_frobenius,
    "ratio": _by_ratio,
    "cumulative": _by_cumulative,
}


def rank_for(found: Decomposition, *, method: str, amount: float) -> int:
    """How many singular values a rule of `METHODS` keeps, at least 1."""
    return max(1, METHODS[method](found, amount))


@dataclass(frozen=True)
class RankChoice:
    """How the rank of each layer is chosen: a fixed one, or by what is kept of the layer.

    ``frobenius``, ``ratio`` and ``cumulative`` are the rules that sd-scripts calls ``sv_fro``,
    ``sv_ratio`` and ``sv_cumulative``.

    Args:
        rank: the same for all layers.
        amount: what ``method`` takes: for ``energy`` the part of the squared norm to keep, for
            ``frobenius`` of the norm, for ``cumulative`` of the sum of the singular values, each
            in (0, 1]; for ``ratio`` what the largest singular value is divided by to give the
            smallest that is kept, above 1.
        max_rank: no layer gets more.

    Raises:
        ConfigError: not exactly one of ``rank`` and ``amount`` is given, or one is out of range.
    """

    rank: int | None = None
    method: str = "energy"
    amount: float | None = None
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.amount is None):
            given = "both are given" if self.rank is not None else "neither is given"
            raise ConfigError(f"give either rank or amount: {given}")
        for name, value in (("rank", self.rank), ("max_rank", self.max_rank)):
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: it must be at least 1")
        if self.method not in METHODS:
            raise ConfigError(
                f"method = {self.method!r} is unknown; choose one of {', '.join(METHODS)}"
            )
        if self.amount is None:
            return
        if self.method == "ratio":
            if not 1 < self.amount < math.inf:
                raise ConfigError(f"amount = {self.amount}: for method ratio it must be above 1")
        elif not 0 < self.amount <= 1:
            raise ConfigError(
                f"amount = {self.amount}: for method {self.method} it must be above 0, at most 1"
            )

    @property
    def limit(self) -> int | None:
        """No layer gets a higher rank; None if there is no limit."""
        given = [value for value in (self.rank, self.max_rank) if value is not None]
        return min(given, default=None)

    def of(self, found: Decomposition) -> int:
        """The rank of a layer with these singular values."""
        rank = len(found.singular_R)
        if self.amount is not None:
            rank = rank_for(found, method=self.method, amount=self.amount)
        return min(rank, self.limit or rank, len(found.singular_R))
