"""MagCache on the engine's own transformers: blocks are left out of the steps that a plan skips.

Each block of the model is put into a `_Passage` for the time of a sampling run, which hands the
call on or lets the tokens pass by. So embeddings, output layers and the model's own forward stay
as they are, and so do hooks and compilation of the blocks.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import DataError
from .magcache import Plan, full_plan
from .magcache_curves import CONDITIONAL, Calibration
from .magcache_forecast import Predict, reuse, weights


class HasBlocks(Protocol):
    """The part of an architecture that is needed here."""

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The layers that repeat, in the order in which they are run."""
        ...


@dataclass(frozen=True)
class BlockStreams:
    """What a family's blocks call the tokens they are given, and in which order they return them.

    ``outputs`` has one name if a block returns a tensor, not a tuple. The image's tokens are
    ``image``; all of them are cached, those of control images and earlier frames too.
    """

    image: str = "hidden_states"
    outputs: tuple[str, ...] = ("encoder_hidden_states", "hidden_states")


class Calibrator:
    """Compares the residuals of each step with those before; nothing waits for the device."""

    def __init__(self) -> None:
        self._before: dict[str, Tensor] = {}
        self._changes: dict[str, list[Tensor]] = {}

    def add(self, branch: str, residual_BND: Tensor) -> None:
        """Take the residual of a branch's next step."""
        changes = self._changes.setdefault(branch, [])
        before = self._before.get(branch)
        if before is not None:
            changes.append(residual_change(residual_BND, before))
        self._before[branch] = residual_BND

    def release(self) -> None:
        """Let go of the residuals; what was measured stays."""
        self._before.clear()

    def results(self) -> dict[str, Calibration]:
        """What was measured, by branch.

        Raises:
            DataError: residuals are zero or not finite.
        """
        found: dict[str, Calibration] = {}
        for branch, changes in self._changes.items():
            rows = [[1.0, 0.0, 0.0], *(change.tolist() for change in changes)]
            for step, row in enumerate(rows):
                if not all(map(math.isfinite, row)) or row[0] <= 0:
                    raise DataError(
                        f"the {branch} branch has no ratio at step {step + 1}: what the blocks add "
                        "is zero, NaN or infinite; look at a picture that is made without MagCache"
                    )
            found[branch] = Calibration(*(tuple(column) for column in zip(*rows, strict=True)))
        return found


def residual_change(residual_BND: Tensor, before_BND: Tensor) -> Tensor:
    """[3]: mean and standard deviation over the tokens of the ratio of lengths, mean of 1 - cosine.

    In float32, whatever the residuals are in; the published numbers are of bfloat16.
    """
    now, before = residual_BND.float(), before_BND.float()
    ratio_BN = now.norm(dim=-1) / before.norm(dim=-1)
    cosine_BN = torch.cosine_similarity(now, before, dim=-1)
    return torch.stack([ratio_BN.mean(), ratio_BN.std(), (1 - cosine_BN).mean()])


@dataclass
class _Branch:
    """How far a branch is, and the residuals of computed steps that are still needed."""

    next_step: int = 0
    residuals: dict[int, Tensor] = field(default_factory=dict)


class BlockCache:
    """The state of one sampling run, made by `cached_blocks`.

    Each call of the model is the next step of the branch that is being sampled. ``block_calls``
    counts the blocks that were computed.
    """

    def __init__(
        self,
        plan: Plan,
        streams: BlockStreams,
        *,
        predict: Predict = reuse,
        calibrator: Calibrator | None = None,
    ) -> None:
        self.plan, self.streams = plan, streams
        self.block_calls = 0
        self._calibrator = calibrator
        self._weights = weights(plan, predict)
        self._last_use = {
            source: step for step, sources in enumerate(self._weights) for source in sources
        }
        self._branches: dict[str, _Branch] = {}
        self._branch = CONDITIONAL
        self._entered_BND: Tensor | None = None

    @contextmanager
    def branch(self, name: str) -> Iterator[None]:
        """Calls of the model within belong to another branch of the guidance."""
        before, self._branch = self._branch, name
        try:
            yield
        finally:
            self._branch = before

    def calibration(self) -> dict[str, Calibration]:
        """What was measured, by branch.

        Raises:
            DataError: residuals are zero or not finite.
            ValueError: the run was not calibrated.
        """
        if self._calibrator is None:
            raise ValueError("this run measures nothing; it is not one of calibrated_blocks")
        return self._calibrator.results()

    def begin(self, image_BND: Tensor) -> None:
        """A call of the model has reached the first block with these tokens."""
        branch = self._branches.setdefault(self._branch, _Branch())
        step = branch.next_step
        if step == self.plan.steps:
            raise ValueError(
                f"the plan is for {self.plan.steps} steps, but the model was called once more; "
                "enter cached_blocks for each run"
            )
        if self.plan.computed[step]:
            # The blocks may need the memory.
            for source in [each for each in branch.residuals if self._last_use[each] < step]:
                del branch.residuals[source]
            self._entered_BND = image_BND

    @property
    def computes(self) -> bool:
        """Whether the step that has begun runs the blocks."""
        return self.plan.computed[self._branches[self._branch].next_step]

    def end(self, image_BND: Tensor) -> Tensor:
        """A call of the model has left the last block with these tokens; gives those to go on with.

        A skipped step leaves with what it entered with.
        """
        branch = self._branches[self._branch]
        step = branch.next_step
        branch.next_step += 1
        for source, weight in self._weights[step].items():
            image_BND = torch.add(image_BND, branch.residuals[source], alpha=weight)
        if self._entered_BND is not None:
            self._keep(step, image_BND - self._entered_BND)
            self._entered_BND = None
        return image_BND

    def clear(self) -> None:
        """Let go of all tensors."""
        self._branches.clear()
        self._entered_BND = None
        if self._calibrator:
            self._calibrator.release()

    def _keep(self, step: int, residual_BND: Tensor) -> None:
        if step in self._last_use:
            self._branches[self._branch].residuals[step] = residual_BND
        if self._calibrator:
            self._calibrator.add(self._branch, residual_BND)


