"""LoRA Loom as a ComfyUI custom node pack; everything is in ``nodes`` and ``engine``."""

import importlib.util

WEB_DIRECTORY = "./web"

# Absent when pytest imports this file in a checkout without ComfyUI.
if importlib.util.find_spec("comfy_api"):
    from .nodes import comfy_entrypoint as comfy_entrypoint
