"""The node Loss: how wrong velocities are measured, with a picture of it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image

from ..engine import losses, plots
from .images import to_comfy
from .sockets import CATEGORY, LossType
from .widgets import combine, settings, widget

_LARGEST_ERROR = 2.0  # two standard deviations of the noise


class Loss(io.ComfyNode):
    """How errors count, and which."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoom_Loss",
            display_name="Loss",
            category=f"{CATEGORY}/settings",
            description="How errors are measured, what masks and regularization images count, and "
            "what the model should keep. With a picture of the loss.",
            search_aliases=["huber", "mask", "prior preservation", "regularization"],
            inputs=[
                widget("loss_type"),
                widget("huber_c", min=0.01),
                widget("noise_offset"),
                widget("unmasked_weight"),
                widget("prior_loss_weight"),
                widget("trigger_word"),
                widget("preservation_class"),
                widget("preservation_weight", advanced=True),
                widget("regularization_target", advanced=True),
            ],
            outputs=[
                LossType.Output(display_name="loss"),
                io.Image.Output(display_name="curve"),
            ],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        values = settings("Loss", widgets)
        config = combine(values, where="Loss").loss
        curve = loss_curve(config.loss_type, config.huber_c)
        return io.NodeOutput(values, to_comfy([curve]))


def loss_curve(chosen: str, huber_c: float) -> Image.Image:
    """What each error counts, beside the other kinds of loss."""
    errors = torch.linspace(-_LARGEST_ERROR, _LARGEST_ERROR, 401)
    zero = torch.zeros_like(errors)
    curves = {
        name: measure(errors, zero, huber_c).tolist() for name, measure in losses.MEASURES.items()
    }
    return plots.loss_functions(errors.tolist(), curves, chosen=chosen)
