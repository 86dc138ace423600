from __future__ import annotations

import math
import re

import pytest
import torch
from pack.engine import lora_targets
from pack.engine.adapter_weights import LoHaWeights, LoRAWeights, tensors
from pack.engine.errors import ConfigError
from pack.engine.key_table import Row
from pack.engine.layer_names import LayerNames

# Two lists of blocks, as FLUX and HunyuanVideo have them, and a convolution of a patch.
TABLE = (
    Row("patches", ("embed",)),
    Row("double.{}.attn_qkv", ("pairs.{}.q", "pairs.{}.kv"), aliases=("double.{}.attn.qkv",)),
    Row("double.{}.attn_norm", ("pairs.{}.norm",)),
    Row("double.{}.mlp.0", ("pairs.{}.up",)),
    Row("double.{}.mod.linear", ("pairs.{}.mod",)),
    Row("single.{}.linear1", ("singles.{}.all",)),
    Row("single.{}.mod.linear", ("singles.{}.mod",)),
    Row("head", ("out",)),
)
NAMES = LayerNames(
    family="toy",
    base_models=("toy",),
    table=TABLE,
    blocks=("double.", "single."),
    default_excludes=(r".*mod\..*",),
)
OWN_REPLACE = LayerNames(
    family="toy",
    base_models=("toy",),
    table=TABLE,
    blocks=("double.", "single."),
    default_excludes=(r".*mod\..*",),
    always_excludes=(r".*\.mlp\.0",),
    own_excludes_replace=True,
)
LAYERS: dict[str, tuple[int, ...]] = {
    "patches": (8, 4, 1, 2, 2),
    **{
        f"double.{block}.{name}": shape
        for block in range(3)
        for name, shape in (("attn_qkv", (24, 8)), ("mlp.0", (32, 8)), ("mod.linear", (48, 8)))
    },
    **{
        f"single.{block}.{name}": shape
        for block in range(12)
        for name, shape in (("linear1", (56, 8)), ("mod.linear", (24, 8)))
    },
    "head": (4, 8),
}
DEFAULT = [
    *(f"double.{block}.{name}" for block in range(3) for name in ("attn_qkv", "mlp.0")),
    *(f"single.{block}.linear1" for block in range(12)),
]


def select(
    exclude: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    *,
    names: LayerNames = NAMES,
    convolutions: bool = False,
) -> list[str]:
    return lora_targets.select(
        LAYERS, names, exclude=exclude, include=include, convolutions=convolutions
    )


def test_without_patterns_the_default_of_the_family_is_trained_in_model_order() -> None:
    assert select() == DEFAULT


def test_exclude_leaves_out_more_than_the_default_does() -> None:
    assert select((r".*single.*",)) == DEFAULT[:6]
    assert select((r"double\.[01]\..*", r".*single.*")) == DEFAULT[4:6]


def test_exclude_patterns_of_the_user_replace_the_default_where_the_family_says_so() -> None:
    selected = select((r"single\..*",), names=OWN_REPLACE)
    assert selected == [
        f"double.{block}.{name}" for block in range(3) for name in ("attn_qkv", "mod.linear")
    ]
    # What is always left out is so without patterns, too.
    assert select(names=OWN_REPLACE) == [name for name in DEFAULT if not name.endswith("mlp.0")]


def test_include_alone_trains_only_what_it_matches_anywhere_in_the_model() -> None:
    assert select(include=(r"head", r"double\.1\.mod\.linear")) == ["double.1.mod.linear", "head"]
    assert select(include=(r".*mlp\.0",), names=OWN_REPLACE) == [
        f"double.{block}.mlp.0" for block in range(3)
    ]


def test_the_example_of_the_specification_trains_the_single_blocks_from_the_tenth() -> None:
    selected = select((r".*",), (r".*single\.\d{2}\.linear.*",))
    assert selected == ["single.10.linear1", "single.11.linear1"]


def test_what_exclude_leaves_out_comes_back_with_include() -> None:
    selected = select((r"single\..*",), (r"single\.0\.mod\.linear", "head"))
    assert selected == [*DEFAULT[:6], "single.0.mod.linear", "head"]


def test_patterns_match_whole_names() -> None:
    assert select((r"single\.1\..*",)) == [name for name in DEFAULT if "single.1." not in name]


def test_the_order_of_patterns_does_not_matter() -> None:
    assert select((r"single.*", r"double\.0.*")) == select((r"double\.0.*", r"single.*"))


def test_convolutions_take_part_when_they_have_a_rank() -> None:
    assert select(include=("patches",), convolutions=True) == ["patches"]
    assert "patches" in select(include=(".*",), convolutions=True)
    # A pattern for everything does not mean them when they have none ...
    assert select(include=(".*",)) == [name for name in LAYERS if name != "patches"]
    # ... but one for nothing else does.
    with pytest.raises(ConfigError, match="'patch.*' matches patches, a convolution of 1x2x2; set"):
        select(include=("head", "patch.*"))


def test_patterns_that_leave_nothing_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="exclude_patterns: '.*' leave no layer to train; exclude less, or name"
    ):
        select((".*",))


@pytest.mark.parametrize("setting", ["exclude", "include"])
def test_a_pattern_that_matches_nothing_is_refused_with_its_setting(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"{setting}_patterns: 'sin' matches none of the 35"):
        select(**{setting: ("sin",)})


def test_norms_and_layers_that_only_some_models_have_may_be_excluded_as_a_precaution() -> None:
    assert select((r".*norm.*",)) == DEFAULT
    with pytest.raises(ConfigError, match="matches none"):
        select(include=(r".*norm.*",))


