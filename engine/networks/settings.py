"""What is chosen for an adapter before it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["lora", "loha", "lokr"]


@dataclass(frozen=True)
class LayerSettings:
    """The adapter of one published layer, scaled by ``alpha / rank``.

    Args:
        factor: of LoKr: a size for the smaller Kronecker factor, see `lokr.factorization`.
        full_matrix: of LoKr: the larger Kronecker factor is whole whatever the rank; as it is
            anyway where the rank would save nothing, its scale is 1 then.
        decompose: of LoRA on linear layers: a magnitude of each input column is trained, too
            (DoRA, Liu et al. 2024, arXiv:2402.09353).

    Raises:
        ValueError: the choices do not go together.
    """

    kind: Kind
    rank: int
    alpha: float
    factor: int = -1
    full_matrix: bool = False
    decompose: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but must be at least 1")
        if self.decompose and self.kind != "lora":
            raise ValueError(f"only a LoRA can be decomposed, not a {self.kind}")


@dataclass(frozen=True)
class Dropouts:
    """Probabilities that a part of an adapter does nothing in a step of training.

    Args:
        neuron: of each value between the two factors of a LoRA.
        rank: of each rank of a LoRA, per sample; of each output row of a LoHa or LoKr.
        module: of a whole adapter, at each use. What is left is not scaled up.

    Raises:
        ValueError: one is not in [0, 1).
    """

    neuron: float = 0.0
    rank: float = 0.0
    module: float = 0.0

    def __post_init__(self) -> None:
        for name, probability in vars(self).items():
            if not 0 <= probability < 1:
                raise ValueError(f"{name} dropout is {probability}, but must be in [0, 1)")

    @property
    def any(self) -> bool:
        return bool(self.neuron or self.rank or self.module)
