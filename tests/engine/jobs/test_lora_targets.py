from __future__ import annotations

from pathlib import Path

import pytest
from pack.engine.config import Config
from pack.engine.errors import CheckpointError, ConfigError
from pack.engine.jobs import lora_targets
from pack.tests.references import tiny_checkpoints
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "flux.safetensors"
    save_file(tiny_checkpoints.flux(depth=2, single=3), path)
    return path


def lines(dit: Path, **settings: object) -> list[str]:
    config = Config.model_validate({"model": {"dit": dit}, "network": settings})
    result = lora_targets.run(config)
    assert result.path is None and result.picture is None
    return result.report.splitlines()


def test_the_default_selection_of_a_model_file_is_told(dit: Path) -> None:
    report = lines(dit, network_dim=4, network_alpha=2)
    assert [line.split()[0] for line in report[1:-3]] == [
        "double_blocks.0-1.img_attn.qkv",
        "double_blocks.0-1.img_attn.proj",
        "double_blocks.0-1.txt_attn.qkv",
        "double_blocks.0-1.txt_attn.proj",
        "double_blocks.0-1.img_mlp.0",
        "double_blocks.0-1.img_mlp.2",
        "double_blocks.0-1.txt_mlp.0",
        "double_blocks.0-1.txt_mlp.2",
        "single_blocks.0-2.linear2",
        "single_blocks.0-2.linear1",
    ]
    # 4 (384 + 128) in each of 2 blocks
    assert report[1].split()[1:] == ["x2", "384", "x", "128", "4", "2", "4,096"]
    assert report[-2].startswith("22 layers, ")
    # 10 of each double, 3 of each single block, 9 outside of them; final_layer.adaLN_modulation.1
    # has its halves in the other order
    assert report[-1].startswith("38 layers of this flux_kontext model")


def test_the_settings_of_a_training_count(dit: Path) -> None:
    report = lines(
        dit,
        network_dim=4,
        network_args=[
            "exclude_patterns=[r'.*']",
            r"include_patterns=[r'single_blocks\.[12]\.linear.*']",
            "rank_patterns={r'.*linear1': 8}",
            "verbose=True",
        ],
    )
    assert [line.split() for line in report[1:-3]] == [
        ["single_blocks.1.linear2", "128", "x", "640", "4", "4", "3,072"],
        ["single_blocks.1.linear1", "896", "x", "128", "8", "8", "8,192"],
        ["single_blocks.2.linear2", "128", "x", "640", "4", "4", "3,072"],
        ["single_blocks.2.linear1", "896", "x", "128", "8", "8", "8,192"],
    ]


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("networks.lora", 4 * (640 + 128)),
        ("networks.loha", 2 * 4 * (640 + 128)),
        # 128 = 8 x 16 and 640 = 20 x 32: [8, 20], and [16, 32] as a product of rank 4.
        ("networks.lokr", 8 * 20 + 4 * (16 + 32)),
    ],
)
def test_parameters_are_those_of_the_kind(dit: Path, module: str, number: int) -> None:
    report = lines(
        dit,
        network_dim=4,
        network_module=module,
        network_args=[r"include_patterns=[r'single_blocks\.0\.linear2']"],
    )
    assert report[1].split()[-1] == f"{number:,}"


def test_what_does_not_fit_the_model_is_refused(dit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="include_patterns: 'blocks' matches none"):
        lines(dit, network_args=["include_patterns=['blocks']"])
    save_file(tiny_checkpoints.wan(), tmp_path / "wan.safetensors")
    with pytest.raises(CheckpointError, match="not a diffusion model of a supported family"):
        lines(tmp_path / "wan.safetensors")
