from __future__ import annotations

import platform
import subprocess
import sys
from typing import get_args

import psutil
import pytest
import torch
from pack.engine.config import FIELDS
from pack.engine.errors import EngineError
from pack.engine.hardware import (
    DTYPES,
    available_bytes,
    find_device,
    peak_memory_mib,
    resident_bytes,
    stored_or,
)
from pack.tests.conftest import ROOT


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


@pytest.mark.skipif(sys.platform == "win32", reason="a new process has nothing of its parent there")
def test_the_peak_of_a_child_is_its_own() -> None:
    block = torch.ones(2**27)  # 512 MiB that the parent has, which then starts the child
    code = "import torch; from engine import hardware; print(hardware.peak_memory_mib(device))"
    code = code.replace("device)", "torch.device('cpu'))")
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    del block
    assert float(child.stdout) < 512


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems do so by themselves")
def test_freed_memory_goes_back_to_the_system() -> None:
    """Also when small blocks lie between the large ones, which glibc would keep."""
    code = """
import torch
from engine import hardware
hardware.give_freed_memory_back()
before = hardware.resident_bytes()
kept = []
for _ in range(8):
    large = [torch.ones(2**20) for _ in range(8)]  # 32 MiB
    kept.append(torch.ones(2**10))
    del large
print(hardware.resident_bytes() - before)
"""
    child = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(child.stdout) < 8 * 2**20


def test_what_is_resident_and_what_is_available_are_in_bytes() -> None:
    total = psutil.virtual_memory().total
    block = torch.ones(2**24)
    assert block.nbytes < resident_bytes() < total
    available = available_bytes(torch.device("cpu"))
    assert available and 2**20 < available < total
    assert available_bytes(torch.device("meta")) is None


@pytest.mark.gpu
def test_available_memory_of_a_gpu_shrinks_by_what_is_allocated() -> None:
    device = torch.device("cuda")
    before = available_bytes(device)
    block = torch.ones(2**26, device=device)
    after = available_bytes(device)
    assert before and after and before - after >= block.nbytes
