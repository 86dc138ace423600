from __future__ import annotations

import numpy as np
import pytest
from pack.engine.jobs.lora_layer_report import (
    LayerResult,
    in_words,
    percent,
    rank_chart,
    size,
    table,
    total_error,
)


def result(name: str, rank: int | None, error: float, before: int | None = 16) -> LayerResult:
    return LayerResult(name, before, rank, squared_norm=4.0, squared_error=4 * error**2)


RESULTS = [
    *(result(f"double_blocks.{block}.img_mlp.0", 4 + block % 3, 0.1) for block in range(12)),
    *(result(f"single_blocks.{block}.linear1", 8, 0.2) for block in (0, 1, 4)),
    result("final_layer.linear", 2, 0.4),
    result("lora_te1_text_model_encoder_layers_0_mlp_fc1", None, 0.0, before=None),
]


def test_a_table_has_one_line_for_all_blocks() -> None:
    shuffled = sorted(RESULTS, key=lambda each: each.name)  # block 10 before block 2
    lines = [line.split() for line in table(shuffled).splitlines()]
    assert lines == [
        ["layers", "number", "rank", "before", "rank", "error"],
        ["double_blocks.0-11.img_mlp.0", "12", "16", "4-6", "10", "%"],
        ["final_layer.linear", "1", "16", "2", "40", "%"],
        ["lora_te1_text_model_encoder_layers_0_mlp_fc1", "1", "-", "-", "0", "%"],
        ["single_blocks.0-1,4.linear1", "3", "16", "8", "20", "%"],
        ["all", "17", "16", "2-8", f"{100 * total_error(RESULTS):.3g}", "%"],
    ]


def test_columns_are_aligned_and_ranks_before_are_left_out_where_there_were_none() -> None:
    lines = table([result("a.0.b", 4, 0.1, before=None), result("c", 10, 0.25, before=None)])
    assert lines.splitlines() == [
        "layers  number  rank  error",
        "a.0.b        1     4   10 %",
        "c            1    10   25 %",
        "all          2  4-10   19 %",
    ]


def test_many_gaps_are_shortened() -> None:
    results = [result(f"blocks.{block}.q", 4, 0.1) for block in range(0, 40, 2)]
    assert table(results).splitlines()[1].startswith("blocks.0,2,...,38.q ")


def test_errors_add_up_as_norms_do() -> None:
    results = [LayerResult("a", 1, 1, 9.0, 1.0), LayerResult("b", 1, 1, 16.0, 3.0)]
    assert total_error(results) == pytest.approx(0.4)
    assert results[0].relative_error == pytest.approx(1 / 3)
    assert LayerResult("c", 1, 1, 0.0, 0.0).relative_error == 0
    assert total_error([]) == 0
    assert in_words(results).splitlines() == [
        "error in all: 40 % (84 % of the squared norm are kept)",
        "largest error of a layer: 43.3 %, b",
    ]


@pytest.mark.parametrize(
    ("part", "words"), [(0.0, "0 %"), (1e-7, "0 %"), (0.00123, "0.123 %"), (0.5, "50 %")]
)
def test_parts_have_three_digits(part: float, words: str) -> None:
    assert percent(part) == words


def test_sizes_are_in_kib_or_mib() -> None:
    assert size(1536) == "1.5 KiB"
    assert size(1234 * 2**20) == "1,234.0 MiB"


def test_a_chart_has_a_bar_for_every_layer() -> None:
    image = np.asarray(rank_chart(RESULTS, name="a.safetensors"))
    assert image.shape == (540, 960, 3)
    dark_blue = (np.abs(image.astype(int) - (0x1F, 0x4E, 0x8C)).sum(axis=2) < 30).sum()
    orange = (np.abs(image.astype(int) - (0xB0, 0x5A, 0x2C)).sum(axis=2) < 30).sum()
    assert dark_blue > 5000 and orange > 2000
