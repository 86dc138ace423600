from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoKrWeights,
    LoRAWeights,
    delta,
    merged,
)
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError
from pack.engine.lora_file import read_lora, write_lora
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WAN = LAYER_NAMES["wan"]
LAYER = "blocks.0.ffn.0"
STEM = f"diffusion_model.{LAYER}"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lora(**more: Tensor) -> dict[str, Tensor]:
    return {"lora_A.weight": draw(2, 6), "lora_B.weight": draw(8, 2, seed=1), **more}


def read(
    tmp_path: Path,
    parts: dict[str, Tensor],
    *,
    shape: tuple[int, ...] | None = None,
    check_finite: bool = True,
) -> AdapterWeights:
    path = tmp_path / "a.safetensors"
    save_file({f"{STEM}.{end}": tensor for end, tensor in parts.items()}, path)
    shapes = None if shape is None else {LAYER: shape}
    return read_lora(path, [WAN], shapes=shapes, check_finite=check_finite).layers[LAYER]


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(4, dtype=torch.int64),
        torch.tensor(4, dtype=torch.uint8),
        torch.tensor([4.0], dtype=torch.float16),
        torch.tensor(4.0, dtype=torch.bfloat16),
        torch.tensor([[4.0]], dtype=torch.float64),
        torch.tensor(4.0).to(torch.float8_e4m3fn),
    ],
    ids=lambda alpha: f"{alpha.dtype}-{alpha.dim()}",
)
def test_alpha_of_any_type_and_number_of_dimensions(tmp_path: Path, alpha: Tensor) -> None:
    found = read(tmp_path, lora(alpha=alpha))
    assert isinstance(found, LoRAWeights)
    assert found.scale == 2.0


@pytest.mark.parametrize("alpha", [-3.0, 0.0, 1e-3])
def test_alpha_may_be_any_number(tmp_path: Path, alpha: float) -> None:
    found = read(tmp_path, lora(alpha=torch.tensor(alpha)))
    assert isinstance(found, LoRAWeights)
    assert found.alpha == pytest.approx(alpha)


def test_a_layer_with_alpha_0_is_remarked(tmp_path: Path) -> None:
    read(tmp_path, lora(alpha=torch.tensor(0.0)))
    remarks = read_lora(tmp_path / "a.safetensors", [WAN]).remarks
    assert remarks == ("in 1 layers alpha is 0, so that the layer does nothing",)


@pytest.mark.parametrize(
    "alpha", [torch.ones(2), torch.ones(0), torch.tensor(float("nan")), torch.tensor(float("inf"))]
)
def test_alpha_that_is_not_one_number_is_refused(tmp_path: Path, alpha: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"ffn.0.alpha (is|has)"):
        read(tmp_path, lora(alpha=alpha))


def test_the_rank_is_alpha_where_there_is_none(tmp_path: Path) -> None:
    found = read(tmp_path, lora())
    assert isinstance(found, LoRAWeights)
    assert found.alpha == 2.0


