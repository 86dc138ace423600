"""Tests of what the settings of MagCache mean."""

from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.errors import ConfigError
from pack.engine.magcache import Rule, even_plan, greedy_plan, optimal_plan
from pack.engine.magcache_choice import choose_curve, choose_plan, curve_remark
from pack.engine.magcache_curves import CONDITIONAL, Calibration, Curve, default_curve
from pack.engine.magcache_store import Identity, measured_in, save_measured

HERE = Identity("framepack", "0123456789abcdef", "unipc", 3.0, 25)
RATIOS = (1.0, *[0.95] * 24)


def test_zero_auto_and_a_list_are_told_apart(tmp_path: Path) -> None:
    runs = [{CONDITIONAL: Calibration(RATIOS, RATIOS, RATIOS)}]
    save_measured(tmp_path, measured_in(HERE, "my model", runs))
    assert choose_curve(" 0\n", HERE, folder=tmp_path) == default_curve("framepack")
    assert choose_curve("Auto", HERE, folder=tmp_path).of(CONDITIONAL) == RATIOS
    listed = choose_curve("1.0,0.5,0.25", HERE, folder=tmp_path)
    assert listed.of(CONDITIONAL) == (1.0, 0.5, 0.25)
    published = choose_curve("auto", HERE, file_name="FramePack_F1_I2V_HY.safetensors")
    assert "FramePack F1" in published.origin


def test_without_any_curve_the_way_out_is_calibrating() -> None:
    with pytest.raises(ConfigError, match="no curve for tiny.safetensors.*calibrate first"):
        choose_curve("auto", HERE, file_name="tiny.safetensors", num_blocks=6)


def test_the_rule_is_followed_unless_a_number_is_given() -> None:
    curve, rule = Curve("", {CONDITIONAL: RATIOS}), Rule(0.3, 0.12, 3)
    assert choose_plan(curve, 20, rule) == greedy_plan(RATIOS, 20, rule)
    best = optimal_plan(RATIOS, 20, 10, retention_ratio=0.3, k=3)
    assert choose_plan(curve, 20, rule, num_computed=10) == best
    assert choose_plan(curve, 20, rule, speedup=2.0) == best
    assert choose_plan(curve, 20, rule, speedup=1.7, other_cost=0.1).num_computed == 10


def test_without_a_curve_a_number_of_steps_is_spread_evenly() -> None:
    assert choose_plan(None, 20, Rule(), num_computed=10) == even_plan(20, 10)
    with pytest.raises(ConfigError, match="needs ratios or a number of steps"):
        choose_plan(None, 20, Rule())


def test_two_answers_to_one_question_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        choose_plan(None, 20, Rule(), num_computed=10, speedup=2.0)


def test_a_curve_of_a_very_different_run_is_remarked_upon() -> None:
    curve = default_curve("framepack")
    assert curve.steps == 50
    assert "published for HunyuanVideo 540p" in curve_remark(curve, 50)
    assert "may not fit" not in curve_remark(curve, 40)
    assert "may not fit 25 steps" in curve_remark(curve, 25)
