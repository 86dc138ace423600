"""Nodes that read a folder of images and encode it with the encoders that ComfyUI has loaded."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..engine import contact_sheet, manifest
from ..engine.config import FIELDS
from ..engine.errors import DataError
from ..engine.jobs import cache
from . import native, paths
from .images import to_comfy
from .progress import NodeProgress
from .sockets import CATEGORY, DatasetType
from .widgets import combine, settings, widget


class DatasetFromFolder(io.ComfyNode):
    """Images and captions of a folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        folders = paths.dataset_folders()
        return io.Schema(
            node_id="LoraLoom_DatasetFromFolder",
            display_name="Dataset from Folder",
            category=CATEGORY,
            description="Training images: a folder below ComfyUI's input or datasets folder, with "
            "a .txt caption of the same name beside each image.",
            search_aliases=["dataset", "training images"],
            inputs=[
                io.Combo.Input(
                    "folder", options=folders, tooltip=FIELDS["image_directory"].description
                ),
                widget("resolution", default=FIELDS["resolution"].default[0], min=16, max=8192),
                widget("batch_size"),
                widget("num_repeats"),
                io.Combo.Input(
                    "control_folder",
                    options=[paths.NO_FOLDER, *folders],
                    tooltip=FIELDS["control_directory"].description,
                ),
                widget("enable_bucket", advanced=True),
                widget("bucket_no_upscale", advanced=True),
                widget("caption_extension", advanced=True),
                widget("text_max_length", advanced=True),
            ],
            outputs=[
                DatasetType.Output(display_name="dataset"),
                io.Image.Output(display_name="contact sheet"),
                io.String.Output(display_name="report"),
            ],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        # Any folder below the roots will do, not only one of the list.
        try:
            _folders(folder)
        except DataError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls, folder: str | None = None, control_folder: str | None = None, **widgets: Any
    ) -> str:
        try:
            return _listing(*_folders(folder, control_folder))
        except DataError as error:
            return str(error)

    @classmethod
    def execute(cls, folder: str, control_folder: str, **widgets: Any) -> io.NodeOutput:
        images, controls = _folders(folder, control_folder)
        assert images is not None
        values = settings("Dataset from Folder", widgets)
        values |= {"image_directory": images, "control_directory": controls}
        samples = manifest.scan_folder(
            images, caption_extension=values["caption_extension"], control_directory=controls
        )
        sheet = to_comfy([contact_sheet.contact_sheet(samples)])
        report = _describe(samples, repeats=values["num_repeats"], batch=values["batch_size"])
        return io.NodeOutput(values, sheet, report, ui=ui.PreviewText(report))


class CacheDataset(io.ComfyNode):
    """Encodes what changed of a dataset with native encoders."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_CacheDataset",
            display_name="Cache Dataset",
            category=CATEGORY,
            description="Encodes images and captions with the VAE and text encoders that ComfyUI "
            "has loaded, of any file it reads. Only what changed is encoded again.",
            is_output_node=True,
            inputs=[
                DatasetType.Input("dataset"),
                io.Vae.Input("vae", tooltip="The VAE of the model that will be trained."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
            ],
            outputs=[
                DatasetType.Output(display_name="dataset"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset: dict[str, Any], vae: Any, clip: Any) -> io.NodeOutput:
        with NodeProgress(cls.hidden.unique_id) as progress:
            architecture = native.architecture_of(vae, clip)
            config = combine(dataset, where="Cache Dataset")
            encoders = native.encoders(vae, clip, architecture)
            cache.run_with(config, architecture, encoders, progress)
        report = progress.messages[-1]
        return io.NodeOutput(dataset, report, ui=ui.PreviewText(report))


def _folders(*names: str | None) -> list[Path | None]:
    """The folder of each name; None for what is linked, and so not known yet, or left out."""
    return [
        paths.dataset_folder(name) if name and name != paths.NO_FOLDER else None for name in names
    ]


def _listing(*folders: Path | None) -> str:
    """Changes when a file is added, removed or changed, or the cache is deleted."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder else []:
            stat = path.stat()
            facts = (stat.st_mtime_ns, stat.st_size) if path.is_file() else ()
            digest.update(repr((path.name, facts)).encode())
    return digest.hexdigest()


def _describe(samples: list[manifest.Sample], *, repeats: int, batch: int) -> str:
    widths, heights = zip(*(sample.size for sample in samples), strict=True)
    lengths = [len(sample.caption.split()) for sample in samples]
    controls = sum(bool(sample.controls) for sample in samples)
    lines = [
        f"{len(samples)} images with captions, {controls} with control images",
        f"{min(widths)}-{max(widths)} pixels wide, {min(heights)}-{max(heights)} high",
        f"captions of {min(lengths)} to {max(lengths)} words",
        f"about {-(-len(samples) * repeats // batch)} batches of {batch} an epoch",
    ]
    return "\n".join(lines)
