from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pack.engine.config import Config
from pack.engine.config_file import to_toml
from pack.tests.engine.jobs import tiny

_LONGEST_SECONDS = 300


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny model; no test changes what is in it."""
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


@pytest.fixture(scope="session")
def training(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a run but its ``output_dir``; no test changes the data set."""
    return tiny.training_settings(model, tmp_path_factory.mktemp("images"))


@dataclass(frozen=True)
class Job:
    """A real process that runs one job as the shell would."""

    pid: int
    log: Path
    ask: Callable[..., Any]

    def poll(self) -> int | None:
        return self.ask(poll=self.pid)

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, negative for a signal."""
        return self.wait_for(self.poll)

    def wait_for(self, found: Callable[[], Any]) -> Any:
        """What ``found`` gives as soon as that is not None."""
        end = time.monotonic() + _LONGEST_SECONDS
        while (result := found()) is None:
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.002)
        return result

    def wait_for_lines(self, path: Path, count: int) -> None:
        """Until a file, such as a loss history, has ``count`` lines or the job has ended."""

        def found() -> bool | None:
            enough = path.exists() and path.read_bytes().count(b"\n") >= count
            return True if enough or self.poll() is not None else None

        self.wait_for(found)


StartJob = Callable[..., Job]


@pytest.fixture(scope="session")
def job_server() -> Iterator[Callable[..., Any]]:
    """Answers requests as `job_server.py` describes."""
    if not hasattr(os, "fork"):
        pytest.skip("jobs are started by fork here")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("job_server.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert server.stdin and server.stdout

    def ask(**request: Any) -> Any:
        server.stdin.write(f"{json.dumps(request)}\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    yield ask
    server.stdin.close()
    server.wait()


@pytest.fixture
def start_job(job_server: Callable[..., Any], tmp_path: Path) -> Iterator[StartJob]:
    """Starts ``python -m engine <job>`` with some settings; ends what still runs afterwards."""
    started: list[Job] = []

    def start(job: str, config: Config, environment: Mapping[str, str] | None = None) -> Job:
        place = tmp_path / f"job_{len(started)}"
        place.with_suffix(".toml").write_text(to_toml(config), "utf-8")
        arguments = [job, "--config_file", str(place.with_suffix(".toml"))]
        log = place.with_suffix(".log")
        pid = job_server(start=arguments, environment=dict(environment or {}), log=str(log))
        started.append(Job(pid, log, job_server))
        return started[-1]

    yield start
    for job in started:
        if job.poll() is None:
            job.send(signal.SIGKILL)
            job.wait()
