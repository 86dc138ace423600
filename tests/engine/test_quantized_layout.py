"""Hand-made files in every published layout, read again in float64 and written again."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from pack.engine.errors import CheckpointError
from pack.engine.microscaling import NVFP4, from_nvfp4, mxfp8, nvfp4, rotated, tiled
from pack.engine.quantize import dequantize
from pack.engine.quantized_layout import HEADER_FIELD, header_without, layout_of
from pack.engine.weights import DTYPES, Checkpoint, open_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0, torch.int8: 127.0}
# Half a unit in the last place, and half a step near zero in parts of the largest value.
ERRORS = {E4M3: (2**-4, 2**-10 / 448), E5M2: (2**-3, 2**-17 / 57344), torch.int8: (0.0, 0.5 / 127)}
KEY = "blocks.0.ffn.0.weight"
LAYER = "blocks.0.ffn.0"


def weight(*shape: int, seed: int = 0) -> Tensor:
    """Rows of different size."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator) * 0.05
    return values * torch.logspace(-1, 0.5, shape[0]).view(-1, *[1] * (len(shape) - 1))


def config(**fields: object) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@dataclass
class Case:
    """The tensors of a file, and the weight in float64 that they stand for."""

    tensors: dict[str, Tensor]
    expected: Tensor
    words: str
    metadata: dict[str, str] = field(default_factory=dict)
    # Of a value that is stored anew: in parts of it, and of the largest one with its scale.
    relative: float = 1 / 16
    floor: float = 2**-10 / 448


def scaled(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    *,
    scale_shape: tuple[int, ...],
    groups: tuple[int, ...],
    name: str = "scale_weight",
    scale_dtype: torch.dtype = torch.float32,
    words: str,
) -> Case:
    """``groups`` is how the weight is to be viewed so that its last axis shares a scale."""
    values = weight(*shape)
    grouped = values.view(groups)
    scale = (grouped.abs().amax(-1, keepdim=True) / LARGEST[dtype]).to(scale_dtype)
    codes = grouped / scale.float()
    limit = LARGEST[dtype]
    codes = codes.round() if dtype == torch.int8 else codes
    codes = codes.clamp(-limit, limit).to(dtype)
    expected = (codes.double() * scale.double()).view(shape)
    tensors = {KEY: codes.view(shape), f"{LAYER}.{name}": scale.reshape(scale_shape)}
    relative, floor = ERRORS[dtype]
    return Case(tensors, expected, words, relative=relative, floor=floor)


def comfyui(case: Case, *, in_header: bool, **fields: object) -> Case:
    if in_header:
        case.metadata[HEADER_FIELD] = json.dumps({"layers": {LAYER: fields}})
    else:
        case.tensors[f"{LAYER}.comfy_quant"] = config(**fields)
    return case


def mxfp8_case(scale_dtype: torch.dtype) -> Case:
    codes, exponents = mxfp8(weight(48, 96))
    scale = torch.exp2(exponents.double() - 127)
    expected = (codes.double().view(48, 3, 32) * scale.unsqueeze(-1)).view(48, 96)
    tensors = {KEY: codes, f"{LAYER}.weight_scale": tiled(exponents).view(scale_dtype)}
    # A power of two may be almost twice what the largest value needs.
    return comfyui(
        Case(tensors, expected, "mxfp8", floor=2**-9 / 448), in_header=False, format="mxfp8"
    )


def nvfp4_case() -> Case:
    stored = nvfp4(weight(48, 96))
    tensors = {
        KEY: stored.codes,
        f"{LAYER}.weight_scale": stored.block_scale,
        f"{LAYER}.weight_scale_2": stored.scale,
        f"{LAYER}.input_scale": torch.tensor(0.5),
    }
    expected = from_nvfp4(NVFP4(*stored)).double()
    # Levels 4 and 6 are 2 apart, 0 and 0.5 are a twelfth of the largest; scales err by 1/16.
    case = Case(tensors, expected, "nvfp4", relative=0.2 + 1 / 16, floor=17 / 16 / 24)
    return comfyui(case, in_header=False, format="nvfp4")