class _Passage(nn.Module):
    """Stands in a block's place."""

    def __init__(self, block: nn.Module, cache: BlockCache, *, first: bool, last: bool) -> None:
        super().__init__()
        self.block = block
        self._cache, self._first, self._last = cache, first, last

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache, streams = self._cache, self._cache.streams
        given = _named(self.block, args, kwargs, (*streams.outputs, streams.image))
        if self._first:
            cache.begin(given[streams.image])
        returned: Any
        if cache.computes:
            cache.block_calls += 1
            returned = self.block(*args, **kwargs)
        elif len(streams.outputs) == 1:
            returned = given[streams.image]
        else:
            returned = tuple(given[name] for name in streams.outputs)
        return self._left(returned) if self._last else returned

    def _left(self, returned: Any) -> Any:
        """What the last block returns, with the image's tokens to go on with."""
        outputs = self._cache.streams.outputs
        if len(outputs) == 1:
            return self._cache.end(returned)
        place = outputs.index(self._cache.streams.image)
        return (*returned[:place], self._cache.end(returned[place]), *returned[place + 1 :])


@contextmanager
def cached_blocks(
    architecture: HasBlocks,
    transformer: nn.Module,
    plan: Plan,
    *,
    streams: BlockStreams | None = None,
    predict: Predict = reuse,
) -> Iterator[BlockCache]:
    """Skip the blocks in the steps that ``plan`` skips, for one sampling run without gradients.

    Needs one call of the model per step and branch. Afterwards the model is as it was and the
    residuals are gone, also after an error. A plan that computes everything changes nothing.

    Args:
        predict: one of `magcache_forecast.PREDICTIONS`.
    """
    cache = BlockCache(plan, streams or BlockStreams(), predict=predict)
    with _passages(architecture.blocks(transformer), transformer, cache):
        yield cache


@contextmanager
def calibrated_blocks(
    architecture: HasBlocks,
    transformer: nn.Module,
    steps: int,
    *,
    streams: BlockStreams | None = None,
) -> Iterator[BlockCache]:
    """Compute every step and measure; ask for `BlockCache.calibration` within or afterwards."""
    cache = BlockCache(full_plan(steps), streams or BlockStreams(), calibrator=Calibrator())
    with _passages(architecture.blocks(transformer), transformer, cache):
        yield cache


@contextmanager
def _passages(
    blocks: Sequence[nn.Module], transformer: nn.Module, cache: BlockCache
) -> Iterator[None]:
    places = _places(transformer, blocks)
    try:
        for index, (parent, name) in enumerate(places):
            first, last = index == 0, index == len(places) - 1
            parent.register_module(name, _Passage(blocks[index], cache, first=first, last=last))
        yield
    finally:
        for (parent, name), block in zip(places, blocks, strict=True):
            parent.register_module(name, block)
        cache.clear()


def _places(transformer: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[nn.Module, str]]:
    """The parent of each block, and its name there."""
    found = {
        child: (parent, name)
        for parent in transformer.modules()
        for name, child in parent.named_children()
    }
    return [found[block] for block in blocks]


def _named(
    block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], wanted: Sequence[str]
) -> dict[str, Any]:
    """The arguments of these names, whether they were passed by name or not."""
    if all(name in kwargs for name in wanted):
        return kwargs
    return inspect.signature(block.forward).bind(*args, **kwargs).arguments
