"""The recording of ComfyUI's nodes, and the workflows made with it, against a real ComfyUI."""

from __future__ import annotations

from typing import Any

import pytest
from pack.tests.comfyui.server import ComfyServer
from pack.tests.workflows.shipped import NAMES, RECORDING, TYPES, read
from pack.workflows.source import check
from pack.workflows.source.node_types import NodeType, read_types
from pack.workflows.source.record import OUR_PREFIX, reduced
from pack.workflows.source.ui import COMFYUI_VERSION

AGAIN = (
    "start ComfyUI with this pack, then: python -m workflows.source record http://127.0.0.1:8188"
)
OURS = {name for name in RECORDING if name.startswith(OUR_PREFIX)}


@pytest.fixture(scope="module")
def live(server: ComfyServer) -> dict[str, Any]:
    return reduced(server.object_info())


def test_our_nodes_are_recorded_as_they_are(live: dict[str, Any]) -> None:
    assert {name for name in live if name.startswith(OUR_PREFIX)} == OURS, AGAIN
    changed = [name for name in OURS if live[name] != RECORDING[name]]
    assert not changed, f"{changed} changed; {AGAIN}"


def test_the_nodes_of_comfyui_have_the_recorded_sockets_and_widgets(live: dict[str, Any]) -> None:
    def shape(kind: NodeType) -> Any:
        inputs = [(one.name, one.kind, one.required, one.is_widget) for one in kind.inputs({})]
        return inputs, kind.outputs

    now = read_types(live)
    changed = [name for name, kind in TYPES.items() if shape(kind) != shape(now[name])]
    assert not changed, f"{changed} changed; {AGAIN}"


def test_the_recording_is_exact_for_the_version_it_names(
    server: ComfyServer, live: dict[str, Any]
) -> None:
    version = server.get("/system_stats")["system"]["comfyui_version"]
    if version != COMFYUI_VERSION:
        pytest.skip(f"this ComfyUI is {version}, the recording is of {COMFYUI_VERSION}")
    assert live == RECORDING, AGAIN


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wrong_with_a_workflow_for_this_comfyui(name: str, live: dict[str, Any]) -> None:
    assert check.problems(read(name), read_types(live)) == []
