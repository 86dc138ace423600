"""What TensorBoard and wandb wrote, read without the code that wrote it."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

_BLOCK = 32768


def log_out(home: Path, patch: pytest.MonkeyPatch) -> None:
    """Nobody is logged in to wandb, whoever runs the tests."""
    for name in os.environ:
        if name.startswith("WANDB_") or name == "NETRC":
            patch.delenv(name)
    home.mkdir()
    for name in ("HOME", "USERPROFILE"):
        patch.setenv(name, str(home))


class Events:
    """What TensorBoard shows of a folder of event files."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import (
            SCALARS,
            EventAccumulator,
        )

        self._accumulator = EventAccumulator(str(folder), {SCALARS: 0})
        self._accumulator.Reload()

    def scalars(self) -> dict[str, dict[int, float]]:
        """Of each curve the value at each step; fails if a step comes twice."""
        curves: dict[str, dict[int, float]] = {}
        for tag in self._accumulator.Tags()["scalars"]:
            points = [(event.step, event.value) for event in self._accumulator.Scalars(tag)]
            curves[tag] = dict(points)
            assert len(curves[tag]) == len(points), f"{tag} has a step twice"
        return curves

    def images(self) -> dict[str, dict[int, Image.Image]]:
        """Of each name the picture at each step."""
        accumulator = self._accumulator
        return {
            tag: {
                event.step: Image.open(io.BytesIO(event.encoded_image_string))
                for event in accumulator.Images(tag)
            }
            for tag in accumulator.Tags()["images"]
        }

    def texts(self) -> dict[str, dict[int, str]]:
        """Of each name the text at each step."""
        accumulator = self._accumulator
        return {
            tag.removesuffix("/text_summary"): {
                event.step: event.tensor_proto.string_val[0].decode()
                for event in accumulator.Tensors(tag)
            }
            for tag in accumulator.Tags()["tensors"]
            if tag.endswith("/text_summary")
        }

    def hyperparameters(self) -> dict[str, Any]:
        """The settings that runs are compared by."""
        from tensorboard.plugins.hparams import metadata

        contents = self._accumulator.summary_metadata["_hparams_/session_start_info"]
        info = metadata.parse_session_start_info_plugin_data(contents.plugin_data.content)
        return {
            name: getattr(value, value.WhichOneof("kind")) for name, value in info.hparams.items()
        }


def wandb_folders(folder: Path) -> list[Path]:
    """Those of the processes that wrote offline, the oldest first."""
    return sorted(
        (path for path in (folder / "wandb").iterdir() if path.name.startswith("offline-run-")),
        key=lambda path: path.stat().st_ctime_ns,
    )


def wandb_rows(folder: Path) -> dict[int, dict[str, Any]]:
    """What ``wandb sync`` would send of each step; fails if a step comes twice."""
    rows: dict[int, dict[str, Any]] = {}
    for record in _records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            step = items.pop("_step")
            assert step not in rows, f"step {step} comes twice"
            rows[step] = {name: value for name, value in items.items() if name[0] != "_"}
    return rows


def wandb_run(folder: Path) -> Any:
    """Id, project, name ... of the run."""
    return next(r.run for r in _records(folder) if r.WhichOneof("record_type") == "run")


def wandb_config(folder: Path) -> dict[str, Any]:
    """The settings that were given."""
    return {
        item.key: json.loads(item.value_json)
        for record in _records(folder)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }


def _records(folder: Path) -> Iterator[Any]:
    """The records of a .wandb file: a log in LevelDB's format behind 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
    if len(data) < 7:
        return  # killed while it began
    assert data.startswith(b":W&B")
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + 7 : at + 7 + length]
        if len(part) < length:
            return  # cut short by the end of the process
        full, first, last = kind == 1, kind == 2, kind == 4
        parts = part if full or first else parts + part
        if full or last:
            yield Record.FromString(parts)
        at += 7 + length
