"""Cached images -> batches, in an order that is a function of seed and epoch."""

from __future__ import annotations

import hashlib
import json
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from . import seeds
from .errors import DataError
from .weights import open_checkpoint

Batch = dict[str, Tensor]
# (index of the batch in the run, items in it)
Planned = tuple[int, tuple[int, ...]]
# What the names of the conditions of an image's second caption begin with.
CLASS_PREFIX = "class_"
# Marks a batch of regularization images.
REGULARIZATION = "regularization"
KEEP_IN_MEMORY_BYTES = 2**30


@dataclass(frozen=True)
class CachedItem:
    """One image in the cache; items with the same ``shapes`` fit into one batch.

    ``content`` identifies what the files hold; ``class_text`` is a second text, of the caption with
    the word of the class.
    """

    latents: Path
    text: Path
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    num_bytes: int
    content: str
    repeats: int = 1
    class_text: Path | None = None
    is_regularization: bool = False

    def files(self) -> list[tuple[str, Path]]:
        """Every file, with what the names of its tensors are to begin with."""
        files = [("", self.latents), ("", self.text)]
        return [*files, (CLASS_PREFIX, self.class_text)] if self.class_text else files


@dataclass(frozen=True)
class CachedData:
    """All images of a run: those to train, regularization images among them, and to measure."""

    train: list[CachedItem]
    validation: list[CachedItem]


def read_item(
    latents: Path,
    text: Path,
    content: str,
    *,
    repeats: int,
    class_text: Path | None = None,
    is_regularization: bool = False,
) -> CachedItem:
    """Describe one image's cache files from their headers."""
    item = CachedItem(latents, text, (), 0, content, repeats, class_text, is_regularization)
    shapes: list[tuple[str, tuple[int, ...]]] = []
    num_bytes = 0
    for prefix, path in item.files():
        checkpoint = open_checkpoint(path)
        shapes += [(prefix + name, entry.shape) for name, entry in checkpoint.entries.items()]
        num_bytes += sum(entry.num_bytes for entry in checkpoint.entries.values())
    return replace(item, shapes=tuple(sorted(shapes)), num_bytes=num_bytes)


def load_item(item: CachedItem) -> Batch:
    """All tensors of one image's cache files, without a batch dimension."""
    tensors: Batch = {}
    for prefix, path in item.files():
        checkpoint = open_checkpoint(path)
        tensors |= {prefix + name: checkpoint.read(name) for name in checkpoint.entries}
    return tensors


def data_identity(items: Sequence[CachedItem], validation: Sequence[CachedItem] = ()) -> str:
    """A fingerprint of what is trained on, and of what may end the training early."""
    facts = [
        (item.latents.name, item.content, item.repeats, *[REGULARIZATION] * item.is_regularization)
        for item in items
    ]
    facts += [(item.latents.name, item.content, "validation") for item in validation]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def choose_held_out(digests: Sequence[str], *, share: float, seed: int) -> list[int]:
    """Which of the images are for validation, as ascending indices.

    At least one, at most all but one. A function of the images' content and the seed alone: the
    order and the names make no difference, and a new image lets at most one other change sides.

    Args:
        digests: identity of each image; of at least two.
    """
    assert len(digests) > 1
    count = min(max(1, round(share * len(digests))), len(digests) - 1)
    ranks = {digest: seeds.derive(seed, f"validation {digest}") for digest in digests}
    order = sorted(range(len(digests)), key=lambda index: ranks[digests[index]])
    return sorted(order[:count])


def epoch_batches(
    items: Sequence[CachedItem], *, batch_size: int, seed: int, epoch: int
) -> list[tuple[int, ...]]:
    """The batches of one epoch as indices into ``items``.

    Every item comes as often as it repeats; a batch holds items of one shape, either all for
    regularization or none; the last batch of a shape may be short; items and batches are shuffled
    anew in each epoch.
    """
    generator = seeds.generator(seed, "epoch", epoch)
    by_kind: dict[object, list[int]] = {}
    for index, item in enumerate(items):
        kind = item.shapes, item.is_regularization
        by_kind.setdefault(kind, []).extend([index] * item.repeats)
    batches: list[tuple[int, ...]] = []
    for indices in by_kind.values():
        order = torch.randperm(len(indices), generator=generator).tolist()
        shuffled = [indices[position] for position in order]
        batches += [
            tuple(shuffled[start : start + batch_size])
            for start in range(0, len(shuffled), batch_size)
        ]
    return [batches[position] for position in torch.randperm(len(batches), generator=generator)]


class BatchReader:
    """Reads planned batches one ahead of their use, in a background thread.

    Tensors are kept in memory when all items together are smaller than ``keep_bytes``.
    Use as a context manager and iterate: gives (index, batch) with "latents" [B, C, T, H, W],
    perhaps "mask" [B, 1, T, H, W], and `REGULARIZATION` [B] in batches of regularization images.
    """

    def __init__(
        self,
        items: Sequence[CachedItem],
        plan: Iterator[Planned],
        *,
        pin_memory: bool = False,
        keep_bytes: int = KEEP_IN_MEMORY_BYTES,
    ) -> None:
        self._items = items
        self._plan = plan
        self._pin_memory = pin_memory
        self._keep = sum(item.num_bytes for item in items) <= keep_bytes
        self._kept: dict[int, Batch] = {}
        self._ready: queue.Queue[tuple[int, Batch] | Exception | None] = queue.Queue(maxsize=1)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batch reader", daemon=True)

    def __enter__(self) -> BatchReader:
        self._thread.start()
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        while self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)
            except queue.Empty:
                continue

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        result = self._ready.get()
        if result is None:
            raise StopIteration
        if isinstance(result, Exception):
            raise result
        return result

    def _work(self) -> None:
        result: Exception | None
        try:
            for index, chosen in self._plan:
                if self._closing.is_set():
                    return
                self._ready.put((index, self._batch(chosen)))
            result = None
        except OSError as error:
            result = DataError(f"{error.filename}: the cache cannot be read: {error.strerror}")
        # Raised again by the thread that waits for the batch, which would wait forever otherwise.
        except Exception as error:  # noqa: BLE001
            result = error
        if not self._closing.is_set():
            self._ready.put(result)

    def _batch(self, chosen: Sequence[int]) -> Batch:
        tensors = [self._item(index) for index in chosen]
        batch = {name: torch.stack([item[name] for item in tensors]) for name in tensors[0]}
        if self._items[chosen[0]].is_regularization:
            batch[REGULARIZATION] = torch.ones(len(chosen))
        return (
            {name: value.pin_memory() for name, value in batch.items()}
            if self._pin_memory
            else batch
        )

    def _item(self, index: int) -> Batch:
        if index in self._kept:
            return self._kept[index]
        tensors = load_item(self._items[index])
        if self._keep:
            self._kept[index] = tensors
        return tensors
