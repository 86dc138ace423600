"""q, k and v of their own against the layer that they are rows of, in slow float64 sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.engine.adapter_weights import (
    AdapterWeights,
    FullWeights,
    LoHaWeights,
    LoKrWeights,
    LoRAWeights,
    delta,
    merged,
)
from pack.engine.architectures.names import LAYER_NAMES
from pack.engine.errors import CheckpointError
from pack.engine.key_table import Row
from pack.engine.lora_file import read_lora, write_lora
from pack.engine.lora_pieces import NotExactError, combined, low_rank, split
from safetensors.torch import load_file, save_file
from torch import Tensor

from .lora_examples import KINDS, adapter

QKV = Row("qkv", ("q", "k", "v"))
LINEAR1 = Row("linear1", ("q", "k", "v", "mlp"), parts=(1, 1, 1, 4))
SWAPPED = Row("ada", ("norm_out",), halves_swapped=True)


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def as_float64(part: AdapterWeights | None, height: int, inputs: int) -> Tensor:
    if part is None:
        return torch.zeros(height, inputs, dtype=torch.float64)
    return delta(part, torch.float64)


def check(
    parts: list[AdapterWeights | None], row: Row, heights: list[int], inputs: int
) -> AdapterWeights:
    whole = combined(parts, row, None).adapter
    wanted = torch.cat(
        [as_float64(part, height, inputs) for part, height in zip(parts, heights, strict=True)]
    )
    error = (delta(whole, torch.float64) - wanted).abs().max()
    # Factors that are multiplied by another scale are rounded once, in float32.
    assert error <= 8 * torch.finfo(torch.float32).eps * wanted.abs().max()
    return whole


@pytest.mark.parametrize("missing", [(), (0,), (1,), (2,), (0, 2), (1, 2)])
def test_unequal_ranks_and_alphas_are_combined_with_their_sum_as_rank(missing) -> None:
    parts: list[AdapterWeights | None] = [
        adapter("lora", (8, 6), draw(i), rank=i + 1, alpha=float(2 - i)) for i in range(3)
    ]
    for index in missing:
        parts[index] = None
    whole = check(parts, QKV, [8, 8, 8], 6)
    assert isinstance(whole, LoRAWeights)
    assert whole.rank == sum(i + 1 for i in range(3) if i not in missing)


@pytest.mark.parametrize("missing", [(), (3,), (0, 1), (0, 1, 2)])
def test_a_shared_first_factor_stays_one(missing) -> None:
    down = torch.randn(3, 6, generator=draw())
    parts: list[AdapterWeights | None] = [
        LoRAWeights(down.clone(), torch.randn(height, 3, generator=draw(height)), 1.5)
        for height in (4, 4, 4, 16)
    ]
    for index in missing:
        parts[index] = None
    whole = check(parts, LINEAR1, [4, 4, 4, 16], 6)
    assert isinstance(whole, LoRAWeights) and whole.rank == 3
    assert torch.equal(whole.down, down)


@pytest.mark.parametrize(
    "kinds", [("loha",) * 3, ("lora", "loha", "lora"), ("lokr", "lokr", "lora")]
)
def test_other_kinds_are_combined_as_what_holds_them(kinds) -> None:
    parts: list[AdapterWeights | None] = [
        adapter(kind, (16, 12), draw(i)) for i, kind in enumerate(kinds)
    ]
    whole = check(parts, QKV, [16] * 3, 12)
    assert isinstance(whole, LoHaWeights if set(kinds) == {"loha"} else LoRAWeights)
    parts[1] = None
    check(parts, QKV, [16] * 3, 12)


@pytest.mark.parametrize("kind", ["lokr", "lokr_whole", "lokr_pairs"])
def test_one_lokr_of_three_is_a_lora_or_a_full_difference(kind: str) -> None:
    parts = [None, adapter(kind, (16, 12), draw()), None]
    whole = check(parts, QKV, [16] * 3, 12)
    assert isinstance(whole, FullWeights if kind == "lokr_whole" else LoRAWeights)


def test_a_lokr_of_full_rank_and_a_lora_are_a_full_difference_with_a_remark() -> None:
    parts = [adapter("lokr_whole", (16, 12), draw()), adapter("lora", (16, 12), draw(1)), None]
    result = combined(parts, QKV, None)
    assert isinstance(result.adapter, FullWeights)
    assert result.remark == "parts of full rank were combined as a full difference"
    check(parts, QKV, [16] * 3, 12)


def test_magnitudes_of_rows_are_joined_and_do_the_same() -> None:
    parts = [adapter("dora_rows", (8, 6), draw(i)) for i in range(3)]
    weight = torch.randn(24, 6, generator=draw(9))
    whole = combined(list(parts), QKV, None).adapter
    wanted = torch.cat([merged(w, p) for w, p in zip(weight.split(8), parts, strict=True)])
    torch.testing.assert_close(merged(weight, whole), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ([adapter("dora_rows", (8, 6), draw()), None, None], "for a part of its rows only"),
        ([adapter("dora_columns", (8, 6), draw())] * 3, "of the columns of its parts"),
        (
            [adapter("dora_rows", (8, 6), draw())] + [adapter("lora", (8, 6), draw())] * 2,
            "for a part of its rows only",
        ),
        ([adapter("lora", (8, 6), draw()), adapter("lora", (10, 6), draw()), None], "do not make"),
        ([adapter("lora", (8, 6), draw()), adapter("lora", (8, 4), draw()), None], "of inputs"),
    ],
)
def test_what_no_single_adapter_does_is_refused(parts, sentence: str) -> None:
    with pytest.raises(NotExactError, match=sentence):
        combined(parts, QKV, None)


def test_a_bias_that_only_some_parts_change_is_zero_in_the_others() -> None:
    bias = torch.randn(8, generator=draw())
    lora = adapter("lora", (8, 6), draw())
    parts = [None, replace(lora, bias_diff=bias), adapter("lora", (8, 6), draw(1))]
    whole = check(parts, QKV, [8] * 3, 6)
    assert whole.bias_diff is not None
    assert torch.equal(whole.bias_diff, torch.cat([torch.zeros(8), bias, torch.zeros(8)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", [QKV, LINEAR1, SWAPPED], ids=lambda row: row.published)
def test_what_was_split_is_combined_to_the_same(kind: str, row: Row) -> None:
    whole = adapter(kind, (8 * sum(row.parts or (1,) * len(row.inner)), 12), draw())
    try:
        parts = split(whole, row)
    except NotExactError:
        assert kind in ("dora_columns", "lokr", "lokr_whole", "lokr_pairs")
        return
    again = combined(parts, row, None).adapter
    torch.testing.assert_close(delta(again), delta(whole), rtol=1e-6, atol=1e-6)


def test_a_rank_per_part_comes_back_from_the_combined_layer() -> None:
    parts = [adapter("lora", (8, 6), draw(i), rank=i + 1, alpha=1.0 + i) for i in range(3)]
    again = split(combined(list(parts), QKV, None).adapter, QKV)
    for part, wanted in zip(again, parts, strict=True):
        assert isinstance(part, LoRAWeights) and isinstance(wanted, LoRAWeights)
        assert part.rank == wanted.rank
        torch.testing.assert_close(delta(part), delta(wanted))


def test_parts_without_effect_are_left_out_unless_all_are() -> None:
    lora = adapter("lora", (8, 6), draw())
    assert isinstance(lora, LoRAWeights)
    whole = combined([None, lora, None], QKV, None).adapter
    assert [part is None for part in split(whole, QKV)] == [True, False, True]
    untrained = LoRAWeights(lora.down, torch.zeros(24, 2), 1.0)
    assert all(part is not None for part in split(untrained, QKV))


def test_halves_change_places_and_back() -> None:
    for kind in KINDS:
        given = adapter(kind, (8, 6), draw())
        if not isinstance(given, FullWeights):
            given = replace(given, bias_diff=torch.arange(8.0))
        swapped = combined([given], SWAPPED, None).adapter
        wanted = torch.cat([delta(given)[4:], delta(given)[:4]])
        torch.testing.assert_close(delta(swapped), wanted, rtol=1e-6, atol=1e-6)
        if swapped.bias_diff is not None:
            assert swapped.bias_diff.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
        if kind == "dora_rows":
            assert isinstance(given, LoRAWeights) and isinstance(swapped, LoRAWeights)
            assert given.magnitude is not None and swapped.magnitude is not None
            assert torch.equal(swapped.magnitude, given.magnitude.roll(4, 0))


def test_a_lokr_whose_first_factor_has_one_row_is_swapped_as_a_lora() -> None:
    given = LoKrWeights(
        torch.randn(1, 3, generator=draw()), (torch.randn(8, 1), torch.randn(1, 4)), 1.0
    )
    result = combined([given], SWAPPED, None)
    assert isinstance(result.adapter, LoRAWeights) and result.remark
    torch.testing.assert_close(delta(result.adapter), delta(given).roll(4, 0))


def test_a_loha_as_a_lora_has_the_square_of_its_rank() -> None:
    result = low_rank(adapter("loha", (16, 12), draw()))
    assert isinstance(result.adapter, LoRAWeights) and result.adapter.rank == 4
    assert result.remark == "a LoHa was written as a LoRA of larger rank"
    with pytest.raises(NotExactError, match="full rank 9"):
        low_rank(adapter("loha", (16, 8), draw(), rank=3))


@pytest.mark.parametrize("present", [("q", "k", "v"), ("k",), ("q", "v")])
def test_a_file_of_diffusers_gives_the_published_layer(tmp_path: Path, present) -> None:
    names, path = LAYER_NAMES["flux_kontext"], tmp_path / "a.safetensors"
    tensors: dict[str, Tensor] = {}
    wanted = torch.zeros(3, 8, 6, dtype=torch.float64)
    for index, letter in enumerate("qkv"):
        if letter not in present:
            continue
        down = torch.randn(index + 1, 6, generator=draw(index))
        up = torch.randn(8, index + 1, generator=draw(index + 3))
        stem = f"transformer.transformer_blocks.7.attn.to_{letter}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        wanted[index] = up.double() @ down.double()
    save_file(tensors, path)
    read = read_lora(path, [names])
    found = read.layers["double_blocks.7.img_attn.qkv"]
    torch.testing.assert_close(
        delta(found, torch.float64), wanted.flatten(0, 1), rtol=1e-12, atol=1e-12
    )
    write_lora(path, read.layers, names, format="diffusers", dtype=torch.float32, metadata={})
    written = load_file(path)
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[key], each) for key, each in tensors.items())


def test_parts_that_do_not_make_up_the_layer_of_the_model_are_refused(tmp_path: Path) -> None:
    names, path = LAYER_NAMES["flux_kontext"], tmp_path / "a.safetensors"
    stem = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file(
        {f"{stem}.lora_A.weight": torch.ones(1, 6), f"{stem}.lora_B.weight": torch.ones(8, 1)}, path
    )
    assert read_lora(path, [names]).layers["single_blocks.0.linear1"].shape == (56, 6)
    with pytest.raises(CheckpointError, match="parts of 8, none, none, none rows"):
        read_lora(path, [names], shapes={"single_blocks.0.linear1": (63, 6)})


@pytest.mark.parametrize(
    "modules",
    [
        ("diffusion_model.double_blocks.7.img_attn.qkv", "double_blocks.7.img_attn.qkv"),
        ("transformer_blocks.7.attn.to_q", "transformer.transformer_blocks.7.attn.to_q"),
        ("transformer_blocks.7.attn.to_q", "double_blocks.7.img_attn.qkv"),
        ("double_blocks.7.img_attn.qkv", "lora_transformer_transformer_blocks_7_attn_to_k"),
    ],
)
def test_two_adapters_of_one_layer_are_refused(tmp_path: Path, modules) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {}
    for module in modules:
        height = 24 if "qkv" in module else 8
        tensors[f"{module}.lora_A.weight"] = torch.ones(1, 6)
        tensors[f"{module}.lora_B.weight"] = torch.ones(height, 1)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"both for double_blocks.7.img_attn.qkv"):
        read_lora(path, [LAYER_NAMES["flux_kontext"]])


def test_a_part_whose_alpha_is_0_does_nothing_in_the_combined_layer() -> None:
    parts = [adapter("lora", (8, 6), draw(i), alpha=float(i)) for i in range(3)]
    check(list(parts), QKV, [8] * 3, 6)
    nothing = [adapter("lora", (8, 6), draw(i), alpha=0.0) for i in range(3)]
    assert not delta(combined(list(nothing), QKV, None).adapter).any()
