from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from pack.engine.dataset import BatchReader, CachedItem, data_identity, epoch_batches, read_item
from pack.engine.errors import CheckpointError
from safetensors.torch import save_file


def make_items(folder: Path, sides: list[int], repeats: int = 1) -> list[CachedItem]:
    items = []
    for index, side in enumerate(sides):
        latents, text = folder / f"{index}.safetensors", folder / f"{index}_text.safetensors"
        save_file({"latents": torch.full((2, 1, side, side), float(index))}, latents)
        save_file({"text_embeds": torch.full((3, 4), float(index))}, text)
        items.append(read_item(latents, text, str(index), repeats=repeats))
    return items


def test_every_item_comes_as_often_as_it_repeats_in_batches_of_one_shape(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4, 4, 8, 4, 8, 4, 4], repeats=3)
    batches = epoch_batches(items, batch_size=4, seed=1, epoch=0)
    assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(7), 3)
    for batch in batches:
        assert len({items[index].shapes for index in batch}) == 1 and len(batch) <= 4
    assert len(batches) == 4 + 2


def test_the_order_is_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4] * 10)
    orders = {
        tuple(epoch_batches(items, batch_size=2, seed=seed, epoch=epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
        for _ in range(2)
    }
    assert len(orders) == 4


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
def test_batches_arrive_in_order_with_their_tensors(tmp_path: Path, keep_bytes: int) -> None:
    items = make_items(tmp_path, [4, 4, 4])
    plan = [(7, (0, 2)), (8, (1,)), (9, (2, 0))]
    with BatchReader(items, iter(plan), keep_bytes=keep_bytes) as reader:
        read = list(reader)
    assert [index for index, _ in read] == [7, 8, 9]
    assert read[0][1]["latents"].shape == (2, 2, 1, 4, 4)
    assert [batch["text_embeds"][:, 0, 0].tolist() for _, batch in read] == [[0, 2], [1], [2, 0]]


def test_a_reader_that_is_left_early_ends_its_thread(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4])
    before = threading.active_count()
    with BatchReader(items, ((index, (0,)) for index in range(10**9))) as reader:
        next(reader)
    assert threading.active_count() == before


def test_a_damaged_file_is_an_error_of_the_reader_s_user(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4])
    items[0].latents.write_bytes(b"")
    with (
        BatchReader(items, iter([(0, (0,))])) as reader,
        pytest.raises(CheckpointError, match=r"0\.safetensors: the file is empty"),
    ):
        next(reader)


def test_the_data_s_identity_changes_with_its_content(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4, 4])
    other = make_items(tmp_path, [4, 4], repeats=2)
    assert data_identity(items) == data_identity(make_items(tmp_path, [4, 4]))
    assert len({data_identity(items), data_identity(other), data_identity(items[:1])}) == 3
