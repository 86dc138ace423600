"""Whether the disk has room for all that a run is going to write."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ..config import Config
from ..errors import EngineError
from ..memory import size_in_words
from .outputs import RunFiles, explained
from .plan import Plan

# Loss history, recipe, status and what a file system needs for itself.
_SMALL_FILES_BYTES = 16 * 2**20


def kept_at_once(config: Config, plan: Plan) -> tuple[int, int]:
    """The most LoRAs and the most states that the rest of the run keeps at the same time."""
    output = config.output
    steps = (plan.start, plan.total_steps)
    first, last = (step * plan.batches_per_step // plan.batches_per_epoch for step in steps)
    of_steps = _count(*steps, output.save_every_n_steps)
    of_epochs = _count(first, last, output.save_every_n_epochs)

    def kept(last_steps: int | None, last_epochs: int | None) -> int:
        # One more of each, because the oldest goes after the newest has come.
        window = of_steps if last_steps is None else last_steps // (output.save_every_n_steps or 1)
        most = of_epochs if last_epochs is None else last_epochs
        return min(of_steps, window + 2) + min(of_epochs, most + 1)

    loras = 1 + config.validation.keep_best
    loras += kept(output.save_last_n_steps, output.save_last_n_epochs)
    states = 1
    if output.save_state:
        states += kept(
            output.save_last_n_steps_state or output.save_last_n_steps,
            output.save_last_n_epochs_state or output.save_last_n_epochs,
        )
    return loras, states


def needed_bytes(
    config: Config, files: RunFiles, plan: Plan, *, lora_bytes: int, state_bytes: int
) -> int:
    """What the folder has to have room for, beyond what the run's files already fill."""
    loras, states = kept_at_once(config, plan)
    replaced = (files.lora, files.state, files.best)
    filled = sum(path.stat().st_size for path in replaced if path.exists())
    # A file is written beside the one that it replaces.
    written = max(lora_bytes, state_bytes)
    total = loras * lora_bytes + states * state_bytes + written + _SMALL_FILES_BYTES
    return max(total - filled, written)


def check_folder(folder: Path) -> None:
    """Make the folder and see that files can be written there.

    Raises:
        EngineError: they cannot.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def check_room(folder: Path, needed: int) -> int:
    """Give what is free in the folder.

    Raises:
        EngineError: it is less than ``needed`` bytes.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EngineError(
            f"{folder}: the files of this run need {size_in_words(needed)}, but only "
            f"{size_in_words(free)} are free; make room, choose another output_dir, or keep fewer "
            "with save_last_n_steps or save_last_n_epochs"
        )
    return free


def _count(start: int, end: int, every: int | None) -> int:
    """How many multiples of ``every`` are above ``start`` and not above ``end``."""
    return end // every - start // every if every else 0
