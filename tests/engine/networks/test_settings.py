from __future__ import annotations

import pytest
from pack.engine.networks.settings import Dropouts, LayerSettings


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [("lora", {"rank": 0}, "rank is 0"), ("loha", {"decompose": True}, "not a loha")],
)
def test_settings_that_do_not_go_together_are_refused(
    kind: str, options: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LayerSettings(kind, **{"rank": 1, "alpha": 1.0, **options})  # pyright: ignore


@pytest.mark.parametrize("options", [{"neuron": 1.0}, {"rank": -0.1}, {"module": 2}])
def test_a_probability_outside_of_its_range_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="must be in"):
        Dropouts(**options)
