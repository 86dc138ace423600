from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from pack.engine.errors import ConfigError
from pack.engine.tracker_arguments import _ARGUMENTS, read_arguments


def written(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def test_without_a_file_nothing_is_added() -> None:
    assert read_arguments(None) == {}


def test_each_logger_gets_its_table(tmp_path: Path) -> None:
    path = written(
        tmp_path / "trackers.toml",
        '[wandb]\nentity = "me"\ntags = ["a", "b"]\nmode = "offline"\n'
        '[tensorboard]\nfilename_suffix = ".a"\nmax_queue = 3\n',
    )
    assert read_arguments(path) == {
        "wandb": {"entity": "me", "tags": ["a", "b"], "mode": "offline"},
        "tensorboard": {"filename_suffix": ".a", "max_queue": 3},
    }


def test_the_libraries_take_all_of_them() -> None:
    import wandb
    from torch.utils.tensorboard import SummaryWriter

    assert _ARGUMENTS["wandb"].keys() <= inspect.signature(wandb.init).parameters.keys()
    assert _ARGUMENTS["tensorboard"].keys() <= inspect.signature(SummaryWriter).parameters.keys()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[wandb", ["is not valid TOML", "docs/logging.md"]),
        ("a = " + "[" * 100_000, ["is not valid TOML"]),
        ("[mlflow]\nx = 1", ["has 'mlflow'", "[tensorboard] or [wandb]"]),
        ("wandb = 1", ["has 'wandb'"]),
        ("[wandb]\nentitty = 'me'", ["[wandb]: entitty: this is not taken", "entity, group"]),
        ("[wandb]\ntags = 'me'", ["[wandb]: tags: expected a list of texts, not 'me'"]),
        ("[wandb]\ntags = ['a', 1]", ["tags: expected a list of texts"]),
        ("[wandb]\nname = 1", ["name: expected a text, not 1"]),
        ("[wandb]\nmode = 'ofline'", ["mode: expected one of online, offline, disabled"]),
        ("[tensorboard]\nmax_queue = true", ["max_queue: expected a whole number, not True"]),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_file(
    tmp_path: Path, text: str, words: list[str]
) -> None:
    path = written(tmp_path / "trackers.toml", text)
    with pytest.raises(ConfigError) as caught:
        read_arguments(path)
    message = str(caught.value)
    assert message.startswith(f"log_tracker_config: {path}") and "\n" not in message
    assert all(word in message for word in words), message


def test_a_key_is_neither_taken_nor_repeated(tmp_path: Path) -> None:
    path = written(tmp_path / "trackers.toml", "[wandb]\napi_key = 'a1b2c3d4'")
    with pytest.raises(ConfigError) as caught:
        read_arguments(path)
    assert "api_key: this is not taken" in str(caught.value) and "a1b2" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "trackers.toml"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trackers\.toml (cannot be read|is not valid TOML)"):
        read_arguments(path)