def test_a_model_without_blocks_has_no_default() -> None:
    with pytest.raises(ConfigError, match="no layer that toy trains by default; name some with"):
        lora_targets.select({"head": (4, 8)}, NAMES)


def test_the_first_rank_pattern_that_matches_counts() -> None:
    found = lora_targets.targets(
        LAYERS,
        DEFAULT,
        NAMES,
        dim=(16, 8.0),
        rank_patterns=[(r"single\.0\..*", 4, 1.0), (r"single.*", 8, 0), (r".*mlp\.0", 32, None)],
        count=lora_targets.lora_parameters,
    )
    sizes = {target.name: (target.rank, target.alpha) for target in found}
    assert list(sizes) == DEFAULT
    assert sizes["single.0.linear1"] == (4, 1.0)
    assert sizes["single.1.linear1"] == (8, 8.0)  # 0 is the rank
    assert sizes["double.0.mlp.0"] == (32, 16.0)  # none is the same scale
    assert sizes["double.0.attn_qkv"] == (16, 8.0)


def test_a_rank_pattern_for_no_trained_layer_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="rank_patterns: 'head' matches none of the 18 layers that are trained"
    ):
        lora_targets.targets(
            LAYERS,
            DEFAULT,
            NAMES,
            dim=(16, 16.0),
            rank_patterns=[("head", 8, None)],
            count=lora_targets.lora_parameters,
        )


def test_convolutions_have_their_own_rank_but_for_those_of_one_pixel() -> None:
    layers = {"wide": (8, 4, 3, 3), "narrow": (8, 4, 1, 1), "linear": (8, 4)}
    found = lora_targets.targets(
        layers,
        list(layers),
        NAMES,
        dim=(4, 0),
        conv_dim=(2, 1.0),
        count=lora_targets.lora_parameters,
    )
    assert [(target.rank, target.alpha) for target in found] == [(2, 1.0), (4, 4.0), (4, 4.0)]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 1, 1), (6, 5, 3, 3), (6, 5, 1, 2, 2)])
@pytest.mark.parametrize("rank", [1, 3, 64])
def test_parameters_are_counted_as_an_adapter_has_them(shape: tuple[int, ...], rank: int) -> None:
    down, up = torch.zeros(rank, *shape[1:]), torch.zeros(shape[0], rank)
    lora = LoRAWeights(down, up, alpha=1)
    loha = LoHaWeights(up, down, up, down, alpha=1)
    for adapter, count in (
        (lora, lora_targets.lora_parameters),
        (loha, lora_targets.loha_parameters),
    ):
        assert adapter.shape == shape
        assert count(shape, rank) == sum(value.numel() for value in tensors(adapter).values())


def described(selected: list[str], *, verbose: bool = False) -> list[str]:
    found = lora_targets.targets(
        LAYERS,
        selected,
        NAMES,
        dim=(4, 4.0),
        conv_dim=(2, 1.0),
        count=lora_targets.lora_parameters,
    )
    return lora_targets.describe(found, verbose=verbose).splitlines()


def test_the_table_folds_the_blocks() -> None:
    assert described(["patches", *DEFAULT, "head"]) == [
        "layer                                weight  rank  alpha  parameters",
        "patches                   8 x 4 x 1 x 2 x 2     2      1          48",
        "double.0-2.attn_qkv   x3             24 x 8     4      4         384",
        "double.0-2.mlp.0      x3             32 x 8     4      4         480",
        "single.0-11.linear1  x12             56 x 8     4      4       3,072",
        "head                                  4 x 8     4      4          48",
        "",
        "20 layers (1 of them convolutions larger than 1x1), 4,032 parameters: 0.0 MiB in bf16, "
        "0.0 MiB in fp32",
    ]


def test_the_whole_table_has_a_line_for_every_layer() -> None:
    lines = described(DEFAULT, verbose=True)
    assert [line.split()[0] for line in lines[1:-2]] == DEFAULT
    assert len({line.rindex(" ") for line in lines[1:-2]}) <= 2  # columns are aligned


@pytest.mark.parametrize(
    ("blocks", "folded"),
    [
        ([4], "4"),
        ([0, 1, 2, 5, 7, 8], "0-2,5,7-8"),
        (list(range(0, 12, 2)), "0,2,4,6,8,10"),
        ([0, 2, 3, 5, 7, 9, 11], "0,2-3,5,7,9,11"),
    ],
)
def test_blocks_that_are_not_all_trained_are_told(blocks: list[int], folded: str) -> None:
    line = described([f"single.{block}.linear1" for block in blocks])[1]
    assert line.startswith(f"single.{folded}.linear1 ")


def test_many_gaps_between_blocks_are_cut_short() -> None:
    layers = {f"single.{block}.linear1": (4, 4) for block in range(0, 40, 2)}
    found = lora_targets.targets(
        layers, list(layers), NAMES, dim=(1, 1.0), count=lora_targets.lora_parameters
    )
    line = lora_targets.describe(found).splitlines()[1]
    assert re.match(r"single\.0,2,4,6,\.\.\.,38\.linear1  x20 ", line)


def test_layers_of_different_ranks_have_lines_of_their_own() -> None:
    found = lora_targets.targets(
        LAYERS,
        DEFAULT,
        NAMES,
        dim=(4, 4.0),
        rank_patterns=[(r"single\.[0-4]\..*", 8, None)],
        count=lora_targets.lora_parameters,
    )
    lines = [line.split()[:2] for line in lora_targets.describe(found).splitlines()]
    assert ["single.0-4.linear1", "x5"] in lines and ["single.5-11.linear1", "x7"] in lines
    assert math.isclose(sum(t.num_parameters for t in found), 384 + 480 + 5 * 512 + 7 * 256)