def test_a_core_between_the_factors_is_multiplied_into_the_first(tmp_path: Path) -> None:
    down, mid, up = draw(3, 6, 1, 1), draw(2, 3, 5, 7, seed=1), draw(8, 2, 1, 1, seed=2)
    parts = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid}
    found = read(tmp_path, parts | {"alpha": torch.tensor(1.0)})
    wanted = torch.zeros(8, 6, 5, 7, dtype=torch.float64)
    for r in range(2):
        for s in range(3):
            left = up[:, r].double().view(8, 1, 1, 1) * down[s].double().view(1, 6, 1, 1)
            wanted += left * mid[r, s].double()
    torch.testing.assert_close(delta(found, torch.float64), wanted / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tucker", [False, True])
@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
@pytest.mark.parametrize("size", [(1, 1), (3, 3)])
@pytest.mark.parametrize("decompose", [None, "rows", "columns"])
def test_files_of_lycoris_do_what_lycoris_does(
    tmp_path: Path, tucker: bool, algorithm: str, size, decompose: str | None
) -> None:
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    pytest.importorskip("toml")  # which LyCORIS imports without asking for it
    modules = pytest.importorskip("lycoris.modules")
    classes = {"locon": modules.LoConModule, "loha": modules.LohaModule, "lokr": modules.LokrModule}
    conv = nn.Conv2d(12, 16, size, bias=False)
    torch.manual_seed(0)
    module = classes[algorithm](
        "x",
        conv,
        lora_dim=1 if algorithm == "lokr" else 2,
        alpha=3.0,
        use_tucker=tucker,
        factor=4,
        decompose_both=decompose is None,
        weight_decompose=decompose is not None,
        wd_on_out=decompose == "rows",
    )
    for name, parameter in module.named_parameters():
        if not name.startswith("org") and name != "dora_scale":
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        parts = {name: tensor.clone() for name, tensor in module.custom_state_dict().items()}
        if algorithm != "locon":
            # Its `get_merged_weight` scales twice (4.1.3); what it computes with does not.
            wanted = conv.weight + module.get_weight(conv.weight.shape)
            wanted = module.apply_weight_decompose(wanted) if decompose else wanted
        else:
            wanted = module.get_merged_weight(shape=conv.weight.shape)[0]
    found = read(tmp_path, {k: v.contiguous() for k, v in parts.items()}, shape=(16, 12, *size))
    scale = wanted.abs().max().item()
    torch.testing.assert_close(
        merged(conv.weight.detach(), found), wanted, rtol=1e-4, atol=2e-6 * scale
    )


@pytest.mark.parametrize(
    ("end", "shape", "stored"),
    [
        ("dora_scale", (8, 1), (8, 1)),
        ("dora_scale", (8,), (8, 1)),
        ("dora_scale", (1, 6), (1, 6)),
        ("dora_scale", (6,), (1, 6)),
        ("dora_scale", (8, 1, 1, 1), (8, 1)),
        ("lora_magnitude_vector", (8,), (8, 1)),
        ("lora_magnitude_vector.weight", (8,), (8, 1)),
        ("lora_magnitude_vector.default.weight", (8, 1), (8, 1)),
        ("lora_magnitude_vector", (1, 8, 1, 1), (8, 1)),
    ],
)
def test_magnitudes_of_every_shape(tmp_path: Path, end: str, shape, stored) -> None:
    values = draw(*shape)
    found = read(tmp_path, lora(**{end: values}))
    assert isinstance(found, LoRAWeights) and found.magnitude is not None
    assert torch.equal(found.magnitude, values.reshape(stored))


@pytest.mark.parametrize("shape", [(7,), (8, 6), (6, 1), ()])
def test_magnitudes_that_fit_nothing_are_refused(tmp_path: Path, shape) -> None:
    with pytest.raises(CheckpointError, match="neither of the 8 rows nor of the 6 columns"):
        read(tmp_path, lora(dora_scale=torch.ones(shape)))


def test_differences_of_weight_and_bias_and_norms(tmp_path: Path) -> None:
    found = read(tmp_path, {"diff": draw(8, 6), "diff_b": draw(8)})
    assert isinstance(found, FullWeights)
    assert torch.equal(delta(found), draw(8, 6)) and torch.equal(found.bias_diff, draw(8))
    only = read(tmp_path, {"diff_b": draw(8)})
    assert isinstance(only, FullWeights) and only.shape is None
    norm = read(tmp_path, {"w_norm": draw(8), "b_norm": draw(8, seed=1)})
    assert isinstance(norm, FullWeights)
    assert norm.shape == (8,) and torch.equal(norm.bias_diff, draw(8, seed=1))


def test_a_lora_that_changes_the_bias_too_keeps_it_through_a_file(tmp_path: Path) -> None:
    found = read(tmp_path, lora(diff_b=draw(8)))
    assert isinstance(found, LoRAWeights) and torch.equal(found.bias_diff, draw(8))
    path = tmp_path / "b.safetensors"
    for format in ("comfyui", "kohya"):
        write_lora(path, {LAYER: found}, WAN, format=format, dtype=torch.float32, metadata={})
        assert torch.equal(read_lora(path, [WAN]).layers[LAYER].bias_diff, draw(8))


@pytest.mark.parametrize("end", ["lora_B.bias", "lora_B.default.bias", "lora_up.bias"])
def test_the_bias_of_the_second_factor_is_added_times_the_scale(tmp_path: Path, end: str) -> None:
    parts = lora(alpha=torch.tensor(1.0), **{end: draw(8, seed=5)})
    if "up" in end:
        parts = {
            key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): tensor
            for key, tensor in parts.items()
        }
    found = read(tmp_path, parts)
    assert torch.equal(found.bias_diff, draw(8, seed=5) * 0.5)
    assert read(tmp_path, parts | {end: torch.zeros(8)}).bias_diff is None


