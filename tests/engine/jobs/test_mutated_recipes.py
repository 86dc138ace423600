"""What happens to a recipe that somebody, or a disk, has damaged."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import FIELDS, GROUP_OF, Config
from pack.engine.config_file import load_config, to_toml
from pack.engine.errors import ConfigError, EngineError
from pack.engine.events import silent
from pack.engine.jobs import train
from pack.tests.engine.jobs import tiny

_NUM_FILES = 2000
_NUM_TRAINED = 40  # of those that are accepted and say something else; all by the slow test
_LETTERS = "abz09_-.,=[]{}\"'#\\\n\r\t \0\ufeffüñ猫"
_VALUES = [
    "0",
    "-1",
    "1",
    "2",
    "0.5",
    "1e-4",
    "-0.0",
    "1e400",
    "nan",
    "inf",
    "10",
    "1000",
    "99999999999999999999",
    "true",
    "false",
    '""',
    '"x"',
    "'auto'",
    '"10%"',
    "[]",
    "[1]",
    "[1,2]",
    "[16,16]",
    '["a=1"]',
    '["a"]',
    "{}",
    "{a=1}",
    "2020-01-01",
    "07:32:00",
    "0x10",
    "1_000",
    '"none"',
    '"bf16"',
    '"AdamW"',
    '"Adafactor"',
    '"os.system"',
    '"rex"',
    '"cosine"',
    '"huber"',
    '"INDUCTOR"',
    '"EAGER"',
    '"wandb"',
    '"sigma"',
    '"~"',
]
# What would only take long, at its most for a real training.
_MOST = {
    "max_train_steps": 2,
    "gradient_accumulation_steps": 2,
    "network_dim": 8,
    "max_train_epochs": 1,
    "num_repeats": 2,
    "infer_steps": 2,
    "preview_images": 1,
    "cpu_threads": 1,
    "batch_size": 4,
    "validation_times": 2,
}


def mutated(text: str, chance: random.Random) -> str:
    """One or two mistakes, as a slip of the hand, a bad merge or a torn file makes them."""
    for _ in range(chance.choice((1, 1, 2))):
        text = chance.choice(_MISTAKES)(text, chance)
    return text


def _typo(text: str, chance: random.Random) -> str:
    at, letter = chance.randrange(len(text)), chance.choice(_LETTERS)
    return chance.choice((text[:at] + text[at + 1 :], text[:at] + letter + text[at:]))


def _other_value(text: str, chance: random.Random) -> str:
    places = list(re.finditer(r"^(?:# )?(\w+) =.*$", text, re.MULTILINE))
    place = chance.choice(places)
    return text[: place.start()] + f"{place[1]} = {chance.choice(_VALUES)}" + text[place.end() :]


def _misspelt(text: str, chance: random.Random) -> str:
    place = chance.choice(list(re.finditer(r"^\w+(?= =)", text, re.MULTILINE)))
    name = list(place[0])
    at = chance.randrange(len(name))
    name[at] = chance.choice("abcxyz_")
    return text[: place.start()] + "".join(name) + text[place.end() :]


def _lines(text: str, chance: random.Random) -> str:
    """A line is lost, comes twice or changes places with another."""
    lines = text.splitlines(keepends=True)
    first, second = chance.randrange(len(lines)), chance.randrange(len(lines))
    what = chance.randrange(3)
    if what == 0:
        del lines[first]
    elif what == 1:
        lines.insert(second, lines[first])
    else:
        lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines)


def _torn(text: str, chance: random.Random) -> str:
    return text[: chance.randrange(len(text))]


_MISTAKES = (_typo, _typo, _other_value, _other_value, _other_value, _misspelt, _lines, _torn)


def load(path: Path, text: str) -> Config | str:
    """The settings, or what was said instead."""
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        return load_config(path, {}, {})
    except ConfigError as error:
        return str(error)


def assert_says_what_is_wrong(message: str) -> None:
    """Each line is a sentence about one place."""
    assert message and "Traceback" not in message and "pydantic" not in message
    for line in message.splitlines():
        assert len(line) < 700 and re.search(r"\w{3}", line), message


def train_quickly(config: Config, folder: Path) -> str:
    """Train what ``config`` says, but not for long and only in ``folder``; what was said, if so."""
    for name in ("output_dir", "cache_directory", "logging_dir"):
        place = config.value(name)
        if place is not None and not place.resolve().is_relative_to(folder.parent):
            return ""
    changes: dict[str, dict[str, Any]] = {}
    for name, most in _MOST.items():
        if config.value(name) is not None:
            changes.setdefault(GROUP_OF[name], {})[name] = min(most, config.value(name))
    groups = {
        group: getattr(config, group).model_copy(update=values) for group, values in changes.items()
    }
    try:
        train.run(config.model_copy(update=groups), silent)
    except EngineError as error:
        return str(error)
    return ""


def run_all(
    training: dict[str, Any], folder: Path, *, num_files: int, num_trained: int
) -> Counter[str]:
    """Count what became of that many damaged copies of a good recipe."""
    base = tiny.config(training, output_dir=folder / "out", max_train_steps=2)
    text = to_toml(base)
    chance = random.Random(0)
    found: Counter[str] = Counter()
    for index in range(num_files):
        config = load(folder / "recipe.toml", mutated(text, chance))
        if isinstance(config, str):
            assert_says_what_is_wrong(config)
            found["refused when read"] += 1
            continue
        # What is accepted means what it says: it is written and read to the same.
        assert load(folder / "again.toml", to_toml(config)) == config
        if config == base:
            found["the same"] += 1
        elif found["trained"] + found["refused before training"] < num_trained:
            output = config.output.model_copy(update={"output_dir": folder / f"out_{index}"})
            said = train_quickly(config.model_copy(update={"output": output}), folder)
            if said:
                assert_says_what_is_wrong(said)
            found["refused before training" if said else "trained"] += 1
        else:
            found["accepted"] += 1
    return found


def test_a_damaged_recipe_is_refused_in_words_or_means_what_it_says(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for relative paths
    found = run_all(training, tmp_path, num_files=_NUM_FILES, num_trained=_NUM_TRAINED)
    assert sum(found.values()) == _NUM_FILES
    # All ends were put to the test.
    assert min(found[end] for end in ("refused when read", "the same", "trained")) > 10, found


@pytest.mark.slow
def test_every_damaged_recipe_that_is_accepted_trains_or_is_refused_in_words(
    training: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = run_all(training, tmp_path, num_files=300, num_trained=300)
    assert found["trained"] > 10, found


def test_every_setting_is_in_the_recipe_that_is_damaged(training: dict[str, Any]) -> None:
    names = set(re.findall(r"^(?:# )?(\w+) =", to_toml(tiny.config(training)), re.MULTILINE))
    assert names == set(FIELDS)
