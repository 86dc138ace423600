"""Gives the repository root the package name ``pack`` so that every module has one name in tests.

ComfyUI loads this folder under a name of its own choosing, so modules import each other
relatively and need some parent package.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]

if "pack" not in sys.modules:  # pytest may load this file more than once
    pack = types.ModuleType("pack")
    pack.__path__ = [str(ROOT)]
    sys.modules["pack"] = pack

# Tiny models run 20-50 times faster with one thread than with two that wait for each other.
torch.set_num_threads(1)
