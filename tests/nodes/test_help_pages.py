"""The pages that ComfyUI shows for a node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text("utf-8") for path in (ROOT / "web" / "docs").glob("*.md")}
NODE_IDS = {
    node_id
    for path in (ROOT / "nodes").glob("*.py")
    for node_id in re.findall(r'node_id="(\w+)"', path.read_text("utf-8"))
}


def test_every_node_has_a_page_and_every_page_a_node() -> None:
    assert PAGES.keys() == NODE_IDS
    files = [path.name for path in (ROOT / "web" / "docs").rglob("*") if path.suffix != ".md"]
    assert files == []


def test_a_page_begins_with_the_name_of_its_node(node_types: dict[str, Any]) -> None:
    for node_id, kind in node_types.items():
        assert PAGES[node_id].startswith(f"# {kind.define_schema().display_name}\n\n")


@pytest.mark.parametrize("node_id", sorted(NODE_IDS))
def test_a_page_explains_every_widget(node_types: dict[str, Any], node_id: str) -> None:
    schemas = {name: kind.define_schema() for name, kind in node_types.items()}
    # A page may leave that to the page of another node, which it names.
    told = "\n".join(
        page
        for name, page in PAGES.items()
        if name == node_id or f"*{schemas[name].display_name}*" in PAGES[node_id]
    )
    missing = [
        made.id
        for made in schemas[node_id].inputs
        if made.is_widget and not re.search(rf"\b({made.id}|{re.escape(made.shown)})\b", told)
    ]
    assert not missing, f"web/docs/{node_id}.md does not say what these are: {missing}"


@pytest.mark.parametrize("node_id", sorted(NODE_IDS))
def test_a_page_names_no_other_node_than_there_are(
    node_types: dict[str, Any], node_id: str
) -> None:
    ours = {kind.define_schema().display_name for kind in node_types.values()}
    theirs = {"Load VAE", "DualCLIPLoader", "Load LoRA", "Load LoRA Model"}
    named = re.findall(r"(?<!\*)\*(\w[^*\n]+\w)\*(?!\*)", PAGES[node_id].replace("\n", " "))
    assert {name for name in named if name[0].isupper()} <= ours | theirs
