"""Curves, pictures and settings of a training run for TensorBoard and wandb.

Nothing here waits for a disk or a network: numbers are handed to a thread of each logger, and one
that fails is given up with a warning while the training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import secrets
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from PIL import Image

from ..background import Background
from ..config import FIELDS, GROUP_OF, Config, LoggingConfig
from ..errors import ConfigError, EngineError
from ..events import Message, Reporter
from ..setting_words import base_types
from ..tracker_arguments import read_arguments
from ..trackers import Picture, Scalar, TensorBoard, Tracker, Wandb

_PATIENCE_SECONDS = 30
# Lines of prompts may name files; what `generate` is told is no part of a training.
_NOT_LOGGED = {"sample_lines"}
_OTHER_GROUPS = {"generate", "magcache"}


def check(config: Config) -> None:
    """Before anything is loaded: can the loggers that are asked for work?

    Raises:
        ConfigError: a folder is missing or takes no files, a package is not installed, or
            ``log_tracker_config`` cannot be used.
    """
    settings = config.logging
    read_arguments(settings.log_tracker_config)
    loggers = _loggers(settings)
    if "tensorboard" in loggers and not settings.logging_dir:
        raise ConfigError(
            f"log_with: {settings.log_with} writes files, but logging_dir is missing; name a "
            "folder, for example logging_dir = 'logs'"
        )
    for name in loggers:
        if not _is_installed(name):
            raise ConfigError(
                f"log_with: {name} is not installed; install it into the Python that trains: "
                f"{sys.executable} -m pip install {name}"
            )
    if loggers:
        name = "logging_dir" if settings.logging_dir else "output_dir"
        _require_writable(name, _place(config))


class Tracking:
    """Owned by the main process for one run; does nothing if no logger is asked for.

    Args:
        step: the run goes on after it; later points that were logged before are replaced.
        state: of the run that is continued; empty for a new one.
    """

    def __init__(
        self, config: Config, report: Reporter, *, step: int = 0, state: Mapping[str, Any]
    ) -> None:
        self._config = config
        self._report = report
        self._step = step
        self._given = dict(state)
        self._folder_name: str | None = state.get("folder")
        self._run_id: str = state.get("wandb_id") or secrets.token_hex(4)
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._trackers: list[tuple[str, Tracker, Background]] = []
        self.is_active = bool(_loggers(config.logging))

    def __enter__(self) -> Tracking:
        if not self.is_active:
            return self
        settings = self._config.logging
        folder = self._folder()
        arguments = read_arguments(settings.log_tracker_config)
        for name in _loggers(settings):
            tracker = self._tracker(name, folder, arguments.get(name, {}))
            self._trackers.append((name, tracker, Background(name, partial(self._give_up, name))))
        self._each(lambda tracker: tracker.open())
        if settings.log_config:
            logged = loggable_settings(self._config)
            self._each(lambda tracker: tracker.log_settings(self._step, logged))
        if settings.logging_dir:
            self._report(Message(f"logging to {folder}"))
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._each(lambda tracker: tracker.close())
        for name, _, background in self._trackers:
            if not background.finish(_PATIENCE_SECONDS):
                self._messages.put(
                    Message(
                        f"{name} still had something to write or to upload after "
                        f"{_PATIENCE_SECONDS} seconds; what it has written is kept",
                        level="warning",
                    )
                )
        self._tell()

    def state(self) -> dict[str, str]:
        """What a run that continues this one is given."""
        if not self.is_active:
            return self._given  # perhaps the next one logs again
        return {"wandb_id": self._run_id} | (
            {"folder": self._folder_name} if self._folder_name else {}
        )

    def log_step(
        self,
        step: int,
        *,
        loss: float,
        smoothed: float,
        learning_rates: Mapping[str, float],
        seconds: float,
        gradient_norm: float | None = None,
        memory_mib: float | None = None,
        max_norms: tuple[float, ...] | None = None,
    ) -> None:
        """An optimizer step; the learning rates by group of parameters.

        Of ``max_norms`` see `loss_history.Step`.
        """
        if not self.is_active:
            return
        known = {
            "loss/current": loss,
            "loss/average": smoothed,
            **{f"lr/{group}": rate for group, rate in learning_rates.items()},
            "grad_norm": gradient_norm,
            "time/step_seconds": seconds,
            "memory/peak_mib": memory_mib,
        }
        if max_norms:
            names = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")
            known |= dict(zip(names, max_norms, strict=True))
        self._log(step, {name: value for name, value in known.items() if value is not None})

    def log_validation(self, step: int, loss: float) -> None:
        """The loss of what is not trained, after ``step``."""
        self._log(step, {"loss/validation": loss})

    def log_epoch(self, step: int, loss: float) -> None:
        """The mean loss of the epoch that ended with ``step``."""
        self._log(step, {"loss/epoch": loss})

    def log_images(self, step: int, pictures: Sequence[Picture]) -> None:
        """The samples drawn after ``step``, each with its caption; nobody may change them."""
        self._each(lambda tracker: tracker.log_pictures(step, "samples", pictures))

    def log_loss_by_time(self, step: int, plot: Image.Image) -> None:
        """The mean loss at each noise level up to ``step``, as `plots` draws it."""
        self._each(lambda tracker: tracker.log_pictures(step, "loss/by_time", [("", plot)]))

    def rewind(self, step: int) -> None:
        """The run goes back to ``step`` and repeats the steps after it."""
        self._each(lambda tracker: tracker.go_back(step))

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda tracker: tracker.log(step, values))

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for _, tracker, background in self._trackers:
            background.call(partial(call, tracker))
        self._tell()

    def _tell(self) -> None:
        """Report here, in the training's thread, what the loggers' threads have to say."""
        while not self._messages.empty():
            self._report(self._messages.get())

    def _give_up(self, name: str, error: Exception) -> None:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        self._messages.put(
            Message(
                f"{name} cannot log any more ({reason or type(error).__name__}); the training goes "
                "on without it",
                level="warning",
            )
        )

    def _tracker(self, name: str, folder: Path, arguments: Mapping[str, Any]) -> Tracker:
        settings = self._config.logging
        project = settings.log_tracker_name
        if name == "tensorboard":
            return TensorBoard(folder, project, step=self._step, arguments=arguments)
        run_name = {"name": settings.wandb_run_name} if settings.wandb_run_name else {}
        return Wandb(
            folder,
            project,
            run_id=self._run_id,
            arguments={**run_name, **arguments},
            tell=self._messages.put,
        )

    def _folder(self) -> Path:
        """The folder of the run, made if it is a new one.

        Raises:
            EngineError: it cannot be made.
        """
        settings, place = self._config.logging, _place(self._config)
        if not settings.logging_dir:
            return place
        try:
            if self._folder_name is None or not (place / self._folder_name).is_dir():
                self._folder_name = _make_folder(place, settings.log_prefix)
        except OSError as error:
            raise EngineError(
                f"logging_dir: no folder can be made in {place} ({error.strerror}); choose another"
            ) from None
        return place / self._folder_name


def loggable_settings(config: Config) -> dict[str, Scalar]:
    """The settings of a training that are given, but for files and folders."""
    logged: dict[str, Scalar] = {}
    for name, field in FIELDS.items():
        if name in _NOT_LOGGED or GROUP_OF[name] in _OTHER_GROUPS:
            continue
        value = config.value(name)
        if value is None or Path in base_types(field.annotation):
            continue
        logged[name] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return logged


def _loggers(settings: LoggingConfig) -> tuple[str, ...]:
    if settings.log_with is None:
        return ("tensorboard",) if settings.logging_dir else ()
    return ("tensorboard", "wandb") if settings.log_with == "all" else (settings.log_with,)


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    # A folder of this name, such as the one that wandb makes for its runs, has no origin.
    return spec is not None and spec.origin is not None


def _place(config: Config) -> Path:
    """Where the folder of the run is made; wandb alone needs none of its own."""
    if config.logging.logging_dir:
        return config.logging.logging_dir
    assert config.output.output_dir is not None
    return Path(os.environ.get("WANDB_DIR") or config.output.output_dir)


def _require_writable(name: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name}: {folder} takes no logs ({error.strerror}); choose another folder"
        ) from None


def _make_folder(place: Path, prefix: str) -> str:
    """A new folder named after the time of day here; gives its name."""
    now = f"{prefix}{datetime.now():%Y%m%d%H%M%S}"
    name, number = now, 1
    while True:
        try:
            (place / name).mkdir(parents=True)
        except FileExistsError:
            number += 1
            name = f"{now}_{number}"
        else:
            return name
