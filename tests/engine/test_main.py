from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.engine.__main__ import main
from pack.engine.config import Config
from pack.engine.config_file import load_config
from pack.engine.errors import CheckpointError, ConfigError, DataError, EngineError
from pack.engine.events import Progress, Reporter
from pack.engine.jobs import encode
from pack.engine.options import reference
from pack.engine.signals import Stopped

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def test_the_printed_settings_are_those_of_the_run_and_nothing_heavy_is_loaded(
    tmp_path: Path,
) -> None:
    given = tmp_path / "run.toml"
    given.write_text("prompt = 'naïve 猫'\n[a]\nnetwork_dim = 4\ndit = 'C:\\x'", "utf-8")
    command = f"-X importtime -m engine train --config_file {given.with_suffix('')} --print_config"
    run = subprocess.run(
        [sys.executable, *command.split(), "--learning_rate", "5e-5", "--resolution", "512"],
        cwd=ROOT,
        # As where the console's encoding is not UTF-8.
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=True,
    )
    printed = tmp_path / "printed.toml"
    printed.write_bytes(run.stdout)
    command_line = {"learning_rate": ["5e-5"], "resolution": ["512"]}
    assert load_config(printed, {}, {}) == load_config(given, command_line, {})
    assert load_config(printed, {}, {}).generate.prompt == ["naïve 猫"]
    imports = [line.split("|")[-1].strip() for line in run.stderr.decode().splitlines()]
    loaded = {name.partition(".")[0] for name in imports}
    assert "pydantic" in loaded
    assert not loaded & {"torch", "diffusers", "transformers", "accelerate", "matplotlib"}


def test_the_shell_gets_the_exit_code_and_one_sentence() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "engine", "generate", "--sed", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stdout == ""
    assert run.stderr == "error: command line: sed = \"1\": unknown setting; did you mean 'seed'?\n"


def test_the_reference_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    assert capsys.readouterr().out == reference()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--config_file", "none"], "none.toml: there is no such config file"),
        (["train", "--seed", "x", "--rank=4", "--dit="], "command line: "),
        (["train", "run.toml"], "'run.toml' belongs to no option"),
        (["generate"], "--dit"),
        (["cache"], "--image_directory"),
        (["train", "--learn", "1"], "unknown setting"),
        (["options", "--verbose", "1"], "options does not take --verbose 1"),
        (["demo", "--seed", "1"], "demo does not take --seed 1"),
        (["demo", "--steps", "0", "--output", "none"], "at least one optimizer step"),
    ],
)
def test_wrong_settings_end_with_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output, errors = capsys.readouterr()
    assert output == "" and errors.startswith("error: ") and message in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["", "learn", "tra", "train --events xml", "train --seed"])
def test_a_command_that_makes_no_sense_ends_with_2(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:  # argparse's own way
        main(command.split())
    assert ended.value.code == 2
    usage, *_, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: python -m engine") and "error: " in error


def test_help_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_a_file_that_cannot_be_used_ends_with_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = str(tmp_path / "nothing")
    needed = ["dit", "vae", "text_encoder1", "text_encoder2", "save_path"]
    options = [word for name in needed for word in (f"--{name}", nothing)]
    assert main(["generate", "--prompt", "a", *options]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and nothing in errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (ConfigError("a.toml: seed"), 2, "error: a.toml: seed"),
        (DataError("a.png: damaged"), 1, "error: a.png: damaged"),
        (CheckpointError("a.safetensors: damaged"), 1, "error: a.safetensors: damaged"),
        (EngineError("no"), 1, "error: no"),
        (Stopped("stopped after step 3 of 4"), 3, "stopped after step 3 of 4"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_end_in_the_middle_of_a_job_has_its_code_and_a_line_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    last_line: str,
) -> None:
    def run(config: Config, report: Reporter) -> None:
        report(Progress("train", 1, 4))
        raise error

    monkeypatch.setattr(encode, "run", run)
    assert main(["cache"]) == code
    output, errors = capsys.readouterr()
    assert output == ""
    bar, *rest = errors.split("\n")
    assert bar.endswith("| 1/4") and rest == [last_line, ""]


def test_an_error_of_ours_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Config, report: Reporter) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(encode, "run", run)
    with pytest.raises(ValueError, match="a bug"):
        main(["cache"])


def test_events_are_lines_for_programs_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Config, report: Reporter) -> None:
        report(Progress("train", 1, 4))

    monkeypatch.setattr(encode, "run", run)
    assert main(["cache", "--events", "json"]) == 0
    output, errors = capsys.readouterr()
    assert output.startswith('{"event": "progress", "task": "train", "done": 1')
    assert errors == ""
