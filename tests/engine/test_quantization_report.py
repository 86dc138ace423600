from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pack.engine.quantization_report import (
    LayerReport,
    error_plot,
    summary,
    table,
    total_error,
)
from pack.engine.quantized_loading import EightBit
from pack.engine.quantized_stream import Squares

MIB = 2**20


def layer(
    name: str, squares: Squares | None = None, *, taken: bool = False, mode: str = "block"
) -> LayerReport:
    way = EightBit(name, (1024, 2048), torch.bfloat16, "e4m3", mode, 64, torch.float32, taken=taken)
    return LayerReport(name, way, 2 * MIB + MIB // 8, 4 * MIB, squares)


LAYERS = [
    layer("double_blocks.0.img_attn.qkv", Squares(0.01, 25.0)),
    layer("double_blocks.1.img_attn.qkv", Squares(0.06, 75.0)),
    layer("single_blocks.0.linear1", taken=True, mode="tensor"),
]


def test_errors_are_weighed_by_the_weights() -> None:
    assert LAYERS[0].error == pytest.approx(0.1 / 5)
    assert LAYERS[2].error is None
    assert total_error(LAYERS) == pytest.approx(math.sqrt(0.07 / 100))
    assert total_error(LAYERS[2:]) is None and total_error([]) is None


def test_a_weight_of_zeros_has_no_error() -> None:
    assert layer("a", Squares(0.0, 0.0)).error == 0.0
    assert total_error([layer("a", Squares(0.0, 0.0))]) == 0.0


def test_the_summary_is_of_the_layers_that_were_rounded() -> None:
    assert summary(LAYERS) == (
        "2 layers were rounded to 8 bits: 4.2 MiB instead of 8.0 MiB, 47% less, relative error "
        "2.646%"
    )
    assert "error" not in summary([layer("a")])
    assert summary(LAYERS[2:]) == summary([]) == "no layer was rounded to 8 bits"


def test_the_table_has_a_line_for_every_layer() -> None:
    lines = table(LAYERS).splitlines()
    assert len(lines) == 4
    assert " ".join(lines[1].split()) == (
        "double_blocks.0.img_attn.qkv e4m3 block 64 2.12 47% 2.000%"
    )
    assert " ".join(lines[3].split()) == (
        "single_blocks.0.linear1 e4m3 tensor (as it was) 2.12 47%"
    )


def test_the_plot_has_a_row_for_each_list_of_blocks() -> None:
    more = [layer(f"single_blocks.{index}.linear2", Squares(0.01, 20.0)) for index in range(3)]
    one, two = error_plot(LAYERS, title="one"), error_plot([*LAYERS, *more], title="two")
    assert two.height > 1.5 * one.height and two.width == one.width
    assert np.asarray(two).std() > 10  # something was drawn


def test_there_is_no_plot_of_nothing() -> None:
    with pytest.raises(ValueError, match="no errors"):
        error_plot(LAYERS[2:], title="")
