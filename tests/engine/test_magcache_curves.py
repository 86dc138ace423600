"""Tests of MagCache's curves as text, and of the published ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pack.engine import magcache_curves
from pack.engine.errors import ConfigError
from pack.engine.magcache_curves import (
    CONDITIONAL,
    UNCONDITIONAL,
    Curve,
    default_curve,
    format_ratios,
    mean_of,
    parse_ratios,
    published_curve,
    published_variants,
)

RATIOS = Path(magcache_curves.__file__).parent / "ratios"
# The table of the peer trainer, for FramePack.
PEER = (
    "1.0 1.06971 1.29073 1.11245 1.09596 1.05233 1.01415 1.05672 1.00848 1.03632 1.02974 1.00984 "
    "1.03028 1.00681 1.06614 1.05022 1.02592 1.01776 1.02985 1.00726 1.03727 1.01502 1.00992 "
    "1.03371 0.9976 1.02742 1.0093 1.01869 1.00815 1.01461 1.01152 1.03082 1.0061 1.02162 1.01999 "
    "0.99063 1.01186 1.0217 0.99947 1.01711 0.9904 1.00258 1.00878 0.97039 0.97686 0.94315 "
    "0.97728 0.91154 0.86139 0.76592"
)


def test_the_text_of_the_specification_is_read_and_written() -> None:
    text = "1.00000,1.26562,1.08594,0.77734"
    assert parse_ratios(text) == (1.0, 1.26562, 1.08594, 0.77734)
    assert format_ratios(parse_ratios(text)) == text


@pytest.mark.parametrize("text", [" 1.0, 1.5 ,0.25\n", "1.0,1.5,0.25,", "1,15e-1,.25"])
def test_spaces_line_ends_and_a_comma_at_the_end_do_not_matter(text: str) -> None:
    assert parse_ratios(text) == (1.0, 1.5, 0.25)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1.0,x,1.0", "value 2 is 'x'"),
        ("1.0,1.0,-0.5", "value 3 is '-0.5'"),
        ("1.0,0,1.0", "value 2 is '0'"),
        ("1.0,nan", "value 2 is 'nan'"),
        ("1.0,inf", "value 2 is 'inf'"),
        ("1.0,,1.0", "value 2 is ''"),
        ("1.0 1.1", "value 1 is '1.0 1.1'"),
        ("", "value 1 is ''"),
        ("1.0", "a single ratio"),
    ],
)
def test_a_text_that_is_no_curve_is_explained(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match="^--ratios: .*0 for the published ones") as error:
        parse_ratios(text, "--ratios")
    assert reason in str(error.value)


def test_the_mean_is_that_of_each_step() -> None:
    assert mean_of([(1.0, 1.5), (1.0, 0.5), (1.0, 1.0)]) == (1.0, 1.0)
    assert mean_of([(1.0, 1.5), (1.0, 0.5)], weights=[3, 1]) == (1.0, 1.25)


@pytest.mark.parametrize("curves", [[(1.0, 1.0), (1.0,)], []])
def test_curves_of_different_lengths_have_no_mean(curves: list[tuple[float, ...]]) -> None:
    with pytest.raises(ConfigError, match="have no mean"):
        mean_of(curves)


def test_zero_means_the_peers_table_for_framepack() -> None:
    expected = tuple(map(float, PEER.split()))
    for name in ("", "FramePackI2V_HY.safetensors", "FramePack_F1_I2V_HY.safetensors"):
        assert default_curve("framepack", file_name=name).of(CONDITIONAL) == expected


def test_zero_is_an_error_where_nothing_is_published() -> None:
    with pytest.raises(ConfigError, match="no published ratios for z_image; calibrate first"):
        default_curve("z_image")


@pytest.mark.parametrize(
    ("family", "file_name", "num_blocks", "variant", "steps"),
    [
        ("flux_kontext", "flux1-dev-kontext_fp8_scaled.safetensors", 57, "FLUX.1-Kontext-dev", 28),
        ("flux_kontext", "flux1-dev.safetensors", 57, "FLUX.1-dev", 28),
        ("flux_kontext", "my_style.safetensors", 57, "FLUX.1-Kontext-dev", 28),
        ("wan", "wan2.1_t2v_14B_bf16.safetensors", 40, "Wan2.1 T2V 14B", 50),
        ("wan", "wan2.1_t2v_1.3B_fp16.safetensors", 30, "Wan2.1 T2V 1.3B", 50),
        ("wan", "wan2.1_i2v_480p_14B_fp8_e4m3fn.safetensors", 40, "Wan2.1 I2V 14B 480p", 40),
        ("wan", "wan2.1_i2v_720p_14B_bf16.safetensors", 40, "Wan2.1 I2V 14B 720p", 40),
        ("wan", "wan2.1_vace_1.3B_fp16.safetensors", 30, "Wan2.1 VACE 1.3B", 50),
        ("wan", "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors", 40, "Wan2.2 T2V A14B", 40),
        ("wan", "wan2.2_i2v_low_noise_14B_fp16.safetensors", 40, "Wan2.2 I2V A14B", 40),
        ("wan", "wan2.2_ti2v_5B_fp16.safetensors", 30, "Wan2.2 TI2V 5B", 50),
        ("qwen_image", "qwen_image_fp8_e4m3fn.safetensors", 60, "Qwen-Image", 50),
        ("qwen_image", "qwen_image_edit_2509_bf16.safetensors", 60, "Qwen-Image-Edit", 50),
        ("hunyuan_video", "hunyuan_video_t2v_720p_bf16.safetensors", 60, "HunyuanVideo 720p", 50),
        ("framepack", "FramePackI2V_HY_bf16.safetensors", 60, "FramePack I2V", 25),
        ("framepack", "FramePack_F1_I2V_HY_20250503.safetensors", 60, "FramePack F1", 25),
    ],
)
def test_the_file_name_and_the_number_of_blocks_find_the_curve(
    family: str, file_name: str, num_blocks: int, variant: str, steps: int
) -> None:
    curve = published_curve(family, file_name=file_name, num_blocks=num_blocks)
    assert curve and f"published for {variant} with {steps} steps" in curve.origin
    assert curve.steps == steps


def test_a_model_of_another_depth_has_no_published_curve() -> None:
    assert published_curve("flux_kontext", file_name="flux1-dev.safetensors", num_blocks=6) is None
    assert published_curve("z_image") is None


def test_of_two_curves_of_a_model_the_nearest_number_of_steps_is_taken() -> None:
    def found(steps: int) -> int:
        curve = published_curve("flux_kontext", file_name="kontext", steps=steps)
        assert curve
        return curve.steps

    assert [found(steps) for steps in (8, 20, 23, 25, 28, 50)] == [20, 20, 20, 28, 28, 28]


def test_branches_without_ratios_of_their_own_have_those_of_the_conditional_one() -> None:
    curve = Curve("", {CONDITIONAL: (1.0, 0.5)})
    assert curve.of(UNCONDITIONAL) == (1.0, 0.5) and curve.steps == 2


def test_the_published_hand_over_of_two_models_is_where_the_ratio_drops() -> None:
    for variant in ("Wan2.2 T2V A14B", "Wan2.2 I2V A14B"):
        curve = published_curve("wan", variant=variant)
        assert curve and curve.handover
        middle = curve.of(CONDITIONAL)[: curve.steps - 5]
        assert middle[curve.handover] == min(middle) < 0.92


@pytest.mark.parametrize("path", sorted(RATIOS.glob("*.json")), ids=lambda path: path.stem)
def test_a_published_file_says_where_every_number_is_from(path: Path) -> None:
    table = json.loads(path.read_text("utf-8"))
    assert table["family"] == path.stem and table["license"] == "Apache-2.0"
    assert "Apache License 2.0" in table["note"] and "arXiv:2506.09045" in table["note"]
    assert table.get("default") in (None, *published_variants(path.stem))
    for entry in table["curves"]:
        assert entry["source"].startswith("https://github.com/Zehong-Ma/")
        lengths = {len(values) for values in entry["ratios"].values()}
        assert len(lengths) == 1 and entry["blocks"] > 0 and entry["words"]
        for values in entry["ratios"].values():
            assert values[0] == 1.0 and all(0.4 < value < 1.8 for value in values)


def test_the_families_are_those_that_we_know() -> None:
    from pack.engine.architectures.names import LAYER_NAMES

    assert set(magcache_curves.families_with_published()) == set(LAYER_NAMES)
