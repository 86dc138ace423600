"""Imports the pack as ComfyUI does, after ComfyUI, and looks at what it brought along."""

from __future__ import annotations

import asyncio
import sys
import time

from headless import prepare

_, comfyui, pack = sys.argv
prepare(comfyui)

# ComfyUI's, all of which a server has imported before it loads packs.
import server  # noqa: E402, F401

import nodes  # noqa: E402

HEAVY = {"accelerate", "diffusers", "matplotlib", "torchvision", "transformers"}


def main() -> None:
    before = set(sys.modules)
    # The processor's time, because other processes may hold it while the clock goes on.
    start = time.process_time()
    loaded = asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
    seconds = time.process_time() - start
    assert loaded
    assert "LoraLoom_TrainLora" in nodes.NODE_CLASS_MAPPINGS
    brought = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert not brought & HEAVY, brought & HEAVY
    assert seconds < 0.3, seconds
    sys.stdout.write(f"{seconds:.3f} s\n")


main()
