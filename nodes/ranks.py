"""How the rank of each layer is chosen, as widgets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..engine.lora_command import METHODS
from ..engine.low_rank import RankChoice

_MOST = 4096


def rank_inputs(*, rank: int, unset: str = "amount decides") -> list[io.Input]:
    """The widgets; ``unset`` is what a rank of 0 means."""
    return [
        io.Int.Input(
            "rank",
            default=rank,
            min=0,
            max=_MOST,
            tooltip=f"Rank of every layer; 0: {unset}.",
        ),
        io.Float.Input(
            "amount",
            default=0.0,
            min=0.0,
            max=1e6,
            step=0.01,
            round=False,
            tooltip="How much of each layer is kept, such as 0.95, instead of a rank; 0: unset.",
            advanced=True,
        ),
        io.Combo.Input(
            "method",
            options=list(METHODS),
            advanced=True,
            tooltip="What the amount is of: energy: the squared norm; frobenius: the norm; ratio: "
            "the largest singular value divided by the smallest that is kept; cumulative: the sum "
            "of the singular values.",
        ),
        io.Int.Input(
            "max_rank",
            default=0,
            min=0,
            max=_MOST,
            tooltip="Most that a layer gets with an amount; 0: unset.",
            advanced=True,
        ),
    ]


def chosen_ranks(inputs: Mapping[str, Any]) -> RankChoice:
    """What the widgets mean.

    Raises:
        ConfigError: neither or both of rank and amount are given, or one is out of range.
    """
    return RankChoice(
        rank=inputs["rank"] or None,
        method=inputs["method"],
        amount=inputs["amount"] or None,
        max_rank=inputs["max_rank"] or None,
    )
