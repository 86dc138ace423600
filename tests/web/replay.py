"""Stands in for ComfyUI's server: its frontend, recorded nodes, and messages when told to."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import comfyui_frontend_package
from aiohttp import web
from pack.tests.comfyui.server import PACK_NAME
from pack.tests.web.recording import PROMPT_ID, Message, to_wire

T = TypeVar("T")

STATIC = Path(comfyui_frontend_package.__file__).parent / "static"
# Instead of every picture that a recorded run has made.
_PIXEL = (
    '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64" height="64" '
    'fill="#678"/></svg>'
)
FEATURES = {
    "supports_preview_metadata": True,
    "supports_model_type_tags": True,
    "max_upload_size": 100 * 1024 * 1024,
    "extension": {"manager": {"supports_v4": True}},
    "node_replacements": True,
    "assets": False,
}
# What the frontend asks for when it starts, and what a ComfyUI answers that is new and idle.
ANSWERS: dict[str, Any] = {
    "/api/embeddings": [],
    "/api/experiment/models": [],
    "/api/features": FEATURES,
    "/api/global_subgraphs": {},
    "/api/history": {},
    "/api/i18n": {},
    "/api/jobs": {
        "jobs": [],
        "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False},
    },
    "/api/node_replacements": {},
    "/api/queue": {"queue_running": [], "queue_pending": []},
    "/api/system_stats": {
        "system": {
            "os": "linux",
            "ram_total": 2**33,
            "ram_free": 2**32,
            "comfyui_version": "0.33.0",
            "required_frontend_version": comfyui_frontend_package.__version__,
            "python_version": "3.11",
            "pytorch_version": "2.13.0+cpu",
            "embedded_python": False,
            "argv": ["main.py"],
        },
        "devices": [],
    },
    "/internal/folder_paths": {},
    "/internal/logs": "",
    "/templates/index.json": [],
    "/templates/index_logo.json": {},
    "/api/userdata": [],
    "/api/users": {"storage": "server", "migrated": True},
}


class ReplayServer:
    """Serves the frontend on a free port, in a thread of its own, until it is closed.

    Attributes:
        prompts: what was posted to be queued.
        commands: what buttons of a running node asked for.
        refusal: the status and error that they get instead of what they ask for.
    """

    def __init__(self, object_info: dict[str, Any], pack: Path) -> None:
        self.prompts: list[dict[str, Any]] = []
        self.commands: list[dict[str, Any]] = []
        self.refusal: tuple[int, str] | None = None
        self._sockets: set[web.WebSocketResponse] = set()
        workflows = pack.glob("workflows/*.json")
        self._folders = {
            f"/extensions/{PACK_NAME}/": pack / "web",
            f"/api/workflow_templates/{PACK_NAME}/": pack / "workflows",
            "/": STATIC,
        }
        self._answers = ANSWERS | {
            "/api/object_info": object_info,
            "/api/extensions": list(_scripts(pack / "web")),
            "/api/settings": {},
            "/api/workflow_templates": {PACK_NAME: [path.stem for path in workflows]},
        }
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = web.AppRunner(self._app(), shutdown_timeout=0.1)
        self.url = self._wait(self._start())

    def close(self) -> None:
        """Stop; the page that is open loses its connection."""
        self._wait(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def send(self, messages: Iterable[Message]) -> None:
        """Send messages to every open page."""
        self._wait(self._send([to_wire(message) for message in messages]))

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/ws", self._socket)
        app.router.add_get("/api/view", _picture)
        app.router.add_get("/{path:.*}", self._get)
        app.router.add_post("/api/settings", self._post_settings)
        app.router.add_post("/api/settings/{name}", self._post_setting)
        app.router.add_post("/api/prompt", self._post_prompt)
        app.router.add_post("/api/lora_loom/control", self._post_command)
        return app

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    async def _start(self) -> str:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def _send(self, messages: list[str | bytes]) -> None:
        for socket in self._sockets:
            for message in messages:
                if isinstance(message, str):
                    await socket.send_str(message)
                else:
                    await socket.send_bytes(message)

    async def _socket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        status = {"exec_info": {"queue_remaining": 0}}
        sid = request.query.get("clientId") or "client"
        await socket.send_json({"type": "status", "data": {"status": status, "sid": sid}})
        await socket.send_json({"type": "feature_flags", "data": FEATURES})
        self._sockets.add(socket)
        async for _ in socket:
            pass
        self._sockets.discard(socket)
        return socket

    async def _get(self, request: web.Request) -> web.StreamResponse:
        path = request.path
        if path in self._answers:
            return web.json_response(self._answers[path])
        for prefix, folder in self._folders.items():
            file = folder / (path.removeprefix(prefix) or "index.html")
            if path.startswith(prefix) and file.is_file():
                return web.FileResponse(file)
        return web.Response(status=404)  # an error in the browser's console

    async def _post_settings(self, request: web.Request) -> web.Response:
        self._answers["/api/settings"] |= await request.json()
        return web.Response()

    async def _post_setting(self, request: web.Request) -> web.Response:
        self._answers["/api/settings"][request.match_info["name"]] = await request.json()
        return web.Response()

    async def _post_prompt(self, request: web.Request) -> web.Response:
        self.prompts.append(await request.json())
        number = len(self.prompts)
        return web.json_response({"prompt_id": PROMPT_ID, "number": number, "node_errors": {}})

    async def _post_command(self, request: web.Request) -> web.Response:
        self.commands.append(await request.json())
        if self.refusal:
            status, error = self.refusal
            return web.json_response({"error": error}, status=status)
        return web.json_response({"accepted": self.commands[-1]["command"]})


def _scripts(web_folder: Path) -> Iterable[str]:
    """The addresses of what ComfyUI loads into the page: its own extensions and ours."""
    for path in STATIC.glob("extensions/**/*.js"):
        yield f"/{path.relative_to(STATIC).as_posix()}"
    for path in web_folder.glob("**/*.js"):
        yield f"/extensions/{quote(PACK_NAME)}/{path.relative_to(web_folder).as_posix()}"


async def _picture(request: web.Request) -> web.Response:
    return web.Response(text=_PIXEL, content_type="image/svg+xml")
