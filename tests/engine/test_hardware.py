from __future__ import annotations

from typing import get_args

import psutil
import pytest
import torch
from pack.engine.config import FIELDS
from pack.engine.errors import EngineError
from pack.engine.hardware import DTYPES, find_device, peak_memory_mib, stored_or


@pytest.mark.parametrize(
    "setting", ["mixed_precision", "save_precision", "vae_dtype", "text_encoder_dtype"]
)
def test_every_choice_of_a_number_type_is_known(setting: str) -> None:
    for choice in get_args(FIELDS[setting].annotation):
        assert stored_or(choice) is (None if choice == "auto" else DTYPES[choice])


def test_no_mixed_precision_is_float32() -> None:
    assert DTYPES["no"] is DTYPES["fp32"] is torch.float32


def test_the_device_found_by_itself_can_be_used() -> None:
    device = find_device("auto")
    assert torch.ones(3, device=device).sum().item() == 3
    assert (device.type == "cpu") is not torch.accelerator.is_available()


def test_a_device_is_found_by_its_name() -> None:
    assert find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "xpu:99"])
def test_a_device_that_is_not_there_is_named_with_the_way_out(name: str) -> None:
    with pytest.raises(EngineError, match=f"device '{name}' is not available here; use .*'cpu'"):
        find_device(name)


def test_the_peak_is_in_mib_and_stays() -> None:
    block = torch.ones(2**24)  # 64 MiB of float32, written
    now = psutil.Process().memory_info().rss / 2**20
    del block
    peak = peak_memory_mib(torch.device("cpu"))
    # The kernel adds up what each processor counts only now and then: not exact to the page, but
    # without the block, or in another unit, the peak would be off by more than half the block.
    assert now - 32 <= peak <= psutil.virtual_memory().total / 2**20
