"""TensorBoard and wandb, through accelerate's trackers.

Both may be slow, and wandb may wait for a network, so their methods are called in a thread beside
the training (see `background`): `open` first, all in the same thread. An `Accelerator` must exist.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from .events import Message

Scalar = bool | int | float | str
Picture = tuple[str, Image.Image]  # with its caption

_PUBLIC_SERVER = "https://api.wandb.ai"
_SERVER_SECONDS = 5
# An older wandb knows fewer of these. Machine, command line and code are nobody's business, and
# what we print are events.
_WANDB_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "finish_timeout": 20.0,
    "host": "",
    "init_timeout": 30.0,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
    # What is not flushed is lost when the machine goes down.
    "x_transaction_log_flush_interval": 2.0,
}


class Tracker(Protocol):
    """One place that curves and pictures go to; x is the number of optimizer steps."""

    def open(self) -> None:
        """Begin or continue the run."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Points of curves."""
        ...

    def log_pictures(self, step: int, name: str, pictures: Sequence[Picture]) -> None:
        """Pictures that belong together."""
        ...

    def log_settings(self, step: int, settings: Mapping[str, Scalar]) -> None:
        """What the run was made with."""
        ...

    def go_back(self, step: int) -> None:
        """The run repeats what came after ``step``."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """Event files in ``folder/project``.

    Args:
        step: the run goes on after it; later points of earlier files count no more.
        arguments: more of ``torch.utils.tensorboard.SummaryWriter``.
    """

    def __init__(
        self, folder: Path, project: str, *, step: int, arguments: Mapping[str, Any]
    ) -> None:
        self._folder, self._project, self._step = folder, project, step
        self._arguments = arguments

    def open(self) -> None:
        """Begin a file; readers join it to those before."""
        from accelerate.tracking import TensorBoardTracker

        self._tracker = TensorBoardTracker(
            self._project, self._folder, purge_step=self._step + 1, **self._arguments
        )
        self._tracker.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Points, in the file when this returns."""
        self._tracker.log(dict(values), step=step)

    def log_pictures(self, step: int, name: str, pictures: Sequence[Picture]) -> None:
        """Each under a name of its own, because sizes differ; captions as text."""
        for index, (_, picture) in enumerate(pictures):
            pixels_1HWC = np.asarray(picture.convert("RGB"))[None]
            tag = f"{name}/{index:02d}" if len(pictures) > 1 else name
            self._tracker.log_images({tag: pixels_1HWC}, step=step, dataformats="NHWC")
        if any(caption for caption, _ in pictures):
            lines = [f"{index:02d}. {caption}  " for index, (caption, _) in enumerate(pictures)]
            self._tracker.writer.add_text(f"{name}/captions", "\n".join(lines), step)
        self._tracker.writer.flush()

    def log_settings(self, step: int, settings: Mapping[str, Scalar]) -> None:
        """A table of text, and hyperparameters to compare runs by."""
        from torch.utils.tensorboard.summary import hparams

        writer = self._tracker.writer
        table = ["| setting | value |", "|---|---|"]
        table += [f"| {name} | {value} |" for name, value in settings.items()]
        writer.add_text("settings", "\n".join(table), step)
        # Not by the tracker, which makes another run of them, in a folder named after the time.
        assert writer.file_writer is not None
        for summary in hparams(dict(settings), {"loss/average": 0.0}):
            writer.file_writer.add_summary(summary, step)
        writer.flush()

    def go_back(self, step: int) -> None:
        """Later points count no more."""
        self.close()
        self._step = step
        self.open()

    def close(self) -> None:
        """End the file."""
        self._tracker.finish()


