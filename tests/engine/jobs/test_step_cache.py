"""Drawing with MagCache, as the shell asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.architectures.flux_kontext import FluxKontext
from pack.engine.errors import ConfigError
from pack.engine.events import Event, Message
from pack.engine.jobs import generate
from pack.engine.magcache_curves import parse_ratios
from pack.tests.engine.jobs import tiny
from PIL import Image, ImageChops

PROMPTS = ["a red star", "a blue ring"]
STEPS = 20
# Of the specification, for 25 steps.
EXAMPLE = (
    "1.00000,1.26562,1.08594,1.02344,1.00781,1.01562,1.01562,1.03125,1.04688,1.00781,1.03125,"
    "1.00000,1.01562,1.01562,1.02344,1.01562,0.98438,1.05469,0.98438,0.97266,1.03125,0.96875,"
    "0.93359,0.95703,0.77734"
)


class Drawn:
    """Pictures of a job and what it told."""

    def __init__(self, model: Path, folder: Path, **changes: Any) -> None:
        settings = tiny.model_settings(model) | {
            "prompt": PROMPTS,
            "image_size": (48, 32),
            "infer_steps": STEPS,
            "mixed_precision": "no",
            "save_path": folder,
        }
        events: list[Event] = []
        self.paths = generate.run(tiny.config(settings | changes), events.append)
        self.told = [event.text for event in events if isinstance(event, Message)]

    def difference(self, other: Drawn) -> int:
        """The largest one of any value of any picture."""
        found = 0
        for first, second in zip(self.paths, other.paths, strict=True):
            with Image.open(first) as one, Image.open(second) as two:
                extremes = ImageChops.difference(one.convert("RGB"), two.convert("RGB"))
                found = max(found, *(high for _, high in extremes.getextrema()))
        return found


@pytest.fixture
def block_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The first block of every model counts its calls."""
    calls = [0]
    load = FluxKontext.load_transformer

    def counting(*arguments: Any, **options: Any) -> torch.nn.Module:
        transformer = load(*arguments, **options)
        first = FluxKontext().blocks(transformer)[0]
        first.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
        return transformer

    monkeypatch.setattr(FluxKontext, "load_transformer", counting)
    yield calls


def test_a_calibration_changes_no_picture_and_what_it_measures_is_found_by_itself(
    model: Path, tmp_path: Path, block_calls: list[int]
) -> None:
    plain = Drawn(model, tmp_path / "plain")
    curves = {"magcache_curves": tmp_path / "curves"}
    measured = Drawn(model, tmp_path / "measured", magcache_calibration=True, **curves)
    assert measured.difference(plain) == 0
    [ratios] = [text.partition("= ")[2] for text in measured.told if "magcache_mag_ratios" in text]
    assert len(parse_ratios(ratios)) == STEPS and ratios.startswith("1.00000,")

    every_step = block_calls[0] // 2
    block_calls[0] = 0
    auto = Drawn(model, tmp_path / "auto", magcache_mag_ratios="auto", magcache_k=2, **curves)
    [plan] = [text for text in auto.told if text.startswith("MagCache computes")]
    computed = int(plan.split()[2])
    assert computed < STEPS and block_calls[0] == every_step * computed // STEPS
    named = Drawn(model, tmp_path / "named", magcache_mag_ratios=ratios, magcache_k=2)
    assert plan in named.told and named.difference(auto) == 0


def test_the_example_of_the_specification_computes_9_of_25_steps(
    model: Path, tmp_path: Path
) -> None:
    drawn = Drawn(model, tmp_path, infer_steps=25, magcache_mag_ratios=EXAMPLE)
    assert any("computes 9 of 25 steps, about 2.8x" in text for text in drawn.told)
    by_number = Drawn(
        model, tmp_path, infer_steps=25, magcache_mag_ratios=EXAMPLE, magcache_steps=12
    )
    assert any("computes 12 of 25 steps" in text for text in by_number.told)


def test_a_plan_that_leaves_out_nothing_changes_no_bit(model: Path, tmp_path: Path) -> None:
    plain = Drawn(model, tmp_path / "plain")
    full = Drawn(model, tmp_path / "full", magcache_mag_ratios="0", magcache_k=0)
    assert any("computes all 20 steps" in text for text in full.told)
    assert full.difference(plain) == 0


def test_a_line_through_computed_steps_is_nearer_than_reusing_the_last_one(
    model: Path, tmp_path: Path
) -> None:
    plain = Drawn(model, tmp_path / "plain")
    reused, line = (
        Drawn(model, tmp_path / name, magcache_steps=10, magcache_prediction=name)
        for name in ("reuse", "linear")
    )
    assert line.difference(plain) <= reused.difference(plain) > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"magcache_mag_ratios": "auto"}, "calibrate first"),
        ({"magcache_mag_ratios": "1.0,x"}, "magcache_mag_ratios"),
        ({"magcache_steps": 1}, "1 computed steps of 20 are too few"),
        ({"magcache_mag_ratios": "0", "magcache_calibration": True}, "give one or the other"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    model: Path, tmp_path: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Drawn(model, tmp_path, **settings)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