def rotated_case() -> Case:
    turned = rotated(weight(12, 64), 16)
    scale = turned.abs().amax(1, keepdim=True) / 127
    codes = (turned / scale).round().to(torch.int8)
    # The orthogonal matrix, from its definition.
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).double()
    matrix = torch.block_diag(*[torch.kron(four, four) / 4] * 4)
    expected = codes.double() * scale.double() @ matrix
    tensors = {KEY: codes, f"{LAYER}.weight_scale": scale}
    case = Case(tensors, expected, "int8, rotated, a scale for every row", relative=0.0)
    # Each value is the sum of 16 that were rounded, over 4; their largest is up to 4 times its.
    case.floor = 16 / 4 * 4 * 0.5 / 127
    return comfyui(
        case, in_header=False, format="int8_tensorwise", convrot=True, convrot_groupsize=16
    )


def cast_case(dtype: torch.dtype, *shape: int) -> Case:
    codes = weight(*shape).to(dtype)
    words = str(dtype).removeprefix("torch.")
    relative, floor = ERRORS[dtype]
    case = Case({KEY: codes}, codes.double(), words, relative=relative)
    # The scale is 1, whatever the largest value is.
    case.floor = floor * LARGEST[dtype] / float(weight(*shape, seed=7).abs().amax())
    return case


def float_case() -> Case:
    values, scale = weight(6, 8).bfloat16(), torch.tensor(0.37)
    tensors = {KEY: values, f"{LAYER}.scale_weight": scale}
    return Case(tensors, values.double() * scale.double(), "float", relative=2**-8, floor=0.0)


def musubi(mode: str, dtype: torch.dtype = E4M3, scale_dtype: torch.dtype = torch.bfloat16) -> Case:
    shapes = {
        "block": ((12, 2, 1), (12, 2, 64), "a scale for every 64 inputs"),
        "channel": ((12, 1), (12, 128), "a scale for every row"),
        "tensor": ((), (1536,), "one scale"),
        "one": ((1,), (1536,), "one scale"),
    }
    scale_shape, groups, words = shapes[mode]
    words = f"{str(dtype).removeprefix('torch.')}, {words}"
    return scaled(
        dtype,
        (12, 128),
        scale_shape=scale_shape,
        groups=groups,
        scale_dtype=scale_dtype,
        words=words,
    )


def with_marker(case: Case, *marker: int) -> Case:
    case.tensors["scaled_fp8"] = torch.zeros(marker, dtype=E4M3)
    case.tensors[f"{LAYER}.scale_input"] = torch.tensor(1.0)
    return case


def named(case: Case) -> Case:
    """With ComfyUI's name of the scale."""
    case.tensors[f"{LAYER}.weight_scale"] = case.tensors.pop(f"{LAYER}.scale_weight")
    return case


F32 = torch.float32
CASES = {
    "musubi block": lambda: musubi("block"),
    "musubi block in float32": lambda: musubi("block", scale_dtype=F32),
    "musubi block in float16": lambda: musubi("block", scale_dtype=torch.float16),
    "musubi block e5m2": lambda: musubi("block", E5M2, F32),
    "musubi channel": lambda: musubi("channel"),
    "musubi tensor": lambda: musubi("tensor"),
    "musubi tensor [1]": lambda: musubi("one"),
    "block of 16": lambda: scaled(
        E4M3,
        (4, 48),
        scale_shape=(4, 3),
        groups=(4, 3, 16),
        words="float8_e4m3fn, a scale for every 16 inputs",
    ),
    "rows as [O]": lambda: scaled(
        E4M3,
        (4, 48),
        scale_shape=(4,),
        groups=(4, 48),
        words="float8_e4m3fn, a scale for every row",
    ),
    "convolution": lambda: scaled(
        E4M3,
        (6, 4, 1, 2, 2),
        scale_shape=(),
        groups=(96,),
        words="float8_e4m3fn, one scale",
    ),
    "convolution by rows": lambda: scaled(
        E4M3,
        (6, 4, 1, 2, 2),
        scale_shape=(6, 1, 1, 1, 1),
        groups=(6, 16),
        words="float8_e4m3fn, a scale for every row",
    ),
    "comfyui with a marker": lambda: with_marker(musubi("tensor", scale_dtype=F32), 0),
    "comfyui with a marker of two": lambda: with_marker(musubi("one", scale_dtype=F32), 2),
    "comfyui tensor": lambda: comfyui(
        named(musubi("tensor", scale_dtype=F32)),
        in_header=False,
        format="float8_e4m3fn",
        full_precision_matrix_mult=True,
    ),
    "comfyui header": lambda: comfyui(
        named(musubi("tensor", E5M2, F32)), in_header=True, format="float8_e5m2"
    ),
    "comfyui int8": lambda: comfyui(
        named(musubi("tensor", torch.int8, F32)), in_header=False, format="int8_tensorwise"
    ),
    "comfyui int8 by rows": lambda: comfyui(
        named(musubi("channel", torch.int8, F32)), in_header=False, format="int8_tensorwise"
    ),
    "comfyui int8 rotated": rotated_case,
    "comfyui mxfp8 as bytes": lambda: mxfp8_case(torch.uint8),
    "comfyui nvfp4": nvfp4_case,
    "cast": lambda: cast_case(E4M3, 6, 8),
    "cast e5m2": lambda: cast_case(E5M2, 6, 4, 1, 2, 2),
    "ordinary beside a scale": float_case,
}
if "F8_E8M0" in DTYPES:
    CASES["comfyui mxfp8"] = lambda: mxfp8_case(torch.float8_e8m0fnu)


