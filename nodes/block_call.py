"""One call of ComfyUI's diffusion model whose blocks are watched or skipped.

ComfyUI lets a function stand in for a block. Where others have put one already, it is called for
the block, so theirs and ours go together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .native_model import BlockName

# ComfyUI's options of a call, by name.
Options = Mapping[str, Any]
# A block's arguments and what ComfyUI adds to them -> what the block gives, all by name.
Replacer = Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]


class BlockCall:
    """One call of the diffusion model, with what its first and last blocks share."""

    def __init__(
        self,
        blocks: Sequence[BlockName],
        *,
        reused: Sequence[Tensor] = (),
        keep: Callable[[Tensor], None] | None = None,
    ) -> None:
        """
        Args:
            reused: residuals, one for each conditioning of the batch, with which to skip all
                blocks. Without them all run.
            keep: is given the residual of the batch if they run.
        """
        self.skips = bool(reused)
        self._blocks, self._reused, self._keep = blocks, reused, keep
        self._image_BND: Tensor | None = None

    def options(self, options: Options) -> dict[str, Any]:
        """Those of the call, with other blocks."""
        replaced = {**options.get("patches_replace", {})}
        blocks = {**replaced.get("dit", {})}
        names = self._blocks
        for name in names if self.skips else (names[0], names[-1]):
            replacer = self._pass if self.skips else self._watch
            blocks[name] = replacer(name, blocks.get(name))
        changed: dict[str, Any] = {**options, "patches_replace": {**replaced, "dit": blocks}}
        if self.skips and "double_block" in options.get("patches", {}):
            last = [_only_after(names[-1], patch) for patch in options["patches"]["double_block"]]
            changed["patches"] = {**options["patches"], "double_block": last}
        return changed

    def control(self, control: Options | None) -> Options | None:
        """What a ControlNet adds: what follows the last block, if the residual has the rest."""
        if not self.skips or control is None:
            return control
        kind, index = self._blocks[-1]
        name = "input" if kind == "double_block" else "output"
        values = [*control.get(name, [])]
        kept: dict[str, list[Any]] = {"input": [], "middle": [], "output": []}
        kept[name] = [None] * index + values[index : index + 1]
        return kept

    def _watch(self, name: BlockName, existing: Replacer | None) -> Replacer:
        """Computes the block, and keeps what all blocks together add."""

        def block(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            if name == self._blocks[0]:
                # Blocks and ControlNets change the tensor in place.
                self._image_BND = arguments["img"].clone()
            original = extra["original_block"]
            result = existing(arguments, extra) if existing else original(arguments)
            if name == self._blocks[-1]:
                entered_BND = self._image_BND
                assert entered_BND is not None and self._keep is not None
                left_BND = result["img"][:, _text_length(name, arguments) :]
                torch.sub(left_BND, entered_BND, out=entered_BND)
                self._keep(entered_BND)
            return result

        return block

    def _pass(self, name: BlockName, existing: Replacer | None) -> Replacer:
        """Computes nothing; the picture leaves the last block with the residual."""

        def block(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
            image_BND = arguments["img"]
            if name == self._blocks[0]:
                kept = [residual.to(image_BND.device) for residual in self._reused]
                self._image_BND = image_BND + (kept[0] if len(kept) == 1 else torch.cat(kept))
            result = {part: arguments[part] for part in ("img", "txt") if part in arguments}
            if name == self._blocks[-1]:
                assert self._image_BND is not None
                text_BND = image_BND[:, : _text_length(name, arguments)]
                alone = not text_BND.shape[1]
                result["img"] = (
                    self._image_BND if alone else torch.cat([text_BND, self._image_BND], dim=1)
                )
            return result

        return block


def _text_length(name: BlockName, arguments: Options) -> int:
    """How many tokens of text stand before the picture's."""
    kind, _ = name
    return arguments["transformer_options"]["img_slice"][0] if kind == "single_block" else 0


def _only_after(last: BlockName, patch: Callable[..., Any]) -> Callable[..., Any]:
    """A patch of a block's output, as it is in a step that skips all: the residual has the rest."""

    def patched(arguments: dict[str, Any]) -> dict[str, Any]:
        return patch(arguments) if ("double_block", arguments["block_index"]) == last else arguments

    return patched
