"""Files that tools have made, so that the same inputs give the same file at once.

A tool that is given the same inputs again gives the file that it made before, if neither that
nor what it was made from has changed since.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ..engine.atomic_file import replacing, write_text
from ..engine.jobs.tool_result import ToolResult
from . import paths

# What to do with another file of the name -> whether it may be overwritten.
EXISTING_FILE = {"keep": False, "replace": True}


def made(tool: partial[ToolResult], output: Path, existing_file: str) -> ToolResult:
    """The file that a tool makes, or made before from the same inputs.

    Raises:
        EngineError: the tool failed, or there is another file of that name.
    """
    arguments = {name: value for name, value in tool.keywords.items() if name != "report"}
    called = f"{tool.func.__module__}.{tool.func.__qualname__}"
    identity = digest([called, facts(sorted(arguments.items()))])
    record = _Record(output, identity)
    if (earlier := record.read()) is not None:
        return earlier
    output.parent.mkdir(parents=True, exist_ok=True)
    result = tool(output=output, overwrite=EXISTING_FILE[existing_file])
    record.write(result)
    return result


def digest(values: list[Any]) -> str:
    """The same for the same values."""
    return hashlib.sha256(repr(values).encode()).hexdigest()


def facts(value: Any) -> Any:
    """The same as long as a value and the files that it names are."""
    if isinstance(value, Path):
        stat = value.stat() if value.exists() else None
        return [str(value), stat.st_size, stat.st_mtime_ns] if stat else [str(value)]
    if isinstance(value, list | tuple):
        return [facts(part) for part in value]
    return repr(value)


class _Record:
    """What is known of a file that a tool made: from which inputs, and the report."""

    def __init__(self, output: Path, identity: str) -> None:
        self._output = output
        self._identity = identity
        folder = paths.own_cache("tools")
        self._file = folder / f"{digest([str(output)])}.json"
        self._picture = self._file.with_suffix(".png")

    def read(self) -> ToolResult | None:
        """The result of before, if it is what would be made now."""
        try:
            known = json.loads(self._file.read_text("utf-8"))
            image = Image.open(self._picture) if known["picture"] else None
            same = known["inputs"] == self._identity and known["file"] == facts(self._output)
            if not same or not self._output.is_file():
                return None
            report = f"made before from the same inputs: {self._output}\n{known['report']}"
            return ToolResult(report, self._output, image and image.convert("RGB"))
        except (OSError, ValueError, KeyError, TypeError):
            return None  # nothing is known

    def write(self, result: ToolResult) -> None:
        if result.picture is not None:
            with replacing(self._picture) as temporary:
                result.picture.save(temporary, "PNG")
        known = {
            "inputs": self._identity,
            "file": facts(self._output),
            "report": result.report,
            "picture": result.picture is not None,
        }
        write_text(self._file, json.dumps(known))
