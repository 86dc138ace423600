"""The files of a training run: where they are, that none is overwritten, what they say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from .. import control, run_status
from ..config import Config
from ..config_file import to_toml
from ..errors import ConfigError, EngineError


@dataclass(frozen=True)
class RunFiles:
    """All files of the run ``name`` in ``folder``."""

    folder: Path
    name: str

    @property
    def lora(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    @property
    def state(self) -> Path:
        """In the safetensors format; its extension keeps it out of lists of models."""
        return self.folder / f"{self.name}.state"

    @property
    def recipe(self) -> Path:
        return self.folder / f"{self.name}.toml"

    @property
    def history(self) -> Path:
        return self.folder / f"{self.name}.loss_history.jsonl"

    @property
    def validation(self) -> Path:
        """One JSON line for each measurement of the validation loss."""
        return self.folder / f"{self.name}.validation.jsonl"

    @property
    def loss_by_time(self) -> Path:
        """Mean training loss of each part of the noise levels, as JSON."""
        return self.folder / f"{self.name}.loss_by_time.json"

    @property
    def best(self) -> Path:
        """The LoRA of the lowest validation loss."""
        return self.folder / f"{self.name}-best.safetensors"

    @property
    def control(self) -> Path:
        """Commands for the run while it goes on."""
        return self.folder / f"{self.name}{control.ENDING}"

    @property
    def status(self) -> Path:
        """What the run is doing, as JSON."""
        return self.folder / f"{self.name}{run_status.ENDING}"

    @property
    def samples(self) -> Path:
        """Folder of what was drawn during training, of all runs in ``folder``."""
        return self.folder / "samples"

    @property
    def log(self) -> Path:
        """What libraries print while a parent process runs the training."""
        return self.folder / f"{self.name}.log"

    @property
    def preview_latents(self) -> Path:
        return self.folder / f"{self.name}.previews.latent"

    def preview(self, index: int) -> Path:
        return self.folder / f"{self.name}.preview-{index:02d}.png"

    def lora_at_step(self, step: int) -> Path:
        return self.folder / f"{self.name}-step{step:08d}.safetensors"

    def lora_at_epoch(self, epoch: int) -> Path:
        return self.folder / f"{self.name}-{epoch:06d}.safetensors"

    def numbered(self, ending: str) -> dict[Path, tuple[str, int]]:
        """The LoRAs (``.safetensors``) or states (``.state``) kept at some step or epoch.

        Each that exists, with "step" or "epoch" and its number.
        """
        found: dict[Path, tuple[str, int]] = {}
        for path in self._matching(rf"-(step\d{{8}}|\d{{6}}){re.escape(ending)}"):
            number = path.name[len(self.name) + 1 : -len(ending)]
            of_step = number.startswith("step")
            found[path] = ("step", int(number[4:])) if of_step else ("epoch", int(number))
        return found

    def all_samples(self) -> list[Path]:
        """What was drawn during the training."""
        pattern = re.compile(re.escape(self.name) + r"-step\d{8,}-\d{2,}\.(latent|png)")
        found = self.samples.iterdir() if self.samples.is_dir() else []
        return sorted(path for path in found if pattern.fullmatch(path.name))

    def is_own_state(self, path: Path) -> bool:
        """Whether a file is the state of this run, or one of those kept beside its LoRAs."""
        own = [self.state, *self.numbered(".state")]
        return any(each.exists() and path.exists() and path.samefile(each) for each in own)

    def remove_leftovers(self) -> None:
        """Remove what a process that was killed while it wrote one of the files left behind."""
        ending = (
            r"(\.toml|\.(loss_history|validation)\.jsonl|\.(loss_by_time|status)\.json"
            r"|\.previews\.latent|\.preview-\d\d\.png|-best\.safetensors"
            r"|(-step\d{8}|-\d{6})?\.(safetensors|state)|\.control)"
        )
        for path in self._matching(rf"{ending}\.\d+\.tmp", before="."):
            path.unlink(missing_ok=True)

    def _matching(self, ending: str, *, before: str = "") -> list[Path]:
        pattern = re.compile(re.escape(before + self.name) + ending)
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if pattern.fullmatch(path.name))


def find_start(config: Config) -> tuple[RunFiles, Path | None]:
    """The run's files and the state to continue from, if any.

    Raises:
        ConfigError: the run would replace the files of another one, or the state that was named
            does not exist.
    """
    output = config.output
    assert output.output_dir is not None and output.output_name is not None
    files = RunFiles(output.output_dir, output.output_name)
    state: Path | None = None
    if isinstance(output.resume, Path):
        state = output.resume
        if not state.exists():
            raise ConfigError(f"resume: {state} does not exist; give a .state file")
        if files.state.exists() and state.samefile(files.state):
            return files, files.state
    elif output.resume:
        if files.state.exists():
            return files, files.state
        if files.lora.exists() and not output.overwrite:
            raise ConfigError(
                f"{files.folder} holds {files.lora.name}, but no {files.state.name} to continue "
                "from; use another output_name, or start again with --overwrite (on the node: "
                "existing_run)"
            )
        return files, None
    present = [path.name for path in _taken(files, config)]
    if present and not output.overwrite:
        more = f" and {len(present) - 2} more" if len(present) > 2 else ""
        raise ConfigError(
            f"{files.folder} already holds {', '.join(present[:2])}{more}; use --resume to "
            "continue that run, another output_name for a new one, or --overwrite to replace it"
        )
    return files, state


def _taken(files: RunFiles, config: Config) -> Iterator[Path]:
    """What a new run would replace."""
    yield from (path for path in (files.lora, files.state) if path.exists())
    yield from files.numbered(".safetensors")
    yield from files.numbered(".state")
    yield from files.all_samples()
    # A run that failed in its first step leaves an empty one.
    if files.history.exists() and files.history.stat().st_size:
        yield files.history
    # Whoever starts us may have written the recipe there already; another one may be precious.
    if files.recipe.exists() and files.recipe.read_bytes() != to_toml(config).encode():
        yield files.recipe


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns what the disk says while ``path`` is written into one sentence.

    Raises:
        EngineError: the file could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise EngineError(
            f"{path}: the file cannot be written ({reason or error}); make room or choose another "
            "folder. What was saved before is untouched"
        ) from None
