from __future__ import annotations

import pytest
from pack.engine.errors import ConfigError
from pack.engine.key_table import Row
from pack.engine.layer_names import LayerNames
from pack.engine.layer_patterns import matches

NAMES = LayerNames(
    family="toy",
    base_models=("toy",),
    table=(
        Row("double.{}.attn_qkv", ("pairs.{}.q", "pairs.{}.kv"), aliases=("double.{}.attn.qkv",)),
        Row("double.{}.attn_norm", ("pairs.{}.norm",)),
        Row("double.{}.image_k", ("pairs.{}.image_k",)),
        Row("single.{}.linear1", ("singles.{}.all",)),
        Row("head", ("out",)),
    ),
    blocks=("double.", "single."),
)
LAYERS = [
    *(f"double.{block}.attn_qkv" for block in range(3)),
    *(f"single.{block}.linear1" for block in range(12)),
    "head",
]


def test_patterns_match_whole_names_in_the_order_of_the_layers() -> None:
    found = matches([r"single\.1.*", "h..d", ".*0.*"], LAYERS, NAMES, setting="x")
    assert found == {
        r"single\.1.*": ["single.1.linear1", "single.10.linear1", "single.11.linear1"],
        "h..d": ["head"],
        ".*0.*": ["double.0.attn_qkv", "single.0.linear1", "single.10.linear1"],
    }
    assert matches([], LAYERS, NAMES, setting="x") == {}


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", r"x: '\(' is no regular expression \(missing \).*\); \.\* stands for"),
        ("*", r"x: '\*' is no regular expression \(nothing to repeat"),
        ("a" * 1001, "x: 'a{40}...' has 1001 characters; write patterns of at most 1000"),
        ("a{99999999999}", "is no regular expression"),
        ("(" * 500 + ")" * 500, "is no regular expression|matches none"),
        (
            "single",
            r"x: 'single' matches none of the 16 things, only a part of single.0.linear1; a "
            r"pattern must match the whole name: '.\*single.\*'",
        ),
        ("attn|lin", r"must match the whole name: '.\*\(attn\|lin\).\*'"),
        (r"double\.0\.attn\.qkv", r"'double\\.0\\.attn\\.qkv' matches none of .*; double\.0"),
        (r"double\.0\.attn\.qkv", "; double.0.attn.qkv is called double.0.attn_qkv here"),
        (r"pairs\.2\.kv", "; pairs.2.kv is called double.2.attn_qkv here"),
        (r"double\.0\.atn_qvk", r"; the layers are called double\.0\.attn_qkv, for example"),
        ("zzzz", r"; the layers are called double\.0\.attn_qkv, single\.0\.linear1, head, for"),
        (r".*norm.*", "matches none"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        matches([pattern], LAYERS, NAMES, setting="x", kind="things")
    assert "\n" not in str(caught.value)


def test_norms_and_layers_that_only_other_models_have_may_be_named_as_a_precaution() -> None:
    patterns = [r".*norm.*", r".*image_k"]
    found = matches(patterns, LAYERS, NAMES, setting="x", precautions=True)
    assert found == {pattern: [] for pattern in patterns}
    with pytest.raises(ConfigError, match="matches none"):
        matches(["zzzz"], LAYERS, NAMES, setting="x", precautions=True)
