"""The embedded tiny model and its dataset, so that a whole graph runs with nothing downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
from comfy_api.latest import io

from ..engine.architectures import ARCHITECTURES
from . import paths
from .sockets import CATEGORY, DatasetType, TextEncoderType, TrainingModelType

_MENU = f"{CATEGORY}/demo"
_FOLDER = Path(__file__).parents[1] / "engine" / "demo"
_FAMILY = "flux_kontext"
_DIT = _FOLDER / "model" / "transformer" / "flux1-kontext-tiny.safetensors"
_VAE = _FOLDER / "model" / "vae" / "ae.safetensors"
_TEXT_ENCODERS = {
    "text_encoder1": _FOLDER / "model" / "text_encoder_2",
    "text_encoder2": _FOLDER / "model" / "text_encoder",
}
_TOKENS = 512
_SIDE = 64


class DemoModel(io.ComfyNode):
    """Everything that the demo workflow needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_DemoModel",
            display_name="Demo Model",
            category=_MENU,
            description="A real FLUX.1 Kontext, only tiny: it draws coloured shapes of 64x64 "
            "pixels. With it come its VAE, its text encoder and 20 pictures of a creature that it "
            "does not know yet.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Vae.Output(display_name="vae"),
                TextEncoderType.Output(display_name="text encoder"),
                TrainingModelType.Output(display_name="training model"),
                DatasetType.Output(display_name="dataset"),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model = comfy.sd.load_diffusion_model(str(_DIT))
        vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(_VAE), safe_load=True))
        return io.NodeOutput(model, vae, _TEXT_ENCODERS, _training_model(), _dataset())


class DemoTextEncode(io.ComfyNode):
    """Text for the demo's model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_DemoTextEncode",
            display_name="Demo Text Encode",
            category=_MENU,
            description="Encodes a prompt for the demo model, such as: a large red loomling in "
            "the center on a cream background.",
            inputs=[
                TextEncoderType.Input("text_encoder"),
                io.String.Input("text", default="", multiline=True, tooltip="What to draw."),
            ],
            outputs=[io.Conditioning.Output(display_name="conditioning")],
        )

    @classmethod
    def execute(cls, text_encoder: dict[str, Path], text: str) -> io.NodeOutput:
        architecture = ARCHITECTURES[_FAMILY]
        encoders = architecture.load_text_encoders(
            **text_encoder, tokenizer1=None, tokenizer2=None, dtype=None, device="cpu"
        )
        encoded = architecture.encode_text(encoders, [text], _TOKENS)[0]
        pooled = {"pooled_output": encoded["pooled"][None].float()}
        return io.NodeOutput([[encoded["text_embeds"][None].float(), pooled]])


def _training_model() -> dict[str, Any]:
    return {
        "architecture": _FAMILY,
        "dit": _DIT,
        "vae": _VAE,
        **_TEXT_ENCODERS,
        "vae_dtype": "fp32",
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "device": "cpu",
        "cpu_threads": 1,
    }


def _dataset() -> dict[str, Any]:
    return {
        "image_directory": _FOLDER / "dataset" / "train",
        "resolution": (_SIDE, _SIDE),
        "batch_size": 8,
        "cache_directory": paths.own_cache("demo"),
    }
