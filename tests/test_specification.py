"""docs/specification.md names a test for every promise; here it is checked that they exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "specification.md"
NOT_BUILT = "not built yet"
# The headings of the specification, and what it links to that is part of the project.
SECTIONS = """
Using configuration files to specify training options
Example configuration file
How to specify network_args
How to specify network_args: Example
LoRA+
LoRA+: Example
Select the target modules of LoRA
Select the target modules of LoRA: Example
Save and view logs in TensorBoard format
Save and view logs in wandb
FP8 weight optimization for models
FP8 weight optimization for models: Usage summary
FP8 weight optimization for models: Implementation highlights
FP8 weight optimization for models: Quantization modes
PyTorch Dynamo optimization for model training
PyTorch Dynamo optimization for model training: Available options
PyTorch Dynamo optimization for model training: Usage example
MagCache
MagCache: Usage
MagCache: Generated video example
Style-Friendly SNR Sampler
Style-Friendly SNR Sampler: logsnr Sampler
Style-Friendly SNR Sampler: qinglong_flux and qinglong_qwen Sampler (Hybrid Sampler)
Specify time step range for training
Specify time step range for training: Example
Specify time step range for training: Actual distribution shape
Timestep Bucketing for Uniform Sampling
Timestep Bucketing for Uniform Sampling: How to use
Timestep Bucketing for Uniform Sampling: Example
Timestep Bucketing for Uniform Sampling: Notes
Schedule Free Optimizer
Custom LR Scheduler
Custom LR Scheduler: Rex
Linked: LoRA post-hoc EMA merging
Linked: dataset configuration file
Linked: other model families
""".strip().splitlines()


class Row(NamedTuple):
    """One promise; ``line`` is where it stands in the document, ``tests`` are the last cell."""

    line: int
    section: str
    promise: str
    tests: tuple[str, ...]


def rows(text: str) -> Iterator[Row]:
    """The rows of the table below its heading; an empty section is the one above.

    Raises:
        ValueError: a row has not three cells.
    """
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.startswith("|") or line.startswith(("| Section |", "|---")):
            continue
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) != 3:
            raise ValueError(f"line {number}: {len(cells)} cells instead of 3")
        section = cells[0] or section
        tests = tuple(each.strip() for each in cells[2].split("<br>") if each.strip())
        yield Row(number, section, cells[1], tests)


@cache
def functions(path: Path) -> frozenset[str]:
    """The tests at the top level of a file."""
    tree = ast.parse(path.read_text("utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def problem_of_test(test: str, root: Path = ROOT) -> str:
    """What is wrong with an entry of the last column, or nothing."""
    if test == NOT_BUILT:
        return ""
    found = re.fullmatch(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
    if not found:
        return f"{test} is neither `tests/...py::test_...` nor {NOT_BUILT}"
    path = root / found[1]
    if not path.is_file():
        return f"there is no file {found[1]}"
    return "" if found[2] in functions(path) else f"{found[1]} has no {found[2]}"


def problems(text: str, root: Path = ROOT) -> list[str]:
    """What is wrong with the document, one sentence each."""
    found: list[str] = []
    table = list(rows(text))
    for row in table:
        if not row.promise or not row.tests:
            found.append(f"line {row.line}: no promise, or neither a test nor {NOT_BUILT}")
        if len(set(row.tests)) < len(row.tests):
            found.append(f"line {row.line}: a test comes twice")
        found += [
            f"line {row.line}: {problem}"
            for test in row.tests
            if (problem := problem_of_test(test, root))
        ]
    sections = list(dict.fromkeys(row.section for row in table))
    if sections != SECTIONS:
        missing = [section for section in SECTIONS if section not in sections]
        foreign = [section for section in sections if section not in SECTIONS]
        found.append(f"sections missing: {missing}, not in the specification: {foreign}, or moved")
    return found


def test_every_promise_has_tests_that_exist_or_is_not_built_yet() -> None:
    assert problems(DOCUMENT.read_text("utf-8")) == []


def test_most_promises_are_held_by_tests() -> None:
    """The table was read at all, and is no list of excuses."""
    table = list(rows(DOCUMENT.read_text("utf-8")))
    held = [row for row in table if row.tests != (NOT_BUILT,)]
    assert len(table) > 70 and len(held) > 50


TABLE = "| Section | Promise | Tests |\n|---|---|---|\n"
ROWS = "".join(f"| {section} | a promise | `tests/test_a.py::test_one` |\n" for section in SECTIONS)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", ""),
        (f"| {SECTIONS[1]} |", "| |", f"sections missing: ['{SECTIONS[1]}']"),
        (f"| {SECTIONS[1]} |", "| Other |", "not in the specification: ['Other']"),
        ("| a promise |", "| |", "line 3: no promise"),
        ("`tests/test_a.py::test_one`", "", "line 3: no promise, or neither a test nor not built"),
        ("`tests/test_a.py::test_one`", NOT_BUILT, ""),
        ("test_one`", "test_one`<br>not built yet", ""),
        ("test_one`", "test_one`<br>`tests/test_a.py::test_one`", "line 3: a test comes twice"),
        ("test_one", "test_two", "line 3: tests/test_a.py has no test_two"),
        ("test_one", "test_of_a_class", "line 3: tests/test_a.py has no test_of_a_class"),
        ("test_a.py", "test_b.py", "line 3: there is no file tests/test_b.py"),
        ("`tests/test_a.py::test_one`", "later", "line 3: later is neither"),
    ],
)
def test_what_is_wrong_with_a_table_is_told(tmp_path: Path, old: str, new: str, says: str) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "test_a.py").write_text(
        "def test_one(): pass\nclass TestA:\n    def test_of_a_class(self): pass\n"
    )
    found = problems(TABLE + ROWS.replace(old, new, 1), tmp_path)
    assert len(found) == bool(says) and all(says in problem for problem in found)


def test_a_row_of_another_width_is_told() -> None:
    with pytest.raises(ValueError, match="line 3: 4 cells instead of 3"):
        list(rows(f"{TABLE}| a | b | c | d |\n"))
