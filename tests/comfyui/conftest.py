"""Finds the ComfyUI that these tests run against.

Set COMFYUI_DIR to a checkout (default ~/ComfyUI) and, if its Python is neither in a ``.venv`` or
``venv`` inside it nor the one that runs pytest, COMFYUI_PYTHON.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from pack.tests.comfyui.server import ComfyServer

_SCRIPTS = Path(__file__).parent / "scripts"


@dataclass(frozen=True)
class ComfyUI:
    """A checkout and the Python that has its requirements."""

    folder: Path
    python: Path

    def run(self, script: str, *arguments: object) -> None:
        """Run one of ``scripts/`` with ComfyUI's modules importable; fails with its output."""
        command = [str(self.python), str(_SCRIPTS / script), str(self.folder)]
        done = subprocess.run(
            [*command, *(str(argument) for argument in arguments)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


@pytest.fixture(scope="session")
def comfyui() -> ComfyUI:
    folder = Path(os.environ.get("COMFYUI_DIR", "~/ComfyUI")).expanduser()
    if not (folder / "comfyui_version.py").exists():
        pytest.skip(f"there is no ComfyUI in {folder}; set COMFYUI_DIR to a checkout")
    places = [folder / name / "bin" / "python" for name in (".venv", "venv")]
    named = os.environ.get("COMFYUI_PYTHON")
    found = [Path(named)] if named else [path for path in places if path.exists()]
    python = found[0] if found else Path(sys.executable)
    check = subprocess.run([str(python), "-c", "import comfy_kitchen, torchsde"], check=False)
    if check.returncode:
        pytest.skip(
            f"{python} lacks ComfyUI's requirements; set COMFYUI_PYTHON to one that has them"
        )
    return ComfyUI(folder, python)


@pytest.fixture(scope="session")
def server(comfyui: ComfyUI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """One server with the pack for all tests; what they write into it, the others see."""
    check = subprocess.run([str(comfyui.python), "-c", "import diffusers, matplotlib, pydantic"])
    if check.returncode:
        pytest.skip(f"run {comfyui.python} -m pip install -r requirements.txt first")
    with ComfyServer(comfyui.folder, comfyui.python, tmp_path_factory.mktemp("server")) as running:
        yield running
