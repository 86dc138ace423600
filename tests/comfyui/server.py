"""A real ComfyUI server for tests: on a free port, with a base directory of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
from websocket import WebSocket, WebSocketTimeoutException, create_connection

PACK_NAME = "ComfyUI-LoraLoom"
PACK = Path(__file__).parents[2]
_STAND_INS = Path(__file__).with_name("stand_ins")
_FOLDERS = ("custom_nodes", "datasets", "input", "models", "output", "temp", "user")
_ENDINGS = {
    "execution_success": "success",
    "execution_error": "error",
    "execution_interrupted": "interrupted",
}
_LOOK_EVERY_SECONDS = 0.2
_STOP_SECONDS = 20.0

# Tests talk to this machine only, whatever proxies it is told to use.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Event:
    """A message of the server; ``data`` is bytes where ``kind`` is "binary"."""

    kind: str
    data: Any


@dataclass(frozen=True)
class Run:
    """What came of a prompt.

    ``status`` is "success", "error" or "interrupted", ``error`` the event that told so.
    ``outputs`` is what nodes show, by node id. ``node_errors`` names outputs that the server left
    out because their inputs are wrong, while it executed the others.
    """

    status: str
    outputs: Mapping[str, Any]
    node_errors: Mapping[str, Any]
    error: Mapping[str, Any] | None
    events: Sequence[Event]
    seconds: float

    def data(self, kind: str) -> list[Any]:
        """The data of all events of a kind."""
        return [event.data for event in self.events if event.kind == kind]


class PromptRefused(Exception):
    """The server executed nothing of a prompt; ``answer`` has "error" and "node_errors"."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        super().__init__(json.dumps(answer, indent=1)[:4000])
        self.answer = answer


