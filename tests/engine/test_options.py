from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import FIELDS, Config, NetworkArguments
from pack.engine.config_file import load_config
from pack.engine.errors import ConfigError
from pack.engine.options import add_options, given_words, reference
from pack.engine.options_not_yet import NOT_YET

DOCUMENT = Path(__file__).parents[2] / "docs" / "options.md"


def words(*arguments: str) -> dict[str, list[str]]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser)
    return given_words(*parser.parse_known_args(arguments))


def config(*arguments: str) -> Config:
    return load_config(None, words(*arguments), {})


def test_the_reference_in_the_documentation_is_current() -> None:
    made_by = "python -m engine options > docs/options.md"
    assert DOCUMENT.read_text("utf-8") == reference(), f"make it again with: {made_by}"


def test_the_reference_has_a_row_for_every_setting() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [*FIELDS, *NetworkArguments.model_fields]
    assert all(len(row.replace("\\|", "").split("|")) == 6 for row in rows)


def test_a_setting_is_never_said_to_be_unsupported() -> None:
    assert not NOT_YET.keys() & FIELDS.keys()


def test_nothing_given_means_the_defaults() -> None:
    assert words() == {}
    assert config() == Config()


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--learning_rate=1e-3"], "learning_rate", 1e-3),
        (["--learning_rate", "1"], "learning_rate", 1.0),
        (["--resolution", "512"], "resolution", (512, 512)),
        (["--resolution", "512", "768"], "resolution", (512, 768)),
        (["--seed", "1", "--seed", "2"], "seed", 2),
        (["--lr_warmup_steps", "10%"], "lr_warmup_steps", 0.1),
        (["--lr_warmup_steps", "10"], "lr_warmup_steps", 10),
        (["--output_name", "123"], "output_name", "123"),
        (["--output_name=a = b"], "output_name", "a = b"),
        (["--prompt", "a", "b c"], "prompt", ["a", "b c"]),
        (["--prompt", "true"], "prompt", ["true"]),
        (["--prompt", "-5 degrees", "--- a line"], "prompt", ["-5 degrees", "--- a line"]),
        (["--prompt=-dash"], "prompt", ["-dash"]),
        (["--prompt="], "prompt", [""]),
        (["--prompt"], "prompt", []),
        (["--resume"], "resume", True),
        (["--resume", "a.safetensors"], "resume", Path("a.safetensors")),
        (["--no-resume"], "resume", False),
        (["--overwrite"], "overwrite", True),
        (["--overwrite=TRUE"], "overwrite", True),
        (["--overwrite", "--no-overwrite"], "overwrite", False),
        (["--no-enable_bucket"], "enable_bucket", False),
        (["--enable_bucket", "False"], "enable_bucket", False),
    ],
)
def test_words_of_the_shell_become_values(arguments: list[str], name: str, value: Any) -> None:
    found = config(*arguments).value(name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("word", ["-1", "-.5", "-1e-3", "-2E+0", "-0.25"])
def test_a_negative_number_is_a_value(word: str) -> None:
    arguments = ["--lora_weight", "a", "--lora_multiplier", word, "--seed", "1"]
    assert config(*arguments).generate.lora_multiplier == [float(word)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learn", "1"], 'learn = "1": unknown setting; '),
        (["--learning-rate", "1"], "unknown setting; did you mean 'learning_rate'?"),
        (["--rank=4"], 'rank = "4": unknown setting; '),
        (["--fp8_fast"], "fp8_fast = true: this option is not supported by this version"),
        (["--network_args", "a=1", "b=2"], 'network_args = ["a=1", "b=2"]: expected known keys'),
        (["--no-sdpa"], "sdpa = false: expected true"),
        (["--overwrite", "yes"], 'overwrite = "yes": expected true or false'),
        (["--max_train_steps", "1e3"], 'max_train_steps = "1e3": expected a whole number'),
        (["--seed", "-1"], "seed = -1: expected a whole number from 0"),
        (["--resolution", "512x768"], 'resolution = "512x768": expected [width, height] or one'),
        (["--resolution", "1", "2", "3"], "resolution = [1, 2, 3]: expected [width, height] or"),
        (["--dit="], 'dit = "": expected a path'),
    ],
)
def test_a_mistake_is_said_to_be_on_the_command_line(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*arguments)
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith("command line: ") and message in problem


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.toml"], "'run.toml' belongs to no option; a value with spaces needs quotes"),
        (
            ["--dit", "my", "model"],
            "'model' belongs to no option; a value with spaces",
        ),
        (["--prompt", "-cat"], "'-cat' belongs to no option; write a value with a dash as --name="),
        (["-v"], "'-v' belongs to no option; "),
        (["--", "--seed", "1"], "'--' belongs to no option; "),
        ([""], "'' belongs to no option; "),
    ],
)
def test_a_word_that_belongs_to_no_option_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(*arguments)
    assert str(caught.value).startswith(f"command line: {message}")


def test_an_option_that_needs_a_value_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        words("--learning_rate")
    assert ended.value.code == 2
    assert "--learning_rate: expected one argument" in capsys.readouterr().err


def test_the_help_explains_every_setting() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser)
    text = " ".join(parser.format_help().split())
    for name, field in FIELDS.items():
        assert f"--{name} " in text
        assert " ".join((field.description or "").split()) in text
