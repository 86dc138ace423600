"""What the engine raises when a user can do something about it.

Each message is one sentence: where, what was found, what to do. Everything else is a bug and
raises ``ValueError`` or fails an ``assert``.
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of every error that is shown to the user without a traceback."""


class ConfigError(EngineError):
    """A setting is unknown, of the wrong type, out of range or missing."""


class CheckpointError(EngineError):
    """A model, LoRA or state file is missing, damaged or not what it was given as."""


class NotFiniteError(CheckpointError):
    """What was to be written holds NaN or infinity; the file is what it was before."""


class DataError(EngineError):
    """A dataset folder, image, caption or cache file cannot be used."""