def test_modulation_of_wan_in_the_spelling_of_distilled_loras(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(
        {"diffusion_model.blocks.3.diff_m": draw(1, 6, 4), "diffusion_model.head.diff_m": draw(1)},
        path,
    )
    read = read_lora(path, [WAN])
    assert set(read.layers) == {"blocks.3.modulation", "head.modulation"}
    write_lora(path, read.layers, WAN, dtype=torch.float32, metadata={})
    assert set(load_file(path)) == {
        "diffusion_model.blocks.3.modulation.diff",
        "diffusion_model.head.modulation.diff",
    }


def test_a_parameters_own_name_may_end_the_modules(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    stem = "diffusion_model.double_blocks.0.img_attn.norm.query_norm"
    save_file({f"{stem}.scale.diff": draw(4)}, path)
    found = read_lora(path, [LAYER_NAMES["flux_kontext"]]).layers
    assert list(found) == ["double_blocks.0.img_attn.norm.query_norm"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_factors_in_8_bits_are_read_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = {key: tensor.to(dtype) for key, tensor in lora().items()}
    found = read(tmp_path, parts)
    assert isinstance(found, LoRAWeights)
    assert torch.equal(found.down.float(), parts["lora_A.weight"].float())
    assert found.down.dtype == torch.bfloat16


def test_layers_of_a_1x1_convolution_may_be_linear_in_the_file_and_back(tmp_path: Path) -> None:
    wide = {"lora_A.weight": draw(2, 6, 1, 1), "lora_B.weight": draw(8, 2, 1, 1, seed=1)}
    found = read(tmp_path, wide, shape=(8, 6))
    assert found.shape == (8, 6)
    assert torch.equal(delta(found), delta(read(tmp_path, lora(), shape=(8, 6))))
    assert read(tmp_path, lora(), shape=(8, 6, 1, 1, 1)).shape == (8, 6, 1, 1, 1)


def test_a_kronecker_product_of_whole_factors_ignores_alpha(tmp_path: Path) -> None:
    parts = {"lokr_w1": draw(2, 3), "lokr_w2": draw(4, 2, seed=1), "alpha": torch.tensor(1e10)}
    found = read(tmp_path, parts)
    assert isinstance(found, LoKrWeights)
    assert torch.equal(delta(found), torch.kron(draw(2, 3), draw(4, 2, seed=1)))


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"lora_A.weight": draw(2, 6)}, "'up' factor is missing"),
        ({"lora_B.weight": draw(8, 2)}, "'down' factor is missing"),
        ({"alpha": torch.ones(())}, "does not belong to the kind"),
        (lora(diff=draw(8, 6)), "parts of a LoRA and of a full difference"),
        (lora(lokr_w1=draw(2, 2)), "parts of a LoRA and of a LoKr"),
        ({"lora_A.weight": draw(2, 6), "lora_B.weight": draw(8, 3)}, "does not fit"),
        ({"lora_A.weight": draw(2), "lora_B.weight": draw(8, 2)}, "does not fit"),
        ({"lora_A.weight": draw(2, 6), "lora_B.weight": draw(8)}, "a matrix is needed"),
        ({"lora_A.weight": torch.zeros(0, 6), "lora_B.weight": torch.zeros(8, 0)}, "does not fit"),
        (lora() | {"lora_A.weight": torch.ones(2, 6, dtype=torch.int8)}, "holds whole numbers"),
        (lora() | {"lora_B.weight": torch.full((8, 2), torch.nan)}, "NaN or infinite"),
        (lora(**{"lora_mid.weight": draw(3, 3, 1, 1)}), "does not fit"),
        (lora(diff_b=draw(7)), "has 7 values, but the layer 8"),
        ({"hada_w1_a": draw(8, 2), "hada_w1_b": draw(2, 6)}, "'hada_w2_a' factor is missing"),
        ({"lokr_w1": draw(2, 2)}, "'lokr_w2' factor is missing"),
        ({"lokr_w1": draw(2, 2), "lokr_w1_a": draw(2, 1), "lokr_w2": draw(4, 3)}, "is missing"),
        ({"lokr_w1": draw(2, 2), "lokr_w2": draw(4)}, "has the shape"),
        ({"lokr_w1": draw(2, 2, 2), "lokr_w2": draw(4, 2)}, "first Kronecker factor"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, parts, sentence) -> None:
    with pytest.raises(CheckpointError, match=sentence) as caught:
        read(tmp_path, parts)
    assert LAYER in str(caught.value) and "\n" not in str(caught.value)


def test_nan_may_be_looked_at(tmp_path: Path) -> None:
    parts = lora() | {"lora_B.weight": torch.full((8, 2), torch.nan)}
    assert delta(read(tmp_path, parts, check_finite=False)).isnan().all()
