from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pack.engine.dataset import (
    REGULARIZATION,
    BatchReader,
    CachedItem,
    choose_held_out,
    data_identity,
    epoch_batches,
    load_item,
    read_item,
)
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


def test_regularization_images_have_batches_of_their_own(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4, 4, 4, 8, 4, 4], repeats=2)
    items[3:] = [replace(item, is_regularization=True, repeats=1) for item in items[3:]]
    batches = epoch_batches(items, batch_size=4, seed=1, epoch=0)
    assert sorted(index for batch in batches for index in batch) == [0, 0, 1, 1, 2, 2, 3, 4, 5]
    for batch in batches:
        assert len({items[index].is_regularization for index in batch}) == 1
    with BatchReader(items, enumerate(batches)) as reader:
        for (_, batch), chosen in zip(reader, batches, strict=True):
            assert (REGULARIZATION in batch) == (chosen[0] >= 3)


def test_batches_without_anything_special_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Recorded before regularization images existed; a run of then continues as it was."""
    items = make_items(tmp_path, [4, 4, 8, 4, 8])
    recorded = [(1, 0), (3,), (2, 4)]
    assert epoch_batches(items, batch_size=2, seed=42, epoch=3) == recorded
    assert data_identity(items) == "afc67a963c448d51"


def test_a_second_text_comes_under_names_of_its_own(tmp_path: Path) -> None:
    [item] = make_items(tmp_path, [4])
    save_file({"text_embeds": torch.full((3, 4), 7.0)}, tmp_path / "class.safetensors")
    both = read_item(
        item.latents, item.text, "0", repeats=1, class_text=tmp_path / "class.safetensors"
    )
    tensors = load_item(both)
    assert tensors.keys() == {"latents", "text_embeds", "class_text_embeds"}
    assert (tensors["text_embeds"] == 0).all() and (tensors["class_text_embeds"] == 7).all()
    assert both.num_bytes == item.num_bytes + 3 * 4 * 4
    # With and without do not fit into one batch.
    assert sorted(map(len, epoch_batches([item, both], batch_size=2, seed=0, epoch=0))) == [1, 1]


def test_the_identity_tells_what_images_are_for(tmp_path: Path) -> None:
    items = make_items(tmp_path, [4, 4])
    prior = [items[0], replace(items[1], is_regularization=True)]
    identities = {
        data_identity(items),
        data_identity(prior),
        data_identity(items[:1]),
        data_identity(items[:1], items[1:]),
    }
    assert len(identities) == 4


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(2, 0.9, 1), (2, 0.01, 1), (10, 0.1, 1), (20, 0.15, 3), (10, 0.99, 9), (1000, 0.2, 200)],
)
def test_the_share_is_held_out_but_never_nothing_or_all(
    count: int, share: float, expected: int
) -> None:
    chosen = choose_held_out([f"image {index}" for index in range(count)], share=share, seed=1)
    assert len(chosen) == expected and chosen == sorted(set(chosen))


def test_what_is_held_out_depends_on_content_and_seed_alone() -> None:
    digests = [f"image {index}" for index in range(30)]

    def chosen(digests: list[str], seed: int = 1) -> set[str]:
        return {digests[index] for index in choose_held_out(digests, share=0.2, seed=seed)}

    assert chosen(digests) == chosen(digests[::-1])
    assert len({frozenset(chosen(digests, seed)) for seed in range(5)}) == 5


def test_a_new_image_moves_at_most_one_other() -> None:
    for size in range(2, 60):
        before = [f"image {index}" for index in range(size)]
        after = [*before, f"image {size}"]
        first = {before[index] for index in choose_held_out(before, share=0.2, seed=1)}
        second = {after[index] for index in choose_held_out(after, share=0.2, seed=1)}
        assert len((first ^ second) - {after[-1]}) <= 1


def test_every_image_is_held_out_as_often_as_another() -> None:
    digests = [f"image {index}" for index in range(20)]
    counts = Counter(
        index for seed in range(2000) for index in choose_held_out(digests, share=0.2, seed=seed)
    )
    # Each count is binomial with mean 400 and deviation 18; five deviations.
    assert all(abs(counts[index] - 400) < 90 for index in range(20))
