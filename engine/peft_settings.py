"""Alpha of each module where a LoRA file's keys have none, but peft's settings came with it.

diffusers writes those settings into the header, peft into ``adapter_config.json`` beside the file.
https://huggingface.co/docs/peft/package_reference/lora
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from . import lora_metadata
from .errors import CheckpointError


class PeftAlpha:
    """Alpha of each module as peft's settings say, from a file's header or beside it.

    Raises:
        CheckpointError: the settings are damaged, or cannot be followed exactly.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.source = ""
        settings = self._in_header(metadata) or self._beside()
        self.used = False
        self._alpha = self._number(settings, "lora_alpha", "alpha")
        self._rank = self._number(settings, "r")
        self._rank_pattern = self._pattern(settings, "rank_pattern")
        self._alpha_pattern = self._pattern(settings, "alpha_pattern")
        self._root = bool(settings.get("use_rslora"))

    def __call__(self, module: str, rank: int | None) -> float | None:
        """Alpha of a module, by which `LoRAWeights.scale` is what peft has; None: not said."""
        if self._alpha is None:
            return None
        alpha = self._matching(self._alpha_pattern, module, self._alpha)
        # LoKr without factors is divided by the rank that it was asked for.
        divisor = rank or self._matching(self._rank_pattern, module, self._rank or 1.0)
        self.used = True
        scale = alpha / math.sqrt(divisor) if self._root else alpha / divisor
        return scale * (rank or 1)

    def _in_header(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        if lora_metadata.DIFFUSERS_KEY not in metadata:
            return {}
        settings = self._parsed(
            metadata[lora_metadata.DIFFUSERS_KEY], f"{lora_metadata.DIFFUSERS_KEY} in the header"
        )
        self.source = "the header"
        prefix = "transformer."
        own = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
        return own or {k: v for k, v in settings.items() if "." not in k}

    def _beside(self) -> dict[str, Any]:
        folder = self.path if self.path.is_dir() else self.path.parent
        file = folder / "adapter_config.json"
        if not self.path.is_dir() and not self.path.name.startswith("adapter_model"):
            return {}
        if not file.is_file():
            return {}
        self.source = file.name
        return self._parsed(file.read_text("utf-8", errors="replace"), file.name)

    def _parsed(self, text: str, where: str) -> dict[str, Any]:
        try:
            settings = json.loads(text)
        except (ValueError, RecursionError):
            settings: Any = None
        if not isinstance(settings, dict):
            self._refuse(f"{where} is not readable JSON")
        return settings

    def _number(self, settings: Mapping[str, Any], *names: str) -> float | None:
        for name in names:
            if (value := settings.get(name)) is not None:
                return self._finite(value, name)
        return None

    def _pattern(self, settings: Mapping[str, Any], name: str) -> dict[str, float]:
        given = settings.get(name) or {}
        if not isinstance(given, dict):
            self._refuse(f"{name} is not a table")
        found: dict[str, float] = {}
        for key, value in given.items():
            plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
            if not re.fullmatch(r"[\w.]+", plain):
                self._refuse(f"{name} has the regular expression {key!r}, not a name")
            anchored = "^" if key.startswith("^") else ""
            found[anchored + plain] = self._finite(value, name)
        return found

    def _matching(self, pattern: Mapping[str, float], module: str, default: float) -> float:
        name = module.removeprefix("base_model.model.").removeprefix("transformer.")
        for key, value in pattern.items():
            plain = key.removeprefix("^").removeprefix("transformer.")
            if name == plain or (not key.startswith("^") and name.endswith(f".{plain}")):
                return value
        return default

    def _finite(self, value: Any, name: str) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        found = float(value) if number and abs(value) < 1e9 else math.nan
        if math.isnan(found) or (name in ("r", "rank_pattern") and found <= 0):
            self._refuse(f"{name} is {value!r}")
        return found

    def _refuse(self, problem: str) -> NoReturn:
        raise CheckpointError(
            f"{self.path}: {self.source} cannot be followed exactly, because {problem[:150]}; "
            "save the LoRA again with alpha in its keys"
        )
