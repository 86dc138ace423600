"""ComfyUI's page in the browser, through what users see and extensions may use."""

from __future__ import annotations

import base64
import json
import re
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import comfyui_frontend_package
from pack.tests.comfyui.server import PACK_NAME
from selenium import webdriver
from selenium.webdriver.common.by import By

T = TypeVar("T")

NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SCREENSHOTS = Path(__file__).parent / "screenshots"
# A user for whom nothing pops up, on a page that asks no other machine for anything.
SETTINGS = {
    # False is somebody new: a link to a template shows them that and no tour. True would open
    # ComfyUI's own first workflow beside it, which looks for its models on the internet.
    "Comfy.TutorialCompleted": False,
    "Comfy.InstalledVersion": comfyui_frontend_package.__version__,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Window.UnloadConfirmation": False,
    "Comfy.Workflow.Persist": False,
    # For the screenshots: nothing covers the nodes, and small text is drawn, too.
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
}
# Errors in the console of every ComfyUI, with this pack or without it.
HARMLESS = {
    r"user\.css .* 404": "styles of the user, who has none",
    r"comfy\.templates\.json .* 404": "favourite templates of the user, who has none",
    r"graph accessed before initialization": "how the frontend 1.49.6 starts",
    r"userdata\?dir=subgraphs.* 404": "subgraphs of the user, who has none",
    r"https://api\.comfy\.org/nodes\?": "who made a node that failed; there is no internet here",
    rf"{PACK_NAME}/docs/\w+/en\.md .* 404": "a help page in English; then it takes the only one",
}
# Whether text is seen within the rectangle of a node, wherever in the page it is drawn.
_TEXT_ON_NODE = """((node, text) => {
    const {scale, offset} = app.canvas.ds, corner = app.canvas.canvas.getBoundingClientRect();
    const left = corner.left + (node.pos[0] + offset[0]) * scale;
    const top = corner.top + (node.pos[1] + offset[1]) * scale;
    return [...document.querySelectorAll("body *")].some(element => {
        if (element.children.length || !element.innerText?.includes(text)) return false;
        const {x, y, width, height} = element.getBoundingClientRect();
        return width * height > 0 && x >= left && y >= top
            && x + width <= left + node.size[0] * scale
            && y + height <= top + node.size[1] * scale;
    });
})(app.rootGraph.getNodeById(a[0]), a[1])"""


class Page:
    """The page of a ComfyUI at an address, for a new user with the settings of these tests."""

    def __init__(
        self, browser: webdriver.Chrome, address: str, settings: Mapping[str, Any]
    ) -> None:
        self._browser = browser
        self._address = address
        post(f"{address}/api/settings", {**SETTINGS, **settings})

    def open_template(self, name: str) -> None:
        """Follow a link to one of our workflows."""
        self._browser.get("about:blank")
        for log in ("browser", "performance"):
            self._browser.get_log(log)  # of the page before
        self._browser.get(f"{self._address}/?template={name}&source={PACK_NAME}")
        self.wait(
            "app?.vueAppReady && app.extensions.some(one => one.name === 'LoraLoom.Messages')"
        )
        self.wait("app.rootGraph?.nodes.length > 0")
        self.wait_for_drawing()

    def ask(self, expression: str, *arguments: Any) -> Any:
        """The value of a JavaScript expression of ``app`` and ``a``, the arguments."""
        code = f"const app = window.comfyAPI?.app?.app, a = arguments; return {expression}"
        return self._browser.execute_script(code, *arguments)

    def wait(self, expression: str, *arguments: Any) -> Any:
        """The value of an expression once it is true."""
        return wait_until(lambda: self.ask(expression, *arguments), expression)

    def wait_for_drawing(self) -> None:
        """Two frames from now, all that is known is on the screen."""
        self._browser.execute_async_script(
            "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        )

    def wait_for_text(self, node_id: int, text: str) -> None:
        """Some text that is on a node, and not cut off by its border."""
        wait_until(lambda: self.ask(_TEXT_ON_NODE, node_id, text), f"{text!r} on node {node_id}")

    def set_widget(self, node_type: str, name: str, value: Any) -> None:
        """Give a widget of all nodes of a type another value."""
        self.ask(
            "app.rootGraph.nodes.filter(node => node.type === a[0]).forEach(node => "
            "{ node.widgets.find(widget => widget.name === a[1]).value = a[2]; })",
            *(node_type, name, value),
        )

    def click(self, css: str) -> None:
        """Click on the first of these as soon as there is one."""
        found = wait_until(lambda: self._browser.find_elements(By.CSS_SELECTOR, css), css)
        found[0].click()

    def click_on(self, text: str) -> None:
        """Click on the button with that text as soon as there is one."""
        path = f"//button[contains(., '{text}')]"
        found = wait_until(lambda: self._browser.find_elements(By.XPATH, path), path)
        found[0].click()

    def show_all(self) -> None:
        """Move and scale the canvas so that all nodes are seen."""
        self.wait_for_drawing()  # which measures them
        self.ask("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        # It moves there for a third of a second.
        self._browser.execute_async_script("setTimeout(arguments[0], 500)")

    def screenshot(self, name: str) -> None:
        """For people to look at."""
        SCREENSHOTS.mkdir(exist_ok=True)
        self.wait_for_drawing()
        self._browser.save_screenshot(str(SCREENSHOTS / f"{name}.png"))

    def problems(self) -> list[str]:
        """Errors in the console, and warnings that name us, since the last call."""
        return [
            entry["message"]
            for entry in self._browser.get_log("browser")
            if entry["level"] != "INFO"
            and (entry["level"] == "SEVERE" or "lora" in entry["message"].lower())
            and not any(re.search(pattern, entry["message"]) for pattern in HARMLESS)
        ]

    def received(self) -> list[str | bytes]:
        """What came through the websocket since the last call."""
        events = [
            json.loads(one["message"])["message"] for one in self._browser.get_log("performance")
        ]
        frames = [
            event["params"]["response"]
            for event in events
            if event["method"] == "Network.webSocketFrameReceived"
        ]
        return [
            frame["payloadData"] if frame["opcode"] == 1 else base64.b64decode(frame["payloadData"])
            for frame in frames
            if frame["opcode"] in (1, 2)
        ]


def wait_until(attempt: Callable[[], T], what: str, *, seconds: float = 20) -> T:
    """The first true value of ``attempt``."""
    end = time.monotonic() + seconds
    while not (found := attempt()):
        assert time.monotonic() < end, f"waited {seconds} seconds for {what}"
        time.sleep(0.05)
    return found


def post(address: str, body: Any) -> None:
    """Send JSON."""
    request = urllib.request.Request(
        address, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    NO_PROXY.open(request, timeout=20).close()