def opened(tmp_path: Path, case: Case) -> Checkpoint:
    path = tmp_path / "model.safetensors"
    norm = {"blocks.0.norm3.weight": torch.ones(4, dtype=torch.bfloat16)}
    save_file({**case.tensors, **norm}, path, case.metadata)
    return open_checkpoint(path)


@pytest.mark.parametrize("name", CASES)
def test_a_weight_is_what_plain_dequantization_in_float64_gives(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    checkpoint = opened(tmp_path, case)
    layout = layout_of(checkpoint)
    assert layout.is_quantized(KEY) and not layout.is_quantized("blocks.0.norm3.weight")
    assert layout.shape(checkpoint, KEY) == tuple(case.expected.shape)
    assert layout.in_words() == f"{case.words} (1 tensors)"
    assert layout.companions == case.tensors.keys() - {KEY}
    found = layout.read(checkpoint, KEY, torch.float32)
    # One rounding of a product; the rotation sums 16 of them.
    rounding = 16 if "rotated" in name else 1
    bound = case.expected.abs().amax() * 2**-24 * rounding if rounding > 1 else 0
    assert ((found.double() - case.expected).abs() <= case.expected.abs() * 2**-24 + bound).all()
    half = layout.read(checkpoint, KEY, torch.bfloat16)
    torch.testing.assert_close(half, case.expected.bfloat16(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_another_weight_is_stored_in_the_same_way(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    layout = layout_of(opened(tmp_path, case))
    other = weight(*case.expected.shape, seed=7)
    stored = layout.encode(KEY, other)
    scales = layout.weights[KEY].scales()
    assert stored.keys() == {KEY, *scales}
    for key, tensor in stored.items():
        assert tensor.dtype == case.tensors[key].dtype, key
        assert tensor.shape == case.tensors[key].shape, key
    found = layout.decode(KEY, stored, torch.float32)
    parts = list(layout.decode_rows(KEY, stored, 200))
    assert torch.equal(torch.cat([part for _, part in parts]), found)
    assert torch.equal(torch.cat([other[rows] for rows, _ in parts]), other)
    flat = other.flatten(1)
    by_row = "for every" in case.words or "fp4" in case.words or "fp8" in case.words[:5]
    amax = flat.abs().amax(1, keepdim=True) if by_row else flat.abs().amax()
    error = (found.flatten(1) - flat).abs()
    # A scale in bfloat16 may be too small for the largest value by half a unit.
    bound = torch.maximum(flat.abs() * case.relative, amax * case.floor) * (1 + 2**-8)
    assert (error <= bound).all()


@pytest.mark.parametrize("name", CASES)
def test_storing_what_was_read_changes_next_to_nothing(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    checkpoint = opened(tmp_path, case)
    layout = layout_of(checkpoint)
    values = layout.read(checkpoint, KEY, torch.float32)
    again = layout.decode(KEY, layout.encode(KEY, values), torch.float32)
    scale = float(values.abs().amax())
    torch.testing.assert_close(again, values, rtol=2**-7, atol=scale * 2**-6)


@pytest.mark.parametrize("name", CASES)
def test_codes_are_given_unchanged_where_they_and_scales_are_all(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    checkpoint = opened(tmp_path, case)
    quantized = layout_of(checkpoint).quantized(checkpoint, KEY)
    if name in ("comfyui nvfp4", "comfyui int8 rotated", "ordinary beside a scale"):
        assert quantized is None
        return
    assert quantized is not None
    expected = case.tensors[KEY].flatten(1).view(torch.uint8)
    assert torch.equal(quantized.codes.view(torch.uint8), expected)
    values = dequantize(quantized, torch.float32).view(case.expected.shape)
    torch.testing.assert_close(values.double(), case.expected, rtol=2**-23, atol=0)


def test_a_model_may_mix_layouts_and_ordinary_layers(tmp_path: Path) -> None:
    block, marked = (
        musubi("block"),
        comfyui(named(musubi("tensor", scale_dtype=F32)), in_header=True, format="float8_e4m3fn"),
    )
    tensors = {f"a.{name}": tensor for name, tensor in block.tensors.items()}
    tensors |= {f"b.{name}": tensor for name, tensor in marked.tensors.items()}
    tensors |= {"c.weight": weight(4, 4), "c.bias": weight(4).to(E4M3)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint)
    assert layout.weights.keys() == {f"a.{KEY}", f"b.{KEY}", "c.bias"}
    for prefix, case in (("a", block), ("b", marked)):
        found = layout.read(checkpoint, f"{prefix}.{KEY}", torch.float32)
        torch.testing.assert_close(found.double(), case.expected, rtol=2**-23, atol=0)
    assert torch.equal(layout.read(checkpoint, "c.weight", torch.float32), tensors["c.weight"])


REFUSED = {
    "bitsandbytes": {KEY: torch.zeros(8, 1, dtype=torch.uint8), f"{KEY}.absmax": torch.ones(2)},
    "tiles of 128 x 128": {
        KEY: torch.zeros(4, 4).to(E4M3),
        f"{LAYER}.weight_scale_inv": torch.ones(1, 1),
    },
    "convrot_w4a4": {
        KEY: torch.zeros(4, 4, dtype=torch.int8),
        f"{LAYER}.weight_scale": torch.ones(4),
        f"{LAYER}.comfy_quant": config(format="convrot_w4a4"),
    },
    "int8 without scale": {KEY: torch.zeros(4, 4, dtype=torch.int8)},
    "mxfp8 without scale": {
        KEY: torch.zeros(4, 32, dtype=torch.int8),
        f"{LAYER}.comfy_quant": config(format="mxfp8"),
    },
    "groups of 12": {
        KEY: torch.zeros(4, 24, dtype=torch.int8),
        f"{LAYER}.weight_scale": torch.ones(4, 1),
        f"{LAYER}.comfy_quant": config(
            format="int8_tensorwise", params={"convrot": True, "convrot_groupsize": 12}
        ),
    },
    "as int32": {
        KEY: torch.zeros(4, 4, dtype=torch.int32),
        f"{LAYER}.weight_scale": torch.ones(4, 1),
    },
    "scales for the inputs": {
        KEY: torch.zeros(4, 4).to(E4M3),
        f"{LAYER}.weight_scale": torch.ones(()),
        f"{LAYER}.pre_quant_scale": torch.ones(4),
    },
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_read_is_named_when_it_is_read(tmp_path: Path, words: str) -> None:
    checkpoint = opened(tmp_path, Case(REFUSED[words], torch.zeros(0), ""))
    layout = layout_of(checkpoint)
    for read in (layout.read, lambda *args: layout.quantized(*args[:2])):
        with pytest.raises(CheckpointError, match=words) as caught:
            read(checkpoint, KEY, torch.float32)
        assert KEY in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=words):
        layout.encode(KEY, torch.zeros(4, 4))


DAMAGED = {
    "does not fit the weight": {
        KEY: torch.zeros(4, 6).to(E4M3),
        f"{LAYER}.scale_weight": torch.ones(4, 4, 1),
    },
    "does not fit mxfp8 codes": {
        KEY: torch.zeros(4, 32).to(E4M3),
        f"{LAYER}.weight_scale": torch.ones(4, 1, dtype=torch.uint8),
        f"{LAYER}.comfy_quant": config(format="mxfp8"),
    },
    "does not fit nvfp4 codes": {
        KEY: torch.zeros(4, 16, dtype=torch.uint8),
        f"{LAYER}.weight_scale": torch.zeros(128, 4).to(E4M3),
        f"{LAYER}.comfy_quant": config(format="nvfp4"),
    },
    "not readable JSON": {
        KEY: torch.zeros(4, 16).to(E4M3),
        f"{LAYER}.comfy_quant": torch.tensor([123, 1], dtype=torch.uint8),
    },
    "GPTQ": {f"{LAYER}.qweight": torch.zeros(4, 16, dtype=torch.int32)},
}


@pytest.mark.parametrize("words", DAMAGED)
def test_scales_that_do_not_fit_are_refused_at_once(tmp_path: Path, words: str) -> None:
    checkpoint = opened(tmp_path, Case(DAMAGED[words], torch.zeros(0), ""))
    with pytest.raises(CheckpointError, match=words) as caught:
        layout_of(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["musubi block", "comfyui mxfp8 as bytes", "comfyui nvfp4"])
def test_a_weight_of_zeros_stays_zero(tmp_path: Path, name: str) -> None:
    case = CASES[name]()
    layout = layout_of(opened(tmp_path, case))
    zeros = torch.zeros(case.expected.shape)
    assert torch.equal(layout.decode(KEY, layout.encode(KEY, zeros), torch.float32), zeros)


@pytest.mark.parametrize("name", ["musubi block", "musubi block e5m2", "comfyui mxfp8 as bytes"])
@pytest.mark.parametrize("where", ["code", "scale"])
def test_a_code_or_scale_that_is_not_finite_is_refused(
    tmp_path: Path, name: str, where: str
) -> None:
    case = CASES[name]()
    key = next(k for k in case.tensors if (k == KEY) == (where == "code") and "quant" not in k)
    if case.tensors[key].element_size() > 1:
        case.tensors[key].view(-1)[3] = torch.nan
    else:
        # NaN of e4m3, infinity of e5m2, NaN of a power of two.
        case.tensors[key].view(torch.uint8).view(-1)[2] = 0xFF if where == "scale" else 0x7F
    checkpoint = opened(tmp_path, case)
    layout = layout_of(checkpoint)
    for read in (layout.read, lambda *args: layout.quantized(*args[:2])):
        with pytest.raises(CheckpointError, match="NaN or infinity"):
            read(checkpoint, KEY, torch.float32)


def test_a_value_that_fp8_does_not_have_becomes_nan(tmp_path: Path) -> None:
    case = cast_case(E4M3, 6, 8)
    layout = layout_of(opened(tmp_path, case))
    values = torch.full((6, 8), 448.0)
    values[2, 3] = -449.0
    (stored,) = layout.encode(KEY, values).values()
    assert stored.float().isnan().sum() == 1 and stored.float()[2, 3].isnan()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"layers": []}', '{"layers": {"a": 1}}'])
def test_a_header_that_says_nothing_is_no_obstacle(tmp_path: Path, text: str) -> None:
    case = musubi("block")
    case.metadata[HEADER_FIELD] = text
    checkpoint = opened(tmp_path, case)
    assert layout_of(checkpoint).is_quantized(KEY)
    assert HEADER_FIELD not in header_without(checkpoint.metadata, "")


def test_the_header_keeps_what_other_models_of_the_file_need() -> None:
    field = {"format_version": "1.0", "layers": {"model.a": {"format": "x"}, "te.b": {}}}
    found = header_without({HEADER_FIELD: json.dumps(field), "title": "t"}, "model.")
    assert found["title"] == "t"
    assert json.loads(found[HEADER_FIELD]) == {"format_version": "1.0", "layers": {"te.b": {}}}


def test_codes_made_by_comfyui_are_read_as_comfyui_reads_them(tmp_path: Path) -> None:
    made = load_file(Path(__file__).parents[1] / "data" / "comfyui_quantized.safetensors")
    names = {
        "mxfp8": {"weight": "codes", "weight_scale": "scale"},
        "nvfp4": {"weight": "codes", "weight_scale": "block_scale", "weight_scale_2": "scale"},
        "convrot": {"weight": "codes", "weight_scale": "scale"},
    }
    configs = {
        "convrot": config(format="int8_tensorwise", convrot=True, convrot_groupsize=16),
        "mxfp8": config(format="mxfp8"),
        "nvfp4": config(format="nvfp4"),
    }
    tensors = {
        f"{kind}.{name}": made[f"{kind}.{source}"]
        for kind, parts in names.items()
        for name, source in parts.items()
    }
    path = tmp_path / "model.safetensors"
    save_file({**tensors, **{f"{kind}.comfy_quant": text for kind, text in configs.items()}}, path)
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint)
    for kind in names:
        found = layout.read(checkpoint, f"{kind}.weight", torch.float32)[:8]
        torch.testing.assert_close(found, made[f"{kind}.values"])
