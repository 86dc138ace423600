"""A browser, and the two servers whose page it opens: a replayed one and a real ComfyUI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pack.tests.comfyui.conftest import comfyui as comfyui
from pack.tests.comfyui.conftest import server as server
from pack.tests.comfyui.server import PACK, ComfyServer
from pack.tests.web.browser import start_browser
from pack.tests.web.frontend import Page
from pack.tests.web.replay import ReplayServer
from selenium import webdriver

DESIGNS = {"classic": False, "modern": True}  # on a canvas, and what ComfyUI calls Nodes 2.0


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    driver = start_browser()
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def object_info() -> dict[str, Any]:
    """What a ComfyUI said of our nodes and of those that the workflows use."""
    return json.loads((PACK / "workflows/source/object_info.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def replay_server(object_info: dict[str, Any]) -> Iterator[ReplayServer]:
    running = ReplayServer(object_info, PACK)
    yield running
    running.close()


@pytest.fixture
def replay(replay_server: ReplayServer) -> ReplayServer:
    """The replayed server, to which nobody has posted anything yet."""
    replay_server.prompts.clear()
    replay_server.commands.clear()
    replay_server.refusal = None
    return replay_server


@pytest.fixture(params=list(DESIGNS))
def design(request: pytest.FixtureRequest) -> str:
    """The frontend draws nodes in two ways."""
    return request.param


@pytest.fixture
def classic_page(browser: webdriver.Chrome, replay: ReplayServer) -> Page:
    """The page of the replayed server where the design makes no difference."""
    return Page(browser, replay.url, {"Comfy.VueNodes.Enabled": DESIGNS["classic"]})


@pytest.fixture
def page(browser: webdriver.Chrome, replay: ReplayServer, design: str) -> Page:
    """The page of the replayed server in either design."""
    return Page(browser, replay.url, {"Comfy.VueNodes.Enabled": DESIGNS[design]})


@pytest.fixture
def real_page(browser: webdriver.Chrome, server: ComfyServer) -> Page:
    """The page of a real ComfyUI."""
    return Page(browser, server.address, {"Comfy.VueNodes.Enabled": DESIGNS["classic"]})
