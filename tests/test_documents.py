"""What README.md and docs/ say can be typed: files, settings, choices and commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pack.engine import control, losses, plugins, schedule_arguments, schedules, timesteps
from pack.engine.__main__ import main
from pack.engine.config import FIELDS
from pack.engine.config_file import parse_config
from pack.engine.config_types import OPTIMIZERS
from pack.engine.lora_command import TOOLS
from pack.engine.setting_words import expected
from pack.engine.tracker_arguments import read_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in DOCUMENTS}
# Options of the shell that are no settings.
OTHER_OPTIONS = {
    "output",
    "layout",
    "config_file",
    "events",
    "json",
    "print_config",
    "stop_with_input",
    "wait",
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", TEXTS)
def test_a_linked_file_is_there(name: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", TEXTS[name])
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.parametrize(
    ("name", "block"),
    [(name, block) for name, text in TEXTS.items() for block in blocks(text, "toml")],
)
def test_a_toml_file_is_read_by_whom_it_is_for(tmp_path: Path, name: str, block: str) -> None:
    path = tmp_path / "file.toml"
    path.write_text(block, "utf-8")
    if plugins.KEY in block:
        assert len(plugins.allowed_packages({plugins.FILE_VARIABLE: str(path)})) > len(
            plugins.WELL_KNOWN
        )
    elif "[wandb]" in block:
        assert read_arguments(path)
    else:
        parse_config(block, name)


def jobs(capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What ``python -m engine --help`` lists."""
    with pytest.raises(SystemExit):
        main(["--help"])
    return set(re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE))


def options_of_tool(tool: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """What ``python -m engine lora TOOL --help`` lists."""
    with pytest.raises(SystemExit):
        main(["lora", tool, "--help"])
    return set(re.findall(r"--(\w+)", capsys.readouterr().out))


@pytest.mark.parametrize("name", TEXTS)
def test_a_command_of_ours_has_a_job_and_options_that_exist(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = jobs(capsys)
    assert "train" in known
    code = [*re.findall(r"`([^`\n]+)`", TEXTS[name]), *blocks(TEXTS[name], r"\w*")]
    lines = [line for block in code for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        command = line.partition("  #")[0]
        _, _, arguments = command.partition("-m engine ")
        for job in arguments.split()[:1]:
            assert job in known or job == "<job>", line
        if arguments:
            options = {word for word in re.findall(r"--([a-z]\w+)", arguments)}
            allowed = FIELDS.keys() | OTHER_OPTIONS
            if tool := re.match(r"lora (\w+)", arguments):
                assert tool[1] in TOOLS, line
                allowed = options_of_tool(tool[1], capsys)
            assert options <= allowed, line
        for word in re.findall(r"-m engine control \S+ (\w+)", command):
            assert word in {"status", *control.COMMANDS}, line


def test_the_guide_names_settings_and_choices_as_they_are() -> None:
    text = re.sub(r"```.*?```", "", TEXTS["docs/training.md"], flags=re.DOTALL)
    code = re.findall(r"`([^`]+)`", text)
    named = {word for part in code for word in re.findall(r"^-{0,2}([a-z]+(?:_[a-z]+)+)\b", part)}
    choices = {word for field in FIELDS.values() for word in re.findall(r"\w+", expected(field))}
    arguments = {name for known in schedule_arguments.ARGUMENTS.values() for name in known}
    packages = {part for package in plugins.WELL_KNOWN for part in package.split(".")}
    of_libraries = {"relative_step", "adjust_lr_fn", "prodigyopt"}
    known = FIELDS.keys() | choices | arguments | packages | of_libraries
    known |= schedules.SHAPES.keys() | timesteps.CHOICES.keys() | losses.MEASURES.keys()
    assert named - known == set() and len(named) > 50


def test_the_guide_leaves_out_no_choice() -> None:
    """Whoever has heard of one looks for its name."""
    code = " ".join(re.findall(r"```.*?```|`[^`]+`", TEXTS["docs/training.md"], flags=re.DOTALL))
    names = [
        *OPTIMIZERS,
        *schedules.SHAPES,
        *timesteps.CHOICES,
        *losses.MEASURES,
        *(name for known in schedule_arguments.ARGUMENTS.values() for name in known),
        *control.COMMANDS,
    ]
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_the_readme_names_every_node() -> None:
    sources = [path.read_text("utf-8") for path in (ROOT / "nodes").glob("*.py")]
    found = [re.findall(r'node_id="\w+",\s+display_name="([^"]+)"', source) for source in sources]
    names = {name for each in found for name in each}
    missing = {name for name in names if f"**{name}**" not in TEXTS["README.md"]}
    assert len(names) > 15 and {name for name in missing if not name.startswith("Demo ")} == set()