class ComfyServer:
    """A server that runs within a ``with`` block; ``base`` should be an empty folder."""

    def __init__(
        self,
        comfyui: Path,
        python: Path,
        base: Path,
        *,
        packs: Mapping[str, Path] | None = None,
        arguments: Sequence[str] = ("--cpu",),
        environment: Mapping[str, str] | None = None,
        start_seconds: float = 180.0,
    ) -> None:
        self.base = base
        self.log = base / "server.log"
        self._packs = {PACK_NAME: PACK} if packs is None else packs
        self._port = _free_port()
        self._start_seconds = start_seconds
        self._environment = {**os.environ, **(environment or {})}
        paths = [str(_STAND_INS), self._environment.get("PYTHONPATH", "")]
        self._environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._command = [
            *(str(python), str(comfyui / "main.py"), *arguments),
            *("--port", str(self._port), "--base-directory", str(base)),
            *("--database-url", "sqlite:///:memory:"),
            *("--disable-auto-launch", "--disable-api-nodes", "--dont-print-server"),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "use it in a with block"
        return self._process.pid

    @property
    def environment(self) -> dict[str, str]:
        """What the server and its children find in their environment."""
        return dict(self._environment)

    def __enter__(self) -> ComfyServer:
        for folder in _FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, pack in self._packs.items():
            (self.base / "custom_nodes" / name).symlink_to(pack, target_is_directory=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )
        try:
            self._wait_until_ready(time.monotonic() + self._start_seconds)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def get(self, path: str) -> Any:
        """The answer to a GET request, from its JSON."""
        return self._request(path, None)

    def text(self, path: str) -> str:
        """The answer to a GET request, as it is."""
        with _OPENER.open(self.address + path, timeout=60) as answer:
            return answer.read().decode("utf-8")

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer to a POST request, or nothing if it is empty."""
        return self._request(path, body)

    def object_info(self) -> dict[str, Any]:
        """What the server says of all nodes."""
        return self.get("/object_info")

    def queue(self) -> dict[str, Any]:
        """Prompts under "queue_running" and "queue_pending"."""
        return self.get("/queue")

    def interrupt(self) -> None:
        """What the user's Cancel does; also from within ``on_event``."""
        self.post("/interrupt", {})

    def run(
        self,
        prompt: Mapping[str, Any],
        *,
        on_event: Callable[[Event], None] | None = None,
        extra_data: Mapping[str, Any] | None = None,
        timeout_seconds: float = 300.0,
    ) -> Run:
        """Execute a prompt in the API format and wait for its end.

        Raises:
            PromptRefused: nothing of it can be executed.
            TimeoutError: it did not end in time; it is interrupted.
        """
        start = time.monotonic()
        client = uuid.uuid4().hex
        body = {"prompt": prompt, "client_id": client, "extra_data": extra_data or {}}
        events: list[Event] = []
        url = f"ws://127.0.0.1:{self._port}/ws?clientId={client}"
        # It knows without being told that no proxy is between us and 127.0.0.1.
        with closing(create_connection(url, timeout=_LOOK_EVERY_SECONDS)) as messages:
            messages.send(json.dumps(_FEATURES))
            answer = self._queue_prompt(body)
            while True:
                event = self._next_event(messages, start + timeout_seconds)
                events.append(event)
                if on_event:
                    on_event(event)
                if event.kind in _ENDINGS and event.data["prompt_id"] == answer["prompt_id"]:
                    break
        status = _ENDINGS[event.kind]
        return Run(
            status,
            self._history(answer["prompt_id"])["outputs"],
            answer.get("node_errors") or {},
            None if status == "success" else event.data,
            events,
            time.monotonic() - start,
        )

    def tail(self, characters: int = 4000) -> str:
        """The end of what the server printed."""
        return self.log.read_text("utf-8", errors="replace")[-characters:]

    def _request(self, path: str, body: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self.address + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with _OPENER.open(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def _queue_prompt(self, body: Mapping[str, Any]) -> Any:
        try:
            return self.post("/prompt", body)
        except urllib.error.HTTPError as error:
            content = error.read().decode(errors="replace")
            if error.code != 400:
                raise RuntimeError(f"HTTP {error.code}: {content}\n{self.tail()}") from None
            raise PromptRefused(json.loads(content)) from None

    def _next_event(self, messages: WebSocket, deadline: float) -> Event:
        while True:
            self._check_alive()
            if time.monotonic() > deadline:
                self.interrupt()
                raise TimeoutError(f"the prompt takes too long\n{self.tail()}")
            try:
                message = messages.recv()
            except WebSocketTimeoutException:
                continue
            if isinstance(message, bytes):
                return Event("binary", message)
            read = json.loads(message)
            return Event(read["type"], read["data"])

    def _history(self, prompt_id: str) -> Any:
        """Written just after the last event of a prompt."""
        for _ in range(100):
            if found := self.get(f"/history/{prompt_id}"):
                return found[prompt_id]
            time.sleep(0.05)
        raise RuntimeError(f"there is no history of the prompt\n{self.tail()}")

    def _wait_until_ready(self, deadline: float) -> None:
        while True:
            self._check_alive()
            try:
                self.get("/system_stats")
                return
            except (urllib.error.URLError, ConnectionError):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the server does not answer\n{self.tail()}") from None
                time.sleep(_LOOK_EVERY_SECONDS)

    def _check_alive(self) -> None:
        assert self._process is not None, "use it in a with block"
        if self._process.poll() is not None:
            raise RuntimeError(f"the server ended, {self._process.returncode}\n{self.tail()}")

    def _stop(self) -> None:
        """Ask it to end as Ctrl-C does, then end what is left of it and its children."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        family = [
            *psutil.Process(process.pid).children(recursive=True),
            psutil.Process(process.pid),
        ]
        process.terminate() if os.name == "nt" else process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=_STOP_SECONDS)
        for one in left:
            one.kill()
        process.wait()


_FEATURES = {
    "type": "feature_flags",
    "data": {"supports_preview_metadata": True, "supports_progress_text_metadata": True},
}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
