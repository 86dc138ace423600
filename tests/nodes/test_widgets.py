"""Widgets and the settings they stand for, for every setting that can be one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_origin

import pytest
from pack.engine.config import FIELDS, Config
from pack.engine.errors import ConfigError
from pack.engine.setting_words import base_types

LARGEST = 2**53 - 1
KINDS = {name: base_types(field.annotation) for name, field in FIELDS.items()}
# Paths are chosen from lists that ComfyUI has, sizes are one number, numbers in lists have none.
WIDGETS = {
    name: kinds
    for name, kinds in KINDS.items()
    if Path not in kinds and tuple not in kinds and (list not in kinds or str in kinds)
}
CHOICES = [name for name, kinds in WIDGETS.items() if Literal in map(get_origin, kinds)]
NUMBERS = [name for name, kinds in WIDGETS.items() if {int, float} & kinds and bool not in kinds]
OPTIONAL_CHOICES = [name for name in CHOICES if type(None) in WIDGETS[name]]
OPTIONAL_NUMBERS = [name for name in NUMBERS if type(None) in WIDGETS[name]]
SWITCHES = [name for name, kinds in WIDGETS.items() if kinds == {bool}]
TEXTS = sorted(WIDGETS.keys() - {*CHOICES, *NUMBERS, *SWITCHES})


@pytest.fixture
def widgets(load: Callable[[str], Any]) -> Any:
    return load("widgets")


def limit(name: str, *rules: str) -> float | None:
    """A limit of a setting as it is declared."""
    found = (getattr(item, rule, None) for item in FIELDS[name].metadata for rule in rules)
    return next((value for value in found if value is not None), None)


def value_of(widgets: Any, name: str, value: Any) -> Any:
    """The setting that a widget's value means."""
    return widgets.settings("A Node", {name: value})[name]


def refused(widgets: Any, name: str, value: Any) -> str:
    """The sentence about a value that cannot be."""
    with pytest.raises(ConfigError) as caught:
        widgets.settings("A Node", {name: value})
    sentence = str(caught.value)
    assert sentence.startswith(f"A Node: {name} = ") and "\n" not in sentence
    return sentence


def test_every_kind_of_setting_is_tested() -> None:
    assert {"lr_scheduler", "mixed_precision"} <= set(CHOICES)
    assert {"network_dim", "network_alpha", "lr_warmup_steps"} <= set(NUMBERS)
    assert "enable_bucket" in SWITCHES
    assert OPTIONAL_CHOICES == ["log_with", "show_timesteps", "show_lr_scheduler"]
    assert {"caption_extension", "optimizer_args", "log_prefix", "trigger_word"} <= set(TEXTS)


@pytest.mark.parametrize("name", WIDGETS)
def test_a_widget_that_nobody_touches_means_the_default(widgets: Any, name: str) -> None:
    default = widgets.widget(name).options["default"]
    assert value_of(widgets, name, default) == Config().value(name)


@pytest.mark.parametrize("name", WIDGETS)
def test_a_widget_has_the_name_and_the_help_of_its_setting(widgets: Any, name: str) -> None:
    made = widgets.widget(name)
    end = " 0: unset." if name in OPTIONAL_NUMBERS else ""
    assert made.id == name
    assert made.options["tooltip"] == f"{FIELDS[name].description}{end}"


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_lists_what_the_setting_takes(widgets: Any, name: str) -> None:
    made = widgets.widget(name)
    assert made.kind == "Combo" and made.options["default"] in made.options["options"]
    choices = [choice for choice in made.options["options"] if choice != "unset"]
    for choice in choices:
        assert value_of(widgets, name, choice) == choice
    expected = refused(widgets, name, "none of these").partition(": expected ")[2]
    assert all(choice in expected for choice in choices)


@pytest.mark.parametrize("name", CHOICES)
def test_only_a_choice_that_may_be_left_out_can_be_unset(widgets: Any, name: str) -> None:
    if name in OPTIONAL_CHOICES:
        assert value_of(widgets, name, "unset") is None
    else:
        assert refused(widgets, name, "unset")


def test_a_text_may_be_called_unset(widgets: Any) -> None:
    assert value_of(widgets, "trigger_word", "unset") == "unset"


def test_a_text_may_be_chosen_from_a_list(widgets: Any) -> None:
    made = widgets.widget("optimizer_type", options=["Lion", "AdamW"])
    assert made.kind == "Combo"
    assert (made.options["options"], made.options["default"]) == (["Lion", "AdamW"], "AdamW")
    assert value_of(widgets, "optimizer_type", "Lion") == "Lion"


@pytest.mark.parametrize("name", NUMBERS)
def test_the_range_of_a_number_is_that_of_its_setting(widgets: Any, name: str) -> None:
    made = widgets.widget(name)
    assert made.kind == ("Float" if float in WIDGETS[name] else "Int")
    low, high = made.options["min"], made.options["max"]
    assert low == (0 if name in OPTIONAL_NUMBERS else limit(name, "ge", "gt"))
    assert high == (limit(name, "le", "lt") or LARGEST)
    if high != limit(name, "lt"):
        assert value_of(widgets, name, high) == high
    if low != limit(name, "gt"):
        assert value_of(widgets, name, low) == (None if name in OPTIONAL_NUMBERS else low)
    assert refused(widgets, name, low - 1)
    if high != LARGEST:
        assert refused(widgets, name, high + 1)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_shown_and_sent_without_rounding(widgets: Any, name: str) -> None:
    options = widgets.widget(name).options
    if float in WIDGETS[name]:
        assert options["round"] is False
        assert options["default"] == 0 or options["step"] <= options["default"]
    assert options["max"] <= LARGEST


