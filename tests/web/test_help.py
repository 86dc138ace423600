"""Every node has a page that explains it, behind the button with the i."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pack.tests.comfyui.server import PACK, PACK_NAME, ComfyServer
from pack.tests.web.frontend import NO_PROXY, Page

DOCS = PACK / "web/docs"

pytestmark = pytest.mark.slow

_SELECT = """(name => { const node = LiteGraph.createNode(name);
    app.rootGraph.clear(); app.rootGraph.add(node); app.canvas.selectNode(node); })(a[0])"""
_SHOWN = "document.body.innerText.toLowerCase().replace(/[^a-z]+/g, '').includes(a[0])"


def test_every_node_has_a_help_page(object_info: dict[str, Any]) -> None:
    ours = {name for name in object_info if name.startswith("LoraLoom_")}
    assert {path.stem for path in DOCS.glob("*.md")} == ours


def test_the_help_page_of_a_node_is_shown(classic_page: Page) -> None:
    classic_page.open_template("demo_train_and_generate")
    for path in sorted(DOCS.glob("*.md")):
        classic_page.ask(_SELECT, path.stem)
        classic_page.click("[data-testid=info-button]")
        beginning = letters(path.read_text("utf-8"))[:60]
        classic_page.wait(_SHOWN, beginning)
    classic_page.screenshot("help")
    assert not classic_page.problems()


def test_a_real_comfyui_serves_the_pages(server: ComfyServer) -> None:
    folder = f"{server.address}/extensions/{PACK_NAME}/docs"
    for path in DOCS.glob("*.md"):
        with NO_PROXY.open(f"{folder}/{path.name}") as answer:
            assert answer.read() == path.read_bytes()


def letters(text: str) -> str:
    return re.sub(r"[^a-z]+", "", text.lower())
