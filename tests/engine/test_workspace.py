from __future__ import annotations

import copy
import threading

import torch
from pack.engine.workspace import Workspace

CPU = torch.device("cpu")


def test_a_request_takes_over_the_memory_of_the_one_before() -> None:
    workspace = Workspace()
    first = workspace.empty("a", (4, 6), torch.float32, CPU)
    second = workspace.empty("a", (3, 5), torch.float32, CPU)
    assert second.shape == (3, 5) and second.is_contiguous()
    assert second.data_ptr() == first.data_ptr()


def test_names_and_types_do_not_share_memory() -> None:
    workspace = Workspace()
    requests = [("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16)]
    tensors = [workspace.empty(name, (8,), dtype, CPU) for name, dtype in requests]
    assert len({tensor.data_ptr() for tensor in tensors}) == 3


def test_memory_grows_to_what_was_asked_for() -> None:
    workspace = Workspace()
    workspace.empty("a", (8,), torch.float32, CPU)
    assert workspace.empty("a", (100, 3), torch.float32, CPU).fill_(1).sum() == 300
    assert workspace.empty("a", (), torch.float32, CPU).shape == ()


def test_another_thread_gets_memory_of_its_own() -> None:
    workspace = Workspace()
    mine = workspace.empty("a", (8,), torch.float32, CPU).fill_(1)
    thread = threading.Thread(
        target=lambda: workspace.empty("a", (8,), torch.float32, CPU).fill_(2)
    )
    thread.start()
    thread.join()
    assert mine.tolist() == [1] * 8


def test_a_copy_of_its_owner_shares_it() -> None:
    workspace = Workspace()
    assert copy.deepcopy({"workspace": workspace})["workspace"] is workspace