@pytest.mark.parametrize("name", OPTIONAL_NUMBERS)
def test_zero_means_that_a_number_is_not_set(widgets: Any, name: str) -> None:
    made = widgets.widget(name)
    assert (made.options["min"], made.options["default"]) == (0, 0)
    assert value_of(widgets, name, 0) is None
    assert value_of(widgets, name, 1) == 1


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_is_on_or_off(widgets: Any, name: str) -> None:
    assert widgets.widget(name).kind == "Boolean"
    if name != "sdpa":  # which may not be off
        assert [value_of(widgets, name, on) for on in (True, False)] == [True, False]


@pytest.mark.parametrize("name", TEXTS)
def test_only_a_list_is_a_text_of_several_lines(widgets: Any, name: str) -> None:
    made = widgets.widget(name)
    assert made.kind == "String"
    assert made.options["multiline"] == (list in WIDGETS[name])


def test_every_line_of_a_list_is_an_entry(widgets: Any) -> None:
    text = "weight_decay=0.1\n\n  eps=1e-6  \r\n"
    assert value_of(widgets, "optimizer_args", text) == ["weight_decay=0.1", "eps=1e-6"]
    assert value_of(widgets, "optimizer_args", " \n") == []


def test_an_empty_text_is_not_set(widgets: Any) -> None:
    assert value_of(widgets, "output_name", "") is None
    assert value_of(widgets, "output_name", "my_lora") == "my_lora"


def test_one_number_is_a_square(widgets: Any) -> None:
    made = widgets.widget("resolution", default=1024, min=16, max=8192)
    assert made.kind == "Int" and made.options["default"] == 1024
    assert value_of(widgets, "resolution", 512) == (512, 512)
    assert "[width, height] or one whole number" in refused(widgets, "resolution", 8)


@pytest.mark.parametrize(
    ("shown", "meant"), [(0.0, 0), (0.1, 0.1), (0.999, 0.999), (1.0, 1), (20.0, 20), (7, 7)]
)
def test_a_warm_up_from_one_on_is_a_number_of_steps(
    widgets: Any, shown: float, meant: float
) -> None:
    steps = value_of(widgets, "lr_warmup_steps", shown)
    assert steps == meant
    assert isinstance(steps, int) == (shown >= 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr_warmup_steps", 1.5),
        ("lr_warmup_steps", -1.0),
        ("lr_warmup_steps", math.inf),
        ("lr_warmup_steps", math.nan),
        ("lr_warmup_steps", "many"),
        ("network_dim", 8.0),
        ("network_dim", "8"),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("max_grad_norm", math.inf),
        ("enable_bucket", 1),
        ("output_name", "a/b"),
        ("output_name", " "),
        ("caption_extension", ""),
        ("device", "gpu"),
        ("optimizer_args", "weight_decay"),
        ("optimizer_type", "Adam"),
        ("dynamo_backend", "FAST"),
        ("log_prefix", "a/b"),
        ("validation_split", 1.0),
        ("resolution", "512"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_node_and_setting(
    widgets: Any, name: str, value: Any
) -> None:
    assert ": expected " in refused(widgets, name, value)


def test_all_values_that_cannot_be_are_named_together(widgets: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        widgets.settings("A Node", {"network_dim": 0, "seed": 1, "output_name": "a:b"})
    assert [line.partition(" = ")[0] for line in str(caught.value).splitlines()] == [
        "A Node: network_dim",
        "A Node: output_name",
    ]


def test_a_node_may_say_more_about_its_widget(widgets: Any) -> None:
    made = widgets.widget("max_train_steps", tooltip="Shown.", max=10, display_name="shown_steps")
    assert made.id == "max_train_steps" and made.shown == "shown_steps"
    assert made.options["tooltip"] == "Shown." and made.options["max"] == 10
    assert made.options["advanced"] is None
    assert widgets.widget("max_train_steps", advanced=True).options["advanced"] is True


# Together


def test_later_settings_win(widgets: Any) -> None:
    parts = {"seed": 1, "network_dim": 8}, {"seed": 2}, {"seed": 3}
    config = widgets.combine(*parts, where="A Node")
    assert (config.runtime.seed, config.network.network_dim) == (3, 8)


def test_what_is_not_set_overrides_nothing(widgets: Any) -> None:
    parts = {"network_alpha": 4.0, "cpu_threads": 2}, None, {"network_alpha": None}, {}
    config = widgets.combine(*parts, where="A Node")
    assert (config.network.network_alpha, config.runtime.cpu_threads) == (4.0, 2)


def test_what_is_off_or_zero_or_empty_overrides(widgets: Any) -> None:
    early = {"enable_bucket": True, "max_grad_norm": 1.0, "optimizer_args": ["eps=1"]}
    late = {"enable_bucket": False, "max_grad_norm": 0.0, "optimizer_args": []}
    config = widgets.combine(early, late, where="A Node")
    assert {name: config.value(name) for name in late} == late


def test_nothing_together_is_the_defaults(widgets: Any) -> None:
    assert widgets.combine(where="A Node") == widgets.combine(None, {}, where="A Node") == Config()


def test_settings_that_cannot_be_together_are_named_with_the_node(widgets: Any) -> None:
    with pytest.raises(ConfigError, match="^A Node: rank = 4: unknown setting"):
        widgets.combine({"rank": 4}, where="A Node")
