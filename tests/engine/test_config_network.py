from __future__ import annotations

import pytest
from pack.engine.config import NetworkConfig
from pack.engine.config.network import parse_network_arguments


def test_arguments_become_values() -> None:
    arguments = parse_network_arguments(
        [
            "loraplus_lr_ratio=4",
            r"exclude_patterns=[r'.*single_blocks.*', r'(?=a)=b']",
            "include_patterns='one.*'",
            r"rank_patterns={r'a\..*': 8, 'b': (4, 2.0), 'c': [2]}",
            "conv_dim=4",
            "verbose=True",
        ]
    )
    assert arguments.loraplus_lr_ratio == 4.0 and arguments.verbose and arguments.conv_dim == 4
    assert arguments.exclude_patterns == [".*single_blocks.*", "(?=a)=b"]
    assert arguments.include_patterns == ["one.*"]
    assert arguments.rank_patterns == [(r"a\..*", 8, None), ("b", 4, 2.0), ("c", 2, None)]


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("loraplus_ratio=4", "did you mean 'loraplus_lr_ratio'?"),
        ("a=4", "known: loraplus_lr_ratio"),
        ("loraplus_lr_ratio=0", "for loraplus_lr_ratio a number above 0"),
        ("rank_dropout=1", "from 0 below 1"),
        ("exclude_patterns=['(']", "regular expressions ('(' is none"),
        (r"exclude_patterns=['a\.b']", "an r before quotes"),
        (r"exclude_patterns=['\bx']", "control characters"),
        (f"exclude_patterns=['{'a' * 1001}']", "at most 1000 characters"),
        ("exclude_patterns=[3]", "for exclude_patterns a list, each a text"),
        ("rank_patterns={'a': ()}", "for rank_patterns {'pattern': rank}"),
        ("rank_patterns={'a': (1, 2.0, 3)}", "a rank and at most an alpha"),
        ("rank_patterns={'a': 0}", "ranks from 1 to 4096"),
        ("rank_patterns={'a': (4, -1.0)}", "alphas from 0"),
        ("rank_patterns={'(': 4}", "regular expressions"),
        ("rank_patterns=[1]", "for rank_patterns {'pattern': rank}"),
        ("verbose", "entries key=value"),
    ],
)
def test_what_is_wrong_completes_the_sentence(entry: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_network_arguments([entry])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_names_of_families_mean_lora() -> None:
    kinds = {
        "networks.lora": "lora",
        "networks.lora_wan": "lora",
        "networks.loha": "loha",
        "networks.lokr": "lokr",
    }
    for name, kind in kinds.items():
        assert NetworkConfig(network_module=name).kind == kind  # pyright: ignore