class Wandb:
    """A run in ``folder/wandb``, sent to the server if the user is logged in and it answers.

    wandb takes nothing back: of a step that is repeated it keeps the first values. What an earlier
    process of the run has logged is noted beside its files.

    Args:
        run_id: the same one continues the run.
        arguments: more of ``wandb.init``.
        tell: takes a message, in this thread.
    """

    def __init__(
        self,
        folder: Path,
        project: str,
        *,
        run_id: str,
        arguments: Mapping[str, Any],
        tell: Callable[[Message], None],
    ) -> None:
        self._folder, self._project, self._run_id = folder, project, run_id
        self._arguments = dict(arguments)
        self._tell = tell
        self._note = folder / "wandb" / f"{run_id}.last_step"
        self._before = self._last = -1

    def open(self) -> None:
        """Begin or continue the run; without its server the files are written all the same."""
        # Its reports of its own errors would go out even if nobody is logged in.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        mode = self._mode()
        try:
            self._start(mode)
        except (wandb.Error, TimeoutError, ValueError) as error:
            if mode != "online":
                raise
            self._warn(str(error).partition("\n")[0])
            # The process behind wandb may still hold the first one.
            self._run_id = f"{self._run_id}-offline"
            self._start("offline")
        self._before = self._last = self._noted()

    def _start(self, mode: str) -> None:
        import wandb
        from accelerate.tracking import WandBTracker

        known = wandb.Settings.model_fields
        settings = {name: value for name, value in _WANDB_SETTINGS.items() if name in known}
        self._tracker = WandBTracker(
            self._project,
            dir=str(self._folder),
            id=self._run_id,
            resume="allow",
            settings=wandb.Settings(**settings),
            **{**self._arguments, "mode": mode},
        )
        self._tracker.start()
        if mode == "offline":
            files = Path(self._tracker.run.dir).parent
            self._tell(
                Message(f'wandb writes offline; to upload it: wandb login; wandb sync "{files}"')
            )

    def _mode(self) -> str:
        import wandb

        settings = wandb.setup().settings
        mode = self._arguments.get("mode", settings.mode)
        if mode in ("disabled", "offline", "dryrun"):
            return "offline" if mode == "dryrun" else mode
        if not _is_logged_in(settings):
            return "offline"
        if not _answers(settings.base_url):
            self._warn(f"{settings.base_url} does not answer")
            return "offline"
        return "online"

    def _warn(self, reason: str) -> None:
        text = f"wandb: {reason}, so the run is written offline; nothing of it is lost"
        self._tell(Message(text, "warning"))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Points, unless the step was logged before."""
        if self._tracker.run.disabled or step <= self._before or step < self._last:
            return
        if step > self._last:
            self._last = step
            self._note.parent.mkdir(exist_ok=True)
            # First, as a missing point is better than two.
            self._note.write_text(str(step), "utf-8")
        self._tracker.log(dict(values), step=step)

    def log_pictures(self, step: int, name: str, pictures: Sequence[Picture]) -> None:
        """Pictures with their captions, unless the step was logged before."""
        import wandb

        self.log(step, {name: [wandb.Image(picture, caption=text) for text, picture in pictures]})

    def log_settings(self, step: int, settings: Mapping[str, Scalar]) -> None:
        """As the run's config."""
        self._tracker.run.config.update(dict(settings), allow_val_change=True)

    def go_back(self, step: int) -> None:
        """Nothing: the run goes on where it was when the repetition has come so far."""

    def close(self) -> None:
        """Write what is left, and wait a while for the upload."""
        import wandb

        self._tracker.finish()
        wandb.teardown()  # waits for the process that writes the file

    def _noted(self) -> int:
        text = self._note.read_text("utf-8") if self._note.exists() else ""
        return int(text) if text.isdecimal() else -1


def _is_logged_in(settings: Any) -> bool:
    """Whether wandb would find a key: in the environment, its settings or the user's netrc."""
    import wandb

    if settings.api_key or settings.identity_token_file:
        return True
    is_public = settings.base_url == wandb.Settings.model_fields["base_url"].default
    servers = {settings.base_url, _PUBLIC_SERVER} if is_public else {settings.base_url}
    return any(_is_in_netrc(urlsplit(server).netloc) for server in servers)


def _is_in_netrc(machine: str) -> bool:
    home = Path.home()
    paths = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else []
    for path in paths or [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(path).authenticators(machine):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _answers(url: str) -> bool:
    """Whether there is a server; without one wandb would try for minutes."""
    import requests

    try:
        # A function as ``auth`` keeps requests from sending what the netrc holds.
        requests.head(url, timeout=_SERVER_SECONDS, auth=lambda request: request)
    except requests.exceptions.SSLError:
        return True  # wandb has certificates of its own
    except requests.RequestException:
        return False
    return True
