"""Tests of the folder of measured curves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from pack.engine.errors import DataError, EngineError
from pack.engine.magcache_curves import CONDITIONAL, UNCONDITIONAL, Calibration
from pack.engine.magcache_store import (
    Identity,
    Measured,
    find_curve,
    measured_in,
    read_measured,
    save_measured,
)

HERE = Identity("flux_kontext", "0123456789abcdef", "euler", 3.0, 4)


def calibration(*ratios: float) -> Calibration:
    return Calibration(ratios, tuple(0.25 for _ in ratios), tuple(0.125 for _ in ratios))


def measured(*ratios: float, identity: Identity = HERE, runs: int = 1) -> Measured:
    identity = replace(identity, steps=len(ratios))
    return Measured(identity, "tiny.safetensors", runs, {CONDITIONAL: calibration(*ratios)})


def test_what_is_stored_is_read_and_found(tmp_path: Path) -> None:
    stored = measured(1.0, 1.5, 0.75, 0.5)
    path = save_measured(tmp_path / "new folder", stored)
    assert read_measured(path) == stored
    curve = find_curve(tmp_path / "new folder", HERE)
    assert curve and curve.of(CONDITIONAL) == (1.0, 1.5, 0.75, 0.5)
    assert curve.origin == "measured on tiny.safetensors with 4 steps (one run)"
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_both_branches_are_stored(tmp_path: Path) -> None:
    both = {CONDITIONAL: calibration(1.0, 1.5), UNCONDITIONAL: calibration(1.0, 0.5)}
    identity = replace(HERE, steps=2)
    save_measured(tmp_path, Measured(identity, "", 1, both))
    curve = find_curve(tmp_path, identity)
    assert curve and curve.of(CONDITIONAL)[1] == 1.5 and curve.of(UNCONDITIONAL)[1] == 0.5
    assert HERE.model in curve.origin


def test_values_are_stored_with_five_decimals(tmp_path: Path) -> None:
    path = save_measured(tmp_path, measured(1.0, 1.123456789))
    assert read_measured(path).branches[CONDITIONAL].ratios == (1.0, 1.12346)


def test_more_runs_become_a_mean_that_counts_each_once(tmp_path: Path) -> None:
    for ratio in (1.0, 2.0, 1.5, 0.5):
        path = save_measured(tmp_path, measured(1.0, ratio))
    merged = read_measured(path)
    assert merged.runs == 4 and merged.branches[CONDITIONAL].ratios == (1.0, 1.25)
    assert merged.branches[CONDITIONAL].deviations == (0.25, 0.25)
    curve = merged.curve()
    assert curve.origin.endswith("(4 runs)")


def test_runs_and_sections_of_a_calibration_become_a_mean() -> None:
    runs = [
        {CONDITIONAL: calibration(1.0, 1.5), UNCONDITIONAL: calibration(1.0, 1.25)},
        {CONDITIONAL: calibration(1.0, 0.5)},
    ]
    mean = measured_in(HERE, "tiny", runs)
    assert mean.runs == 2 and mean.branches == {CONDITIONAL: calibration(1.0, 1.0)}


def test_a_curve_can_be_replaced(tmp_path: Path) -> None:
    save_measured(tmp_path, measured(1.0, 2.0))
    path = save_measured(tmp_path, measured(1.0, 0.5), replace=True)
    assert read_measured(path) == measured(1.0, 0.5)


def test_a_curve_with_other_branches_takes_the_place(tmp_path: Path) -> None:
    save_measured(tmp_path, measured(1.0, 2.0))
    both = {CONDITIONAL: calibration(1.0, 1.5), UNCONDITIONAL: calibration(1.0, 0.5)}
    new = Measured(replace(HERE, steps=2), "", 1, both)
    assert read_measured(save_measured(tmp_path, new)) == new


def ratio_found(folder: Path, wanted: Identity) -> float | None:
    curve = find_curve(folder, wanted)
    return curve.of(CONDITIONAL)[1] if curve else None


def test_the_nearest_of_a_models_curves_is_found(tmp_path: Path) -> None:
    kinds = {
        1.1: HERE,
        1.2: replace(HERE, shift=1.0),
        1.3: replace(HERE, scheduler="unipc karras"),
        1.4: replace(HERE, model="fedcba9876543210"),
        1.5: replace(HERE, family="wan"),
    }
    for ratio, identity in kinds.items():
        save_measured(tmp_path, measured(1.0, ratio, 1.0, 1.0, identity=identity))
    save_measured(tmp_path, measured(1.0, 1.6, *[1.0] * 18))
    assert len(list(tmp_path.iterdir())) == 6
    for ratio, identity in kinds.items():
        assert ratio_found(tmp_path, identity) == ratio
    assert ratio_found(tmp_path, replace(HERE, steps=16)) == 1.6
    assert ratio_found(tmp_path, replace(HERE, shift=1.2)) == 1.2
    assert ratio_found(tmp_path, replace(HERE, scheduler="heun")) in (1.1, 1.3)


def test_a_published_curve_comes_before_that_of_another_model(tmp_path: Path) -> None:
    save_measured(tmp_path, measured(1.0, 1.1, 1.0, 1.0))
    other = replace(HERE, model="fedcba9876543210")
    deep = find_curve(tmp_path, other, file_name="flux1-dev.safetensors", num_blocks=57)
    assert deep and deep.origin.startswith("published for FLUX.1-dev")
    shallow = find_curve(tmp_path, other, num_blocks=6)
    assert shallow and shallow.origin.startswith("measured on tiny")


def test_nothing_is_found_where_nothing_fits(tmp_path: Path) -> None:
    for folder in (None, tmp_path, tmp_path / "missing"):
        assert find_curve(folder, HERE, num_blocks=6) is None


DAMAGE = {
    "cut short": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no object": lambda text: "[1, 2]",
    "another kind": lambda text: text.replace("magcache curve", "something"),
    "newer": lambda text: text.replace('"version": 1', '"version": 2'),
    "a value is missing": lambda text: text.replace("1.5,", "", 1),
    "a value is text": lambda text: text.replace("1.5,", '"high",', 1),
    "not finite": lambda text: text.replace("1.5,", "NaN,", 1),
    "not above 0": lambda text: text.replace("1.5,", "-1.5,", 1),
    "no branch": lambda text: text.replace("conditional", "other"),
    "no shift": lambda text: text.replace('"shift": 3.0,', ""),
    "a shift of 0": lambda text: text.replace('"shift": 3.0,', '"shift": 0,'),
    "steps are text": lambda text: text.replace('"steps": 4', '"steps": "4"'),
    "no text": lambda text: "\udcff",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = save_measured(tmp_path, measured(1.0, 1.5, 1.0, 1.0))
    changed = DAMAGE[damage](path.read_text("utf-8"))
    path.write_bytes(changed.encode("utf-8", "surrogateescape"))
    for use in (
        lambda: read_measured(path),
        lambda: find_curve(tmp_path, HERE),
        lambda: save_measured(tmp_path, measured(1.0, 1.5, 1.0, 1.0)),
    ):
        with pytest.raises(DataError, match="calibrate again") as error:
            use()
        assert str(path) in str(error.value)
    save_measured(tmp_path, measured(1.0, 1.5, 1.0, 1.0), replace=True)
    assert find_curve(tmp_path, HERE)


def test_the_file_is_json_that_people_can_read(tmp_path: Path) -> None:
    record = json.loads(save_measured(tmp_path, measured(1.0, 1.5)).read_text("utf-8"))
    assert record["family"] == "flux_kontext" and record["steps"] == 2
    assert record["branches"][CONDITIONAL]["ratios"] == [1.0, 1.5]


def test_a_folder_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(EngineError, match="cannot be written"):
        save_measured(blocked / "curves", measured(1.0, 1.5))
