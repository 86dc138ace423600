"""Nodes that read a folder of images and encode it with the encoders that ComfyUI has loaded."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io, ui

from ..engine import contact_sheet, manifest
from ..engine.config import FIELDS
from ..engine.errors import DataError
from ..engine.jobs import cache, sample_plan
from . import native, paths
from .images import to_comfy
from .progress import NodeProgress
from .sockets import CATEGORY, DatasetType, LossType, SamplesType, ValidationType
from .widgets import combine, settings, widget

_OTHER_FOLDERS = ("control_directory", "mask_directory", "regularization_directory")


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
                io.Combo.Input(
                    "mask_folder",
                    options=[paths.NO_FOLDER, *folders],
                    optional=True,
                    advanced=True,
                    tooltip=FIELDS["mask_directory"].description,
                ),
                widget("alpha_mask", optional=True, advanced=True),
                io.Combo.Input(
                    "regularization_folder",
                    options=[paths.NO_FOLDER, *folders],
                    optional=True,
                    advanced=True,
                    tooltip=FIELDS["regularization_directory"].description,
                ),
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
            paths.chosen_folder(folder)
        except DataError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: str | None = None,
        control_folder: str | None = None,
        mask_folder: str | None = None,
        regularization_folder: str | None = None,
        **widgets: Any,
    ) -> str:
        return paths.fingerprint(folder, control_folder, mask_folder, regularization_folder)

    @classmethod
    def execute(
        cls,
        folder: str,
        control_folder: str,
        mask_folder: str = paths.NO_FOLDER,
        regularization_folder: str = paths.NO_FOLDER,
        **widgets: Any,
    ) -> io.NodeOutput:
        values = settings("Dataset from Folder", widgets)
        others = (control_folder, mask_folder, regularization_folder)
        values |= {"image_directory": paths.dataset_folder(folder)}
        values |= dict(zip(_OTHER_FOLDERS, map(paths.chosen_folder, others), strict=True))
        samples, others = _scan(values)
        sheet = to_comfy([contact_sheet.contact_sheet(samples)])
        report = _describe(
            samples, others, repeats=values["num_repeats"], batch=values["batch_size"]
        )
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
                LossType.Input(
                    "loss", optional=True, tooltip="Connect it if it has a preservation_class."
                ),
                ValidationType.Input(
                    "validation", optional=True, tooltip="Whose pictures are encoded, too."
                ),
                SamplesType.Input(
                    "samples", optional=True, tooltip="Whose prompts are encoded, too."
                ),
            ],
            outputs=[
                DatasetType.Output(display_name="dataset"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        dataset: dict[str, Any],
        vae: Any,
        clip: Any,
        loss: dict[str, Any] | None = None,
        validation: dict[str, Any] | None = None,
        samples: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        with NodeProgress(cls.hidden.unique_id) as progress:
            architecture = native.architecture_of(vae, clip)
            config = combine(dataset, loss, validation, samples, where="Cache Dataset")
            encoders = native.encoders(vae, clip, architecture)
            cache.run_with(config, architecture, encoders, progress)
            sample_plan.encode_with(config, architecture, encoders, progress)
        report = "\n".join(progress.messages)
        return io.NodeOutput(dataset, report, ui=ui.PreviewText(report))


def _scan(values: dict[str, Any]) -> tuple[list[manifest.Sample], list[manifest.Sample]]:
    """What is trained, and what the model should keep."""
    extension = values["caption_extension"]
    samples = manifest.scan_folder(
        values["image_directory"],
        caption_extension=extension,
        control_directory=values["control_directory"],
        mask_directory=values["mask_directory"],
        alpha_mask=values.get("alpha_mask", False),
    )
    folder = values["regularization_directory"]
    if folder is None:
        return samples, []
    setting = "regularization_directory"
    return samples, manifest.scan_folder(folder, setting=setting, caption_extension=extension)


def _describe(
    samples: list[manifest.Sample], others: list[manifest.Sample], *, repeats: int, batch: int
) -> str:
    widths, heights = zip(*(sample.size for sample in samples), strict=True)
    lengths = [len(sample.caption.split()) for sample in samples]
    controls = sum(bool(sample.controls) for sample in samples)
    masks = sum(bool(sample.mask) for sample in samples)
    lines = [
        f"{len(samples)} images with captions, {controls} with control images"
        + (f", {masks} with masks" if masks else ""),
        f"{min(widths)}-{max(widths)} pixels wide, {min(heights)}-{max(heights)} high",
        f"captions of {min(lengths)} to {max(lengths)} words",
    ]
    if others:
        lines.append(f"{len(others)} regularization images")
    batches = -(-len(samples) * repeats // batch) + -(-len(others) // batch)
    return "\n".join([*lines, f"about {batches} batches of {batch} an epoch"])
