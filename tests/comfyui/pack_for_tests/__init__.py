"""A node for tests: FLUX's text encoders in a small size, which ComfyUI's loader cannot guess."""

from __future__ import annotations

import json

import comfy.sd
import comfy.utils
from comfy_api.latest import ComfyExtension, io


class TinyTextEncoders(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraLoomTest_TinyTextEncoders",
            inputs=[
                io.String.Input("t5"),
                io.String.Input("clip"),
                io.String.Input(
                    "sizes", tooltip="JSON: t5xxl_model_config and model_config (of CLIP)"
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def execute(cls, t5: str, clip: str, sizes: str) -> io.NodeOutput:
        return io.NodeOutput(
            comfy.sd.load_text_encoder_state_dicts(
                [comfy.utils.load_torch_file(path, safe_load=True) for path in (clip, t5)],
                clip_type=comfy.sd.CLIPType.FLUX,
                model_options=json.loads(sizes),
            )
        )


class Pack(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [TinyTextEncoders]


async def comfy_entrypoint() -> Pack:
    return Pack()
